"""From merged tables to summaries, verdicts, the page and its report: once, for all experiments."""

from dataclasses import replace
from typing import Any

from .claims import Finding, Verdict
from .experiment import Experiment
from .intervals import HOW_MADE
from .page import Page
from .report import Headline, Report, write_report
from .results import Results, Tables
from .run_folder import RunFolder

CONTROLS = "What has to come out if the measurements are what they claim to be."


def conclude(
    experiment: Experiment[Any], inputs: dict[str, Any], tables: Tables, folder: RunFolder
) -> None:
    """Writes summaries, the verdicts, figures and ``report.json`` into the run's folder."""
    run = experiment.results(experiment.config, inputs, tables)
    for name, table in experiment.summaries(run):
        run.tables[name] = table
        folder.write_table(name, table, is_summary=True)
    verdict = experiment.judge(run)
    for name, table in (("controls", verdict.controls), ("findings", verdict.table())):
        run.tables[name] = table
        folder.write_table(name, table, is_summary=True)
    page = Page(folder)
    experiment.page(page, run)
    _add_verdict(page, verdict)
    _add_method(page, experiment, run)
    report = Report(
        title=f"{experiment.title}: {experiment.config.subject}",
        question=experiment.question,
        lead=_lead(experiment, run),
        is_calibration=experiment.config.is_calibration,
        warnings=verdict.warnings,
        headlines=[_headline(one) for one in verdict.findings.values()],
        sections=page.sections,
    )
    write_report(folder, report)


def _headline(one: Finding) -> Headline:
    because = f"Because: {'; '.join(one.doubts)}. " if one.doubts else ""
    return Headline(f"{one.claim}.", one.established, detail=f"{because}{one.facts}.")


def _lead(experiment: Experiment[Any], run: Results[Any]) -> str:
    lead = experiment.lead(run)
    if run.config.variant == "seed":
        lead += "\n\nThis is the seed variant: it reproduces the seed document's own formulas."
    return lead


def _add_verdict(page: Page, verdict: Verdict) -> None:
    # A page may have begun the section with a figure of its own.
    if not page.sections or page.sections[-1].title != "Controls":
        page.section("Controls")
    page.sections[-1] = replace(page.sections[-1], text=CONTROLS)
    page.table("Controls", verdict.controls)
    page.table("Claims with their numbers", verdict.table().drop(columns="statement"))


def _add_method(page: Page, experiment: Experiment[Any], run: Results[Any]) -> None:
    parts = [experiment.method(run), HOW_MADE, *experiment.caveats]
    page.section("Methods and caveats", "\n\n".join(filter(None, parts)))
    rows = [{"table": f"tables/{k}", "a row is": v} for k, v in experiment.tables.items()]
    page.table("What was measured", rows)
