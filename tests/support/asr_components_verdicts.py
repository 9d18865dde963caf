"""What ``asr_components`` controls and claims, on tables made by hand, either way."""

import re
from collections.abc import Callable
from typing import Any

import pandas as pd

from hooked_alm.experiments.asr_components.experiment import AsrComponents
from hooked_alm.experiments.asr_components.settings import AsrComponentsConfig
from hooked_alm.experiments.asr_components.tables import ComponentResults, summarise

Change = Callable[[ComponentResults], ComponentResults]
N = 40
"""Clips that go in circles, that are written down soundly, and that hold nothing."""
CURES = {"cross L1H0": 1.0, "self L1H0": 0.0, "cross L0H1": 0.1, "self head 0 in all blocks": 0.0}
SILENCES = {
    "cross L1H0": 0.0,
    "self L1H0": 0.1,
    "cross L0H1": 0.0,
    "self head 0 in all blocks": 1.0,
}
WHY = {"cross L0H1": "random"}


def made(
    cures: dict[str, float] | None = None,
    silences: dict[str, float] | None = None,
    wrong: int = 0,
) -> ComponentResults:
    """Results in which leaving a head out cures and silences some shares of the clips.

    Args:
        cures: head -> share of the circles that it cures.
        silences: head -> share of the clips without speech that it silences.
        wrong: words of four that are wrong once a head is left out.
    """
    cures, silences = {**CURES, **(cures or {})}, {**SILENCES, **(silences or {})}
    tables: dict[str, list[dict[str, Any]]] = {"transcripts": [], "screen": [], "ablated": []}

    def row(clip: str, i: int, holds: str, fails: float, n_wrong: int = 0) -> dict[str, Any]:
        counts = {"n": 4 * (holds == "speech"), "substitutions": n_wrong}
        return {
            "clip": clip, "speaker": f"s{i % 4}", "holds": holds, "text": "a b c d",
            "n_tokens": 4, "loops": float(clip[0] == "l") * fails,
            "heard": float(holds == "speech" or fails > 0), "repetition": 0.0,
            **{f"reference_{name}": counts.get(name, 0)
               for name in ("n", "substitutions", "deletions", "insertions")},
        }  # fmt: skip

    kinds = [("loop", "speech"), ("sound", "speech"), ("nothing", "no_speech")]
    for kind, holds in kinds:
        for i in range(N):
            clip = f"{kind}{i}"
            tables["transcripts"].append(row(clip, i, holds, float(kind != "sound")))
            if kind != "sound":
                of = "loop" if kind == "loop" else "hallucination"
                for head_kind in ("cross", "self"):
                    for layer in range(2):
                        tables["screen"].append({
                            "clip": clip, "speaker": f"s{i % 4}", "of": of, "kind": head_kind,
                            "layer": layer, "head": 0, "effect": -1.0, "norm": 2.0,
                        })  # fmt: skip
            for node in CURES:
                share = cures[node] if kind == "loop" else silences[node]
                fails = float(kind != "sound") * float(i >= share * N)
                where = {
                    "node": node,
                    "kind": node.split()[0],
                    "head": int(re.findall(r"\d", node)[-1]),
                }
                where |= {"layer": -1 if "all" in node else int(re.findall(r"\d", node)[0])}
                where |= {"why": WHY.get(node, "loop, hallucination")}
                n_wrong = wrong if kind == "sound" else 0
                tables["ablated"].append({**row(clip, i, holds, fails, n_wrong), **where})
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    config = AsrComponentsConfig(n_resamples=1000, audio="my.csv")
    run = AsrComponents.results(config, {"model": {"blocks": 2}}, frames)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> ComponentResults:
    """One head of cross-attention carries the circles, one of self-attention the hallucinations."""
    return made()


def _other_clips(run: ComponentResults) -> ComponentResults:
    run.tables["ablated"] = run["ablated"].iloc[1:]
    return run


def _unscreened(run: ComponentResults) -> ComponentResults:
    run.tables["screen"] = run["screen"][run["screen"]["clip"] != "loop3"]
    return run


def _no_norm(run: ComponentResults) -> ComponentResults:
    run.tables["screen"] = run["screen"].assign(norm=float("nan"))
    return run


BROKEN: dict[str, Change] = {
    "every head is left out of the same clips": _other_clips,
    "those that fail are screened": _unscreened,
    "outputs of heads have a length": _no_norm,
}
OTHER_WAY: dict[str, Change] = {
    "loop_head": lambda run: made(cures={"cross L0H1": 1.0}),
    "loops_cross_attention": lambda run: made(cures={"self L1H0": 1.0}),
    "loop_head_cost": lambda run: made(wrong=1),
    "hallucination_head": lambda run: made(silences={"self head 0 in all blocks": 0.2}),
}
