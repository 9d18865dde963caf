"""The page of an ``emotion_conflict`` run: sections, and how to read them."""

from collections.abc import Sequence

import pandas as pd

from ..materials.clips import of_whom
from ..materials.conflict_pages import known_rule, the_clips
from ..materials.conflict_runs import EXCHANGES
from ..materials.confounds import add_confounds
from ..materials.recordings import Recording
from ..materials.trained_lens import lens_name
from ..workbench.figures import limits_of
from ..workbench.page import Page
from . import figures as draw
from .curves import MEAN_CURVE
from .tables import EmotionResults, items_with_delta

CONDITIONS = {
    "audio_only": "asks what the voice carries (A), and names no label",
    "conflict": "asks to judge as another label, T",
    "consistent": "the same words, naming the voice's own label A",
    "mention_only": "control: mentions T as an example, without asking for it",
    "list_all": "control: lists all labels, in another order for every clip",
    "irrelevant_adjective": "control: the words of conflict with a word that is no label",
}
CAVEATS = (
    "Attention is no cause: a position may be attended to and not used. What is used, only "
    "patching shows, and only for these prompts.",
    "Label copying: the instruction of conflict contains the word of T, so T's logit may rise "
    "by copying. mention_only and list_all measure that, and the label span is patched apart.",
    "Pointwise bands: each depth's interval holds by itself, not the whole curve at once.",
    "The logit lens applies the final norm and the unembedding to inner states; where its "
    "fidelity is low it says little. Late settling should also show under patching.",
)
TUNED_LENS = (
    "The tuned lens adds a trained map at every depth, which learnt to predict the output: it can "
    "read a label at a depth where the model has not settled it."
)


def lead(run: EmotionResults) -> str:
    """What was asked of which clips."""
    rule = known_rule(
        run, "A method that measures arbitration has to reverse its conclusion between them."
    )
    return (
        f"{the_clips(run)} The instruction asks for it, or names another of the "
        f"{len(run.inputs['labels'])} labels, T. This page shows which of the two the answer "
        f"follows, at which depth that can be read, and which positions carry it.{rule}"
    )


def fill_page(page: Page, run: EmotionResults, recordings: Sequence[Recording]) -> None:
    """What was asked, the answers, lens, patching and attention."""
    _asked(page, run, recordings)
    page.section("Answers")
    draw.add_answers(page, run)
    draw.add_flips(page, run)
    page.table(
        "Flip summary; the primary set are the clips whose voice is recognised alone",
        "ob1_flip_summary",
    )
    _lens(page, run)
    _patching(page, run)
    page.section("Attention")
    draw.add_attention(page, run)
    draw.add_ratio(page, run)


def _asked(page: Page, run: EmotionResults, recordings: Sequence[Recording]) -> None:
    modes, items = run.config.modes, items_with_delta(run)
    page.section("What was asked", "The same clip under every instruction.")
    said = {f"the first clip's, {name}": words for name, words in run.inputs["prompts"].items()}
    page.table(
        "Conditions",
        [
            {"condition": mode, "instruction": CONDITIONS[mode]}
            | {name: words.get(mode, "") for name, words in said.items()}
            for mode in modes
        ],
    )
    limits = limits_of(items[items.condition.isin(draw.MAIN)].delta)
    shown = page.sample(recordings, lambda one: one.label, seed=run.config.seed)
    items = items[items["clip"].isin([one.name for one in shown.clips])]
    final = items.drop_duplicates(["clip", "target", "condition"]).set_index(["clip", "condition"])
    page.play(
        shown,
        f"{shown.which} (mono, 16 kHz), its Δlogit by depth (T minus A, above zero the "
        "instruction leads; one scale for all clips), and the answers.",
        lambda one: {
            f"answer, {mode}": ", ".join(dict.fromkeys(final.loc[[(one.name, mode)]].prediction))
            for mode in draw.MAIN
            if mode in modes
        },
        lambda one: draw.save_clip_curve(page, one.name, items, limits),
    )
    page.table(
        "The clips, and what was measured of them",
        run["manifest"].drop(columns=["sha256", "voiced_fraction"]),
        of="manifest",
    )
    add_confounds(page, run["confounds"], run.config)


def _lens(page: Page, run: EmotionResults) -> None:
    page.section(
        "Lens",
        f"The {lens_name(run.config.tuned_lens)} reads the scores of {len(run.inputs['labels'])} "
        "labels at the answer position after every block. The primary definition of the critical "
        f"depth here is {run.config.critical_method}; where definitions disagree, the depth is a "
        "matter of definition.",
    )
    draw.add_delta(page, run, "delta_logit__combined", draw.MAIN, "Δlogit by condition")
    if controls := [mode for mode in run.config.modes if mode not in draw.MAIN]:
        # Second, so that it keeps the colour that it has in the other figures.
        shown = [*controls[:1], "conflict", *controls[1:]]
        draw.add_delta(page, run, "delta_logit__controls", shown, "Δlogit of the control prompts")
    draw.add_fidelity(page, run)
    layers = run["critical_layers"]
    mean = layers[(layers.file == MEAN_CURVE) & layers.condition.isin(draw.MAIN)]
    page.table(
        "Depth at which the mean curve turns, by five definitions (per clip: critical_layers)",
        mean[["condition", "method", "depth", "low", "high", "relative_depth", "undefined"]],
    )


def _patching(page: Page, run: EmotionResults) -> None:
    text = (
        "A conflict run is the base. From a donor run one span's states are written into it after "
        "one block, and the answer is read again: what brings the donor's answer carries it. "
        "The donor text_swap is the same clip under an instruction that names the voice's own "
        "label, audio_swap a clip of the instructed label under the same instruction; the "
        "donor both differs in clip and instruction. The donor's total effect (TE) is how far its "
        "own answer gains, in logits, over the label that it displaces; recovery is the share of "
        "TE that the patch brings."
    )
    if unmoved := _unmoved(run["patching_summary"]):
        text += (
            f"\n\nNo recovery is shown for {' and '.join(unmoved)}: no item has a total effect of "
            f"{run.config.min_effect:g} logits or more."
        )
    page.section("Patching", text)
    draw.add_handoffs(page, run)
    for donor in EXCHANGES:
        draw.add_recovery(page, run, donor)
    draw.add_seed_patching(page, run)
    page.table("Hand-offs, with 95 % bootstrap intervals over clips", "handoffs")


def _unmoved(patching: pd.DataFrame) -> list[str]:
    """Donors, but for the run itself, that change no item's answer enough to be recovered."""
    most = patching[patching.donor != "self"].groupby("donor", sort=False)
    return [str(donor) for donor, part in most if part.recovery_mean.isna().all()]


def method(run: EmotionResults) -> str:
    """How intervals and recoveries were made."""
    config, clips = run.config, of_whom(run["manifest"])
    text = (
        f"Model: {config.model}, {config.dtype}. The clips: {clips}; what holds for other "
        f"speakers or sentences the intervals do not say. They resample clips {config.n_resamples} "
        f"times with seed {config.seed}; rates have Wilson intervals, which take items for "
        "independent (under all_pairs a clip has four; they are then too narrow). Recoveries are "
        f"undefined below a total effect of {config.min_effect:g} logits, and counted."
    )
    return text if config.tuned_lens is None else f"{text}\n\n{TUNED_LENS}"
