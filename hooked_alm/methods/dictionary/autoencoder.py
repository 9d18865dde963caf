"""A sparse autoencoder, as it is used: rows -> features -> rows."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError

Architecture = Literal["topk", "batchtopk", "jumprelu", "matryoshka", "standard"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DictionaryConfig:
    """Shape of a dictionary, and which of its latents are active.

    Raises:
        InputError: sizes that cannot be.
    """

    d_in: int
    """Width of a row."""
    d_sae: int
    """Number of latents."""
    architecture: Architecture
    """``topk``: the k largest of each row. ``batchtopk``: in training the largest of all rows of a
    batch, k a row on average; in use all above one threshold. ``jumprelu``: all above a threshold
    of the latent's own. ``matryoshka``: as batchtopk, and every prefix of the dictionary
    reconstructs on its own. ``standard``: all that are positive, which an L1 penalty keeps few."""
    k: int | None
    """Active latents a row: all, on average, or aimed at. None is unknown, of a dictionary that is
    only used and has thresholds, or of standard, which sets none."""
    prefixes: tuple[int, ...] = ()
    """Of matryoshka: numbers of latents that reconstruct on their own, ascending; the last is all
    of them."""

    def __post_init__(self) -> None:
        """Refuse what no training could mean."""
        doing, faults = "making a sparse autoencoder", []
        if self.d_in < 1 or self.d_sae < 1:
            faults.append(f"d_in={self.d_in} and d_sae={self.d_sae}, expected 1 or more")
        if self.architecture == "standard":
            if self.k is not None:
                faults.append(f"k={self.k} of standard, which sets no number of active latents")
        elif not (self.k is None and self.has_threshold) and not 1 <= (self.k or 0) <= self.d_sae:
            faults.append(f"k={self.k}, expected 1 to d_sae={self.d_sae}")
        prefixes = self.prefixes
        if self.architecture == "matryoshka":
            ascend = [*prefixes] == sorted({*prefixes}) and prefixes and prefixes[0] > 0
            if not ascend or prefixes[-1] != self.d_sae:
                faults.append(f"prefixes {[*prefixes]}, expected them to ascend to {self.d_sae}")
        elif prefixes:
            faults.append(f"prefixes {[*prefixes]} of {self.architecture}, which has none")
        if faults:
            raise InputError(f"{doing}: got {'; '.join(faults)}. Change these settings.")

    @property
    def has_threshold(self) -> bool:
        """Whether a threshold decides in use what is active."""
        return self.architecture not in ("topk", "standard")

    @property
    def n_active(self) -> int:
        """``k``, where it has to be known.

        Raises:
            InputError: it is not.
        """
        if self.k is None:
            raise InputError(
                f"choosing the latents of a {self.architecture} dictionary as in training: got no "
                "k, expected the number of active latents a row. Use it by its thresholds."
            )
        return self.k


class SparseAutoencoder(nn.Module):
    """A dictionary over rows of width ``d_in``.

    ``features = activation((x - b_dec) W_enc + b_enc)``, ``x' = features W_dec + b_dec``. Weights
    are kept with a latent to a row, ``[latent, d_in]`` both; ``W_enc`` is a view in the shape that
    SAELens has.
    """

    def __init__(self, cfg: DictionaryConfig) -> None:
        """All weights zero, and no threshold yet; see ``initialised``."""
        super().__init__()
        self.cfg = cfg
        self.encoder = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        self.threshold = nn.Parameter(torch.full((cfg.d_sae,), torch.nan))
        """``[latent]``; NaN until training has found one, and always of topk and standard."""
        self.requires_grad_(False)

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:
        """The encoder in SAELens' shape, a view."""
        return self.encoder.T

    @classmethod
    def initialised(
        cls, cfg: DictionaryConfig, rows: Float[Tensor, "row d_in"], seed: int
    ) -> "SparseAutoencoder":
        """A dictionary to train: random directions, the encoder tied to them, centred on rows.

        Args:
            cfg: its shape.
            rows: of which ``b_dec`` is the geometric median.
            seed: of the directions.

        Raises:
            InputError: rows of another width, or none.
        """
        check_rows("initialising a dictionary", cfg, rows)
        found, generator = cls(cfg), torch.Generator().manual_seed(seed)
        directions = torch.randn(cfg.d_sae, cfg.d_in, generator=generator)
        found.W_dec.copy_(F.normalize(directions, dim=-1))
        found.encoder.copy_(found.W_dec)
        found = found.to(rows.device)
        found.b_dec.copy_(geometric_median(rows.float()))
        return found

    def pre(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows latent"]:
        """Pre-activations."""
        return F.linear(x - self.b_dec, self.encoder, self.b_enc)

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows latent"]:
        """Features: zero, or the pre-activation of a latent that is active.

        Raises:
            InputError: the dictionary needs a threshold and has none.
        """
        pre = self.pre(x)
        if self.cfg.has_threshold:
            self.check_threshold()
            return pre * (pre > self.threshold)
        if self.cfg.architecture == "standard":
            return pre.relu()
        kept = pre.topk(self.cfg.n_active, dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept).relu())

    def decode(self, features: Float[Tensor, "*rows latent"]) -> Float[Tensor, "*rows d_in"]:
        """Rows that features stand for."""
        return F.linear(features, self.W_dec.T, self.b_dec)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        """Reconstructions of rows."""
        return self.decode(self.encode(x))

    def check_threshold(self) -> None:
        """Refuse a dictionary whose threshold was never found.

        Another tool would read such a threshold as one under which everything is active.

        Raises:
            InputError: it is so.
        """
        if self.cfg.has_threshold and not bool((self.threshold >= 0).all()):
            raise InputError(
                f"using a {self.cfg.architecture} dictionary: got a threshold that is negative or "
                "was never found, expected one of 0 or more for each latent. Train it for a step "
                "at least; of an `ae.pt` that dictionary_learning wrote before its first update, "
                "train it longer."
            )

    def scaled(self, factor: float) -> "SparseAutoencoder":
        """The same dictionary for rows that are ``factor`` times as large.

        Directions are left as they are, so that features grow with the rows.
        """
        found = SparseAutoencoder(self.cfg).to(self.b_dec.device)
        found.encoder.copy_(self.encoder)
        found.W_dec.copy_(self.W_dec)
        for name in ("b_enc", "b_dec", "threshold"):
            getattr(found, name).copy_(getattr(self, name) * factor)
        return found


def check_rows(doing: str, cfg: DictionaryConfig, rows: Tensor) -> None:
    """Refuse rows that a dictionary cannot take.

    Raises:
        InputError: another width, no rows, or values that are not finite.
    """
    if rows.ndim != 2 or rows.shape[1] != cfg.d_in or not len(rows):
        raise InputError(
            f"{doing}: got rows {list(rows.shape)}, expected one or more of width {cfg.d_in}."
        )
    if not bool(torch.stack(torch.aminmax(rows)).isfinite().all()):
        raise InputError(
            f"{doing}: got rows that are not finite, expected numbers. Run the model in a wider "
            "dtype, or leave out the clips that give them."
        )


def geometric_median(
    rows: Float[Tensor, "row d_in"], *, n_steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d_in"]:
    """The point with the smallest sum of distances to the rows, by Weiszfeld's iteration.

    Args:
        rows: at least one.
        n_steps: at most so many iterations.
        tolerance: of a step, relative to the spread of the rows, under which it ends.
    """
    centre = rows.mean(0)
    spread = (rows - centre).norm(dim=-1).mean()
    for _ in range(n_steps):
        weight = 1 / (rows - centre).norm(dim=-1).clamp_min(1e-12)
        moved = (weight[:, None] * rows).sum(0) / weight.sum()
        is_still = bool((moved - centre).norm() <= tolerance * spread)
        centre = moved
        if is_still:
            break
    return centre
