"""The figures of an ``emotion_conflict`` page, drawn from its summary tables."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..materials.conflict_figures import draw_handoffs
from ..materials.conflict_runs import EXCHANGES
from ..workbench import figures
from ..workbench.page import Page
from .tables import EmotionResults

MAIN = ("audio_only", "conflict", "consistent")
DELTA = "Δlogit: T minus A"
DEPTH = "depth (blocks passed)"
BY_BLOCK = "block (its output is patched)"
TEXT_SPANS = ("text", "audio", "readout")
SHARE = (-0.03, 1.03)
BAND = "Bands are 95 % bootstrap intervals over clips, each depth by itself."
BAND_BY_BLOCK = BAND.replace("depth", "block")


def add_delta(
    page: Page, run: EmotionResults, name: str, conditions: Sequence[str], title: str
) -> None:
    """Adds the mean Δlogit of some conditions over depth."""
    table = run["delta_logit_curves"]
    table = in_order(table[table.stratum == "all"], "condition", conditions)
    drawing = figures.curves(
        table, "depth", group="condition", reference=0, title=title, x_label=DEPTH, y_label=DELTA
    )
    contrast = "every condition is read with the T and A of its conflict item"
    if run.config.contrast == "seed":
        contrast = "consistent is a label minus itself, 0 (defect C8)"
    page.figure(
        name, drawing, table,
        f"{title}: which label the model leans to, depth by depth",
        f"Above zero the instruction's label T leads, below zero the voice's A; {contrast}. "
        f"{BAND}",
        "The last depth must equal the model's own logits. A lens says what could be read at a "
        "depth, not what the model uses there; see its fidelity below.",
    )  # fmt: skip


def add_answers(page: Page, run: EmotionResults) -> None:
    """Adds what the final answer follows, by condition."""
    table = run["accuracy"]
    drawing = figures.bars(
        table, "condition", "rate", group="answer", title="What the answer follows",
        y_label="share of items", y_limits=(0, 1.05),
    )  # fmt: skip
    page.figure(
        "answers_by_condition", drawing, table,
        "The final answer by condition",
        "Bars of one condition add up to 1; whiskers are 95 % Wilson intervals.",
        "mention_only names T without asking for it, list_all names every label, "
        "irrelevant_adjective names no label: if T rises there too, the word is "
        "copied, not obeyed."
        if "mention_only" in set(table.condition)
        else "None: no prompt names T without asking for it, so copying may look like obeying.",
    )  # fmt: skip


def add_flips(page: Page, run: EmotionResults) -> None:
    """Adds the flip rate by voice and named label."""
    table = run["flip_matrix"]
    drawing = figures.heat_map(
        table, "named", "voice", "rate", limits=(0, 1), title="Flips by voice and instruction",
        x_label="instruction names (T)", y_label="voice (A)", value_label="flip rate",
    )  # fmt: skip
    page.figure(
        "flip_matrix", drawing, table,
        "How often the conflicting instruction changes the answer",
        "1 means that every clip of that voice is answered differently than without an "
        "instruction; grey cells were not asked for.",
        "Few clips stand behind a cell (see n in the numbers): read rows, not cells.",
    )  # fmt: skip


def add_recovery(page: Page, run: EmotionResults, donor: str) -> None:
    """Adds the mean recovery of one donor by block and span."""
    every = run["patching_summary"]
    table = every[every.donor == donor]
    if table.recovery_mean.isna().all():
        return
    # One scale for all exchanges, which are compared.
    shares = every[every.donor.isin(EXCHANGES)].recovery_mean
    what = f"another {EXCHANGES[donor].what}"
    drawing = figures.heat_map(
        table, "block", "span", "recovery_mean", centre=0, decimals=1,
        limits=figures.ends_of([-1.0, 1.0, *shares]),
        title=f"Patching in {what}", x_label=BY_BLOCK, y_label="span", value_label="recovery",
    )  # fmt: skip
    n, n_undefined = int(table.n.max()), int(table.n_undefined.max())
    left_out = f" {n_undefined} of {n} items change too little to have one." if n_undefined else ""
    page.figure(
        f"recovery__{donor}", drawing, table,
        f"How much of the donor's answer each span brings: {what}",
        "1 (red): patching this span after this block brings the donor's whole effect; 0 (white): "
        f"nothing; blue: the opposite.{left_out}",
        "The last column must be 0 in every row without the readout"
        + (", the row 'all' 1 where lengths are equal." if "all" in set(table.span) else "."),
    )  # fmt: skip


def add_handoffs(page: Page, run: EmotionResults) -> None:
    """Adds the recovery of each source span against the readout's, for both donors."""
    table = run["patching_summary"].merge(run["handoffs"][["donor", "span"]])
    table = table[table.recovery_mean.notna()]
    if table.empty:
        return
    drawing = draw_handoffs(table, "block", "span", x_label=BY_BLOCK, height=3.4)
    page.figure(
        "handoff", drawing, table,
        "Where information leaves its own positions for the readout",
        "Where a falling curve drops below one half for good, the information no longer matters "
        f"at its source; where the readout's rises above, it has arrived. {BAND_BY_BLOCK}",
        "Both curves need not add up to 1: between them the information may sit elsewhere, or in "
        "both places.",
    )  # fmt: skip


def add_seed_patching(page: Page, run: EmotionResults) -> None:
    """Adds the seed's two panels: flip rate and logit shift with the instruction exchanged."""
    table = run["patching_summary"]
    table = in_order(table[table.donor == "text_swap"], "span", TEXT_SPANS)
    if table.empty:
        return
    kinds = (("flip", "flip_rate", "flip rate", SHARE),
             ("shift", "shift_mean", "logit shift", (None, None)))  # fmt: skip
    drawing = figures.panels(
        figures.curves,
        [
            (table, {"y": middle, "lo": f"{kind}_low", "hi": f"{kind}_high", "y_limits": limits,
                     "y_label": label, "title": f"Instruction exchanged: {label}"})
            for kind, middle, label, limits in kinds
        ],
        height=3.4, x="block", group="span", reference=0, x_label=BY_BLOCK,
    )  # fmt: skip
    audio = "'Audio' is every position that is no instruction, the readout too."
    if run.config.audio_positions == "speech_only":
        audio = "'Audio' is the speech alone; the seed counted the readout to it."
    page.figure(
        "patching_summary", drawing, table,
        "Flips and logit shift, as the seed document shows them",
        "Above: share of items whose answer changes (95 % Wilson interval); below: the mean shift "
        f"towards the donor's answer (95 % bootstrap interval). {audio}",
        "With three samples, as in the seed, a flip rate can only be 0, 1/3, 2/3 or 1.",
    )  # fmt: skip


def add_attention(page: Page, run: EmotionResults) -> None:
    """Adds attention from the readout to every segment under conflict."""
    table = run["attention_summary"]
    table = table[(table.condition == "conflict") & (table.measure == "mass")]
    drawing = figures.curves(
        table, "layer", group="span", title="Attention from the readout, conflict",
        x_label="block", y_label="attention mass", y_limits=(0, None),
    )  # fmt: skip
    page.figure(
        "attention_by_segment", drawing, table,
        "What the answer position looks at",
        f"At every block the segments' masses add up to 1; heads are averaged. {BAND_BY_BLOCK}",
        "A long segment collects more mass: see the density in attention_summary. Attention is "
        "no cause; only patching shows what is used.",
    )  # fmt: skip


def add_ratio(page: Page, run: EmotionResults) -> None:
    """Adds the modality attention ratio over layers, by condition."""
    table = run["mar_summary"]
    table = in_order(table[table.measure == "fraction"], "condition", MAIN)
    drawing = figures.curves(
        table, "layer", group="condition", reference=0.5, title="Attention to audio against text",
        x_label="block", y_label="audio / (audio + text)", y_limits=(0, 1),
    )  # fmt: skip
    page.figure(
        "mar", drawing, table,
        "The modality attention ratio",
        "Above one half the answer position attends more to the audio than to the instruction.",
        "The instruction of audio_only is shorter; the table mar has the ratio per token "
        "(density), which does not grow with length.",
    )  # fmt: skip


def add_fidelity(page: Page, run: EmotionResults) -> None:
    """Adds the lens' fidelity, under the curve that it is needed to judge."""
    delta, fidelity = run["delta_logit_curves"], run["lens_fidelity"]
    delta = delta[(delta.stratum == "all") & (delta.condition == "conflict")]
    fidelity = fidelity[fidelity.condition == "conflict"]
    parts: list[tuple[pd.DataFrame, dict[str, Any]]] = [
        (delta.assign(measure="delta"),
         {"title": "Δlogit under conflict", "y_label": DELTA, "reference": 0}),
        (fidelity[fidelity.measure == "kl"],
         {"title": "Distance of the lens from the output", "y_label": "KL (nats)"}),
        (fidelity[fidelity.measure == "agrees"],
         {"title": "Same top token as the output", "y_label": "share of runs", "y_limits": SHARE}),
    ]  # fmt: skip
    drawing = figures.panels(figures.curves, parts, height=2.9, x="depth", x_label=DEPTH)
    page.figure(
        "lens_fidelity", drawing, pd.concat([table for table, _ in parts], ignore_index=True),
        "How far to trust the lens",
        "Where the distance is large and the top token differs, a Δlogit near zero may only say "
        "that the lens reads nothing there.",
        "At the last depth the distance is 0 by construction, if the lens applies the final norm.",
    )  # fmt: skip


def save_clip_curve(page: Page, clip: str, items: pd.DataFrame, limits: tuple[float, float]) -> str:
    """Keeps one clip's small curves, on a scale that all clips share; returns their name."""
    table = in_order(items[items["clip"] == clip], "condition", MAIN)
    target = table[table.condition == "conflict"].target.iloc[0]
    table = table[table.target == target][["condition", "target", "voice", "depth", "delta"]]
    axes = figures.new_axes(width=4.0, height=2.6)[0]
    drawing = figures.curves(
        table, "depth", "delta", group="condition", reference=0, x_label="depth",
        y_label=f"{target} − {table.voice.iloc[0]}", y_limits=limits, axes=axes,
    )  # fmt: skip
    axes.yaxis.label.set_fontsize(10)
    with figures.styled():  # one line, in small: the usual legend would take half of the figure
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.12, 1), ncols=3, fontsize=9.5,
            handlelength=1.8, columnspacing=0.9, handletextpad=0.4, borderpad=0.1,
        )  # fmt: skip
    figures.save_figure(page.folder, f"clip__{clip}", drawing, table)
    return f"clip__{clip}"


def in_order(table: pd.DataFrame, column: str, values: Sequence[str]) -> pd.DataFrame:
    """The rows with these values, in their order, which is that of the colours."""
    return pd.concat([table[table[column] == value] for value in values])
