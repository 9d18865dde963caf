"""The figures of a ``semantic_vs_prosody`` report, drawn from its summary tables.

Every function saves one figure with its numbers and says how to read it; None if the run measured
nothing to show.
"""

import numpy as np
import pandas as pd

from ..workbench import figures, report
from ..workbench.experiment import Tables
from ..workbench.run_folder import RunFolder
from .settings import SemanticVsProsodyConfig

BAND = "Bands are 95 % bootstrap intervals, each depth by itself."
LENS_DEPTH = "depth (blocks passed)"
PATCH_DEPTH = "depth of the patch (blocks passed)"
EXCHANGED = {"semantic": "Words exchanged", "prosody": "Voice exchanged"}
DELTA_LABEL = {
    "logit": "Δ logit of the target",
    "logit_diff": "Δ (target − base's answer)",
    "logprob": "Δ log p of the target",
}


def win_figure(
    folder: RunFolder, summaries: Tables, config: SemanticVsProsodyConfig
) -> report.Figure:
    """Win rates by depth."""
    table = summaries["winrate_curve_conflict"]
    figure = figures.curves_with_band(
        table, "depth", "mean", lo="low", hi="high", group="winner",
        title="Whose label leads at the readout", x_label=LENS_DEPTH, y_label="share of clips",
    )  # fmt: skip
    figure.axes[0].set_ylim(-0.03, 1.03)
    figures.save_figure(folder, "winrate_curve_conflict", figure, table)
    return report.Figure(
        "winrate_curve_conflict",
        "Win rate by depth: the words' label, the voice's, or another",
        f"At every depth the three add up to 1. By chance, of {len(config.labels)} labels, words "
        f"and voice would each have one in {len(config.labels)}. {BAND}",
        "Early on the lens may read nothing"
        + (": see its fidelity beside the margin." if config.fidelity else " (defect C32)."),
    )


def margin_figure(
    folder: RunFolder, summaries: Tables, config: SemanticVsProsodyConfig
) -> report.Figure:
    """Margin by depth, with the lens' fidelity beside it unless it is left out (C32)."""
    table = summaries["margin_curve_conflict"].assign(measure="margin")
    fidelity = summaries["lens_fidelity"]
    parts: list[tuple[str, str, pd.DataFrame, int | None]] = [
        ("Margin: voice minus words", "logits", table, 0)
    ]
    if config.fidelity:
        for measure, title, label in (
            ("kl", "Distance of the lens from the output", "KL (nats)"),
            ("agrees", "Same top token as the output", "share of clips"),
            ("label_mass", "Probability of the labels together", "probability"),
        ):
            parts.append((title, label, fidelity[fidelity.measure == measure], None))
    panels = figures.new_axes(len(parts), height=2.9)
    for axes, (title, label, part, reference) in zip(panels, parts, strict=True):
        figure = figures.curves_with_band(
            part, "depth", "mean", lo="low", hi="high", title=title, x_label=LENS_DEPTH,
            y_label=label, reference=reference, axes=axes,
        )  # fmt: skip
    numbers = pd.concat([part for _, _, part, _ in parts], ignore_index=True)
    figures.save_figure(folder, "margin_curve_conflict", figure, numbers)
    controls = (
        "Where the distance is large and the labels hold little probability, a margin near 0 says "
        "that the lens reads nothing there, not that words and voice are balanced."
        if config.fidelity
        else "None: the lens' distance from the output is left out (defect C32)."
    )
    return report.Figure(
        "margin_curve_conflict",
        "Margin by depth: z[voice's label] − z[words' label]",
        f"Above 0 the voice leads, below the words. {BAND}",
        controls,
    )


def flip_figure(
    folder: RunFolder, summaries: Tables, which: str, config: SemanticVsProsodyConfig
) -> report.Figure:
    """Flip to target by depth with base rate and ceiling; for the seed, as it showed them."""
    table = summaries["flip_rates"]
    table = table[(table.type == which) & (table.span == "audio")]
    curves = {"flip to target": "to_target", "flip from base": "from_base"}
    if config.flip_condition == "movable":
        curves = {
            "among movable pairs": "conditional",
            "all pairs": "to_target",
            "base rate": "base_rate",
            "ceiling": "ceiling",
        }
    parts = []
    for name, column in curves.items():
        part = table[["depth", column]].rename(columns={column: "rate"}).assign(curve=name)
        ends = table.get(f"{column}_low"), table.get(f"{column}_high")
        parts.append(
            part.assign(
                low=part.rate if ends[0] is None else ends[0],
                high=part.rate if ends[1] is None else ends[1],
            )
        )
    shown = pd.concat(parts, ignore_index=True)  # NaN too, so that colours mean the same
    figure = figures.curves_with_band(
        shown, "depth", "rate", lo="low", hi="high", group="curve",
        title=f"{EXCHANGED[which]}: does the answer follow?", x_label=PATCH_DEPTH,
        y_label="share of pairs",
    )  # fmt: skip
    figure.axes[0].set_ylim(-0.03, 1.03)
    name = f"flip_rate_curve_{which}"
    figures.save_figure(folder, name, figure, shown)
    n, n_movable = int(table.n.max()), int(table.n_conditional.max())
    how = (
        f"The audio of A is replaced by that of B at one depth. Movable are the {n_movable} of {n} "
        "pairs whose B says the target and whose A does not. The base rate is reached without a "
        "patch; the ceiling is how often B itself says the target. Where the clips are equally "
        "long, the run patched at depth 0 is B's run, so that 'all pairs' begins at the ceiling "
        f"whatever the model does. {BAND}"
    )
    if config.flip_condition == "all":
        how = (
            "Share of all pairs that say the target after the patch, and of those that change "
            "their answer at all. Without base rate and ceiling (defect C7) neither says what the "
            "layer carries."
        )
    return report.Figure(
        name,
        f"Flip rate, {which} pairs",
        how,
        "Donors that do not say the target are below, under Controls."
        if {*config.controls} - {"self"}
        else "None: no other donors were patched (M-001-5).",
    )


def delta_figure(
    folder: RunFolder, summaries: Tables, which: str, config: SemanticVsProsodyConfig
) -> report.Figure | None:
    """The target's shift by depth, in the form that the settings name, for the audio span."""
    table = summaries["delta_logits"]
    table = table[(table.type == which) & (table.span == "audio") & (table.form == config.delta)]
    if table["mean"].isna().all():
        return None
    figure = figures.curves_with_band(
        table, "depth", "mean", lo="low", hi="high", reference=0,
        title=f"{EXCHANGED[which]}: shift of the target", x_label=PATCH_DEPTH,
        y_label=DELTA_LABEL[config.delta],
    )  # fmt: skip
    name = f"delta_logit_curve_{which}"
    figures.save_figure(folder, name, figure, table)
    left_out = int(table.n_undefined.max())
    how = f"How far replacing the audio at a depth moves the target. {BAND}"
    if left_out:
        how += f" {left_out} pairs that are at the target before have no such difference."
    return report.Figure(
        name,
        f"Shift of the target, {which} pairs",
        how,
        "A single logit moves with any shift of all logits (defect C31)."
        if config.delta == "logit"
        else "A difference of logits does not move with a shift of all logits; the table "
        "delta_logits has the other forms.",
    )


def recovery_figure(folder: RunFolder, summaries: Tables) -> report.Figure | None:
    """Recovery by depth and span: where the exchanged information is."""
    table = summaries["recovery"]
    shown = table[(table.span != "all") & table["mean"].notna()]
    types = list(dict.fromkeys(shown.type))
    if not types:
        return None
    panels = figures.new_axes(len(types), height=3.6)
    for axes, which in zip(panels, types, strict=True):
        part = shown[shown.type == which]
        figure = figures.curves_with_band(
            part, "depth", "mean", lo="low", hi="high", group="span", reference=0.5,
            title=f"{EXCHANGED[which]} ({int(part.n.max())} movable pairs)", x_label=PATCH_DEPTH,
            y_label="recovery", axes=axes,
        )  # fmt: skip
    figures.save_figure(folder, "recovery_by_span", figure, shown)
    return report.Figure(
        "recovery_by_span",
        "Where the exchanged information is: recovery of each span",
        "1: replacing this span at this depth brings the whole of B's answer; 0: nothing. Where "
        "the audio's curve drops below one half for good, it has let go (S-11); what rises "
        f"meanwhile has it. {BAND}",
        "At the last depth only the readout can bring anything. A falling audio curve alone would "
        "not say that the information stopped mattering.",
    )


def control_figure(folder: RunFolder, summaries: Tables) -> report.Figure | None:
    """Flip to target with B's audio, against other donors, by depth."""
    other = summaries["control_flips"]
    if other.empty:
        return None
    flips = summaries["flip_rates"]
    own = flips[(flips.span == "audio") & flips.conditional.notna()]
    shown = pd.DataFrame(
        {
            "type": own.type,
            "control": "B",
            "depth": own.depth,
            "to_target": own.conditional,
            "low": own.conditional_low,
            "high": own.conditional_high,
        }
    )
    shown = pd.concat([shown, other[list(shown)]], ignore_index=True)
    types = [which for which in dict.fromkeys(other.type) if (shown.type == which).any()]
    if not types:
        return None
    panels = figures.new_axes(len(types), height=3.4)
    for axes, which in zip(panels, types, strict=True):
        figure = figures.curves_with_band(
            shown[shown.type == which], "depth", "to_target", lo="low", hi="high", group="control",
            title=f"{EXCHANGED[which]}: whose audio brings the target", x_label=PATCH_DEPTH,
            y_label="says the target", axes=axes,
        )  # fmt: skip
        axes.set_ylim(-0.03, 1.03)
    figures.save_figure(folder, "control_flips", figure, shown)
    return report.Figure(
        "control_flips",
        "Flip to target with B's audio, and with audio that does not say it",
        "Movable pairs only. same_labels is another clip of A's own two emotions, self A itself; "
        f"silence and noise are as long as A. {BAND}",
        "A curve of silence or noise near that of B would mean that any disturbance does it.",
    )


def answers_figure(folder: RunFolder, summaries: Tables) -> report.Figure:
    """What the final answer follows, by the words' and by the voice's emotion."""
    table = summaries["answers"]
    table = table[table.stratum != "all"]
    panels = figures.new_axes(2, height=3.4)
    for axes, which in zip(panels, ("semantic", "prosody"), strict=True):
        part = table[table.stratum.str.startswith(f"{which}=")]
        part = part.assign(stratum=part.stratum.str.removeprefix(f"{which}="))
        figure = figures.bars(
            part, "stratum", "mean", lo="low", hi="high", group="answer",
            title=f"By the emotion of the {'words' if which == 'semantic' else 'voice'}",
            y_label="share of clips", axes=axes,
        )  # fmt: skip
        axes.set_ylim(0, 1.05)
    figures.save_figure(folder, "answers", figure, table)
    return report.Figure(
        "answers",
        "What the final answer follows",
        "Bars of one emotion add up to 1: the answer is the words' emotion, the voice's, or "
        "another. Whiskers are 95 % bootstrap intervals.",
        "An emotion that is hard to hear shows as a low bar of both.",
    )


def clip_figure(
    folder: RunFolder, name: str, table: pd.DataFrame, limits: tuple[float, float]
) -> str:
    """One clip's margin by depth; all clips share the scale."""
    axes = figures.new_axes(width=4.0, height=2.2)[0]
    figure = figures.curves_with_band(
        table, "depth", "margin", reference=0, x_label="depth", y_label="margin", axes=axes
    )
    axes.set_ylim(*limits)
    name = f"clip__{name}"
    figures.save_figure(folder, name, figure, table)
    return name


def limits_of(values: np.ndarray) -> tuple[float, float]:
    """A scale that holds them all."""
    low, high = float(values.min()), float(values.max())
    edge = 0.05 * (high - low) or 1.0
    return low - edge, high + edge
