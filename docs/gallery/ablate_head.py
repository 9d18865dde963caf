"""Which head does the answer need? Switch every head off in turn, by the name of its hook.

python docs/gallery/ablate_head.py [PICTURE.png]
"""

import sys
from functools import partial

import torch
from matplotlib import pyplot as plt

from hooked_alm import HookedALM

model = HookedALM.from_pretrained("bundled:follows_text")
# The voice is sad, the instruction says cheerful, and this model was trained to obey the latter.
text = 'Requirement: please judge in the tone/emotion of "cheerful" and give the label.'
x = model.prepare("bundled:en_sad_strong", text)
cheerful, sad = model.to_single_token("cheerful"), model.to_single_token("sad")


def zero(z: torch.Tensor, hook: object, head: int) -> torch.Tensor:
    """Zeros for what one head hands to W_O; ``z`` is [batch, pos, head, d_head]."""
    return z.index_fill(2, torch.tensor(head), 0.0)


effect = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
with torch.no_grad():
    before = model(x)[0, -1]
    for layer, head in torch.ones_like(effect).nonzero().tolist():
        hooks = [(f"blocks.{layer}.attn.hook_z", partial(zero, head=head))]
        change = model.run_with_hooks(x, fwd_hooks=hooks)[0, -1] - before
        effect[layer, head] = change[cheerful] - change[sad]  # what moves both decides nothing
layer, head = divmod(int(effect.abs().argmax()), model.cfg.n_heads)
print(f"Without head {layer}.{head}, cheerful - sad changes by {effect[layer, head]:+.2f} logits")
plt.matshow(effect, cmap="RdBu", vmin=-effect.abs().max(), vmax=effect.abs().max())
plt.colorbar(label="change of cheerful − sad (logits), by layer and head switched off")
plt.savefig(sys.argv[1] if len(sys.argv) > 1 else "ablate_head.png", bbox_inches="tight")
