"""The page of an ``attribute_lens`` run: sections, figures, and how to read them."""

from collections.abc import Sequence
from typing import Any

from ..materials.attribute_answers import attributes_of
from ..materials.attribute_pages import add_answers, add_questions, asked_in_words
from ..materials.clips import file_safe
from ..materials.enrichment_findings import add_enrichment
from ..materials.recordings import Recording
from ..materials.trained_lens import lens_name
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .tables import AttributeResults, above

DEPTH = "depth (blocks passed)"
BAND = "Bands are 95 % bootstrap intervals, each depth by itself."
CAVEATS = (
    "A lens says what could be read at a depth, not what the model uses there; what is used, "
    "knockout and the absence of the audio show, for these prompts.",
    "The critical layer is a mean depth, weighted by how much can be read: a longer plateau at the "
    "end moves it on, although nothing new was read. It is compared within one model only; whether "
    "an earlier one goes with better answers, a run of one model cannot say.",
    "A label that leads the others with little probability of all labels together has not been "
    "read: see the mass beside the hits.",
    "Attention knocked out at one position leaves other roads: what was collected elsewhere before "
    "is still read there.",
    "The enrichment is chosen on some clips and judged on others; with few clips, the choice is "
    "itself unsure.",
)


def lead(run: AttributeResults) -> str:
    """What was asked of which clips."""
    return (
        f"{asked_in_words(run)}. This page "
        "shows at which depth the label can be read, at the position that answers and where the "
        "attribute is named, what it costs where attention is kept from one or the other, and "
        "whether giving early states to later blocks helps."
    )


def fill_page(page: Page, run: AttributeResults, recordings: Sequence[Recording]) -> None:
    """What was asked, answers, lens, attention and enrichment."""
    add_questions(page, run, recordings)
    add_answers(page, run)
    trained = run.config.tuned_lens
    page.section(
        "Lens",
        f"The {lens_name(None)}{f' and the {lens_name(trained)}' if trained else ''}"
        " reads the labels after every block, at the readout and at the last word that names the "
        "attribute. Information is the share of clips whose own label leads.",
    )
    for attribute in attributes_of(run):
        _information(page, run, attribute)
        _outcomes(page, run, attribute)
    page.table("Where information is, by three definitions, of the mean curve", "critical")
    page.section(
        "Attention",
        f"Under the format {run.config.causal_prompt}, the readout or the mention is kept "
        "from some keys in a window of blocks, and attends to the rest. Gains are of the margin: "
        "the right label's score minus the largest of the others.",
    )
    for attribute in attributes_of(run):
        _knockouts(page, run, attribute)
    add_enrichment(page, run)


def _information(page: Page, run: AttributeResults, attribute: str) -> None:
    every, bar = having(run["information_curves"], attribute=attribute), above(run, attribute)
    curve = every.prompt + ", " + every.position
    every = every.assign(curve=curve if every.lens.nunique() == 1 else curve + ", " + every.lens)
    drawn: dict[str, dict[str, Any]] = {
        "hit": {"title": f"Information: {attribute}", "y_label": "share of clips",
                "reference": bar},
        "label_mass": {"title": "Probability of the labels together", "y_label": "probability"},
        "kl": {"title": "Distance of the lens from the output", "y_label": "KL (nats)"},
    }  # fmt: skip
    parts = [(having(every, measure=name), options) for name, options in drawn.items()]
    drawing = figures.panels(
        figures.curves, parts, height=3.4, x="depth", group="curve", x_label=DEPTH
    )
    page.figure(
        f"information_{file_safe(attribute)}", drawing, having(every, measure=[*drawn]),
        f"What can be read of the {attribute}, by format and position",
        f"The line is {bar:.2f}: chance and {run.config.margin:.0%} of it. "
        f"{BAND} At the last depth the readout's curve is the answer.",
        "Where the labels hold hardly any probability, or the lens is far from the output, a hit "
        "says little.",
    )  # fmt: skip


def _outcomes(page: Page, run: AttributeResults, attribute: str) -> None:
    table = having(run["outcomes"], attribute=attribute, lens="logit")
    if table.outcome.nunique() < 2:
        return
    drawing = figures.curves(
        table, "depth", group="outcome", title=f"Information by outcome: {attribute}",
        x_label=DEPTH, y_label="share of clips", y_limits=(-0.03, 1.03),
        reference=above(run, attribute),
    )  # fmt: skip
    page.figure(
        f"outcomes_{file_safe(attribute)}", drawing, table,
        f"Information under the format {run.config.causal_prompt}, by the answer",
        f"Right or wrong is the answer under the format {table.told_by.iloc[0]}. {BAND}",
    )  # fmt: skip


def _knockouts(page: Page, run: AttributeResults, attribute: str) -> None:
    table, size = having(run["knockouts"], attribute=attribute), run.config.window
    table = table.assign(road=table["query"] + " ← " + table["keys"])
    is_whole = (table["first"] == 0) & (table["last"] == run.n_blocks - 1)
    sweep = table[(table["last"] - table["first"] + 1 == size) & ~is_whole]
    if len(sweep):
        drawing = figures.curves(
            sweep, "first", group="road", title=f"Attention kept from keys: {attribute}",
            x_label=f"first of {size} blocks", y_label="gain of the margin (logits)", reference=0,
        )  # fmt: skip
        page.figure(
            f"knockout_{file_safe(attribute)}", drawing, sweep,
            f"What not seeing some keys in a window of blocks costs the right {attribute}",
            f"Below 0: the right label leads by less. {BAND}",
            "Random keys are as many as the audio has, drawn anew for every clip.",
        )  # fmt: skip
    columns = ["query", "keys", "mean", "low", "high", "share", "hit", "base_hit", "n"]
    page.table(
        f"{attribute}: kept from them in all blocks (share of what silence costs)",
        table.loc[is_whole, columns].reset_index(drop=True),
        of="knockouts",
    )


def method(run: AttributeResults) -> str:
    """How scores and intervals were made."""
    config, n = run.config, len(run.inputs["validation"])
    return (
        f"Model: {config.model}, {config.dtype}, {run.n_blocks} blocks, engine {config.engine}. "
        f"Labels are scored by mode {config.label_mode}. Intervals resample {config.resampled} "
        f"{config.n_resamples} times with seed {config.seed}. The enrichment was chosen on {n} "
        "clips. Source, block and coefficient are not published by AudioLens: here they are "
        "chosen, or set."
    )
