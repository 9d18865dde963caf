"""Claims whose words are generated from numbers, and may say that nothing is established."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from .report import Headline

MIN_ITEMS = 10
"""Fewer items than this establish nothing, whatever their interval says (M-002-15)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A claim in words, the numbers it was generated from, and what keeps it from being made."""

    claim: str
    """As it reads where it is established; without its full stop."""
    facts: str
    """What was measured; likewise."""
    doubts: tuple[str, ...] = ()
    """Why the claim is not established; none where it is."""
    estimate: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0
    unit: str

    @property
    def established(self) -> bool:
        """Whether the claim is made."""
        return not self.doubts

    @property
    def statement(self) -> str:
        """All of it in one text."""
        claim = self.claim
        if self.doubts:
            claim = f"Not established ({'; '.join(self.doubts)}): {claim[0].lower()}{claim[1:]}"
        return f"{claim}. {self.facts}."

    def doubted(self, *reasons: str) -> "Finding":
        """The same, for further reasons not established; as it is without any."""
        return replace(self, doubts=(*self.doubts, *reasons))

    def headline(self) -> Headline:
        """The claim; why it is not established, and what was measured, as its detail."""
        because = f"Because: {'; '.join(self.doubts)}. " if self.doubts else ""
        return Headline(f"{self.claim}.", self.established, detail=f"{because}{self.facts}.")


def judged(
    claim: str,
    facts: str,
    why_not: Mapping[str, bool],
    *,
    numbers: Mapping[str, Any],
    unit: str,
    count: str = "n",
) -> Finding:
    """The finding, with the reasons against it that hold.

    Args:
        claim: see ``Finding``.
        facts: see ``Finding``.
        why_not: reason -> whether it holds.
        numbers: ``mean``, ``low`` and ``high``; what is missing was not measured.
        unit: of these.
        count: under which name ``numbers`` has the size of the sample.
    """
    return Finding(
        claim=claim,
        facts=facts,
        doubts=tuple(reason for reason, holds in why_not.items() if holds),
        estimate=float(numbers.get("mean", np.nan)),
        low=float(numbers.get("low", np.nan)),
        high=float(numbers.get("high", np.nan)),
        n=int(numbers.get(count, 0)),
        unit=unit,
    )


def shown(numbers: Mapping[str, Any], digits: int = 2) -> str:
    """``mean [low, high]``."""
    mean, low, high = (f"{numbers[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def finding_table(found: Mapping[str, Finding]) -> pd.DataFrame:
    """One row per finding, under its name."""
    columns = ("established", "estimate", "low", "high", "n", "unit", "statement")
    return pd.DataFrame(
        [{"claim": name, **{c: getattr(one, c) for c in columns}} for name, one in found.items()]
    )
