"""What a ``sae_train`` run controls and claims."""

from collections.abc import Sequence

import numpy as np

from ..materials.dictionary_partners import COPY_CONTROL, found_again
from ..workbench.claims import Claim, Finding, judged, shown
from ..workbench.controls import Control, Outcome, at_most
from ..workbench.intervals import unprefixed
from .tables import TrainedResults

MIN_GROUPS = 6
"""With fewer, not even a sign test in which all groups agree gives p < 0.05."""
SETTLED = 0.01
"""Largest share of k by which L0 may exceed it, for rounding."""


def _kept(run: TrainedResults) -> Outcome:
    words = run["words"]
    return at_most([*run["recovery"]["kl_kept"], *(words["ce_kept"] - words["ce_clean"])], 0.0,
                   "nats")  # fmt: skip


def _as_many_as_set(run: TrainedResults) -> Outcome:
    """In training topk and batchtopk have k a row; jumprelu aims at it, standard has none."""
    if run.config.architecture in ("jumprelu", "standard"):
        return at_most([], SETTLED)
    batch = run["quality"][run["quality"]["inference"] == "batch"]
    k = batch["point"].map({name: one["k"] for name, one in run.inputs["points"].items()})
    return at_most((batch["l0"] - k).clip(lower=0) / k, SETTLED, "of k")


def _finite(run: TrainedResults) -> Outcome:
    lost = int((~np.isfinite(run["training"]["fvu"])).sum())
    return Outcome(f"{lost} steps whose loss is not finite", "none", lost == 0)


CONTROLS = (
    Control(name="the loss stays finite", of=("training", "partners"), check=_finite,
            guards_against="a training that went astray"),
    COPY_CONTROL,
    Control(name="features that are left alone change no answer", of=("recovery", "words"),
            check=_kept,
            guards_against="rows that are taken apart and put together at other places"),
    Control(name="no more latents are active than were set", of=("quality",),
            check=_as_many_as_set,
            guards_against="a choice of latents that is not the one that was asked for"),
)  # fmt: skip


def _points(run: TrainedResults) -> Sequence[str]:
    return [*run.inputs["points"]]


def _recovers(run: TrainedResults, point: str) -> Finding | None:
    """The claim that reconstructions carry more of what the answer is made from than means do."""
    if run["recovery"].empty:
        return None
    row = run["recovered"].set_index("point").loc[point]
    n = int(row["n_groups"])
    gain = {**unprefixed("gain", row, ""), "n": n}
    return judged(
        f"Reconstructions of {point} carry what the answer is made from",
        f"With them the answer moves by {row['kl']:.3f} nats, with the rows' mean by "
        f"{row['kl_mean']:.3f}, with zeros by {row['kl_zero']:.3f}: {row['recovered']:.0%} of what "
        f"the mean loses is kept; mean − reconstruction {shown(gain, 3)} nats, {n} held-out groups",
        {
            f"only {n} held-out groups": n < MIN_GROUPS,
            "not surely more than the mean": not row["gain_low"] > 0,
        },
        numbers=gain,
        unit="nats",
        count="n",
    )


def _stable(run: TrainedResults, point: str) -> Finding | None:
    """The claim that two trainings find directions that noise does not have."""
    table = run["stability"]
    if table.empty:
        return None
    mine = table[(table["point"] == point) & (table["how"] == "matched")]
    return found_again(f"Two trainings on {point} find directions that noise does not have", mine)


CLAIMS = (
    Claim(name="stable {}", rests_on=("partners", "training"), judge=_stable, per=_points),
    Claim(name="recovers {}", rests_on=("recovery", "quality"), judge=_recovers, per=_points),
)
