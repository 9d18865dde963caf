"""Truths: models of which an answer is known, and what a run must find in each of them.

A truth holds if every model gives what is known of it. Between a base and its twins that is
another answer each time: a measurement that gives the same one for all of them measures something
else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One thing that is known of several models."""

    claim: str
    """What is looked for, in words."""
    find: Callable[[RunFolder], float | str]
    """What a finished run has found."""
    known: Mapping[str, Between | str]
    """Bundled model -> what must be found: the base, its twin, its counter-twin."""


class TruthRow(NamedTuple):
    """A truth, what was found in every model, and whether all of it is as it is known."""

    claim: str
    found: dict[str, float | str]
    known: Mapping[str, Between | str]
    holds: bool

    def line(self) -> str:
        """The row in one line."""
        parts = [
            f"{model} {_shown(value)} ({self.known[model]})" for model, value in self.found.items()
        ]
        return f"{'yes' if self.holds else 'NO '}  {self.claim}: {' | '.join(parts)}"


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def compared(truths: Sequence[Truth], folders: Mapping[str, RunFolder]) -> Iterator[TruthRow]:
    """What finished runs have found, beside what is known."""
    for truth in truths:
        found = {model: truth.find(folders[model]) for model in truth.known}
        holds = all(_is_as_known(value, truth.known[model]) for model, value in found.items())
        yield TruthRow(truth.claim, found, truth.known, holds)


def _is_as_known(value: float | str, known: Between | str) -> bool:
    if isinstance(known, str) or isinstance(value, str):
        return value == known
    return bool(known.low <= value <= known.high)
