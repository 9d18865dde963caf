"""The page of a ``component_patching`` run: sections, figures, and how to read them."""

from collections.abc import Sequence
from typing import Any

from ..workbench import figures
from ..workbench.page import Page
from .items import ContextItem
from .tables import PatchingResults, misheard, named, own, replaced

CAVEATS = (
    "Noise also takes away what the component says of the word itself: a word can be restored only "
    "where other components still carry its sound, and one that is not restored may be lost.",
    "A patch at all positions says that a component matters, not where in the clip.",
    "Zero is far from what a component ever writes, and noise is for some nearer than for others: "
    "read what is restored beside how far it was moved.",
    "The transcript is given up to the word: what the decoder makes of words that it would have "
    "written otherwise is not asked.",
    "Context that several components carry, each by itself, has no single one, and patching one "
    "shows none.",
)
SHARES = {"limits": (0, 1)}
SCALES: dict[str, Any] = {
    "restored_mean": SHARES, "stranger_restored_mean": SHARES, "shift_mean": {"centre": 0},
}  # fmt: skip
"""Of colours, by column."""
N_LINES = 6
"""Components whose strengths are drawn."""


def lead(run: PatchingResults) -> str:
    """What was patched, and why."""
    n, n_wrong = len(own(run)), len(misheard(run))
    stacks = " and ".join(run.config.stacks)
    return (
        f"In {n} clips a word is said, and context calls for another. In {n_wrong} of them the "
        f"contextual word is likelier to be written. Every component of {stacks} is patched "
        "towards what it does in white noise, in silence, and where there is one in a clip that "
        "says the contextual word; this page shows after which patch the word that is said is the "
        "likelier one."
    )


def fill_page(page: Page, run: PatchingResults, items: Sequence[ContextItem]) -> None:
    """The clips, what every component restores, and how it grows with the strength."""
    page.section("The two words")
    _examples(page, run, items)
    page.table("The clips, and the references, as whole runs", "behaviour")
    page.section("Which component restores the word that is said")
    _maps(page, run)
    page.section("Step by step, and head by head")
    _strengths(page, run)
    if run["components"].site.str.contains("head").any():
        _heads(page, run)
    page.table("Every component, reference and strength, with intervals", "components")


def _examples(page: Page, run: PatchingResults, items: Sequence[ContextItem]) -> None:
    value = own(run).set_index("clip").value
    clips = [item.clip for item in items]
    shown = page.sample(clips, lambda one: value[one.name] < 0, seed=run.config.seed, most=6)
    page.play(
        shown, f"{len(shown.clips)} of the {shown.n_of} clips.",
        lambda one: {"said": one.cells["acoustic_word"], "context": one.cells["contextual_word"],
                     "log-odds of what is said": f"{value[one.name]:.1f}"},
    )  # fmt: skip


def _maps(page: Page, run: PatchingResults) -> None:
    table = replaced(run)
    for column, name, label, how in (
        ("restored_mean", "restored", "share of clips",
         "Of the clips whose contextual word is likelier. 1: in all of them the word that is said "
         "is after the patch. An empty cell: the stack has no such site, or no clip is misheard."),
        ("stranger_restored_mean", "strangers", "share of clips",
         "A null, read at the same place, of clips in which the first of the two is less likely. "
         "What noise does to these it does to any words."),
        ("shift_mean", "shift", "nats",
         "Above 0 the patch is in favour of the word that is said. Mean over all clips."),
        ("moved", "moved", "norm",
         "A component that is moved farther may do more for that alone."),
    ):  # fmt: skip
        mine = table[table[column].notna()]
        if mine.empty:
            continue
        parts = [(some, {"title": str(stack)}) for stack, some in mine.groupby("stack", sort=False)]
        drawing = figures.panels(
            figures.heat_map, parts, height=3.0, x="layer", y="site", value=column,
            x_label="block", value_label=label, **SCALES.get(column, {}),
        )  # fmt: skip
        page.figure(name, drawing, mine, _CAPTIONS[name], how)


_CAPTIONS = {
    "restored": "Clips in which noise in a component makes the word that is said the likelier one",
    "strangers": "The same of two words of another sentence, which nobody says",
    "shift": "How far noise in a component shifts the log-odds of the word that is said",
    "moved": "How far noise moves each component: the norm of the difference",
}


def _strengths(page: Page, run: PatchingResults) -> None:
    table = run["components"]
    first = replaced(run).sort_values("shift_mean", ascending=False)
    # Behind any block of the encoder all of it is replaced, with one result.
    first = first[first.site != "block"].head(N_LINES)
    if first.empty:
        return
    chosen = [named(row) for row in first.to_dict("records")]
    table = table.assign(component=[named(row) for row in table.to_dict("records")])
    ends = {f"shift_{end}": end for end in ("mean", "low", "high")}
    some = table[(table.reference == "noise") & table.component.isin(chosen)].rename(columns=ends)
    drawing = figures.curves(
        some, "alpha", group="component", title="Towards white noise", x_label="strength α",
        y_label="shift, nats", reference=0,
    )  # fmt: skip
    page.figure(
        "strengths", drawing, some,
        f"The log-odds by strength, of the {len(chosen)} components that noise shifts most",
        "What only a strong patch does may be owed to activations that the model never has. Bands "
        "are 95 % bootstrap intervals, each strength by itself.",
    )  # fmt: skip


def _heads(page: Page, run: PatchingResults) -> None:
    table = run["components"]
    table = table[table.site.str.contains("head") & (table.reference == "noise")]
    parts = [
        (some, {"title": f"{stack}, {'self' if site == 'head' else 'cross'}-attention"})
        for (stack, site), some in table.groupby(["stack", "site"], sort=False)
    ]  # fmt: skip
    drawing = figures.panels(
        figures.heat_map, parts, height=3.2, x="head", y="layer", value="shift_mean", centre=0,
        x_label="head", y_label="block", value_label="nats", is_upwards=True,
    )  # fmt: skip
    page.figure(
        "heads", drawing, table, "How far noise in one head shifts the log-odds",
        "Above 0 in favour of the word that is said. Mean over all clips.",
    )  # fmt: skip


def method(run: PatchingResults) -> str:
    """How values and intervals were made."""
    config = run.config
    alphas = ", ".join(f"{alpha:g}" for alpha in config.alphas)
    return (
        f"Model: {config.model}, {config.dtype}. Log-odds: log-probability of the token at which "
        "the acoustic word begins to differ, minus that of the contextual word's, the transcript "
        "given up to there. Components are patched at all positions, towards noise at strengths "
        f"{alphas}, towards silence and a minimal pair at 1; heads at 1, towards one draw. Noise: "
        f"{config.n_noise} draws of each clip's length and RMS; silence is as long, too. Draws of "
        "a clip are averaged. Null: two words of another sentence, drawn for each clip, read "
        f"there. The best component is chosen on {config.discovery_share:.0%} of the clips and "
        f"judged on the others. Intervals resample {config.resampled} "
        f"{config.n_resamples} times with seed {config.seed}."
    )
