"""Random draws in memory that does not grow with the number of samples.

Draws are made row by row of one stream, so that cutting them into chunks changes none of them.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8

MOST_BYTES = 2**27
"""Memory for draws: 128 MiB for a chunk at work, and as much for counts that are kept."""
DRAWING_BYTES = 32
"""A drawn unit's share of a chunk: its index, its place in all counts, its counts twice."""
TOSSING_BYTES = 16
"""A tossed sign's share of a chunk: both orders before and after, and the sign."""


def chunks(n_rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Rows that fit into `MOST_BYTES` together, in order; at least one at a time."""
    n_fit = max(1, MOST_BYTES // max(1, bytes_per_row))
    return (slice(first, min(first + n_fit, n_rows)) for first in range(0, n_rows, n_fit))


def drawn_counts(
    seed: int | np.random.Generator, n_resamples: int, n_units: int
) -> Iterator[Float[np.ndarray, "resample unit"]]:
    """How often each unit is in each bootstrap resample, some resamples at a time.

    Counts of a seed are kept for the next call, if there is room: the curves of one table have the
    same units.

    Args:
        seed: seed of the draws, or a generator, which goes on from where it is.
        n_resamples: resamples, in all.
        n_units: units, each drawn as often as there are units.
    """
    if isinstance(seed, np.random.Generator) or n_resamples * n_units > MOST_BYTES:
        made = _count(np.random.default_rng(seed), n_resamples, n_units)
    else:
        kept = _kept(seed, n_resamples, n_units)
        made = (kept[rows] for rows in chunks(n_resamples, n_units * DRAWING_BYTES))
    return (counts.astype(np.float64) for counts in made)


@lru_cache(maxsize=1)
def _kept(seed: int, n_resamples: int, n_units: int) -> UInt8[np.ndarray, "resample unit"]:
    counts = np.empty((n_resamples, n_units), np.uint8)
    made = _count(np.random.default_rng(seed), n_resamples, n_units)
    for rows, part in zip(chunks(n_resamples, n_units * DRAWING_BYTES), made, strict=True):
        # Fewer than 256 units cannot exceed it; of more, none is drawn so often in a lifetime.
        assert part.max() < 256
        counts[rows] = part
    counts.setflags(write=False)
    return counts


def _count(rng: np.random.Generator, n_resamples: int, n_units: int) -> Iterator[np.ndarray]:
    for rows in chunks(n_resamples, n_units * DRAWING_BYTES):
        n = rows.stop - rows.start
        draws = rng.integers(0, n_units, (n, n_units))
        draws += n_units * np.arange(n)[:, None]
        yield np.bincount(draws.ravel(), minlength=n * n_units).reshape(n, n_units)


def drawn_signs(
    seed: int, n_resamples: int, n_samples: int
) -> Iterator[Float[np.ndarray, "resample sample"]]:
    """A coin toss for every sample's sign, ±1, some resamples at a time.

    They are those of ``scipy.stats.permutation_test`` with the same seed, and kept for the next
    call as `drawn_counts` are.
    """
    rows = list(chunks(n_resamples, n_samples * TOSSING_BYTES))
    if n_resamples * n_samples <= 8 * MOST_BYTES:
        kept = _kept_tosses(seed, n_resamples, n_samples)
        made: Iterator[np.ndarray] = (
            np.unpackbits(kept[some], axis=1, count=n_samples) for some in rows
        )
    else:
        made = _toss(seed, n_resamples, n_samples)
    return (1.0 - 2.0 * tosses for tosses in made)


@lru_cache(maxsize=1)
def _kept_tosses(seed: int, n_resamples: int, n_samples: int) -> UInt8[np.ndarray, "resample byte"]:
    packed = np.empty((n_resamples, -(-n_samples // 8)), np.uint8)
    made = _toss(seed, n_resamples, n_samples)
    for rows, tosses in zip(chunks(n_resamples, n_samples * TOSSING_BYTES), made, strict=True):
        packed[rows] = np.packbits(tosses, axis=1)
    packed.setflags(write=False)
    return packed


def _toss(seed: int, n_resamples: int, n_samples: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for rows in chunks(n_resamples, n_samples * TOSSING_BYTES):
        # A value and its negative, in either order.
        pairs = np.tile(np.arange(2, dtype=np.uint8), (rows.stop - rows.start, n_samples, 1))
        yield rng.permuted(pairs, axis=-1)[..., 0]
