"""How far an attack moves neurons from what they do on the clean clip, and which it moves most.

Source: SPIRIT, mbzuai-nlp/spirit-breaking@e3044bd, ``noise_analyzer.py``; M-SP-2.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError
from ...hooks import HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from ..neurons.activity import NeuronSite
from ..statistics.class_neurons import Neuron
from .places import EVERY, NeuronPlace, NeuronRows, n_neurons, neuron_points

SensitivityScore = Literal["abs_sum", "mean_abs"]
"""|sum over rows of the difference|, as the published code has it; or its mean size, as the paper
says: of +1 and -1 they make 0 and 1."""


def sensitivity(
    clean: Float[Tensor, "row neuron"],
    attacked: Float[Tensor, "row neuron"],
    score: SensitivityScore,
) -> Float[Tensor, " neuron"]:
    """How far every neuron of an attacked clip is from what it does on the clean one."""
    apart = attacked.float() - clean.float()
    return apart.sum(0).abs() if score == "abs_sum" else apart.abs().mean(0)


def top_percent(scores: Float[np.ndarray, "block neuron"], percent: int | float) -> list[Neuron]:
    """The most sensitive neurons of all blocks together, best first: int(N percent / 100) of them.

    0.5 is half a percent (C20). Of equal ones the first is taken.

    Raises:
        InputError: no share of 0 to 100 percent, or scores that are NaN.
    """
    if not 0 <= percent <= 100 or np.isnan(scores).any():
        raise InputError(
            f"selecting {percent} percent of {scores.size} neurons: expected 0 to 100, and scores "
            "that are no NaN."
        )
    best = np.argsort(-scores, axis=None, kind="stable")[: int(scores.size * percent / 100)]
    return [(int(one // scores.shape[1]), int(one % scores.shape[1])) for one in best]


@dataclass(eq=False)
class SensitivityLog:
    """Sums over pairs of clips, clean and attacked, in float64: memory that does not grow."""

    items: Int[Tensor, "1"]
    """Number of pairs."""
    rows: Int[Tensor, "1"]
    """Rows of their clean clips."""
    abs_sum: Float[Tensor, "block neuron"]
    mean_abs: Float[Tensor, "block neuron"]
    total: Float[Tensor, "block neuron"]
    """Sum of the clean values."""
    squares: Float[Tensor, "block neuron"]

    @classmethod
    def empty(cls, n_blocks: int, d_mlp: int) -> "SensitivityLog":
        """A log of nothing."""
        sums = (torch.zeros(n_blocks, d_mlp, dtype=torch.float64) for _ in range(4))
        return cls(*(torch.zeros(1, dtype=torch.int64) for _ in range(2)), *sums)

    def add(
        self, block: int, clean: Float[Tensor, "row neuron"], attacked: Float[Tensor, "row neuron"]
    ) -> None:
        """Add what the neurons of a block do for one pair; ``items`` and ``rows`` are left."""
        self.total[block] += clean.sum(0).double().cpu()
        self.squares[block] += clean.square().sum(0).double().cpu()
        for score in get_args(SensitivityScore):
            getattr(self, score)[block] += sensitivity(clean, attacked, score).double().cpu()

    def merge(self, other: "SensitivityLog") -> None:
        """Add a log of other clips.

        Raises:
            InputError: one of other neurons.
        """
        if self.total.shape != other.total.shape:
            raise InputError(
                f"merging logs of neurons: got {tuple(other.total.shape)} blocks and neurons, "
                f"expected {tuple(self.total.shape)}. Merge logs of one model."
            )
        for name, value in other.arrays.items():
            getattr(self, name).add_(value)

    @property
    def arrays(self) -> dict[str, Tensor]:
        """What it holds, by name: as many make a log again."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def scores(
        self, score: SensitivityScore, *, normalised: bool = False
    ) -> Float[np.ndarray, "block neuron"]:
        """Mean score over the pairs.

        Args:
            score: which.
            normalised: in standard deviations of the neuron's clean values, else neurons of a
                larger scale win. One that never moves in clean clips is then infinitely far.

        Raises:
            InputError: a log of nothing.
        """
        if not self.items:
            raise InputError("scoring neurons: got no pair of clips, expected one at least.")
        found: Tensor = getattr(self, score) / self.items
        if normalised:
            mean = self.total / self.rows
            std = (self.squares / self.rows - mean.square()).clamp(min=0).sqrt()
            found = (found / std).where(found > 0, 0.0)
        return found.numpy()

    @property
    def magnitude(self) -> Float[np.ndarray, "block neuron"]:
        """Root mean square of a neuron's values on clean clips."""
        return (self.squares / self.rows).sqrt().numpy()


@torch.no_grad()
def sensitivity_log(
    model: HookedALM,
    clean: ALMInput,
    attacked: ALMInput,
    place: NeuronPlace,
    *,
    span: str = EVERY,
    site: NeuronSite = "gate",
) -> SensitivityLog:
    """The log of some pairs; one forward in which every clip stands beside its attacked one.

    Args:
        model: to run.
        clean: prompts.
        attacked: the same, with attacked clips of the same length.
        place: whose neurons are logged.
        span: whose rows are read; ``all`` is every one. The reference reads all.
        site: see ``neuron_points``.

    Raises:
        InputError: prompts that differ in more than their clips' sound, or lack the span.
    """
    if clean.shape != attacked.shape or not torch.equal(clean.tokens, attacked.tokens):
        raise InputError(
            f"comparing clean and attacked prompts: got {tuple(clean.shape)} and "
            f"{tuple(attacked.shape)} positions, or other tokens; expected the same prompts with "
            "clips of the same length."
        )
    both = ALMInput.joined([clean, attacked])
    rows = NeuronRows.of(model, both, place)
    spots = [at.nonzero().flatten() for at in rows.mask(span)[: len(clean)]]
    if empty := [n for n, at in enumerate(spots) if not len(at)]:
        raise InputError(f"logging neurons over {span!r}: no such row in the prompts {empty}.")
    log = SensitivityLog.empty(*n_neurons(model, place))

    def add(value: Tensor, hook: HookPoint, block: int) -> None:
        flat = rows.by_prompt(str(hook.name), value)
        for n, at in enumerate(spots):
            log.add(block, *(flat[k, at.to(flat.device)].float() for k in (n, n + len(clean))))

    points = neuron_points(model, place, site)
    hooks = [(name, partial(add, block=block)) for block, name in enumerate(points)]
    model.run_with_hooks(both, fwd_hooks=hooks)
    log.items += len(clean)
    log.rows += sum(map(len, spots))
    return log
