"""Rows of clips at some points, of which some clips are held out: what dictionaries learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.bundled import PREFIX
from hooked_alm.display import listed
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.collect import n_rows_of, rows_of
from hooked_alm.methods.activations.mixing import MixedRows
from hooked_alm.methods.activations.selection import KeptPoint, kept_points

from ..workbench.batches import BatchedConfig, BatchSize, bucketed
from .clips import ClipFile
from .heard_clips import HeardClipsConfig
from .held_out import split_groups
from .point_patterns import PointPatterns
from .records import collect
from .resampling import SPEAKER
from .sources import Source
from .transcription import SPOKEN


class ClipRowsConfig(BatchedConfig, HeardClipsConfig):
    """Settings of experiments that learn from rows of clips."""

    model: str = Field(
        default=f"{PREFIX}follows_voice",
        description="id, folder, bundled:NAME, or BASE+DELTA: a localised twin",
    )
    audio: Source = Field(
        default="bundled",
        description="a table of clips (column path and, as far as known, speaker), a folder with a "
        "manifest.csv, or a folder of clips",
    )
    points: PointPatterns = Field(
        default=["blocks.5.hook_resid_post"],
        description="hook points, all of the decoder or all of the audio encoder. * is anything "
        "without a dot, {0,4} either, {0..4} the numbers from 0 to 4; `hooked-alm hooks MODEL` "
        "lists them",
    )
    spans: list[str] = Field(
        default=["audio"],
        min_length=1,
        description="positions whose rows are learnt: audio, text, readout, ... or all; of the "
        "audio encoder, audio",
    )
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
    batch_size: BatchSize = 8

    @property
    def source(self) -> Any:
        """Where the clips are."""
        return SPOKEN if self.audio == "bundled" else self.audio


@dataclass(frozen=True, eq=False)
class ClipRows:
    """Clips in parts that run together, some of which no step trains on."""

    model: HookedALM
    config: ClipRowsConfig
    clips: list[ClipFile]
    points: list[KeptPoint]
    groups: list[str]
    """What is held out together, one a clip."""
    n_rows: list[int]
    """Rows of each clip."""
    train: list[list[int]]
    """Parts of clips that are learnt, by their numbers."""
    held_out: list[list[int]]

    @classmethod
    def planned(cls, model: HookedALM, clips: list[ClipFile], config: ClipRowsConfig) -> "ClipRows":
        """Reads every clip once; nothing runs, and the model needs no weights.

        Raises:
            InputError: clips that cannot be heard or have no group, spans that they lack, points of
                two kinds, or one group alone.
            HookNameError: points that cannot be kept.
        """
        points = kept_points(model, config.points)
        if len(kinds := {point.kind for point in points}) > 1:
            raise InputError(
                f"choosing the points of dictionaries: got points of the {' and the '.join(kinds)} "
                f"({listed([point.name for point in points], 4)}), whose rows are not the same. "
                "Train those of the decoder and those of the audio encoder in runs of their own."
            )
        groups = _groups(clips, config)
        halves = split_groups(groups, 1 - config.held_out_share, config.seed)
        if len(halves) < 2:
            raise InputError(
                f"splitting {len(clips)} clips into learnt and held-out ones: got one group "
                f"({groups[0]}), expected two or more. Name another column as group."
            )

        def counted(number: int) -> tuple[int, int]:
            clip = config.read(model, clips[number])
            x = config.heard(model, [clip], stand_in="en")
            (by_span,) = n_rows_of(model, x, points, config.spans).values()
            return sum(by_span.values()), x.shape[1] + sum(clip.n_frames)

        found = collect("hearing the clips", counted, range(len(clips)), lambda i: clips[i].where)
        n_rows, lengths = (list(column) for column in zip(*found, strict=True))

        def parts(half: str) -> list[list[int]]:
            mine = [i for i, group in enumerate(groups) if halves[group] == half]
            some = bucketed([lengths[i] for i in mine], config.batch_size, config.batch_positions)
            return [[mine[i] for i in part] for part in some]

        return cls(
            model, config, clips, points, groups, n_rows, parts("discovery"), parts("held-out")
        )

    def count(self, parts: Sequence[Sequence[int]]) -> int:
        """Rows of some parts."""
        return sum(self.n_rows[clip] for part in parts for clip in part)

    def mixed(self, max_bytes: int) -> MixedRows:
        """The learnt ones, shuffled; see ``MixedRows``."""
        width = sum(point.width for point in self.points)
        n_bytes = width * self.model.cfg.dtype.itemsize
        sizes = [self.count([part]) for part in self.train]
        return MixedRows(
            lambda part: self.run(self.train[part]), sizes,
            row_bytes=n_bytes, max_bytes=max_bytes,
        )  # fmt: skip

    def heard(self, part: Sequence[int]) -> ALMInput:
        """The prompts of some clips."""
        config = self.config
        return config.heard(self.model, [config.read(self.model, self.clips[i]) for i in part])

    @torch.no_grad()
    def run(self, part: Sequence[int]) -> dict[str, Tensor]:
        """Point -> rows of some clips, which run together."""
        (found,) = rows_of(self.model, self.heard(part), self.points, self.config.spans).values()
        return found.values


def _groups(clips: Sequence[ClipFile], config: ClipRowsConfig) -> list[str]:
    """What each clip is held out with.

    Raises:
        InputError: a column that was named, or that some clips have, and that others lack.
    """
    column = config.group or SPEAKER
    having = [clip for clip in clips if clip.cells.get(column)]
    if not having and config.group is None:
        return [clip.name for clip in clips]
    if missing := [clip.where for clip in clips if not clip.cells.get(column)]:
        raise InputError(
            f"{missing[0]}: {column}: missing, in {len(missing)} of {len(clips)} clips, expected "
            "what is held out together. Fill it in, or name another column as group."
        )
    return [clip.cells[column] for clip in clips]
