"""Results of methods: short in a notebook's cell, kept in a file."""

from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from ..display import Shown, Summary, listed
from ..storage import FilePath, load, save

WIDTH = 80
"""Most characters that are shown of a field."""
ResultT = TypeVar("ResultT", bound="MethodResult")


class MethodResult(Shown):
    """Mixed into the dataclasses that methods return."""

    def save(self, path: FilePath) -> None:
        """Write it to one safetensors file, whole or not at all; an older one is replaced.

        Raises:
            InputError: the file cannot be written, or something in it cannot be kept.
        """
        save(path, self)

    @classmethod
    def load(cls: type[ResultT], path: FilePath) -> ResultT:
        """What ``save`` wrote, bit by bit.

        Raises:
            InputError: no such file, or it holds something else.
        """
        return load(path, cls)

    def _summary(self) -> Summary:
        found = ((one.name, getattr(self, one.name)) for one in fields(self))  # type: ignore[arg-type]
        return Summary(title=type(self).__name__, facts=[(name, _brief(v)) for name, v in found])


def _brief(value: Any) -> str:
    """What a field holds, in a line."""
    if isinstance(value, np.ndarray | Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} {[*value.shape]}" if value.shape else f"{float(value):.4g}"
    if isinstance(value, MethodResult):
        return str(value._summary().title)
    if isinstance(value, float):
        return f"{value:.4g}"
    text = listed(value) if isinstance(value, tuple | list) else str(value)
    return text if len(text) <= WIDTH else f"{type(value).__name__} of {len(value)}"
