"""What an experiment is: settings, units of work, and the report that its tables lead to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from .report import Report
from .run_folder import RunFolder

Row = dict[str, Any]
"""Of a tidy table: column -> value."""
Tables = Mapping[str, pd.DataFrame]
"""Tidy tables by name."""


class ExperimentConfig(BaseModel):
    """The settings that every experiment has; an experiment adds its own in a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(default="bundled:follows_text", description="id, folder or bundled:NAME")
    revision: str | None = Field(default=None, description="branch, tag or commit of a model id")
    components: dict[str, str] = Field(
        default={}, description="parts whose weights are elsewhere: name to folder or id"
    )
    lora: str | None = Field(default=None, description="a PEFT adapter's folder or id, merged")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    seed: int = 0
    variant: Literal["corrected", "seed"] = "corrected"
    n_threads: int | None = Field(default=None, ge=1, description="None leaves torch's own number")


@dataclass(frozen=True)
class Unit:
    """One piece of work that is done once and kept: `id` names its file."""

    id: str
    payload: Any = None


@dataclass(frozen=True)
class UnitResult:
    """What one unit found: rows of tidy tables, and a record of whatever else is worth keeping.

    Both must be JSON: strings, numbers (NaN and infinities too), booleans, None, lists, dicts.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


C = TypeVar("C", bound=ExperimentConfig)


class Experiment(ABC, Generic[C]):
    """One question, asked of one model.

    The runner calls `open`, `units`, `run_unit` for every unit that has no result yet, the same for
    `further_units`, then `conclude`. `run_unit` and `conclude` may run in different processes: what
    `conclude` needs comes from `open` and from the tables, never from what `run_unit` left on
    `self`.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    Config: ClassVar[type[ExperimentConfig]] = ExperimentConfig
    # Raise it when the meaning of a unit's result changes: older runs are then not resumed.
    schema_version: ClassVar[int] = 1
    folder: RunFolder
    """Where the run is kept: set by the runner before `open`, for work that is too large for JSON
    or goes on from what an earlier unit left, such as a checkpoint."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def open(self) -> dict[str, Any]:
        """Loads model and inputs, refuses what cannot work, returns what identifies the inputs.

        The result goes into ``run.json`` as ``inputs`` and must be JSON and the same every time:
        a run resumes only with equal inputs. Beside free keys, ``model`` (a mapping: name,
        revision, weights_sha256, ...) and ``known_defects`` (id -> sentence) are shown in the
        report.
        """

    @abstractmethod
    def units(self) -> list[Unit]:
        """The work, in the order in which its results are merged."""

    def further_units(self, tables: Tables) -> list[Unit]:
        """Work that the results of `units` decide, such as what to look at more closely.

        A function of what `open` loaded and of the merged tables alone, so that a resumed run goes
        on with the same work. Their results are merged after those of `units`.
        """
        return []

    @abstractmethod
    def run_unit(self, unit: Unit) -> UnitResult:
        """Does one unit; depends on nothing but `open`, the unit and the unit's own seed."""

    @abstractmethod
    def conclude(self, tables: Tables, folder: RunFolder) -> Report:
        """Writes summaries and figures into `folder` and returns the report."""
