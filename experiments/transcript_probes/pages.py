"""The page of a ``transcript_probes`` run: what is written, and what tells that it is wrong."""

from ..materials.clips import of_whom
from ..materials.probe_pages import (
    PROBE_CAVEATS,
    fill_with_probes,
    how_probed,
    read_by_whom,
    what_was_read,
)
from ..materials.transcript_tables import error_counts
from ..materials.transcription import Transcription
from ..workbench.page import Page
from .tables import TranscriptResults

N_READ = 6
"""Clips whose transcripts are shown."""
CAVEATS = (
    *PROBE_CAVEATS,
    "Labels come from the model's own transcripts: those of another model, or of other clips, are "
    "other labels. With few wrong transcripts there is little to learn from.",
    "Transcripts are greedy: a recogniser that falls back on other temperatures, or on another "
    "threshold, makes other errors.",
)


def lead(run: TranscriptResults) -> str:
    """What was written down, and what was read of it."""
    table, is_said = run["transcripts"], run["transcripts"].holds.to_numpy() == "speech"
    errors, n_words = error_counts(table[is_said]).sum(axis=0)
    rate = f", with {errors / n_words:.2f} errors for each of {n_words:.0f} {run.config.unit}s"
    return (
        f"{len(table)} clips are written down{rate if n_words else ''}. Where a transcript ends, "
        f"before that is decided, probes read {what_was_read(run)} off the decoder's stream at "
        f"every depth. {read_by_whom(run)} Beside them stand probes of what needs no state: "
        f"{', '.join(run.inputs['baselines'].values())}. What is said: "
        f"{of_whom(run['manifest'][is_said])}."
    )


def fill_page(page: Page, run: TranscriptResults, ours: Transcription) -> None:
    """Transcripts and their labels, then every label by depth."""
    page.section("Transcripts")
    page.table("Labels, and how many transcripts have each", "classes")
    for row in run["unread"].itertuples():
        page.note(f"{row.label} is not read: {row.why}.", is_warning=True)
    table = run["transcripts"].set_index("clip")
    shown = page.sample(
        ours.clips, lambda one: table.holds[one.name], seed=run.config.seed, most=N_READ
    )
    which = f"{shown.which}, each" if shown.how else shown.which
    page.play(
        shown, f"{which} with what is written of it.",
        lambda one: {"said": ours.said_in(one) or "nothing",
                     "written": table.text[one.name] or "(nothing)"},
    )  # fmt: skip
    page.table("Transcripts, and what is known of them without states", "transcripts")
    fill_with_probes(page, run)


def method(run: TranscriptResults) -> str:
    """How transcripts, probes and intervals were made."""
    config = run.config
    cut = int((run["transcripts"].ended == 0).sum())
    return (
        f"Model: {config.model}, {config.dtype}. Greedy transcripts of at most "
        f"{config.max_new_tokens} tokens, of which {cut} were cut off there. Words are compared "
        f"after normalisation: {config.normaliser}. A transcript is right without any error, and "
        f"wrong from {config.wrong_rate:g} errors for a {config.unit} on; the others are left out. "
        "States are those at the last token of the transcript, in one pass over prompt and "
        "transcript; the mean log-probability counts the token that ends it. "
        f"{how_probed(run)}"
    )
