"""What the first factor of an adapter's updates writes, and how many directions of it are used."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...components.lora import LowRank
from ...inputs import ALMInput
from ...model import HookedALM
from .updates import block_updates

Gram = Float[Tensor, "rank rank"]


@dataclass(frozen=True, kw_only=True)
class OutputSpectrum:
    """Singular values of what ``A`` of one update writes, a row per position."""

    block: int
    """Of the path in use."""
    module: str
    """Name in the block, such as ``attn.q_proj``."""
    singular_values: Float[np.ndarray, " rank"]
    """The largest first."""
    n_positions: int


class UsedDirections(NamedTuple):
    """How many directions of what ``A`` of one update writes are used."""

    block: int
    module: str
    rank: int
    components: int
    """That have 90 % of the sum of all squares."""
    largest: float
    """Share of the largest in that sum."""
    n_positions: int


class OutputSpectra:
    """The outputs ``A x`` of every update over any number of batches; only their Gram is kept.

    Source: Behind the Scenes, harryporry77/Behind-the-Scenes@affd12b; M-LO-5.
    """

    def __init__(self, model: HookedALM) -> None:
        """Has seen nothing yet."""
        self.model, self.n_positions = model, 0
        self._grams: dict[str, Gram] = {}

    @torch.no_grad()
    def add(self, x: ALMInput) -> None:
        """Runs a batch as the adapter acts, and adds its real positions."""
        with self._watched(x):
            self.model(x, return_type=None)
        self.n_positions += int(x.is_real.sum())

    @contextmanager
    def _watched(self, x: ALMInput) -> Iterator[None]:
        real = torch.from_numpy(x.is_real)

        def watch(name: str, update: LowRank) -> torch.utils.hooks.RemovableHandle:
            def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                own = args[0][real.to(args[0].device)].double()
                written = own @ update.a.to(own).T
                self._grams[name] = self._grams.get(name, 0) + (written.T @ written).cpu()

            return self.model.get_submodule(name).register_forward_pre_hook(keep)

        handles = [watch(one.path, one.update) for one in block_updates(self.model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> list[OutputSpectrum]:
        """The singular values of every update's outputs, each as if in one matrix."""
        return [
            OutputSpectrum(
                block=one.block, module=one.module, n_positions=self.n_positions,
                singular_values=torch.linalg.eigvalsh(self._grams[one.path]).flip(0).clamp(min=0)
                .sqrt().numpy(),
            )
            for one in block_updates(self.model)
            if one.path in self._grams
        ]  # fmt: skip


def used_directions(spectrum: OutputSpectrum) -> UsedDirections:
    """What a spectrum comes to; the largest share of nothing is NaN."""
    values = spectrum.singular_values
    total = float(np.square(values).sum())
    return UsedDirections(
        spectrum.block, spectrum.module, len(values), components_needed(values),
        float(values.max() ** 2 / total) if total else float("nan"), spectrum.n_positions,
    )  # fmt: skip


def components_needed(singular_values: Float[np.ndarray, " rank"], share: float = 0.9) -> int:
    """How many of the largest have this share of the sum of all squares; 0 of nothing."""
    squares = np.square(np.sort(singular_values)[::-1].astype(np.float64))
    if not squares.sum() > 0:
        return 0
    reached = np.cumsum(squares) >= share * squares.sum() * (1 - 1e-12)
    return int(reached.argmax()) + 1
