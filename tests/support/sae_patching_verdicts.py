"""What ``sae_patching`` controls and claims, on tables made by hand: each comes out either way."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from hooked_alm.experiments.sae_patching.experiment import SAEPatching
from hooked_alm.experiments.sae_patching.settings import SAEPatchingConfig
from hooked_alm.experiments.sae_patching.tables import BESIDE, ExchangeResults, summarise
from hooked_alm.experiments.workbench.controls import ROUNDING

Change = Callable[[ExchangeResults], ExchangeResults]
N_VOICE, N_TEXT = 24, 10
"""Clips whose answer is the voice's, and that of the instruction."""
LEAST = 1.5 * ROUNDING["logit"]["float32"]
CONFIG = SAEPatchingConfig(
    conditions=["conflict"], sizes=[1, 3], n_latents=3, alphas=[0.5], n_resamples=1000
)


def edit(
    family: str, n: int, alpha: float, follows_voice: bool, number: int
) -> dict[str, float | str]:
    """A row: exchanging the chosen latents, or all, flips what follows the voice."""
    does = follows_voice and family in ("chosen", "all", "rows") and alpha == 1
    moved = {"none": 0.0, "matched": 1.0, "reconstruction": 0.5}.get(family, 20.0 * alpha)
    shift = {"none": 0.0}.get(family, (8.0 + 0.1 * (number % 3)) * alpha * does)
    activity = {"chosen": 2.0, "matched": 1.5, "frequent": 2.2}.get(family, float("nan"))
    return {
        "family": family, "n_latents": n, "alpha": alpha, "prediction": "x", "flipped": float(does),
        "stayed": float("nan") if follows_voice else 1.0, "shift": shift, "moved": moved,
        "activity": activity, "label_mass": 0.9,
    }  # fmt: skip


def tables() -> dict[str, pd.DataFrame]:
    rows: dict[str, list[dict[str, Any]]] = {"runs": [], "edits": [], "exchanges": []}
    kinds = [(family, n, 1.0) for n in (1, 3) for family in ("chosen", *BESIDE)]
    kinds += [("chosen", 3, 0.5), ("push", 3, 0.5)]
    kinds += [(family, 0, 1.0) for family in ("none", "all", "rows", "reconstruction")]
    for number in range(N_VOICE + N_TEXT):
        who = {"pair": f"c{number}__sad", "clip": f"c{number}", "donor_clip": "d", "named": "sad",
               "condition": "conflict", "voice": "glad", "toward": "sad"}  # fmt: skip
        said = {"role": "base", "prediction": "glad", "label_mass": 0.9, "best_label_rank": 1}
        rows["runs"].append({**who, **said})
        some = {"without": '["en", "zh"]', "latents": "[1, 2]", "error_change": 1e-7}
        rows["exchanges"].append({**who, **some})
        for kind in kinds:
            rows["edits"].append({**who, **edit(*kind, number < N_VOICE, number)})
    return {name: pd.DataFrame(found) for name, found in rows.items()}


def concluded(made: dict[str, pd.DataFrame]) -> ExchangeResults:
    groups = {f"c{number}": "en" for number in range(N_VOICE + N_TEXT)} | {"d": "zh"}
    inputs = {"model": {"blocks": 3}, "labels": ["glad", "sad"], "groups": groups}
    run = SAEPatching.results(CONFIG, inputs, made)
    run.tables["confounds"] = pd.DataFrame(columns=["feature", "p", "found"])
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> ExchangeResults:
    """Latents that flip each answer that follows the voice, as nothing beside them does."""
    return concluded(tables())


def broken(table: str, query: str, column: str, by: Callable[[pd.Series], Any]) -> Change:
    """Changes some cells of a run, whose summaries stay."""

    def changed(run: ExchangeResults) -> ExchangeResults:
        rows = run[table].query(query).index
        run[table].loc[rows, column] = by(run[table].loc[rows, column])
        return run

    return changed


def change(query: str, column: str, by: Callable[[pd.Series], Any]) -> Change:
    """Changes some edits, and makes the summaries anew."""

    def changed(run: ExchangeResults) -> ExchangeResults:
        run = broken("edits", query, column, by)(run)
        return concluded({name: run[name] for name in ("runs", "edits", "exchanges")})

    return changed


BROKEN: dict[str, Change] = {
    "a label is the top token": broken("runs", "role == 'base'", "best_label_rank", lambda x: 3),
    "probability of the labels together": broken(
        "runs", "role == 'base'", "label_mass", lambda x: 0.1
    ),
    "no latent exchanged: rows stay, bit by bit": broken(
        "edits", "family == 'none' and clip == 'c3'", "moved", lambda x: x + 1e-9
    ),
    "no latent exchanged: the answer stays": broken(
        "edits", "family == 'none' and clip == 'c3'", "shift", lambda x: x + LEAST
    ),
    "all features exchanged: the row's own error is left": broken(
        "exchanges", "clip == 'c3'", "error_change", lambda x: 1e-3
    ),
    "pushes move rows as far as the chosen latents": broken(
        "edits", "family == 'push' and alpha == 0.5", "moved", lambda x: x * 1.001
    ),
    "latents are chosen on other groups": broken(
        "exchanges", "clip == 'c3'", "without", lambda x: '["en"]'
    ),
}
OTHER_WAY: dict[str, Change] = {
    "flips_conflict": change("family == 'chosen'", "flipped", lambda x: 0.0),
    **{
        f"more_than_{family}_conflict": change(f"family == '{family}'", "flipped", lambda x: 1.0)
        for family in BESIDE
    },
    "carried_conflict": change("family == 'all'", "shift", lambda x: x * 0.8),
    "stays_conflict": change("clip == 'c30'", "stayed", lambda x: 0.0),
}
