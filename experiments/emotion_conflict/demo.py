"""The demonstration: ``emotion_conflict`` on both bundled models, and what reverses between them.

The twins were trained on opposite rules. A conclusion about arbitration has to reverse from one to
the other, and what has nothing to do with arbitration has to stay. Outputs: a run folder for each
model, and ``comparison`` beside them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_alm.bundled import PREFIX
from hooked_alm.converters import parity

from ..materials.conflict_figures import draw_handoffs
from ..materials.conflict_runs import EXCHANGES
from ..workbench import figures, provenance, runner
from ..workbench.identity import fingerprint
from ..workbench.inert import for_terminal
from ..workbench.intervals import Draws
from ..workbench.page import Page
from ..workbench.render import render
from ..workbench.report import Headline, Report, read_report, report_lines, write_report
from ..workbench.results import Tables
from ..workbench.run_folder import RunFolder
from ..workbench.truths import TruthRow, compared
from .claims import total_effects
from .experiment import EmotionConflict
from .figures import BY_BLOCK, DELTA, DEPTH, in_order
from .settings import EmotionConflictConfig
from .truths import TEXT, TRUTHS, VOICE

TWINS = (TEXT, VOICE)
QUESTION = "What do the same measurements conclude about two models of opposite rules?"
LEAD = (
    "Both models hear the same clips and read the same prompts. When the instruction names "
    "another emotion than the voice's, follows_text was trained to answer the instruction's, "
    "follows_voice the voice's. A measurement of arbitration must come out the other way round on "
    "the other model, or it measures something else."
)
TABLES = ("delta_logit_curves", "patching", "patching_summary", "handoffs")
"""What the figures are made of."""


def main(out: Path) -> None:
    """Runs both models, verifies them, compares, and prints what came out.

    Raises:
        SystemExit: a model differs from Hugging Face's.
    """
    comparison = RunFolder(out / "comparison")
    comparison.check({})
    folders = {name: _run(name, out) for name in TWINS}
    verified = {name: parity.verify(PREFIX + name) for name in TWINS}
    verdicts = {name: found.verdict() for name, found in verified.items()}
    rows = [*compared(TRUTHS, folders)]
    page = write_comparison(comparison, folders, rows, verdicts)
    for line in summary(folders, rows, verdicts, page):
        print(for_terminal(line))
    if not all(found.passed for found in verified.values()):
        raise SystemExit(1)


def _run(name: str, out: Path) -> RunFolder:
    return runner.run(EmotionConflict(EmotionConflictConfig(model=PREFIX + name)), out / name)


def summary(
    folders: Mapping[str, RunFolder],
    rows: Sequence[TruthRow],
    verdicts: Mapping[str, str],
    page: Path,
) -> Iterator[str]:
    """Lines that the demonstration prints."""
    yield ""
    for name in TWINS:
        yield f"{verdicts[name]}  ({PREFIX}{name})"
    for name in TWINS:
        yield from ("", f"{PREFIX}{name}")
        yield from (f"  {line}" for line in report_lines(read_report(folders[name])))
    titles = {"reverses": "Reverses between the two models", "stays": "Stays the same"}
    for expectation, title in titles.items():
        yield from ("", f"{title}, as it must")
        for row in rows:
            if row.expectation == expectation:
                holds = "yes" if row.holds else "NO "
                yield f"  {holds}  {row.claim}: {' | '.join(row.in_words().values())}"
    yield from ("", *(str(folders[name].path / "report.html") for name in TWINS), str(page))


# --- The page


def write_comparison(
    folder: RunFolder,
    runs: Mapping[str, RunFolder],
    rows: Sequence[TruthRow],
    verdicts: Mapping[str, str],
) -> Path:
    """Writes the comparison's folder; returns its page."""
    tables = {
        name: {table: run.read_table(table) for table in TABLES} for name, run in runs.items()
    }
    found = pd.DataFrame([
        {"quantity": row.claim, **row.in_words(), "expectation": row.expectation,
         "holds": row.holds}
        for row in rows
    ])  # fmt: skip
    parts = {kind: found[found.expectation == kind] for kind in ("reverses", "stays")}
    with folder.lock():
        folder.start(_provenance(runs))
        folder.write_table("comparison", found, is_summary=True)
        page = Page(folder)
        _add_rows(page, "What must reverse", parts["reverses"])
        _add_effects(page, tables)
        _add_curves(page, tables)
        _add_handoffs(page, tables)
        _add_rows(page, "What must stay", parts["stays"])
        for name in TWINS:
            where = f"The whole report: ../{runs[name].path.name}/report.html"
            page.section(f"{PREFIX}{name}", f"{verdicts[name]}. {where}")
            for line in report_lines(read_report(runs[name])):
                page.note(line)
        report = Report(
            title="Two models of opposite rules",
            question=QUESTION,
            lead=LEAD,
            is_calibration=True,
            headlines=[
                _verdict("conclusions about arbitration reverse", parts["reverses"]),
                _verdict("other measurements stay the same", parts["stays"]),
            ],
            sections=page.sections,
        )
        write_report(folder, report)
        return render(folder)


def _provenance(runs: Mapping[str, RunFolder]) -> dict[str, Any]:
    known = {name: run.provenance for name, run in runs.items()}
    first = known[TWINS[0]]
    inputs = {
        "model": {name: one["inputs"]["model"]["weights_sha256"] for name, one in known.items()},
        "runs": {name: one["config_hash"] for name, one in known.items()},
    }
    identity = {"config": first["config"] | {"model": list(TWINS)}, "schema_version": 1}
    return {
        **identity,
        "experiment": "demo",
        "question": QUESTION,
        "command": "hooked-alm demo",
        "inputs": inputs,
        "environment": provenance.environment(),
        "config_hash": fingerprint(identity | {"inputs": inputs}),
    }


def _verdict(what: str, rows: pd.DataFrame) -> Headline:
    missing = list(rows[~rows.holds].quantity)
    text = f"{len(rows) - len(missing)} of {len(rows)} {what}."
    detail = f"Not so: {'; '.join(missing)}." if missing else "; ".join(rows.quantity)
    return Headline(text, established=not missing, detail=detail)


def _add_rows(page: Page, title: str, rows: pd.DataFrame) -> None:
    page.section(title)
    table = rows.rename(columns={"quantity": "measurement", "holds": "as expected"})
    page.table(
        "With 95 % intervals over clips; as expected only if both are sure",
        table[["measurement", "as expected", *TWINS]],
    )


def _both(tables: Mapping[str, Tables], name: str) -> pd.DataFrame:
    return pd.concat([tables[twin][name].assign(model=twin) for twin in TWINS], ignore_index=True)


def _add_effects(page: Page, tables: Mapping[str, Tables]) -> None:
    rows = []
    for twin in TWINS:
        effects = total_effects(tables[twin]["patching"])
        for donor, one in EXCHANGES.items():
            values = effects[donor].dropna()
            clips = values.index.get_level_values("clip").tolist()
            rows.append({"model": twin, "exchanged": one.what, **Draws(0, 2000).row(values, clips)})
    table = pd.DataFrame(rows)
    drawing = figures.bars(
        table, "exchanged", group="model", reference=0, title="What moves the answer",
        y_label="total effect (logits)",
    )  # fmt: skip
    page.figure(
        "total_effects", drawing, table,
        "How far the answer moves when the instruction or the voice is exchanged",
        "The tall bar is what the model listens to in a conflict; it must change sides.",
        "Each exchange changes one of the two and leaves the other as it was.",
    )  # fmt: skip


def _add_curves(page: Page, tables: Mapping[str, Tables]) -> None:
    both = _both(tables, "delta_logit_curves")
    both = in_order(both[both.stratum == "all"], "condition", ("conflict", "audio_only"))
    both = both.assign(curve=both.model + ", " + both.condition)
    drawing = figures.curves(
        both, "depth", group="curve", reference=0, title="Δlogit of both models",
        x_label=DEPTH, y_label=DELTA,
    )  # fmt: skip
    page.figure(
        "delta_logit", drawing, both,
        "Which emotion each model leans to, depth by depth",
        "Above zero the instruction's emotion leads. In conflict the two models must end on "
        "opposite sides.",
        "Without an instruction (audio_only) both must end below zero, with the voice.",
    )  # fmt: skip


def _add_handoffs(page: Page, tables: Mapping[str, Tables]) -> None:
    patching = _both(tables, "patching_summary")
    both = patching.merge(_both(tables, "handoffs")[["model", "donor", "span"]])
    both = both[both.recovery_mean.notna()].assign(curve=lambda t: t.model + ", " + t.span)
    exchanges = patching[patching.donor.isin(EXCHANGES)].groupby(["model", "donor"], sort=False)
    absent = [
        f"{model}, {donor}: {most.n_undefined} of {most.n}"
        for (model, donor), most in exchanges[["n_undefined", "n"]].max().iterrows()
        if most.n_undefined
    ]
    page.figure(
        "handoff", draw_handoffs(both, "block", "curve", x_label=BY_BLOCK, height=3.8), both,
        "Where information leaves its own positions for the readout",
        "Falling: how much of the donor's effect its own span still carries. Rising: how much is "
        "at the readout.",
        f"An item that the exchange hardly moves has no recovery: {'; '.join(absent)}."
        if absent
        else "Every item has a recovery.",
    )  # fmt: skip
