"""Read a checkpoint tensor by tensor, without ever holding more than one extra.

A tensor that already has the target dtype is mapped into memory, not copied.
"""

import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConversionError
from .text_files import read_json

FLOATS = ("float64", "float32", "bfloat16", "float16")
WHOLE = ("int64", "int32", "int16", "int8", "uint8")
_SAFETENSORS = {
    **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
    **{f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)},
    **{"BF16": "bfloat16", "U8": "uint8"},
}
"""Dtypes of safetensors by torch's names; any other is read into no model."""


class Checkpoint(Mapping[str, tuple[int, ...]]):
    """Tensor names and shapes of a checkpoint folder; ``read`` gives one tensor."""

    folder: Path
    dtypes: dict[str, str]
    """Dtype of each tensor as torch names it, or as its file does where it is for no weights."""

    def __init__(self) -> None:
        """Know no tensor yet."""
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes = {}

    @abstractmethod
    def _stored(self, name: str) -> Tensor:
        """A tensor as it is stored."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor by its name, in ``dtype``.

        Raises:
            ConversionError: it is stored in no dtype of ``dtype``'s kind, or holds NaN or infinity,
                or would in ``dtype``.
        """
        if wrong := self.misfit(name, dtype):
            raise ConversionError(f"reading the checkpoint {self.folder}: {wrong}.")
        stored = self._stored(name)
        if stored.is_floating_point() and stored.numel():
            low, high = torch.aminmax(stored)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ConversionError(
                    f"reading {name} from {self._file_of[name]}: it holds NaN or infinity. The "
                    "file is damaged, or training diverged; nothing computed with it would mean "
                    "anything."
                )
            if not torch.isfinite(torch.stack([low, high]).to(dtype)).all():
                raise ConversionError(
                    f"reading {name} from {self._file_of[name]}: its values reach from {low:.3g} "
                    f"to {high:.3g}, more than {dtype} can hold. Load it in another dtype."
                )
        return stored.to(dtype)

    def stored_at(self, name: str) -> tuple[Path, str] | None:
        """The safetensors file of a tensor and its name there; None where no such file has it."""
        path = self._file_of[name]
        return (path, name) if path.suffix == ".safetensors" else None

    @property
    def dtype(self) -> str:
        """Dtype of the weights: the first one of floating-point numbers, as transformers has it."""
        return next((one for one in self.dtypes.values() if one in FLOATS), "float32")

    def misfit(self, name: str, dtype: torch.dtype) -> str | None:
        """The dtype that a tensor is stored in where ``dtype`` cannot come from it, in words.

        Floating-point weights come from floating-point numbers and counts from whole ones: a
        conversion would read codes of quantised weights as if they were the weights.
        """
        expected = FLOATS if dtype.is_floating_point else WHOLE
        stored = self.dtypes[name]
        if stored in expected:
            return None
        return f"{name} is stored as {stored}, expected {', '.join(expected)}"

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        """Tensor names."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._shapes)


class PickledCheckpoint(Checkpoint):
    """A ``.pt`` or ``.pth`` file, read without running any code that it may hold.

    Raises:
        ConversionError: a missing or damaged file, one that holds more than tensors, or none.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        """Map the file into memory.

        Args:
            path: the file.
            key: where in the pickled dict the tensors are; None is the dict itself.
        """
        super().__init__()
        self.folder = path.parent
        if not path.exists():
            raise ConversionError(f"reading {path}: the file is missing. Download it.")
        try:
            # Files from before torch 1.6 are no archives, and cannot be mapped.
            is_archive = zipfile.is_zipfile(path)
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except Exception as error:  # a damaged pickle asks for anything
            raise ConversionError(
                f"reading {path} ({path.stat().st_size} bytes): it is damaged, or holds more than "
                "tensors, which is never executed. Download it again, and check that it is the "
                "published file."
            ) from error
        found = found.get(key) if key is not None and isinstance(found, dict) else found
        self._tensors = found if isinstance(found, dict) else {}
        if not self._tensors or not all(
            isinstance(name, str) and isinstance(v, Tensor) for name, v in self._tensors.items()
        ):
            raise ConversionError(
                f"reading {path}: expected tensors by name"
                + ("." if key is None else f" under {key!r}.")
                + " Is it the published file?"
            )
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: _dtype(tensor) for name, tensor in self._tensors.items()}
        self._file_of = dict.fromkeys(self._shapes, path)

    def _stored(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor.clone()


class JoinedCheckpoint(Checkpoint):
    """A checkpoint and the parts that it leaves to others, each under its name and a slash."""

    def __init__(self, own: Checkpoint, parts: Mapping[str, Checkpoint]) -> None:
        """Join a checkpoint and its parts; ``own`` tensors keep their names."""
        super().__init__()
        self.folder = own.folder
        self._owner: dict[str, tuple[Checkpoint, str]] = {}
        for prefix, part in (("", own), *((f"{name}/", part) for name, part in parts.items())):
            self._owner |= {prefix + name: (part, name) for name in part}
        self._shapes = {name: part[own] for name, (part, own) in self._owner.items()}
        self.dtypes = {name: part.dtypes[own] for name, (part, own) in self._owner.items()}

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of whichever part has it; see ``Checkpoint.read``."""
        part, own = self._owner[name]
        return part.read(own, dtype)

    def stored_at(self, name: str) -> tuple[Path, str] | None:
        """The file of a tensor of whichever part has it; see ``Checkpoint.stored_at``."""
        part, own = self._owner[name]
        return part.stored_at(own)

    def _stored(self, name: str) -> Tensor:
        part, own = self._owner[name]
        return part._stored(own)


class OverlaidCheckpoint(Checkpoint):
    """A checkpoint of which slices of some tensors have the values of another."""

    def __init__(
        self, own: Checkpoint, values: Checkpoint, slices: Mapping[str, tuple[slice, ...]]
    ) -> None:
        """Lay ``values`` over ``own``; ``slices`` says where, of each tensor that ``values`` has.

        A tensor has the dtype that holds its own numbers and the new ones exactly.

        Raises:
            ConversionError: a slice that ``own`` does not have, or values of another shape, or of
                a dtype for which there is none; all offenders at once.
        """
        super().__init__()
        self.folder, self._shapes = own.folder, own._shapes
        self._own, self._values, self._slices = own, values, slices
        # NaN is blamed on the values: what they are laid over was fit to train from.
        self._file_of = own._file_of | values._file_of
        if wrong := [name for name in values if not self._fits(name)]:
            at = {name: [[s.start, s.stop] for s in slices.get(name, ())] for name in wrong[:5]}
            listed = "\n  ".join(
                f"{name} {list(values[name])} in {values.dtypes[name]} at {where}, where there is "
                + (f"{list(own[name])} in {own.dtypes[name]}" if name in own else "none")
                for name, where in at.items()
            )
            raise ConversionError(
                f"laying {values.folder} over {own.folder}: {len(wrong)} slices do not fit:\n  "
                f"{listed}\nIs it a delta of this model?"
            )
        held = {name: _holding(own.dtypes[name], values.dtypes[name]) for name in values}
        self.dtypes = {**own.dtypes, **{name: str(dtype) for name, dtype in held.items()}}

    def _fits(self, name: str) -> bool:
        ranges, whole = self._slices.get(name, ()), self._own._shapes.get(name, ())
        return (
            0 < len(whole) == len(ranges)
            and all(0 <= one.start < one.stop <= n for one, n in zip(ranges, whole, strict=True))
            and self._values[name] == tuple(one.stop - one.start for one in ranges)
            and _holding(self._own.dtypes[name], self._values.dtypes[name]) is not None
        )

    def stored_at(self, name: str) -> tuple[Path, str] | None:
        """The file of a tensor that is as ``own`` has it; see ``Checkpoint.stored_at``."""
        return None if name in self._values else self._own.stored_at(name)

    def _stored(self, name: str) -> Tensor:
        stored = self._own._stored(name)
        if name in self._values:
            # A copy: it may be the file's own memory.
            stored = stored.to(getattr(torch, self.dtypes[name]), copy=True)
            stored[self._slices[name]] = self._values._stored(name).to(stored.dtype)
        return stored


def _holding(dtype: str, other: str) -> str | None:
    """The dtype that holds numbers of two exactly; None where they are not both floating."""
    one, two = getattr(torch, dtype), getattr(torch, other)
    if dtype != other and not (one.is_floating_point and two.is_floating_point):
        return None
    return str(torch.promote_types(one, two)).removeprefix("torch.")


def _dtype(tensor: Tensor) -> str:
    """A tensor's dtype, or its layout where it does not hold its numbers one by one."""
    kind = tensor.dtype if tensor.layout is torch.strided else tensor.layout
    return str(kind).removeprefix("torch.")


class SafetensorsCheckpoint(Checkpoint):
    """The safetensors files of a folder, of which those are read that transformers reads.

    A single file goes before an index, whatever else lies beside it.

    Raises:
        ConversionError: no safetensors file, a shard that is missing or truncated, or an index
            that is none, does not fit the shards, or names files outside the folder.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        """Read every header; no weights yet. Files are named ``{stem}.safetensors``."""
        super().__init__()
        self.folder, self.single = folder, f"{stem}.safetensors"
        self.index = f"{self.single}.index.json"
        if (folder / self.single).is_file():
            self._read_header(self.single)
            return
        weight_map = self._weight_map()
        for name in sorted(set(weight_map.values())):
            self._read_header(name)
        self._check_index(weight_map)

    def _weight_map(self) -> dict[str, str]:
        """The index: tensor -> file."""
        path = self.folder / self.index
        if not path.is_file():
            raise ConversionError(
                f"reading the checkpoint {self.folder}: found neither {self.single} nor "
                f"{self.index}. Download the safetensors files; pickled checkpoints are not read."
            )
        found = read_json(path).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise self._no_index("it has no weight_map of tensors")
        for name, file in found.items():
            if not isinstance(file, str) or not self._is_inside(file):
                raise self._no_index(f"it says that {name} is in {file!r:.60}")
        return found

    def _no_index(self, found: str) -> ConversionError:
        return ConversionError(
            f"reading {self.folder / self.index}: {found}, expected an object whose weight_map "
            "gives each tensor a safetensors file of this folder. It is no index of a checkpoint, "
            "or damaged; download it again."
        )

    def _is_inside(self, file: str) -> bool:
        """Whether a name stays in the folder. The file itself may be a link, as in hub caches."""
        path = Path(file)
        if not file.isprintable() or not path.name or path.is_absolute() or ".." in path.parts:
            return False
        try:
            holder = (self.folder / path).parent.resolve()
            return holder.is_relative_to(self.folder.resolve()) and len(path.name.encode()) < 256
        except (OSError, RuntimeError):  # a loop of links, a name that is too long
            return False

    def _check_index(self, weight_map: dict[str, str]) -> None:
        found = {name: str(f.relative_to(self.folder)) for name, f in self._file_of.items()}
        wrong = sorted(
            name
            for name in weight_map.keys() | found.keys()
            if name not in found or str(Path(weight_map.get(name, ""))) != found[name]
        )
        if wrong:
            raise ConversionError(
                f"reading the checkpoint {self.folder}: {self.index} and the shards disagree on "
                f"{len(wrong)} tensors, {wrong[:5]} among them. Download the files again."
            )

    def _read_header(self, name: str) -> None:
        path = self.folder / name
        with self._open(path) as shard:
            for key in shard.keys():  # a safetensors handle is no mapping
                header = shard.get_slice(key)
                self._file_of[key] = path
                self._shapes[key] = tuple(header.get_shape())
                dtype = header.get_dtype()
                self.dtypes[key] = _SAFETENSORS.get(dtype, dtype)

    def _open(self, path: Path) -> safe_open:
        if not path.is_file():
            raise ConversionError(f"reading the shard {path}: the file is missing. Download it.")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"reading the shard {path} ({path.stat().st_size} bytes): {error}. The file is "
                "truncated or damaged; download it again."
            ) from error

    def _stored(self, name: str) -> Tensor:
        # A handle per tensor: pages of a file that was only converted from are let go at once.
        with self._open(self._file_of[name]) as shard:
            return shard.get_tensor(name)
