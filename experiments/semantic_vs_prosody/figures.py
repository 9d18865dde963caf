"""The figures of a ``semantic_vs_prosody`` page, drawn from its summary tables."""

from typing import Any

import pandas as pd

from ..workbench import figures
from ..workbench.page import Page
from .tables import ProsodyResults

BAND = "Bands are 95 % bootstrap intervals, each depth by itself."
LENS_DEPTH = "depth (blocks passed)"
PATCH_DEPTH = "depth of the patch (blocks passed)"
SHARE = (-0.03, 1.03)
EXCHANGED = {"semantic": "Words exchanged", "prosody": "Voice exchanged"}
DELTA_LABEL = {
    "logit": "Δ logit of the target",
    "logit_diff": "Δ (target − base's answer)",
    "logprob": "Δ log p of the target",
}
PANELS: dict[str, dict[str, Any]] = {
    "margin": {"title": "Margin: voice minus words", "y_label": "logits", "reference": 0},
    "kl": {"title": "Distance of the lens from the output", "y_label": "KL (nats)"},
    "agrees": {"title": "Same top token as the output", "y_label": "share of clips"},
    "label_mass": {"title": "Probability of the labels together", "y_label": "probability"},
}
"""The margin, and what the lens' fidelity is judged by."""


def add_answers(page: Page, run: ProsodyResults) -> None:
    """Adds what the final answer follows, by the words' and by the voice's label."""
    table = run["answers"][run["answers"].stratum != "all"]
    side, emotion = (table.stratum.str.split("=", n=1).str[i] for i in (0, 1))
    parts = [
        (table.assign(stratum=emotion)[side == which], {"title": f"By the label of the {name}"})
        for which, name in (("semantic", "words"), ("prosody", "voice"))
    ]
    drawing = figures.panels(
        figures.bars, parts, height=3.4, x="stratum", group="answer", y_label="share of clips",
        y_limits=(0, 1.05),
    )  # fmt: skip
    page.figure(
        "answers", drawing, table,
        "What the final answer follows",
        "Bars of one label add up to 1: the answer is the words' label, the voice's, or "
        "another. Whiskers are 95 % bootstrap intervals.",
        "A label that is hard to hear shows as a low bar of both.",
    )  # fmt: skip


def add_wins(page: Page, run: ProsodyResults) -> None:
    """Adds win rates by depth."""
    table, n = run["winrate_curve_conflict"], len(run.config.labels)
    drawing = figures.curves(
        table, "depth", group="winner", title="Whose label leads at the readout",
        x_label=LENS_DEPTH, y_label="share of clips", y_limits=SHARE,
    )  # fmt: skip
    page.figure(
        "winrate_curve_conflict", drawing, table,
        "Win rate by depth: the words' label, the voice's, or another",
        f"At every depth the three add up to 1. By chance, of {n} labels, words and voice would "
        f"each have one in {n}. {BAND}",
        "Early on the lens may read nothing"
        + (": see its fidelity beside the margin." if run.config.fidelity else " (defect C32)."),
    )  # fmt: skip


def add_margin(page: Page, run: ProsodyResults) -> None:
    """Adds the margin by depth, with the lens' fidelity beside it unless it is left out (C32)."""
    margin, fidelity = run["margin_curve_conflict"], run["lens_fidelity"]
    every = pd.concat([margin.assign(measure="margin"), fidelity])
    measures = ["margin"]
    controls = "None: the lens' distance from the output is left out (defect C32)."
    if run.config.fidelity:
        measures = list(PANELS)
        controls = (
            "Where the distance is large and the labels hold little probability, a margin near 0 "
            "says that the lens reads nothing there, not that words and voice are balanced."
        )
    parts = [(every[every.measure == name], PANELS[name]) for name in measures]
    drawing = figures.panels(figures.curves, parts, height=2.9, x="depth", x_label=LENS_DEPTH)
    page.figure(
        "margin_curve_conflict", drawing, pd.concat([part for part, _ in parts], ignore_index=True),
        "Margin by depth: z[voice's label] − z[words' label]",
        f"Above 0 the voice leads, below the words. {BAND}",
        controls,
    )  # fmt: skip


def add_flips(page: Page, run: ProsodyResults, which: str) -> None:
    """Adds flip to target by depth with base rate and ceiling; for the seed, as it showed them."""
    table, config = run["flip_rates"], run.config
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
        ends = {end: table.get(f"{column}_{end}", table[column]) for end in ("low", "high")}
        parts.append(table[["depth"]].assign(rate=table[column], curve=name, **ends))
    shown = pd.concat(parts, ignore_index=True)  # NaN too, so that colours mean the same
    drawing = figures.curves(
        shown, "depth", "rate", group="curve", title=f"{EXCHANGED[which]}: does the answer follow?",
        x_label=PATCH_DEPTH, y_label="share of pairs", y_limits=SHARE,
    )  # fmt: skip
    how = (
        "The audio of A is replaced by that of B at one depth. Movable are the "
        f"{int(table.n_conditional.max())} of {int(table.n.max())} pairs whose B says the target "
        "and whose A does not. The base rate is reached without a patch; the ceiling is how often "
        "B itself says the target. Where the clips are equally long, the run patched at depth 0 is "
        f"B's run, so that 'all pairs' begins at the ceiling whatever the model does. {BAND}"
    )
    if config.flip_condition == "all":
        how = (
            "Share of all pairs that say the target after the patch, and of those that change "
            "their answer at all. Without base rate and ceiling (defect C7) neither says what the "
            "layer carries."
        )
    page.figure(
        f"flip_rate_curve_{which}", drawing, shown, f"Flip rate, {which} pairs", how,
        "Donors that do not say the target are below, under Controls."
        if {*config.controls} - {"self"}
        else "None: no other donors were patched (M-001-5).",
    )  # fmt: skip


def add_shift(page: Page, run: ProsodyResults, which: str) -> None:
    """Adds the target's shift by depth, in the form that the settings name, for the audio span."""
    every, form = run["delta_logits"], run.config.delta
    every = every[(every.span == "audio") & (every.form == form)]
    table = every[every.type == which]
    if table["mean"].isna().all():
        return
    drawing = figures.curves(
        table, "depth", reference=0, title=f"{EXCHANGED[which]}: shift of the target",
        x_label=PATCH_DEPTH, y_label=DELTA_LABEL[form],
        y_limits=figures.limits_of([0.0, *every["low"], *every["high"]]),
    )  # fmt: skip
    how = f"How far replacing the audio at a depth moves the target. {BAND}"
    if left_out := int(table.n_undefined.max()):
        how += f" {left_out} pairs that are at the target before have no such difference."
    page.figure(
        f"delta_logit_curve_{which}", drawing, table, f"Shift of the target, {which} pairs", how,
        "A single logit moves with any shift of all logits (defect C31)."
        if form == "logit"
        else "A difference of logits does not move with a shift of all logits; the table "
        "delta_logits has the other forms.",
    )  # fmt: skip


def add_recovery(page: Page, run: ProsodyResults) -> None:
    """Adds recovery by depth and span: where the exchanged information is."""
    table = run["recovery"]
    shown = table[(table.span != "all") & table["mean"].notna()]
    parts = [
        (part, {"title": f"{EXCHANGED[str(which)]} ({int(part.n.max())} movable pairs)"})
        for which, part in shown.groupby("type", sort=False)
    ]
    if not parts:
        page.note("No pair has a donor that moves the answer: there is no recovery.")
        return
    drawing = figures.panels(
        figures.curves, parts, height=3.6, x="depth", group="span", reference=0.5,
        x_label=PATCH_DEPTH, y_label="recovery",
    )  # fmt: skip
    page.figure(
        "recovery_by_span", drawing, shown,
        "Where the exchanged information is: recovery of each span",
        "1: replacing this span at this depth brings the whole of B's answer; 0: nothing. Where "
        "the audio's curve drops below one half for good, it has let go (S-11); what rises "
        f"meanwhile has it. {BAND}",
        "At the last depth only the readout can bring anything. A falling audio curve alone would "
        "not say that the information stopped mattering.",
    )  # fmt: skip


def add_control_flips(page: Page, run: ProsodyResults) -> None:
    """Adds flip to target with B's audio, against other donors, by depth."""
    other, flips = run["control_flips"], run["flip_rates"]
    own = flips[(flips.span == "audio") & flips.conditional.notna()]
    named = {"conditional": "to_target", "conditional_low": "low", "conditional_high": "high"}
    own = own[["type", "depth", *named]].rename(columns=named).assign(control="B")
    types = [which for which in other.type.unique() if (own.type == which).any()]
    if not types:
        return
    shown = pd.concat([own, other[list(own)]], ignore_index=True)
    drawing = figures.panels(
        figures.curves,
        [
            (shown[shown.type == w], {"title": f"{EXCHANGED[w]}: whose audio brings the target"})
            for w in types
        ],
        height=3.4, x="depth", y="to_target", group="control", x_label=PATCH_DEPTH,
        y_label="says the target", y_limits=SHARE,
    )  # fmt: skip
    page.figure(
        "control_flips", drawing, shown,
        "Flip to target with B's audio, and with audio that does not say it",
        "Movable pairs only. same_labels is another clip of A's own two labels, self A itself; "
        f"silence and noise are as long as A. {BAND}",
        "A curve of silence or noise near that of B would mean that any disturbance does it.",
    )  # fmt: skip


def save_clip_curve(page: Page, name: str, table: pd.DataFrame, limits: tuple[float, float]) -> str:
    """Keeps one clip's margin by depth, on a scale that all clips share; returns its name."""
    axes = figures.new_axes(width=4.0, height=2.2)[0]
    drawing = figures.curves(table, "depth", "margin", reference=0, y_limits=limits, axes=axes)
    figures.save_figure(page.folder, f"clip__{name}", drawing, table)
    return f"clip__{name}"
