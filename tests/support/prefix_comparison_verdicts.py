"""What takes claims back: every control in its broken case, every defect, every claim both ways."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.prefix_comparison.settings import PrefixComparisonConfig
from hooked_alm.experiments.prefix_comparison.tables import PrefixResults as Results
from hooked_alm.experiments.prefix_comparison.tables import summarise

INPUTS = {"model": {"blocks": 2}, "compared": {"a": "real", "b": "none", "segment": "tool"}}


def cases() -> Results:
    """Two dozen items: the first prefix helps from depth 1 on, most where it alone succeeds."""
    names = [f"i{i}" for i in range(24)]
    items = pd.DataFrame({"item": names, "group": names, "quadrant": ["G10", "G01"] * 12})
    items["delta"] = np.where(items.quadrant == "G10", -2.0, -1.0) + 0.01 * np.sin(np.arange(24))

    def each(delta: Any = 0.0, **columns: Any) -> pd.DataFrame:
        rows = pd.DataFrame({**columns, "size": delta})
        found = items[["item", "group", "delta"]].merge(rows, how="cross")
        return found.assign(delta=found.delta * found.pop("size"), js=0.3)

    curves = each([0, 1, 1], depth=range(3), run="real", kl=1.0, kl_back=1.0)
    names, roles = ["real", "none", "original tool", "neutral tool"], [*"ab", "changed", "changed"]
    runs = each([1, 0, 1, 0.2], run=names, role=roles, n_segment=4, mass=0.5)
    halves = {"run": ["real", "real", "none", "none"], "segment": ["sink", "tool"] * 2}
    modes = ["gap", "filler"]
    tables = {
        "items": items.assign(js=0.3),
        "runs": runs.assign(nll=3 + runs.delta, right=1.0, exact=True, hit_share=1.0),
        "curves": curves,
        "classes": curves.assign(**{"class": "other", "n": 1}),
        "mass": each(**halves, layer=0, mass=0.5, density=1.0, without_sink=0.5),
        "coupling": each(layer=range(2), rho=-0.3, partial=-0.2),
        "positions": each(mode=modes, is_matched=True, largest_nll_change=0.2, largest_js=0.1),
        "matched": each(1, mode=modes, depth=2),
    }
    return summarised(PrefixComparisonConfig(n_resamples=1000), tables)


def summarised(config: PrefixComparisonConfig, tables: dict[str, pd.DataFrame]) -> Results:
    run = Results(config, INPUTS, dict(tables))
    run.tables.update(summarise(run))
    return run


def changed(run: Results, table: str, column: str, value: Callable[[Any], Any]) -> Results:
    made = run[table].assign(**{column: value(run[table][column])})
    return summarised(run.config, {**run.tables, table: made})


def spoilt(run: Results, table: str, column: str, value: float) -> Results:
    return changed(run, table, column, lambda values: values.where(values.index > 0, value))


def turned(run: Results, table: str, column: str = "delta", factor: float = -1) -> Results:
    return changed(run, table, column, lambda values: factor * values)


BROKEN: dict[str, Callable[[Results], Results]] = {
    "attention to all segments sums to 1": lambda run: spoilt(run, "mass", "mass", 0.49),
    "the original content put in again changes nothing": lambda run: spoilt(run, "runs", "nll", 9),
    "JS lies between 0 and ln 2": lambda run: spoilt(run, "curves", "js", np.log(2) + 0.01),
    "matched runs predict the first token at one position id": lambda run: spoilt(
        run, "positions", "is_matched", False
    ),
}
OTHER_WAY: dict[str, Callable[[Results], Results]] = {
    "output": partial(turned, table="curves", factor=0),
    "window": partial(turned, table="curves", factor=0),
    "quadrants": partial(turned, table="curves"),
    "coupling": partial(turned, table="coupling", column="partial"),
    "content": partial(turned, table="runs"),
    "position: gap": partial(turned, table="matched"),
    "position: filler": partial(turned, table="matched"),
}
