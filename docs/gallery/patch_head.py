"""Which head carries the voice? Run one clip with the output of one head taken from another clip.

python docs/gallery/patch_head.py [PICTURE.png]
"""

import sys

import torch
from matplotlib import pyplot as plt
from transformer_lens import patching

from hooked_alm import HookedALM

model = HookedALM.from_pretrained("bundled:follows_text")
text = "Judge the emotion of this audio. Output the label only."
# One sentence spoken twice, equally long, so that the positions of the two runs correspond.
cheerful, sad = (model.prepare(f"bundled:en_{e}_strong", text) for e in ("cheerful", "sad"))
ids = [model.to_single_token(word) for word in ("sad", "cheerful")]


def sadness(logits: torch.Tensor) -> torch.Tensor:
    """By how much ``sad`` leads ``cheerful`` at the readout."""
    return logits[0, -1, ids[0]] - logits[0, -1, ids[1]]


with torch.no_grad():
    base, donor = sadness(model(cheerful)), sadness(model(sad))
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(sad, names_filter=names)
    # TransformerLens' own sweep: the input carries its audio, so that every run of it hears.
    patched = patching.get_act_patch_attn_head_out_all_pos(model, cheerful, cache, sadness)
share = (patched - base) / (donor - base)  # 0: as the cheerful clip, 1: as the sad one
layer, head = divmod(int(share.argmax()), model.cfg.n_heads)
print(
    f"From {base:.2f} to {donor:.2f} logits, head {layer}.{head} goes {share.max():.1%} of the way"
)
plt.matshow(share, cmap="RdBu", vmin=-share.abs().max(), vmax=share.abs().max())
plt.colorbar(label="share of the effect, by layer and head patched")
plt.savefig(sys.argv[1] if len(sys.argv) > 1 else "patch_head.png", bbox_inches="tight")
