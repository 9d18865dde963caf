"""Which latents are active in which rows, and the products of a dictionary with them alone.

Of the ``d_sae`` latents a few dozen are active in a row, so that all but the encoder's own product
is a product with a sparse matrix, and so is every gradient of a weight. The dense forms are the
same numbers at two to three times the cost.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Active:
    """Pairs of a row and a latent, in the order of the rows; each pair once."""

    row: Int[Tensor, " active"]
    latent: Int[Tensor, " active"]
    n_rows: int
    n_latents: int

    @cached_property
    def row_starts(self) -> Int[Tensor, " row_and_end"]:
        """Where the pairs of each row begin, and the end."""
        return _starts(self.row, self.n_rows)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order of the pairs by latent, where each latent's begin in it, and their rows."""
        order = self.latent.argsort(stable=True)
        return order, _starts(self.latent, self.n_latents), self.row[order]

    def part(self, first: int, stop: int) -> "tuple[Active, Tensor]":
        """The pairs of the latents from ``first`` to ``stop``, and their numbers."""
        kept = ((self.latent >= first) & (self.latent < stop)).nonzero().flatten()
        return Active(self.row[kept], self.latent[kept], self.n_rows, self.n_latents), kept

    def dense(self, value: Float[Tensor, " active"]) -> Float[Tensor, "row latent"]:
        """Values of the pairs with zeros between them."""
        return value.new_zeros(self.n_rows, self.n_latents).index_put(
            (self.row, self.latent), value
        )

    def by_latents(
        self, value: Float[Tensor, " active"], rows: Float[Tensor, "row d"]
    ) -> Float[Tensor, "latent d"]:
        """Each latent's sum of rows, weighted with the values of its pairs."""
        order, starts, row = self.by_latent
        return _sparse(starts, row, value[order], self.n_rows) @ rows

    def by_rows(
        self, value: Float[Tensor, " active"], weight: Float[Tensor, "latent d"]
    ) -> Float[Tensor, "row d"]:
        """Each row's sum of the latents' vectors, weighted with the values of its pairs."""
        return F.embedding_bag(
            self.latent,
            weight,
            self.row_starts,
            mode="sum",
            per_sample_weights=value,
            include_last_offset=True,
        )

    def products(
        self, rows: Float[Tensor, "row d"], weight: Float[Tensor, "latent d"]
    ) -> Float[Tensor, " active"]:
        """The inner product of every pair's row with its latent's vector."""
        nothing = rows.new_zeros(len(self.row))
        pairs = _sparse(self.row_starts, self.latent, nothing, self.n_latents)
        return torch.sparse.sampled_addmm(pairs, rows, weight.T, beta=0.0).values()


def _sparse(starts: Tensor, column: Tensor, value: Tensor, n_columns: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        size = (len(starts) - 1, n_columns)
        return torch.sparse_csr_tensor(starts, column, value, size, check_invariants=False)


def _starts(number: Int[Tensor, " active"], n: int) -> Int[Tensor, " n_and_end"]:
    counts = torch.bincount(number, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class _Encoded(torch.autograd.Function):
    """Pre-activations of the active pairs alone; see ``encoded``."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, active: Active
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.active = active
        return pre[active.row, active.latent]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), active = grads, ctx.active
        rows, weight = ctx.saved_tensors
        of_bias = grad.new_zeros(active.n_latents).index_add_(0, active.latent, grad)
        of_rows = active.by_rows(grad, weight) if ctx.needs_input_grad[1] else None
        return None, of_rows, active.by_latents(grad, rows), of_bias, None


def encoded(
    pre: Float[Tensor, "row latent"],
    rows: Float[Tensor, "row d_in"],
    weight: Float[Tensor, "latent d_in"],
    bias: Float[Tensor, " latent"],
    active: Active,
) -> Float[Tensor, " active"]:
    """``rows @ weight.T + bias`` at the active pairs, where ``pre`` has it without a gradient."""
    return _Encoded.apply(pre, rows, weight, bias, active)  # type: ignore[no-untyped-call]


class _Decoded(torch.autograd.Function):
    """Reconstructions; see ``decoded``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, active: Active) -> Tensor:
        ctx.save_for_backward(value, weight)
        ctx.active = active
        return active.by_rows(value, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), active = grads, ctx.active
        value, weight = ctx.saved_tensors
        return active.products(grad, weight), active.by_latents(value, grad), None


def decoded(
    value: Float[Tensor, " active"], weight: Float[Tensor, "latent d_in"], active: Active
) -> Float[Tensor, "row d_in"]:
    """Each row's sum of the directions of its active latents, times their values."""
    return _Decoded.apply(value, weight, active)  # type: ignore[no-untyped-call]


# --- Which are active


def top_k(pre: Float[Tensor, "row latent"], k: int) -> Active:
    """The ``k`` largest of each row."""
    latent = pre.topk(k, dim=-1, sorted=False).indices
    row = torch.arange(len(pre), device=pre.device).repeat_interleave(k)
    return Active(row, latent.flatten(), *pre.shape)


def batch_top_k(pre: Float[Tensor, "row latent"], k: int, *, above: float = 0.0) -> Active:
    """The ``k * n_rows`` largest of all rows together; fewer, if fewer are positive.

    Source: Bussmann et al. 2024 (arXiv 2412.06410), eq. 2-3.

    Args:
        pre: pre-activations.
        k: mean number a row.
        above: a guess of what the smallest of them lies above, which makes no difference to the
            result: only what lies above it is sorted, unless that is not enough.
    """
    flat, n = pre.flatten(), k * len(pre)
    places = (flat > above).nonzero().flatten()
    if len(places) < n and above > 0:
        places = (flat > 0).nonzero().flatten()
    if len(places) > n:
        kept = flat[places].topk(n, sorted=False).indices
        places = places[kept].sort().values
    row = places.div(pre.shape[1], rounding_mode="floor")
    return Active(row, places - row * pre.shape[1], *pre.shape)


def above_threshold(
    pre: Float[Tensor, "row latent"], threshold: Float[Tensor, " latent"]
) -> Active:
    """All that are larger than their latent's threshold."""
    row, latent = (pre > threshold).nonzero().unbind(1)
    return Active(row, latent, *pre.shape)
