"""Running mean and standard deviation, for sets of samples too large to hold."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from ...errors import InputError


@dataclass(slots=True, eq=False)
class Moments:
    """Running mean and standard deviation of whatever arrives, in float64 (Welford, Chan).

    ``update`` takes batches, ``merge`` joins two partial runs; any batching of the same samples
    gives the same moments up to float64 rounding.

    Source: Chan, Golub and LeVeque 1983, equation 1.5; docs/methods.md, S-9.
    """

    n: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(()))
    m2: np.ndarray = field(default_factory=lambda: np.zeros(()))
    """Sum of squared deviations from the mean."""

    def update(self, batch: Float[np.ndarray, " sample *value"]) -> None:
        """Take in a batch of samples.

        Raises:
            InputError: the batch holds NaN or infinite values, or its samples another shape.
        """
        if len(batch):
            batch = batch.astype(np.float64)
            if not np.isfinite(batch).all():
                raise InputError(
                    f"updating moments: got {(~np.isfinite(batch)).sum()} NaN or infinite values "
                    f"in a batch of shape {batch.shape}, expected finite ones. Drop those samples."
                )
            mean = batch.mean(axis=0)
            m2 = np.square(batch - mean).sum(axis=0)
            merged = self.merge(Moments(len(batch), np.asarray(mean), np.asarray(m2)))
            self.n, self.mean, self.m2 = merged.n, merged.mean, merged.m2

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both together.

        Raises:
            InputError: the two are of samples of different shapes.
        """
        if not self.n or not other.n:
            some = other if other.n else self
            return Moments(some.n, some.mean, some.m2)
        if self.mean.shape != other.mean.shape:
            raise InputError(
                f"merging moments: got samples of shape {other.mean.shape}, expected "
                f"{self.mean.shape}. Keep one Moments per kind of sample."
            )
        n = self.n + other.n
        delta = other.mean - self.mean
        return Moments(
            n,
            np.asarray(self.mean + delta * (other.n / n)),
            np.asarray(self.m2 + other.m2 + np.square(delta) * (self.n * other.n / n)),
        )

    def std(self, *, ddof: int) -> np.ndarray:
        """Standard deviation √(M2/(n−ddof)); NaN where n ≤ ddof."""
        variance = self.m2 / (self.n - ddof) if self.n > ddof else self.m2 * np.nan
        return np.asarray(np.sqrt(variance))
