"""What is measured on one item: its runs as they were, or made as long as each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import AudioClip
from hooked_alm.methods.reading.divergence import Divergence, compare_depths, lockstep
from hooked_alm.methods.reading.lens import Lens, LogitLens
from hooked_alm.methods.reading.segment_mass import MassMeter

from ..workbench.experiment import UnitResult
from .memory import left_over, query_bytes
from .plan import (
    Contents,
    PrefixRun,
    joined_as_text,
    matched,
    position_runs,
    positions_of,
    teacher_forced,
)
from .prompts import PreparedItem
from .rows import Measured, by_depth
from .saved import decoded
from .settings import PosMode, PrefixComparisonConfig
from .tokens import Kind, Tokens, read_tokens


@dataclass(frozen=True, eq=False)
class TwoPrefixes:
    """The prefixes that a run compares; where its settings leave a choice, the items decide."""

    model: HookedALM
    config: PrefixComparisonConfig
    items: Sequence[PreparedItem]
    a: str
    b: str
    lens: Lens = field(default_factory=LogitLens)

    @property
    def clips(self) -> list[AudioClip]:
        """The clips of all prefixes."""
        return [clip for one in self.items for p in one.prefixes.values() for clip in p.x.clips]

    @cached_property
    def segment(self) -> str:
        """What a has and b has not; every item's a must have some."""
        has_audio = all(one.prefixes[self.a].x.clips for one in self.items)
        name = self.config.segment or ("audio" if has_audio else "tool_response")
        for one in self.items:
            x = one.prefixes[self.a].x
            if not positions_of(x, name):
                known = ", ".join(segment for segment in x.spans if x.spans[segment][0])
                raise InputError(
                    f"{one.item.where}: conditions.{self.a}: got no token in segment {name!r}, "
                    f"expected some; it has {known}. Set -s segment=..."
                )
        return name

    @cached_property
    def kind(self) -> Kind:
        """Whose token classes are told apart."""
        if self.config.classes != "auto":
            return self.config.classes
        return "speech" if self.clips else "code"

    @cached_property
    def outcomes(self) -> str:
        """Where it is known from whether a run was right; a file must say so of all or none."""
        found = {
            one.item.where: [one.item.conditions[name].outcome for name in (self.a, self.b)]
            for one in self.items
        }
        is_known = any(outcome is not None for pair in found.values() for outcome in pair)
        if self.config.outcomes == "greedy" or (self.config.outcomes == "auto" and not is_known):
            return "greedy"
        if lacking := [where for where, pair in found.items() if None in pair]:
            raise InputError(
                f"reading outcomes: {lacking[0]} lacks conditions.{self.a}.outcome or "
                f"conditions.{self.b}.outcome ({len(lacking)} of {len(found)} items do), expected "
                "both in every item. Add them, or set -s outcomes=greedy"
            )
        return "file"

    def run(self, one: PreparedItem, name: str) -> PrefixRun:
        """An item's continuation after one of its prefixes."""
        if self.config.concatenate == "text":
            return joined_as_text(self.model, one, name)
        return teacher_forced(name, one.prefixes[name].x, one.continuation)

    def tokens(self, one: PreparedItem, runs: Sequence[PrefixRun]) -> Tokens:
        """The tokens that every run of an item has, as the first run has them."""
        ids = runs[0].targets[: min(len(run.targets) for run in runs)].tolist()
        offsets, text = one.offsets[: len(ids)], one.item.continuation
        if ids != one.continuation[: len(ids)]:  # joined as text, the boundary merged
            ends = np.cumsum([len(decoded(self.model.tokenizer, token)) for token in ids])
            ends = np.minimum(ends, len(text)).tolist()
            offsets = list(zip([0, *ends[:-1]], ends, strict=True))
        return read_tokens(self.model.tokenizer, ids, offsets, text, self.kind, one.item.labels)

    def as_run(self, one: PreparedItem) -> UnitResult:
        """Every prefix as it was, and a with other content in the segment."""
        others = [name for name in one.prefixes if name not in (self.a, self.b)]
        runs = [self.run(one, name) for name in (self.a, self.b, *others)]
        index = self.items.index(one)
        contents = Contents(self.model, self.items, index, runs[0], self.segment, self.config)
        changed, left_out = contents.interventions()
        roles = ["a", "b", *["condition"] * len(others), *["intervention"] * len(changed)]
        runs += changed
        tokens = self.tokens(one, runs)
        meters = [MassMeter(self.model, run.x, run.queries[tokens.semantic]) for run in runs]
        pairs = [(i, 1) for i in range(len(runs)) if i != 1]
        found = self.compare(runs, pairs, meters)
        by_file = {name: condition.outcome for name, condition in one.item.conditions.items()}
        measured = Measured(
            who={"item": one.item.id, "group": one.item.group}, runs=runs, roles=roles,
            found=found, tokens=tokens, masses=[meter.result() for meter in meters],
            segment=self.segment, given=by_file if self.outcomes == "file" else None,
        )  # fmt: skip
        about = {"runs": [run.name for run in runs], "roles": roles, "left_out": left_out}
        return UnitResult(measured.tables(), {**measured.who, **about, **measured.record()})

    def matched(self, one: PreparedItem, mode: PosMode) -> UnitResult:
        """The two prefixes, the shorter one made as long as the other."""
        a, b = self.run(one, self.a), self.run(one, self.b)
        gap = a.start - b.start
        shorter = 1 if gap > 0 else 0
        moved = matched((a, b)[shorter], abs(gap), mode, self.model, self.config.filler)
        runs = [a, b, moved]
        # Both as matched, then the moved one against what it was.
        new_a, new_b = (0, 2) if shorter else (2, 1)
        tokens = self.tokens(one, runs)
        pairs = [(new_a, new_b), (2, shorter)]
        found = self.compare(runs, pairs)
        nll, js = found.nll, found.js
        at_a, at_b = (
            int(run.x.position_ids[..., run.start + tokens.semantic[0]].flatten()[0])
            for run in (runs[new_a], runs[new_b])
        )
        who = {"item": one.item.id, "group": one.item.group, "mode": mode}
        row = {
            **who,
            "moved": (self.a, self.b)[shorter],
            "n": abs(gap),
            "target_position_a": at_a,
            "target_position_b": at_b,
            "is_matched": at_a == at_b,
            "largest_nll_change": float((nll[-1, 2] - nll[-1, shorter]).abs().max()),
            "largest_js": float(js[-1, 1].max()),
        }
        delta = nll[:, new_a] - nll[:, new_b]
        about = {**who, "depth": range(len(nll))}
        curve = by_depth(about, tokens.semantic, delta=delta, js=js[:, 0])
        ids = {str(i): position_runs(run.x) for i, run in enumerate(runs)}
        record = {**row, "position_ids": ids, "spans": moved.x.spans.to_json()}
        return UnitResult({"positions": [row], "matched": curve}, record)

    def compare(
        self,
        runs: Sequence[PrefixRun],
        pairs: Sequence[tuple[int, int]],
        meters: Sequence[MassMeter] = (),
    ) -> Divergence:
        """Losses of runs and divergences of pairs at depths 0..L, over every token in common.

        One forward per run; ``max_bytes`` is what all of it may hold. Under ``hf_tuple`` the last
        depth is Hugging Face's ``hidden_states[-1]``, which is normed already (defect C6).
        Source: cards M-002-3 and M-002-4.
        """
        model, config = self.model, self.config
        n = min(len(run.targets) for run in runs)
        queries = torch.stack([run.queries[:n] for run in runs])
        targets = torch.stack([run.targets[:n] for run in runs])
        depths = lockstep(model, [run.x for run in runs], queries, [one.hooks() for one in meters])
        if config.lens_source == "hf_tuple":
            n_blocks = len(model.path)
            depths = (model.head_norm(x) if k == n_blocks else x for k, x in enumerate(depths))
        lengths = [run.x.shape[1] for run in runs]
        n_segments = max((len(meter.segments) for meter in meters), default=0)
        n_tokens = max(len(run.targets) for run in runs)
        left = left_over(model, lengths, n_tokens, n_segments, config.max_bytes)
        for meter in meters:
            keys, per_query = query_bytes(model, meter.x.shape[1])
            meter.at_once = (left - keys) // per_query
        return compare_depths(model, depths, targets, pairs, lens=self.lens, max_bytes=left)
