"""What ``lora_blocks`` reads off a model: with the adapter, without it, and block by block.

``lead``: score of the label T minus that of the voice's, in logits. Leads of the adapted run minus
those of the base are what the adapter does; a switched block's part of it is read in two ways that
are never averaged (S-12).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.adapters.outputs import OutputSpectra
from hooked_alm.methods.adapters.switching import (
    SwitchReading,
    adapted_blocks,
    every_combination,
    shapley_values,
    switch_blocks,
    switched,
)
from hooked_alm.methods.adapters.turning import TurnedStream
from hooked_alm.methods.patching.metrics import LogProb
from hooked_alm.methods.reading.contributions import block_contributions
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.reading.lens import StreamReader, lens_fidelity, read_rows

from ..materials.answers import answer_in
from ..materials.conflict_runs import PromptRun
from ..workbench.results import ItemRows, item_rows, joined

Way = Literal["base", "adapted"]
WAYS: tuple[Way, ...] = get_args(Way)
SWITCHES: tuple[SwitchReading, ...] = get_args(SwitchReading)
SHAPES = ("attn", "mlp", "both", "attn_cosine", "mlp_cosine")
"""Columns of what blocks add; see `Contributions`."""
WHOLE = -1
"""What stands for no block, where the whole adapter acts."""
OfLabels = Float[Tensor, "*cell batch label"]


@dataclass(frozen=True, eq=False)
class AdapterMeasures:
    """A model with an adapter, the labels that it is read with, and the prompts of a batch."""

    model: HookedALM
    labels: LabelSet
    runs: Sequence[PromptRun]
    x: ALMInput

    def tables(self, *, shapley: bool) -> dict[str, ItemRows]:
        """Table -> rows of every run; Shapley values where they are asked for."""
        found, parts, streams = self._blocks(), list[dict[str, ItemRows]](), dict[Way, Tensor]()
        blocks = adapted_blocks(self.model)
        for way in WAYS:
            with switched(self.model, blocks if way == "adapted" else []):
                read, streams[way] = self._read(way)
                parts.append({**read, "contributions": self._contributions(way)})
        found |= {name: joined(part[name] for part in parts) for name in parts[0]}
        found["drift"] = self._drift(streams)
        return {**found, **({"shapley": self._shapley()} if shapley else {})}

    def _rows(self, **columns: object) -> ItemRows:
        return item_rows(columns, len(self.runs))

    def _lead(self, scores: OfLabels) -> Float[np.ndarray, "*cell batch"]:
        target, at = [self.labels.index(one.targets[0]) for one in self.runs], range(len(self.runs))
        return (scores[..., at, target] - scores[..., at, self._voice]).cpu().numpy()

    @cached_property
    def _voice(self) -> list[int]:
        return [self.labels.index(one.recording.label) for one in self.runs]

    def _answer(self, values: OfLabels) -> np.ndarray:
        return np.array(self.labels.names)[values.argmax(-1).cpu().numpy()]

    def _erased(self, form: str, blocks: Int[np.ndarray, " block"], log_p: OfLabels) -> ItemRows:
        """What is left of a recogniser of voices: three columns, which are never mixed (M-LO-4)."""
        log_p = log_p.cpu()
        return self._rows(
            form=form, block=blocks[:, None],
            accuracy=(log_p.argmax(-1) == torch.tensor(self._voice)).double().numpy(),
            confidence=log_p.amax(-1).exp().numpy(),
            loss=-log_p[..., range(len(self.runs)), self._voice].numpy(),
        )  # fmt: skip

    def _blocks(self) -> dict[str, ItemRows]:
        """The base, the adapter, and every block switched, or erased with those below it."""
        result = switch_blocks(self.model, self.x, self.labels.log_probs)
        resumed = (result.resumed - result.on).abs().amax(-1).tolist()
        items = self._rows(
            lead_off=self._lead(result.off), lead_on=self._lead(result.on), resumed=resumed
        )
        alone = joined(
            self._rows(block=result.blocks[:, None], reading=reading, lead=self._lead(values),
                       answer=self._answer(values))
            for reading in SWITCHES
            for values in [getattr(result, reading)]
        )  # fmt: skip
        forms = {
            "whole": (np.array([WHOLE]), result.on[None]),
            "single": (result.blocks, result.noise),
            "progressive": (result.blocks, result.erased),
        }
        erased = joined(self._erased(form, *found) for form, found in forms.items())
        return {"items": items, "switched": alone, "erased": erased}

    @torch.no_grad()
    def _read(self, way: Way) -> tuple[dict[str, ItemRows], Float[Tensor, "depth batch d_model"]]:
        """The answer, and what the lens reads at every depth; the stream at the readout."""
        reader, labels = StreamReader(self.model, self.x), self.labels
        with self.model.hooks(fwd_hooks=reader.hooks):
            logits = self.model(self.x)[:, -1].float()
        rows = reader.rows()
        leads = self._lead(labels.scores(logits[:, labels.tokens].double()))
        said = zip(leads.tolist(), logits, strict=True)
        answers = [[{"way": way, "lead": lead, **answer_in(labels, row)}] for lead, row in said]
        lens = labels.scores(read_rows(self.model, rows, labels.tokens).double())[:, :, 0]
        fidelity = lens_fidelity(self.model, rows)
        depths = self._rows(
            way=way, depth=np.arange(len(rows))[:, None], lead=self._lead(lens),
            kl=fidelity.kl[..., 0].cpu().numpy(), same=fidelity.agrees[..., 0].cpu().numpy() > 0,
        )  # fmt: skip
        return {"runs": answers, "depths": depths}, rows[:, :, 0]

    def _contributions(self, way: Way) -> ItemRows:
        found = block_contributions(self.model, self.x)
        shapes = {name: getattr(found, name)[..., 0].numpy() for name in SHAPES}
        return self._rows(way=way, block=np.arange(len(self.model.path))[:, None], **shapes)

    def _drift(self, streams: Mapping[Way, Tensor]) -> ItemRows:
        """How far the adapter moves the stream at the readout, by its length without it."""
        base, adapted = (streams[way].double() for way in WAYS)
        shares = ((adapted - base).norm(dim=-1) / base.norm(dim=-1)).cpu().numpy()
        return self._rows(depth=np.arange(len(shares))[:, None], share=shares)

    def _shapley(self) -> ItemRows:
        found = shapley_values(every_combination(self.model, self.x, self.labels.log_probs))
        leads = self._lead(torch.stack([*found.values()]))
        return self._rows(block=np.array([*found])[:, None], value=leads)

    def add_to(self, turned: TurnedStream, spectra: OutputSpectra) -> None:
        """Adds the prompts to what is said of many clips together."""
        first = [self.labels.spellings[label][0][0] for label in self._voice]
        turned.add(self.x, LogProb(first), ("audio", "readout"))
        spectra.add(self.x)
