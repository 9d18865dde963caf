"""Read a checkpoint tensor by tensor, without ever holding more than one extra.

A tensor that already has the target dtype is mapped into memory, not copied.
"""

import json
import pickle
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ConversionError


class Checkpoint(Mapping[str, tuple[int, ...]]):
    """Tensor names and shapes of a checkpoint folder; ``read`` gives one tensor."""

    folder: Path

    def __init__(self) -> None:
        """Know no tensor yet."""
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    @abstractmethod
    def _stored(self, name: str) -> Tensor:
        """A tensor as it is stored."""

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor by its name, in ``dtype``.

        Raises:
            ConversionError: it holds NaN or infinity, or would in ``dtype``.
        """
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
        return stored.to(dtype) if stored.is_floating_point() else stored

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
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ConversionError(
                f"reading {path} ({path.stat().st_size} bytes): it is damaged, or holds more than "
                "tensors, which is never executed. Download it again, and check that it is the "
                "published file."
            ) from error
        found = found.get(key) if key is not None and isinstance(found, dict) else found
        self._tensors = found if isinstance(found, dict) else {}
        if not self._tensors or not all(isinstance(v, Tensor) for v in self._tensors.values()):
            raise ConversionError(
                f"reading {path}: expected tensors by name"
                + ("." if key is None else f" under {key!r}.")
                + " Is it the published file?"
            )
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
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

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of whichever part has it; see ``Checkpoint.read``."""
        part, own = self._owner[name]
        return part.read(own, dtype)

    def _stored(self, name: str) -> Tensor:
        part, own = self._owner[name]
        return part._stored(own)


class SafetensorsCheckpoint(Checkpoint):
    """The safetensors files of a folder.

    Raises:
        ConversionError: no safetensors file, a shard that is missing or truncated, or an index
            that does not fit the shards.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        """Read every header; no weights yet. Files are named ``{stem}.safetensors``."""
        super().__init__()
        self.folder, self.single = folder, f"{stem}.safetensors"
        self.index = f"{self.single}.index.json"
        for name in self._shards():
            with self._open(folder / name) as shard:
                for key in shard.keys():  # a safetensors handle is no mapping
                    self._file_of[key] = folder / name
                    self._shapes[key] = tuple(shard.get_slice(key).get_shape())
        self._check_index()

    def _shards(self) -> list[str]:
        if (self.folder / self.index).exists():
            return sorted(set(self._weight_map().values()))
        if (self.folder / self.single).exists():
            return [self.single]
        raise ConversionError(
            f"reading the checkpoint {self.folder}: found neither {self.single} nor "
            f"{self.index}. Download the safetensors files; pickled checkpoints are not read."
        )

    def _weight_map(self) -> dict[str, str]:
        try:
            return {**json.loads((self.folder / self.index).read_text("utf-8"))["weight_map"]}
        except (ValueError, LookupError, TypeError) as error:
            raise ConversionError(
                f"reading {self.folder / self.index}: it is no index of a checkpoint "
                f"({type(error).__name__}: {error}). It is damaged; download it again."
            ) from error

    def _check_index(self) -> None:
        if not (self.folder / self.index).exists():
            return
        indexed, found = self._weight_map(), {k: f.name for k, f in self._file_of.items()}
        wrong = sorted(k for k in indexed.keys() | found.keys() if indexed.get(k) != found.get(k))
        if wrong:
            raise ConversionError(
                f"reading the checkpoint {self.folder}: {self.index} and the shards disagree on "
                f"{len(wrong)} tensors, {wrong[:5]} among them. Download the files again."
            )

    def _open(self, path: Path) -> safe_open:
        if not path.exists():
            raise ConversionError(f"reading the shard {path}: the file is missing. Download it.")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ConversionError(
                f"reading the shard {path} ({path.stat().st_size} bytes): {error}. The file is "
                "truncated or damaged; download it again."
            ) from error

    def _stored(self, name: str) -> Tensor:
        # A handle per tensor: pages of a file that was only converted from are let go at once.
        with self._open(self._file_of[name]) as shard:
            return shard.get_tensor(name)
