"""What a ``circuits`` run controls and claims."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.significance import sign_flip_test

from ..materials.confounds import confounded
from ..workbench.claims import Claim, Finding, few, judged, not_measured, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from .plan import MLP, CircuitNode
from .tables import CircuitResults, of, pair_shares

SHOWN_NODES = 4
SURE = 0.05
"""Largest p of a single comparison that is called established."""


def _rounding(run: CircuitResults, off: pd.Series) -> Outcome:
    return at_most(off, ROUNDING["logit"][run.config.dtype], run.config.unit)


def _last_block_is_blind(run: CircuitResults) -> Outcome:
    nodes = run["nodes"]
    last = nodes[nodes.layer == run.n_blocks - 1]
    return _rounding(run, last[last.place != "readout"].toward)


def _last_mlp_is_direct(run: CircuitResults) -> Outcome:
    last, nodes, direct = CircuitNode(run.n_blocks - 1, MLP), run["nodes"], run["direct"]
    mlp = nodes[(nodes.layer == last.layer) & (nodes["head"] == MLP)]
    edge = direct[(direct.sender == last.sender) & (direct["mode"] == "edge")]
    both = mlp.merge(edge, on=["pair", "direction"], suffixes=("", "_direct"))
    both = both[both.place == "readout"]
    return _rounding(run, both.toward - both.toward_direct)


def _every_edge_is_the_donor(run: CircuitResults) -> Outcome:
    every = run["circuit"].merge(run["pairs"][["pair", "donor"]], on="pair")
    every = every[every.circuit == "every edge"]
    return _rounding(run, every.value - every.donor)


CONTROLS = (
    Control(
        name="the last block moves nothing but at the readout",
        of=("nodes",),
        guards_against="patches at other positions than they are said to be at",
        check=_last_block_is_blind,
    ),
    Control(
        name="the last MLP acts directly: its edge to the logits is its patch",
        of=("nodes", "direct", "paths", "reads"),
        guards_against="path patching that sends more or less than the message of an edge",
        check=_last_mlp_is_direct,
    ),
    Control(
        name="every edge from the donor gives the donor's answer",
        of=("pairs", "circuit"),
        guards_against="edges that circuits lack, or prompts that are not those of the pair",
        check=_every_edge_is_the_donor,
    ),
)


def _contrasts(run: CircuitResults) -> list[str]:
    return run["effects"].contrast.tolist()


def _unsure(gaps: pd.Series, run: CircuitResults, what: str) -> dict[str, bool]:
    """Whether a gap's mean is not surely above 0: an exact test, as held-out groups are few."""
    means = gaps.groupby("group").mean().dropna().to_numpy(np.float64)
    if len(means) < 2:
        return {f"{what}, only {len(means)} groups": True}
    p = sign_flip_test(means, seed=run.config.seed, alternative="greater").p
    return {f"{what}, p = {p:.2g} over {len(means)} groups": p > SURE}


def _unless_confounded(judge: Callable[..., Finding | None]) -> Callable[..., Finding | None]:
    """Doubts a finding where the contrast's clips differ in more than what it is named after."""

    @wraps(judge)
    def doubting(run: CircuitResults, contrast: str, **options: Any) -> Finding | None:
        finding = judge(run, contrast, **options)
        why_not = confounded(of(run["confounds"], contrast), run.config)
        return finding and finding.doubted(*(why for why, holds in why_not.items() if holds))

    return doubting


def _dominance(run: CircuitResults) -> Finding | None:
    """The claim which exchange moves the answer more, by group."""
    effects = run["pairs"].groupby(["group", "contrast"], sort=False).total_effect
    means = effects.mean().unstack("contrast")
    if len(means.columns) < 2:
        return None
    first, second = means.mean().sort_values(ascending=False, kind="stable").index[:2]
    gaps = (means[first] - means[second]).dropna()
    row = run.draws.row(gaps, gaps.index.tolist())
    return judged(
        f"The answer depends more on the {first} than on the {second}",
        f"Total effects {means[first].mean():.2f} and {means[second].mean():.2f}, difference "
        f"{shown(row)} {run.config.unit}, {len(gaps)} groups",
        {
            **few(len(gaps), "groups"),
            "the difference is not surely above 0": not row["low"] > 0,
            **confounded(of(run["confounds"], first), run.config),
        },
        numbers=row,
        unit=run.config.unit,
    )


@_unless_confounded
def _effect(run: CircuitResults, contrast: str) -> Finding:
    row, least = of(run["effects"], contrast).iloc[0].to_dict(), run.config.min_effect
    too_small = {f"the effect is not surely above {least:g}": not row["low"] > least}
    return judged(
        f"Exchanging the {contrast} moves the answer",
        f"Total effect {shown(row)} {run.config.unit}, {row['n']} pairs of {row['n_groups']} "
        f"groups; the answers are those given in {row['answers_as_given']:.2f}",
        few(row["n_groups"], "groups") | too_small,
        numbers=row,
        unit=run.config.unit,
        count="n_groups",
    )


@_unless_confounded
def _nodes(run: CircuitResults, contrast: str) -> Finding:
    chosen, cells = of(run["winners"], contrast), of(run["node_cells"], contrast)
    heads, mlps = chosen[chosen["head"] != MLP], chosen[chosen["head"] == MLP]
    confirmed, n = heads[heads.confirmed.astype(bool)], int(cells.n_groups.max())
    fdr, least = run.config.fdr, 2.0 ** (1 - n)
    tests = f"{cells.q.notna().sum()} cells, false discovery rate {fdr:g}, {n} groups"
    if heads.empty:
        largest = f"{cells['mean'].abs().max():.2g}"
        facts = f"Tested {tests}; largest mean effect {largest} {run.config.unit}"
    else:
        found = cells[cells.found & (cells["head"] != MLP)]
        n_opposing = (found.groupby(["layer", "head"])["mean"].max() < 0).sum()
        facts = (
            f"{len(confirmed)} of {len(heads)} winning heads and {mlps.confirmed.sum()} of "
            f"{len(mlps)} MLPs are confirmed on held-out pairs; found in {tests}; "
            f"{n_opposing} other heads are found only to oppose it"
        )
    if len(confirmed):
        some = confirmed.head(SHOWN_NODES).itertuples()
        largest = ", ".join(f"{o.node} at the {o.place} ({o.held_out_mean:+.2f})" for o in some)
        facts += f". Largest: {largest} {run.config.unit}"
    return judged(
        f"Heads carry the {contrast}",
        facts,
        {
            "no head moves the answer enough and surely enough on the discovery pairs": True,
            f"{n} groups cannot give a p below {least:.2g}": least > fdr,
        }
        if heads.empty
        else {"no winning head is confirmed on held-out pairs": confirmed.empty},
        numbers={} if heads.empty else {"mean": len(confirmed), "n": chosen.n_held_out.max()},
        unit="heads",
    )


@_unless_confounded
def _reads(run: CircuitResults, contrast: str) -> Finding | None:
    """The claim where winning heads read: what keys and values hear, on held-out pairs."""
    if of(run["winners"], contrast).empty:
        return None
    claim, rows = f"The heads that carry the {contrast} read it at", of(run["reads"], contrast)
    by_place = rows[(rows.part == "held-out") & rows.input.isin(["k", "v"])].pivot_table(
        index=["pair", "group"], columns="place", values="toward", aggfunc="sum", sort=False
    )
    if len(by_place.columns) < 2:
        why = "no head carries it, or there is one place only"
        return not_measured(f"{claim} one place", why, run.config.unit)
    means = by_place.mean().sort_values(ascending=False, kind="stable")
    first, second = means.index[:2]
    gaps = by_place[first] - by_place[second]
    row = run.draws.row(gaps, gaps.index.get_level_values("group").tolist())
    every = ", ".join(f"{place} {mean:.2f}" for place, mean in means.items())
    return judged(
        f"{claim} the {first}",
        f"Exchanging their keys and values at one place moves the answer by: {every} "
        f"{run.config.unit}; {first} over {second} {shown(row)}, {len(gaps)} held-out pairs",
        _unsure(gaps, run, f"not surely more than at the {second}"),
        numbers=row,
        unit=run.config.unit,
        count="n_clusters",
    )


@_unless_confounded
def _paths(run: CircuitResults, contrast: str) -> Finding | None:
    if of(run["winners"], contrast).empty:
        return None
    top = of(run["top_paths"], contrast)
    confirmed = top[top.confirmed.astype(bool)]
    facts = f"{len(confirmed)} of the {len(top)} largest are confirmed on held-out pairs"
    for best in confirmed.head(1).itertuples():
        facts += (
            f". Largest: {best.sender} -> {best.receiver} at the {best.place} "
            f"({best.held_out_mean:+.2f}, {best.mode})"
        )
    return judged(
        f"Paths between its nodes carry the {contrast}",
        facts,
        {"none of the largest is confirmed": confirmed.empty},
        numbers={"mean": len(confirmed), "n": top.n_held_out.max() if len(top) else 0},
        unit="paths",
    )


@_unless_confounded
def _circuit(run: CircuitResults, contrast: str, what: str) -> Finding | None:
    """Against random circuits of its size: faithfulness (alone) or completeness (removed)."""
    if of(run["winners"], contrast).empty:
        return None
    some = of(pair_shares(run["circuit"]), contrast)
    wide = some[some.what == what].pivot_table("share", ["pair", "group"], "circuit")
    if not {"circuit", "random"} <= {*wide.columns}:
        claim = f"The {contrast}'s circuit does more than random ones"
        return not_measured(claim, "no held-out pair has an effect to share", "share")
    sign = 1 if what == "alone" else -1
    gaps = (sign * (wide.circuit - wide.random)).dropna()
    row = run.draws.row(gaps, gaps.index.get_level_values("group").tolist())
    kept = of(run["faithfulness"], contrast).set_index(["what", "circuit"])
    ours, random = (kept.loc[what, name].to_dict() for name in ("circuit", "random"))
    mean = f"{ours['mean']:.2f}"
    if what == "alone":
        claim = f"The {contrast}'s circuit alone carries the answer (faithfulness)"
        too_little = {f"it keeps {mean} of the effect": not ours["mean"] >= 0.5}
    else:
        claim = f"Without the {contrast}'s circuit little of it is left (completeness)"
        too_little = {f"{mean} of the effect is left": not ours["mean"] <= 0.5}
    return judged(
        claim,
        f"Share of the total effect {shown(ours)}, random {shown(random)}, difference "
        f"{shown(row)}; {int(ours['n_edges'])} and {int(random['n_edges'])} edges, "
        f"{int(ours['n'])} held-out pairs",
        too_little | _unsure(gaps, run, "not more than random circuits"),
        numbers=row,
        unit="share",
        count="n_clusters",
    )


CLAIMS = (
    Claim(name="dominance", rests_on=("pairs",), judge=_dominance),
    Claim(name="{}: effect", rests_on=("pairs",), judge=_effect, per=_contrasts),
    Claim(name="{}: nodes", rests_on=("nodes",), judge=_nodes, per=_contrasts),
    Claim(name="{}: reads", rests_on=("nodes", "reads"), judge=_reads, per=_contrasts),
    Claim(name="{}: paths", rests_on=("nodes", "paths"), judge=_paths, per=_contrasts),
    Claim(
        name="{}: alone",
        rests_on=("nodes", "circuit"),
        judge=partial(_circuit, what="alone"),
        per=_contrasts,
    ),
    Claim(
        name="{}: removed",
        rests_on=("nodes", "circuit"),
        judge=partial(_circuit, what="removed"),
        per=_contrasts,
    ),
)
