"""Counts of dispatched operations."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """Operations that PyTorch dispatches, those that only look at a tensor among them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> Counter[str]:
    call()  # clips are encoded once
    with Counted() as counted:
        call()
    return counted.operations
