"""Gradient scores, and how far they can be trusted: exact effects of a sample of cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from ...display import Summary
from ...errors import InputError
from ..patching.measurement import Measurement
from ..patching.options import Option
from ..patching.results import PatchResult
from ..result import MethodResult

Stratum = Literal["top", "random"]


class CheckOptions(TypedDict, total=False):
    """Options of every attribution."""

    check: Annotated[
        int,
        Option(
            0,
            "cells whose exact effect is measured besides: half of them those of the largest "
            "score, half drawn from the others.",
        ),
    ]
    seed: Annotated[int, Option(0, "of the drawing.")]
    rows_at_once: Annotated[
        int | None, Option(None, "rows of the batch whose graph is held at a time; None is all.")
    ]


Correlation = Literal["pearson", "spearman"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Checked(MethodResult):
    """Cells whose exact effect was measured, beside their scores."""

    coordinates: tuple[dict[str, Any], ...]
    """Place of every cell: axis -> coordinate."""
    strata: tuple[Stratum, ...]
    """Stratum of every cell: among the largest scores, or drawn from the others."""
    scores: Float[np.ndarray, "cell example *label"]
    exact: Float[np.ndarray, "cell example *label"]
    """Patched - base by the exact engine."""

    def correlation(
        self,
        kind: Correlation = "pearson",
        *,
        stratum: Stratum | None = None,
        of_means: bool = False,
    ) -> float:
        """Correlation of scores and exact effects; NaN if either is constant or cells are too few.

        Args:
            kind: "pearson" or "spearman".
            stratum: only the cells of one; cells of large scores alone flatter a method.
            of_means: correlate means over examples, which circuits are made of, not single values.
        """
        among = [i for i, one in enumerate(self.strata) if stratum in (None, one)]
        pair = [values[among] for values in (self.scores, self.exact)]
        ours, theirs = (np.ravel(v.mean(axis=1) if of_means else v) for v in pair)
        if len(ours) < 3 or np.ptp(ours) == 0 or np.ptp(theirs) == 0:
            return float("nan")
        measure = stats.pearsonr if kind == "pearson" else stats.spearmanr
        return float(measure(ours, theirs).statistic)

    @property
    def same_sign(self) -> float:
        """Share of values whose score and exact effect have one sign."""
        return float(np.mean(np.sign(self.scores) == np.sign(self.exact)))

    @property
    def worst(self) -> dict[str, Any]:
        """Row of ``columns`` in which score and exact effect differ most."""
        at = int(np.argmax(np.abs(self.scores - self.exact)))
        return {name: values[at] for name, values in self.columns().items()}

    def columns(self) -> dict[str, list[Any]]:
        """Columns by name, with a row per cell, example and label, for ``pandas.DataFrame``."""
        columns: dict[str, list[Any]] = {name: [] for name in self.coordinates[0]}
        columns |= {"stratum": [], "example": []}
        columns |= {"label": []} if self.scores.ndim == 3 else {}
        for i, example, *label in np.ndindex(self.scores.shape):
            for name, coordinate in self.coordinates[i].items():
                columns[name].append(coordinate)
            columns["stratum"].append(self.strata[i])
            columns["example"].append(example)
            if label:
                columns["label"].append(label[0])
        return columns | {
            "score": self.scores.ravel().tolist(),
            "exact": self.exact.ravel().tolist(),
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attribution(MethodResult):
    """Gradient scores of the cells of ``patch`` or ``path_patch``: their effects to first order."""

    scores: PatchResult
    """Scores on the axes of the exact sweep. ``effect`` is the score: what patching would change,
    approximately; ``values`` the base's metric plus that."""
    checked: Checked | None
    """Exact effects of a sample of cells; None if none were to be checked."""

    def _summary(self) -> Summary:
        shown, checked = self.scores._summary(), "no cells"
        if self.checked is not None:
            n = len(self.checked.coordinates)
            checked = f"{n} cells, Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f}"
        facts = [("exact values", checked), *shown.facts]
        return replace(shown, title=shown.title.replace("PatchResult", "Attribution"), facts=facts)

    @property
    def effect(self) -> Float[np.ndarray, "..."]:
        """The scores, in the metric's unit: positive where patching would raise it."""
        return self.scores.effect

    @property
    def pearson(self) -> float:
        """Correlation of all checked values with their exact effects; NaN without any."""
        return float("nan") if self.checked is None else self.checked.correlation()

    @property
    def spearman(self) -> float:
        """Rank correlation of all checked values with their exact effects; NaN without any."""
        return float("nan") if self.checked is None else self.checked.correlation("spearman")


def attribution(
    measured: Measurement,
    axes: dict[str, tuple[Any, ...]],
    scores: Float[Tensor, "cell batch label"],
    exact: Callable[[Sequence[int]], Tensor],
    *,
    engine: str,
    options: CheckOptions,
    **about: Any,
) -> Attribution:
    """Scores as a result, with the exact effects of some cells.

    Args:
        measured: runs of base and donor, and the metric.
        axes: axes of the cells, with their coordinates.
        scores: NaN where there is no such cell.
        exact: effects ``[cell, batch, *label]`` of the cells at some places of the product of axes.
        engine: how they were found.
        options: how many cells to check, and the seed of their drawing.
        about: see ``Measurement.result``.

    Raises:
        InputError: a negative number of cells.
    """
    check = options["check"]
    if check < 0:
        raise InputError(f"checking {check} cells: expected 0 or more.")
    base = measured.base_values.double().cpu()
    scores = (scores if base.ndim == 2 else scores[..., 0]).cpu()
    result = measured.result(axes, base + scores, **about)
    chosen, strata = _sample(scores.numpy(), check, options["seed"])
    checked = Checked(
        coordinates=tuple(_coordinates(axes, cell) for cell in chosen),
        strata=strata,
        scores=scores[chosen].numpy(),
        exact=exact(chosen).double().cpu().numpy(),
    ) if chosen else None  # fmt: skip
    return Attribution(scores=replace(result, engine=engine), checked=checked)


def _coordinates(axes: dict[str, tuple[Any, ...]], cell: int) -> dict[str, Any]:
    """Coordinates of a cell, by axis."""
    at = np.unravel_index(cell, [len(ticks) for ticks in axes.values()])
    return {name: ticks[i] for (name, ticks), i in zip(axes.items(), at, strict=True)}


def _sample(
    scores: Float[np.ndarray, "cell batch *label"], n: int, seed: int
) -> tuple[list[int], tuple[Stratum, ...]]:
    """Indices of cells, half of them the largest scores and half drawn from the others; strata."""
    if not n:  # there may be millions to sort
        return [], ()
    size = np.abs(scores).reshape(len(scores), -1).mean(axis=1)
    order = np.argsort(-size, kind="stable")
    order = order[~np.isnan(size[order])]
    n_top = min(-(-n // 2), len(order))
    rest = order[n_top:]
    n_drawn = min(n - n_top, len(rest))
    drawn = np.random.default_rng(seed).permutation(len(rest))[:n_drawn]
    top: list[Stratum] = ["top"]
    random: list[Stratum] = ["random"]
    chosen = [*order[:n_top].tolist(), *rest[drawn].tolist()]
    return chosen, tuple(top * n_top + random * n_drawn)


def score_table(n_cells: int, measured: Measurement) -> Float[Tensor, "cell batch label"]:
    """Zeros to add scores to; one label where the metric has no axis of them."""
    n_labels = measured.base_values.shape[1] if measured.base_values.ndim == 2 else 1
    shape = n_cells, len(measured.base), n_labels
    return measured.base_values.new_zeros(shape, dtype=torch.float64)
