"""Two prefixes, one continuation: at which depth and token does the one help more?

A real and a silent clip, a recording and its transcript, a prompt with and without a tool's answer:
each is followed by the same tokens, teacher-forced. The logit lens reads the loss on every token
at every depth; attention is summed by segment of the prefix; length and content are controlled.

Source: seed document 002; methods cards M-002-1 to M-002-15. Tables: ``items``, ``runs`` (a row
per item and prefix), ``curves`` (by depth), ``classes`` (by token class and depth), ``mass`` (by
layer and segment), ``coupling`` (by layer), ``positions`` and ``matched`` (position modes). Arrays:
``items/{id}`` (depth by token).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hooked_alm.errors import InputError

from ..materials.bundled import ASSETS, PREFIX
from ..materials.subject import described, load_subject
from ..materials.trained_lens import described_lens, load_lens
from ..workbench.experiment import Experiment, Tables, Unit, UnitResult
from ..workbench.report import Report
from ..workbench.run_folder import RunFolder
from .items import read_items, sha256
from .measure import MassMeter, compare
from .memory import check_memory
from .plan import (
    PrefixRun,
    filler_ids,
    interventions,
    joined_as_text,
    matched,
    position_runs,
    teacher_forced,
)
from .prompts import PreparedItem, prefix_check, prepare_items
from .report import conclude
from .rows import class_rows, coupling_rows, curve_rows, item_row, mass_rows, of_segment, run_rows
from .saved import decoded
from .settings import PosMode, PrefixComparisonConfig
from .shards import pack
from .tokens import Kind, Tokens, read_tokens


class PrefixComparison(Experiment[PrefixComparisonConfig]):
    """Teacher-forced comparison of two prefixes, on any model and any file of items."""

    name = "prefix_comparison"
    question = "At which depth and token does one prefix help more than the other?"
    Config = PrefixComparisonConfig
    schema_version = 2

    def open(self) -> dict[str, Any]:
        """Load model and items, and check every prompt before the first unit."""
        config = self.config
        is_bundled = config.items == "bundled"
        items = read_items(ASSETS / "prefix_comparison.jsonl" if is_bundled else config.items)
        names = list(items[0].conditions)
        self.a, self.b = config.a or names[0], config.b or names[1]
        if {self.a, self.b} - {*names} or self.a == self.b:
            raise InputError(
                f"choosing conditions: got a={self.a!r} and b={self.b!r}, expected two different "
                f"ones of {', '.join(names)}. Set -s a=... and -s b=..."
            )
        self.model = load_subject(config)
        self.lens = None if config.tuned_lens is None else load_lens(config.tuned_lens, self.model)
        self.items = prepare_items(self.model, items, truncate=config.truncate)
        # All that a unit would otherwise find out after work was done.
        memory = check_memory(self.model, self.items, config)
        filler_ids(self.model, config.filler, 1)
        self.segment = self._segment()
        self.kind = self._kind()
        self.outcomes = self._outcomes()
        self._check_semantic()
        self._check_streams()
        if config.concatenate == "text":
            for one in self.items:
                for name in one.prefixes:
                    self._run(one, name)
        return {
            "model": described(self.model, config),
            "known_defects": config.known_defects(),
            "compared": {"a": self.a, "b": self.b, "segment": self.segment},
            "classes": self.kind,
            "outcomes": self.outcomes,
            **(
                {}
                if config.tuned_lens is None
                else {"tuned_lens": described_lens(config.tuned_lens)}
            ),
            "holds_most": memory,
            "continuations": {one.item.id: sha256(one.item.continuation) for one in self.items},
            "groups": {one.item.id: one.item.group for one in self.items},
            "prefixes": prefix_check(self.items),
        }

    def _segment(self) -> str:
        """The segment of condition a that the question is about."""
        has_audio = all(one.prefixes[self.a].x.clips for one in self.items)
        name = self.config.segment or ("audio" if has_audio else "tool_response")
        for one in self.items:
            spans = one.prefixes[self.a].x.spans
            if not spans.ranges.get(name, [[]])[0]:
                known = ", ".join(segment for segment in spans if spans[segment][0])
                raise InputError(
                    f"{one.item.where}: conditions.{self.a}: got no token in segment {name!r}, "
                    f"expected some; it has {known}. Set -s segment=..."
                )
        return name

    def _kind(self) -> Kind:
        if self.config.classes != "auto":
            return self.config.classes
        clips = (prefix.x.clips for one in self.items for prefix in one.prefixes.values())
        return "speech" if any(clips) else "code"

    def _outcomes(self) -> str:
        known = {
            one.item.where: [one.item.conditions[name].outcome is not None for name in self._ab]
            for one in self.items
        }
        lacking = [where for where, found in known.items() if not all(found)]
        if self.config.outcomes == "greedy":
            return "greedy"
        if self.config.outcomes == "auto" and not any(any(found) for found in known.values()):
            return "greedy"
        if lacking:
            raise InputError(
                f"reading outcomes: {lacking[0]} lacks conditions.{self.a}.outcome or "
                f"conditions.{self.b}.outcome ({len(lacking)} of {len(known)} items do), expected "
                "both in every item. Add them, or set -s outcomes=greedy"
            )
        return "file"

    @property
    def _ab(self) -> tuple[str, str]:
        return self.a, self.b

    def _check_semantic(self) -> None:
        for one in self.items:
            if not self._tokens(one, one.continuation).semantic:
                raise InputError(
                    f"{one.item.where}: continuation: got {one.item.continuation!r}, expected at "
                    "least one token that is not blank and not special"
                )

    def _check_streams(self) -> None:
        """Tokens are put in, or exchanged, in one stream of ids."""
        config = self.config
        is_double = any(one.prefixes[self.a].x.text_tokens is not None for one in self.items)
        wants = config.pos_modes != ("as_run",) or (
            self.segment != "audio" and bool(config.interventions)
        )
        if is_double and wants:
            raise InputError(
                f"preparing {config.model!r}: it reads two streams of tokens, in which position "
                "modes and interventions on tokens are not defined. Set -s pos_modes=[as_run] "
                "and -s interventions=[]"
            )

    def units(self) -> list[Unit]:
        """Per item the runs as they were, and one unit for each way to match their lengths."""
        found = [Unit(f"{one.item.id}__as_run", (i, "as_run")) for i, one in enumerate(self.items)]
        for mode in self.config.pos_modes:
            if mode != "as_run":
                found += [
                    Unit(f"{one.item.id}__{mode}", (i, mode))
                    for i, one in enumerate(self.items)
                    # Prefixes of one length are matched as they are.
                    if len({one.prefixes[name].x.shape[1] for name in self._ab}) > 1
                ]
        return found

    def run_unit(self, unit: Unit) -> UnitResult:
        """Two forwards, and one for every further prefix."""
        index, mode = unit.payload
        found = self._as_run(index) if mode == "as_run" else self._matched(self.items[index], mode)
        # Of many items' clips they would fill the memory; another unit hardly hears these again.
        for one in self.items:
            for prefix in one.prefixes.values():
                for clip in prefix.x.clips:
                    clip.forget()
        return found

    # --- As run

    def _run(self, one: PreparedItem, name: str) -> PrefixRun:
        prefix = one.prefixes[name]
        if self.config.concatenate == "ids":
            return teacher_forced(name, prefix.x, one.continuation)
        condition = one.item.conditions[name]
        return joined_as_text(self.model, name, condition, prefix, one.item.continuation)

    def _as_run(self, index: int) -> UnitResult:
        one = self.items[index]
        further = [name for name in one.prefixes if name not in self._ab]
        runs = [self._run(one, name) for name in (*self._ab, *further)]
        changed, left_out = interventions(
            self.model, self.items, index, runs[0], self.segment, self.config
        )
        roles = ["a", "b", *["condition"] * len(further), *["intervention"] * len(changed)]
        runs += changed
        n = min(len(run.targets) for run in runs)
        tokens = self._tokens(one, runs[0].targets[:n].tolist())
        meters = [MassMeter(self.model, run, run.queries[tokens.semantic]) for run in runs]
        # Every run against b; the first pair is a against b.
        pairs = [(i, 1) for i in range(len(runs)) if i != 1]
        found = compare(self.model, runs, pairs, self.config, meters, self.lens)
        masses = [meter.result() for meter in meters]
        who = {"item": one.item.id, "group": one.item.group}
        by_run = list(
            run_rows(one, runs, roles, found, tokens, masses, self.segment, self.outcomes)
        )
        tables = {
            "items": [item_row(runs, found, tokens, by_run)],
            "runs": by_run,
            "curves": list(curve_rows(runs, found, tokens)),
            "classes": list(class_rows(found, tokens)),
            "mass": list(mass_rows(runs, masses, self.segment)),
            "coupling": list(coupling_rows(found, tokens, masses[0], self.segment)),
        }
        record = {
            "runs": [run.name for run in runs],
            "roles": roles,
            "left_out": left_out,
            "tokens": {
                "ids": runs[0].targets[:n].tolist(),
                "texts": tokens.texts,
                "semantic": tokens.semantic,
                "classes": tokens.classes,
                "is_fragment": tokens.is_fragment,
                "keywords": tokens.keywords,
            },
            "spans": {run.name: run.x.spans.to_json() for run in runs},
            "position_ids": {run.name: position_runs(run.x) for run in runs},
            "nll": pack(found.nll.transpose(0, 1).cpu().numpy()),
            "js": pack(found.js.transpose(0, 1).cpu().numpy()),
            "heads": pack(of_segment(masses[0], masses[0].heads, self.segment)),
        }
        with_who = {name: [{**who, **row} for row in rows] for name, rows in tables.items()}
        return UnitResult(tables=with_who, record={**who, **record})

    def _tokens(self, one: PreparedItem, ids: Sequence[int]) -> Tokens:
        offsets = one.offsets
        text = one.item.continuation
        if list(ids) != one.continuation[: len(ids)]:  # joined as text, the boundary merged
            ends = np.cumsum([len(decoded(self.model.tokenizer, token)) for token in ids]).tolist()
            starts = [0, *ends[:-1]]
            offsets = [
                (min(start, len(text)), min(end, len(text)))
                for start, end in zip(starts, ends, strict=True)
            ]
        return read_tokens(
            self.model.tokenizer, ids, offsets[: len(ids)], text, self.kind, one.item.labels
        )

    # --- Lengths matched

    def _matched(self, one: PreparedItem, mode: PosMode) -> UnitResult:
        a, b = (self._run(one, name) for name in self._ab)
        gap = a.start - b.start
        shorter = b if gap > 0 else a
        moved = matched(shorter, abs(gap), mode, self.model, self.config.filler)
        runs = [a, b, moved]
        new_a, new_b = (0, 2) if gap > 0 else (2, 1)
        n = min(len(run.targets) for run in runs)
        tokens = self._tokens(one, a.targets[:n].tolist())
        pairs = [(new_a, new_b), (2, 1 if gap > 0 else 0)]
        found = compare(self.model, runs, pairs, self.config, lens=self.lens)
        delta = (found.nll[:, new_a] - found.nll[:, new_b])[:, tokens.semantic].mean(-1)
        js = found.js[:, 0, tokens.semantic].mean(-1)
        change = (found.nll[:, 2] - found.nll[:, pairs[1][1]]).abs()
        first = tokens.semantic[0]
        at = [
            int(runs[i].x.position_ids[..., runs[i].start + first].flatten()[0])
            for i in (new_a, new_b)
        ]
        who = {"item": one.item.id, "group": one.item.group, "mode": mode}
        row = {
            **who,
            "moved": self.b if gap > 0 else self.a,
            "n": abs(gap),
            "target_position_a": at[0],
            "target_position_b": at[1],
            "is_matched": at[0] == at[1],
            "largest_nll_change": float(change[-1].max()),
            "largest_js": float(found.js[-1, 1].max()),
        }
        curve = [
            {**who, "depth": depth, "delta": float(delta[depth]), "js": float(js[depth])}
            for depth in range(len(delta))
        ]
        record = {
            **row,
            "position_ids": {str(i): position_runs(run.x) for i, run in enumerate(runs)},
            "spans": moved.x.spans.to_json(),
        }
        return UnitResult(tables={"positions": [row], "matched": curve}, record=record)

    def conclude(self, tables: Tables, folder: RunFolder) -> Report:
        """Figures, summaries and findings, from the tables and, one at a time, the shards."""
        folder.write_json("prefix_check.json", {"prefixes": prefix_check(self.items)})
        return conclude(
            tables,
            folder,
            self.config,
            compared=(self.a, self.b, self.segment),
            kind=self.kind,
            outcomes=self.outcomes,
            is_calibration=self.config.model.startswith(PREFIX),
        )
