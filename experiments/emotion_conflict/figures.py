"""The figures of an ``emotion_conflict`` report, drawn from its summary tables.

Every function saves one figure with its numbers and says how to read it; None if the run measured
nothing to show.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..workbench import figures, report
from ..workbench.experiment import Tables
from ..workbench.run_folder import RunFolder

MAIN = ("audio_only", "conflict", "consistent")
DELTA = "Δlogit: T minus A"
BY_BLOCK = "block (its output is patched)"
TEXT_SPANS = ("text", "audio", "readout")
BAND = "Bands are 95 % bootstrap intervals over clips, each depth by itself."


def delta_figure(
    folder: RunFolder,
    name: str,
    summaries: Tables,
    conditions: Sequence[str],
    title: str,
    *,
    is_matched: bool,
) -> report.Figure | None:
    """Mean Δlogit of some conditions over depth."""
    table = summaries["delta_logit_curves"]
    table = _in_order(table[table.stratum == "all"], "condition", conditions)
    if table.empty:
        return None
    figure = figures.curves_with_band(
        table, "depth", "mean", lo="low", hi="high", group="condition", reference=0,
        title=title, x_label="depth (blocks passed)", y_label=DELTA,
    )  # fmt: skip
    figures.save_figure(folder, name, figure, table)
    contrast = "every condition is read with the T and A of its conflict item"
    if not is_matched:
        contrast = "consistent is a label minus itself, 0 (defect C8)"
    return report.Figure(
        name,
        f"{title}: which emotion the model leans to, depth by depth",
        f"Above zero the instruction's emotion T leads, below zero the voice's A; {contrast}. "
        f"{BAND}",
        "The last depth must equal the model's own logits. A lens says what could be read at a "
        "depth, not what the model uses there; see its fidelity below.",
    )


def answers_figure(folder: RunFolder, summaries: Tables) -> report.Figure:
    """What the final answer follows, by condition."""
    table = summaries["accuracy"]
    figure = figures.bars(
        table, "condition", "rate", lo="low", hi="high", group="answer",
        title="What the answer follows", y_label="share of items",
    )  # fmt: skip
    figure.axes[0].set_ylim(0, 1.05)
    figures.save_figure(folder, "answers_by_condition", figure, table)
    return report.Figure(
        "answers_by_condition",
        "The final answer by condition",
        "Bars of one condition add up to 1; whiskers are 95 % Wilson intervals.",
        "mention_only names T without asking for it, list_all names every label, "
        "irrelevant_adjective asks for the tone of no emotion: if T rises there too, the word is "
        "copied, not obeyed."
        if "mention_only" in set(table.condition)
        else "None: no prompt names T without asking for it, so copying may look like obeying.",
    )


def flip_figure(folder: RunFolder, summaries: Tables) -> report.Figure:
    """Flip rate by voice and named emotion."""
    table = summaries["flip_matrix"]
    figure = figures.heat_map(
        table, "named", "voice", "rate", limits=(0, 1), title="Flips by voice and instruction",
        x_label="instruction names (T)", y_label="voice (A)", value_label="flip rate",
    )  # fmt: skip
    figures.save_figure(folder, "flip_matrix", figure, table)
    return report.Figure(
        "flip_matrix",
        "How often the conflicting instruction changes the answer",
        "1 means that every clip of that voice is answered differently than without an "
        "instruction; grey cells were not asked for.",
        "Few clips stand behind a cell (see n in the numbers): read rows, not cells.",
    )


def recovery_figure(
    folder: RunFolder, summaries: Tables, donor: str, what: str
) -> report.Figure | None:
    """Mean recovery of one donor by block and span."""
    table = summaries["patching_summary"]
    table = table[table.donor == donor]
    shares = table.recovery_mean[table.recovery_mean.notna()]
    if shares.empty:
        return None
    figure = figures.heat_map(
        # Cells have room for one decimal; the numbers beside the figure have all.
        table.assign(recovery_mean=table.recovery_mean.round(1) + 0.0),
        "block", "span", "recovery_mean", centre=0,
        limits=(min(-1.0, shares.min()), max(1.0, shares.max())),
        title=f"Patching in {what}", x_label=BY_BLOCK, y_label="span", value_label="recovery",
    )  # fmt: skip
    figures.save_figure(folder, f"recovery__{donor}", figure, table)
    n, n_undefined = int(table.n.max()), int(table.n_undefined.max())
    left_out = f" {n_undefined} of {n} items change too little to have one." if n_undefined else ""
    return report.Figure(
        f"recovery__{donor}",
        f"How much of the donor's answer each span brings: {what}",
        "1 (red): patching this span after this block brings the donor's whole effect; 0 (white): "
        f"nothing; blue: the opposite.{left_out}",
        "The last column must be 0 in every row without the readout"
        + (", the row 'all' 1 where lengths are equal." if "all" in set(table.span) else "."),
    )


def handoff_figure(folder: RunFolder, summaries: Tables) -> report.Figure | None:
    """Recovery of each source span against the readout's, for both donors."""
    table, places = summaries["patching_summary"], summaries["handoffs"]
    shown = table.merge(places[["donor", "span"]], on=["donor", "span"])
    shown = shown[shown.recovery_mean.notna()]
    donors = list(dict.fromkeys(shown.donor))
    if not donors:
        return None
    titles = {"text_swap": "Instruction exchanged", "audio_swap": "Voice exchanged"}
    panels = figures.new_axes(len(donors), height=3.4)
    for axes, donor in zip(panels, donors, strict=True):
        figure = figures.curves_with_band(
            shown[shown.donor == donor].sort_values("span", ascending=donor == "audio_swap"),
            "block", "recovery_mean", lo="recovery_low", hi="recovery_high", group="span",
            reference=0.5, title=titles[donor], x_label=BY_BLOCK, y_label="recovery", axes=axes,
        )  # fmt: skip
    figures.save_figure(folder, "handoff", figure, shown)
    return report.Figure(
        "handoff",
        "Where information leaves its own positions for the readout",
        "Where a falling curve drops below one half for good, the information no longer matters "
        "at its source; where the readout's rises above, it has arrived. "
        f"{BAND.replace('depth', 'block')}",
        "Both curves need not add up to 1: between them the information may sit elsewhere, or in "
        "both places.",
    )


def seed_patching_figure(
    folder: RunFolder, summaries: Tables, *, audio_is_not_text: bool
) -> report.Figure | None:
    """The seed's two panels: flip rate and logit shift with the instruction exchanged."""
    table = summaries["patching_summary"]
    table = _in_order(table[table.donor == "text_swap"], "span", TEXT_SPANS)
    if table.empty:
        return None
    panels = figures.new_axes(2, height=3.4)
    for axes, kind, label in zip(
        panels, ("flip", "shift"), ("flip rate", "logit shift"), strict=True
    ):
        middle = "flip_rate" if kind == "flip" else "shift_mean"
        figure = figures.curves_with_band(
            table, "block", middle, lo=f"{kind}_low", hi=f"{kind}_high", group="span", reference=0,
            title=f"Instruction exchanged: {label}", x_label=BY_BLOCK, y_label=label, axes=axes,
        )  # fmt: skip
    panels[0].set_ylim(-0.03, 1.03)
    audio = "'Audio' is every position that is no instruction, the readout too."
    if not audio_is_not_text:
        audio = "'Audio' is the speech alone; the seed counted the readout to it."
    figures.save_figure(folder, "patching_summary", figure, table)
    return report.Figure(
        "patching_summary",
        "Flips and logit shift, as the seed document shows them",
        "Above: share of items whose answer changes (95 % Wilson interval); below: the mean shift "
        f"towards the donor's answer (95 % bootstrap interval). {audio}",
        "With three samples, as in the seed, a flip rate can only be 0, 1/3, 2/3 or 1.",
    )


def attention_figure(folder: RunFolder, summaries: Tables) -> report.Figure:
    """Attention from the readout to every segment under conflict."""
    table = summaries["attention_summary"]
    table = table[(table.condition == "conflict") & (table.measure == "mass")]
    figure = figures.curves_with_band(
        table, "layer", "mean", lo="low", hi="high", group="span",
        title="Attention from the readout, conflict", x_label="block", y_label="attention mass",
    )  # fmt: skip
    figure.axes[0].set_ylim(0, None)
    figures.save_figure(folder, "attention_by_segment", figure, table)
    return report.Figure(
        "attention_by_segment",
        "What the answer position looks at",
        "At every block the segments' masses add up to 1; heads are averaged. "
        f"{BAND.replace('depth', 'block')}",
        "A long segment collects more mass: see the density in attention_summary. Attention is "
        "no cause; only patching shows what is used.",
    )


def ratio_figure(folder: RunFolder, summaries: Tables) -> report.Figure:
    """The modality attention ratio over layers, by condition."""
    table = summaries["mar_summary"]
    table = _in_order(table[table.measure == "fraction"], "condition", MAIN)
    figure = figures.curves_with_band(
        table, "layer", "mean", lo="low", hi="high", group="condition", reference=0.5,
        title="Attention to audio against text", x_label="block", y_label="audio / (audio + text)",
    )  # fmt: skip
    figure.axes[0].set_ylim(0, 1)
    figures.save_figure(folder, "mar", figure, table)
    return report.Figure(
        "mar",
        "The modality attention ratio",
        "Above one half the answer position attends more to the audio than to the instruction.",
        "The instruction of audio_only is shorter; the table mar has the ratio per token "
        "(density), which does not grow with length.",
    )


def fidelity_figure(folder: RunFolder, summaries: Tables) -> report.Figure:
    """The lens' fidelity, under the curve that it is needed to judge."""
    delta = summaries["delta_logit_curves"]
    fidelity = summaries["lens_fidelity"]
    delta = delta[(delta.stratum == "all") & (delta.condition == "conflict")]
    fidelity = fidelity[fidelity.condition == "conflict"]
    parts = [
        ("Δlogit under conflict", DELTA, delta.assign(measure="delta"), 0),
        ("Distance of the lens from the output", "KL (nats)",
         fidelity[fidelity.measure == "kl"], None),
        ("Same top token as the output", "share of runs",
         fidelity[fidelity.measure == "agrees"], None),
    ]  # fmt: skip
    panels = figures.new_axes(len(parts), height=2.9)
    for axes, (title, label, table, reference) in zip(panels, parts, strict=True):
        figure = figures.curves_with_band(
            table, "depth", "mean", lo="low", hi="high", title=title, y_label=label,
            x_label="depth (blocks passed)", reference=reference, axes=axes,
        )  # fmt: skip
    panels[2].set_ylim(-0.03, 1.03)
    numbers = pd.concat([table for _, _, table, _ in parts], ignore_index=True)
    figures.save_figure(folder, "lens_fidelity", figure, numbers)
    return report.Figure(
        "lens_fidelity",
        "How far to trust the lens",
        "Where the distance is large and the top token differs, a Δlogit near zero may only say "
        "that the lens reads nothing there.",
        "At the last depth the distance is 0 by construction, if the lens applies the final norm.",
    )


def clip_figure(
    folder: RunFolder, clip: str, items: pd.DataFrame, limits: tuple[float, float]
) -> str:
    """One clip's curves; all clips share the scale, so that they can be compared at a glance."""
    table = _in_order(items[items["clip"] == clip], "condition", MAIN)
    target = table[table.condition == "conflict"].target.iloc[0]
    table = table[table.target == target][["condition", "target", "voice", "depth", "delta"]]
    axes = figures.new_axes(width=4.0, height=2.6)[0]
    figure = figures.curves_with_band(
        table, "depth", "delta", group="condition", reference=0, x_label="depth",
        y_label=f"{target} − {table.voice.iloc[0]}", axes=axes,
    )  # fmt: skip
    axes.set_ylim(*limits)
    axes.yaxis.label.set_fontsize(10)
    with figures.styled():  # one line, in small: the usual legend would take half of the figure
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.12, 1), ncols=3, fontsize=9.5,
            handlelength=1.8, columnspacing=0.9, handletextpad=0.4, borderpad=0.1,
        )  # fmt: skip
    name = f"clip__{clip}"
    figures.save_figure(folder, name, figure, table)
    return name


def _in_order(table: pd.DataFrame, column: str, values: Sequence[str]) -> pd.DataFrame:
    """The rows with these values, in their order, which is that of the colours."""
    parts = [table[table[column] == value] for value in values]
    return pd.concat(parts) if parts else table.iloc[:0]


def clip_limits(items: pd.DataFrame) -> tuple[float, float]:
    """A scale that holds every clip's curves."""
    values = items[items.condition.isin(MAIN)].delta.to_numpy()
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
