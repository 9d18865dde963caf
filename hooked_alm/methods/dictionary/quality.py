"""How well a dictionary reconstructs rows that it was not trained on, and how sparsely."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError
from .autoencoder import SparseAutoencoder, check_rows
from .reconstruction import reconstructed

Inference = Literal["threshold", "batch"]
"""``threshold``: as in use. ``batch``: as in training, the largest of a whole batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionaryQuality:
    """Figures of a dictionary over some rows; norms are means over rows."""

    n_rows: int
    variance: float
    """Mean squared distance of a row from their mean."""
    fvu: float
    """Fraction of variance unexplained."""
    explained_variance: float
    """Its complement."""
    cosine: float
    """Of a row and its reconstruction."""
    l2_ratio: float
    """Length of the reconstruction over the row's."""
    relative_bias: float
    """``E|x'|^2 / E[x . x']``: 1 if reconstructions are not shrunk (Rajamanoharan et al. 2024)."""
    l0: float
    """Active latents a row."""
    dead_share: float
    """Share of the latents that no row activates."""
    over_1_percent: float
    """Share of the latents that are active in more than 1 % of the rows."""
    over_10_percent: float


class QualityCounts:
    """Sums over rows, batch by batch, in float64."""

    def __init__(self, sae: SparseAutoencoder, inference: Inference = "threshold") -> None:
        """Begin without rows.

        Raises:
            InputError: a dictionary without a threshold, where one is needed.
        """
        if inference == "threshold":
            sae.check_threshold()
        self.sae, self.inference = sae, inference
        self.active: Int[Tensor, " latent"] = torch.zeros(sae.cfg.d_sae, dtype=torch.long)
        """Rows that activate each latent."""
        self._n = 0
        self._sums = torch.zeros(6, dtype=torch.float64)
        self._sum_x = torch.zeros(sae.cfg.d_in, dtype=torch.float64)

    @torch.no_grad()
    def add(self, rows: Float[Tensor, "row d_in"]) -> None:
        """Count a batch.

        Raises:
            InputError: rows of another width, or not finite.
        """
        sae = self.sae
        check_rows("judging a dictionary", sae.cfg, rows)
        x = rows.to(sae.b_dec)
        if self.inference == "batch":
            made = reconstructed(sae, x)
            features, y = made.active.dense(made.value), made.rows[-1]
        else:
            features = sae.encode(x)
            y = sae.decode(features)
        x, y, is_on = x.double(), y.double(), features > 0
        xx, yy, xy = x.square().sum(-1), y.square().sum(-1), (x * y).sum(-1)
        sizes = (xx * yy).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        ratio = yy.sqrt() / xx.sqrt().clamp_min(torch.finfo(x.dtype).tiny)
        found = ((x - y).square(), xx, yy, xy, xy / sizes, ratio)
        self._sums += torch.stack([one.sum() for one in found]).cpu()
        self._sum_x += x.sum(0).cpu()
        self.active += is_on.sum(0).cpu()
        self._n += len(x)

    def quality(self) -> DictionaryQuality:
        """The figures over all rows so far.

        Raises:
            InputError: there were none.
        """
        if not self._n:
            raise InputError("judging a dictionary: got no rows, expected one or more.")
        n, (error, xx, yy, xy, cosine, ratio) = self._n, self._sums.tolist()
        spread = xx - float(self._sum_x.square().sum()) / n
        fvu = error / spread if spread > 0 else float("nan")
        frequency = self.active.double() / n
        return DictionaryQuality(
            n_rows=n,
            variance=spread / n,
            fvu=fvu,
            explained_variance=1 - fvu,
            cosine=cosine / n,
            l2_ratio=ratio / n,
            relative_bias=yy / xy if xy else float("nan"),
            l0=float(frequency.sum()),
            dead_share=float((self.active == 0).double().mean()),
            over_1_percent=float((frequency > 0.01).double().mean()),
            over_10_percent=float((frequency > 0.1).double().mean()),
        )
