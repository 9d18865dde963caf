"""Truths: models of which an answer is known, and what a run must find in each of them.

A truth holds if every model gives what is known of it. Between a base and its twins that is
another answer each time: a measurement that gives the same one for all of them measures something
else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from .claims import shown
from .results import having
from .run_folder import RunFolder


class Between(NamedTuple):
    """Numbers between two ends, both included; NaN is in no range."""

    low: float = -np.inf
    high: float = np.inf

    def __str__(self) -> str:
        """As a table says it."""
        if self.low == -np.inf:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == np.inf else f"{self.low:g} to {self.high:g}"


class Estimate(NamedTuple):
    """A number with its interval, all of which must be where it is known to be."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Estimate":
        """That of a row of a summary table."""
        return cls(*(float(row[name]) for name in cls._fields))

    def __str__(self) -> str:
        """As a table says it."""
        return shown(self._asdict())


def rows_of(folder: RunFolder, table: str, **values: Any) -> pd.DataFrame:
    """The rows of a run's table that have these values; see `having`."""
    return having(folder.read_table(table), **values)


def number_in(folder: RunFolder, table: str, column: str = "mean", **values: Any) -> float:
    """What the first of them has in a column."""
    return float(rows_of(folder, table, **values)[column].iloc[0])


def finding_of(folder: RunFolder, claim: str) -> "pd.Series[Any]":
    """What a run has found of a claim."""
    return rows_of(folder, "findings", claim=claim).iloc[0]


def whether_established(folder: RunFolder, claim: str) -> str:
    """Whether a run makes a claim, in words."""
    return "established" if finding_of(folder, claim).established else "not established"


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One thing that is known of several models."""

    claim: str
    """What is looked for, in words."""
    find: Callable[[RunFolder], float | str | Estimate]
    """What a finished run has found."""
    known: Mapping[str, Between | str]
    """Bundled model -> what must be found: the base, its twin, its counter-twin."""


class TruthRow(NamedTuple):
    """A truth, what was found in every model, and whether all of it is as it is known."""

    claim: str
    found: dict[str, float | str | Estimate]
    known: Mapping[str, Between | str]
    holds: bool

    @property
    def expectation(self) -> Literal["reverses", "stays"]:
        """Whether what is known differs between the models."""
        return "reverses" if len({*self.known.values()}) > 1 else "stays"

    def line(self) -> str:
        """The row in one line."""
        parts = [f"{model} {said} ({self.known[model]})" for model, said in self.in_words().items()]
        return f"{'yes' if self.holds else 'NO '}  {self.claim}: {' | '.join(parts)}"

    def in_words(self) -> dict[str, str]:
        """What was found in every model, as a table says it."""
        return {
            model: f"{value:.2f}" if isinstance(value, float | int) else str(value)
            for model, value in self.found.items()
        }


def compared(truths: Sequence[Truth], folders: Mapping[str, RunFolder]) -> Iterator[TruthRow]:
    """What finished runs have found, beside what is known."""
    for truth in truths:
        found = {model: truth.find(folders[model]) for model in truth.known}
        holds = all(_is_as_known(value, truth.known[model]) for model, value in found.items())
        yield TruthRow(truth.claim, found, truth.known, holds)


def _is_as_known(value: float | str | Estimate, known: Between | str) -> bool:
    if isinstance(known, str) or isinstance(value, str):
        return value == known
    low, high = value[1:] if isinstance(value, Estimate) else (value, value)
    return bool(known.low <= low and high <= known.high)
