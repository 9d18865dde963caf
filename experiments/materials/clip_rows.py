"""Rows of clips that a model hears, and which of the clips are held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from hooked_alm import HookedALM
from hooked_alm.bundled import PREFIX
from hooked_alm.display import listed
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.collect import n_rows_of, rows_of
from hooked_alm.methods.activations.mixing import RowsByPoint
from hooked_alm.methods.activations.rows import ActivationRows
from hooked_alm.methods.activations.selection import kept_points

from ..workbench.batches import BatchedConfig, BatchSize
from ..workbench.settings import ModelId
from .clips import ClipFile, described_table
from .heard_clips import HeardClipsConfig
from .held_out import halved
from .records import collect
from .row_source import KnownClip, RowSource
from .sources import Source
from .subject import described
from .transcription import SPOKEN


class ClipRowsConfig(BatchedConfig, HeardClipsConfig):
    """Settings of experiments that read rows of clips."""

    model: ModelId = f"{PREFIX}follows_voice"
    audio: Source = Field(
        default="bundled",
        description="a table of clips (column path and, as far as known, speaker), a folder with a "
        "manifest.csv, or a folder of clips",
    )
    spans: list[str] = Field(
        default=["audio"],
        min_length=1,
        description="positions whose rows are read: audio, text, readout, ... or all; of the audio "
        "encoder, audio",
    )
    batch_size: BatchSize = 8

    @property
    def source(self) -> Any:
        """Where the clips are."""
        return SPOKEN if self.audio == "bundled" else self.audio


@dataclass(frozen=True, eq=False)
class ClipRows(RowSource):
    """Rows of clips that a model hears when they are asked for."""

    config: ClipRowsConfig
    clips: list[ClipFile]
    model: HookedALM

    @classmethod
    def planned(
        cls,
        model: HookedALM,
        clips: list[ClipFile],
        points: Sequence[str],
        config: ClipRowsConfig,
    ) -> "ClipRows":
        """Reads every clip once; nothing runs, and the model needs no weights.

        Raises:
            InputError: clips that cannot be heard, spans that they lack, points of two kinds.
            HookNameError: points that cannot be kept.
        """
        kept = kept_points(model, points)
        if len(kinds := {point.kind for point in kept}) > 1:
            raise InputError(
                f"choosing the points of dictionaries: got points of the {' and the '.join(kinds)} "
                f"({listed([point.name for point in kept], 4)}), whose rows are not the same. "
                "Take those of the decoder and those of the audio encoder in runs of their own."
            )

        def counted(number: int) -> tuple[int, int]:
            clip = config.read(model, clips[number])
            x = config.heard(model, [clip], stand_in="en")
            (by_span,) = n_rows_of(model, x, kept, config.spans).values()
            return sum(by_span.values()), x.shape[1] + sum(clip.n_frames)

        found = collect("hearing the clips", counted, range(len(clips)), lambda i: clips[i].where)
        n_rows, lengths = (list(column) for column in zip(*found, strict=True))
        return cls(config, clips, kept, n_rows, lengths, described(model, config), model)

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.model.cfg.dtype

    @property
    def device(self) -> torch.device:
        """The model's."""
        return torch.device(self.model.cfg.device)

    @property
    def described(self) -> dict[str, Any]:
        """Model, table and clips."""
        return {
            "model": self.of_model,
            **described_table(self.config.source),
            "clips": {clip.name: clip.sha256 for clip in self.clips},
        }

    @property
    def prompt(self) -> str | None:
        """Instruction of the settings."""
        return self.config.prompt

    def heard(self, part: Sequence[int]) -> ALMInput:
        """The prompts of some clips."""
        config = self.config
        return config.heard(self.model, [config.read(self.model, self.clips[i]) for i in part])

    @torch.no_grad()
    def run(self, part: Sequence[int]) -> ActivationRows:
        """Rows of some clips that run together, clip by clip in their order."""
        (found,) = rows_of(self.model, self.heard(part), self.points, self.config.spans).values()
        return found

    def values(self, part: Sequence[int]) -> RowsByPoint:
        """Rows of some clips, clip by clip in their order."""
        return self.run(part).values


class HeldOutClipsConfig(ClipRowsConfig):
    """Settings of experiments that learn from some clips and are judged on others."""

    group: str | None = Field(
        default=None,
        min_length=1,
        max_length=40,
        description="column whose values are held out whole; None is speaker, else every clip by "
        "itself",
    )
    held_out_share: float = Field(
        default=0.2, gt=0, lt=1, description="share of the groups that nothing is learnt from"
    )


@dataclass(frozen=True, eq=False)
class HeldOutClips:
    """Which clips are learnt, by their numbers, and which are held out."""

    groups: list[str]
    """What is held out together, one a clip."""
    learnt: list[int]
    held_out: list[int]

    @classmethod
    def of(cls, clips: Sequence[KnownClip], config: HeldOutClipsConfig) -> "HeldOutClips":
        """A seeded draw of whole groups.

        Raises:
            InputError: clips without a group, or one group alone.
        """
        share, into = 1 - config.held_out_share, "learnt and held-out ones"
        found = halved(clips, config.group, share, config.seed, into)
        learnt, held_out = (
            [i for i, (_, half) in enumerate(found) if half == which]
            for which in ("discovery", "held-out")
        )
        return cls([group for group, _ in found], learnt, held_out)

    @property
    def held_out_groups(self) -> list[str]:
        """Groups that nothing is learnt from."""
        return sorted({self.groups[clip] for clip in self.held_out})
