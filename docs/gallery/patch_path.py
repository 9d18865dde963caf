"""Which head listens to which? Patch the direct path from one head to every later one.

python docs/gallery/patch_path.py [PICTURE.png]
"""

import sys

import torch
from matplotlib import pyplot as plt
from transformer_lens import patching

from hooked_alm import HookedALM

SENDER = 1, 5  # layer and head
model = HookedALM.from_pretrained("bundled:follows_text")
text = 'Requirement: please judge in the tone/emotion of "{}" and give the label.'
words, clip = ("cheerful", "angry"), model.read_clip("bundled:en_sad_strong")
clean, base = (model.prepare(clip, text.format(word)) for word in words)
ids = [model.to_single_token(word) for word in words]


def metric(logits: torch.Tensor) -> torch.Tensor:
    """By how much ``cheerful`` leads ``angry`` at the readout."""
    return logits[0, -1, ids[0]] - logits[0, -1, ids[1]]


with torch.no_grad():
    z = f"blocks.{SENDER[0]}.attn.hook_z"
    caches = [model.run_with_cache(x, names_filter=z)[1] for x in (clean, base)]
    # Only a query reads the clean sender; "k" and "v": set_ungroup_grouped_query_attention(True).
    paths = patching.get_act_patch_direct_path(model, base, *caches, metric, *SENDER, "q")
    effect = paths - metric(model(base))
effect[: SENDER[0] + 1] = 0.0  # no path leads back
layer, head = divmod(int(effect.abs().argmax()), model.cfg.n_heads)
print(f"Into the query of head {layer}.{head}: {effect[layer, head]:+.3f} logits")
plt.matshow(effect, cmap="RdBu", vmin=-effect.abs().max(), vmax=effect.abs().max())
plt.colorbar(label="effect of the path (logits), by layer and head that reads it")
plt.savefig(sys.argv[1] if len(sys.argv) > 1 else "patch_path.png", bbox_inches="tight")
