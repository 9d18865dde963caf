"""The same model without its training: what its sizes alone make of the sound."""

import torch
from torch import nn

from hooked_alm.errors import InputError

from ..workbench.results import C
from .subject import ModelExperiment

FIXED = "embed_positions.weight"
"""Ends the names of tables that many encoders are given, and do not learn."""


class UntrainedToo(ModelExperiment[C]):
    """An experiment some of whose units run its model with random weights."""

    _is_trained: bool

    def check_drawable(self) -> None:
        """Refuse weights that lie on a disk, where none can be drawn.

        Raises:
            InputError: it is so.
        """
        where = self.config.device_map
        if "disk" in (where.values() if isinstance(where, dict) else [where]):
            raise InputError(
                "drawing weights: got a device_map that leaves some on the disk, expected them in "
                "memory. Choose another device_map, or set untrained=false."
            )

    def load(self) -> None:
        """Fills the model with its weights."""
        super().load()
        self._is_trained = True

    def become(self, *, is_trained: bool) -> None:
        """Has ``self.model`` have its own weights, or random ones.

        One model is in memory at a time: its own weights are loaded again where they are wanted.
        """
        if is_trained and not self._is_trained:
            self.model = self.lay_out(hears=True)
            self.load()
        elif self._is_trained and not is_trained:
            forget_training(self.model, self.config.seed)
            self._is_trained = False


@torch.no_grad()
def forget_training(model: nn.Module, seed: int) -> None:
    """Gives a model random weights of the spread that its own have, tensor by tensor, in place.

    Matrices are drawn anew; vectors, norms and biases, have their entries dealt out again.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith(FIXED):
            continue
        if weight.ndim < 2:
            order = torch.randperm(len(weight), generator=generator)
            weight.copy_(weight[order.to(weight.device)])
        else:
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight.copy_(noise.to(weight.device) * weight.float().std())
