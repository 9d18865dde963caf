"""Dataclasses of arrays in one file, written whole or not at all, and read without running code.

The file is safetensors: arrays are its tensors, what else the fields hold is JSON in its header.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .errors import InputError

T = TypeVar("T")
FilePath = str | os.PathLike[str]
_HEADER = "hooked_alm"
_PACKAGE = __package__


def expanded(path: str | Path) -> Path:
    """The path with ``~`` as somebody's home, where they have one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Writes a file so that, whenever the process dies, the path holds all of it or nothing.

    Args:
        path: the file; folders on the way to it are made.
        parts: what it holds, one behind the other.

    One process at a time may write to a path; what a kill left is replaced by a later try.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    # Never into what is there, which may be a link to somewhere else.
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if sys.platform != "win32":
        # The rename itself must survive a power cut.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def save(path: FilePath, value: Any) -> None:
    """Writes a dataclass to a file; an older one of that name is replaced.

    Args:
        path: the file; folders on the way to it are made.
        value: a dataclass of this package, with fields of numbers, text, arrays, tensors, and
            tuples, lists, mappings and dataclasses of these.

    Raises:
        InputError: a field holds something else, or the file cannot be written.
    """
    arrays: dict[str, Tensor] = {}
    header = {_HEADER: json.dumps(_packed(value, arrays))}
    try:
        write_atomic(Path(path), to_bytes(arrays, metadata=header))
    except OSError as error:
        raise InputError(
            f"saving to {path}: {error.strerror}. Give a file in a folder that can be written."
        ) from error


def load(path: FilePath, kind: type[T]) -> T:
    """What ``save`` wrote; arrays and tensors have their dtypes and their bits.

    Args:
        path: the file.
        kind: the class that it must be of.

    Raises:
        InputError: no such file, or it holds something else than a ``kind`` of this version.
    """
    doing = f"loading a {kind.__name__} from {path}"
    if not Path(path).is_file():
        raise InputError(f"{doing}: there is no such file. Check the path; `save` writes one.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(
            f"{doing}: the file is damaged or no safetensors ({error}). Save the result again."
        ) from error
    if header is None:
        raise InputError(f"{doing}: it is a file of tensors that `save` did not write.")
    try:
        value = _unpacked(json.loads(header), arrays)
    except (AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{doing}: its content is not that of this version ({error}). Load it with the version "
            "that saved it, or make the result again."
        ) from error
    if not isinstance(value, kind):
        raise InputError(f"{doing}: it holds a {type(value).__name__}. Load it as that.")
    return value


def _packed(value: Any, arrays: dict[str, Tensor]) -> Any:
    """JSON of a value, its arrays put aside."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object):
        name = str(len(arrays))
        # A copy: of one piece, and of no memory that another array shares.
        if isinstance(value, Tensor):
            arrays[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        arrays[name] = torch.from_numpy(value.copy(order="C"))
        return {"array": name}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_packed(one, arrays) for one in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[_packed(one, arrays) for one in pair] for pair in value.items()]}
    kind = type(value)
    if dataclasses.is_dataclass(kind) and kind.__module__.startswith(f"{_PACKAGE}."):
        fields = {f.name: _packed(getattr(value, f.name), arrays) for f in dataclasses.fields(kind)}
        return {"dataclass": [kind.__module__, kind.__qualname__], "fields": fields}
    raise InputError(
        f"saving a result: got a {kind.__name__} in it, expected numbers, text, arrays, and "
        "collections or dataclasses of these. Leave it out, or turn it into one of them."
    )


def _unpacked(packed: Any, arrays: Mapping[str, Tensor]) -> Any:
    """The value that ``_packed`` made JSON of."""
    if not isinstance(packed, dict):
        return packed
    what, content = cast(tuple[str, Any], next(iter(packed.items()), ("nothing", None)))
    if what in ("array", "tensor"):
        return arrays[content] if what == "tensor" else arrays[content].numpy()
    if what == "dataclass":
        module, name = content
        if not module.startswith(f"{_PACKAGE}."):
            raise ValueError(f"{module}.{name} is no class of {_PACKAGE}")
        kind = getattr(import_module(module), name)
        if not dataclasses.is_dataclass(kind):
            raise ValueError(f"{module}.{name} is no dataclass")
        return cast(Any, kind)(**{k: _unpacked(one, arrays) for k, one in packed["fields"].items()})
    if what == "mapping":
        return {_unpacked(k, arrays): _unpacked(one, arrays) for k, one in content}
    return {"tuple": tuple, "list": list}[what](_unpacked(one, arrays) for one in content)
