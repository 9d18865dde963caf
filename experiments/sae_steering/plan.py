"""What is done: features are chosen on some clips, and taken out of others, beside controls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.autoencoder import SparseAutoencoder
from hooked_alm.methods.dictionary.splice import RowEdit, reconstruction
from hooked_alm.methods.dictionary.steering import (
    Activity,
    as_active,
    differing,
    most_frequent,
    shift,
    suppress,
)

from ..materials.clips import ClipFile
from ..materials.held_out import Half, split_groups
from ..materials.transcription import Transcription, whose
from ..workbench.results import Row
from .settings import SAESteeringConfig

ArmName = Literal["features", "random", "random_shift", "frequent", "dense", "reconstruction"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
"""What is done to rows: the features chosen are taken out; others nearest in activity; every row is
moved as far along what these write on average; those that are active most often are taken out;
every row is moved as far along the difference of the means; or all is taken out that the dictionary
does not reconstruct."""
SHIFTS: tuple[ArmName, ...] = ("random_shift", "dense")
"""The controls that move every row as far as the features do."""
BESIDE: tuple[ArmName, ...] = ARMS[1:]
"""The controls."""
NO_OP = 0.0
"""The strength that must change nothing."""


@dataclass(frozen=True)
class Arm:
    """One way to change rows."""

    name: ArmName
    latents: tuple[int, ...]
    """Of a shift those whose size it takes; of the reconstruction none."""
    draw: int = 0
    """Of several that are drawn."""
    direction: tuple[float, ...] = ()
    """Of a shift."""

    def edit(self, sae: SparseAutoencoder, alpha: float) -> RowEdit:
        """What is done to rows at some strength."""
        if self.name == "reconstruction":
            return reconstruction(sae)
        features = suppress(sae, torch.tensor(self.latents), alpha)
        return shift(torch.tensor(self.direction), features) if self.direction else features


@dataclass(frozen=True)
class ChoiceClips:
    """What is active in clips on which features are chosen: the payload of a unit."""

    clips: tuple[ClipFile, ...]


@dataclass(frozen=True)
class Unsteered:
    """Clips that are written down as the model is."""

    clips: tuple[ClipFile, ...]


@dataclass(frozen=True)
class LatentRows:
    """The features of every arm, as they are listed: the payload of a unit."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, every: Sequence[Arm], no_speech: Activity, speech: Activity) -> "LatentRows":
        """Those of some arms, with their means in the clips on which they were chosen."""
        return cls(tuple(
            {"arm": arm.name, "draw": arm.draw, "rank": rank, "latent": latent,
             "mean_no_speech": float(no_speech.mean[latent]),
             "mean_speech": float(speech.mean[latent]),
             "active_no_speech": float(no_speech.frequency[latent]),
             "active_speech": float(speech.frequency[latent])}
            for arm in every if arm.name not in (*SHIFTS, "reconstruction")
            for rank, latent in enumerate(arm.latents)
        ))  # fmt: skip


@dataclass(frozen=True)
class Steered:
    """Clips that are written down while rows are changed."""

    arm: Arm
    alpha: float
    clips: tuple[ClipFile, ...]


def halves(ours: Transcription, config: SAESteeringConfig) -> dict[str, Half]:
    """The part of every clip; speech and what is none are drawn apart, groups of either whole.

    Raises:
        InputError: clips of which nothing says what they hold, or not two groups of each kind.
    """
    if ours.words is None:
        raise InputError(
            "telling speech from what is none: the table of clips has no column text (or "
            "sentence). Add it: what is said, and nothing where nothing is."
        )
    parts: dict[str, Half] = {}
    for holds, what in (("speech", "with words"), ("no_speech", "without words")):
        some = [clip for clip in ours.clips if ours.holds(clip) == holds]
        who = [whose(clip)["clip" if config.cluster == "item" else "speaker"] for clip in some]
        if len({*who}) < 2:
            raise InputError(
                f"choosing features on some clips, to take them out of others: got {len({*who})} "
                f"{config.resampled} {what}, expected two or more. Add some."
            )
        by_group = split_groups(who, config.choice_share, config.seed)
        parts |= {clip.name: by_group[one] for clip, one in zip(some, who, strict=True)}
    return parts


def arms(
    sae: SparseAutoencoder, no_speech: Activity, speech: Activity, config: SAESteeringConfig
) -> list[Arm]:
    """The features of non-speech, and the controls beside them.

    Args:
        sae: the dictionary.
        no_speech: what is active in the clips without speech that features are chosen on.
        speech: the same of speech.
        config: of the run.
    """
    n = config.n_latents
    chosen = differing(no_speech, speech, n)
    latents = tuple(chosen.tolist())
    others = [as_active(chosen, no_speech, config.seed + draw) for draw in range(config.n_random)]
    drawn = torch.cat(others)
    written = no_speech.mean[drawn] @ sae.W_dec[drawn].cpu()
    often = most_frequent(Activity.pooled([no_speech, speech]), n)
    direction = speech.rows - no_speech.rows
    return [
        Arm("features", latents),
        *(Arm("random", tuple(one.tolist()), draw) for draw, one in enumerate(others)),
        Arm("random_shift", latents, direction=tuple((-written).tolist())),
        Arm("frequent", tuple(often.tolist())),
        Arm("dense", latents, direction=tuple(direction.tolist())),
        Arm("reconstruction", ()),
    ]


def strengths(every: Sequence[Arm], config: SAESteeringConfig) -> Iterator[tuple[Arm, float]]:
    """Each arm with each of its strengths; of a reconstruction there is one."""
    for arm in every:
        if arm.name == "reconstruction":
            yield arm, 1.0
            continue
        if arm.name == "features":
            yield arm, NO_OP
        yield from ((arm, alpha) for alpha in config.alphas)
