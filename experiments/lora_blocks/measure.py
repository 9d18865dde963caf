"""What ``lora_blocks`` reads off a model: with the adapter, without it, and block by block.

``lead``: score of the label T minus that of the voice's, in logits. Leads of the adapted run minus
those of the base are what the adapter does; a switched block's part of it is read in two ways that
are never averaged (S-12).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.adapters.switching import (
    SwitchReading,
    adapted_blocks,
    every_combination,
    shapley_values,
    switch_blocks,
    switched,
)
from hooked_alm.methods.adapters.updates import update_sizes
from hooked_alm.methods.reading.contributions import block_contributions
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.reading.lens import StreamReader, unembed_rows

from ..materials.answers import answer_of, by_label, label_weight
from ..materials.conflict_runs import PromptRun
from ..workbench.results import Row
from .settings import LoraBlocksConfig

Way = Literal["base", "adapted"]
WAYS: tuple[Way, ...] = get_args(Way)
SWITCHES: tuple[SwitchReading, ...] = get_args(SwitchReading)
SHAPES = ("attn", "mlp", "both", "attn_cosine", "mlp_cosine")
"""Columns of what blocks add; see `Contributions`."""
RowsOfRuns = list[dict[str, list[Row]]]
"""Rows of every table, run by run of a batch."""


@dataclass(frozen=True, eq=False)
class AdapterMeasures:
    """A model with an adapter, the labels that it is read with, and the settings of a run."""

    model: HookedALM
    labels: LabelSet
    config: LoraBlocksConfig

    def rows(self, runs: Sequence[PromptRun], x: ALMInput) -> RowsOfRuns:
        """All that is measured of a batch."""
        found: RowsOfRuns = [defaultdict(list) for _ in runs]
        self._blocks(runs, x, found)
        blocks = adapted_blocks(self.model)
        streams = {}
        for way in WAYS:
            with switched(self.model, blocks if way == "adapted" else []):
                streams[way] = self._read(way, runs, x, found)
                self._contributions(way, x, found)
        self._drift(streams, found)
        if self.config.shapley:
            self._shapley(runs, x, found)
        return found

    def _scores(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch label"]:
        return self.labels.scores(logits[:, self.labels.tokens].double())

    def _lead(self, run: PromptRun, scores: Float[Tensor, " label"]) -> float:
        target, voice = (self.labels.index(n) for n in (run.targets[0], run.recording.label))
        return float(scores[target] - scores[voice])

    def _blocks(self, runs: Sequence[PromptRun], x: ALMInput, found: RowsOfRuns) -> None:
        """The base, the adapter, and every block switched."""
        result = switch_blocks(self.model, x, self._scores)
        for n, run in enumerate(runs):
            totals = {"lead_off": result.off[n], "lead_on": result.on[n]}
            whole = {name: self._lead(run, one) for name, one in totals.items()}
            resumed = float((result.resumed[n] - result.on[n]).abs().max())
            found[n]["items"].append({**whole, "resumed": resumed})
            for reading in SWITCHES:
                scores = getattr(result, reading)[:, n]
                for block, one in zip(result.blocks.tolist(), scores, strict=True):
                    found[n]["switched"].append({
                        "block": block, "reading": reading, "lead": self._lead(run, one),
                        "answer": answer_of(self.labels, one),
                    })  # fmt: skip

    @torch.no_grad()
    def _read(
        self, way: Way, runs: Sequence[PromptRun], x: ALMInput, found: RowsOfRuns
    ) -> Float[Tensor, "depth batch d_model"]:
        """The answer, and what the lens reads at every depth; the stream at the readout."""
        reader = StreamReader(self.model, x)
        with self.model.hooks(fwd_hooks=reader.hooks):
            logits = self.model(x)[:, -1].float()
        streams = reader.rows()[:, :, 0]
        for n, (run, scores) in enumerate(zip(runs, self._scores(logits), strict=True)):
            found[n]["runs"].append({
                "way": way, "prediction": answer_of(self.labels, scores),
                "lead": self._lead(run, scores), **by_label("z", self.labels, scores),
                **label_weight(self.labels, logits[n]),
            })  # fmt: skip
        last = unembed_rows(self.model, streams[-1]).log_softmax(-1)
        for depth, rows in enumerate(streams):
            lens = unembed_rows(self.model, rows)
            kl = (last.exp() * (last - lens.log_softmax(-1))).sum(-1)
            same = lens.argmax(-1) == last.argmax(-1)
            for n, (run, scores) in enumerate(zip(runs, self._scores(lens), strict=True)):
                found[n]["depths"].append({
                    "way": way, "depth": depth, "lead": self._lead(run, scores),
                    "kl": float(kl[n]), "same": bool(same[n]),
                })  # fmt: skip
        return streams

    def _contributions(self, way: Way, x: ALMInput, found: RowsOfRuns) -> None:
        result = block_contributions(self.model, x)
        for n, tables in enumerate(found):
            for block in range(len(self.model.path)):
                tables["contributions"].append({
                    "way": way, "block": block,
                    **{name: float(getattr(result, name)[block, n, 0]) for name in SHAPES},
                })  # fmt: skip

    def _drift(self, streams: dict[Way, Tensor], found: RowsOfRuns) -> None:
        """How far the adapter moves the stream at the readout, by its length without it."""
        base, adapted = (streams[way].double() for way in WAYS)
        shares = (adapted - base).norm(dim=-1) / base.norm(dim=-1)
        for n, tables in enumerate(found):
            for depth, share in enumerate(shares[:, n].tolist()):
                tables["drift"].append({"depth": depth, "share": share})

    def _shapley(self, runs: Sequence[PromptRun], x: ALMInput, found: RowsOfRuns) -> None:
        values = shapley_values(every_combination(self.model, x, self._scores))
        for n, run in enumerate(runs):
            for block, scores in values.items():
                row = {"block": block, "value": self._lead(run, scores[n])}
                found[n]["shapley"].append(row)


def size_rows(model: HookedALM) -> Iterator[Row]:
    """The size of every update in the blocks."""
    for one in update_sizes(model):
        yield {
            "block": one.block, "module": one.module, "rank": one.rank,
            "frobenius": one.frobenius, "spectral": one.spectral, "of_weight": one.of_weight,
        }  # fmt: skip
