"""Semantic against prosody: do the words or the voice decide, at which depth, and by which way?

Clips whose words and voice carry different emotions are asked about. A restricted lens reads the
emotion words at every depth; then the audio of clip A is replaced by that of clip B, which differs
in the words alone (semantic pairs) or in the voice alone (prosody pairs), depth by depth and span
by span.

Source: seed document 001; methods cards M-001-1 to M-001-8. Tables: ``runs`` (a row per clip),
``lens`` (by clip and depth), ``pairs`` (a row per pair), ``patches`` (by pair, depth and span),
``controls`` (by clip, donor and depth). ``semantic_vs_prosody_report`` makes figures and findings
of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.alignment import align
from hooked_alm.methods.reading.labels import LabelSet

from ..materials.bundled import ASSETS, PREFIX
from ..materials.clip_table import collect
from ..materials.subject import described, load_hearing_subject
from ..workbench.experiment import Experiment, Row, Tables, Unit, UnitResult
from ..workbench.report import Report
from ..workbench.run_folder import RunFolder
from .items import (
    PAIR_TYPES,
    SpokenItem,
    SpokenPair,
    conflict_items,
    draw_pairs,
    like_in_labels,
    read_items,
)
from .measure import Measures, noise_like, silence_like
from .report import conclude
from .settings import SPANS, SemanticVsProsodyConfig, SweepControl

BUNDLED_ITEMS = ASSETS / "semantic_vs_prosody"


@dataclass(frozen=True)
class ControlSweep:
    """An item, and what replaces its audio."""

    item: SpokenItem
    kind: SweepControl


class SemanticVsProsody(Experiment[SemanticVsProsodyConfig]):
    """The experiment of seed 001 on any model with an audio front-end."""

    name = "semantic_vs_prosody"
    question = "When words and voice disagree, which decides, and where?"
    Config = SemanticVsProsodyConfig

    def open(self) -> dict[str, Any]:
        """Load model and clips, draw the pairs, and check every prompt before the first unit."""
        config = self.config
        source = BUNDLED_ITEMS if config.audio == "bundled" else config.audio
        every = read_items(source, list(config.labels))
        self.items = conflict_items(every)
        self.model = load_hearing_subject(config, self.name)
        self.labels = LabelSet.from_texts(self.model.tokenizer, config.labels, config.label_mode)
        self.clips = self._heard(source)
        self.pairs = self._draw_pairs()
        first = self._input(self.items[0])
        self.spans = {
            name: tuple(
                part for part in SPANS[name] if part in first.spans and first.spans[part][0]
            )
            for name in config.spans
        }
        self.spans = {name: parts for name, parts in self.spans.items() if parts}
        self._check_alignment()
        return {
            "model": described(self.model, config),
            "known_defects": config.known_defects(),
            "label_token_ids": dict(zip(self.labels.names, self.labels.spellings, strict=True)),
            "clips_that_agree_and_are_left_out": len(every) - len(self.items),
            "spans": self.spans,
            "pairs": [pair.id for pair in self.pairs],
            "clips": [self._described(item) for item in self.items],
        }

    def _heard(self, source: str | Path) -> dict[str, AudioClip]:
        """The items' clips by name; all that the model cannot hear are refused at once."""

        def hear(item: SpokenItem) -> AudioClip:
            try:
                return self.model.read_clip(item.path, truncate=self.config.truncate)
            except InputError as error:
                raise InputError(f"column path: {error}") from error

        clips = collect(f"hearing the clips of {source}", hear, self.items, lambda it: it.where)
        return {item.name: clip for item, clip in zip(self.items, clips, strict=True)}

    @property
    def _lengths(self) -> dict[str, int]:
        """Number of audio positions by item name."""
        return {name: clip.n_tokens for name, clip in self.clips.items()}

    def _described(self, item: SpokenItem) -> Row:
        clip = self.clips[item.name]
        return {
            **_identity(item),
            "sha256": item.sha256,
            "seconds": clip.seconds,
            "audio_tokens": clip.n_tokens,
            "notes": [*item.notes, *clip.notes],
        }

    def _draw_pairs(self) -> list[SpokenPair]:
        config = self.config
        found: list[SpokenPair] = []
        for which in config.pair_types:
            drawn = draw_pairs(self.items, which, config.n_pairs, config.seed, tokens=self._lengths)
            if not drawn:
                rest = "prosody_label" if which == "semantic" else "text"
                raise InputError(
                    f"pairing the clips of {config.audio}: got {len(self.items)} conflict items, "
                    f"none of which makes a {which} pair, expected two of one speaker and the same "
                    f"{rest} with different {which}_label. Add such clips, or set pair_types to "
                    f"[{', '.join(one for one in PAIR_TYPES if one != which)}]."
                )
            found += drawn
        return found

    def _check_alignment(self) -> None:
        """Align the spans of all sweeps between two clips, which could fail amid a run."""
        if self.config.align == "dtw":  # aligns spans of any length, by activations
            return
        for unit in self.units():
            match unit.payload:
                case SpokenPair(a=a, b=b):
                    base, donor, spans = self._input(a), self._input(b), self.spans
                case ControlSweep(item=item, kind="same_labels"):
                    base, donor = self._input(item), self._prompt(self._control_clip(unit.payload))
                    spans = {"audio": self.spans["audio"]}
                case _:
                    continue
            try:
                for parts in spans.values():
                    align(base, donor, parts, policy=self.config.align_policies())
            except InputError as error:
                error.add_note(f"This would happen in unit {unit.id}; nothing was run.")
                raise

    def _input(self, item: SpokenItem) -> ALMInput:
        return self._prompt(self.clips[item.name])

    def _prompt(self, clip: AudioClip) -> ALMInput:
        return self.model.prepare(clip, segments=[("text", self.config.prompt)])

    def units(self) -> list[Unit]:
        """A unit per clip, per pair, and per clip and control."""
        bases = {pair.a.name for pair in self.pairs}
        return [
            *(Unit(f"lens__{item.name}", item) for item in self.items),
            *(Unit(pair.id, pair) for pair in self.pairs),
            *(
                Unit(f"{kind}__{item.name}", ControlSweep(item, kind))
                for kind in self.config.controls
                for item in self.items
                if item.name in bases and self._donor_exists(item, kind)
            ),
        ]

    def run_unit(self, unit: Unit) -> UnitResult:
        """One clip with its read-outs, or one sweep."""
        if isinstance(unit.payload, SpokenItem):
            return self._run_item(unit.payload)
        if isinstance(unit.payload, SpokenPair):
            return self._run_pair(unit.payload)
        return self._run_control(unit.payload)

    def _run_item(self, item: SpokenItem) -> UnitResult:
        found, x = self._measures(), self._input(item)
        lens, final = found.lens(x)
        about = {
            **_identity(item),
            **final,
            "n_audio_tokens": len(x.spans.positions("audio", 0)),
        }
        record = {
            **about,
            "spans": {name: ranges[0] for name, ranges in x.spans.to_json().items()},
            "token_ids": x.tokens[0].tolist(),
            "position_ids": x.position_ids[0].tolist(),
        }
        rows = [{**_identity(item), **row} for row in lens]
        return UnitResult(tables={"lens": rows, "runs": [about]}, record=record)

    def _run_pair(self, pair: SpokenPair) -> UnitResult:
        base, donor = self._input(pair.a), self._input(pair.b)
        cells, ends = self._measures().sweep(base, donor, self.spans)
        who = {
            "pair_id": pair.id,
            "type": pair.type,
            "A": pair.a.name,
            "B": pair.b.name,
            "target": pair.target,
            "text": pair.a.text,
            "speaker": pair.a.speaker,
        }
        n_audio = [len(x.spans.positions("audio", 0)) for x in (base, donor)]
        about = {
            **who,
            "len_A": n_audio[0],
            "len_B": n_audio[1],
            "same_speaker": pair.a.speaker == pair.b.speaker,
            **ends,
        }
        patches = [{**who, **cell} for cell in cells]
        return UnitResult(tables={"pairs": [about], "patches": patches}, record=about)

    def _run_control(self, sweep: ControlSweep) -> UnitResult:
        item, base = sweep.item, self._input(sweep.item)
        donor: ALMInput | Literal["self"] = "self"
        if sweep.kind != "self":
            donor = self._prompt(self._control_clip(sweep))
        audio = {"audio": self.spans["audio"]}
        cells, ends = self._measures().sweep(base, donor, audio)
        rows = [{**_identity(item), "control": sweep.kind, **ends, **cell} for cell in cells]
        return UnitResult(tables={"controls": rows}, record={**_identity(item), **ends})

    def _measures(self) -> Measures:
        return Measures(self.model, self.labels, self.config)

    def _donor_exists(self, item: SpokenItem, kind: SweepControl) -> bool:
        return kind != "same_labels" or self._like(item) is not None

    def _like(self, item: SpokenItem) -> SpokenItem | None:
        return like_in_labels(self.items, item, self.config.seed, tokens=self._lengths)

    def _control_clip(self, sweep: ControlSweep) -> AudioClip:
        """Another clip of the same labels, or silence or white noise of the item's length."""
        item, seed = sweep.item, self.config.seed
        if sweep.kind == "same_labels":
            like = self._like(item)
            assert like is not None
            return self.clips[like.name]
        seconds = self.clips[item.name].seconds
        if sweep.kind == "silence":
            return silence_like(self.model, item, seconds)
        return noise_like(self.model, item, seconds, seed)

    def conclude(self, tables: Tables, folder: RunFolder) -> Report:
        """Figures, summaries and findings, from the tables alone."""
        return conclude(
            tables,
            folder,
            self.config,
            items=self.items,
            n_blocks=self.model.cfg.n_layers,
            is_calibration=self.config.model.startswith(PREFIX),
        )


def _identity(item: SpokenItem) -> Row:
    return {
        "item": item.name,
        "semantic": item.semantic,
        "prosody": item.prosody,
        "speaker": item.speaker,
        "text": item.text,
    }
