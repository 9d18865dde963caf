"""Rows of activations with what each of them is: what is collected, written and read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from ...errors import InputError
from .selection import RowKind, width_of

StoreDtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[StoreDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
COLUMNS = ("clip", "prompt", "position", "seconds", "span")
"""What is known of every row: the clip's name ("" where the row is in none of several), the number
of its prompt, its place there from 0 (pads are not counted), where in the clip it begins (NaN
outside of clips), and its span."""
IndexColumn = Shaped[np.ndarray, " row"]


@dataclass(frozen=True, eq=False)
class ActivationRows:
    """Rows of some points, and the columns of their index.

    Raises:
        InputError: tensors or columns that differ in their number of rows, columns that are
            missing, or a shape that is not the width.
    """

    kind: RowKind
    values: dict[str, Tensor]
    """Point -> ``[row, width]``."""
    shapes: dict[str, tuple[int, ...]]
    """Point -> shape of a row of it, of which the width is the product."""
    index: dict[str, IndexColumn]
    """Columns of ``COLUMNS``, and further ones such as labels and the speaker, which are text."""

    def __post_init__(self) -> None:
        """Check once, here, rather than in every shard."""
        doing = "making rows of activations"
        if not self.values or self.values.keys() != self.shapes.keys():
            raise InputError(
                f"{doing}: got values of {', '.join(self.values) or 'no point'} and shapes of "
                f"{', '.join(self.shapes) or 'none'}, expected the same points."
            )
        if missing := [name for name in COLUMNS if name not in self.index]:
            raise InputError(f"{doing}: the index has no column {', '.join(missing)}.")
        for name, value in self.values.items():
            expected = [len(self), width_of(self.shapes[name])]
            if list(value.shape) != expected or not value.is_floating_point():
                kind = str(value.dtype).removeprefix("torch.")
                raise InputError(
                    f"{doing}: got {kind} {list(value.shape)} for {name}, expected real numbers "
                    f"{expected}, [row, width]."
                )
        if wrong := [name for name, column in self.index.items() if len(column) != len(self)]:
            raise InputError(
                f"{doing}: got columns {', '.join(wrong)} of another length than {len(self)} rows."
            )

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.index["prompt"])

    def cast(self, dtype: StoreDtype) -> "ActivationRows":
        """The same in a store's dtype, on the CPU.

        Raises:
            InputError: a value that is not finite, or is not in the dtype.
        """
        return ActivationRows(
            self.kind,
            {name: _cast(name, value, dtype) for name, value in self.values.items()},
            self.shapes,
            self.index,
        )

    def by_prompt(self, numbers: Sequence[int]) -> "ActivationRows":
        """The rows in the order of their prompts, once prompt ``i`` is called ``numbers[i]``."""
        called = np.asarray(numbers)[self.index["prompt"]]
        order = np.argsort(called, kind="stable")
        pick = torch.from_numpy(order)
        return ActivationRows(
            self.kind,
            {name: value[pick.to(value.device)] for name, value in self.values.items()},
            self.shapes,
            {name: column[order] for name, column in {**self.index, "prompt": called}.items()},
        )

    @staticmethod
    def joined(parts: Sequence["ActivationRows"]) -> "ActivationRows":
        """The rows of several batches one behind the other.

        Raises:
            InputError: parts of other points, kinds or columns than the first; or no part.
        """
        if not parts:
            raise InputError("joining rows of activations: got no parts, expected one or more.")
        first = parts[0]
        for part in parts[1:]:
            same = (part.kind, part.shapes, [*part.index]) == (
                first.kind, first.shapes, [*first.index],
            )  # fmt: skip
            if not same:
                raise InputError(
                    "joining rows of activations: got parts of other points, shapes or columns "
                    f"({described(part)}) than the first's ({described(first)}). Collect all alike."
                )
        return ActivationRows(
            first.kind,
            {name: torch.cat([part.values[name] for part in parts]) for name in first.values},
            first.shapes,
            {name: np.concatenate([part.index[name] for part in parts]) for name in first.index},
        )


def described(rows: ActivationRows) -> str:
    """Points with their shapes, and columns, for a message."""
    points = (f"{name} {list(shape)}" for name, shape in rows.shapes.items())
    return f"{rows.kind} rows of {', '.join(points)} with {', '.join(rows.index)}"


def _cast(name: str, value: Tensor, dtype: StoreDtype) -> Tensor:
    stored = value.detach().to(DTYPES[dtype]).cpu().contiguous()
    if not len(stored):
        return stored
    # The extremes alone: ten times as fast as isfinite, and NaN is an extreme, too.
    if torch.stack(torch.aminmax(stored)).isfinite().all():
        return stored
    finite = value[value.isfinite()]
    largest = float(finite.abs().max()) if len(finite) else float("nan")
    if len(finite) == value.numel():
        raise InputError(
            f"keeping {name} in {dtype}: got values up to {largest:.6g}, expected at most "
            f"{torch.finfo(DTYPES[dtype]).max:.6g}. Keep it in bfloat16 or float32."
        )
    raise InputError(
        f"keeping {name}: got {value.numel() - len(finite)} values that are NaN or infinite, "
        "expected finite ones. Run the model in a wider dtype, or look at its input."
    )


def text_column(texts: Sequence[str], of_row: Shaped[np.ndarray, " row"]) -> IndexColumn:
    """The text of each row, of the prompts' texts."""
    found: IndexColumn = np.asarray([*texts], dtype=object)[of_row]
    return found


def check_labels(labels: Mapping[str, Sequence[str]], n_prompts: int) -> None:
    """Refuse further columns that have no text for each prompt, or the name of another.

    Raises:
        InputError: all that is wrong with them.
    """
    faults = [f"{name!r} is a column of every index" for name in labels if name in COLUMNS]
    for name, values in labels.items():
        if isinstance(values, str) or len(values) != n_prompts:
            n = "one text" if isinstance(values, str) else f"{len(values)} values"
            faults.append(f"{name!r} has {n}, expected one for each of {n_prompts} prompts")
        elif wrong := [value for value in values if not isinstance(value, str)]:
            faults.append(f"{name!r} has {wrong[0]!r}, expected text")
    if faults:
        raise InputError(f"labelling rows: {'; '.join(faults)}. Rename or complete the labels.")
