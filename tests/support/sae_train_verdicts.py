"""Hand-made results of ``sae_train``: latents that are found again, and answers that stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.experiments.sae_train.experiment import TrainDictionaries
from hooked_alm.experiments.sae_train.settings import SAETrainConfig
from hooked_alm.experiments.sae_train.tables import TrainedResults, summarise

Change = Callable[[TrainedResults], TrainedResults]
POINT = "blocks.1.hook_resid_post"
INPUTS = {
    "model": {"blocks": 3},
    "points": {POINT: {"d_in": 6, "d_sae": 48, "k": 2}},
    "rows": {"learnt": 500, "held out": 100},
    "held_out_groups": ["a", "b"],
}


def toy_results(
    found_again: float = 0.75, kl: float = 0.1, n_groups: int = 7, **settings: Any
) -> TrainedResults:
    """Two dictionaries of one point, of whose latents a share has a partner."""
    config = SAETrainConfig(n_resamples=1000, **settings)
    partners = [
        {"point": POINT, "source": source, "first": 0, "second": 1, "how": how, "latent": latent,
         "cosine": 0.9 if latent < share * 48 else 0.3}
        for source, share in {"rows": found_again, "noise": 0.04, "untrained": 0.0}.items()
        if config.noise or source != "noise"
        for how in ("matched", "greedy")
        for latent in range(48)
    ]  # fmt: skip
    recovery = [
        {"clip": f"c{group}-{i}", "group": f"g{group}", "point": POINT, "seed": seed,
         "kl": kl * (1 + 0.01 * group), "kl_mean": 0.5 + 0.01 * group, "kl_zero": 0.8,
         "kl_kept": 0.0}
        for group in range(n_groups)
        for i in range(2)
        for seed in (0, 1)
    ]  # fmt: skip
    words = [
        {"clip": f"c{group}", "group": f"g{group}", "point": POINT, "seed": 0, "n_tokens": 5,
         "ce": 1.2, "ce_clean": 1.0, "ce_mean": 3.0, "ce_zero": 5.0, "ce_kept": 1.0}
        for group in range(n_groups)
    ]  # fmt: skip
    quality = [
        {"point": POINT, "seed": seed, "inference": inference, "fvu": 0.1, "l0": 2.0}
        for seed in (0, 1)
        for inference in ("threshold", "batch")
    ]
    training = [
        {"point": POINT, "source": source, "seed": seed, "step": step, "rows": 64 * step,
         "fvu": 0.5, "l0": 2.0, "dead": 0.0, "never_positive": 0.0, "threshold": 1.0}
        for source in ("rows", "noise")
        for seed in (0, 1)
        for step in range(3)
    ]  # fmt: skip
    copies = [{"point": POINT, "seed": seed, "difference": 2e-7} for seed in (0, 1)]
    tables = {
        "partners": partners,
        "copies": copies,
        "recovery": recovery,
        "words": words,
        "quality": quality,
        "training": training,
    }
    made = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    run = TrainDictionaries.results(config, INPUTS, made)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> TrainedResults:
    """Directions that are found again, and reconstructions that keep the answer."""
    return toy_results()


def _changes_answers(run: TrainedResults) -> TrainedResults:
    run["recovery"].loc[3, "kl_kept"] = 1e-9
    return run


def _too_many_active(run: TrainedResults) -> TrainedResults:
    run["quality"]["l0"] = np.where(run["quality"]["inference"] == "batch", 2.1, 2.0)
    return run


def _astray(run: TrainedResults) -> TrainedResults:
    run["training"].loc[2, "fvu"] = np.nan
    return run


def _loses_partners(run: TrainedResults) -> TrainedResults:
    run["copies"]["difference"] = 0.3
    return run


BROKEN: dict[str, Change] = {
    "the loss stays finite": _astray,
    "a shuffled, rescaled copy has the same directions": _loses_partners,
    "features that are left alone change no answer": _changes_answers,
    "no more latents are active than were set": _too_many_active,
}
OTHER_WAY: dict[str, Change] = {
    f"stable {POINT}": lambda run: toy_results(found_again=0.1),
    f"recovers {POINT}": lambda run: toy_results(kl=0.6),
}
