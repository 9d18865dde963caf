"""Results of held-out probes, made by hand: a column ``mood`` in the decoder, at three depths."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from hooked_alm.experiments.materials.probe_fits import OF_THE_CLIP
from hooked_alm.experiments.materials.probe_tables import ProbeResults, summarise
from hooked_alm.experiments.workbench.experiment import Experiment

Change = Callable[[ProbeResults], ProbeResults]
N_GROUPS, N_EACH = 8, 5
RATES = {"model": (0.6, 0.8, 1.0), "untrained": (0.6, 0.6, 0.6)}
"""Share of every group's clips that are read rightly, at depths 0 to 2."""


def made(
    kind: type[Experiment[Any]],
    config: Any,
    rates: Mapping[str, Sequence[float]] = RATES,
    baselines: Sequence[float] = (0.6, 0.4, 0.6),
    control: float = 0.4,
    leaks: str = "",
    label: str = "mood",
) -> ProbeResults:
    """Results of 40 clips of eight groups, with two values.

    Args:
        kind: of experiment.
        config: of the run.
        rates: source -> share of every group's clips that are read rightly, by depth.
        baselines: the same of every baseline of the clip.
        control: of control labels.
        leaks: see ``HeldOutLabel.leaks_shown``.
        label: name of the column.
    """
    tables: dict[str, list[dict[str, Any]]] = {"reads": [], "fits": []}
    points = [(source, "decoder", depth, f"blocks.{depth}", rate)
              for source, some in rates.items() for depth, rate in enumerate(some)]  # fmt: skip
    known = zip(OF_THE_CLIP, baselines, strict=True)
    points += [("baseline", "baseline", 0, *one) for one in known]
    for source, stream, depth, point, rate in points:
        key = {"label": label, "source": source, "stream": stream, "depth": depth, "point": point}
        nulls = {"shuffled_hit": 0.5, "shuffled_chance": 0.5, "known_hit": 1.0}
        for i in range(N_GROUPS * N_EACH):
            group, place = divmod(i, N_EACH)
            # One group in four is read worse by a clip, so that means have a spread.
            hit = float(place < round(rate * N_EACH) - (group % 4 == 0 and 0 < rate < 1))
            mine = {**nulls, "control_hit": float(place < round(control * N_EACH))}
            tables["reads"].append({
                **key, "clip": f"c{i}", "group": f"s{group}", "fold": group % 5,
                "value": "ab"[i % 2], "said": "ab"[i % 2], "hit": hit,
                **(mine if source == "model" else dict.fromkeys(mine, float("nan"))),
            })  # fmt: skip
        hits = [row["hit"] for row in tables["reads"][-N_GROUPS * N_EACH :]]
        tables["fits"].append({
            **key, "accuracy": sum(hits) / len(hits), "macro_f1": 0.5, "auroc": 0.5,
            "strength": 1.0, "bits": 20.0, "uniform_bits": 40.0, "compression": 2.0,
            "sum_off": 0.0, "leaks": leaks,
        })  # fmt: skip
    inputs = {"model": {"blocks": 2}, "baselines": OF_THE_CLIP}
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    run = kind.results(config, inputs, frames)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def _reads(**changes: Callable[[pd.DataFrame], Any]) -> Change:
    def apply(run: ProbeResults) -> ProbeResults:
        run.tables["reads"] = run["reads"].assign(**changes)
        return run

    return apply


def _not_to_one(run: ProbeResults) -> ProbeResults:
    run.tables["fits"] = run["fits"].assign(sum_off=0.01)
    return run


BROKEN: dict[str, Change] = {
    "no group is on both sides of a fold": _reads(fold=lambda t: (t["clip"] == "c1").astype(int)),
    "all features are read in the same folds": _reads(
        fold=lambda t: t.fold + (t.source == "baseline") * (t.fold == 0)
    ),
    "shuffled labels are read at chance": _reads(shuffled_hit=lambda t: t.shuffled_hit + 0.2),
    "probabilities add up to 1": _not_to_one,
    "scores are those of the clips": _reads(hit=lambda t: 1 - t.hit),
}


def other_ways(
    of: str, again: Callable[..., ProbeResults], names: Iterable[str]
) -> dict[str, Change]:
    """Claims of a column in a stream -> results in which they come out the other way."""
    found: dict[str, Change] = {
        "decodable": lambda run: again(baselines=(0.6, 1.0, 0.6)),
        "learnt": lambda run: again({**RATES, "untrained": RATES["model"]}),
        "deeper": lambda run: again({**RATES, "model": (1.0, 1.0, 1.0)}),
        "selective": lambda run: again(control=1.0),
    }
    return {f"{name}: {of}": found[name] for name in names}
