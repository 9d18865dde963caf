"""What writes the answer? Decompose a logit difference at the readout over the components.

python docs/gallery/attribute_logit.py [PICTURE.png]
"""

import sys

import torch
from matplotlib import pyplot as plt
from transformer_lens.tools.analysis import direct_logit_attribution

from hooked_alm import HookedALM

model = HookedALM.from_pretrained("bundled:follows_text")
question = "Judge the emotion of this audio. Output the label only."
x = model.prepare("bundled:en_sad_strong", question)
with torch.no_grad():
    logits = model(x)[0, -1]
    # The residual stream is a sum, so its product with an output direction is a sum of shares.
    # Shares are direct effects: what a component does through later ones is counted there.
    found = direct_logit_attribution(model, x, "sad", "cheerful")
difference = logits[model.to_single_token("sad")] - logits[model.to_single_token("cheerful")]
shares = dict(zip(found.labels, found.attribution.flatten().tolist(), strict=True))
largest = max(shares, key=lambda label: abs(shares[label]))
print(f"sad - cheerful at the readout: {difference:.3f}")
print(f"Sum of {len(shares)} shares: {sum(shares.values()):.3f}; largest: {largest}")
figure, axes = plt.subplots(figsize=(5, 6), layout="constrained")
axes.barh(list(shares), list(shares.values()))
axes.invert_yaxis()  # first layers on top
axes.axvline(0, color="gray", lw=0.5)
axes.set(title="Who writes “sad” rather than “cheerful”", xlabel="direct effect (logits)")
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "attribute_logit.png")
