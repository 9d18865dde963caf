"""The figures of held-out probes: every column by depth, beside what is read without the model."""

from typing import Any

import pandas as pd

from ..workbench import figures
from ..workbench.page import Page
from .clips import file_safe
from .probe_tables import ProbeResults, columns_of, streams_of

BAND = "Bands are 95 % bootstrap intervals over what is held out together, each depth by itself."
PROBE_CAVEATS = (
    "Not causal: that a probe reads something does not say that the model uses it. What is used, "
    "only patching and ablation show.",
    "Claims compare the best of all depths, with ends of intervals that hold at every depth at "
    "once, but each claim by itself: of many claims, some hold by chance. Of few speakers, only "
    "large differences are sure.",
    "Selectivity is measured in folds that have every type on both sides, as memorising needs. Its "
    "accuracies are those of known speakers and texts, not of new ones.",
)


def what_was_read(run: ProbeResults) -> str:
    """Columns and their sizes, in words."""
    parts = []
    for column in columns_of(run):
        own = _clips_of(run, column)
        parts.append(
            f"{column} ({own.value.nunique()} values, {len(own)} clips of {own.group.nunique()} "
            "groups)"
        )
    return ", ".join(parts)


def read_by_whom(run: ProbeResults) -> str:
    """What the probes had learnt from that read a clip."""
    others = "groups" if run.config.cv == "grouped" else "clips"
    return f"Each clip is read by a probe that was trained on other {others}."


def how_probed(run: ProbeResults) -> str:
    """How probes and their intervals were made."""
    config = run.config
    folds = ", ".join(f"{c} {_clips_of(run, c).fold.nunique()}" for c in columns_of(run))
    alike = ""
    if config.match_duration_s is not None:
        alike = (
            "Of each label as many clips are read, put together so that their durations differ by "
            f"at most {config.match_duration_s:g} s; the others are left out. "
        )
    return (
        f"{alike}Multinomial logistic regression, features standardised on the training items; its "
        "strength from 0.001 to 100 by folds within the training groups. Folds "
        f"({config.cv}): {folds}. Selectivity and description length use the middle of the folds' "
        "strengths; shuffled labels those of each fold. Intervals resample what is held out "
        f"together {config.n_resamples} times with seed {config.seed}."
    )


def _clips_of(run: ProbeResults, column: str) -> pd.DataFrame:
    """A row for each clip that has a column."""
    return run["reads"][run["reads"].label == column].drop_duplicates("clip")


def fill_with_probes(page: Page, run: ProbeResults) -> None:
    """Every column by depth, then all tables."""
    for column in columns_of(run):
        page.section(column)
        _accuracy(page, run, column)
        _area(page, run, column)
        _selectivity(page, run, column)
        _code_length(page, run, column)
    page.section("All numbers")
    page.table("Best depths, with intervals over what groups are drawn", "depths")
    page.table("Baselines", "baselines")
    page.table("Probes, of the model and of random weights", "probes")
    page.table("Selectivity", "selectivity")
    page.table("Description length", "mdl")


def _mine(table: pd.DataFrame, column: str, of: str, source: str = "model") -> pd.DataFrame:
    return table[(table.label == column) & (table.source == source)].assign(of=of)


def _levels(run: ProbeResults, table: str, column: str, value: str) -> pd.DataFrame:
    """What is read without the states, at every depth alike: best, and by the commonest label."""
    every = run[table]
    own = _mine(every, column, "", "baseline").set_index("point")[value]
    best = own.drop("majority").fillna(-1).idxmax()
    names = {best: f"best baseline: {run.inputs['baselines'][best]}"}
    if value == "accuracy":
        names["majority"] = "commonest label"
    places = _mine(run["probes"], column, "")[["label", "stream", "depth"]]
    return pd.concat([
        places.assign(of=name, **{value: own[point], "low": own[point], "high": own[point]})
        for point, name in names.items()
    ])  # fmt: skip


def _draw(
    page: Page, run: ProbeResults, name: str, parts: list[pd.DataFrame], value: str, caption: str,
    how: str, controls: str = "", **options: Any,
) -> None:  # fmt: skip
    """A panel for each stream, with a curve for each table."""
    some = pd.concat(parts)
    some = some[[c for c in ("label", "stream", "depth", "of", value, "low", "high") if c in some]]
    drawing = figures.panels(
        figures.curves,
        [
            (some[some.stream == stream], {
                "title": f"In the {stream}", "x_label": f"depth of the {stream} (blocks passed)",
            })
            for stream in streams_of(run)
        ],
        x="depth", y=value, group="of", **options,
    )  # fmt: skip
    page.figure(name, drawing, some, caption, how, controls)


def _accuracy(page: Page, run: ProbeResults, column: str) -> None:
    parts = [
        _mine(run["probes"], column, "probe"),
        _mine(run["probes"], column, "random weights", "untrained"),
        _mine(run["shuffled"], column, "shuffled labels"),
        _levels(run, "baselines", column, "accuracy"),
    ]
    _draw(
        page, run, f"accuracy_{file_safe(column)}", parts, "accuracy",
        f"How often {column} is read rightly, of what the probe was not trained on",
        f"What is read without states is level; of baselines, the best is drawn. {BAND}",
        "Shuffled labels have to be at chance, and no group on both sides of a fold.",
        y_limits=(-0.03, 1.03), y_label="accuracy",
    )  # fmt: skip


def _area(page: Page, run: ProbeResults, column: str) -> None:
    parts = [
        _mine(run["probes"], column, "probe"),
        _mine(run["probes"], column, "random weights", "untrained"),
        _levels(run, "baselines", column, "auroc"),
    ]
    _draw(
        page, run, f"area_{file_safe(column)}",
        [part.drop(columns=["low", "high"]) for part in parts], "auroc",
        f"How well probes order clips by {column}",
        "The area under the ROC curve, mean over labels: the share of pairs of a clip that has the "
        "label and one that has not, both of one fold, in which the former is given more. It does "
        "not depend on how common labels are; the line is at chance.",
        y_limits=(-0.03, 1.03), y_label="area under the curve", reference=0.5,
    )  # fmt: skip


def _selectivity(page: Page, run: ProbeResults, column: str) -> None:
    mine = _mine(run["selectivity"], column, "selectivity")
    if mine.selectivity.isna().all():
        page.note(f"No two clips with {column} share a type: selectivity is not measured.")
        return
    names = {"known_hit": column, "control_hit": "control labels"}
    parts = [
        mine.assign(of=name, selectivity=mine[value], low=mine[value], high=mine[value])
        for value, name in names.items()
    ]
    _draw(
        page, run, f"selectivity_{file_safe(column)}", [*parts, mine], "selectivity",
        f"{column} against labels that a probe can only memorise",
        f"Control labels are a random function of a clip's type; the difference is selectivity. "
        f"{BAND}", height=3.2, y_label="accuracy", reference=0,
    )  # fmt: skip


def _code_length(page: Page, run: ProbeResults, column: str) -> None:
    parts = [
        _mine(run["mdl"], column, "probe"),
        _mine(run["mdl"], column, "random weights", "untrained"),
        _levels(run, "mdl", column, "compression").drop(columns=["low", "high"]),
    ]
    _draw(
        page, run, f"code_length_{file_safe(column)}", parts, "compression",
        f"How much shorter the labels of {column} can be told to someone who has the states",
        "By the online code: a probe that reads easily, from few clips, tells them in fewer bits. "
        "The line at 1 is what is needed without any state.",
        height=3.2, y_label="times shorter", reference=1,
    )  # fmt: skip
