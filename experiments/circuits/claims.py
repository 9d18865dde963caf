"""What a ``circuits`` run says: findings in words, made from its tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.significance import sign_flip_test

from ..workbench.controls import FAIL
from ..workbench.experiment import Tables
from ..workbench.findings import MIN_ITEMS, Finding, judged, shown
from .settings import CircuitsConfig
from .tables import interval, read_places

SHOWN_NODES = 4
SURE = 0.05
"""Largest p of a single comparison that is called established."""


def findings(tables: Tables, summaries: Tables, config: CircuitsConfig) -> dict[str, Finding]:
    """Every claim of the report, by name."""
    effects = summaries["effects"].set_index("contrast")
    found: dict[str, Finding] = {}
    if len(effects) > 1:
        found["dominance"] = _dominance(tables["pairs"], config)
    shares = summaries["faithfulness"].set_index(["contrast", "circuit", "what"])
    for contrast in effects.index:
        found[f"{contrast}: effect"] = _effect(contrast, effects.loc[contrast].to_dict(), config)
        chosen = summaries["winners"]
        chosen = chosen[chosen.contrast == contrast]
        found[f"{contrast}: nodes"] = _nodes(contrast, chosen, summaries["node_cells"], config)
        if not len(chosen):
            continue
        found[f"{contrast}: reads"] = _reads(contrast, tables, chosen, config)
        paths = summaries["top_paths"]
        found[f"{contrast}: paths"] = _paths(contrast, paths[paths.contrast == contrast])
        for what in ("alone", "removed"):
            found[f"{contrast}: {what}"] = _circuit(
                contrast, what, tables["circuit"], shares, config
            )
    failed = summaries["controls"]
    failed = failed[failed.verdict == FAIL].control
    if len(failed):
        why = [f"the control '{name}' failed" for name in failed]
        found = {name: one.doubted(*why) for name, one in found.items()}
    return found


def _judged(
    claim: str, facts: str, why_not: Mapping[str, bool], *, numbers: Mapping[str, Any], unit: str
) -> Finding:
    return judged(claim, facts, why_not, numbers=numbers, unit=unit, count="n_groups")


def _unit(config: CircuitsConfig) -> str:
    return {"logit_diff": "logits", "log_prob": "nats", "prob": "probability"}[config.metric]


def _unsure(gaps: pd.DataFrame, config: CircuitsConfig) -> dict[str, bool]:
    """Whether a gap's mean is not surely above 0: an exact test, as held-out groups are few."""
    means = gaps.groupby("group")["gap"].mean().dropna().to_numpy(np.float64)
    if len(means) < 2:
        return {f"only {len(means)} groups": True}
    p = sign_flip_test(means, seed=config.seed, alternative="greater").p
    return {f"p = {p:.2g} over {len(means)} groups": p > SURE}


def _few(numbers: Mapping[str, Any]) -> dict[str, bool]:
    n = int(numbers["n_groups"])
    return {f"only {n} groups": n < MIN_ITEMS}


def _effect(contrast: str, row: Mapping[str, Any], config: CircuitsConfig) -> Finding:
    facts = (
        f"Total effect {shown(row)} {_unit(config)}, {int(row['n'])} pairs of "
        f"{int(row['n_groups'])} "
        f"groups; the answers are those given in {row['answers_as_given']:.2f}"
    )
    why_not = {
        **_few(row),
        f"the effect is not surely above {config.min_effect:g}": not row["low"] > config.min_effect,
    }
    claim = f"Exchanging the {contrast} moves the answer"
    return _judged(claim, facts, why_not, numbers=row, unit=_unit(config))


def _dominance(pairs: pd.DataFrame, config: CircuitsConfig) -> Finding:
    """Which exchange moves the answer more, by group."""
    means = pairs.groupby(["group", "contrast"], sort=False).total_effect.mean().unstack("contrast")
    order = means.mean().sort_values(ascending=False, kind="stable").index
    first, second = str(order[0]), str(order[1])
    gaps = (means[first] - means[second]).dropna().rename("gap").reset_index()
    numbers = interval(gaps, "gap", config)
    facts = (
        f"Total effects {means[first].mean():.2f} and {means[second].mean():.2f}, difference "
        f"{shown(numbers)} {_unit(config)}, {len(gaps)} groups"
    )
    return _judged(
        f"The answer depends more on the {first} than on the {second}",
        facts,
        {**_few(numbers), "the difference is not surely above 0": not numbers["low"] > 0},
        numbers=numbers,
        unit=_unit(config),
    )


def _nodes(
    contrast: str, chosen: pd.DataFrame, cells: pd.DataFrame, config: CircuitsConfig
) -> Finding:
    claim = f"Heads carry the {contrast}"
    cells = cells[cells.contrast == contrast]
    n = int(cells.n_groups.max())
    tests = f"{int(cells.q.notna().sum())} cells, false discovery rate {config.fdr:g}, {n} groups"
    if not (chosen["head"] >= 0).any():
        least = 2.0 ** (1 - n)
        reasons = {
            "no head moves the answer enough and surely enough on the discovery pairs": True,
            f"{n} groups cannot give a p below {least:.2g}": least > config.fdr,
        }
        largest = cells["mean"].abs().max()
        facts = f"Tested {tests}; largest mean effect {largest:.2g} {_unit(config)}"
        return _judged(claim, facts, reasons, numbers={}, unit="heads")
    heads, mlps = chosen[chosen["head"] >= 0], chosen[chosen["head"] < 0]
    confirmed = heads[heads.confirmed]
    names = [
        f"{row.node} at the {row.place} ({row.held_out_mean:+.2f})"
        for row in confirmed.itertuples()
    ]
    facts = (
        f"{len(confirmed)} of {len(heads)} winning heads and {int(mlps.confirmed.sum())} of "
        f"{len(mlps)} MLPs are confirmed on held-out pairs; found in {tests}; "
        f"{_n_opposing(cells)} other heads are found only to oppose it"
    )
    if names:
        facts += f". Largest: {', '.join(names[:SHOWN_NODES])} {_unit(config)}"
    why_not = {"no winning head is confirmed on held-out pairs": not len(confirmed)}
    numbers = {"mean": float(len(confirmed)), "n_groups": float(chosen.n_held_out.max())}
    return _judged(claim, facts, why_not, numbers=numbers, unit="heads")


def _n_opposing(cells: pd.DataFrame) -> int:
    found = cells[cells.found & (cells["head"] >= 0)]
    best = found.groupby(["layer", "head"])["mean"].max()
    return int((best < 0).sum())


def _reads(contrast: str, tables: Tables, chosen: pd.DataFrame, config: CircuitsConfig) -> Finding:
    by_place = read_places(tables["reads"], chosen).get(contrast)
    claim = f"The heads that carry the {contrast} read it at one place"
    if by_place is None or len(by_place.columns) < 3:
        why = "no head carries it, or there is one place only"
        return _judged(claim, "Not measured", {why: True}, numbers={}, unit=_unit(config))
    means = by_place.drop(columns="group").mean().sort_values(ascending=False, kind="stable")
    first, second = str(means.index[0]), str(means.index[1])
    gaps = by_place.assign(gap=by_place[first] - by_place[second])
    numbers = interval(gaps, "gap", config)
    every = ", ".join(f"{place} {mean:.2f}" for place, mean in means.items())
    facts = (
        f"Exchanging their keys and values at one place moves the answer by: {every} "
        f"{_unit(config)}; {first} over {second} {shown(numbers)}, {len(gaps)} held-out pairs"
    )
    return _judged(
        f"The heads that carry the {contrast} read it at the {first}",
        facts,
        {
            f"not surely more than at the {second}, {k}": no
            for k, no in _unsure(gaps, config).items()
        },
        numbers=numbers,
        unit=_unit(config),
    )


def _paths(contrast: str, top: pd.DataFrame) -> Finding:
    claim = f"Paths between its nodes carry the {contrast}"
    confirmed = top[top.confirmed.fillna(False).astype(bool)]
    facts = f"{len(confirmed)} of the {len(top)} largest are confirmed on held-out pairs"
    if len(confirmed):
        best = confirmed.iloc[0]
        facts += (
            f". Largest: {best.sender} -> {best.receiver} at the {best.place} "
            f"({best.held_out_mean:+.2f}, {best['mode']})"
        )
    why_not = {"none of the largest is confirmed": not len(confirmed)}
    n = float(top.n_held_out.max()) if len(top) else 0.0
    numbers = {"mean": float(len(confirmed)), "n_groups": n}
    return _judged(claim, facts, why_not, numbers=numbers, unit="paths")


def _circuit(
    contrast: str, what: str, circuit: pd.DataFrame, shares: pd.DataFrame, config: CircuitsConfig
) -> Finding:
    """Faithfulness (alone) or completeness (removed), against random circuits of its size."""
    some = circuit[(circuit.contrast == contrast) & (circuit.what == what)]
    wide = some.assign(circuit=some.circuit.str.split(" ").str[0]).pivot_table(
        index=["pair", "group"], columns="circuit", values="share", aggfunc="mean"
    )
    sign = 1 if what == "alone" else -1
    if not {"circuit", "random"} <= {*wide.columns}:
        claim = f"The {contrast}'s circuit does more than random ones"
        why = {"no held-out pair has an effect to share": True}
        return _judged(claim, "Not measured", why, numbers={}, unit="share")
    gaps = (sign * (wide.circuit - wide.random)).dropna().rename("gap").reset_index()
    numbers = interval(gaps, "gap", config)
    ours, random = (shares.loc[(contrast, name, what)].to_dict() for name in ("circuit", "random"))
    claims = {
        "alone": f"The {contrast}'s circuit alone carries the answer (faithfulness)",
        "removed": f"Without the {contrast}'s circuit little of it is left (completeness)",
    }
    is_half = ours["mean"] >= 0.5 if what == "alone" else ours["mean"] <= 0.5
    why_not = {
        f"it keeps {ours['mean']:.2f} of the effect": what == "alone" and not is_half,
        f"{ours['mean']:.2f} of the effect is left": what == "removed" and not is_half,
        **{
            f"not more than random circuits, {why}": no for why, no in _unsure(gaps, config).items()
        },
    }
    facts = (
        f"Share of the total effect {shown(ours)}, random {shown(random)}, difference "
        f"{shown(numbers)}; {int(ours['n_edges'])} and {int(random['n_edges'])} edges, "
        f"{int(ours['n'])} held-out pairs"
    )
    return _judged(claims[what], facts, why_not, numbers=numbers, unit="share")
