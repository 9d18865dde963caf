"""Where are a clip's attributes read, and how does the answer get at them?

Every clip is asked for its attributes in up to three formats. The lens says from which depth on the
label can be read, at the readout and at the word that names the attribute; attention knockout, what
is answered without the audio, and enrichment say what is used.

Source: AudioLens (Neo Ho et al. 2025); M-AL-1 to M-AL-5.
"""

from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import pandas as pd

from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.reading.labels import LabelSet

from ..materials.attributes import (
    AUDIO_LENS,
    MENTION,
    OB1_EMOTION,
    Parts,
    PromptFormat,
    Wording,
)
from ..materials.clips import Sounds, described_table, manifest, sound_units
from ..materials.confounds import confounds
from ..materials.hearing import Hearing
from ..materials.held_out import split_groups
from ..materials.recordings import Recording, check_label, load_recordings
from ..materials.records import collect, raise_all
from ..materials.sources import shown
from ..materials.stand_ins import silence_like
from ..materials.subject import ModelExperiment, described
from ..materials.trained_lens import described_lens, open_lens
from ..workbench.batches import BatchedExperiment, batch_units
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Tables
from .claims import CLAIMS, CONTROLS
from .measure import AttributeMeasures
from .pages import CAVEATS, fill_page, lead, method
from .plan import (
    AttributePrompt,
    AttributeWork,
    EnrichmentSearch,
    EnrichmentTest,
    Heard,
    Knockouts,
    Reading,
    is_searched,
    labelled,
    work_name,
)
from .settings import DEFECTS, AttributeLensConfig
from .tables import MAY_LACK, TABLES, AttributeResults, chosen_enrichment, summarise
from .truths import TRUTHS

SPEAKER = "speaker"


class AttributeLens(BatchedExperiment[AttributeLensConfig], ModelExperiment[AttributeLensConfig]):
    """AudioLens on any model with an audio front-end, any attributes and labels."""

    name = "attribute_lens"
    title = "Attribute lens"
    question = "Where are a clip's attributes read, and how does the answer get at them?"
    Config = AttributeLensConfig
    tables, may_lack = TABLES, MAY_LACK
    defects, controls, claims, caveats = DEFECTS, CONTROLS, CLAIMS, CAVEATS
    truths = TRUTHS

    # --- What is asked

    def identify(self) -> dict[str, Any]:
        """Reads the clips and their attributes, and checks every prompt."""
        config = self.config
        source = CLIPS if config.audio == "bundled" else config.audio
        self.recordings = load_recordings(source, label_column=None)
        self.wordings = self._wordings()
        self.words = self._words()
        self.model = self.lay_out(hears=True)
        doing = f"hearing {shown(source)}"
        every = self.recordings
        heard = Hearing(partial(self.model.read_clip, truncate=config.truncate))
        clips = collect(doing, lambda one: heard.clip(one.path), every, lambda one: one.where)
        silent = Hearing(partial(silence_like, self.model, truncate=config.truncate))
        self.clips: dict[str, dict[str, AudioClip]] = {
            "audio": {one.name: clip for one, clip in zip(every, clips, strict=True)},
            "silence": {one.name: silent.clip(one.path) for one in every}
            if config.absences
            else {},
        }
        self.labels = {name: self._label_set(name) for name in self.wordings}
        groups = {one.name: one.cells.get(config.cluster, one.name) for one in every}
        parts = split_groups([*groups.values()], config.validation_share, config.seed)
        self.parts = {name: parts[group] for name, group in groups.items()}
        self._check()
        return {
            "model": described(self.model, config),
            **described_lens(config.tuned_lens),
            **described_table(source),
            "attributes": {name: one.model_dump() for name, one in self.wordings.items()},
            "labels": {name: [*words] for name, words in self.words.items()},
            "label_token_ids": {n: [*one.spellings] for n, one in self.labels.items()},
            "prompts": self._said(),
            "absences": [*self.absences],
            "audio_is_behind": self._audio_is_behind(),
            "validation": sorted(n for n, part in self.parts.items() if part == "discovery"),
            "clips": [
                {"name": one.name, "sha256": one.sha256, "seconds": clip.seconds,
                 "audio_tokens": clip.n_tokens, "notes": [*one.notes, *clip.notes]}
                for one, clip in zip(every, clips, strict=True)
            ],
        }  # fmt: skip

    def load(self) -> None:
        """Loads the weights, and the lens."""
        super().load()
        self.lenses = {"logit": open_lens(None, self.model, "final")}
        if self.config.tuned_lens is not None:
            self.lenses["tuned"] = open_lens(self.config.tuned_lens, self.model, "final")

    def _wordings(self) -> dict[str, Wording]:
        """How each attribute is asked for, by its column."""
        if self.config.attributes is not None:
            return dict(self.config.attributes)
        if self.config.audio == "bundled":
            return {"emotion": OB1_EMOTION}
        columns = {column for one in self.recordings for column in one.cells}
        found = {name: wording for name, wording in AUDIO_LENS.items() if name in columns}
        if not found:
            raise InputError(
                f"choosing attributes of {shown(self.config.audio)}: got the columns "
                f"{', '.join(sorted(columns))}, expected one of {', '.join(AUDIO_LENS)}. Set "
                "attributes, which says how any other column is asked for."
            )
        return found

    def _words(self) -> dict[str, dict[str, str | tuple[str, ...]]]:
        """Attribute -> label -> how answers spell it."""
        found: dict[str, dict[str, str | tuple[str, ...]]] = {}
        faults = [*self._unlabelled()]
        for name, wording in self.wordings.items():
            there = {c.cells[name]: c for c, _ in labelled(self.recordings, [name])}
            given = wording.labels
            is_ours = self.config.attributes is None
            # AudioLens' labels are a default: clips that have others are asked for theirs.
            if given is None or (is_ours and not {*there} <= {*given}):
                found[name] = {one: one for one in there}
            else:
                found[name] = dict(given)
                faults += [
                    f"{clip.where}: {name}: got {label!r}, expected one of {', '.join(given)}"
                    for label, clip in there.items()
                    if label not in given
                ]
            if len(found[name]) < 2:
                faults.append(f"{name}: got {len(found[name])} labels, expected two at least")
            if not self._has_words(wording, self.config.causal_prompt):
                faults.append(
                    f"attributes.{name}: has no words for the format "
                    f"{self.config.causal_prompt!r}, which causal_prompt asks for: add them, or "
                    "choose another format"
                )
        raise_all("reading attributes", faults)
        return found

    def _unlabelled(self) -> Iterator[str]:
        """Clips of which nothing is known, or not what intervals resample."""
        for one in self.recordings:
            known = [name for name in self.wordings if one.cells.get(name)]
            try:
                for name in known or self.wordings:
                    check_label(one.cells, name)
            except InputError as error:
                yield f"{one.where}: {error}"
            if self.config.cluster == SPEAKER and not one.cells.get(SPEAKER):
                yield f"{one.where}: {SPEAKER}: missing, and cluster resamples speakers"

    def _has_words(self, wording: Wording, prompt: PromptFormat) -> bool:
        return wording.asked(prompt, {}, [], self._prefix(wording)) is not None

    def _prefix(self, wording: Wording) -> Parts:
        config = self.config
        return wording.beginning(is_reversed=config.reversed, use_is=config.use_is)

    @staticmethod
    def _list_of(words: dict[str, str | tuple[str, ...]]) -> tuple[dict[str, str], list[str]]:
        shown_as = {k: one if isinstance(one, str) else one[0] for k, one in words.items()}
        return shown_as, [*words]

    def _label_set(self, attribute: str) -> LabelSet:
        """Labels as they go on from how the answer begins."""
        prefix = "".join(text for _, text in self._prefix(self.wordings[attribute]))
        space = " " if prefix and not prefix[-1].isspace() else ""

        def spelled(one: str | tuple[str, ...]) -> str | tuple[str, ...]:
            return space + one if isinstance(one, str) else tuple(space + each for each in one)

        words = {label: spelled(one) for label, one in self.words[attribute].items()}
        return LabelSet.from_texts(self.model.tokenizer, words, self.config.label_mode)

    @cached_property
    def formats(self) -> dict[str, list[PromptFormat]]:
        """Attribute -> formats that it has words for."""
        return {
            name: [one for one in self.config.prompts if self._has_words(wording, one)]
            for name, wording in self.wordings.items()
        }

    @cached_property
    def absences(self) -> tuple[Heard, ...]:
        """What is taken away: the audio, its place, or the transcript that goes with it."""
        if not self.config.absences:
            return ()
        first = next(labelled(self.recordings, self.wordings))
        reads_transcript = "transcript" in self.input(self._prompt(*first)).spans
        return (
            ("silence", "no_transcript", "neither") if reads_transcript else ("silence", "no_clip")
        )

    def _prompt(self, clip: Recording, attribute: str, heard: Heard = "audio") -> AttributePrompt:
        return AttributePrompt(clip, attribute, self.config.causal_prompt, heard)

    # --- Units

    def units(self) -> list[Unit]:
        """Readings, knockouts, and the search for an enrichment; then how the clips sound."""
        items = [*labelled(self.recordings, self.wordings)]
        readings = [
            Reading(AttributePrompt(clip, attribute, one))
            for clip, attribute in items
            for one in self.formats[attribute]
        ]
        readings += [
            Reading(self._prompt(*item, heard)) for item in items for heard in self.absences
        ]
        works: list[list[AttributeWork]] = [
            [*readings], [Knockouts(self._prompt(*item)) for item in items]
        ]  # fmt: skip
        if self.config.enrich_modes:
            searched = [item for item in items if is_searched(self.parts, item[0])]
            works.append([EnrichmentSearch(self._prompt(*item)) for item in searched])
        units = [unit for some in works for unit in self._units(some)]
        return units + sound_units(self.recordings)

    def further_units(self, tables: Tables) -> list[Unit]:
        """The enrichment that was best on some clips, on the others."""
        works: list[AttributeWork] = []
        for attribute, chosen in chosen_enrichment(tables.get("enrichment_search")).items():
            for clip, name in labelled(self.recordings, self.wordings):
                if name == attribute and not is_searched(self.parts, clip):
                    prompt = self._prompt(clip, attribute)
                    works.append(EnrichmentTest(prompt, chosen, self._other(prompt)))
        return self._units(works)

    def _units(self, works: Sequence[AttributeWork]) -> list[Unit]:
        return batch_units(((work_name(work), work) for work in works), self.config)

    def _other(self, prompt: AttributePrompt) -> Recording | None:
        """A clip of another label, drawn for the prompt."""
        others = [
            clip
            for clip, attribute in labelled(self.recordings, self.wordings)
            if attribute == prompt.attribute and clip.cells[attribute] != prompt.label
        ]
        rng = prompt.random(self.config.seed + 1)
        return others[rng.integers(len(others))] if others else None

    def input(self, *prompts: AttributePrompt) -> ALMInput:
        """Some prompts, as one batch."""
        return ALMInput.joined([self._prepared(prompt) for prompt in prompts])

    def _prepared(self, prompt: AttributePrompt) -> ALMInput:
        prefix = self._prefix(self.wordings[prompt.attribute])
        parts = self._parts(prompt)
        text = "".join(part for _, part in parts)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        if (clip := self._heard(prompt)) is not None:
            said = self._transcript(prompt)
            heard = {"type": "audio", "audio": clip}
            content.insert(0, heard if said is None else {**heard, "transcript": said})
        return self.model.prepare(
            conversation=[{"role": "user", "content": content}],
            segments=parts or None,
            answer_prefix=prefix or None,
        )

    def _parts(self, prompt: AttributePrompt) -> Parts:
        """What is said with the clip."""
        wording = self.wordings[prompt.attribute]
        words, order = self._list_of(self.words[prompt.attribute])
        if self.config.rotate_options:
            # A different label comes first in every clip, so that no place in the list is favoured.
            first = self._places[prompt.clip.name] % len(order)
            order = order[first:] + order[:first]
        return wording.asked(prompt.format, words, order, self._prefix(wording)) or []

    def _heard(self, prompt: AttributePrompt) -> AudioClip | None:
        if prompt.heard == "no_clip":
            return None
        is_silent = prompt.heard in ("silence", "neither")
        return self.clips["silence" if is_silent else "audio"][prompt.clip.name]

    @staticmethod
    def _transcript(prompt: AttributePrompt) -> str | None:
        """What is written of the clip, where its table says it."""
        is_taken_away = prompt.heard in ("no_transcript", "neither")
        return "" if is_taken_away else prompt.clip.cells.get("transcript")

    @cached_property
    def _places(self) -> dict[str, int]:
        return {one.name: place for place, one in enumerate(self.recordings)}

    def _check(self) -> None:
        """Make every prompt, which could fail in the midst of a run."""
        self._lengths: dict[Hashable, int] = {}

        def made(unit: Unit) -> None:
            for work in () if isinstance(unit.payload, Sounds) else unit.payload:
                self.n_positions(work)

        collect("making prompts", made, self.units(), lambda unit: unit.id)

    def _said(self) -> dict[str, dict[str, str]]:
        """The first prompt of every attribute and format, word for word."""
        found: dict[str, dict[str, str]] = {}
        for clip, attribute in labelled(self.recordings, self.wordings):
            for one in self.formats[attribute]:
                if one not in found.setdefault(attribute, {}):
                    x = self.input(AttributePrompt(clip, attribute, one))
                    ids = x.tokens[0][~x.spans.mask("audio")[0]]
                    found[attribute][one] = self.model.tokenizer.decode(ids)
        return found

    def _audio_is_behind(self) -> dict[str, bool]:
        """Attribute -> whether it is named before the audio."""
        found = {}
        for attribute in self.wordings:
            clip, _ = next(labelled(self.recordings, [attribute]))
            spans = self.input(self._prompt(clip, attribute)).spans
            named = spans.positions(MENTION, 0) if MENTION in spans else []
            found[attribute] = bool(named) and named[-1] < min(spans.positions("audio", 0))
        return found

    # --- What is measured

    def n_positions(self, work: AttributeWork) -> int:
        """Positions of its prompt; of a test against another clip, of the longer one."""
        prompts = [work.prompt]
        if isinstance(work, EnrichmentTest) and work.other is not None:
            prompts.append(self._prompt(work.other, work.prompt.attribute))
        return max(map(self._length, prompts))

    def _length(self, prompt: AttributePrompt) -> int:
        clip = self._heard(prompt)
        said = prompt.attribute, self._transcript(prompt), *self._parts(prompt)
        # Prompts of the same words and as much audio are equally long.
        alike = said, None if clip is None else clip.n_tokens
        if alike not in self._lengths:
            self._lengths[alike] = self._prepared(prompt).shape[1]
        return self._lengths[alike]

    def batch_kind(self, work: AttributeWork) -> Hashable:
        """The attribute and its words, what is heard, and what is enriched how."""
        prompt = work.prompt
        kind = (prompt.attribute, prompt.format, prompt.heard)
        if isinstance(work, EnrichmentTest):
            return (*kind, work.chosen, work.other is None)
        return kind

    def measure(self, unit: Unit) -> UnitResult:
        """Some forwards with their read-outs, some sweeps, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else super().measure(unit)

    def measure_batch(self, works: Sequence[AttributeWork]) -> list[UnitResult]:
        """The rows of some works of one kind."""
        prompts, first = [work.prompt for work in works], works[0]
        attribute = first.prompt.attribute
        prefix = self._prefix(self.wordings[attribute])
        ours = AttributeMeasures(
            self.model, self.lenses, self.labels[attribute], self.config, prompts,
            self.input(*prompts), ends_in_mention=bool(prefix) and prefix[-1][0] == MENTION,
        )  # fmt: skip
        if isinstance(first, Reading) and first.prompt.heard != "audio":
            heard = first.prompt.heard
            found = {"absences": [[{**row, "heard": heard} for row in r] for r in ours.answers()]}
        elif isinstance(first, Reading):
            found = dict(zip(("answers", "information"), ours.reading(), strict=True))
        elif isinstance(first, Knockouts):
            found = {"knockout": ours.knockouts()}
        elif isinstance(first, EnrichmentSearch):
            found = {"enrichment_search": ours.search()}
        else:
            others = [
                self._prompt(work.other, attribute)
                for work in works
                if isinstance(work, EnrichmentTest) and work.other is not None
            ]
            other = self.input(*others) if others else None
            found = {"enrichment": ours.enriched(first.chosen, other)}
        return [
            UnitResult({name: rows[n] for name, rows in found.items()}, {"spans": spans})
            for n, spans in enumerate(self._spans(ours.x))
        ]

    @staticmethod
    def _spans(x: ALMInput) -> list[dict[str, Any]]:
        return [
            {name: rows[row] for name, rows in x.spans.to_json().items()} for row in range(len(x))
        ]

    # --- What is made of it

    def summaries(self, run: AttributeResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, what else tells their labels apart, and what `summarise` makes of it all."""
        yield "manifest", (clips := manifest(self.recordings, run["sounds"]))
        found = [
            confounds(clips[clips[name].notna()], name, seed=self.config.seed).assign(
                attribute=name
            )
            for name in self.wordings
        ]
        yield "confounds", pd.concat(found, ignore_index=True)
        yield from summarise(run)

    def lead(self, run: AttributeResults) -> str:
        """What was asked of which clips."""
        return lead(run)

    def page(self, page: Page, run: AttributeResults) -> None:
        """What was asked, answers, lens, attention and enrichment."""
        fill_page(page, run, self.recordings)

    def method(self, run: AttributeResults) -> str:
        """How scores and intervals were made."""
        return method(run)
