"""Counts of dispatched operations, and of the bytes that they leave alive."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class Alive(TorchDispatchMode):
    """Bytes of what operations have returned and what is not yet let go of, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {one: n for one, n in self.sizes.items() if not one.expired()}
        self.most = max(self.most, sum(self.sizes.values()))
        return out


def most_alive(call: Callable[[], Any]) -> int:
    """Most bytes that were alive at once of what a second call made."""
    call()  # clips are encoded once
    with Alive() as alive:
        call()
    return alive.most
