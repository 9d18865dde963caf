"""What ``convergence`` controls and claims, on tables made by hand, either way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.convergence.experiment import Convergence
from hooked_alm.experiments.convergence.settings import ConvergenceConfig
from hooked_alm.experiments.convergence.tables import AgreementResults, summarise

Change = Callable[[AgreementResults], AgreementResults]
N_CLIPS, N_BLOCKS, LAST = 24, 6, 9


def made(spread: int = 0, without_massive: int = 3, *, still: bool = False) -> AgreementResults:
    """Clips whose measures turn at depth 2 to 6, each clip at its own.

    Args:
        spread: depths between one measure and the next.
        without_massive: depths between CKA's step with and without massive rows.
        still: every clip turns at the same depth.
    """
    tables: dict[str, list[dict[str, Any]]] = {
        "transcripts": [], "tokens": [], "streams": [], "checks": []
    }  # fmt: skip
    for i in range(N_CLIPS):
        who, turn = {"clip": f"c{i}", "speaker": f"s{i % 4}"}, 2 if still else 2 + i % 4
        depths = np.arange(LAST + 1)
        log_p = np.where(depths < turn + spread, -4.0, -0.5)
        for depth in range(LAST + 1):
            far = 0.0 if depth >= turn else 1.0
            tables["transcripts"].append(
                {**who, "depth": depth, "distance": far, "log_p": log_p[depth]}
            )
            for rows, later in (("own", 0), ("all", 0), ("without_massive", without_massive)):
                at = min(turn + 2 * spread + later, LAST)
                cka = 1.0 if depth == LAST else 0.9 if depth >= at else 0.1
                tables["streams"].append({
                    **who, "rows": rows, "depth": depth, "n_rows": 50, "raw_norm": 10.0,
                    "centred_norm": 9.0, "cka": cka, "plain_cka": cka,
                })  # fmt: skip
        tables["tokens"].append({**who, "place": 0, "depth": 3})
        tables["checks"].append({**who, "memory": 0.0, "log_p": 0.0, "not_greedy": 0.0})
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    config = ConvergenceConfig(n_resamples=1000, audio="my.csv")
    run = Convergence.results(config, {"model": {"blocks": N_BLOCKS}}, frames)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> AgreementResults:
    """Everything turns together, clip by clip, and massive rows move it."""
    return made()


def _checks(**values: float) -> Change:
    def apply(run: AgreementResults) -> AgreementResults:
        run.tables["checks"] = run["checks"].assign(**values)
        return run

    return apply


def _streams(column: str, value: float) -> Change:
    def apply(run: AgreementResults) -> AgreementResults:
        run.tables["streams"] = run["streams"].assign(**{column: value})
        return run

    return apply


BROKEN: dict[str, Change] = {
    "the last depth is what the model hears": _checks(memory=0.1),
    "the last state is similar to itself": _streams("cka", 0.9),
    "centring makes no row longer": _streams("centred_norm", 10.1),
    "the transcript is what one pass finds likeliest": _checks(not_greedy=0.1),
}
OTHER_WAY: dict[str, Change] = {
    "same_depth": lambda run: made(spread=2),
    "clip_by_clip": lambda run: made(still=True),
    "massive_rows": lambda run: made(without_massive=0),
}
