"""Accelerators that a machine need not have: tensors that say they are on one, and compute here.

What is computed from tensors of two devices is refused, as a real accelerator does: of all that
such a machine does differently, that is what code for several devices gets wrong.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

FIRST, SECOND = torch.device("privateuseone:0"), torch.device("privateuseone:1")
CPU = torch.device("cpu")


class Placed(Tensor):
    """A tensor that says it is on a device; its values are in ``inner``, on the CPU."""

    inner: Tensor
    home: torch.device
    is_elsewhere_allowed: ClassVar[Iterable[str]] = (
        "aten::copy_", "aten::_to_copy", "aten::is_same_size",
    )  # fmt: skip

    @staticmethod
    def __new__(cls: type, inner: Tensor, home: torch.device) -> "Placed":
        made: Placed = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=CPU, requires_grad=False,
        )  # fmt: skip
        made.inner, made.home = inner, home
        return made

    @property
    def device(self) -> torch.device:
        return self.home

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Placed({self.home}, {self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        found = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        if name.startswith(("aten::index", "aten::_index_put", "aten::_unsafe_index")) and (
            isinstance(args[1], list | tuple)
        ):
            # An accelerator's tensor may be indexed by one of the CPU, not the other way round.
            moved = [one for one in args[1] if isinstance(one, Tensor) and home(one) == CPU]
            found = [one for one in found if all(one is not other for other in moved)]
        homes = {home(one) for one in found if one.ndim or home(one) != CPU}
        if len(homes) > 1 and name not in cls.is_elsewhere_allowed:
            raise RuntimeError(
                f"{name}: expected tensors of one device, got {sorted(map(str, homes))}"
            )
        result = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        where = home(found[0]) if name == "aten::copy_" else next(iter(homes), CPU)
        if func._schema.is_mutable and not isinstance(result, list | tuple) and result is not None:
            return args[0]
        return tree_map(lambda one: placed(one, where) if isinstance(one, Tensor) else one, result)


def home(value: Tensor) -> torch.device:
    return value.home if isinstance(value, Placed) else torch.device("cpu")


def bare(value: Any) -> Any:
    return value.inner if isinstance(value, Placed) else value


def placed(value: Tensor, device: torch.device) -> Tensor:
    return value if device.type == "cpu" else Placed(value, device)


class _Move(torch.autograd.Function):
    """A copy on another device, which gradients come back from."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, device: torch.device) -> Tensor:
        ctx.home = home(value)
        return placed(bare(value).clone(), device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return placed(bare(grads[0]).clone(), ctx.home), None


def moved(value: Tensor, device: torch.device) -> Tensor:
    if home(value) == device:
        return value
    out: Any = _Move.apply(value, device)
    return out


class _Devices(TorchFunctionMode):
    """Has ``device=`` and ``.to`` understand the pretended devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cpu:
            return moved(args[0], CPU)
        if func is Tensor.numpy and isinstance(args[0], Placed):
            raise TypeError(f"numpy: the tensor is on {args[0].home}")
        if func is Tensor.data_ptr and isinstance(args[0], Placed):
            return args[0].inner.data_ptr()
        if func is Tensor.tolist and isinstance(args[0], Placed):
            return args[0].inner.tolist()
        if func is Tensor.to:
            value, *rest = args
            if rest and isinstance(rest[0], Tensor):
                rest, kwargs = [home(rest[0]), rest[0].dtype], {}
            kwargs.pop("copy", None)
            device, dtype, *_ = torch._C._nn._parse_to(*rest, **kwargs)
            value = value if dtype is None or value.dtype == dtype else value.type(dtype)
            if device is not None and device.type == "meta":
                return bare(value).to(device)
            return value if device is None else moved(value, device)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type in ("privateuseone", "cpu"):
            kwargs["device"] = CPU
            return moved(func(*args, **kwargs), torch.device(device))
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[None]:
    """Within the context, the devices ``FIRST`` and ``SECOND`` are there."""
    with _Devices(), pytest.MonkeyPatch.context() as patched:
        # Otherwise ``Module.to`` would put the values of one kind of tensor into another.
        patched.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        yield
