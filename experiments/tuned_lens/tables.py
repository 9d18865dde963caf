"""Summaries of a ``tuned_lens`` run; what is sampled are held-out groups."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.bootstrap import Band
from hooked_alm.methods.statistics.critical_layer import settling_depths

from ..workbench.intervals import Draws, numbers
from ..workbench.results import Results
from .settings import TunedLensConfig

LensResults = Results[TunedLensConfig]
TABLES = {
    "training": "the loss of a step at a depth, before the step",
    "held_out": "both lenses on a held-out prompt, at a place and depth",
    "untrained": "an untrained lens against the logit lens, on a held-out prompt",
}
LENSES = ("logit", "tuned")
LAST_STEPS = 0.1
"""Share of the steps whose mean is called the training's end."""


def summarise(run: LensResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary, by the name of its file."""
    yield "depths", depth_table(run["held_out"], run.draws)
    yield "settling", settling_table(run["held_out"], run.draws)
    yield "training_end", training_table(run["training"], run["depths"])


def depth_table(held_out: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """KL and top-1 agreement of both lenses, by place and depth, with 95 % intervals over groups.

    ``gain`` is KL(logit) − KL(tuned); its interval is simultaneous over depths, the others are
    pointwise. ``improved`` is the share of groups whose gain is positive.
    """
    parts = []
    for place, some in held_out.groupby("place", sort=False):
        some = some.assign(gain=some.kl_logit - some.kl_tuned)
        gains = _by_group(some, "gain")
        columns: dict[str, object] = {"place": place, "depth": np.arange(gains.shape[1])}
        for name in ("kl_logit", "kl_tuned", "agrees_logit", "agrees_tuned", "gain"):
            band: Band = "simultaneous" if name == "gain" else "pointwise"
            found = draws.mean(_by_group(some, name), band=band)
            columns |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        columns |= {"improved": (gains > 0).mean(axis=0), "n_groups": len(gains)}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def settling_table(held_out: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """The depth from which a lens' top token is the output's for good, mean over prompts."""
    some = held_out[held_out.place == "readout"]
    depths = {}
    for lens in LENSES:
        agrees = some.pivot(index=["group", "prompt"], columns="depth", values=f"agrees_{lens}")
        depths[lens] = pd.Series(settling_depths(agrees.to_numpy() > 0), index=agrees.index)
    depths["earlier"] = depths["logit"] - depths["tuned"]
    rows = []
    for name, values in depths.items():
        found = numbers(draws.mean(values.groupby("group", sort=False).mean().to_numpy(np.float64)))
        rows.append({"lens": name, **found})
    return pd.DataFrame(rows).rename(columns={"n": "n_groups"})


def training_table(training: pd.DataFrame, depths: pd.DataFrame) -> pd.DataFrame:
    """KL at the end of training beside KL on held-out prompts: how much was learnt by heart."""
    n_steps = int(training.step.max()) + 1
    last = training[training.step >= n_steps - max(1, round(LAST_STEPS * n_steps))]
    found = last.groupby("depth").kl.mean().rename("kl_training").reset_index()
    first = training[training.step == 0].set_index("depth").kl
    found.insert(1, "kl_first_step", found.depth.map(first))
    scored = depths[depths.place == "scored"].set_index("depth")
    found["kl_held_out"] = found.depth.map(scored.kl_tuned)
    found["kl_held_out_logit"] = found.depth.map(scored.kl_logit)
    return found


def _by_group(some: pd.DataFrame, value: str) -> Float[np.ndarray, "group depth"]:
    """Mean over a group's prompts."""
    means = some.groupby(["group", "depth"], sort=False)[value].mean()
    return means.unstack("depth").sort_index(axis=1).to_numpy(np.float64)
