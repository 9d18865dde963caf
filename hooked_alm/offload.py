"""Weights that no device holds: where they are, and how they are read.

accelerate gives every module a device to run on. Weights that it leaves in host memory or in files
are on torch's ``meta`` device, and their module reads each of them afresh when something asks for
it: its own forward, a view such as ``W_O``, or a method that multiplies with it. So nothing that
reads a weight has to know where it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError


class _ReadOnDemand(nn.Module):
    """Mixed into the class of a module whose weights are kept elsewhere."""

    def __getattr__(self, name: str) -> Any:
        """What ``nn.Module`` has of that name; of a weight kept elsewhere, its values."""
        value = super().__getattr__(name)
        if isinstance(value, nn.Parameter) and value.is_meta:
            # The dtype is the parameter's: it may be cast for the time of a run.
            read = self.__dict__["read"](name).to(home_of(self), value.dtype)
            return nn.Parameter(read, requires_grad=value.requires_grad)
        return value


def read_on_demand(module: nn.Module, read: Callable[[str], Tensor], home: torch.device) -> None:
    """Have a module read its own weights, all of them on ``meta``, whenever they are asked for.

    Args:
        module: the module; those below it are left as they are.
        read: function of a weight's name in the module: its values, on any device.
        home: device that it runs on.
    """
    kind = type(module)
    module.__dict__ |= {"read": read, "home": home}
    # As torch's parametrisations do: a class of its own, which is still one of the old class.
    module.__class__ = type(kind.__name__, (_ReadOnDemand, kind), {"__module__": kind.__module__})


def home_of(module: nn.Module) -> torch.device:
    """Device of a module's first weight, or the one it is read to."""
    for part in module.modules():
        if isinstance(part, _ReadOnDemand):
            home: torch.device = part.__dict__["home"]
            return home
        for weight in part.parameters(recurse=False):
            return weight.device
    return torch.device("cpu")


def is_offloaded(module: nn.Module) -> bool:
    """Whether any weight of a module, or of one below it, is kept elsewhere."""
    return any(isinstance(part, _ReadOnDemand) for part in module.modules())


def refuse_offloaded(module: nn.Module, attempt: str) -> None:
    """Refuse to change weights that a device_map keeps elsewhere: the change would be lost.

    Raises:
        InputError: there are some.
    """
    if is_offloaded(module):
        raise InputError(
            f"{attempt}: got weights that the device_map keeps off the devices, which can only be "
            "read. Load the model with a device_map that places all of them on devices."
        )
