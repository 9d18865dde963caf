"""The page of an ``asr_components`` run: sections, figures, and how to read them."""

import pandas as pd

from ..materials.transcription import Transcription
from ..workbench import figures
from ..workbench.intervals import unprefixed
from ..workbench.page import Page
from .plan import FAILURES
from .tables import MEASURE, ComponentResults, failing, is_whole_stack

CAVEATS = (
    "A head that is left out may have had a part in everything: read what it cures beside what it "
    "costs. A cure that costs many words is none.",
    "What takes a head's place, zero or its mean, is far from what any head writes; what is lost "
    "without it may be lost to that. Heads of about the same norm, left out likewise, show what "
    "that alone does.",
    "The gradient says what the first step of closing a head would do to the failing words; heads "
    "that it ranks low were not tried.",
    "A failure that several heads can carry, each by itself, has no single head, and leaving one "
    "out shows none.",
)
STEAD = {
    "zero": "zeros",
    "mean": "means over all clips, each over its prompt and transcript,",
}
NAMES = {"loop": "transcripts in circles", "hallucination": "words out of nothing"}


def lead(run: ComponentResults) -> str:
    """What was written down, and what fails."""
    n = {failure: len(failing(run, failure)) for failure in FAILURES}
    n_silent = int((run["transcripts"].holds == "no_speech").sum())
    text = (
        f"{len(run['transcripts'])} clips are written down: {n['loop']} transcripts go in circles, "
        f"and in {n['hallucination']} of {n_silent} clips without speech something is heard."
    )
    if not any(n.values()):
        return f"{text} As none fails, no head is left out."
    return (
        f"{text} One gradient says of every head of the decoder how much these words rest on it; "
        f"the first of them, {run['ablated'].node.nunique()} heads with some of about the same "
        "norm, are left out at every step of decoding, one at a time, of all clips."
    )


def fill_page(page: Page, run: ComponentResults, ours: Transcription) -> None:
    """What fails, which heads it rests on, and what leaving them out cures and costs."""
    page.section("With all heads")
    page.table("What is written down, by what the clips hold", "behaviour")
    _examples(page, run, ours)
    if run["effects"].empty:
        return
    page.section("What the gradient says")
    _effects(page, run)
    page.section("Without a head")
    _plane(page, run)
    page.table("Every head that was left out, with intervals", "heads")


def _examples(page: Page, run: ComponentResults, ours: Transcription) -> None:
    table = run["transcripts"].set_index("clip")
    wanted = {*failing(run, "loop")["clip"], *failing(run, "hallucination")["clip"]}
    failed = [one for one in ours.clips if one.name in wanted]
    if not failed:
        return
    shown = page.sample(failed, lambda one: table.holds[one.name], seed=run.config.seed, most=6)
    page.play(
        shown, f"{len(shown.clips)} of the {shown.n_of} clips that fail.",
        lambda one: {"said": ours.said_in(one) or "nothing", "written": table.text[one.name]},
    )  # fmt: skip


def _effects(page: Page, run: ComponentResults) -> None:
    table = run["effects"]
    for failure in FAILURES:
        mine = table[table.of == failure]
        if mine.empty:
            continue
        parts = [
            (some, {"title": f"{kind}-attention"})
            for kind, some in mine.groupby("kind", sort=False)
        ]
        drawing = figures.panels(
            figures.heat_map, parts, height=3.2, x="head", y="layer", value="effect", centre=0,
            x_label="head", y_label="block", value_label="nats per token", is_upwards=True,
        )  # fmt: skip
        page.figure(
            f"effects_{failure}", drawing, mine,
            f"What closing each head would do to {NAMES[failure]}, to first order",
            "Below 0: the failing words rest on the head. Means over the clips that fail.",
        )  # fmt: skip


def _plane(page: Page, run: ComponentResults) -> None:
    table = run["heads"]
    for failure, name in MEASURE.items():
        mine = table[table[f"{name}_mean"].notna()]
        if mine.empty:
            continue
        order = mine.sort_values(f"{name}_mean", ascending=False)
        rows = [
            {"node": row["node"], "what": what, **unprefixed(column, row)}
            for row in order.head(12).to_dict("records")
            for what, column in (("cured", name), ("more errors for a word", "wer_delta"))
        ]  # fmt: skip
        numbers = pd.DataFrame(rows)
        drawing = figures.bars(
            numbers, "node", group="what", title=f"Without a head: {NAMES[failure]}",
            y_label="share of clips; errors for a word", reference=0,
        )  # fmt: skip
        page.figure(
            f"without_{failure}", drawing, numbers,
            f"What leaving a head out cures of {NAMES[failure]}, and what it costs",
            "Both bars belong together: a head is the failure's if the first is high and the "
            "second is not. Heads in all blocks are left out together.",
        )  # fmt: skip


def method(run: ComponentResults) -> str:
    """How transcripts, choices and intervals were made."""
    config = run.config
    heads, left_out = run["heads"], "No head was left out."
    if len(heads):
        n_all = int(heads.layer.map(is_whole_stack).sum())
        left_out = (
            f"{len(heads)} heads were left out, {n_all} of them in all blocks; "
            f"{STEAD[config.ablation]} took their place. The best is chosen on "
            f"{config.discovery_share:.0%} of the clips and judged on the others."
        )
    return (
        f"Model: {config.model}, {config.dtype}. Greedy transcripts of at most "
        f"{config.max_new_tokens} tokens, {config.batch_size} clips a batch; in circles: at most "
        "four tokens, four times in a row. Words are compared after normalisation: "
        f"{config.normaliser}. {left_out} Intervals resample {config.resampled} "
        f"{config.n_resamples} times with seed {config.seed}."
    )
