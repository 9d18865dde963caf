"""The page of a ``grounding`` run: sections, and how to read them."""

from collections.abc import Sequence

from ..materials.clips import of_whom
from ..materials.conflict_pages import add_clips, add_prompts, known_rule, the_clips
from ..materials.recordings import Recording
from ..workbench.page import Page
from ..workbench.results import having
from . import figures as draw
from .claims import WHAT
from .measure import READINGS
from .tables import GroundingResults

CAVEATS = (
    "Two readings: denoise shows what suffices to bring an answer, noise what it needs. Parts that "
    "stand in for each other show in neither alone; the readings are not averaged.",
    "A coefficient says how an effect is shared, not how large it is: where little moves the "
    "answer it is NaN, and the items that are left differ from depth to depth.",
    "A voice's donor is another recording: whatever differs in it is exchanged with its label.",
    "A head is named only if it surely moves the answer further than every other head, and "
    "recovers more than half of the exchange in both readings. Several heads that share an input "
    "are no single head.",
    "Pointwise bands: each depth's interval holds by itself, not the whole curve at once.",
)


def lead(run: GroundingResults) -> str:
    """What is exchanged in which clips, and what is known beforehand."""
    if run.config.condition == "audio_only":
        exchanged = (
            "The instruction asks for it and names no label. The clip is exchanged for one of "
            "another label, T; there is no instruction to exchange, so that the grounding "
            "coefficient is NaN."
        )
    else:
        exchanged = (
            "The instruction names another label, T. Once the clip is exchanged for one of T, once "
            "the instruction for one that names A: the grounding coefficient (gc) is the share "
            "of the voice in what both exchanges move. This page shows it for the whole answer, "
            "and for what every span carries at every depth, and every head and MLP."
        )
    rule = known_rule(
        run,
        "The coefficient of the whole answer has to be on opposite sides of one half. Logits do "
        "not stop where the answer is decided: a voice that agrees with it raises them further.",
    )
    return f"{the_clips(run)} {exchanged}{rule}"


def fill_page(page: Page, run: GroundingResults, recordings: Sequence[Recording]) -> None:
    """What was asked and answered, the stream, and heads and MLPs."""
    items = run["items"]
    page.section("What was asked, and answered")
    add_prompts(page, run)
    page.table(
        "Items: the answer as asked, with the audio and with the text exchanged, and the total "
        "effects in logits",
        items.drop(columns=["pair", "equal_lengths"]),
        of="items",
    )
    answers = {"answer": "answer"}
    answers |= {f"{what} exchanged": f"answer_{name}" for name, what in WHAT.items()}
    add_clips(
        page, run, recordings, ", and the answers as asked and with either input exchanged.",
        lambda one: {
            what: ", ".join(having(items, clip=one.name)[name].dropna().unique())
            for what, name in answers.items()
        },
    )  # fmt: skip
    page.section(
        "By depth",
        "One span is exchanged at one depth, and the answer is read again. An effect is a recovery "
        "times its total effect: how far the answer moves, in logits.",
    )
    draw.add_coefficient(page, run)
    for reading in READINGS:
        draw.add_handoffs(page, run, reading)
    page.table("Hand-overs, with 95 % bootstrap intervals over clips", "handoffs")
    page.section(
        "Heads and MLPs",
        "The output of one head (before its projection), or of one MLP, is exchanged at the "
        "readout.",
    )
    for reading in READINGS:
        draw.add_heads(page, run, reading)
    page.table(
        "The head that moves the answer most, and how far it is ahead of the next", "best_heads"
    )
    draw.add_mlps(page, run)
    page.table("All heads and MLPs, with intervals (every span: node_means)", "node_means")


def method(run: GroundingResults) -> str:
    """How effects, coefficients and intervals were made."""
    config, clips = run.config, of_whom(run["manifest"])
    form = "e_audio / (e_audio + e_text)" if config.gc_form == "share" else "e_audio / e_text"
    return (
        f"Model: {config.model}, {config.dtype}, engine {config.engine}. The clips: {clips}; what "
        "holds for other speakers or sentences the intervals do not say. gc is "
        f"{form}, each effect clipped at 0, and NaN where both add up to less than "
        f"{config.min_effect:g} logits; a recovery is NaN where its total effect is below that. "
        f"Intervals resample clips {config.n_resamples} times with seed {config.seed}."
    )
