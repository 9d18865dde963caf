"""The demonstration: ``emotion_conflict`` on both bundled models, and what reverses between them.

The twins were trained on opposite rules. A conclusion about arbitration has to reverse from one to
the other, and what has nothing to do with arbitration has to stay.

Source: DESIGN section 9; outputs: a run folder for each model, and ``comparison`` beside them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from hooked_alm.converters import parity
from hooked_alm.methods.statistics.bootstrap import bootstrap_mean

from ..materials.bundled import PREFIX, model_folder
from ..workbench import figures, provenance, runner
from ..workbench.controls import FAIL
from ..workbench.experiment import Tables
from ..workbench.render import render
from ..workbench.report import (
    Figure,
    Headline,
    Note,
    Report,
    Section,
    Table,
    headline_lines,
    read_report,
    write_report,
)
from ..workbench.run_folder import RunFolder, fingerprint
from .claims import total_effects
from .experiment import EmotionConflict
from .settings import EmotionConflictConfig

TWINS = ("follows_text", "follows_voice")
TABLES = (
    *("ob1_flip_summary", "accuracy", "delta_logit_curves", "findings", "controls"),
    *("patching", "patching_summary", "handoffs"),
)
QUESTION = "What do the same measurements conclude about two models of opposite rules?"
LEAD = (
    "Both models hear the same clips and read the same prompts. When the instruction names "
    "another emotion than the voice's, follows_text was "
    "trained to answer the instruction's, follows_voice the voice's. A measurement of "
    "arbitration must come out the other way round on the other model, or it measures "
    "something else."
)

Expectation = Literal["reverses", "stays"]


class Estimate(NamedTuple):
    """A number with its interval."""

    mean: float
    low: float
    high: float

    def side(self, of: float) -> int:
        """1 if the whole interval is above a value, −1 if below, 0 if neither is sure."""
        return int(self.low > of) - int(self.high < of)

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


class TwinComparison(NamedTuple):
    """One measurement on both twins, and whether it does between them what it should."""

    quantity: str
    follows_text: str
    follows_voice: str
    expectation: Expectation
    holds: bool


def main(out: Path) -> None:
    """Runs both models, verifies them, compares, and prints what came out.

    Raises:
        SystemExit: a model differs from Hugging Face's.
    """
    folders = {name: _run(name, out) for name in TWINS}
    verified = {name: parity.verify(model_folder(PREFIX + name)) for name in TWINS}
    verdicts = {name: found.verdict() for name, found in verified.items()}
    tables = {
        name: {table: folder.read_table(table) for table in TABLES}
        for name, folder in folders.items()
    }
    compared = compare(tables)
    page = write_comparison(RunFolder(out / "comparison"), folders, tables, compared, verdicts)
    print("\n".join(summary(folders, compared, verdicts, page)))
    if not all(found.passed for found in verified.values()):
        raise SystemExit(1)


def _run(name: str, out: Path) -> RunFolder:
    return runner.run(EmotionConflict(EmotionConflictConfig(model=PREFIX + name)), out / name)


def summary(
    folders: Mapping[str, RunFolder],
    compared: list[TwinComparison],
    verdicts: Mapping[str, str],
    page: Path,
) -> Iterator[str]:
    """What the demonstration prints."""
    yield ""
    for name in TWINS:
        yield f"{verdicts[name]}  ({PREFIX}{name})"
    for name in TWINS:
        yield from ("", f"{PREFIX}{name}")
        yield from (f"  {line}" for line in headline_lines(read_report(folders[name])))
    titles: dict[Expectation, str] = {
        "reverses": "Reverses between the two models, as it must",
        "stays": "Stays the same, as it must",
    }
    for expectation, title in titles.items():
        yield from ("", title)
        for row in compared:
            if row.expectation == expectation:
                holds = "yes" if row.holds else "NO "
                yield f"  {holds}  {row.quantity}: {row.follows_text} | {row.follows_voice}"
    yield ""
    for name in TWINS:
        yield str(folders[name].path / "report.html")
    yield str(page)


# --- Comparing


def compare(tables: Mapping[str, Tables]) -> list[TwinComparison]:
    """Every measurement that both runs made, from their summary tables."""
    found = {name: _estimates(tables[name]) for name in TWINS}
    rows = []
    for quantity, (expectation, middle) in _EXPECTED.items():
        text, voice = (found[name][quantity] for name in TWINS)
        sides = text.side(middle), voice.side(middle)
        holds = sides[0] == (-sides[1] if expectation == "reverses" else sides[1]) != 0
        rows.append(TwinComparison(quantity, str(text), str(voice), expectation, holds))
    failed = [_failed(tables[name]["controls"]) for name in TWINS]
    shown = [", ".join(names) or "none fails" for names in failed]
    rows.append(TwinComparison("controls", shown[0], shown[1], "stays", not any(failed)))
    return rows


def _failed(controls: pd.DataFrame) -> list[str]:
    return list(controls[controls.verdict == FAIL].control)


_EXPECTED: dict[str, tuple[Expectation, float]] = {
    "answers T in conflict (rate)": ("reverses", 0.5),
    "answers A in conflict (rate)": ("reverses", 0.5),
    "Δlogit in conflict, at the output": ("reverses", 0.0),
    "H2, TE(text) − TE(voice) (logits)": ("reverses", 0.0),
    "hears the voice: A under audio_only (rate)": ("stays", 0.5),
    "A under consistent (rate)": ("stays", 0.5),
    "A under mention_only (rate)": ("stays", 0.5),
    "Δlogit in audio_only, at the output": ("stays", 0.0),
}
"""Quantity -> whether it reverses, and the value whose two sides are opposite conclusions."""


def _estimates(tables: Tables) -> dict[str, Estimate]:
    flips = tables["ob1_flip_summary"]
    flips = flips[flips.among == "audio_only_correct"].set_index("measure")
    heard = tables["accuracy"]
    heard = heard[heard.answer == "the voice (A)"].set_index("condition")
    delta = tables["delta_logit_curves"]
    delta = delta[(delta.stratum == "all") & (delta.depth == delta.depth.max())]
    delta = delta.set_index("condition").rename(columns={"mean": "rate"})
    claims = tables["findings"].set_index("claim").rename(columns={"estimate": "rate"})
    values = (
        *(flips.loc["text_follow"], flips.loc["audio_follow"]),
        *(delta.loc["conflict"], claims.loc["H2_dominance"]),
        *(heard.loc[mode] for mode in ("audio_only", "consistent", "mention_only")),
        delta.loc["audio_only"],
    )
    found = (Estimate(float(row["rate"]), float(row["low"]), float(row["high"])) for row in values)
    return dict(zip(_EXPECTED, found, strict=True))


# --- The page


def write_comparison(
    folder: RunFolder,
    runs: Mapping[str, RunFolder],
    tables: Mapping[str, Tables],
    compared: list[TwinComparison],
    verdicts: Mapping[str, str],
) -> Path:
    """Writes the comparison's folder; returns its page."""
    with folder.lock():
        folder.start(_provenance(runs))
        folder.write_table(
            "comparison", pd.DataFrame([row._asdict() for row in compared]), is_summary=True
        )
        write_report(folder, _report(folder, runs, tables, compared, verdicts))
        return render(folder)


def _provenance(runs: Mapping[str, RunFolder]) -> dict[str, Any]:
    of_runs = {name: run.provenance for name, run in runs.items()}
    first = of_runs[TWINS[0]]
    inputs = {
        "model": {name: run["inputs"]["model"]["weights_sha256"] for name, run in of_runs.items()},
        "runs": {name: run["config_hash"] for name, run in of_runs.items()},
    }
    identity = {"config": first["config"] | {"model": list(TWINS)}, "schema_version": 1}
    return {
        **identity,
        "experiment": "demo",
        "question": QUESTION,
        "command": "hooked-alm demo",
        "n_threads": first["n_threads"],
        "inputs": inputs,
        "environment": provenance.environment(),
        "config_hash": fingerprint(identity | {"inputs": inputs}),
    }


def _report(
    folder: RunFolder,
    runs: Mapping[str, RunFolder],
    tables: Mapping[str, Tables],
    compared: list[TwinComparison],
    verdicts: Mapping[str, str],
) -> Report:
    parts: dict[Expectation, list[TwinComparison]] = {
        wanted: [row for row in compared if row.expectation == wanted]
        for wanted in ("reverses", "stays")
    }
    drawn = [_effects(folder, tables), _curves(folder, tables), _handoffs(folder, tables)]
    own = [
        Section(
            f"{PREFIX}{name}",
            f"{verdicts[name]}. The whole report: ../{runs[name].path.name}/report.html",
            [Note(line) for line in headline_lines(read_report(runs[name]))],
        )
        for name in TWINS
    ]
    return Report(
        title="Two models of opposite rules",
        question=QUESTION,
        lead=LEAD,
        is_calibration=True,
        headlines=[
            _verdict("conclusions about arbitration reverse", parts["reverses"]),
            _verdict("other measurements stay the same", parts["stays"]),
        ],
        sections=[
            Section("What must reverse", items=[_table(parts["reverses"]), *drawn]),
            Section("What must stay", items=[_table(parts["stays"])]),
            *own,
        ],
    )


def _verdict(what: str, rows: list[TwinComparison]) -> Headline:
    missing = [row.quantity for row in rows if not row.holds]
    text = f"{len(rows) - len(missing)} of {len(rows)} {what}."
    detail = f"Not so: {'; '.join(missing)}." if missing else "; ".join(r.quantity for r in rows)
    return Headline(text, established=not missing, detail=detail)


def _table(rows: list[TwinComparison]) -> Table:
    shown = [
        {"measurement": r.quantity, "as expected": r.holds}
        | {name: getattr(r, name) for name in TWINS}
        for r in rows
    ]
    return Table("With 95 % intervals over clips; as expected only if both are sure", rows=shown)


def _both(tables: Mapping[str, Tables], name: str) -> pd.DataFrame:
    return pd.concat([tables[twin][name].assign(model=twin) for twin in TWINS], ignore_index=True)


def _effects(folder: RunFolder, tables: Mapping[str, Tables]) -> Figure:
    rows = []
    for twin in TWINS:
        effects = total_effects(tables[twin]["patching"])
        for donor, what in (("text_swap", "instruction"), ("audio_swap", "voice")):
            values = effects[donor].dropna()
            found = bootstrap_mean(
                values.to_numpy(np.float64),
                seed=0,
                clusters=values.index.get_level_values("clip").tolist(),
            )
            estimate = Estimate(float(found.mean), float(found.low), float(found.high))
            rows.append({"model": twin, "exchanged": what, "n": found.n, **estimate._asdict()})
    table = pd.DataFrame(rows)
    figure = figures.bars(
        table, "exchanged", "mean", lo="low", hi="high", group="model", reference=0,
        title="What moves the answer", y_label="total effect (logits)",
    )  # fmt: skip
    figures.save_figure(folder, "total_effects", figure, table)
    return Figure(
        "total_effects",
        "How far the answer moves when the instruction or the voice is exchanged",
        "The tall bar is what the model listens to in a conflict; it must change sides.",
        "Each exchange changes one of the two and leaves the other as it was.",
    )


def _curves(folder: RunFolder, tables: Mapping[str, Tables]) -> Figure:
    both = _both(tables, "delta_logit_curves")
    both = both[(both.stratum == "all") & both.condition.isin(["conflict", "audio_only"])]
    both = both.assign(curve=both.model + ", " + both.condition).sort_values(
        ["condition", "model", "depth"], ascending=[False, True, True]
    )
    figure = figures.curves_with_band(
        both, "depth", "mean", lo="low", hi="high", group="curve", reference=0,
        title="Δlogit of both models", x_label="depth (blocks passed)",
        y_label="Δlogit: T minus A",
    )  # fmt: skip
    figures.save_figure(folder, "delta_logit", figure, both)
    return Figure(
        "delta_logit",
        "Which emotion each model leans to, depth by depth",
        "Above zero the instruction's emotion leads. In conflict the two models must end on "
        "opposite sides.",
        "Without an instruction (audio_only) both must end below zero, with the voice.",
    )


def _handoffs(folder: RunFolder, tables: Mapping[str, Tables]) -> Figure:
    both = _both(tables, "patching_summary").merge(
        _both(tables, "handoffs")[["model", "donor", "span"]], on=["model", "donor", "span"]
    )
    both = both[both.recovery_mean.notna()].assign(curve=lambda t: t.model + ", " + t.span)
    panels = figures.new_axes(2, height=3.8)
    for axes, (donor, title) in zip(
        panels,
        {"text_swap": "Instruction exchanged", "audio_swap": "Voice exchanged"}.items(),
        strict=True,
    ):
        figure = figures.curves_with_band(
            both[both.donor == donor], "block", "recovery_mean", lo="recovery_low",
            hi="recovery_high", group="curve", reference=0.5, title=title,
            x_label="block (its output is patched)", y_label="recovery", axes=axes,
        )  # fmt: skip
    figures.save_figure(folder, "handoff", figure, both)
    absent = "; ".join(_undefined(tables))
    return Figure(
        "handoff",
        "Where information leaves its own positions for the readout",
        "Falling: how much of the donor's effect its own span still carries. Rising: how much is "
        "at the readout.",
        f"An item that the exchange hardly moves has no recovery: {absent}."
        if absent
        else "Every item has a recovery.",
    )


def _undefined(tables: Mapping[str, Tables]) -> Iterator[str]:
    for twin in TWINS:
        summary = tables[twin]["patching_summary"]
        for donor in ("text_swap", "audio_swap"):
            rows = summary[summary.donor == donor]
            if rows.n_undefined.max():
                yield f"{twin}, {donor}: {rows.n_undefined.max()} of {rows.n.max()}"
