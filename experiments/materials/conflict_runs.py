"""Runs of clips under instructions that contradict them, and what is exchanged in them.

A conflict run (the voice's label is A, the instruction's T) is a base. Each kind of donor exchanges
one part of it, so that its answer is known beforehand:

* ``self``: nothing; a control that must change nothing.
* ``text_swap``: the same clip, instructed A. What the instruction contributes.
* ``audio_swap``: a clip of label T, instructed T. What the voice contributes.
* ``both``: a clip of label T, instructed A.
* ``random_other``: a clip and an instruction of other labels; the floor of an unrelated state.

A run that names no label (``audio_only``) has no instruction to exchange: of these it has ``self``
and ``audio_swap`` alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from hooked_alm.errors import InputError

from ..workbench.results import Row
from .clips import file_safe
from .conflict_corpus import Corpus
from .instructions import PromptMode
from .recordings import Recording

DonorKind = Literal["self", "text_swap", "audio_swap", "both", "random_other"]


NAMES_TARGET: tuple[PromptMode, ...] = ("conflict", "mention_only")
"""Prompt modes that name the target, and so have one run per target."""


class Exchange(NamedTuple):
    """What a donor exchanges, and where that stands: in words, and as a span."""

    what: str
    source: str
    span: str


EXCHANGES = {
    "text_swap": Exchange("instruction", "its words", "text"),
    "audio_swap": Exchange("voice", "its audio", "audio"),
}
"""Donors that exchange one side of the conflict, whose information moves to the readout."""
INPUTS: dict[str, DonorKind] = {"audio": "audio_swap", "text": "text_swap"}
"""The two inputs that an answer may rest on, and the donor that exchanges each."""


@dataclass(frozen=True)
class PromptRun:
    """One forward: a clip under one instruction."""

    recording: Recording
    language: str
    """Language of the instruction and of the labels."""
    condition: PromptMode
    named: str | None
    """Label that the instruction names."""
    targets: tuple[str, ...]
    """Labels T whose contrast with the voice's is read."""

    @property
    def prompts(self) -> "tuple[PromptRun, ...]":
        """Itself."""
        return (self,)

    @property
    def sweeps(self) -> "tuple[PatchRun, ...]":
        """None: nothing is patched."""
        return ()

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {
            "clip": self.recording.name,
            "language": self.recording.language,
            "prompt_language": self.language,
            "voice": self.recording.label,
            "intensity": self.recording.intensity,
            "condition": self.condition,
            "named": self.named,
            "target": self.targets[0],
        }


def prompt_runs(corpus: Corpus, modes: Sequence[PromptMode]) -> Iterator[PromptRun]:
    """Every clip under instructions of some modes."""
    for clip in corpus.recordings:
        language, targets = corpus.language(clip), corpus.targets(clip)
        for mode in modes:
            if mode in NAMES_TARGET:
                for one in targets:
                    yield PromptRun(clip, language, mode, one, (one,))
            else:
                named = clip.label if mode == "consistent" else None
                yield PromptRun(clip, language, mode, named, targets)


def run_id(corpus: Corpus, run: PromptRun) -> str:
    """A run's name in the tables."""
    has_several = len(corpus.targets(run.recording)) > 1
    names_one = has_several and run.condition in NAMES_TARGET
    suffix = f"_{file_safe(str(run.named))}" if names_one else ""
    return f"{run.recording.name}__{run.condition}{suffix}"


@dataclass(frozen=True)
class PatchRun:
    """A base, such as a conflict run, and the donor that is patched into it."""

    base: PromptRun
    donor: PromptRun
    kind: DonorKind
    toward: tuple[str, str]
    """Label that the donor should bring, and label it should displace."""

    @property
    def prompts(self) -> tuple[PromptRun, ...]:
        """Its base and its donor."""
        return self.base, self.donor

    @property
    def sweeps(self) -> "tuple[PatchRun, ...]":
        """Itself."""
        return (self,)

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {
            **self.base.identity(),
            "donor": self.kind,
            "donor_clip": self.donor.recording.name,
            "donor_named": self.donor.named,
            "toward": self.toward[0],
        }


@dataclass(frozen=True)
class Donors:
    """Which runs of a corpus are the donors of a base."""

    corpus: Corpus
    seed: int

    def sweep(self, base: PromptRun, kind: DonorKind) -> PatchRun | None:
        """The base with a donor; None if no clip can play it, or there is nothing to exchange."""
        if base.named is None and kind not in ("self", "audio_swap"):
            return None
        voice, target = base.recording.label, base.targets[0]
        clip: Recording | None = base.recording
        named: str | None = voice if kind in ("text_swap", "both") else target
        if kind in ("audio_swap", "both"):
            clip = self.clip_like(base, [target])
        elif kind == "random_other":
            others = [one for one in self.corpus.labels if one not in (voice, target)]
            if len(others) < 2:
                return None
            named = others[self._random(base).integers(len(others))]
            clip = self.clip_like(base, [one for one in others if one != named])
        if clip is None:
            return None
        toward = (target, voice) if kind == "audio_swap" else (voice, target)
        mode: PromptMode = "consistent" if clip.label == named else "conflict"
        if base.named is None:
            mode, named = base.condition, None
        donor = PromptRun(clip, self.corpus.language(clip), mode, named, (target,))
        return PatchRun(base, donor, kind, toward)

    def clip_like(self, base: PromptRun, labels: Sequence[str]) -> Recording | None:
        """A clip of some labels, of the same language, speaker and sentence.

        It is of equal intensity if there is one.
        """
        clip = base.recording
        found = self.corpus.clips_like(clip, labels)
        alike = [r for r in found if r.intensity == clip.intensity] or found
        return alike[self._random(base).integers(len(alike))] if alike else None

    def _random(self, run: PromptRun) -> np.random.Generator:
        """Draws that depend on the run alone, not on the other runs of the set."""
        name = f"{self.seed}/{run.recording.name}/{run.named}"
        digest = hashlib.sha256(name.encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True)
class ExchangedRun:
    """A run, and the exchanges of its inputs that there are."""

    base: PromptRun
    sweeps: tuple[PatchRun, ...]

    @property
    def runs(self) -> dict[str, PromptRun]:
        """The base, and what each input is exchanged for, by the input's name."""
        names = {kind: name for name, kind in INPUTS.items()}
        return {"base": self.base, **{names[one.kind]: one.donor for one in self.sweeps}}

    @property
    def prompts(self) -> tuple[PromptRun, ...]:
        """Its base and its donors."""
        return tuple(self.runs.values())

    @property
    def pair(self) -> str:
        """Its name in the tables."""
        return f"{self.base.recording.name}__{file_safe(self.base.targets[0])}"

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        known = self.base.identity()
        return {"pair": self.pair, **{name: known[name] for name in ("clip", "target", "voice")}}


def exchanged_runs(corpus: Corpus, condition: PromptMode, seed: int) -> list[ExchangedRun]:
    """Every clip with each of its targets, and what there is to exchange in it.

    In a conflict the instruction names the target, else nothing.

    Raises:
        InputError: nothing can be exchanged in any.
    """
    donors, found = Donors(corpus, seed), []
    for clip in corpus.recordings:
        for target in corpus.targets(clip):
            named = target if condition == "conflict" else None
            base = PromptRun(clip, corpus.language(clip), condition, named, (target,))
            sweeps = (donors.sweep(base, kind) for kind in INPUTS.values())
            found.append(ExchangedRun(base, tuple(one for one in sweeps if one)))
    if not any(one.sweeps for one in found):
        raise InputError(
            f"exchanging voices under {condition}: got no clip for which there is one of another "
            "label, of the same language, speaker and sentence. Add some, or leave out the columns "
            "in which they differ."
        )
    return found
