"""The depth at which a curve over depths turns: five definitions of ℓ*.

Axes: ``depth`` counts blocks passed (0 is the embedding, the last the model's output). Δ is the
score of the named emotion T minus that of the voice's emotion A, so positive means text-ward.

Source: seed 000, whose own definition is ``second_diff_abs``; M-000-7.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from ...errors import InputError

CriticalMethod = Literal[
    "second_diff_abs", "second_diff_pos", "half_rise", "resolve", "changepoint"
]
Curves = Float[np.ndarray, " curve depth"]
Depths = Float[np.ndarray, " curve"]


def critical_layers(
    curves: Curves, method: CriticalMethod, *, smooth: int = 1, exclude_last: bool = False
) -> Depths:
    """The depth ℓ* at which each curve of Δ turns, or NaN where it has no such depth.

    * ``second_diff_abs`` (the seed's): the inner depth with the largest |Δ[k+1] − 2Δ[k] + Δ[k−1]|,
      the first of equals. NaN for a straight line. Amplifies noise: its variance is 6σ² (C27).
    * ``second_diff_pos``: the same without the bars, so only a turn towards T counts.
    * ``half_rise``: the first depth where Δ rises through the midpoint of its minimum and its
      final value. NaN where the final value is the minimum; pass −Δ if the voice won.
    * ``resolve``: the first depth from which sign(Δ) is its final sign for good. NaN for a final 0.
    * ``changepoint``: the inner depth of the kink of the continuous two-piece line with the least
      squared error. NaN for a straight line.

    Args:
        curves: of Δ, depths 0..L.
        method: definition of ℓ*.
        smooth: odd width of a centred moving average taken first; it narrows towards the ends, so
            that a straight line stays one.
        exclude_last: leave out depth L, for a lens without the final norm: there the last state is
            on another scale than those before it, or (``hidden_states[-1]``) already normed.

    Raises:
        InputError: fewer than three depths, NaN or infinite values, or an even ``smooth``.
    """
    if exclude_last:
        curves = curves[:, :-1]
    if curves.shape[1] < 3 or not np.isfinite(curves).all() or smooth < 1 or smooth % 2 == 0:
        raise InputError(
            f"critical layer: got {curves.shape[1]} depths, {(~np.isfinite(curves)).sum()} of the "
            f"values NaN or infinite, smooth={smooth}; expected at least 3 depths, finite values "
            "and an odd window. Leave out the samples that could not be measured."
        )
    # Below this, a second difference or a residual is the rounding of a straight line.
    rounding = 16 * np.finfo(curves.dtype).eps * np.abs(curves).max(axis=1)
    curves = _smooth(curves.astype(np.float64), smooth)
    if method == "resolve":
        return resolve_depths(curves)
    if method == "half_rise":
        return _half_rise(curves)
    if method == "changepoint":
        return _changepoint(curves, rounding)
    bend = np.diff(curves, n=2, axis=1)
    if method == "second_diff_abs":
        bend = np.abs(bend)
    return np.where(bend.max(axis=1) <= rounding, np.nan, bend.argmax(axis=1) + 1.0)


def resolve_depths(curves: Curves) -> Depths:
    """Depth of every curve from which its sign is the final one for good; NaN for a final 0."""
    sign = np.sign(curves)
    return np.where(sign[:, -1] == 0, np.nan, settling_depths(sign == sign[:, -1:]))


def settling_depths(holds: Bool[np.ndarray, " curve depth"]) -> Depths:
    """The first depth of every curve from which something holds for good; NaN if not at the end.

    Of "the top token is the output's" this is the saturation depth (M-BT-2), of "the transcript is
    near the final one" the encoder's stabilisation (M-BT-3).
    """
    settled = np.logical_and.accumulate(holds[:, ::-1], axis=1).sum(axis=1)
    return np.where(settled == 0, np.nan, holds.shape[1] - settled)


def _smooth(curves: Curves, window: int) -> Curves:
    last, half = curves.shape[1] - 1, window // 2
    widths = [min(half, k, last - k) for k in range(last + 1)]
    means = [curves[:, k - w : k + w + 1].mean(axis=1) for k, w in enumerate(widths)]
    return curves if half == 0 else np.stack(means, axis=1)


def _half_rise(curves: Curves) -> Depths:
    middle = (curves.min(axis=1) + curves[:, -1])[:, None] / 2
    rises = (curves[:, :-1] < middle) & (curves[:, 1:] >= middle)
    return np.where(rises.any(axis=1), rises.argmax(axis=1) + 1.0, np.nan)


def _changepoint(curves: Curves, rounding: Depths) -> Depths:
    depth = np.arange(curves.shape[1], dtype=np.float64)
    line = np.stack([np.ones_like(depth), depth], axis=1)

    def error(design: np.ndarray) -> np.ndarray:
        basis = np.linalg.qr(design).Q
        return np.square(curves - curves @ basis @ basis.T).sum(axis=1)

    kinks = [np.column_stack([line, np.maximum(0, depth - k)]) for k in depth[1:-1]]
    errors = np.stack([error(design) for design in kinks], axis=1)
    straight = error(line) <= len(depth) * rounding**2
    return np.where(straight, np.nan, errors.argmin(axis=1) + 1.0)
