"""A small experiment to test the workbench: no model, awkward numbers, every report item."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import soundfile
import torch
from pydantic import BaseModel, ConfigDict, Field

from hooked_alm.errors import InputError
from hooked_alm.experiments.workbench import figures, report, runner
from hooked_alm.experiments.workbench.claims import Claim, Defect, Finding, judged, not_measured
from hooked_alm.experiments.workbench.controls import Control, at_most
from hooked_alm.experiments.workbench.executors import Executor
from hooked_alm.experiments.workbench.experiment import Experiment, Unit, UnitResult
from hooked_alm.experiments.workbench.page import Page
from hooked_alm.experiments.workbench.ray_executor import RayActors
from hooked_alm.experiments.workbench.results import Results
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.settings import ExperimentConfig


class Lens(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    depths: list[int] = [0, 1, 2]
    norm: str = "final"


class ToyConfig(ExperimentConfig):
    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {"is_zero": True}
    KNOWN_WITH: ClassVar = ("audio",)

    n_threads: int = Field(default=1, ge=1)
    n_units: int = 4
    delay_s: float = 0.0
    interrupt_at: int | None = None
    fails_at: int | None = None
    dies_at: int | None = None
    stays_at: int | None = None
    chains: bool = False
    audio: str | None = None
    lens: Lens = Lens()
    is_zero: bool = False
    wrong: float = 0.0


def _rises(run: Results[ToyConfig]) -> Finding:
    last = float(run["mean"]["mean"].iloc[-1])
    why_not = {"not above 0": not last > 0}
    return judged("It rises", f"{last:.2f}", why_not, numbers={"mean": last}, unit="logits")


def _follows(run: Results[ToyConfig], what: str) -> Finding | None:
    return None if what == "none" else not_measured(f"It follows {what}", "nobody asked", "rate")


class Toy(Experiment[ToyConfig]):
    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy <script>alert(1)</script>"
    question: ClassVar[str] = "Does <b>the voice</b> win over the words & signs?"
    Config = ToyConfig
    tables: ClassVar[Mapping[str, str]] = {"delta": "a unit and depth", "odd": "a number"}
    defects = (
        Defect("C8", ("delta",), lambda config: config.is_zero, "the consistent curve is zero."),
    )
    controls = (
        Control(
            name="nothing is wrong",
            of=("delta",),
            guards_against="a wrong setting",
            check=lambda run: at_most([run.config.wrong], 0.5, "logits"),
        ),
        Control(
            name="odd numbers are none",
            of=("odd",),
            guards_against="nothing",
            check=lambda run: at_most([], 1.0),
        ),
    )
    claims = (
        Claim(name="rises", rests_on=("delta",), judge=_rises),
        Claim(
            name="follows_{}",
            rests_on=("odd",),
            judge=_follows,
            per=lambda run: ["words", "none", "signs"],
        ),
    )
    caveats = ("Mind <the> gap.",)
    # Not part of the settings: a second try of the same run goes on.
    interrupts: ClassVar[bool] = True
    n_run: ClassVar[int] = 0

    def identify(self) -> dict[str, Any]:
        if self.config.n_units > 50:
            raise InputError("counting units: got more than 50, expected fewer. Lower n_units.")
        return {
            "model": {"name": self.config.model, "weights_sha256": "0123456789abcdef" * 4},
            "label_ids": {"sad": 3, "高兴": 5},
            "floor": float("nan"),
        }

    def units(self) -> list[Unit]:
        # Not in the order of names: merging keeps the order given here.
        numbers = [*reversed(range(self.config.n_units))]
        chains = {n: f"zh_sad_{n + 3}" for n in numbers[3:]} if self.config.chains else {}
        return [Unit(f"zh_sad_{n}", n, after=chains.get(n)) for n in numbers]

    def measure(self, unit: Unit) -> UnitResult:
        time.sleep(600 if unit.payload == self.config.stays_at else self.config.delay_s)
        if unit.payload == self.config.interrupt_at and Toy.interrupts:
            raise KeyboardInterrupt
        if unit.payload == self.config.fails_at:
            raise InputError("measuring: got a unit that fails, expected another.")
        if unit.payload == self.config.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.after is not None:
            assert self.folder.is_done(unit.after)
        Toy.n_run += 1
        values = torch.rand(3, dtype=torch.float64) + np.random.rand()
        rows = [
            {"unit": unit.id, "depth": depth, "delta": value, "follows": value > 0.5}
            for depth, value in enumerate(values.tolist())
        ]
        odd = [float("nan"), float("inf"), float("-inf"), 0.1 + 0.2, np.float32(0.1)]
        return UnitResult({"delta": rows, "odd": [{"value": value} for value in odd]}, {"x": odd})

    def summaries(self, run: Results[ToyConfig]) -> Iterator[tuple[str, pd.DataFrame]]:
        yield "mean", run["delta"].groupby("depth").delta.agg(["mean", "min", "max"]).reset_index()

    def lead(self, run: Results[ToyConfig]) -> str:
        return "One.\n\nTwo."

    def page(self, page: Page, run: Results[ToyConfig]) -> None:
        mean, folder = run["mean"], page.folder
        folder.write_arrays("delta", {"delta": run["delta"]["delta"].to_numpy()}, delta="row")
        drawing = figures.curves(
            mean, "depth", lo="min", hi="max", title="Δlogit 高兴", reference=0
        )
        page.section("Curves", "First.\n\nSecond.")
        page.figure("mean", drawing, mean, "Mean & band", "Up is <text>.", "Self-patch: 0.")
        page.table("Means", "mean", max_rows=2)
        page.table("Given", [{"a": 1, "b": float("nan")}, {"c": "<i>"}])
        path = folder.path / "recording.wav"
        tone = 0.3 * np.sin(np.arange(44_100) / 44_100 * 2 * np.pi * 220)
        soundfile.write(path, np.stack([tone, tone], axis=1), 44_100)
        clip = report.Clip(folder.add_clip("tone", path), "tone", "mean", {"Δ": 0.5, "ℓ*": None})
        page.section("Clips")
        page.clips([clip], "A tone.")
        page.note("Mind.", is_warning=True)


def run_toy(
    out: Path,
    *,
    executor: Executor | None = None,
    shard: tuple[int, int] | None = None,
    **settings: Any,
) -> RunFolder:
    """Runs the toy; also in a process of its own."""
    return runner.run(Toy(ToyConfig(**settings)), out, executor=executor, shard=shard)


def run_toy_at_home(home: Path, out: Path, **settings: Any) -> None:
    """Runs the toy on Ray, by somebody whose home and temporary files are in a folder."""
    os.environ["HOME"] = str(home)
    os.environ["TMPDIR"] = str(home)
    run_toy(out, executor=RayActors(2), **settings)
