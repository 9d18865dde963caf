"""Claims: sentences made from numbers, and what takes them back.

A claim names the tables that it rests on. A control that vouches for one of them and failed, or a
known defect of the settings that touches one of them, takes the claim back, wherever it is shown.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, SupportsInt

import numpy as np
import pandas as pd

from .controls import FAIL, Control, control_table
from .results import Results

MIN_ITEMS = 10
"""Fewer items than this establish nothing, whatever their interval says (M-002-15)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A claim in words, the numbers it was made from, and what keeps it from being made."""

    claim: str
    """The sentence where it is established; without its full stop."""
    facts: str
    """What was measured; without its full stop."""
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
        """Claim, doubts and facts in one text."""
        claim = self.claim
        if self.doubts:
            claim = f"Not established ({'; '.join(self.doubts)}): {claim[0].lower()}{claim[1:]}"
        return f"{claim}. {self.facts}."

    def doubted(self, *reasons: str) -> "Finding":
        """The finding with further reasons against it."""
        return replace(self, doubts=(*self.doubts, *reasons))


@dataclass(frozen=True)
class Defect:
    """Something that settings of a run are known to get wrong; most reproduce a seed document."""

    id: str
    """Number in ``docs/methods.md``."""
    touches: tuple[str, ...]
    """Measured tables that it makes wrong, or claims by name: none that rests on them is made."""
    holds: Callable[[Any], bool]
    """Whether settings have it."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence that a run may establish."""

    name: str
    """Names it in tables, so that runs can be compared; ``{}`` stands for a value of ``per``."""
    rests_on: tuple[str, ...]
    """Measured tables that decide it."""
    judge: Callable[..., Finding | None]
    """Results (and a value of ``per``) -> the finding; None where the run does not raise it."""
    per: Callable[[Results[Any]], Sequence[str]] | None = None
    """What it is judged for one by one, such as every contrast; neighbours that share it are
    listed value by value."""


class Verdict(NamedTuple):
    """What a run's controls and claims come to."""

    controls: pd.DataFrame
    findings: dict[str, Finding]
    rests_on: dict[str, tuple[str, ...]]
    """Finding -> tables that it rests on."""
    warnings: dict[str, dict[str, str]]
    """Heading -> control or defect -> what it says, and the findings that it takes back."""

    def table(self) -> pd.DataFrame:
        """A row per finding."""
        columns = ("established", "estimate", "low", "high", "n", "unit", "statement")
        rows = [
            {
                "claim": name,
                **{column: getattr(one, column) for column in columns},
                "rests_on": ", ".join(self.rests_on[name]),
            }
            for name, one in self.findings.items()
        ]
        return pd.DataFrame(rows, columns=["claim", *columns, "rests_on"])


def judge(
    controls: Sequence[Control],
    claims: Sequence[Claim],
    defects: Sequence[Defect],
    run: Results[Any],
) -> Verdict:
    """Checks every control and judges every claim, then takes back what cannot stand."""
    table = control_table(controls, run)
    failed = [one for one, v in zip(controls, table.verdict, strict=True) if v == FAIL]
    present = [one for one in defects if one.holds(run.config)]
    findings, rests_on = {}, {}
    evidence: dict[str, set[str]] = {}
    for name, claim, finding in _judged(claims, run):
        evidence[name] = {*claim.rests_on, claim.name}
        doubts = [f"the control '{c.name}' failed" for c in failed if {*c.of} & evidence[name]]
        touching = [d.id for d in present if {*d.touches} & evidence[name]]
        doubts += [f"known defects {', '.join(touching)}"] if touching else []
        findings[name], rests_on[name] = finding.doubted(*doubts), claim.rests_on

    def with_victims(text: str, spoiled: tuple[str, ...]) -> str:
        names = [name for name, rests in evidence.items() if {*spoiled} & rests]
        return f"{text} It takes back: {', '.join(names) or 'no claim'}."

    rows = table.set_index("control")
    said = {
        "Failed controls": {
            c.name: with_victims(
                f"Found {rows.found[c.name]}, expected {rows.expected[c.name]}.", c.of
            )
            for c in failed
        },
        "Known defects of these settings": {d.id: with_victims(d.text, d.touches) for d in present},
    }
    return Verdict(
        table, findings, rests_on, {name: lines for name, lines in said.items() if lines}
    )


def _judged(claims: Sequence[Claim], run: Results[Any]) -> Iterator[tuple[str, Claim, Finding]]:
    for per, neighbours in groupby(claims, lambda claim: claim.per):
        some = list(neighbours)
        for value in per(run) if per else [None]:
            for claim in some:
                found = claim.judge(run) if value is None else claim.judge(run, value)
                if found is not None:
                    yield claim.name.format(value), claim, found


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
        claim: see `Finding`.
        facts: see `Finding`.
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


def counted(
    claim: str, facts: str, why_not: Mapping[str, bool], found: Mapping[str, Any], unit: str
) -> Finding:
    """The finding, whose facts end in the size of the sample."""
    facts = f"{facts}, n = {int(found.get('n', 0))}"
    return judged(claim, facts, why_not, numbers=found, unit=unit)


def not_measured(claim: str, why: str, unit: str, facts: str = "Not measured") -> Finding:
    """A claim that the run has no numbers for."""
    return judged(claim, facts, {why: True}, numbers={}, unit=unit)


def few(n: SupportsInt, what: str = "items") -> dict[str, bool]:
    """The reason against a claim that too few samples were measured."""
    return {f"only {int(n)} {what}": int(n) < MIN_ITEMS}


def few_of(row: Mapping[str, Any], what: str = "items") -> dict[str, bool]:
    """The reasons that too few samples, or clusters of them, are behind a row of `Draws.points`."""
    is_unsure = bool(np.isnan(row["low"])) and row["n"] >= MIN_ITEMS
    return {**few(row["n"], what), f"only {row['n_clusters']:.0f} groups": is_unsure}


def around_zero(row: Mapping[str, Any], what: str) -> dict[str, bool]:
    """The reason against a claim that something is not 0: its interval holds 0, or is not known."""
    if np.isnan(row["low"]):
        return {f"the {what} has no interval": True}
    return {f"the interval of the {what} includes 0": bool(row["low"] <= 0 <= row["high"])}


def within_rounding(effect: pd.Series, noise: pd.Series, unit: str) -> dict[str, bool]:
    """The reason against a claim about halves of a mean effect: rounding could be one.

    Half of it has to be more than twice the standard error of a mean of noise.

    Args:
        effect: of every sample.
        noise: what rounding alone does to a cell of the sample, as ``PatchResult.noise``; 0 where
            it is not worth stating.
        unit: of both, in words.
    """
    error = 2 * float(np.sqrt((noise**2).mean() / len(noise))) if len(noise) else 0.0
    is_within = 0 < abs(float(effect.mean())) / 2 <= error
    return {f"half of the effect is within rounding, {error:.2g} {unit}": is_within}


def shown(numbers: Mapping[str, Any], digits: int = 2) -> str:
    """``mean [low, high]``, or that there is no interval."""
    mean, low, high = (f"{numbers[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} (no interval)" if np.isnan(numbers["low"]) else f"{mean} [{low}, {high}]"
