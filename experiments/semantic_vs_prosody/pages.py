"""The page of a ``semantic_vs_prosody`` run: sections, and how to read them."""

from collections.abc import Sequence

from ..materials.confounds import add_confounds
from ..workbench.figures import limits_of
from ..workbench.page import Page
from ..workbench.report import Clip
from . import figures as draw
from .items import QUESTIONS, SpokenItem
from .tables import ProsodyResults, pair_types, read_lens

MAX_CLIPS = 24
"""Clips that the page lets one hear."""
CAVEATS = (
    "Flip rates over all pairs are reported with their base rate and ceiling, because between "
    "clips of equal length the run patched at depth 0 is the donor's own: a high plateau there "
    "says how often the donor says the target, not what a layer controls.",
    "A lens says what could be read at a depth, not what the model uses there; what is used, only "
    "patching shows, and only for these prompts and clips.",
    "That the audio's effect decays with depth means that the information has been copied out, not "
    "that it stopped mattering: look for the span whose recovery rises meanwhile.",
    "A clip of another sentence is another recording altogether: semantic pairs share the voice's "
    "label and the speaker, not the timing.",
    "Pointwise bands: each depth's interval holds by itself, not the whole curve at once.",
)


def lead(run: ProsodyResults) -> str:
    """What was asked of which clips."""
    clips, prompt = run["manifest"], run.config.prompt
    counts = {"sentence": clips.text.nunique(), "speaker": clips.speaker.nunique()}
    of = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items())
    lead = (
        f"{len(clips)} clips ({of}) whose words carry one label and whose voice another, of "
        f"{', '.join(run.config.labels)}. The model is asked: “{prompt}” This page shows whose "
        "label it answers, at which depth that can be read, and by which way the words and the "
        "voice reach the answer."
    )
    if run.config.is_calibration:
        lead += (
            "\n\nfollows_semantics was trained to answer the emotion of the words, "
            "follows_prosody that of the voice; asked for either by name, both can tell it."
        )
        if prompt == QUESTIONS["overall"]:
            lead += (
                " What decides, which exchange moves the answer, and what is handed on must "
                "reverse between them."
            )
    return lead


def fill_page(page: Page, run: ProsodyResults, items: Sequence[SpokenItem]) -> None:
    """What was asked, the answers, lens, patching, and other donors."""
    _asked(page, run, items)
    page.section("Answers")
    table = run["answers"]
    overall = table[table.stratum == "all"].drop(columns="stratum")
    page.table("What the answer follows, over all clips", overall)
    draw.add_answers(page, run)
    page.section(
        "Lens",
        f"The logit lens reads the {len(run.config.labels)} labels' scores at the position that "
        "predicts the answer, at every depth.",
    )
    draw.add_wins(page, run)
    draw.add_margin(page, run)
    _patching(page, run)
    page.section("Controls")
    draw.add_control_flips(page, run)


def _asked(page: Page, run: ProsodyResults, items: Sequence[SpokenItem]) -> None:
    lens = read_lens(run)
    limits = limits_of(lens.margin)
    prediction = run["runs"].set_index("item").prediction
    sample = page.sample(
        items, lambda one: (one.semantic, one.prosody), seed=run.config.seed, most=MAX_CLIPS
    )
    clips = []
    for item in sample.clips:
        table = lens[lens["item"] == item.name][["depth", "margin"]]
        figure = draw.save_clip_curve(page, item.name, table, limits)
        path = page.folder.add_clip(item.name, item.path)
        about = {"words": item.semantic, "voice": item.prosody}
        about |= {"answer": prediction[item.name], "speaker": item.speaker}
        clips.append(Clip(path, f"“{item.text}”", figure, about))
    page.section("What was asked", f"“{run.config.prompt}”")
    page.clips(
        clips,
        f"{len(clips)} of the {len(items)} clips (mono, 16 kHz), and the margin by depth "
        f"(above zero the voice leads; one scale for all). {sample.how}".rstrip(),
    )
    shown = ["duration_s", "rms_dbfs", "f0_median_hz", "f0_iqr_hz"]
    means = run["manifest"].groupby("prosody_label", sort=False)[shown].mean().reset_index()
    page.table("The voices, by their label", means)
    add_confounds(page, run["confounds"], run.config)


def _patching(page: Page, run: ProsodyResults) -> None:
    pairs = run["pairs"]
    kinds = {
        "semantic": "semantic pairs share speaker and voice and differ in the words",
        "prosody": "prosody pairs share speaker and words and differ in the voice",
    }
    counted = "; ".join(f"{(pairs.type == kind).sum()} {kinds[kind]}" for kind in pair_types(run))
    page.section(
        "Patching",
        f"A is the base; a part of its residual stream is replaced by B's. {counted}. Every pair "
        f"is run in both directions. In {(pairs.len_A != pairs.len_B).sum()} of {len(pairs)} pairs "
        f"the clips differ in length and are aligned by {run.config.align}.",
    )
    for which in pair_types(run):
        draw.add_flips(page, run, which)
        draw.add_shift(page, run, which)
    draw.add_recovery(page, run)
    page.table("Hand-offs among movable pairs, with 95 % bootstrap intervals", "handoffs")


def method(run: ProsodyResults) -> str:
    """How intervals, depths and recoveries are to be understood."""
    config = run.config
    return (
        f"Model: {config.model}, {config.dtype}, engine {config.engine}. Intervals resample each "
        f"{config.cluster} whole, {config.n_resamples} times with seed {config.seed}; for a pair, "
        "that of its base. Depth k is the residual stream after k blocks: patches at depth 0 "
        "exchange the model's inputs. Recovery is the share of the donor's effect on target minus "
        f"the base's answer, undefined below {config.min_effect:g} logits."
    )
