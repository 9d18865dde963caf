"""Hand-made results of ``sae_compare``: two dictionaries that agree, and are better than rows."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.materials.feature_readings import WHOLE
from hooked_alm.experiments.sae_compare.experiment import CompareDictionaries
from hooked_alm.experiments.sae_compare.settings import SAECompareConfig
from hooked_alm.experiments.sae_compare.tables import ComparedResults, summarise

Change = Callable[[ComparedResults], ComparedResults]
POINT, NAMES, N_LATENTS, WIDTH = "blocks.1.hook_resid_post", ("a", "b"), 40, 6
GROUPS = [f"g{number}" for number in range(7)]
CLIPS = [(f"{group}-{i}", group) for group in GROUPS for i in range(4)]
FACTORS = ("pitch", "level")


def toy_results(
    found_again: float = 0.75,
    few: float = 0.9,
    refit: float = 0.5,
    apart: float = 0.9,
    factor_error: float = 0.3,
) -> ComparedResults:
    """What is read off few codes, what is left without these, and how codes hold factors apart."""
    config = SAECompareConfig(n_resamples=1000, factors=FACTORS, labels=("mood",), ks=(1, 2, 4))
    partners = [
        {"point": POINT, "source": source, "first": "a", "second": "b", "how": how,
         "latent": latent, "partner": latent, "cosine": 0.9 if latent < share * N_LATENTS else 0.3}
        for source, share in {"rows": found_again, "noise": 0.05, "untrained": 0.0}.items()
        for how in ("matched", "greedy")
        for latent in range(N_LATENTS)
    ]  # fmt: skip
    correlations = [
        {"point": POINT, "first": "a", "second": "b", "latent": latent, "correlation": 0.8,
         "by_chance": 0.1}
        for latent in range(N_LATENTS)
    ]  # fmt: skip
    made = {
        "partners": partners, "correlations": correlations, **_passes(),
        "reads": [*_reads(few, refit)],
        "checks": [
            {"label": "mood", "owner": owner, "kind": kind, "n_clips": len(CLIPS), "otherwise": 0,
             "dealt": 0.5, "chance": 0.5}
            for owner, kind in _features("principal")
        ],
        **_factors(apart, factor_error),
    }  # fmt: skip
    run = CompareDictionaries.results(
        config, _inputs(), {k: pd.DataFrame(v) for k, v in made.items()}
    )
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def _inputs() -> dict[str, Any]:
    about = {"point": POINT, "architecture": "topk", "d_sae": N_LATENTS, "of_model": "toy",
             "noise": {}}  # fmt: skip
    return {
        "model": {"blocks": 3, "name": "toy"},
        "dictionaries": dict.fromkeys(NAMES, about),
        "labels": [{"column": "mood", "leaks": {}}],
        "clips": {clip: "" for clip, _ in CLIPS},
        "rows": 10 * len(CLIPS),
    }


def _passes() -> dict[str, list[dict[str, Any]]]:
    """Two passes over the same rows: error 2, 3 active latents and variance 20 a row."""
    clips = [
        {"dictionary": name, "clip": clip, "group": group, "rows": 10, "active": 30, "error": 20.0}
        for name in NAMES
        for clip, group in CLIPS
    ]
    quality = [
        {"point": POINT, "dictionary": name, "inference": "threshold", "n_rows": 10 * len(CLIPS),
         "variance": 20.0, "fvu": 0.1, "l0": 3.0, "cosine": 0.9, "l2_ratio": 1.0,
         "over_1_percent": 0.5, "dead_share": 0.0, "n_dead": 0}
        for name in NAMES
    ]  # fmt: skip
    held_out = [
        {"of": of, "clip": clip, "group": group, "fold": GROUPS.index(group),
         "value": "sad" if of and number % 2 else "happy" if of else ""}
        for of in ("mood", "")
        for number, (clip, group) in enumerate(CLIPS)
    ]  # fmt: skip
    copies = [{"dictionary": name, "difference": 2e-7} for name in NAMES]
    return {"clips": clips, "quality": quality, "held_out": held_out, "copies": copies}


def _features(of_rows: str) -> list[tuple[str, str]]:
    return [*((name, "codes") for name in NAMES), (POINT, "rows"), (POINT, of_rows)]


def _reads(few: float, refit: float) -> Any:
    for owner, kind in _features("principal"):
        width = N_LATENTS if kind == "codes" else WIDTH
        plain = {"kept": few if kind == "codes" else 0.6, "refit": refit, "frozen": 0.4}
        for how, ranked in product(plain, ("mean_difference", "random")):
            for k in [1, 2, 4, width] if how == "kept" else [0, 1, 2, 4]:
                value = (
                    plain[how] if ranked == "mean_difference" else 0.55 if how == "kept" else 0.95
                )
                value = 0.95 if k in (0, width) else value
                for number, group in enumerate(GROUPS):
                    yield {"label": "mood", "owner": owner, "kind": kind, "how": how,
                           "ranked": ranked, "k": k, "group": group, "n": 4,
                           "value": value + 0.005 * number}  # fmt: skip


def _factors(apart: float, error: float) -> dict[str, list[dict[str, Any]]]:
    kinds = [("factors", "itself"), *_features("rows")[:3], *((name, "rotated") for name in NAMES)]
    held = {"itself": 1.0, "codes": apart, "rows": 0.5, "rotated": 0.4}
    dci = [
        {"owner": owner, "kind": kind, "fold": fold, "n_codes": 2 if kind == "itself" else 30,
         "n_read": 2, **dict.fromkeys(
             ("disentanglement", "completeness"),
             held[kind] + (0.002 * fold if fold != WHOLE and kind == "codes" else 0.0))}
        for owner, kind in kinds
        for fold in (WHOLE, *range(len(GROUPS)))
    ]  # fmt: skip
    factors = [
        {"owner": owner, "kind": kind, "factor": factor, "r2": 1 - error, "r2_learnt": 0.9,
         "completeness": held[kind], "n_read": 1, "n_clips": len(CLIPS), "unfinished": 0}
        for owner, kind in kinds
        for factor in FACTORS
    ]  # fmt: skip
    errors = [
        {"owner": owner, "kind": kind, "factor": factor, "group": group, "n": 4,
         "value": error + 0.01 * number}
        for owner, kind in kinds
        for factor in FACTORS
        for number, group in enumerate(GROUPS)
    ]  # fmt: skip
    return {"dci": dci, "factors": factors, "factor_errors": errors}


def cases() -> ComparedResults:
    """Directions that are found again, and codes that are better than rows in every way."""
    return toy_results()


def _changed(table: str, column: str, value: Any, at: int = 0) -> Change:
    def change(run: ComparedResults) -> ComparedResults:
        run[table].loc[at, column] = value
        return run

    return change


BROKEN: dict[str, Change] = {
    "rows are read twice alike": _changed("clips", "error", 21.0),
    "every row of every clip is read": _changed("quality", "n_rows", 10 * len(CLIPS) - 1),
    "a shuffled, rescaled copy has the same directions": _changed("copies", "difference", 0.3),
    "no group is on both sides of a fold": _changed("held_out", "fold", 6),
    "all features are the whole probe": _changed("checks", "otherwise", 1),
    "labels that are dealt out are read at chance": _changed("checks", "dealt", np.float64(2.0)),
    "factors that are codes themselves are held apart": _changed("dci", "completeness", 0.9),
    "every Lasso comes to its end": _changed("factors", "unfinished", 1),
}
OTHER_WAY: dict[str, Change] = {
    "agree: a and b": lambda run: toy_results(found_again=0.1),
    **{f"few: mood off {name}": lambda run: toy_results(few=0.6) for name in NAMES},
    **{f"deleted: mood off {name}": lambda run: toy_results(refit=0.95) for name in NAMES},
    **{f"disentangled: {name}": lambda run: toy_results(apart=0.45) for name in NAMES},
    **{f"complete: {name}": lambda run: toy_results(factor_error=1.1) for name in NAMES},
}
