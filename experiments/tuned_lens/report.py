"""Tables of a ``tuned_lens`` run -> summaries, figures, and the report."""

from typing import Any

import numpy as np
import pandas as pd

from ..materials.trained_lens import LensCard
from ..workbench import figures
from ..workbench.controls import FAIL, PASS
from ..workbench.experiment import Tables
from ..workbench.findings import finding_table
from ..workbench.report import Figure, Note, Report, Section, SectionItem, Table
from ..workbench.run_folder import RunFolder
from .settings import SCORED, TunedLensConfig
from .tables import LENSES, depth_table, findings, settling_table, training_table

PLACE_NAMES = {"scored": "all scored positions", "readout": "the readout"}
MAX_TRAINING_CURVES = 5
CAVEATS = (
    "Not causal: a translator learns to predict the output. That it reads an answer at a depth "
    "says that the answer could be decoded there, not that the model has settled or uses it. What "
    "is used, only patching shows.",
    "In distribution: translators know the prompts they were trained on, and prompts like them. "
    "On other instructions, languages or speakers they have to be trained, or judged, again.",
    "Groups: what is held out are whole groups. By default a group is a clip: its words under the "
    "same instructions were seen with other clips. The intervals resample held-out groups.",
    "Positions weigh by their number: the readout is one of many, and a lens that is close "
    "everywhere else need not be close there. At audio positions no model is trained to predict "
    "anything, yet where they are scored, most of the loss is theirs. Judge a lens where it is "
    "used; scored=readout trains on that position alone.",
)


def conclude(
    tables: Tables,
    folder: RunFolder,
    config: TunedLensConfig,
    card: LensCard,
    *,
    is_calibration: bool,
) -> Report:
    """Writes summaries and figures into the run's folder and returns the report."""
    depths = depth_table(tables["held_out"], config)
    settling = settling_table(tables["held_out"], config)
    found = findings(depths, settling, tables["controls"])
    summaries = {
        "depths": depths,
        "settling": settling,
        "training_end": training_table(tables["training"], depths),
        "findings": finding_table(found),
    }
    for name, table in summaries.items():
        folder.write_table(name, table, is_summary=True)
    sections = [
        _held_out(folder, depths, settling),
        _training(folder, tables["training"]),
        _checks(tables["controls"], depths, summaries["findings"]),
        Section("Methods and caveats", "\n\n".join([_method(config, card, tables), *CAVEATS])),
    ]
    return Report(
        title=f"Tuned lens: {config.model}",
        question="What can be read off each depth, once a translator is trained to?",
        lead=_lead(card),
        is_calibration=is_calibration,
        headlines=[one.headline() for one in found.values()],
        sections=sections,
    )


def _lead(card: LensCard) -> str:
    return (
        "The logit lens reads an inner depth with the model's own final norm and unembedding, as "
        "if no block followed. A tuned lens first passes it through an affine map, one per depth, "
        "trained to predict the model's output. This page compares the two on prompts that no "
        f"step trained on. The loss counts {SCORED[card.scored]}.\n\nThe trained lens is in the "
        "run's folder, under lens/."
    )


def _held_out(folder: RunFolder, depths: pd.DataFrame, settling: pd.DataFrame) -> Section:
    items: list[SectionItem] = [
        _curves(
            folder, depths, "kl", "Distance from the output", "KL (nats)",
            "Mean KL(output || lens) on held-out prompts, with 95 % intervals over groups. Lower "
            "is closer; at the last depth both are the output itself.",
        ),
        _curves(
            folder, depths, "agrees", "Same top token as the output", "share of positions",
            "How often the lens' most likely token is the output's.",
        ),
        _by_place(folder, depths),
        Table(
            "Depth from which the top token at the readout is the output's for good; earlier is "
            "logit minus tuned",
            rows=settling.to_dict("records"),
        ),
        Table("All depths and places, with intervals", name="depths"),
    ]  # fmt: skip
    return Section("On held-out prompts", items=items)


def _curves(
    folder: RunFolder, depths: pd.DataFrame, value: str, title: str, label: str, how: str
) -> Figure:
    """Both lenses by depth, a panel for each of the main places."""
    panels = figures.new_axes(len(PLACE_NAMES), height=3.2)
    shown = []
    for axes, (place, name) in zip(panels, PLACE_NAMES.items(), strict=True):
        some = depths[depths.place == place]
        for lens in LENSES:
            column = f"{value}_{lens}"
            ends = {"mean": column, "low": f"{column}_low", "high": f"{column}_high"}
            part = some[["place", "depth"]].assign(lens=f"{lens} lens")
            shown.append(part.assign(**{end: some[source] for end, source in ends.items()}))
        table = pd.concat(shown[-len(LENSES) :], ignore_index=True)
        drawing = figures.curves_with_band(
            table, "depth", "mean", lo="low", hi="high", group="lens", title=f"{title}: {name}",
            x_label="depth (blocks passed)", y_label=label, axes=axes,
        )  # fmt: skip
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    name = f"held_out_{value}"
    figures.save_figure(folder, name, drawing, pd.concat(shown, ignore_index=True))
    return Figure(name, title, how)


def _by_place(folder: RunFolder, depths: pd.DataFrame) -> Figure:
    """What is left of the logit lens' distance, by place."""
    below = depths[(depths.depth < depths.depth.max()) & (depths.place != "scored")]
    left = below.kl_tuned / below.kl_logit.where(below.kl_logit > 0)
    numbers = below[["place", "depth", "kl_logit", "kl_tuned"]].assign(left=left)
    drawing = figures.heat_map(
        numbers.assign(left=left.round(2)), "depth", "place", "left", centre=1, limits=(0, 2),
        title="KL(tuned) / KL(logit)", x_label="depth (blocks passed)", y_label="",
        value_label="share that is left",
    )  # fmt: skip
    figures.save_figure(folder, "by_place", drawing, numbers)
    return Figure(
        "by_place",
        "Where in the prompt the translators help",
        "Blue: closer to the output than the logit lens; 1 is no change; red: farther away. "
        "Above 2 the colour is that of 2.",
    )


def _training(folder: RunFolder, training: pd.DataFrame) -> Section:
    depths = sorted(training.depth.unique())
    chosen = np.linspace(0, len(depths) - 1, min(MAX_TRAINING_CURVES, len(depths))).round()
    some = training[training.depth.isin([depths[int(i)] for i in chosen])]
    numbers = some[["step", "depth", "kl"]].assign(curve=[f"depth {k}" for k in some.depth])
    drawing = figures.curves_with_band(
        numbers, "step", "kl", group="curve", title="Loss by step", x_label="step",
        y_label="KL (nats)",
    )  # fmt: skip
    figures.save_figure(folder, "training", drawing, numbers)
    items: list[SectionItem] = [
        Figure(
            "training",
            "Training",
            "KL(output || lens) on the prompts of each step, before the step. Every depth has a "
            "translator of its own; some are shown.",
        ),
        Table("Learnt, and learnt by heart: the end of training and held-out prompts (KL, nats)",
              name="training_end"),
    ]  # fmt: skip
    return Section("Training", items=items)


def _checks(controls: pd.DataFrame, depths: pd.DataFrame, found: pd.DataFrame) -> Section:
    largest = float(controls.untrained_difference.max())
    output = depths[depths.depth == depths.depth.max()]
    left = float(output[["kl_logit", "kl_tuned"]].abs().to_numpy().max())
    rows: list[dict[str, Any]] = [
        {
            "control": "untrained tuned lens = logit lens (largest difference of logits)",
            "expected": 0.0,
            "found": largest,
            "verdict": PASS if largest == 0 else FAIL,
        },
        {
            "control": "KL at the last depth, of either lens",
            "expected": 0.0,
            "found": left,
            "verdict": PASS if left == 0 else FAIL,
        },
    ]
    items: list[SectionItem] = [
        Table("Controls", rows=rows),
        Table("Claims with their numbers", rows=found.drop(columns="statement").to_dict("records")),
    ]
    if any(row["verdict"] == FAIL for row in rows):
        items.insert(0, Note("A control failed: nothing on this page can be trusted.", "warning"))
    return Section("Controls", "What has to come out if the lens is what it claims to be.", items)


def _method(config: TunedLensConfig, card: LensCard, tables: Tables) -> str:
    training, options = config.training(), card.training
    n_tokens = int(tables["training"].drop_duplicates("step").n_tokens.sum())
    held_out = tables["held_out"]
    return (
        f"Model: {config.model}, {config.dtype}, {card.n_layers} blocks, frozen. Trained on "
        f"{options['prompts']} prompts of {len(options['groups'])} groups ({options['tokens']} "
        f"scored tokens, {n_tokens} with repeats): {training.n_steps} steps of "
        f"{config.prompts_per_step} prompts, {training.optimizer}, highest rate "
        f"{training.peak_rate:g}, weight decay {training.weight_decay:g}, gradient norm at most "
        f"{training.max_grad_norm:g}. Loss: KL(output || lens), mean over scored tokens, added "
        f"over depths; scored is {SCORED[card.scored]}. Judged on "
        f"{held_out.prompt.nunique()} prompts of {held_out.group.nunique()} other groups, split "
        f"with seed {config.seed}. Intervals resample groups {config.n_resamples} times."
    )
