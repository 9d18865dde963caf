"""The page of a ``minimal_pairs`` run: the pairs and why some were rejected, then the sweeps."""

from ..materials.exchange import DIRECTIONS
from ..materials.head_maps import draw_head_maps
from ..materials.pair_acceptance import EVERY
from ..workbench import figures
from ..workbench.controls import FAIL
from ..workbench.page import Page
from ..workbench.report import Clip
from .tables import PairResults, of

CAVEATS = (
    "Minimal as far as measured: frames, audio tokens, level, added noise, median pitch, and what "
    "linear probes read off the audio positions. What none of these reads, such as voice quality, "
    "may differ.",
    "A probe is linear, and of one depth. That it reads nothing is no proof that nothing is there; "
    "criteria of columns that no probe reads surely are left out.",
    "Pitch and pace are changed by overlap-add of the recording's own grains, which unchanged "
    "gives the recording itself. It leaves the spectral envelope, and what pitch does to a voice "
    "besides, as they were, and may be heard as what it is.",
    "What a changed clip should be answered has no truth: its answer is the one of the others that "
    "the change brings nearest, so that its total effect is large by choice.",
    "What is sampled are groups of pairs: speakers if ten or more are known, else the recording "
    "that a pair begins with. Pairs of recordings share their second clips, and are not quite "
    "independent.",
    "Noising shows what is necessary, denoising what is enough. Where a head that is removed is "
    "stood in for by others, ablation shows less than patching; where removing it takes the run "
    "away from all that the model has learnt, more.",
)

UNSHOWN = ("attribute", "family", "kind", "text", "speaker", "frames_a", "tokens_a")


def lead(run: PairResults) -> str:
    """What pairs were made of, and how many are accepted."""
    n, sets = len(run.inputs["recordings"]), run["sets"]
    told = ", ".join(f"{one.attribute} {one.accepted} of {one.n}" for one in sets.itertuples())
    lacking = [one for one in run.config.kinds if one not in {*run["pairs"].kind}]
    if lacking:
        whose = " or ".join(run.config.attribute if one == "label" else one for one in lacking)
        told += f"; no two recordings make a pair of {whose}"
    level = run.config.level_dbfs
    matched = "left as they are" if level is None else f"brought to {level:g} dBFS first"
    return (
        f"Minimal pairs of {n} recordings, whose levels are {matched}: two clips that are to "
        f"differ in one thing. Accepted are {told}. The accepted pairs lie in the run's folder, "
        "under pairs/: clips, manifest.csv, and pairs.jsonl, which circuits takes.\n\nEvery "
        "accepted pair is then exchanged, place by place and depth by depth, in both directions; "
        "every head is exchanged, and removed."
    )


def fill_page(page: Page, run: PairResults) -> None:
    """Pairs, criteria and probes; then curves and heads, set by set."""
    page.section("The pairs", "A pair is accepted if none of its criteria, nor its set's, fails.")
    page.table("Sets of pairs, and what rejected some", "sets")
    if "written" in run.tables and len(run["written"]):
        _add_clips(page, run)
    first = ["pair", "accepted", "label_a", "label_b", "clip_a", "clip_b"]
    others = [name for name in run["pairs"] if name not in first and name not in UNSHOWN]
    page.table(
        "The pairs, and what was measured of both clips", run["pairs"][first + others], of="pairs"
    )
    page.section("Criteria")
    worst = run["acceptance"][run["acceptance"].verdict == FAIL]
    page.table("Criteria that failed", worst, of="acceptance")
    of_set = run["acceptance"][run["acceptance"].pair == EVERY]
    page.table("Criteria of whole sets", of_set, of="acceptance")
    page.table("Probes: what they read of recordings that they were not trained on", "probes")
    for attribute in run["curves"].attribute.drop_duplicates():
        page.section(f"Exchanging the {attribute}")
        _add_curves(page, run, attribute)
        _add_heads(page, run, attribute)


def _add_clips(page: Page, run: PairResults) -> None:
    """The first accepted pair of every set, to listen to."""
    first = run["pairs"][run["pairs"].accepted].drop_duplicates("attribute")
    clips = []
    for one in first.itertuples():
        for side, name, label in (("a", one.clip_a, one.label_a), ("b", one.clip_b, one.label_b)):
            written = page.folder.inside(
                f"pairs/clips/{run['written'].set_index('clip').file[name]}"
            )
            path = page.folder.add_clip(f"{one.pair}-{side}", written)
            clips.append(Clip(path, f"{one.pair}, {side}: {label}", None, {"clip": name}))
    page.clips(clips, "The first accepted pair of every set (mono, 16 kHz)")


def _add_curves(page: Page, run: PairResults, attribute: str) -> None:
    some = of(run["curves"], attribute)
    parts = [(some[some.direction == one], {"title": one}) for one in DIRECTIONS]
    drawing = figures.panels(
        figures.curves, parts, x="depth", group="place", y_label="share of the effect", reference=0
    )
    page.figure(
        f"curves__{attribute}", drawing, some, f"Exchanging {attribute} by depth and place",
        "Noising writes clip b's stream into clip a's run: what is necessary. Denoising writes a's "
        "into b's: what is enough. 1 brings the other clip's answer. Mean over pairs with an "
        "effect, 95 % intervals over groups.",
        "The audio at depth 0 is the whole exchange, 1; at the last depth only the readout counts.",
    )  # fmt: skip


def _add_heads(page: Page, run: PairResults, attribute: str) -> None:
    some = of(run["backup"], attribute)
    long = some.melt(["place", "layer", "head"], ["patched", "ablated"], "what", "toward")
    largest = long.toward.abs().groupby(long.place, sort=False).max()
    shown = largest.index[largest >= min(run.config.min_effect, largest.max())]
    parts = long[long.place.isin(shown)].groupby(["place", "what"], sort=False)
    maps = {f"{what} at the {place}": part for (place, what), part in parts}
    drawing = draw_head_maps(maps, long.toward, run.n_blocks)
    page.figure(
        f"heads__{attribute}", drawing, some, f"Heads of {attribute}",
        "How far each head moves the answer away from clip a's: patched with clip b's, and removed "
        f"({run.config.ablation} ablation). Mean over groups, one scale for all maps; places where "
        f"no head moves it by {run.config.min_effect:g} are left out.",
        "A head that only one of the two shows may have others that stand in for it.",
    )  # fmt: skip
    alone = some[some.alone != ""]
    if len(alone):
        page.note(
            f"{len(alone)} heads move the answer by one of patching and ablation alone: where they "
            "are only patched, others may stand in for them (backup).",
            is_warning=True,
        )
        page.table("Heads that one of the two shows alone", alone.drop(columns="attribute"))


def method(run: PairResults) -> str:
    """How pairs were made, judged and swept."""
    config, point = run.config, run.inputs["probe_point"]
    return (
        f"Model: {config.model}, {config.dtype}, engine {config.engine}. Pitch and pace by "
        "TD-PSOLA (Moulines and Charpentier 1990), noise white, the band by a Butterworth filter "
        f"run both ways. Probes: logistic regression on the mean of {point} over a clip, "
        "standardised, C = 1, never trained on a clip of the group they read. Metric: the logit of "
        "clip a's answer minus that of clip b's, first tokens. "
        f"Intervals resample groups {config.n_resamples} times, seed {config.seed}."
    )
