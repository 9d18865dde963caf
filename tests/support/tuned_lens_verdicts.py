"""Hand-made results of ``tuned_lens``, in which the trained lens gains the same everywhere."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from hooked_alm.experiments.tuned_lens.experiment import TuneLens
from hooked_alm.experiments.tuned_lens.settings import TunedLensConfig
from hooked_alm.experiments.tuned_lens.tables import LensResults, summarise

Change = Callable[[LensResults], LensResults]


def toy_results(gain: float, n_groups: int) -> LensResults:
    """Two prompts a group; three depths, the last the output."""
    who = [(f"{group}-{i}", group, i) for group in range(n_groups) for i in range(2)]
    held_out = [
        {
            "prompt": prompt, "group": f"g{group}", "place": place, "depth": depth,
            "kl_logit": (2 - depth) * (1 + 0.01 * group), "n_positions": 5,
            "kl_tuned": (2 - depth) * (1 + 0.01 * group) - gain * (depth < 2),
            "agrees_logit": float(depth == 2), "agrees_tuned": float(depth > i),
        }
        for prompt, group, i in who
        for place in ("scored", "readout")
        for depth in range(3)
    ]  # fmt: skip
    training = [
        {"step": step, "depth": depth, "kl": 2.0 - 0.1 * step, "n_tokens": 7}
        for step in range(10)
        for depth in range(2)
    ]
    untrained = [{"prompt": prompt, "difference": 0.0} for prompt, _, _ in who]
    tables: dict[str, list[dict[str, Any]]] = {
        "held_out": held_out, "training": training, "untrained": untrained,
    }  # fmt: skip
    made = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    run = TuneLens.results(TunedLensConfig(n_resamples=1000), {"model": {"blocks": 2}}, made)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> LensResults:
    """A lens that is closer to the output, on enough groups."""
    return toy_results(0.25, 7)


def _acts_untrained(run: LensResults) -> LensResults:
    run["untrained"]["difference"] += 1e-9
    return run


def _misses_the_output(run: LensResults) -> LensResults:
    run["held_out"].loc[run["held_out"].depth == 2, "kl_tuned"] += 1e-6
    return run


BROKEN: dict[str, Change] = {
    "an untrained tuned lens is the logit lens": _acts_untrained,
    "either lens reads the output at the last depth": _misses_the_output,
}
OTHER_WAY: dict[str, Change] = {
    "closer": lambda run: toy_results(-0.25, 7),
    "closer_at_readout": lambda run: toy_results(-0.25, 7),
    "earlier": lambda run: toy_results(0.25, 5),
}
