"""What ``sae_patching`` runs: every clip, and what is exchanged in it under every instruction.

An exchange writes features of a clip of label T into a clip of label A under the same instruction.
The latents are chosen on clips of A and T of other groups than both.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from hooked_alm.errors import InputError

from ..materials.clips import file_safe, sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import Donors, PatchRun, PromptRun
from ..materials.held_out import groups_of
from ..materials.instructions import PromptMode
from ..materials.kept_features import FeatureFiles
from ..materials.recordings import Recording
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from ..workbench.results import Row
from .settings import SAEPatchingConfig


@dataclass(frozen=True)
class VoiceExchange:
    """A clip under an instruction, and the label whose features are written into it."""

    base: PromptRun
    toward: str
    donor: PromptRun | None
    """A clip of that label, or None for the mean of many."""
    without: tuple[str, ...]
    """Groups that its latents are not chosen on."""
    chosen_on: FeatureFiles = ()
    """Files of the clips' features."""

    @property
    def prompts(self) -> tuple[PromptRun, ...]:
        """Its runs."""
        return (self.base,) if self.donor is None else (self.base, self.donor)

    @property
    def sweeps(self) -> tuple[PatchRun, ...]:
        """The base with its donor, if that is a run."""
        if self.donor is None:
            return ()
        return (PatchRun(self.base, self.donor, "audio_swap", (self.toward, self.voice)),)

    @property
    def voice(self) -> str:
        """Label of the clip."""
        return self.base.recording.label

    @property
    def pair(self) -> str:
        """Its name in the tables."""
        parts = self.base.recording.name, self.base.condition, self.base.named, self.toward
        return "__".join(file_safe(part) for part in parts if part is not None)

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {
            "pair": self.pair, "clip": self.base.recording.name,
            "donor_clip": None if self.donor is None else self.donor.recording.name,
            "condition": self.base.condition, "named": self.base.named,
            "voice": self.voice, "toward": self.toward,
        }  # fmt: skip


@dataclass(frozen=True)
class ExchangePlan:
    """The units of work for a set of recordings."""

    config: SAEPatchingConfig
    corpus: Corpus

    @cached_property
    def groups(self) -> dict[str, str]:
        """What every clip, by its name, is held out with; see ``groups_of``."""
        clips = self.corpus.recordings
        groups = groups_of(clips, self.config.held_out_with)
        return dict(zip([clip.name for clip in clips], groups, strict=True))

    @cached_property
    def exchanges(self) -> list[VoiceExchange]:
        """Every exchange whose latents can be chosen.

        Raises:
            InputError: there is none.
        """
        found = [one for one in self._every if self._is_possible(one)]
        if not found:
            raise InputError(
                "exchanging voices: got no clip for which there is one of another label, of the "
                "same language, speaker and sentence, and some of both labels in other groups. Add "
                "clips, or name what they are held out with: -s group=..."
            )
        return found

    def impossible_sweeps(self) -> list[str]:
        """Exchanges that there are no other clips to choose latents on."""
        return [one.pair for one in self._every if not self._is_possible(one)]

    @cached_property
    def runs(self) -> list[PromptRun]:
        """The bases, and their donors."""
        return [run for one in self.exchanges for run in one.prompts]

    @cached_property
    def units(self) -> list[Unit]:
        """Units for the clips that latents are chosen on, for the exchanges, and for the sounds."""
        clips = self.corpus.recordings
        alone = [
            (f"clip__{one.name}", self._run(one, "audio_only", None, one.label)) for one in clips
        ]
        return [*batch_units(alone, self.config), *self.exchange_units(()), *sound_units(clips)]

    def exchange_units(self, chosen_on: FeatureFiles) -> list[Unit]:
        """Units for the exchanges, whose latents are chosen on what some files hold."""
        works = [(one.pair, replace(one, chosen_on=chosen_on)) for one in self.exchanges]
        return batch_units(works, self.config)

    @cached_property
    def _every(self) -> list[VoiceExchange]:
        found = (
            self._exchange(self._run(clip, condition, named, toward), toward)
            for condition in self.config.conditions
            for clip in self.corpus.recordings
            for named in (self.corpus.targets(clip) if condition == "conflict" else (None,))
            for toward in self.corpus.labels
            if toward != clip.label
        )
        return [one for one in found if one is not None]

    def _exchange(self, base: PromptRun, toward: str) -> VoiceExchange | None:
        """None where no clip can be the donor."""
        group = self.groups[base.recording.name]
        if self.config.donor == "mean":
            return VoiceExchange(base, toward, None, (group,))
        other = Donors(self.corpus, self.config.seed).clip_like(base, [toward])
        if other is None:
            return None
        # The same words are consistent with a voice of the label that they name.
        condition = "consistent" if base.named == toward else base.condition
        donor = self._run(other, condition, base.named, toward)
        return VoiceExchange(base, toward, donor, (*sorted({group, self.groups[other.name]}),))

    def _run(
        self, clip: Recording, condition: PromptMode, named: str | None, toward: str
    ) -> PromptRun:
        return PromptRun(clip, self.corpus.language(clip), condition, named, (toward,))

    def _is_possible(self, one: VoiceExchange) -> bool:
        others = (c for c in self.corpus.recordings if self.groups[c.name] not in one.without)
        return {one.base.recording.label, one.toward} <= {clip.label for clip in others}
