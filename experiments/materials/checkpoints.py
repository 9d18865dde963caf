"""A training that is cut into units: what each leaves for the next, in the run's folder."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hooked_alm.errors import InputError

from ..workbench.experiment import Unit
from ..workbench.identity import file_sha256
from ..workbench.run_folder import RunFolder
from .trained_lens import read_tensors, write_tensors

StepsPerCheckpoint = Annotated[
    int, Field(ge=1, le=10**6, description="a killed run goes on from the last one")
]
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run; a unit trains some steps, from the one that the unit before it left."""

    folder: RunFolder
    n_steps: int
    every: int
    """Steps of a unit."""
    leaves: Sequence[str]
    """Other folders of the run that hold what training has made."""

    def units(self) -> list[Unit]:
        """A unit for some steps each, in their order."""
        ends = [*range(0, self.n_steps, self.every), self.n_steps]
        names = [self.unit_id(stop) for stop in ends[1:]]
        return [
            Unit(name, range(*bounds), after=before)
            for name, bounds, before in zip(names, pairwise(ends), [None, *names], strict=False)
        ]

    def unit_id(self, stop: int) -> str:
        """Id of the unit that ends behind a step."""
        return f"train__{-(-stop // self.every) - 1:04d}"

    @property
    def last_unit(self) -> str:
        """Id of the unit that ends the training."""
        return self.unit_id(self.n_steps)

    @property
    def cure(self) -> str:
        """What to do where a file is not as training left it."""
        folders = ["units", *self.leaves]
        named = " and ".join(str(self.folder.path / folder) for folder in folders)
        return f"delete {named}: training then begins again"

    def write(self, steps: range, state: Mapping[str, Tensor]) -> dict[str, str]:
        """Keeps what training has come to, and lets all before the unit's own first step go.

        Returns:
            What the unit's record says of it.
        """
        write_tensors(path := self._file(steps.stop), dict(state))
        # The one it began with stays: this unit's result is not on disk yet.
        self._forget({steps.start, steps.stop})
        return {"checkpoint": file_sha256(path)}

    def read(self, step: int) -> dict[str, Tensor]:
        """What training had come to behind a step.

        Raises:
            InputError: no such file, or another than was left.
        """
        tensors = read_tensors(path := self._file(step), self.cure)
        self.check(path, step, "checkpoint")
        return tensors

    def check(self, path: Path, step: int, what: str) -> None:
        """Refuse a file that is not what the unit that ended behind a step has left.

        Args:
            path: the file.
            step: behind which that unit ended.
            what: under which name its record has the hash.

        Raises:
            InputError: it is so.
        """
        left = self.folder.read_unit(self.unit_id(step))["record"]
        if left.get(what) != file_sha256(path):
            raise InputError(
                f"reading {path}: got a damaged file, expected what training has left. To go on, "
                f"{self.cure}."
            )

    def remove(self) -> None:
        """Removes all of them: training has ended, and its results are kept."""
        self._forget(set())
        with contextlib.suppress(FileNotFoundError):
            self._file(0).parent.rmdir()

    def _file(self, step: int) -> Path:
        return self.folder.inside(f"{FOLDER}/step_{step:06d}.safetensors")

    def _forget(self, kept: set[int]) -> None:
        paths = {self._file(step) for step in kept}
        for path in self._file(0).parent.glob("step_*.safetensors"):
            if path not in paths:
                path.unlink()
