"""The page of a ``class_neurons`` run: figures, and how to read them."""

from collections.abc import Iterator, Sequence

import pandas as pd

from hooked_alm.methods.neurons.sets import NEURON_CONTROLS, SELECTORS

from ..materials.class_changes import CHANGES
from ..materials.clips import of_whom
from ..materials.conflict_experiment import ConflictExperiment
from ..materials.conflict_pages import add_prompts, known_rule
from ..materials.confounds import add_confounds
from ..materials.recordings import Recording
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .settings import ClassNeuronsConfig
from .tables import NeuronResults, summarise

CAVEATS = (
    "Which neurons a selector takes is a statement about how they are active, not about what they "
    "do: that is seen where they are taken out and made stronger, on other speakers.",
    "lap and lape count how often a neuron fires, mad and cas how strongly: of neurons that code a "
    "class by strength the first see nothing, of those that code it by rate the others little.",
    "A set of neurons shows what it does where everything else stays: neurons that stand in for "
    "each other show in no set alone.",
    "A gain of 4 is five times what a neuron ever was: far from what the model knows. What it then "
    "says of other classes, and beside the labels, is shown with it.",
)
DRAWN: dict[str, str] = {"random": "random", "layer": "same blocks", "magnitude": "as strong"}


class NeuronReport(ConflictExperiment[ClassNeuronsConfig]):
    """What is made of the tables of a ``class_neurons`` run, and what its page says."""

    caveats = CAVEATS

    def summaries(self, run: NeuronResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield from super().summaries(run)
        yield from summarise(run)

    def lead(self, run: NeuronResults) -> str:
        """What was logged, selected and changed."""
        config, clips = run.config, run["manifest"]
        logged, neurons = having(run["classes"], half="discovery"), run.inputs["neurons"]
        sizes = ", ".join(f"{one.cls} {one.n_logged}" for one in logged.itertuples())
        right = " that the model answers right" if config.only_right else ""
        n = round(config.rate * neurons["blocks"] * neurons["each"])
        return (
            f"{len(clips)} clips, {of_whom(clips)}. An item's class is what the {config.rule} "
            f"says: the column {config.label_column}. Neurons are selected on the items{right} of "
            f"one part of the groups ({sizes}), {n} for every class, and judged on the others, "
            "which share no group with them: taken out, made stronger, and read while audio or "
            "instruction are exchanged."
        ) + known_rule(
            run, "The share of the audio in what drives neurons at the readout has to be on "
            "opposite sides of one half.",
        )  # fmt: skip

    def page(self, page: Page, run: NeuronResults) -> None:
        """What was answered, the neurons, what they do, and what drives them."""
        _asked(page, run, self.recordings)
        page.section(
            "The neurons",
            "Four selectors take as many neurons for every class (lape fewer, where no more fire "
            "often enough).",
        )
        _layers(page, run)
        page.table("Neurons, best first", "neurons", 40)
        page.table("What two lists share, beside what two random ones would", "overlaps", 40)
        page.section(
            "Taken out", f"The neurons of a class are at 0, at {_where(run.config.place)}."
        )
        _taken_out(page, run)
        page.section("Stronger", f"Neurons that {run.config.selector} selects, times 1 + alpha.")
        _stronger(page, run)
        page.section(
            "What drives them",
            "In a conflict the audio is exchanged for a clip of what the instruction names, or the "
            "instruction for one that names what the voice carries, and gates at the readout are "
            "read.",
        )
        _driven(page, run)

    def method(self, run: NeuronResults) -> str:
        """How neurons were selected, changed and judged."""
        config, halves = run.config, run.inputs["halves"]
        n_logged, n_judged = (len(halves.get(half, [])) for half in ("discovery", "held-out"))
        return (
            f"Model: {config.model}, {config.dtype}, engine {config.engine}. Values are those of "
            f"mlp.hook_{config.site} at {_where(config.pool)}; a neuron fires above 0. Selected on "
            f"{n_logged} groups, judged on {n_judged}; rate {config.rate:g}, bar of lape "
            f"{config.lape_filter:g}. Random sets: {config.n_draws} of each kind and class, "
            f"without the neurons that {config.selector} selects. A share is NaN where both "
            f"effects add up to less than {config.min_drive:g}. Intervals resample groups "
            f"{config.n_resamples} times with seed {config.seed}."
        )


def _where(span: str) -> str:
    return "every position" if span == "all" else f"the {span}"


def _asked(page: Page, run: NeuronResults, recordings: Sequence[Recording]) -> None:
    page.section("What was asked, and answered")
    add_prompts(page, run)
    page.table("Items of every class and half: those that are right, and those logged", "classes")
    shown = page.sample(recordings, lambda one: one.label, seed=run.config.seed, most=10)
    by_clip = run["answers"].groupby("clip", sort=False).prediction.agg(", ".join)
    page.play(
        shown,
        f"{shown.which}, and what is answered.",
        lambda one: {run.config.label_column: one.label, "answer": by_clip[one.name]},
    )
    add_confounds(page, run["confounds"], run.config)


def _layers(page: Page, run: NeuronResults) -> None:
    table = run["layers"]
    counts, even = table[["chosen_by", "block", "neurons"]], float(table.uniform.iloc[0])
    drawing = figures.bars(
        counts, "block", "neurons", group="chosen_by", y_label="neurons", reference=even
    )
    tests = table.drop_duplicates("chosen_by")
    said = "; ".join(f"{one.chosen_by} {one.p_uniform:.3f} and {one.p_activity:.3f}"
                     for one in tests.itertuples())  # fmt: skip
    page.figure(
        "layers", drawing, table, "In which blocks the neurons are",
        "Neurons of all classes, each once. The line is an even spread. p of an even spread, and "
        f"of one that goes with the blocks' activity: {said}.",
        "Draws from either null; a block that is more active has more to select from.",
    )  # fmt: skip


def _taken_out(page: Page, run: NeuronResults) -> None:
    means = having(run["matrix"], measure="lead", chosen_by=SELECTORS)
    drawing = figures.panels(
        figures.heat_map,
        [(having(means, chosen_by=one), {"title": one}) for one in SELECTORS],
        height=3.2, x="cls", y="of", value="mean", x_label="items of", y_label="neurons of",
        value_label="lead (logits)", centre=0, decimals=2,
    )  # fmt: skip
    page.figure(
        "matrix", drawing, means, "What the neurons of one class cost items of another",
        f"Change of the {CHANGES['lead']}; blue is a loss. Neurons of a class alone show on the "
        "diagonal. Intervals stand in the table matrix.",
    )  # fmt: skip
    table = having(run["specificity"], measure="lead")
    table = table.assign(neurons=table.chosen_by.replace(DRAWN))
    drawing = figures.bars(table, "neurons", reference=0, y_label="own − other (logits)")
    page.figure(
        "specificity", drawing, table, "What they cost their own class beyond the others",
        "Own minus other change of the lead of the right label; below 0, neurons matter more for "
        f"their class. The last {len(NEURON_CONTROLS)} are random neurons, as many as "
        f"{run.config.selector} selects. Intervals resample groups.",
        "Random neurons must not be specific.",
    )  # fmt: skip
    page.table("Own and other change, lead and accuracy (beyond: the selector minus random ones)",
               "specificity")  # fmt: skip


def _stronger(page: Page, run: NeuronResults) -> None:
    titles = {
        "said_of": "answers that are their class", "right": "answers that are right",
        "kl_rest": "KL beside the labels (nats)",
    }  # fmt: skip
    some = having(run["dose_means"], measure=[*titles])
    parts = [(having(some, measure=one), {"title": title}) for one, title in titles.items()]
    drawing = figures.panels(figures.curves, parts, height=3.0, x="alpha", y_label="mean")
    page.figure(
        "dose", drawing, some, "What a strength brings, and what it costs",
        "At −1 the neurons are taken out, at 0 nothing is changed. Mean over judged items of "
        "other classes than the neurons'; intervals resample groups.",
        "At 0 every curve is the unchanged run's.",
    )  # fmt: skip
    page.table("The same in numbers, and the rank correlation of lead and strength", "dose_means")
    page.table("Without labels: of what is answered first; what becomes of right and wrong answers",
               "second_pass")  # fmt: skip


def _driven(page: Page, run: NeuronResults) -> None:
    some = having(run["drive_means"], measure="share")
    if some.empty or not some.n.any():
        page.note("No conflict has both inputs exchanged and moves the neurons enough.")
        return
    some = some.assign(neurons=some.chosen_by.replace(DRAWN))
    drawing = figures.bars(some, "neurons", reference=0.5, y_limits=(0, 1), y_label="audio's share")
    page.figure(
        "drive", drawing, some, "The audio's share of what moves the neurons at the readout",
        "Of the gates of what the instruction names, less those of what the voice carries. Above "
        "one half the audio drives them, below it the instruction. Intervals resample groups.",
    )  # fmt: skip
    page.table("Effects and shares", "drive_means")
