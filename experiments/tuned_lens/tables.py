"""Summaries and findings of a ``tuned_lens`` run. What is sampled are held-out groups."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.bootstrap import Band, Interval, bootstrap_mean

from ..workbench.findings import Finding, judged
from .settings import TunedLensConfig

LENSES = ("logit", "tuned")
MIN_GROUPS = 6
"""With fewer, not even a sign test in which all groups agree gives p < 0.05."""
LAST_STEPS = 0.1
"""Share of the steps whose mean is called the training's end."""


def depth_table(held_out: pd.DataFrame, config: TunedLensConfig) -> pd.DataFrame:
    """KL and top-1 agreement of both lenses, by place and depth, with 95 % intervals over groups.

    ``gain`` is KL(logit) − KL(tuned); its interval is simultaneous over depths, the others are
    pointwise. ``improved`` is the share of groups whose gain is positive.
    """
    parts = []
    for place, some in held_out.groupby("place", sort=False):
        gains = _by_group(some.assign(gain=some.kl_logit - some.kl_tuned), "gain")
        columns: dict[str, object] = {"place": place, "depth": np.arange(gains.shape[1])}
        for name in ("kl_logit", "kl_tuned", "agrees_logit", "agrees_tuned"):
            columns |= _columns(name, _interval(_by_group(some, name), config))
        columns |= _columns("gain", _interval(gains, config, "simultaneous"))
        columns |= {"improved": (gains > 0).mean(axis=0), "n_groups": len(gains)}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def settling_table(held_out: pd.DataFrame, config: TunedLensConfig) -> pd.DataFrame:
    """The depth from which a lens' top token is the output's for good, mean over prompts."""
    some = held_out[held_out.place == "readout"]
    depths = {}
    for lens in LENSES:
        agrees = some.pivot(index=["group", "prompt"], columns="depth", values=f"agrees_{lens}")
        settled = np.logical_and.accumulate(agrees.to_numpy()[:, ::-1] > 0, axis=1)
        depths[lens] = pd.Series(agrees.shape[1] - settled.sum(axis=1), index=agrees.index)
    depths["earlier"] = depths["logit"] - depths["tuned"]
    rows = []
    for name, values in depths.items():
        by_group = values.groupby("group", sort=False).mean().to_numpy(np.float64)
        found = _interval(by_group, config)
        ends = {"mean": float(found.mean), "low": float(found.low), "high": float(found.high)}
        rows.append({"lens": name, **ends, "n_groups": len(by_group)})
    return pd.DataFrame(rows)


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


def findings(
    depths: pd.DataFrame, settling: pd.DataFrame, controls: pd.DataFrame
) -> dict[str, Finding]:
    """Every claim of the report, by name; all are taken back if a control failed."""
    found = {
        "closer": _closer(depths, "scored", "On held-out prompts"),
        "closer_at_readout": _closer(depths, "readout", "At the readout of held-out prompts"),
        "earlier": _earlier(settling),
    }
    if (controls.untrained_difference != 0).any():
        why = "an untrained lens is not the logit lens"
        found = {name: one.doubted(why) for name, one in found.items()}
    return found


def _closer(depths: pd.DataFrame, place: str, where: str) -> Finding:
    """At every depth below the output, KL(tuned) < KL(logit)."""
    scored = depths[depths.place == place]
    scored = scored[scored.depth < scored.depth.max()].reset_index(drop=True)
    worst = scored.loc[scored.gain_low.fillna(-np.inf).idxmin()]
    n = int(worst.n_groups)
    sizes = scored.gain / scored.kl_logit
    facts = (
        f"Least sure at depth {int(worst.depth)}: KL(logit) − KL(tuned) = {worst.gain:.3f} "
        f"[{worst.gain_low:.3f}, {worst.gain_high:.3f}] nats (band over all depths). By "
        f"depth it takes {sizes.min():.0%} to {sizes.max():.0%} of the logit lens' distance away"
    )
    why_not = {
        f"only {n} held-out groups": n < MIN_GROUPS,
        f"not surely at depth {int(worst.depth)}": not worst.gain_low > 0,
    }
    claim = f"{where} the tuned lens is closer to the output at every depth"
    numbers = {"mean": worst.gain, "low": worst.gain_low, "high": worst.gain_high, "n": n}
    facts += f", {n} held-out groups"
    return judged(claim, facts, why_not, numbers=numbers, unit="nats")


def _earlier(settling: pd.DataFrame) -> Finding:
    """At the readout, its top token settles at an earlier depth."""
    rows = settling.set_index("lens")
    means, gap = rows["mean"], rows.loc["earlier"]
    n = int(gap.n_groups)
    facts = (
        f"Its top token at the readout is the output's for good from depth "
        f"{means['tuned']:.2f} on, the logit lens' from {means['logit']:.2f}; "
        f"{gap['mean']:.2f} [{gap.low:.2f}, {gap.high:.2f}] blocks earlier"
    )
    why_not = {
        f"only {n} held-out groups": n < MIN_GROUPS,
        "the interval includes 0": not gap.low > 0,
    }
    claim = "The tuned lens reads the answer at an earlier depth"
    facts += f", {n} held-out groups"
    return judged(claim, facts, why_not, numbers=gap.to_dict(), unit="blocks", count="n_groups")


def _by_group(some: pd.DataFrame, value: str) -> Float[np.ndarray, "group depth"]:
    """Mean over a group's prompts."""
    means = some.groupby(["group", "depth"], sort=False)[value].mean()
    return means.unstack("depth").sort_index(axis=1).to_numpy(np.float64)


def _interval(
    samples: Float[np.ndarray, " group *depth"], config: TunedLensConfig, band: Band = "pointwise"
) -> Interval:
    return bootstrap_mean(samples, seed=config.seed, n_resamples=config.n_resamples, band=band)


def _columns(name: str, interval: Interval) -> dict[str, object]:
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
