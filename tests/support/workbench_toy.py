"""A small experiment to test the workbench: no model, awkward numbers, every report item."""

import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import soundfile
import torch
from pydantic import BaseModel, ConfigDict, Field

from hooked_alm.errors import InputError
from hooked_alm.experiments.workbench import figures, report, runner
from hooked_alm.experiments.workbench.experiment import (
    Experiment,
    ExperimentConfig,
    Unit,
    UnitResult,
)
from hooked_alm.experiments.workbench.run_folder import RunFolder


class Lens(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    depths: list[int] = [0, 1, 2]
    norm: str = "final"


class ToyConfig(ExperimentConfig):
    n_threads: int | None = Field(default=1, ge=1)
    n_units: int = 4
    delay_s: float = 0.0
    interrupt_at: int | None = None
    audio: str | None = None
    lens: Lens = Lens()


class Toy(Experiment[ToyConfig]):
    name: ClassVar[str] = "toy"
    question: ClassVar[str] = "Does <b>the voice</b> win over the words & signs?"
    Config = ToyConfig
    # Not part of the settings: a second try of the same run goes on.
    interrupts: ClassVar[bool] = True
    n_run: ClassVar[int] = 0

    def open(self) -> dict[str, Any]:
        if self.config.n_units > 50:
            raise InputError("counting units: got more than 50, expected fewer. Lower n_units.")
        defects = {"C8": "the consistent curve is zero"} if self.config.variant == "seed" else {}
        return {
            "model": {"name": self.config.model, "weights_sha256": "0123456789abcdef" * 4},
            "label_ids": {"sad": 3, "高兴": 5},
            "floor": float("nan"),
            "known_defects": defects,
        }

    def units(self) -> list[Unit]:
        # Not in the order of names: merging keeps the order given here.
        return [Unit(f"zh_sad_{index}", index) for index in reversed(range(self.config.n_units))]

    def run_unit(self, unit: Unit) -> UnitResult:
        time.sleep(self.config.delay_s)
        if unit.payload == self.config.interrupt_at and Toy.interrupts:
            raise KeyboardInterrupt
        Toy.n_run += 1
        values = torch.rand(3, dtype=torch.float64) + np.random.rand()
        rows = [
            {"unit": unit.id, "depth": depth, "delta": value, "follows": value > 0.5}
            for depth, value in enumerate(values.tolist())
        ]
        odd = [float("nan"), float("inf"), float("-inf"), 0.1 + 0.2, np.float32(0.1)]
        return UnitResult({"delta": rows, "odd": [{"value": value} for value in odd]}, {"x": odd})

    def conclude(self, tables: dict[str, pd.DataFrame], folder: RunFolder) -> report.Report:
        delta = tables["delta"]
        mean = delta.groupby("depth")["delta"].agg(["mean", "min", "max"]).reset_index()
        folder.write_table("mean", mean, is_summary=True)
        folder.write_arrays("delta", {"delta": delta["delta"].to_numpy()}, delta="row")
        figure = figures.curves_with_band(
            mean, "depth", "mean", lo="min", hi="max", title="Δlogit 高兴", reference=0
        )
        figures.save_figure(folder, "mean", figure, mean)
        path = folder.path / "recording.wav"
        tone = 0.3 * np.sin(np.arange(44_100) / 44_100 * 2 * np.pi * 220)
        soundfile.write(path, np.stack([tone, tone], axis=1), 44_100)
        clip = report.Clip(folder.add_clip("tone", path), "tone", "mean", {"Δ": 0.5, "ℓ*": None})
        is_shown = bool(mean["mean"].iloc[-1] > 0)
        return report.Report(
            title="Toy <script>alert(1)</script>",
            question=self.question,
            lead="One.\n\nTwo.",
            is_calibration=True,
            headlines=[
                report.Headline("It rises", established=is_shown, detail="0.5 [0.1, 0.9]"),
                report.Headline("It falls", established=False),
            ],
            sections=[
                report.Section(
                    "Curves",
                    "First.\n\nSecond.",
                    [
                        report.Figure("mean", "Mean & band", "Up is <text>.", "Self-patch: 0."),
                        report.Table("Means", name="mean", max_rows=2),
                        report.Table("Given", rows=[{"a": 1, "b": float("nan")}, {"c": "<i>"}]),
                    ],
                ),
                report.Section(
                    "Clips", items=[report.Clips([clip]), report.Note("Mind.", "warning")]
                ),
            ],
        )


def run_toy(out: Path, **settings: Any) -> RunFolder:
    """Runs the toy; also in a process of its own."""
    return runner.run(Toy(ToyConfig(**settings)), out)
