"""Parts of pages of experiments on clips that are asked for attributes."""

from collections.abc import Sequence

from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .attribute_answers import OfAttributes, attributes_of
from .clips import file_safe
from .confounds import add_confounds
from .recordings import Recording

FORMATS = {
    "prefix": "the clip alone, and how the answer begins",
    "question": "a question",
    "options": "a question that lists the labels",
}


def asked_in_words(run: OfAttributes) -> str:
    """How many clips are asked for what, in which formats; without a full stop."""
    asked = " and ".join(f"{name} ({len(of)} labels)" for name, of in run.inputs["labels"].items())
    said = [FORMATS[one] for one in FORMATS if one in {*run["answers"].prompt}]
    return f"{len(run['manifest'])} clips are asked for {asked}: {'; '.join(said)}"


def add_questions(page: Page, run: OfAttributes, recordings: Sequence[Recording]) -> None:
    """The prompts, the clips with their answers, and what else tells them apart."""
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


def add_answers(page: Page, run: OfAttributes) -> None:
    """How often the answers are right, by format, and without the audio."""
    page.section("Answers")
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
