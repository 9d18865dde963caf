"""What a drawing shows, in words and numbers, for those who do not see it."""

from collections.abc import Iterable

import pandas as pd

MAX_BARS = 12
"""Bars that are told one by one."""


def of_curves(groups: Iterable[tuple[str | None, pd.DataFrame]], x: str, y: str) -> str:
    """Where each curve begins and ends, and what it reaches in between."""
    return "; ".join(f"{label or 'the curve'} {_course(part, x, y)}" for label, part in groups)


def _course(part: pd.DataFrame, x: str, y: str) -> str:
    part = part[part[y].notna()].sort_values(x)
    if part.empty:
        return "is not defined"
    told = [f"{number:z.2g}" for number in part[y]]
    at = [f"{number} at {where}" for number, where in zip(told, part[x], strict=True)]
    turns = {"lowest": part[y].argmin(), "highest": part[y].argmax()}
    ends = {told[0], told[-1]}
    inner = [f", {name} {at[i]}" for name, i in turns.items() if told[i] not in ends]
    return f"goes from {at[0]} to {at[-1]}{''.join(inner)}"


def of_bars(data: pd.DataFrame, x: str, y: str, group: str | None) -> str:
    """The height of every bar, or of the largest."""
    largest = data[y].abs().nlargest(MAX_BARS).index
    shown = data.loc[data.index.isin(largest)]
    names = shown[x].astype(str) + (", " + shown[group].astype(str) if group else "")
    told = "; ".join(f"{name} {height:z.2g}" for name, height in zip(names, shown[y], strict=True))
    return told if len(shown) == len(data) else f"the largest of {len(data)}: {told}"


def of_map(data: pd.DataFrame, x: str, y: str, value: str) -> str:
    """The least and the largest cell, and where they are."""
    cells = data[data[value].notna()].sort_values(value)
    ends = cells.iloc[[0, -1]].to_dict("records") if len(cells) else []
    told = [f"{row[value]:z.2g} at {x} {row[x]}, {y} {row[y]}" for row in ends]
    return " to ".join(told) or "no values"
