"""Columns of a table of clips as labels, with what is held out together: speakers, else texts.

Source: M-BT-6.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.matching import matched
from hooked_alm.methods.statistics.probing import check_folds, spread_folds
from hooked_alm.methods.statistics.selectivity import control_labels

from ..workbench.settings import ExperimentConfig
from .clips import ClipFile
from .recordings import check_label
from .records import collect
from .resampling import SPEAKER
from .transcription import WORDS

ColumnName = Annotated[str, Field(min_length=1, max_length=40)]


class HeldOutConfig(ExperimentConfig):
    """Settings of experiments that read columns of clips they have not learnt from."""

    labels: tuple[ColumnName, ...] = Field(
        min_length=1,
        max_length=100,
        description="columns that are read; clips with an empty cell are left out",
    )
    group: ColumnName | None = Field(
        default=None,
        description="column whose values are held out whole; None is speaker, else text, else "
        "every clip by itself",
    )
    cv: Literal["grouped", "random"] = Field(
        default="grouped", description="how folds are made; random has speakers on both sides"
    )
    force: bool = Field(
        default=False, description="allow cv=random where speakers are known; takes claims back"
    )
    n_folds: int = Field(default=5, ge=2, le=100, description="folds, or fewer where groups are")
    match_duration_s: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="how far apart the durations of clips may be that are put together, one of "
        "each label; the others are left out; None reads all",
    )

    @property
    def type_columns(self) -> tuple[ColumnName, ...]:
        """Columns that were named as an item's type."""
        return ()

    @model_validator(mode="after")
    def _are_named_once(self) -> "HeldOutConfig":
        for name, columns in {"labels": self.labels, "types": self.type_columns}.items():
            if len({*columns}) < len(columns):
                raise ValueError(f"{name} must be named once each")
        return self


class ControlLabelsConfig(HeldOutConfig):
    """Settings of experiments that read control labels beside them."""

    types: tuple[ColumnName, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=10,
        description="columns that make an item's type, of which control labels are drawn; None is "
        "speaker and text, as far as they are there",
    )

    @property
    def type_columns(self) -> tuple[ColumnName, ...]:
        """See ``types``."""
        return self.types or ()


@dataclass(frozen=True, eq=False)
class HeldOutLabel:
    """A column, of the clips that have it, and how they are held out."""

    column: str
    values: list[str]
    """Labels, in the order of their codes."""
    clips: list[int]
    codes: Int[np.ndarray, " item"]
    groups: list[str]
    folds: Int[np.ndarray, " item"]
    types: list[str] | None
    """What control labels are drawn of; None where no two clips share one."""
    leaks: dict[str, float]
    """What may tell the label and is not held out -> share of the clips that have it in common with
    clips of other folds: speakers, and texts that have one label each."""

    @property
    def leaks_shown(self) -> str:
        """The leaks in words; empty where there are none."""
        return "; ".join(
            f"the {name} of {share:.0%} of the clips is in other folds, too"
            for name, share in self.leaks.items()
        )


def held_out_by(clips: Sequence[ClipFile], config: HeldOutConfig) -> str | None:
    """The column whose values are held out whole; None where every clip is by itself.

    Raises:
        InputError: a column for groups or types that the clips lack, or folds that should be random
            although there is what to hold out.
    """
    check_columns(clips, [*config.type_columns, *filter(None, [config.group])])
    columns = {name for one in clips for name in one.cells}
    by = config.group or next((one for one in (SPEAKER, *WORDS) if one in columns), None)
    if config.cv == "random" and by is not None and not config.force:
        raise InputError(
            f"probing clips with cv=random: the table has the column {by}, whose values would be "
            "on both sides of folds. Leave it at grouped, or set force=true, which takes back "
            "every claim."
        )
    return by


def check_columns(clips: Sequence[ClipFile], named: Sequence[str]) -> None:
    """Refuse columns that no clip has.

    Raises:
        InputError: by name.
    """
    columns = {name for one in clips for name in one.cells}
    if lost := sorted({*named} - columns):
        raise InputError(
            f"probing clips: their table has no column {', '.join(lost)}, but "
            f"{', '.join(sorted(columns)) or 'none'}. Name one of them."
        )


def check_grouped(clips: Sequence[ClipFile], by: str | None) -> None:
    """Refuse clips of which it is not known what they are held out with.

    Raises:
        InputError: the first of them.
    """
    if by is not None and (missing := [one.where for one in clips if not one.cells.get(by)]):
        raise InputError(
            f"{missing[0]}: {by}: missing, expected what is held out together. Fill it in, or name "
            "another column as group"
        )


def held_out_labels(clips: Sequence[ClipFile], config: HeldOutConfig) -> list[HeldOutLabel]:
    """The columns, each with its folds.

    Raises:
        InputError: all that is wrong with the table.
    """
    named = [*config.labels, *config.type_columns, *filter(None, [config.group])]
    check_columns(clips, named)
    by = held_out_by(clips, config)
    return collect(
        "probing clips", lambda one: held_out_label(one, by, clips, config), config.labels, str
    )


def held_out_label(
    column: str, by: str | None, clips: Sequence[ClipFile], config: HeldOutConfig
) -> HeldOutLabel:
    """A column, with its folds.

    Args:
        column: of the clips that have it.
        by: see `held_out_by`.
        clips: of the run.
        config: of the run.

    Raises:
        InputError: labels that cannot be learnt and held out.
    """
    chosen = [i for i, one in enumerate(clips) if one.cells.get(column)]
    collect(
        f"reading {column}", lambda i: check_label(clips[i].cells, column), chosen,
        lambda i: clips[i].where,
    )  # fmt: skip
    values = sorted({clips[i].cells[column] for i in chosen})
    codes = np.array([values.index(clips[i].cells[column]) for i in chosen], np.int64)
    if config.match_duration_s is not None:
        seconds = np.array([clips[i].seconds for i in chosen])
        kept = matched(seconds, codes, config.match_duration_s)
        if len(values) > 1 and not len(kept):
            raise InputError(
                f"got no clips of {', '.join(values)} whose durations are within "
                f"{config.match_duration_s:g} s, expected some. Raise match_duration_s"
            )
        chosen, codes = [chosen[i] for i in kept.tolist()], codes[kept]
    some = [clips[i] for i in chosen]
    check_grouped(some, by)
    groups = [one.name if by is None else one.cells[by] for one in some]
    _check_spread(values, codes, groups, by or "clip")
    folds = held_out_folds(codes, groups, config)
    check_folds(codes, folds)
    types = _types(some, codes, config)
    return HeldOutLabel(
        column, values, chosen, codes, groups, folds, types, _leaks(some, codes, folds)
    )


def held_out_folds(
    codes: Int[np.ndarray, " item"], groups: Sequence[str], config: HeldOutConfig
) -> Int[np.ndarray, " item"]:
    """The fold of every item, as the settings have it.

    Args:
        codes: of its label, which are spread over folds as far as groups allow.
        groups: what is held out together.
        config: of the run.
    """
    if config.cv == "grouped":
        return spread_folds(codes, groups, config.n_folds)
    folds = np.random.default_rng(config.seed).permutation(len(codes)) % config.n_folds
    return np.unique(folds, return_inverse=True)[1].astype(np.int64)


def _check_spread(
    values: list[str], codes: Int[np.ndarray, " item"], groups: list[str], by: str
) -> None:
    """Refuse labels of one group alone: they are never both learnt and judged.

    Raises:
        InputError: it is so, or there is one label.
    """
    if len(values) < 2:
        raise InputError(f"got {values or 'no value'} alone, expected two labels or more")
    n_groups = {
        v: len({groups[i] for i in np.flatnonzero(codes == c)}) for c, v in enumerate(values)
    }
    if alone := [value for value, n in n_groups.items() if n < 2]:
        raise InputError(
            f"{', '.join(alone)} of one {by} alone, expected each label of two or more: it cannot "
            "be learnt and held out. Leave its clips out, or name another column as group"
        )


def _types(
    clips: list[ClipFile], codes: Int[np.ndarray, " item"], config: HeldOutConfig
) -> list[str] | None:
    """What control labels are drawn of.

    Raises:
        InputError: types that were named, and of which no two clips share one.
    """
    own = config.type_columns or tuple(
        c for c in (SPEAKER, *WORDS) if any(one.cells.get(c) for one in clips)
    )
    found = [" / ".join(one.cells.get(name, "") for name in own) for one in clips]
    if config.type_columns:
        control_labels(codes, found, seed=0)
    return found if own and max(Counter(found).values()) > 1 else None


def _leaks(
    clips: list[ClipFile], codes: Int[np.ndarray, " item"], folds: Int[np.ndarray, " item"]
) -> dict[str, float]:
    """See `HeldOutLabel.leaks`."""
    found = {}
    for column in (SPEAKER, *WORDS):
        having: dict[str, list[int]] = {}
        for i, one in enumerate(clips):
            if one.cells.get(column):
                having.setdefault(one.cells[column], []).append(i)
        tells = all(len({*codes[items].tolist()}) == 1 for items in having.values())
        n = sum(len(items) for items in having.values() if len({*folds[items].tolist()}) > 1)
        if n and (tells or column == SPEAKER):
            found[column] = n / len(clips)
    return found


def described_labels(labels: Sequence[HeldOutLabel]) -> Iterator[dict[str, object]]:
    """What ``run.json`` says of them."""
    for one in labels:
        counts = np.bincount(one.codes).tolist()
        yield {
            "column": one.column, "values": dict(zip(one.values, counts, strict=True)),
            "groups": len({*one.groups}), "folds": int(one.folds.max()) + 1,
            "types": None if one.types is None else len({*one.types}), "leaks": one.leaks,
        }  # fmt: skip
