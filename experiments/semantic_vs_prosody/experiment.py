"""Semantic against prosody: do the words or the voice decide, at which depth, and by which way?

Clips whose words and voice carry different emotions are asked about. A restricted lens reads the
emotion words at every depth; then the audio of clip A is replaced by that of clip B, which differs
in the words alone (semantic pairs) or in the voice alone (prosody pairs), depth by depth and span
by span.

Source: seed 001; M-001-1 to M-001-8.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from hooked_alm.bundled import ASSETS
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.placement import Placement
from hooked_alm.methods.reading.labels import LabelSet

from ..materials.clips import Sounds, described_table, manifest, sound_units
from ..materials.confounds import confound_table
from ..materials.hearing import Hearing, described_clip
from ..materials.records import collect
from ..materials.sources import shown
from ..materials.stand_ins import noise_like, silence_like
from ..materials.subject import ModelExperiment, described
from ..workbench.batches import BatchedExperiment, batch_units
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row
from .claims import CLAIMS
from .controls import CONTROLS
from .items import (
    PAIR_TYPES,
    PairType,
    SpokenItem,
    SpokenPair,
    conflict_items,
    draw_pairs,
    like_in_labels,
    read_items,
)
from .measure import Measures
from .pages import CAVEATS, fill_page, lead, method
from .settings import DEFECTS, SPANS, SemanticVsProsodyConfig, SweepControl
from .tables import MAY_LACK, TABLES, ProsodyResults, summarise
from .truths import TRUTHS

BUNDLED_ITEMS = ASSETS / "semantic_vs_prosody"


@dataclass(frozen=True)
class ControlSweep:
    """An item, and what replaces its audio."""

    item: SpokenItem
    kind: SweepControl


class SemanticVsProsody(
    BatchedExperiment[SemanticVsProsodyConfig], ModelExperiment[SemanticVsProsodyConfig]
):
    """The experiment of seed 001 on any model with an audio front-end."""

    name = "semantic_vs_prosody"
    title = "Semantic against prosody"
    question = "When words and voice disagree, which decides, and where?"
    Config = SemanticVsProsodyConfig
    schema_version = 4
    tables, may_lack = TABLES, MAY_LACK
    defects, controls, claims, caveats = DEFECTS, CONTROLS, CLAIMS, CAVEATS
    truths = TRUTHS

    def identify(self) -> dict[str, Any]:
        """Reads the clips, draws the pairs, and checks every prompt."""
        config = self.config
        source = BUNDLED_ITEMS if config.audio == "bundled" else config.audio
        every = read_items(source, list(config.labels))
        self.items = conflict_items(every)
        self.model = self.lay_out(hears=True)
        self.labels = LabelSet.from_texts(self.model.tokenizer, config.labels, config.label_mode)
        self.clips = self._heard(source)
        self.pairs = [pair for which in config.pair_types for pair in self._drawn(which)]
        asked = self._input(self.items[0])
        self._n_asked = asked.shape[1] - self.clips[self.items[0].name].n_tokens
        first = asked.spans
        there = {
            name: tuple(part for part in SPANS[name] if part in first and first[part][0])
            for name in config.spans
        }
        self.spans = {name: parts for name, parts in there.items() if parts}
        self._check_alignment()
        return {
            "model": described(self.model, config),
            **described_table(source),
            "label_token_ids": dict(zip(self.labels.names, self.labels.spellings, strict=True)),
            "clips_that_agree_and_are_left_out": len(every) - len(self.items),
            "spans": self.spans,
            "pairs": [pair.id for pair in self.pairs],
            "clips": [
                {**_identity(item), **described_clip(item, self.clips[item.name])}
                for item in self.items
            ],
        }

    def _heard(self, source: str | Path) -> dict[str, AudioClip]:
        """The items' clips by name; all that the model cannot hear are refused at once."""
        hearing = Hearing(partial(self.model.read_clip, truncate=self.config.truncate))

        def hear(item: SpokenItem) -> AudioClip:
            try:
                return hearing.clip(item.path)
            except InputError as error:
                raise InputError(f"column path: {error}") from error

        clips = collect(
            f"hearing the clips of {shown(source)}", hear, self.items, lambda it: it.where
        )
        return {item.name: clip for item, clip in zip(self.items, clips, strict=True)}

    @cached_property
    def _lengths(self) -> dict[str, int]:
        """Number of audio positions by item name."""
        return {name: clip.n_tokens for name, clip in self.clips.items()}

    def _drawn(self, which: PairType) -> list[SpokenPair]:
        config = self.config
        drawn = draw_pairs(self.items, which, config.n_pairs, config.seed, tokens=self._lengths)
        if not drawn:
            rest = "prosody_label" if which == "semantic" else "text"
            raise InputError(
                f"pairing the clips of {shown(config.audio)}: got {len(self.items)} conflict "
                f"items, none of which makes a {which} pair, expected two of one speaker and the "
                f"same {rest} with different {which}_label. Add such clips, or set pair_types to "
                f"[{', '.join(one for one in PAIR_TYPES if one != which)}]."
            )
        return drawn

    def _check_alignment(self) -> None:
        """Align the spans of all sweeps between two clips, which could fail amid a run."""
        if self.config.align == "dtw":  # aligns spans of any length, by activations
            return
        sweeps: list[tuple[str, SpokenPair | ControlSweep]] = [*self._pairs(), *self._controls()]
        prompt = cache(self._prompt)  # a clip is in many pairs
        for name, sweep in sweeps:
            if isinstance(sweep, ControlSweep) and sweep.kind != "same_labels":
                continue  # no exchange, or one for what is as long
            base, donor = prompt(self.clips[_base(sweep).name]), prompt(self._donor(sweep))
            try:
                places = [*self._replaced(sweep).values()]
                Placement(self.model, base, donor, places, {"audio": self.config.align})
            except InputError as error:
                error.add_note(f"This would happen in unit {name}; nothing was run.")
                raise

    def _input(self, item: SpokenItem) -> ALMInput:
        return self._prompt(self.clips[item.name])

    def _prompt(self, *clips: AudioClip) -> ALMInput:
        segments = [("text", self.config.prompt)]
        return ALMInput.joined([self.model.prepare(clip, segments=segments) for clip in clips])

    def units(self) -> list[Unit]:
        """Clips, pairs, and clips with a control, some batches a unit; then how clips sound."""
        every = ((f"lens__{item.name}", item) for item in self.items)
        works: list[Iterable[tuple[str, Any]]] = [every, self._pairs(), self._controls()]
        units = [unit for some in works for unit in batch_units(some, self.config)]
        return units + sound_units(self.items)

    def _pairs(self) -> list[tuple[str, SpokenPair]]:
        return [(pair.id, pair) for pair in self.pairs]

    def _controls(self) -> list[tuple[str, ControlSweep]]:
        bases = {pair.a.name for pair in self.pairs}
        return [
            (f"{kind}__{item.name}", ControlSweep(item, kind))
            for kind in self.config.controls
            for item in self.items
            if item.name in bases and (kind != "same_labels" or self._like(item))
        ]

    def measure(self, unit: Unit) -> UnitResult:
        """Some clips with their read-outs, some sweeps, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else super().measure(unit)

    def n_positions(self, work: SpokenItem | SpokenPair | ControlSweep) -> int:
        """Positions of a clip's prompt, which differ in what is heard; of two the longer."""
        items = [work] if isinstance(work, SpokenItem) else [_base(work)]
        items += [work.b] if isinstance(work, SpokenPair) else []
        return self._n_asked + max(self.clips[one.name].n_tokens for one in items)

    def batch_kind(self, work: SpokenItem | SpokenPair | ControlSweep) -> Hashable:
        """What the donor is."""
        return work.kind if isinstance(work, ControlSweep) else None

    def measure_batch(self, works: Sequence[Any]) -> list[UnitResult]:
        """Clips, or sweeps of one kind."""
        if isinstance(works[0], SpokenItem):
            return self._read(works)
        x = self._prompt(*(self.clips[_base(one).name] for one in works))
        donor: ALMInput | Literal["self"] = "self"
        if not (isinstance(works[0], ControlSweep) and works[0].kind == "self"):
            donor = self._prompt(*(self._donor(one) for one in works))
        found = self._measures().sweeps(x, donor, self._replaced(works[0]))
        result = self._pair if isinstance(works[0], SpokenPair) else self._control
        return [result(one, *result_of) for one, result_of in zip(works, found, strict=True)]

    def _read(self, items: Sequence[SpokenItem]) -> list[UnitResult]:
        results = []
        found = self._measures().lens(self._prompt(*(self.clips[one.name] for one in items)))
        for item, (lens, final) in zip(items, found, strict=True):
            x, who = self._input(item), _identity(item)
            about = {**who, **final, "n_audio_tokens": self._lengths[item.name]}
            record = {
                **about,
                "spans": x.spans.row_to_json(0),
                "token_ids": x.tokens[0].tolist(),
                "position_ids": x.position_ids[0].tolist(),
            }
            rows = [{**who, **row} for row in lens]
            results.append(UnitResult({"lens": rows, "runs": [about]}, record))
        return results

    def _pair(self, pair: SpokenPair, cells: list[Row], ends: Row) -> UnitResult:
        who = {
            "pair_id": pair.id,
            "type": pair.type,
            "A": pair.a.name,
            "B": pair.b.name,
            "target": pair.target,
            "text": pair.a.text,
            "speaker": pair.a.speaker,
        }
        about = {
            **who,
            "len_A": self._lengths[pair.a.name],
            "len_B": self._lengths[pair.b.name],
            "same_speaker": pair.a.speaker == pair.b.speaker,
            **ends,
        }
        patches = [{**who, **cell} for cell in cells]
        return UnitResult({"pairs": [about], "patches": patches}, record=about)

    def _control(self, sweep: ControlSweep, cells: list[Row], ends: Row) -> UnitResult:
        who = _identity(sweep.item)
        rows = [{**who, "control": sweep.kind, **ends, **cell} for cell in cells]
        return UnitResult({"control_patches": rows}, record={**who, **ends})

    def _replaced(self, sweep: SpokenPair | ControlSweep) -> dict[str, tuple[str, ...]]:
        """The spans of the base that a sweep replaces."""
        return self.spans if isinstance(sweep, SpokenPair) else {"audio": self.spans["audio"]}

    def _donor(self, sweep: SpokenPair | ControlSweep) -> AudioClip:
        if isinstance(sweep, SpokenPair):
            return self.clips[sweep.b.name]
        return self._control_clip(sweep)

    def _control_clip(self, sweep: ControlSweep) -> AudioClip:
        """Another clip of the same labels, or silence or white noise of the item's length."""
        item, seconds = sweep.item, self.clips[sweep.item.name].seconds
        if sweep.kind == "silence":
            return silence_like(self.model, item.path, seconds)
        if sweep.kind == "noise":
            return noise_like(self.model, item.path, seconds, f"{self.config.seed}/{item.name}")
        like = self._like(item)
        assert like is not None  # or there were no such unit
        return self.clips[like.name]

    def _like(self, item: SpokenItem) -> SpokenItem | None:
        return like_in_labels(self.items, item, self.config.seed, tokens=self._lengths)

    def _measures(self) -> Measures:
        return Measures(self.model, self.labels, self.config)

    # --- What is made of it

    def summaries(self, run: ProsodyResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield "manifest", manifest(self.items, run["sounds"])
        yield confound_table(run, "prosody_label")
        yield from summarise(run)

    def lead(self, run: ProsodyResults) -> str:
        """What was asked of which clips."""
        return lead(run)

    def page(self, page: Page, run: ProsodyResults) -> None:
        """What was asked, the answers, lens and patching."""
        fill_page(page, run, self.items)

    def method(self, run: ProsodyResults) -> str:
        """How intervals, depths and recoveries are to be understood."""
        return method(run)


def _base(sweep: SpokenPair | ControlSweep) -> SpokenItem:
    return sweep.a if isinstance(sweep, SpokenPair) else sweep.item


def _identity(item: SpokenItem) -> Row:
    return {
        "item": item.name,
        "semantic": item.semantic,
        "prosody": item.prosody,
        "speaker": item.speaker,
        "text": item.text,
    }
