"""What an experiment declares; the runner runs it, and ``conclude`` judges and shows it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic

import pandas as pd

from hooked_alm.errors import InputError

from .claims import Claim, Defect, Verdict, judge
from .controls import Control
from .page import Page
from .results import C, Results, Row, Tables
from .run_folder import RunFolder
from .settings import ExperimentConfig
from .truths import Truth


@dataclass(frozen=True)
class Unit:
    """One piece of work that is done once and kept: `id` names its file."""

    id: str
    payload: Any = None
    after: str | None = None
    """The unit whose result, or what it left in the folder, this one goes on from."""


@dataclass(frozen=True)
class UnitResult:
    """What one unit found: rows of tidy tables, and a record of whatever else is worth keeping.

    Both must be JSON: strings, numbers (NaN and infinities too), booleans, None, lists, dicts.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, who: Row, tables: Mapping[str, Iterable[Row]], record: dict[str, Any] | None = None
    ) -> "UnitResult":
        """The result whose every row begins with the columns ``who``, which say what it is of."""
        named = {name: [{**who, **row} for row in rows] for name, rows in tables.items()}
        return cls(named, record or {})


class Experiment(ABC, Generic[C]):
    """One question, asked of one model.

    The runner calls `identify` and `units`, then, where units are left to do, `load` and `measure`,
    and the same for `further_units`. From the tables alone it then makes summaries, judges controls
    and claims, and writes the page.

    Workers in other processes get what `identify` left on `self`, pickled, and `load` by
    themselves: what is needed later comes from `identify` and from the tables, never from what
    `measure` left on `self`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    question: ClassVar[str]
    Config: ClassVar[type[ExperimentConfig]] = ExperimentConfig
    # Raise it when the meaning of a unit's result changes: older runs are then not resumed.
    schema_version: ClassVar[int] = 1
    tables: ClassVar[Mapping[str, str]]
    """Measured table -> what a row of it is."""
    may_lack: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Tables that some settings leave empty -> the columns that are read of them."""
    defects: ClassVar[Sequence[Defect]] = ()
    controls: ClassVar[Sequence[Control]] = ()
    claims: ClassVar[Sequence[Claim]] = ()
    caveats: ClassVar[Sequence[str]] = ()
    """What a reader has to bear in mind, a paragraph each."""
    location: ClassVar[Path | None] = None
    """The file of a user's own experiment; set where it is loaded."""
    truths: ClassVar[Sequence[Truth]] = ()
    """What must be found in bundled models; see ``truths``."""
    truth_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of the runs that find it."""
    leaves: ClassVar[Sequence[str]] = ()
    """Folders of the run in which units leave files of their own."""
    folder: RunFolder
    """Where the run is kept: set before `identify`, for work that is too large for JSON or goes on
    from what an earlier unit left, such as a checkpoint."""

    def __init__(self, config: C) -> None:
        self.config = config

    def __init_subclass__(cls) -> None:
        """Refuse declarations that rest on nothing, or on tables that are not measured.

        Raises:
            InputError: all that is wrong with them.
        """
        super().__init_subclass__()
        named = {
            **{f"control {one.name!r}": one.of for one in cls.controls},
            **{f"claim {one.name!r}": one.rests_on for one in cls.claims},
            **{f"defect {one.id!r}": one.touches for one in cls.defects},
        }
        known = getattr(cls, "tables", {})
        claims = {f"claim {one.name!r}" for one in cls.claims}
        allowed = {*known, *(one.name for one in cls.claims)}
        wrong = [
            f"{what} names {', '.join(names) or 'no table'}"
            for what, names in named.items()
            if not names or {*names} - (set(known) if what in claims else allowed)
        ]
        if wrong:
            raise InputError(
                f"declaring the experiment {cls.__name__}: got {'; '.join(wrong)}; expected some "
                f"of its tables: {', '.join(known) or 'none are declared'}. Name one of these, or "
                f"declare the table in {cls.__name__}.tables."
            )

    # --- What is measured

    @abstractmethod
    def identify(self) -> dict[str, Any]:
        """Reads the inputs, refuses what cannot work, returns what identifies them.

        Weights are not needed for it: a model that is laid out makes prompts. The result goes into
        ``run.json`` as ``inputs`` and must be JSON and the same every time: a run resumes only with
        equal inputs. Beside free keys, ``model`` (a mapping: name, revision, weights_sha256,
        blocks, ...) is shown on the page.
        """

    def load(self) -> None:
        """Loads what `measure` needs besides, such as the model's weights; once in every worker."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """The work, in the order in which its results are merged."""

    def further_units(self, tables: Tables) -> list[Unit]:
        """Work that the results of `units` decide, such as what to look at more closely.

        A function of what `identify` read and of the merged tables alone, so that a resumed run
        goes on with the same work. Their results are merged after those of `units`.
        """
        return []

    @abstractmethod
    def measure(self, unit: Unit) -> UnitResult:
        """Does one unit; depends on nothing but the inputs, the unit and the unit's own seed."""

    # --- What is made of it

    def summaries(self, run: Results[C]) -> Iterable[tuple[str, pd.DataFrame]]:
        """Names and summary tables; each finds those before it in the results."""
        return ()

    @abstractmethod
    def page(self, page: Page, run: Results[C]) -> None:
        """Fills the page: sections with figures, tables and clips, and how to read them."""

    def lead(self, run: Results[C]) -> str:
        """What was done, in a paragraph or two, derived from this run's own inputs."""
        return ""

    def method(self, run: Results[C]) -> str:
        """How numbers and intervals were made."""
        return ""

    # --- What follows

    def known_defects(self) -> dict[str, str]:
        """The defects of this run's settings, by their number in ``docs/methods.md``."""
        return {one.id: one.text for one in self.defects if one.holds(self.config)}

    @classmethod
    def source(cls) -> str:
        """What names it on the command line: its file, or its name where it is installed."""
        return str(cls.location or cls.name)

    @classmethod
    def results(cls, config: C, inputs: Mapping[str, Any], tables: Tables) -> Results[C]:
        """The results of a run, with empty tables in place of those that it lacks."""
        empty = {
            name: pd.DataFrame(columns=list(columns)) for name, columns in cls.may_lack.items()
        }
        return Results(config, inputs, {**empty, **tables})

    @classmethod
    def judge(cls, run: Results[C]) -> Verdict:
        """What its controls and claims come to."""
        return judge(cls.controls, cls.claims, cls.defects, run)
