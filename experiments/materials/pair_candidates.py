"""Candidates for minimal pairs: two recordings, or one recording and a change of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
from jaxtyping import Float32

from hooked_alm.audio import decode_file
from hooked_alm.errors import InputError

from ..workbench.claims import MIN_ITEMS
from ..workbench.results import Row
from .acoustics import track_f0
from .clips import file_safe
from .ob1 import LABELS, SENTENCES, prompt_segments
from .pair_settings import FAMILIES, PairFamily, PairKind, PairsConfig
from .recordings import Recording
from .records import collect
from .sound_changes import (
    add_noise,
    band_limit,
    in_16_bits,
    level_db,
    resynthesise,
    signal_to_noise,
)


@dataclass(frozen=True)
class ClipVersion:
    """A recording as it is, or changed in one thing."""

    recording: Recording
    change: str = ""

    @property
    def name(self) -> str:
        """Names it in results."""
        return "__".join(filter(None, (self.recording.name, self.change)))

    def is_file(self, config: PairsConfig) -> bool:
        """Whether it is the recording's own file."""
        return not self.change and config.level_dbfs is None

    def samples(self, config: PairsConfig) -> tuple[Float32[np.ndarray, " sample"], int]:
        """Its samples, in 16 bits, and their rate.

        Raises:
            InputError: it cannot have the level that is wanted.
        """
        channels, rate, _ = decode_file(self.recording.path)
        sound = channels.mean(axis=0, dtype=np.float64)
        own = level_db(sound) if config.level_dbfs is None else config.level_dbfs
        sound = changed = sound * _gain(sound, own)
        if self.change == "noise":
            seed = config.seed + int(self.recording.sha256[:8], 16)
            changed = add_noise(sound, config.snr_db, seed)
        elif self.change == "band":
            changed = band_limit(sound, rate, *config.band_hz)
        elif self.change in ("pitch", "range", "pace"):
            changed = resynthesise(sound, rate, **_factors(self.change, config))
        changed = changed * _gain(changed, own + config.level_db * (self.change == "level"))
        if np.abs(changed).max(initial=0) > 1:
            raise InputError(
                f"bringing {self.name} to its level: it would be clipped, expected peaks below "
                "full scale. Lower level_dbfs (or level_db)"
            )
        return in_16_bits(changed), rate

    def sound(self, config: PairsConfig) -> Row:
        """Level, pitch and, where noise was added, its SNR; NaN where there is none."""
        samples, rate = self.samples(config)
        sound = samples.astype(np.float64)
        f0 = track_f0(sound, rate)
        f0 = f0[np.isfinite(f0)]
        numbers = [np.median(f0), f0.mean(), f0.std()] if f0.size else [np.nan] * 3
        names = ("f0_median_hz", "f0_mean_hz", "f0_std_hz")
        pitch = dict(zip(names, map(float, numbers), strict=True))
        snr = np.nan
        if self.change == "noise":
            clean, _ = ClipVersion(self.recording).samples(config)
            snr = signal_to_noise(clean.astype(np.float64), sound)
        return {"rms_dbfs": level_db(sound), **pitch, "snr_db": snr}


def _gain(sound: np.ndarray, wanted_db: float) -> float:
    found = level_db(sound)
    return 10 ** ((wanted_db - found) / 20) if np.isfinite([found, wanted_db]).all() else 1.0


def _factors(change: str, config: PairsConfig) -> dict[str, float]:
    return {
        "pitch": {"pitch": 2 ** (config.pitch_st / 12)},
        "range": {"spread": config.range_factor},
        "pace": {"pace": config.pace_factor},
    }[change]


@dataclass(frozen=True)
class Candidate:
    """Two clips that are to differ in one thing."""

    id: str
    kind: PairKind
    attribute: str
    """What they differ in; names their set."""
    a: ClipVersion
    b: ClipVersion
    labels: tuple[str, str]
    answers: tuple[str, str | None]
    """What they call for; that of a changed clip is known once it has been heard."""
    group: str

    @property
    def family(self) -> PairFamily:
        """What kind of thing it is."""
        return FAMILIES[self.kind]


@dataclass(frozen=True)
class PairMaterial:
    """Recordings, what is known and asked of them, and the pairs that can be made of them."""

    config: PairsConfig
    recordings: Sequence[Recording]
    segments: dict[str, list[tuple[str, str]]] = field(init=False)
    """Recording -> what it is asked, in named parts."""
    answers: dict[str, str] = field(init=False)
    """Recording -> the answer that its label calls for."""

    def __post_init__(self) -> None:
        """Reads prompts and answers.

        Raises:
            InputError: OB1's question was to be asked of clips that it does not fit, by line.
        """
        asked = collect(
            "asking about the clips", self._asked, self.recordings, lambda one: one.where
        )
        names = [one.name for one in self.recordings]
        vars(self)["segments"] = dict(zip(names, (parts for parts, _ in asked), strict=True))
        vars(self)["answers"] = dict(zip(names, (answer for _, answer in asked), strict=True))

    def _asked(self, one: Recording) -> tuple[list[tuple[str, str]], str]:
        if self.config.prompt is not None:
            return [("text", self.config.prompt)], one.cells.get("answer", one.label)
        words = {language: dict(labels) for language, labels in LABELS.items()}
        if one.label not in words.get(one.language, {}):  # type: ignore[call-overload]
            raise InputError(
                f"language, {one.label_column}: got {one.language!r} and {one.label!r}, expected "
                f"en or zh and one of {', '.join(words['en'])}, which OB1 asks about. Set prompt "
                "to ask something else"
            )
        language, emotion = one.language, one.label
        segments = prompt_segments("audio_only", language, voice=emotion)  # type: ignore[arg-type]
        return segments, one.cells.get("answer", words[language][emotion])  # type: ignore[index]

    def value(self, one: Recording, column: str) -> str:
        """What is known of a recording by a column; empty if nothing is."""
        cells = one.cells
        if column == "text":
            cells = {"text": cells.get("sentence", ""), **cells}
        if self.config.audio == "bundled":  # one sentence in one synthetic voice
            cells = {**cells, "speaker": "synthetic", "text": SENTENCES[one.language]}  # type: ignore[index]
        return cells.get(column, "")

    @property
    def attribute(self) -> str:
        """Names the set of pairs that differ in the label."""
        return file_safe(self.config.attribute)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every pair that is to be accepted or rejected, kind by kind."""
        return tuple(chain(*map(self._of_kind, self.config.kinds)))

    @cached_property
    def versions(self) -> tuple[ClipVersion, ...]:
        """Every clip that is heard, once: the recordings, on which probes are trained, first."""
        every = [ClipVersion(one) for one in self.recordings]
        every += chain(*((one.a, one.b) for one in self.candidates))
        return tuple({one.name: one for one in every}.values())

    def _of_kind(self, kind: PairKind) -> Iterator[Candidate]:
        made = [*(self._recorded(kind) if kind in ("label", "word") else self._changed(kind))]
        rng = np.random.default_rng([self.config.seed, [*FAMILIES].index(kind)])
        kept = sorted(rng.permutation(len(made))[: self.config.n_pairs].tolist())
        attribute = self.attribute if kind == "label" else kind
        for number in kept:
            a, b, labels, answers = made[number]
            yield Candidate(
                f"{attribute}-{number:04d}", kind, attribute, a, b, labels, answers,
                self._group(a.recording),
            )  # fmt: skip

    def _group(self, one: Recording) -> str:
        """The speaker, if enough are known to be told from chance; else the recording itself."""
        speakers = {self.value(each, "speaker") for each in self.recordings} - {""}
        return self.value(one, "speaker") if len(speakers) >= MIN_ITEMS else one.name

    def _recorded(
        self, kind: PairKind
    ) -> Iterator[tuple[ClipVersion, ClipVersion, tuple[str, str], tuple[str, str]]]:
        """Pairs of recordings; no two clips are paired twice, each begins one pair at most."""
        alike: dict[tuple[str, ...], list[tuple[Recording, str, str]]] = {}
        for one in self.recordings:
            for setting, label, answer in self._settings(kind, one):
                alike.setdefault(setting, []).append((one, label, answer))
        seen: set[frozenset[str]] = set()
        for number, one in enumerate(self.recordings):
            found = [
                (other, (label, theirs), (answer, reply))
                for setting, label, answer in self._settings(kind, one)
                for other, theirs, reply in alike[setting]
                if reply != answer and frozenset((one.name, other.name)) not in seen
            ]
            # What else the table knows of them is to differ as little as can be.
            nearest = max((_n_shared(one, other) for other, *_ in found), default=0)
            near = [pair for pair in found if _n_shared(one, pair[0]) == nearest]
            if near:
                other, labels, answers = near[number % len(near)]
                seen.add(frozenset((one.name, other.name)))
                yield ClipVersion(one), ClipVersion(other), labels, answers

    def _settings(self, kind: PairKind, one: Recording) -> list[tuple[tuple[str, ...], str, str]]:
        """What a partner has to share; the label and answer in which it has to differ."""
        speaker, text = self.value(one, "speaker"), self.value(one, "text")
        if kind == "label":
            return [((speaker, text), one.label, self.answers[one.name])]
        words = text.split()
        return [
            ((speaker, one.label, *words[:i], "", *words[i + 1 :]), word, word)
            for i, word in enumerate(words)
        ]

    def _changed(
        self, kind: PairKind
    ) -> Iterator[tuple[ClipVersion, ClipVersion, tuple[str, str], tuple[str, None]]]:
        """Every recording against its change."""
        config = self.config
        size = {
            "noise": f"{config.snr_db:g} dB SNR",
            "band": f"{config.band_hz[0]:g}-{config.band_hz[1]:g} Hz",
            "level": f"{config.level_db:+g} dB",
            "pitch": f"{config.pitch_st:+g} st",
            "range": f"x{config.range_factor:g}",
            "pace": f"x{config.pace_factor:g}",
        }[kind]
        for one in self.recordings:
            versions = ClipVersion(one), ClipVersion(one, kind)
            yield *versions, ("as it is", size), (self.answers[one.name], None)


def _n_shared(a: Recording, b: Recording) -> int:
    return sum(a.cells.get(column) == value for column, value in b.cells.items())
