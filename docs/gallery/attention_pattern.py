"""Where does a head look? Cache one attention pattern and draw it over the prompt's named spans.

python docs/gallery/attention_pattern.py [PICTURE.png]
"""

import sys

import torch
from matplotlib import pyplot as plt

from hooked_alm import HookedALM

LAYER, HEAD = 2, 4
SPANS = ("sink", "struct", "audio_struct", "audio", "text", "readout")  # every position is in one
model = HookedALM.from_pretrained("bundled:follows_text")
x = model.prepare(
    "bundled:en_sad_strong", "Judge the emotion of this audio. Output the label only."
)
# Only this layer computes a pattern; the others keep the fused kernel, which never makes one.
name = f"blocks.{LAYER}.attn.hook_pattern"
with torch.no_grad():
    _, cache = model.run_with_cache(x, names_filter=name)
pattern = cache[name][0, HEAD]  # [query_pos, key_pos]; rows sum to 1
# The answer is predicted at the last position: what it attends to can become part of the answer.
shares = {span: pattern[-1, x.spans.mask(span)[0]].sum().item() for span in SPANS}
listed = ", ".join(f"{span} {share:.1%}" for span, share in shares.items())
print(f"At the readout, head {LAYER}.{HEAD} attends to: {listed}")

figure, axes = plt.subplots(figsize=(7, 7), layout="constrained")
axes.imshow(pattern.sqrt().numpy(), cmap="Blues")  # the root makes small weights visible
ranges = {r: span for span in SPANS for r in x.spans[span][0] if r[1] - r[0] > 3}
axes.set_xticks([sum(r) / 2 for r in ranges], ranges.values(), rotation=90)
axes.set_yticks([sum(r) / 2 for r in ranges], ranges.values())
for edge in {edge for r in ranges for edge in r}:
    axes.axvline(edge - 0.5, color="gray", lw=0.5)
    axes.axhline(edge - 0.5, color="gray", lw=0.5)
axes.set(title=f"Root of the attention weights, head {LAYER}.{HEAD}", xlabel="key", ylabel="query")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "attention_pattern.png")
