"""Low-rank updates of weights: merged, or beside the weight and switched on and off."""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize


def plus_low_rank(
    weight: Float[Tensor, "d_out d_in"],
    a: Float[Tensor, "rank d_in"],
    b: Float[Tensor, "d_out rank"],
    scaling: float,
) -> Float[Tensor, "d_out d_in"]:
    """Merged weight ``weight + scaling * b @ a``, rounded once to the weight's dtype.

    Source: PEFT 0.21 ``LoraLayer.merge``, which keeps the factors in fp32.
    """
    return (weight.float() + (b.float() @ a.float()) * scaling).to(weight.dtype)


class LowRank(nn.Module):
    """A weight's update, which acts while ``is_on``; everything that reads the weight sees it."""

    def __init__(
        self, a: Float[Tensor, "rank d_in"], b: Float[Tensor, "d_out rank"], scaling: float
    ) -> None:
        """Keep the factors, in fp32 whatever the model is cast to."""
        super().__init__()
        self.a, self.b = a.float(), b.float()
        self.scaling, self.is_on = scaling, True

    def forward(self, weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """The weight as it acts."""
        if not self.is_on:
            return weight
        a, b = self.a.to(weight.device), self.b.to(weight.device)
        return plus_low_rank(weight, a, b, self.scaling)


def attach(linear: nn.Module, update: LowRank) -> None:
    """Let a linear layer's ``weight`` be what the update makes of the stored one."""
    # Unsafe spares a check that would compute the update once more.
    parametrize.register_parametrization(linear, "weight", update, unsafe=True)


def updates_of(module: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Attached updates, by the name of what they belong to."""
    for name, part in module.named_modules():
        if isinstance(part, LowRank):
            yield name.removesuffix(".parametrizations.weight.0"), part
