"""What ``trigger_defence`` runs: clips that are attacked, and every defence of some of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hooked_alm.methods.robustness.choices import DEFENDED_BY, DefendedBy

from ..materials.attacks import AttackedClip, AttackedClips
from ..materials.clips import sound_units
from ..materials.conflict_corpus import Corpus
from ..materials.conflict_runs import PromptRun
from ..materials.kept_features import FeatureFiles
from ..workbench.batches import batch_units
from ..workbench.experiment import Unit
from ..workbench.results import Row
from .settings import TriggerDefenceConfig

DefenceDonor = Literal["clean", "denoised", "none"]
DRAWN = DEFENDED_BY[1:]
"""Controls: any other neurons, or others of the same blocks."""
HELD: tuple[tuple[str, DefenceDonor], ...] = (
    ("patch", "clean"), ("patch", "denoised"), ("bias", "none"), ("prune", "none"),
)  # fmt: skip
"""What neurons are held at, and whose values a patch takes: of the clean clip, which no defender
has, or of the attacked one without noise."""
FEATURES, INPUT = "features", "input"
"""Where else a clip is defended: at a dictionary's features, and before it is heard."""


@dataclass(frozen=True)
class Defence:
    """One way to defend a clip."""

    place: str
    kind: str
    donor: DefenceDonor = "none"
    percent: float = 0.0
    """Of the place's neurons or features; 0 of the input."""
    chosen_by: DefendedBy = "sensitive"
    draw: int = 0

    @property
    def name(self) -> str:
        """Of those that claims are about."""
        return "_".join([self.place, self.kind, *([self.donor] if self.donor != "none" else [])])

    @property
    def key(self) -> str:
        """Of it and its draws, in tables."""
        return f"{self.name} {self.percent:g} {self.chosen_by}"

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {"defence": self.key, **vars(self)}


def defences(config: TriggerDefenceConfig, *, attacked: bool) -> Iterator[Defence]:
    """Every defence of an attacked clip, or of a clean one.

    On clean clips controls are not run, and a clean donor only once, which must change nothing.
    """
    for place in config.places:
        for kind, donor in HELD:
            for percent in config.percents:
                if attacked or donor != "clean" or percent == config.percent:
                    yield Defence(place, kind, donor, percent)
            for chosen_by in DRAWN if attacked else ():
                for draw in range(config.n_draws):
                    yield Defence(place, kind, donor, config.percent, chosen_by, draw)
    for kind, donor in HELD if config.dictionary_name else ():
        if kind == "patch" and (attacked or donor != "clean"):
            yield Defence(FEATURES, kind, donor, config.percent)
            yield Defence(FEATURES, "dense", donor, config.percent)
    yield from (Defence(INPUT, kind) for kind in ("denoise", "noise"))


@dataclass(frozen=True)
class DefendedClip(AttackedClip):
    """A clip under every defence, attacked or clean."""

    is_attacked: bool
    files: FeatureFiles
    """What the attacks left."""


@dataclass(frozen=True)
class SensitiveNeurons:
    """The payload of the unit that lists the neurons of every place."""

    files: FeatureFiles


@dataclass(frozen=True)
class DefencePlan:
    """The units of work for a set of recordings."""

    config: TriggerDefenceConfig
    corpus: Corpus

    @cached_property
    def clips(self) -> AttackedClips:
        """Those that are attacked, and those that are not."""
        return AttackedClips(self.config, self.corpus)

    @property
    def runs(self) -> list[PromptRun]:
        """Every run."""
        return [one.run for one in (*self.clips.attacked, *self.clips.clean)]

    @cached_property
    def units(self) -> list[Unit]:
        """The attacks, and how the clips sound."""
        works = [(f"attack__{one.recording.name}", one) for one in self.clips.attacked]
        return batch_units(works, self.config) + sound_units(self.corpus.recordings)

    def further_units(self, files: FeatureFiles) -> list[Unit]:
        """The neurons, and every defence of attacked and of clean clips."""
        units = [Unit("neurons", SensitiveNeurons(files))]
        for name, clips in (("defend", self.clips.held_out), ("clean", self.clips.clean)):
            works = [
                (f"{name}__{c.recording.name}",
                 DefendedClip(c.run, c.group, c.half, name == "defend", files))
                for c in clips
            ]  # fmt: skip
            units += batch_units(works, self.config)
        return units

    def impossible_sweeps(self) -> list[str]:
        """None: nothing is exchanged between clips."""
        return []
