"""Summaries of a ``circuits`` run, with intervals over groups, and its controls."""

from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.bootstrap import bootstrap_mean
from hooked_alm.points import hook_name

from ..workbench.controls import FAIL, PASS, SKIPPED
from ..workbench.experiment import Tables
from .settings import CircuitsConfig

MOST_ROUNDING = 1e-3
"""Of the metric: what a control that must be zero may be off by, in fp32."""


def interval(rows: pd.DataFrame, value: str, config: CircuitsConfig) -> dict[str, Any]:
    """Mean of a column with its 95 % interval over groups; NaN is left out, and counted."""
    samples = rows[value].to_numpy(np.float64)
    usable = np.isfinite(samples)
    n_groups = rows[usable]["group"].nunique()
    found = {"mean": np.nan, "low": np.nan, "high": np.nan}
    if usable.any():
        ci = bootstrap_mean(
            samples,
            seed=config.seed,
            n_resamples=config.n_resamples,
            clusters=rows["group"].tolist(),
            nan_policy="omit",
        )
        found = {"mean": float(ci.mean), "low": float(ci.low), "high": float(ci.high)}
    return {**found, "n": len(samples), "n_undefined": int((~usable).sum()), "n_groups": n_groups}


def total_effects(pairs: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """How far the exchange moves the metric, and how often the answers are those given."""
    rows = []
    for contrast, some in pairs.groupby("contrast", sort=False):
        as_given = some[["base_as_given", "donor_as_given"]].to_numpy(np.float64).mean()
        rows.append(
            {
                "contrast": contrast,
                **interval(some, "total_effect", config),
                "answers_as_given": float(as_given),
            }
        )
    return pd.DataFrame(rows)


def faithfulness(circuit: pd.DataFrame, config: CircuitsConfig) -> pd.DataFrame:
    """Share of the total effect that a circuit keeps alone, and that is left without it."""
    rows = []
    named = circuit.assign(circuit=circuit.circuit.str.split(" ").str[0])
    named = named[named.circuit != "every"]
    keys = ["contrast", "circuit", "what"]
    for (contrast, name, what), some in named.groupby(keys, sort=False):
        per_pair = some.groupby(["pair", "group"], sort=False)["share"].mean().reset_index()
        row = {"contrast": contrast, "circuit": name, "what": what}
        n_edges = float(some.n_edges.mean())
        rows.append({**row, **interval(per_pair, "share", config), "n_edges": n_edges})
    columns = [*keys, "mean", "low", "high", "n", "n_undefined", "n_groups", "n_edges"]
    return pd.DataFrame(rows, columns=columns)


def read_places(reads: pd.DataFrame, chosen: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Per contrast, what the carrying heads' keys and values take from each place (held-out pairs).

    A row per pair, a column per place, and ``group``: the sum over the winning heads that move the
    answer towards the donor's.
    """
    found = {}
    carrying = chosen[(chosen["mean"] > 0) & (chosen["head"] >= 0)]
    rows = reads[(reads.part == "held-out") & reads.input.isin(["k", "v"])]
    rows = rows.merge(carrying[["contrast", "layer", "head"]], on=["contrast", "layer", "head"])
    for contrast, some in rows.groupby("contrast", sort=False):
        wide = some.pivot_table(
            index=["pair", "group"], columns="place", values="toward", aggfunc="sum", sort=False
        )
        found[str(contrast)] = wide.reset_index("group")
    return found


# --- Controls


def controls(tables: Tables, n_layers: int) -> pd.DataFrame:
    """What has to come out if the patches are what they claim to be."""
    nodes, direct = tables["nodes"], tables["direct"]
    last = n_layers - 1
    blind = nodes[(nodes.layer == last) & (nodes.place != "readout")]
    mlp = nodes[(nodes.layer == last) & (nodes["head"] < 0) & (nodes.place == "readout")]
    sender = hook_name("mlp_out", f"blocks.{last}")
    edge = direct[(direct["mode"] == "edge") & (direct.sender == sender)]
    both = mlp.merge(edge, on=["pair", "direction"], suffixes=("", "_direct"))
    checks = {
        "the last block moves nothing but at the readout": blind.toward.abs(),
        "the last MLP acts directly: its edge to the logits is its patch": (
            both.toward - both.toward_direct
        ).abs(),
    }
    if "circuit" in tables and len(tables["circuit"]):
        every = tables["circuit"][tables["circuit"].circuit == "every edge"]
        every = every.merge(tables["pairs"][["pair", "donor"]], on="pair")
        checks["every edge from the donor gives the donor's answer"] = (
            every.value - every.donor
        ).abs()
    rows = []
    for control, off in checks.items():
        found = float(off.max()) if len(off) else np.nan
        verdict = SKIPPED if not len(off) else PASS if found <= MOST_ROUNDING else FAIL
        rows.append(
            {"control": control, "largest": found, "allowed": MOST_ROUNDING, "verdict": verdict}
        )
    return pd.DataFrame(rows)
