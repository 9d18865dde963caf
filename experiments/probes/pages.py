"""The page of a ``probes`` run: every column by depth, beside what is read without the model."""

from typing import Any

import pandas as pd

from ..materials.clips import file_safe, of_whom
from ..workbench import figures
from ..workbench.page import Page
from .measure import BASELINES
from .tables import ProbeResults, columns_of, streams_of

BAND = "Bands are 95 % bootstrap intervals over what is held out together, each depth by itself."
CAVEATS = (
    "Not causal: that a probe reads something does not say that the model uses it. What is used, "
    "only patching and ablation show.",
    "A probe is linear and reads a mean over positions: what is there in another form, or in the "
    "order of frames alone, stays unread.",
    "Claims compare the best of all depths, with ends of intervals that hold at every depth at "
    "once, but each claim by itself: of many claims, some hold by chance. Of few speakers, only "
    "large differences are sure.",
    "The model with random weights has this model's sizes and spreads of weights, and still hears: "
    "what is read off it is what its shape alone leaves of the sound.",
    "Selectivity is measured in folds that have every type on both sides, as memorising needs. Its "
    "accuracies are those of known speakers and texts, not of new ones.",
)


def lead(run: ProbeResults) -> str:
    """What was read of what."""
    sizes = [
        f"{one['column']} ({len(one['values'])} values, {sum(one['values'].values())} clips of "
        f"{one['groups']} groups)"
        for one in run.inputs["labels"]
    ]
    untrained = ", and probes of the same model with random weights"
    return (
        f"Probes read {', '.join(sizes)} off {len(run.inputs['points'])} points of the "
        f"{' and the '.join(streams_of(run))}. Each clip is read by a probe that was trained on "
        f"{'other groups' if run.config.cv == 'grouped' else 'other clips'}. Beside them stand "
        "probes that have only the clip's duration or mean spectrum, or nothing; probes of labels "
        f"that were dealt out at random{untrained if run.config.untrained else ''}. "
        f"The clips: {of_whom(run['manifest'])}."
    )


def fill_page(page: Page, run: ProbeResults) -> None:
    """Every column by depth, then all tables."""
    for column in columns_of(run):
        page.section(column)
        _accuracy(page, run, column)
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
    """What is read without the model, at every depth alike."""
    every = run[table]
    own = _mine(every, column, "", "baseline").set_index("point")[value]
    places = _mine(run["probes"], column, "")[["label", "stream", "depth"]]
    return pd.concat([
        places.assign(of=name, **{value: own[point], "low": own[point], "high": own[point]})
        for point, name in BASELINES.items()
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
        f"What is read without the model is level. {BAND}",
        "Shuffled labels have to be at chance, and no group on both sides of a fold.",
        y_limits=(-0.03, 1.03), y_label="accuracy",
    )  # fmt: skip


def _selectivity(page: Page, run: ProbeResults, column: str) -> None:
    mine = _mine(run["selectivity"], column, "selectivity")
    if mine.selectivity.isna().all():
        page.note(f"No two clips with a {column} share a type: selectivity is not measured.")
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


def method(run: ProbeResults) -> str:
    """How probes and intervals were made."""
    config = run.config
    folds = ", ".join(f"{one['column']} {one['folds']}" for one in run.inputs["labels"])
    return (
        f"Model: {config.model}, {config.dtype}. Of the decoder the mean over the span "
        f"{run.inputs['span']}, of the encoder that over the clip's frames. Multinomial logistic "
        "regression, features standardised on the training items; its strength from 0.001 to 100 "
        f"by folds within the training groups. Folds ({config.cv}): {folds}. Selectivity and "
        "description length use the middle of the folds' strengths; shuffled labels those of each "
        "fold. Intervals resample what is held out together "
        f"{config.n_resamples} times with seed {config.seed}."
    )
