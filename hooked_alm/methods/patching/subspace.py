"""Distributed alignment search: the directions of the stream that carry an answer.

``exchange_subspace`` writes a donor's part in some directions into a base's residual stream, at one
depth and place: ``h + RᵀR (h_donor − h)``, the rows of R orthonormal. ``align_subspace`` trains R
so that the base then gives the donor's answers. The model stays as it is.

A trained subspace fits the pairs that it was trained on: judge it by its exchange on others, and
against directions that were drawn at random. With all directions it is the patch of the whole row.

Source: Geiger et al. 2024 ("Finding alignments between interpretable causal variables and
distributed neural representations"), with ``torch.nn.utils.parametrizations.orthogonal``; M-DAS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from .alignment import AlignPolicies, Place
from .placement import Placement

Directions = Float[Tensor, "direction d_model"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subspace:
    """Directions of the residual stream, and how they were found."""

    directions: Directions
    """Orthonormal rows, in fp32."""
    losses: tuple[float, ...]
    """Mean cross-entropy of the donors' answers before every step, in nats."""


class _Rows(NamedTuple):
    """The stream of a batch at one depth, and what a place of its donors holds."""

    resid: Float[Tensor, "batch pos d_model"]
    rows: Int[Tensor, " spot"]
    """Row of the batch of every position of the place; ``positions``, where in its prompt."""
    positions: Int[Tensor, " spot"]
    difference: Float[Tensor, "spot d_model"]
    """Donor minus base, in fp32."""


def random_directions(n: int, d_model: int, seed: int = 0) -> Directions:
    """Orthonormal rows that are drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d_model, n, generator=generator))[0].T.contiguous()


def align_subspace(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    answers: Sequence[int],
    *,
    depth: int,
    n_directions: int,
    place: Place = "readout",
    n_steps: int = 200,
    rate: float = 0.02,
    seed: int = 0,
    policy: AlignPolicies = "error",
) -> Subspace:
    """Directions whose exchange gives the donors' answers, trained on pairs of prompts.

    The loss is the cross-entropy of the answers at the readout; Adam moves a rotation that stays
    orthogonal, from one that is drawn at random. Only the blocks above are run in every step.

    Args:
        model: to run; its weights and their gradients are left alone.
        base: prompts to write into.
        donor: as many prompts, whose part is written.
        answers: token that each donor calls for.
        depth: of the stream, 0 to L.
        n_directions: rows of R.
        place: where they are exchanged; one of what ``patch`` takes as ``places``.
        n_steps: of Adam; 0 gives the directions that it begins with.
        rate: learning rate.
        seed: of the first rotation.
        policy: for places of unequal length; see ``align``.

    Raises:
        InputError: another number of answers than of prompts, a depth or a number of directions
            that there is not, or places that do not align.
    """
    d_model = model.cfg.d_model
    if len(answers) != len(base):
        raise InputError(
            f"aligning a subspace: got {len(answers)} answers for {len(base)} prompts. Give the "
            "token that each donor calls for."
        )
    if not 1 <= n_directions <= d_model:
        raise InputError(
            f"aligning a subspace: got n_directions={n_directions}, expected 1 to {d_model}."
        )
    stream = _stream(model, base, donor, depth, place, policy)
    target = torch.as_tensor(answers, device=stream.resid.device)
    rotation = nn.Linear(d_model, n_directions, bias=False)
    parametrizations.orthogonal(rotation)
    rotation.weight = random_directions(n_directions, d_model, seed)
    rotation.to(stream.resid.device)
    free = [*rotation.parameters()]
    adam, losses = torch.optim.Adam(free, rate), []
    with torch.enable_grad():
        for _ in range(n_steps):
            logits = _exchanged(model, base, stream, depth, rotation.weight)
            loss = F.cross_entropy(logits.float(), target)
            losses.append(float(loss.detach()))
            # Of the rotation alone: the model's own parameters get no gradient.
            for parameter, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
                parameter.grad = gradient
            adam.step()
    return Subspace(directions=rotation.weight.detach().clone(), losses=tuple(losses))


@torch.no_grad()
def exchange_subspace(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    directions: Directions,
    *,
    depth: int,
    place: Place = "readout",
    policy: AlignPolicies = "error",
) -> Float[Tensor, "batch vocab"]:
    """Logits at the readout, with the donor's part in some directions in place of the base's.

    Args:
        model: to run.
        base: prompts to write into.
        donor: as many prompts.
        directions: orthonormal rows, of ``align_subspace`` or of one's own.
        depth: of the stream, 0 to L.
        place: where they are exchanged; one of what ``patch`` takes as ``places``.
        policy: for places of unequal length; see ``align``.

    Raises:
        InputError: a depth that there is not, or places that do not align.
    """
    stream = _stream(model, base, donor, depth, place, policy)
    return _exchanged(model, base, stream, depth, directions.to(stream.resid.device))


@torch.no_grad()
def _stream(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    depth: int,
    place: Place,
    policy: AlignPolicies,
) -> _Rows:
    if not 0 <= depth <= len(model.path):
        raise InputError(
            f"exchanging a subspace at depth {depth}: the model has depths 0 to {len(model.path)}."
        )
    spots = Placement(model, base, donor, [place], policy).spots
    every = np.arange(len(spots.cells))
    ours, theirs = (model(x, stop_at_layer=depth) for x in (base, donor))
    difference = spots.of_donor(theirs, every).float() - spots.of_base(ours, every).float()
    rows, positions = (
        torch.from_numpy(one).to(ours.device) for one in (spots.rows, spots.positions)
    )
    return _Rows(ours, rows, positions, difference)


def _exchanged(
    model: HookedALM, base: ALMInput, stream: _Rows, depth: int, directions: Directions
) -> Float[Tensor, "batch vocab"]:
    """Logits at the readout; only the rows of the last position are unembedded."""
    change = (stream.difference @ directions.T) @ directions
    at = stream.rows, stream.positions
    own = stream.resid[at]
    patched = stream.resid.index_put(at, (own.float() + change).to(own.dtype))
    top = model(patched, start_at_layer=depth, stop_at_layer=len(model.path), inputs=base)
    logits: Tensor = model.head_unembed(model.head_norm(top[:, -1:]))
    return logits[:, 0]
