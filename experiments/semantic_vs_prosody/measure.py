"""What ``semantic_vs_prosody`` reads off a model: the lens of a clip, the patches of a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.reading.lens import StreamReader, lens_fidelity, unembed_rows
from hooked_alm.points import Site

from ..workbench.results import Row
from .settings import SemanticVsProsodyConfig

FIDELITY = ("kl", "agrees", "entropy", "residual_norm")


@dataclass(frozen=True, eq=False)
class Measures:
    """A model, the labels that are scored, and the switches of a run."""

    model: HookedALM
    labels: LabelSet
    config: SemanticVsProsodyConfig

    @torch.no_grad()
    def lens(self, x: ALMInput) -> list[tuple[list[Row], Row]]:
        """Of every prompt of a batch a row per depth; and what the model itself answers."""
        model, labels, reader = self.model, self.labels, StreamReader(self.model, x)
        with model.hooks(fwd_hooks=reader.hooks):
            final = model(x)[:, -1].float()
        read = rows = reader.rows()
        depths = list(range(len(rows)))
        if self.config.lens_source == "hf_tuple":
            # Hugging Face's last entry is the normed state, and the lens norms it again.
            read, depths = torch.cat([rows[1:-1], model.ln_final(rows[-1:])]), depths[1:]
        scores = labels.scores(unembed_rows(model, read, labels.tokens))[:, :, 0]
        # Compared with the true last state, whatever was read.
        fidelity = lens_fidelity(model, torch.cat([read, rows[-1:]]))
        found = []
        for n in range(len(x)):
            table = [
                {
                    "depth": depth,
                    **self._by_label(scores[i, n]),
                    **self._among_all_words(unembed_rows(model, read[i, n, 0])),
                    **{name: float(getattr(fidelity, name)[i, n, 0]) for name in FIDELITY},
                }
                for i, depth in enumerate(depths)
            ]
            said = {
                **self._said(labels.scores(final[n, labels.tokens])),
                **self._among_all_words(final[n]),
                "top_token": model.tokenizer.decode([int(final[n].argmax())]),
            }
            found.append((table, said))
        return found

    def sweeps(
        self,
        base: ALMInput,
        donor: ALMInput | Literal["self"],
        spans: Mapping[str, tuple[str, ...]],
    ) -> list[tuple[list[Row], Row]]:
        """Of every base of a batch a row per depth and span; and the scores of base and donor.

        Depth k is patched before block k, so that depth 0 exchanges inputs; L after the last block.
        """
        last = [self.model.cfg.n_layers - 1]
        sites: dict[Site, list[int] | None] = {"resid_pre": None, "resid_post": last}
        found = [
            patch(
                self.model,
                base,
                donor,
                LabelScores(self.labels),
                site=site,
                layers=layers,
                places=list(spans.values()),
                policy={"audio": self.config.align},
                engine=self.config.engine,
                max_bytes=self.config.max_bytes,
            )
            for site, layers in sites.items()
        ]
        values = _fp32(np.concatenate([one.values for one in found]))
        noise = [one.noise_between_labels for one in found for _ in one.axes["layer"]]
        results = []
        for n in range(len(base)):
            cells = [
                {"depth": depth, "span": span, "noise": noise[depth][n], **self._said(scores)}
                for depth, at_depth in enumerate(values[:, :, n])
                for span, scores in zip(spans, at_depth, strict=True)
            ]
            ends = self._said(_fp32(found[0].base[n]), "base")
            if donor != "self":
                ends |= self._said(_fp32(found[0].donor[n]), "donor")
            results.append((cells, ends))
        return results

    def _among_all_words(self, logits: Float[Tensor, " vocab"]) -> Row:
        """Whether the labels are what the model would say at all."""
        ours = logits[self.labels.tokens]
        return {
            "label_mass": float(logits.log_softmax(-1)[self.labels.tokens].exp().sum()),
            "best_label_rank": int((logits > ours.max()).sum()) + 1,
        }

    def _said(self, scores: Float[Tensor, " label"], end: str = "") -> Row:
        """The label with the highest score, and the scores of all."""
        answer = self.labels.names[int(scores.argmax())]
        named = f"{end}_prediction" if end else "prediction"
        return {named: answer, **self._by_label(scores, end or "z")}

    def _by_label(self, scores: Float[Tensor, " label"], end: str = "z") -> Row:
        names = [f"{end}_{name}" for name in self.labels.names]
        return dict(zip(names, scores.tolist(), strict=True))


def _fp32(scores: np.ndarray) -> Tensor:
    """Scores as they were measured, and as those of whole runs are."""
    return torch.from_numpy(scores).float()
