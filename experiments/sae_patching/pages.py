"""The page of a ``sae_patching`` run: flips by number of latents and strength, and every edit."""

from collections.abc import Sequence
from typing import Any

from ..materials.clips import of_whom
from ..materials.conflict_pages import add_clips, add_prompts
from ..materials.recordings import Recording
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .tables import BESIDE, ExchangeResults

CAVEATS = (
    "That an exchange flips an answer says that the features are enough at this point, not that "
    "the model goes by them alone, nor that each of them means something.",
    "A push along the difference of the means knows the labels as well as the chosen latents do: "
    "where it flips as many answers, the dictionary adds names, not an effect.",
    "A clip's donor is another recording: whatever differs in it is exchanged with its label.",
)
NAMES = {"chosen": "the latents that differ", **BESIDE}
"""Family -> what it is, in words."""


def lead(run: ExchangeResults) -> str:
    """What is exchanged in which clips."""
    one, config, clips = run.inputs["dictionary"], run.config, run["manifest"]
    how = {"clip": "those of another clip, row by row", "mean": "their means over other clips"}
    return (
        f"{len(clips)} clips, {of_whom(clips)}. In each, features of {config.dictionary}, a "
        f"{one['architecture']} dictionary of {one['d_sae']} latents of {one['point']}, are "
        f"exchanged for {how[config.donor]}, of another label; what the dictionary does not "
        "reconstruct is kept. The latents are those whose means differ most between both labels on "
        f"clips of another {config.held_out_with or 'group'}. {len(run['exchanges'])} exchanges "
        f"under {', '.join(config.conditions)}."
    )


def fill_page(page: Page, run: ExchangeResults, recordings: Sequence[Recording]) -> None:
    """What was answered, flips by number of latents and by strength, and every edit."""
    _answered(page, run, recordings)
    n, means = run.config.n_latents, run["edit_means"].query("measure == 'flipped'")
    page.section("By number of latents", "Edits of strength 1.")
    _add_flips(
        page, run, "by_size", "Answers that become the other label's, by the number of latents",
        "Pushes move every row as far as the exchange of the latents that differ. Exchanges whose "
        "label is the answer already are left out.",
        figures.bars, x="n_latents", x_label="latents of either label", height=5.0,
        y_limits=(0, 1.03),
    )  # fmt: skip
    page.table("How much more often the chosen latents flip an answer", "compared")
    page.section("By strength", f"{n} latents of either label; 1 is the whole exchange.")
    _add_flips(
        page, run, "by_strength", "Answers that become the other label's, by strength",
        "Bands are 95 % bootstrap intervals over clips, each strength by itself.",
        figures.curves, x="alpha", x_label="strength", height=3.8, y_limits=(-0.03, 1.03),
    )  # fmt: skip
    page.section("Every edit")
    page.table(
        "The share that flips, with 95 % intervals over clips (other measures: edit_means)",
        means.drop(columns="measure"),
        of="edit_means",
    )
    page.table(
        f"Exchanges, and their latents, {n} of either label: sae_features shows what they fire on",
        run["exchanges"].drop(columns="pair"),
        of="exchanges",
    )


def _answered(page: Page, run: ExchangeResults, recordings: Sequence[Recording]) -> None:
    page.section("What was asked, and answered")
    add_prompts(page, run)
    n, base = run.config.n_latents, having(run["runs"], role="base")
    edits = having(run["edits"], family="chosen", n_latents=n, alpha=1)

    def said(one: Recording) -> dict[str, str]:
        found: dict[str, str] = {}
        for condition in run.config.conditions:
            here = {"clip": one.name, "condition": condition}
            flips = having(edits, **here).flipped.dropna()
            found[condition] = ", ".join(having(base, **here).prediction.unique())
            found[f"{condition}, exchanged"] = f"{flips.sum():.0f} of {len(flips)} flip"
        return found

    how = f", the answer, and how often it flips with {n} latents of either label exchanged."
    add_clips(page, run, recordings, how, said)


def _add_flips(
    page: Page, run: ExchangeResults, name: str, caption: str, how: str, draw: Any, **shown: Any
) -> None:
    """A figure of the share that flips, a panel for each condition."""
    means = run["edit_means"].query("measure == 'flipped'")
    table = means.assign(what=means.family.map(NAMES)).dropna(subset="what")
    n, x = run.config.n_latents, shown["x"]
    chosen = (
        table.alpha == 1
        if x == "n_latents"
        else (table.n_latents == n) & (table.family.isin(("chosen", "push")))
    )
    table = table[chosen].sort_values(x, kind="stable")
    parts = [(table[table.condition == one], {"title": one}) for one in run.config.conditions]
    drawing = figures.panels(draw, parts, group="what", y_label="share that flips", **shown)
    page.figure(name, drawing, table, caption, how, "No latent exchanged changes nothing.")


def method(run: ExchangeResults) -> str:
    """How latents were chosen, and edits and intervals made."""
    config = run.config
    return (
        f"Model: {config.model}, {config.dtype}, engine {config.engine}. An edit writes x + α Σ "
        "(f' − f) W_dec over its latents into the rows of the audio span. Every clip counts alike "
        "in the means; others as active are neighbours in mean activation; both pushes move each "
        "row as far as the exchange does, along the difference of the mean rows, or a direction "
        "drawn for each exchange. A recovery is NaN where whole rows move the answer by less than "
        f"{config.min_effect:g} logits. Intervals resample clips {config.n_resamples} times with "
        f"seed {config.seed}."
    )
