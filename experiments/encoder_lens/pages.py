"""The page of an ``encoder_lens`` run: sections, figures, and how to read them."""

import pandas as pd

from ..materials.clips import ClipFile
from ..materials.transcription import Transcription
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .tables import DepthResults, n_depths

DEPTH = "depth of the encoder (blocks passed)"
BAND = "Bands are 95 % bootstrap intervals, each depth by itself."
N_READ = 6
"""Clips whose transcripts are shown at every depth."""
CAVEATS = (
    "The decoder was never trained on inner depths: what it writes of them shows what it can read "
    "there, not what is there. Information that is in another form stays unread.",
    "Not causal: that a transcript is settled at a depth does not say that later blocks do "
    "nothing. What is used, only patching shows.",
    "Transcripts are greedy, with nothing suppressed and nothing heard again. What a recogniser "
    "makes of the same clip, with the checkpoint's own settings, can differ.",
    "The decoder's depths are read by the logit lens, on the model's own transcript: a token may "
    "be settled early because the words before it say so.",
)


def lead(run: DepthResults) -> str:
    """What was read at which depths."""
    n, last = len(run["stabilisation"]), n_depths(run)
    return (
        f"{n} clips are written down {last + 1} times each: once as the model hears them, and once "
        f"for every earlier depth of its encoder, as if no block followed. The final norm and an "
        "unchanged decoder read every depth. This page shows from which depth the transcript is "
        "the final one, what is written before that, and at which depth of the decoder its "
        "tokens are settled."
    )


def fill_page(page: Page, run: DepthResults, ours: Transcription) -> None:
    """Transcripts, how good they are at every depth, and the decoder's tokens."""
    page.section("Transcripts")
    _transcripts(page, run, ours)
    page.section("By the encoder's depth")
    _quality(page, run)
    page.section("By the decoder's depth")
    _tokens(page, run)
    page.table("Where either stack settles, mean over clips", "settled")


def _transcripts(page: Page, run: DepthResults, ours: Transcription) -> None:
    shown = page.sample(
        ours.clips, lambda one: one.cells.get("speaker"), seed=run.config.seed, most=N_READ
    )
    table = run["transcripts"]

    def about(one: ClipFile) -> dict[str, str]:
        mine = having(table, clip=one.name).set_index("depth").text
        said = ours.said_in(one)
        told = {} if said is None else {"said": said or "nothing"}
        return told | {f"depth {depth}": text or "(nothing)" for depth, text in mine.items()}

    which = f"{shown.which}, each" if shown.how else shown.which
    page.play(shown, f"{which} with what is written of it by depth.", about)


def _quality(page: Page, run: DepthResults) -> None:
    every, errors = run["depths"], run["word_errors"]
    parts = []
    if len(errors):
        parts.append((errors, {
            "title": "Against what was said", "y_label": f"errors for a {run.config.unit}",
            "reference": 0,
        }))  # fmt: skip
    parts.append((every[every.measure == "distance"], {
        "title": "Against the final transcript", "y_label": "share of characters changed",
        "reference": run.config.near,
    }))  # fmt: skip
    drawing = figures.panels(figures.curves, parts, height=3.4, x="depth", x_label=DEPTH)
    numbers = pd.concat([errors.assign(measure="word_errors"), every[every.measure == "distance"]])
    page.figure(
        "transcripts", drawing, numbers,
        "How far the transcript of a depth is from what was said, and from the final one",
        f"Errors are those of all clips over all their {run.config.unit}s, so that more than 1 "
        "means more errors than words. The line at the lower panel is what still counts as the "
        f"final transcript, {run.config.near:g}. {BAND}",
    )  # fmt: skip
    names = {"log_p_final": "the final transcript", "log_p_reference": "what was said"}
    likely = every[every.measure.isin([*names]) & every["mean"].notna()]
    page.figure(
        "log_probability",
        figures.curves(
            likely.assign(of=likely.measure.map(names)), "depth", group="of",
            title="How likely a transcript is", x_label=DEPTH, y_label="nats per token",
        ),
        likely, "Mean log-probability of a transcript's tokens, each given those before it",
        f"No generation: every depth is asked for the same words. {BAND}",
    )  # fmt: skip
    names = {
        "repetition": "tokens said before",
        "loops": "clips in circles",
        "empty": "clips empty",
    }
    odd = every[every.measure.isin([*names]) & every["mean"].notna()]
    page.figure(
        "odd_transcripts",
        figures.curves(
            odd.assign(what=odd.measure.map(names)), "depth", group="what",
            title="What is odd about transcripts", x_label=DEPTH, y_label="share",
            y_limits=(-0.03, 1.03),
        ),
        odd, "How often an inner depth makes the decoder repeat itself, or say nothing",
        "In circles: at most four tokens, four times in a row. Of an empty transcript no token is "
        f"said before. {BAND}",
    )  # fmt: skip
    page.table("All depths, with intervals", "depths")
    if len(errors):
        page.table("Errors of all clips, by depth", "word_errors")


def _tokens(page: Page, run: DepthResults) -> None:
    tokens = run["tokens"]
    counted = [
        {"depth": depth, "of": name, "share": float((tokens[column] == depth).mean())}
        for name, column in (("the model", "depth"), ("random directions", "random_depth"))
        for depth in range(run.n_blocks + 1)
    ]
    table = pd.DataFrame(counted)
    page.figure(
        "saturation",
        figures.bars(
            table, "depth", "share", group="of", title="Where the decoder settles a token",
            x_label="depth of the decoder", y_label="share of tokens",
        ),
        table, "The depth of the decoder from which a token is the likeliest for good",
        "At the last depth by definition. Random directions of the same length know nothing of "
        "the token; they settle where the model's own last state is read.",
    )  # fmt: skip


def method(run: DepthResults) -> str:
    """How transcripts and intervals were made."""
    config = run.config
    return (
        f"Model: {config.model}, {config.dtype}; encoder of {n_depths(run)} blocks, decoder of "
        f"{run.n_blocks}. Greedy transcripts of at most {config.max_new_tokens} tokens, all depths "
        f"of a clip in one batch. Words are compared after normalisation: {config.normaliser}. "
        f"Intervals resample {config.resampled} "
        f"{config.n_resamples} times with seed {config.seed}; those of error rates resample clips "
        "and divide sums."
    )
