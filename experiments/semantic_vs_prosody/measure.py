"""What ``semantic_vs_prosody`` reads off a model: the lens of a clip, the patches of a sweep."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.audio import read_audio
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.reading.lens import lens_fidelity, residual_rows, unembed_rows
from hooked_alm.points import Site

from ..workbench.experiment import Row
from .items import SpokenItem
from .settings import SemanticVsProsodyConfig


@dataclass(frozen=True, eq=False)
class Measures:
    """A model, the labels that are scored, and the switches of a run."""

    model: HookedALM
    labels: LabelSet
    config: SemanticVsProsodyConfig

    @torch.no_grad()
    def lens(self, x: ALMInput) -> tuple[list[Row], Row]:
        """A row per depth; and what the model itself answers."""
        model, labels = self.model, self.labels
        rows = residual_rows(model, x)
        depths = list(range(len(rows)))
        final = model(x)[0, -1].float()
        read = rows
        if self.config.lens_source == "hf_tuple":
            # Hugging Face's last entry is the normed state, and the lens norms it again.
            read, depths = torch.cat([rows[1:-1], model.ln_final(rows[-1:])]), depths[1:]
        scores = labels.scores(unembed_rows(model, read, labels.tokens))[:, 0, 0]
        # Compared with the true last state, whatever was read.
        fidelity = lens_fidelity(model, torch.cat([read, rows[-1:]]))
        table = [
            {
                "depth": depth,
                **self._by_label(scores[i]),
                **self._among_all_words(unembed_rows(model, read[i, 0, 0])),
                "kl": float(fidelity.kl[i, 0, 0]),
                "agrees": float(fidelity.agrees[i, 0, 0]),
                "entropy": float(fidelity.entropy[i, 0, 0]),
                "residual_norm": float(fidelity.residual_norm[i, 0, 0]),
            }
            for i, depth in enumerate(depths)
        ]
        final_scores = labels.scores(final[labels.tokens])
        return table, {
            "prediction": self._answer(final_scores),
            **self._by_label(final_scores),
            **self._among_all_words(final),
            "top_token": model.tokenizer.decode([int(final.argmax())]),
        }

    def sweep(
        self,
        base: ALMInput,
        donor: ALMInput | Literal["self"],
        spans: Mapping[str, tuple[str, ...]],
    ) -> tuple[list[Row], Row]:
        """A row per depth 0..L and span; and the scores of base and donor.

        Depth k is patched before block k, so that depth 0 exchanges inputs; L after the last block.
        """
        last = self.model.cfg.n_layers - 1
        sites: tuple[tuple[Site, list[int] | None], ...] = (
            ("resid_pre", None), ("resid_post", [last])
        )  # fmt: skip
        found = [
            patch(
                self.model,
                base,
                donor,
                LabelScores(self.labels),
                site=site,
                layers=layers,
                places=list(spans.values()),
                policy=self.config.align_policies(),
                engine=self.config.engine,
                max_bytes=self.config.max_bytes,
            )
            for site, layers in sites
        ]
        # In fp32, as they were measured, and as the scores of whole runs are.
        values = torch.from_numpy(np.concatenate([one.values for one in found])).float()
        cells = [
            {
                "depth": depth,
                "span": span,
                "prediction": self._answer(values[depth, j, 0]),
                **self._by_label(values[depth, j, 0]),
            }
            for depth in range(len(values))
            for j, span in enumerate(spans)
        ]
        ends: Row = {}
        for end, scores in (("base", found[0].base), ("donor", found[0].donor)):
            if end == "base" or donor != "self":
                own = torch.from_numpy(scores[0]).float()
                ends |= {f"{end}_prediction": self._answer(own), **self._by_label(own, end)}
        return cells, ends

    def _among_all_words(self, logits: Float[Tensor, " vocab"]) -> Row:
        """Whether the labels are what the model would say at all."""
        ours = logits[self.labels.tokens]
        return {
            "label_mass": float(logits.log_softmax(-1)[self.labels.tokens].exp().sum()),
            "best_label_rank": int((logits > ours.max()).sum()) + 1,
        }

    def _answer(self, scores: Float[Tensor, " label"]) -> str:
        return self.labels.names[int(scores.argmax())]

    def _by_label(self, scores: Float[Tensor, " label"], prefix: str = "z") -> dict[str, float]:
        names = [f"{prefix}_{name}" for name in self.labels.names]
        return dict(zip(names, scores.tolist(), strict=True))


# --- Donors that say nothing


def silence_like(model: HookedALM, item: SpokenItem, seconds: float | None) -> AudioClip:
    """Digital silence of the item's length."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*silent")  # it is meant to be
        return model.read_clip(np.zeros_like(_heard(model, item, seconds)))


def noise_like(model: HookedALM, item: SpokenItem, seconds: float | None, seed: int) -> AudioClip:
    """White noise of the item's length and level, the same whenever it is made."""
    heard = _heard(model, item, seconds)
    digest = hashlib.sha256(f"{seed}/{item.name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    level = np.sqrt(np.square(heard, dtype=np.float64).mean())
    noise = np.clip(level * rng.standard_normal(heard.shape), -1, 1)
    return model.read_clip(noise.astype(np.float32))


def _heard(model: HookedALM, item: SpokenItem, seconds: float | None) -> np.ndarray:
    """The item's samples at the model's rate, as far as it hears them."""
    assert model.prompts is not None
    rate = model.prompts.feature_extractor.sampling_rate
    return read_audio(item.path, sampling_rate=rate, max_seconds=seconds, truncate=True).samples
