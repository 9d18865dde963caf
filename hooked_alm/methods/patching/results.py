"""Results of a sweep: labelled axes, values per example, and what they are measured against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ...display import Summary
from ...errors import InputError
from ..result import MethodResult
from ..statistics.bootstrap import Interval, bootstrap_mean, recovery

Values = Float[np.ndarray, "..."]
Flags = Bool[np.ndarray, "..."]
N_LARGEST = 5
"""Cells that a result shows of itself."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PatchResult(MethodResult):
    """A metric in every cell of a sweep.

    ``values`` has the axes of ``axes`` in their order; ``base`` and ``donor`` have the last of
    them, from ``example`` on. Recovery is (patched − base)/(donor − base): 0 where the patch did
    nothing, 1 where it did everything.
    """

    axes: Mapping[str, tuple[Any, ...]]
    """Axis name -> its coordinates; ``example`` is the row of the batch, ``label`` comes last if
    the metric has several values."""
    values: Values
    base: Values
    """Metric of the unpatched runs."""
    donor: Values
    """Metric of the donor's runs; NaN where the donor is not a run."""
    site: str
    mode: str
    engine: str
    noise: Values | None = None
    """What rounding does to the metric, in its unit and with the axes of ``base``: the root mean
    square over cells in which nothing was changed. None where it is below notice, in fp32."""
    length_ratios: tuple[dict[str, float], ...] = ()
    """Ratios of each example: span -> donor length / base length, where spans were aligned."""

    @property
    def effect(self) -> Values:
        """Difference patched − base, in the metric's unit."""
        return self.values - self.base

    @property
    def total_effect(self) -> Values:
        """Difference donor − base, in the metric's unit."""
        return self.donor - self.base

    @property
    def recovery(self) -> Values:
        """Share of the total effect; NaN where that is below 1e-4, too small to divide by."""
        return recovery(self.values, self.base, self.donor)

    @property
    def n_undefined(self) -> int:
        """Examples (and labels) whose recovery is undefined."""
        return int(np.isnan(recovery(self.base, self.base, self.donor)).sum())

    def select(self, **coordinates: Any) -> "PatchResult":
        """The part at given coordinates, whose axes are dropped: ``select(layer=3, head=0)``.

        Raises:
            InputError: no such axis, or no such coordinate on it.
        """
        if "example" in coordinates or "label" in coordinates:
            raise InputError("selecting part of a result: index `values` for examples and labels.")
        index: list[Any] = [slice(None)] * self.values.ndim
        for name, coordinate in coordinates.items():
            if name not in self.axes or coordinate not in self.axes[name]:
                raise InputError(
                    f"selecting {name}={coordinate!r}: this result has "
                    + ", ".join(f"{axis} {list(ticks)}" for axis, ticks in self.axes.items())
                )
            index[list(self.axes).index(name)] = self.axes[name].index(coordinate)
        return PatchResult(
            axes={name: ticks for name, ticks in self.axes.items() if name not in coordinates},
            values=self.values[tuple(index)], base=self.base, donor=self.donor, site=self.site,
            mode=self.mode, engine=self.engine, noise=self.noise,
            length_ratios=self.length_ratios,
        )  # fmt: skip

    def contrast(self, gained: Sequence[str], lost: Sequence[str]) -> "PatchResult":
        """The score of one label minus that of another, a pair for each example; no axis ``label``.

        Its noise is that of two unrelated labels: as much as there can be.
        """
        examples = np.arange(len(self.base))
        first, second = (
            [self.axes["label"].index(name) for name in side] for side in (gained, lost)
        )

        def between(scores: Values) -> Values:
            return scores[..., examples, first] - scores[..., examples, second]

        return replace(
            self,
            axes={name: ticks for name, ticks in self.axes.items() if name != "label"},
            values=between(self.values), base=between(self.base), donor=between(self.donor),
            noise=None if self.noise is None else self.noise_between_labels,
        )  # fmt: skip

    @property
    def is_within_noise(self) -> Flags:
        """Whether a mean effect over examples could be rounding: at most twice its standard error.

        Axes are those of ``values`` without ``example``.
        """
        example = list(self.axes).index("example")
        means = np.abs(self.effect.mean(axis=example))
        if self.noise is None:
            return np.zeros(means.shape, bool)
        error = np.sqrt((self.noise**2).mean(axis=0) / len(self.noise))
        return means <= 2 * error

    @property
    def noise_between_labels(self) -> Float[np.ndarray, " example"]:
        """Noise of a difference of two labels ``[example]``, at most: as if they were unrelated.

        0 where the sweep has no noise worth stating.
        """
        if self.noise is None:
            return np.zeros(len(self.base))
        return np.sqrt(2 * (self.noise**2).mean(axis=-1))

    def mean(self, what: str = "effect", *, seed: int = 0, **options: Any) -> Interval:
        """Mean over examples with its bootstrap interval; axes as ``values``, without ``example``.

        Args:
            what: "effect", "recovery" (examples where it is undefined are left out and counted) or
                "values".
            seed: seed of the resampling.
            options: further options of ``bootstrap_mean``.
        """
        samples = np.moveaxis(getattr(self, what), list(self.axes).index("example"), 0)
        policy = "omit" if what == "recovery" else "raise"
        return bootstrap_mean(samples, seed=seed, **{"nan_policy": policy, **options})

    def _summary(self) -> Summary:
        means = self.effect.mean(axis=list(self.axes).index("example"))
        axes = {name: ticks for name, ticks in self.axes.items() if name != "example"}
        # Where there is no cell, as on a path against the stream, there is no number.
        n = min(N_LARGEST, np.isfinite(means).sum())
        largest = np.argsort(-np.abs(means), axis=None, kind="stable")[:n]
        cells = [*zip(*np.unravel_index(largest, means.shape), strict=True)]
        return Summary(
            title=f"{type(self).__name__}: {self.site}, {self.mode}, engine {self.engine}",
            facts=[
                ("axes", " × ".join(f"{len(ticks)} {name}" for name, ticks in self.axes.items())),
                ("metric", f"base {self.base.mean():.4g}, donor {self.donor.mean():.4g}"),
                *([] if self.noise is None else [("noise", self._noise_in_words())]),
                ("effect", f"mean over examples, the {len(cells)} largest cells:"),
            ],
            columns=(*axes, "effect"),
            rows=[
                (
                    *(str(_text(axes[name][i])) for name, i in zip(axes, at, strict=True)),
                    f"{means[at]:+.4g}",
                )
                for at in cells
            ],
        )

    def _noise_in_words(self) -> str:
        assert self.noise is not None
        within = self.is_within_noise
        return (
            f"{np.sqrt((self.noise**2).mean()):.2g} by rounding alone; {within.sum()} of "
            f"{within.size} mean effects are within twice their standard error"
        )

    def to_dataframe(self) -> Any:
        """A pandas frame, one row per cell, example and label."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [[_text(tick) for tick in ticks] for ticks in self.axes.values()], names=list(self.axes)
        )
        columns = {
            "value": self.values,
            "base": np.broadcast_to(self.base, self.values.shape),
            "donor": np.broadcast_to(self.donor, self.values.shape),
            "effect": self.effect,
            "recovery": self.recovery,
        }
        if self.noise is not None:
            columns["noise"] = np.broadcast_to(self.noise, self.values.shape)
        flat = {name: column.reshape(-1) for name, column in columns.items()}
        return pd.DataFrame(flat, index=index).reset_index()

    def plot(self, what: str = "effect", *, label: Any = None, ax: Any = None) -> Any:
        """Heat map of the mean over examples: first axis of the cells up, second to the right.

        A dot stands on what could be rounding (``is_within_noise``).

        Args:
            what: "effect", "recovery" or "values".
            label: coordinate of the metric's value to show, if it has several.
            ax: matplotlib axes to draw on; None makes a figure.

        Returns:
            The matplotlib axes.

        Raises:
            InputError: more than two axes have several coordinates; ``select`` first.
        """
        import matplotlib.pyplot as plt

        example = list(self.axes).index("example")
        values = np.nanmean(getattr(self, what), axis=example)
        axes = {name: ticks for name, ticks in self.axes.items() if name != "example"}
        within = self.is_within_noise
        if "label" in axes:
            ticks = axes.pop("label")
            at = ticks.index(ticks[0] if label is None else label)
            values, within = values[..., at], within[..., at]
        drawn = [name for name, ticks in axes.items() if len(ticks) > 1][:2] or list(axes)[:1]
        if any(len(ticks) > 1 for name, ticks in axes.items() if name not in drawn):
            raise InputError(
                "plotting a sweep: it has "
                + ", ".join(f"{len(ticks)} {name}s" for name, ticks in axes.items())
                + ". A heat map has two axes; use `select` first."
            )
        grid = values.reshape([len(axes[name]) for name in drawn])
        grid = grid[:, None] if grid.ndim == 1 else grid
        ax = plt.subplots(figsize=_figure_size(grid.shape))[1] if ax is None else ax
        limit = 1.0 if what == "recovery" else max(float(np.nanmax(np.abs(grid))), 1e-12)
        image = ax.imshow(
            grid, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto"
        )
        up, right = np.nonzero(within.reshape(grid.shape))
        if len(up):
            ax.plot(right, up, ".", color="0.4", markersize=2, label="within rounding")
        _ticks(ax.set_yticks, axes[drawn[0]])
        ax.set_ylabel(drawn[0])
        _ticks(ax.set_xticks, axes[drawn[1]] if len(drawn) > 1 else [""])
        ax.set_xlabel(drawn[1] if len(drawn) > 1 else "")
        ax.set_title(f"{self.site}: {what}, mean of {self.values.shape[example]}")
        ax.figure.colorbar(image, ax=ax, label=what)
        return ax


def _text(tick: Any) -> Any:
    """A coordinate as a table shows it: joint ones joined by a plus sign."""
    return " + ".join(map(str, tick)) if isinstance(tick, tuple) else tick


def _ticks(setter: Any, ticks: Sequence[Any]) -> None:
    step = -(-len(ticks) // 24)
    places = range(0, len(ticks), step)
    setter(list(places), [str(_text(ticks[place])) for place in places])


def _figure_size(shape: tuple[int, ...]) -> tuple[float, float]:
    return 2.5 + min(0.35 * shape[1], 8.0), 1.5 + min(0.3 * shape[0], 7.0)
