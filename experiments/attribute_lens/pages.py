"""The page of an ``attribute_lens`` run: sections, figures, and how to read them."""

from collections.abc import Sequence

from ..materials.clips import file_safe
from ..materials.confounds import add_confounds
from ..materials.recordings import Recording
from ..materials.trained_lens import lens_name
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .tables import AttributeResults, above, attributes_of

DEPTH = "depth (blocks passed)"
BAND = "Bands are 95 % bootstrap intervals, each depth by itself."
SHARE = (-0.03, 1.03)
FORMATS = {
    "prefix": "the clip alone, and how the answer begins",
    "question": "a question",
    "options": "a question that lists the labels",
}
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
    asked = " and ".join(f"{name} ({len(of)} labels)" for name, of in run.inputs["labels"].items())
    said = [FORMATS[one] for one in FORMATS if one in {*run["answers"].prompt}]
    return (
        f"{len(run['manifest'])} clips are asked for {asked}: {'; '.join(said)}. This page "
        "shows at which depth the label can be read, at the position that answers and where the "
        "attribute is named, what it costs where attention is kept from one or the other, and "
        "whether giving early states to later blocks helps."
    )


def fill_page(page: Page, run: AttributeResults, recordings: Sequence[Recording]) -> None:
    """What was asked, answers, lens, attention and enrichment."""
    _asked(page, run, recordings)
    page.section("Answers")
    _answers(page, run)
    page.section(
        "Lens",
        f"The {lens_name(None)}"
        + (f" and the {lens_name(run.config.tuned_lens)}" if run.config.tuned_lens else "")
        + " reads the labels after every block, at the readout and at the last word that names the "
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
    if run.config.enrich_modes:
        page.section(
            "Enrichment",
            "A state after a later block is enriched with that of an earlier depth. Which, and "
            "how, is chosen on the clips of the search; all other numbers are of the other clips.",
        )
        _enrichment(page, run)


def _asked(page: Page, run: AttributeResults, recordings: Sequence[Recording]) -> None:
    page.section("What was asked")
    page.table(
        "The first clip's prompts, audio left out",
        [
            {"attribute": attribute, "format": one, "prompt": said}
            for attribute, prompts in run.inputs["prompts"].items()
            for one, said in prompts.items()
        ],
    )
    first = attributes_of(run)[0]
    shown = page.sample(recordings, lambda one: one.cells.get(first), seed=run.config.seed)
    answers = having(run["answers"], prompt=run.config.causal_prompt)
    page.play(
        shown, f"{shown.which} (mono, 16 kHz), its labels and the answers.",
        lambda one: {f"{row.attribute}: {row.label}": f"answer {row.prediction}"
                     for row in having(answers, clip=one.name).itertuples()},
    )  # fmt: skip
    page.table(
        "The clips, and what was measured of them",
        run["manifest"].drop(columns=["sha256", "voiced_fraction"]),
        of="manifest",
    )
    for attribute in attributes_of(run):
        add_confounds(page, having(run["confounds"], attribute=attribute), run.config)


def _answers(page: Page, run: AttributeResults) -> None:
    table = run["accuracy"]
    asked = table.prompt.where(table.heard == "audio", table.heard.str.replace("_", " "))
    for attribute in attributes_of(run):
        shown = having(table.assign(asked=asked), attribute=attribute)
        drawing = figures.bars(
            shown, "asked", title=f"Answers right: {attribute}", y_label="share of clips",
            y_limits=(0, 1.05), reference=1 / len(run.inputs["labels"][attribute]),
        )  # fmt: skip
        page.figure(
            f"accuracy_{file_safe(attribute)}", drawing, shown,
            f"How often the right {attribute} is answered, by format, and without the audio",
            "Whiskers are 95 % bootstrap intervals, the line one over the number of labels. "
            f"Without the audio the format is {run.config.causal_prompt}.",
        )  # fmt: skip


def _information(page: Page, run: AttributeResults, attribute: str) -> None:
    every = having(run["information_curves"], attribute=attribute)
    curve = every.prompt + ", " + every.position
    every = every.assign(curve=curve if every.lens.nunique() == 1 else curve + ", " + every.lens)
    drawn = {
        "hit": (f"Information: {attribute}", "share of clips"),
        "label_mass": ("Probability of the labels together", "probability"),
        "kl": ("Distance of the lens from the output", "KL (nats)"),
    }
    parts = [
        (having(every, measure=name),
         {"title": title, "y_label": label,
          "reference": above(run, attribute) if name == "hit" else None})
        for name, (title, label) in drawn.items()
    ]  # fmt: skip
    drawing = figures.panels(
        figures.curves, parts, height=3.4, x="depth", group="curve", x_label=DEPTH
    )
    page.figure(
        f"information_{file_safe(attribute)}", drawing, having(every, measure=[*drawn]),
        f"What can be read of the {attribute}, by format and position",
        f"The line is {above(run, attribute):.2f}: chance and {run.config.margin:.0%} of it. "
        f"{BAND} At the last depth the readout's curve is the answer.",
        "Where the labels hold hardly any probability, or the lens is far from the output, a hit "
        "says little.",
    )  # fmt: skip


def _outcomes(page: Page, run: AttributeResults, attribute: str) -> None:
    table = having(run["outcomes"], attribute=attribute, lens="logit")
    if table.outcome.nunique() < 2:
        return
    told_by = table.told_by.iloc[0]
    drawing = figures.curves(
        table, "depth", group="outcome", title=f"Information by outcome: {attribute}",
        x_label=DEPTH, y_label="share of clips", y_limits=SHARE, reference=above(run, attribute),
    )  # fmt: skip
    page.figure(
        f"outcomes_{file_safe(attribute)}", drawing, table,
        f"Information under the format {run.config.causal_prompt}, by the answer",
        f"Right or wrong is the answer under the format {told_by}. {BAND}",
    )  # fmt: skip


def _knockouts(page: Page, run: AttributeResults, attribute: str) -> None:
    table = having(run["knockouts"], attribute=attribute)
    table = table.assign(road=table["query"] + " ← " + table["keys"])
    is_whole = (table["first"] == 0) & (table["last"] == run.n_blocks - 1)
    is_window = table["last"] - table["first"] + 1 == run.config.window
    sweep, whole = table[is_window & ~is_whole], table[is_whole]
    if len(sweep):
        drawing = figures.curves(
            sweep, "first", group="road", title=f"Attention kept from keys: {attribute}",
            x_label=f"first of {run.config.window} blocks", y_label="gain of the margin (logits)",
            reference=0,
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
        whole[columns].reset_index(drop=True),
        of="knockouts",
    )


def _enrichment(page: Page, run: AttributeResults) -> None:
    search = run["enrichment_search"]
    for attribute in attributes_of(run):
        some = having(search, attribute=attribute)
        if some.empty:
            continue
        means = some.groupby(["mode", "source", "layer"], sort=False).gain.mean().reset_index()
        parts = [
            (having(means, mode=mode), {"title": f"{attribute}: {mode}"})
            for mode in run.config.enrich_modes
        ]
        drawing = figures.panels(
            figures.heat_map, parts, height=4.2, x="layer", y="source", value="gain", centre=0,
            x_label="block enriched", y_label="depth of the source",
            value_label="gain of the margin (logits)", is_upwards=True,
        )  # fmt: skip
        page.figure(
            f"enrichment_{file_safe(attribute)}", drawing, means,
            f"Enrichment on the clips of the search: {attribute}",
            "Mean gain; one cell of these was chosen, the one with the most right answers.",
        )  # fmt: skip
    page.table("On the clips that it was not chosen on, with what should not help", "enrichments")


def method(run: AttributeResults) -> str:
    """How scores and intervals were made."""
    config = run.config
    n = len(run.inputs["validation"])
    return (
        f"Model: {config.model}, {config.dtype}, {run.n_blocks} blocks, engine {config.engine}. "
        f"Labels are scored by mode {config.label_mode}. Intervals resample "
        f"{config.resampled} {config.n_resamples} times "
        f"with seed {config.seed}. The enrichment was chosen on {n} clips. Source, block and "
        "coefficient are not published by AudioLens: here they are chosen, or set."
    )
