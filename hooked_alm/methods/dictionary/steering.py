"""Latents that tell two kinds of rows apart, edits without them, and edits to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError
from .autoencoder import SparseAutoencoder
from .splice import RowEdit

Latents = Int[Tensor, " chosen"]


@dataclass(frozen=True, eq=False)
class Activity:
    """Mean activation of every latent over some rows, and how often it is active."""

    mean: Float[Tensor, " latent"]
    frequency: Float[Tensor, " latent"]
    """Share of rows."""
    rows: Float[Tensor, " d_in"]
    """Mean of the rows themselves."""
    n: int
    """Number of the rows."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, sae: SparseAutoencoder, batches: Sequence[Float[Tensor, "_row d_in"]]
    ) -> "Activity":
        """Over all rows of some batches.

        Raises:
            InputError: no rows.
        """
        n = sum(map(len, batches))
        if not n:
            raise InputError("averaging activations: got no rows, expected one or more.")
        total = torch.zeros(2, sae.cfg.d_sae, dtype=torch.float64)
        rows = torch.zeros(sae.cfg.d_in, dtype=torch.float64)
        for batch in batches:
            features = sae.encode(batch.to(sae.b_dec))
            total += torch.stack([features.sum(0), (features > 0).sum(0)]).double().cpu()
            rows += batch.double().sum(0).cpu()
        mean, frequency = (total / n).float()
        return cls(mean, frequency, (rows / n).float(), n)

    @classmethod
    def pooled(cls, parts: Sequence["Activity"]) -> "Activity":
        """Over all rows of some parts, each of which counts by the number of its rows.

        Raises:
            InputError: no parts.
        """
        if not parts:
            raise InputError("pooling activations: got none, expected those of some rows.")
        n = torch.tensor([part.n for part in parts], dtype=torch.float64)

        def mean(values: Sequence[Tensor]) -> Tensor:
            return (torch.stack([*values]).double() * n[:, None]).sum(0).div(n.sum()).float()

        return cls(
            mean([part.mean for part in parts]),
            mean([part.frequency for part in parts]),
            mean([part.rows for part in parts]),
            int(n.sum()),
        )


def differing(first: Activity, second: Activity, n: int) -> Latents:
    """The ``n`` latents whose mean is most above in the first: what tells it from the second.

    Source: AudioSAE (arXiv 2602.05027), the top 100 of non-speech minus speech; M-SAE-3.

    Raises:
        InputError: more than there are.
    """
    _check(n, len(first.mean))
    return (first.mean - second.mean).topk(n).indices


def most_frequent(activity: Activity, n: int) -> Latents:
    """The ``n`` latents that are active most often: a control that looks at no difference.

    Raises:
        InputError: more than there are.
    """
    _check(n, len(activity.mean))
    return activity.frequency.topk(n).indices


def as_active(chosen: Latents, activity: Activity, seed: int) -> Latents:
    """As many other latents that are about as active: each chosen one's neighbour in rank.

    Args:
        chosen: latents to match; none of them is among the found.
        activity: by whose means they are ranked.
        seed: decides between neighbours that are as near.

    Raises:
        InputError: fewer others than chosen ones.
    """
    taken = {*chosen.tolist()}
    if len(taken) > len(activity.mean) - len(taken):
        raise InputError(
            f"matching {len(taken)} latents: the dictionary has "
            f"{len(activity.mean) - len(taken)} others, expected as many. Choose fewer."
        )
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    found = []
    for latent in chosen[order].tolist():
        apart = (activity.mean - activity.mean[latent]).abs()
        apart[list(taken)] = torch.inf
        found.append(int(apart.argmin()))
        taken.add(found[-1])
    return torch.tensor(found)


def suppress(sae: SparseAutoencoder, latents: Latents, alpha: int | float) -> RowEdit:
    """The edit ``x - alpha * sum f_i W_dec[i]`` over some latents, what is left of x kept.

    0 changes nothing, 1 takes them out, more pushes against them.
    """
    return exchange(sae, latents, torch.zeros(sae.cfg.d_sae), alpha)


def exchange(
    sae: SparseAutoencoder,
    latents: Latents,
    features: Float[Tensor, "*row latent"],
    alpha: int | float = 1.0,
) -> RowEdit:
    """The edit ``x + alpha * sum (f'_i - f_i) W_dec[i]`` over some latents, the rest of x kept.

    Of no latents, and at 0, it changes nothing, bit by bit; of all of them, what the dictionary
    does not reconstruct of x is all that is left of it. Source: M-SP-5.

    Args:
        sae: the dictionary.
        latents: whose activations are exchanged.
        features: f', of every row, such as a donor's, or one for all, such as the mean of a kind.
        alpha: how far.
    """

    def edit(x: Tensor) -> Tensor:
        at = latents.to(x.device)
        change = features.to(x.device)[..., at] - sae.encode(x)[:, at]
        return x + alpha * (change @ sae.W_dec[at])

    return edit


def shift(direction: Float[Tensor, " d_in"], like: RowEdit) -> RowEdit:
    """The edit that moves every row along one direction, as far as another edit moves it.

    The dense control of steering: the difference of two kinds' means, without a dictionary.
    """
    return as_far(lambda x: x + direction.to(x), like)


def as_far(edit: RowEdit, like: RowEdit) -> RowEdit:
    """The edit that moves every row where one edit does, as far as another moves it.

    Rows that the first leaves alone stay.
    """

    def moved(x: Tensor) -> Tensor:
        size = (like(x) - x).norm(dim=-1, keepdim=True)
        return x + size * torch.nn.functional.normalize(edit(x) - x, dim=-1)

    return moved


def _check(n: int, n_latents: int) -> None:
    if not 1 <= n <= n_latents:
        raise InputError(
            f"choosing {n} latents: the dictionary has {n_latents}, expected 1 or more."
        )
