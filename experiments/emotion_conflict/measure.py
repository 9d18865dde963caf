"""What ``emotion_conflict`` reads off a model: answer, lens and attention of a run; a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.attention_mass import AttentionMeter, attention_density
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.reading.lens import (
    Lens,
    LensFidelity,
    StreamReader,
    lens_fidelity,
    read_rows,
)

from ..materials.answers import answer_of, by_label, label_weight, lengths_of
from ..materials.conflict_runs import PatchRun, PromptRun
from ..workbench.results import Row
from .settings import EmotionConflictConfig
from .tables import FIDELITY

SEGMENTS = ("audio", "audio_struct", "text", "struct", "sink", "readout")
"""Partition of a prompt, for attention."""
LabelRows = Float[Tensor, "*rows label"]


@dataclass(frozen=True, eq=False)
class ConflictMeasures:
    """A model, the lens and the labels that it is read with, and the switches of a run."""

    model: HookedALM
    lens: Lens
    labels: LabelSet
    config: EmotionConflictConfig

    @torch.no_grad()
    def runs(
        self, runs: Sequence[PromptRun], x: ALMInput
    ) -> list[tuple[dict[str, list[Row]], Row]]:
        """Of every run of a batch its tables, and what of it is kept beside them; one forward."""
        model, labels = self.model, self.labels
        reader, meter = StreamReader(model, x), AttentionMeter(model, x, SEGMENTS)
        with model.hooks(fwd_hooks=[*reader.hooks, *meter.hooks]):
            logits = model(x)[:, -1].float()
        rows = reader.rows()
        lens = labels.scores(read_rows(model, rows, labels.tokens, self.lens))[:, :, 0]
        lens = lens if self.config.lens_depths == "all" else lens[:-1]
        fidelity, mass = lens_fidelity(model, rows, lens=self.lens), meter.mass()
        attention = attention_rows(x, mass)
        found = []
        for n, run in enumerate(runs):
            curves = {one: self._contrast(lens[:, n], run, one).tolist() for one in run.targets}
            tables = {
                "runs": [self._answer_row(run, x, n, logits[n])],
                "delta": [
                    {"target": target, "depth": depth, "delta": delta}
                    for target, curve in curves.items()
                    for depth, delta in enumerate(curve)
                ],
                "depths": self._depth_rows(fidelity, n, lens[:, n]),
                "attention": attention[n],
            }
            found.append((tables, self._kept(mass[:, n, :, 0], curves[run.targets[0]])))
        return found

    def _kept(self, by_head: Float[Tensor, "layer head span"], curve: Sequence[float]) -> Row:
        """What of a run is kept beside its tables."""
        return {
            "delta_logit_by_depth": curve,
            "delta_logit_by_text_layer": curve[: self.model.cfg.n_layers],
            "attention_mass_by_head": {
                "segments": SEGMENTS,
                "layer_head_segment": by_head.tolist(),
            },
            "attn_probe_last_token": {
                f"mass_{span}": by_head[..., SEGMENTS.index(span)].mean(-1).tolist()
                for span in ("audio", "text")
            },
        }

    def _contrast(self, scores: LabelRows, run: PromptRun, target: str) -> Float[Tensor, " *rows"]:
        """The score of T minus that of the voice's label.

        Seed 000 subtracts what the run was labelled with, so that its consistent runs are a label
        minus itself (defect C8).
        """
        is_seeds = self.config.contrast == "seed" and run.condition == "consistent"
        return self._gap(scores, target, run.targets[0] if is_seeds else run.recording.label)

    def _gap(self, scores: LabelRows, label: str, other: str) -> Float[Tensor, " *rows"]:
        return scores[..., self.labels.index(label)] - scores[..., self.labels.index(other)]

    def _answer_row(
        self, run: PromptRun, x: ALMInput, row: int, logits: Float[Tensor, " vocab"]
    ) -> Row:
        scores = self.labels.scores(logits[self.labels.tokens])
        return {
            **run.identity(),
            "prediction": answer_of(self.labels, scores),
            **by_label("z", self.labels, scores),
            "delta_final": float(self._contrast(scores, run, run.targets[0])),
            **label_weight(self.labels, logits),
            "top_token": self.model.tokenizer.decode([int(logits.argmax())]),
            **lengths_of(x, row),
        }

    def _depth_rows(
        self, fidelity: LensFidelity, row: int, lens: Float[Tensor, "depth label"]
    ) -> list[Row]:
        return [
            {
                "depth": depth,
                **by_label("z", self.labels, scores),
                **by_label("p", self.labels, scores.softmax(-1)),
                "prediction": answer_of(self.labels, scores),
                **{name: float(getattr(fidelity, name)[depth, row, 0]) for name in FIDELITY},
            }
            for depth, scores in enumerate(lens)
        ]

    @torch.no_grad()
    def sweeps(
        self, sweeps: Sequence[PatchRun], base: ALMInput, donor: ALMInput
    ) -> list[tuple[list[Row], Row]]:
        """Of every sweep of a batch a row per block and span; and the scores of base and donor."""
        config = self.config
        found = patch(
            self.model,
            base,
            donor,
            LabelScores(self.labels),
            site="resid_post",
            layers=config.patched_layers(self.model.cfg.n_layers),
            places=list(config.patched_spans().values()),
            # The seed's donor is the state before the patched block (defect C1).
            donor_site="resid_pre" if config.donor_index == "seed_hs" else None,
            **config.patch_options(),
        )
        results = []
        for n, sweep in enumerate(sweeps):
            # In fp32, as they were measured, and as the scores of whole runs are.
            cells, base_scores, donor_scores = (
                torch.from_numpy(values).float()
                for values in (found.values[:, :, n], found.base[n], found.donor[n])
            )
            rows = self._cell_rows(sweep, cells, base_scores, donor_scores)
            about = {
                "span_length_ratio": found.length_ratios[n],
                "base_scores": base_scores.tolist(),
                "donor_scores": donor_scores.tolist(),
                "base_prediction": answer_of(self.labels, base_scores),
                "donor_prediction": answer_of(self.labels, donor_scores),
            }
            results.append(
                ([{**one, "noise": found.noise_between_labels[n]} for one in rows], about)
            )
        return results

    def _cell_rows(
        self,
        sweep: PatchRun,
        cells: Float[Tensor, "layer span label"],
        base_scores: Float[Tensor, " label"],
        donor_scores: Float[Tensor, " label"],
    ) -> list[Row]:
        config = self.config
        base, donor = (float(self._gap(one, *sweep.toward)) for one in (base_scores, donor_scores))
        total = donor - base
        places = product(config.patched_layers(self.model.cfg.n_layers), config.patched_spans())
        rows = []
        for (block, span), scores in zip(places, cells.flatten(0, 1), strict=True):
            shift, prediction = (
                float(self._gap(scores, *sweep.toward)) - base,
                answer_of(self.labels, scores),
            )
            rows.append(
                {
                    **sweep.identity(),
                    "block": block,
                    "span": span,
                    "prediction": prediction,
                    "flip": float(prediction != answer_of(self.labels, base_scores)),
                    "shift": shift,
                    "recovery": shift / total if abs(total) >= config.min_effect else np.nan,
                    "base": base,
                    "donor_metric": donor,
                    "total_effect": total,
                    **by_label("z", self.labels, scores),
                }
            )
        return rows


def attention_rows(
    x: ALMInput, mass: Float[Tensor, "layer batch head query span"]
) -> list[list[Row]]:
    """Means over heads, of the readout, prompt by prompt."""
    sink = SEGMENTS.index("sink")
    without_sink = mass / (1 - mass[..., [sink]])
    without_sink[..., sink] = torch.nan
    density = attention_density(mass, x, SEGMENTS)
    measures = {"mass": mass, "density": density, "mass_without_sink": without_sink}
    found = []
    for n in range(len(x)):
        rows: list[Row] = []
        for index, span in enumerate(SEGMENTS):
            means = {k: one[:, n, :, 0, index].mean(-1).tolist() for k, one in measures.items()}
            for layer in range(len(mass)):
                row = {"layer": layer, "span": span, **{name: means[name][layer] for name in means}}
                rows.append(row | {"n_tokens": len(x.spans.positions(span, n))})
        found.append(rows)
    return found
