"""What is claimed of an enrichment, and how a page shows it.

Source: M-AL-5.
"""

from ..workbench import figures
from ..workbench.claims import Finding, few, judged, not_measured, shown
from ..workbench.page import Page
from ..workbench.results import having
from .attribute_answers import OfAttributes, attributes_of
from .clips import file_safe
from .enrichment import ENRICHED
from .resampling import mean_of


def enrichment_finding(run: OfAttributes, attribute: str) -> Finding | None:
    """The claim that enriching helps; None where nothing is enriched."""
    if not run.config.enrich_modes:
        return None
    claim = f"Enriching later states with earlier ones helps to answer the {attribute}"
    table = having(run["enrichment"], attribute=attribute)
    if table.empty:
        return not_measured(claim, "no clips are left to judge it on", "logits")
    own = having(table, donor="self")
    gain = mean_of(run, own, "gain")
    hits = mean_of(run, own.assign(gained=own.hit - own.base_hit), "gained")
    why_not = {
        **few(gain["n_clusters"], run.config.resampled),
        "the gain is not surely above 0": not gain["low"] > 0,
        "no more clips are answered right": not hits["mean"] > 0,
    }
    said = []
    for donor, part in table[table.donor != "self"].groupby("donor", sort=False):
        both, name = own.merge(part[["clip", "gain"]], on="clip"), str(donor).replace("_", " ")
        gap = mean_of(run, both.assign(gap=both.gain_x - both.gain_y), "gap")
        said.append(f"{part.gain.mean():.2f} ({name})")
        why_not[f"not surely more than by {name}"] = not gap["low"] > 0
    first = own.iloc[0]
    return judged(
        claim,
        f"{first['mode']} of depth {first['source']} after block {first['layer']}, chosen on other "
        f"clips: the right label leads by {shown(gain)} logits more, {shown(hits)} more clips are "
        f"answered right; by what should not help: {', '.join(said) or 'not asked'}",
        why_not,
        numbers=gain,
        unit="logits",
    )


def add_enrichment(page: Page, run: OfAttributes) -> None:
    """The search for an enrichment, and what the chosen one brings on other clips."""
    if not run.config.enrich_modes:
        return
    page.section(
        "Enrichment",
        "A state after a later block is enriched with that of an earlier depth. Which, and "
        "how, is chosen on the clips of the search; all other numbers are of the other clips.",
    )
    for attribute in attributes_of(run):
        _searched(page, run, attribute)
    page.table("On the clips that it was not chosen on, with what should not help", "enrichments")


def _searched(page: Page, run: OfAttributes, attribute: str) -> None:
    some = having(run["enrichment_search"], attribute=attribute)
    if some.empty:
        return
    means = some.groupby([*ENRICHED], sort=False).gain.mean().reset_index()
    parts = [
        (having(means, mode=mode), {"title": f"{attribute}: {mode}"})
        for mode in run.config.enrich_modes
    ]
    drawing = figures.panels(
        figures.heat_map, parts, height=4.2, x="layer", y="source", value="gain", centre=0,
        x_label="block enriched", y_label="depth of the source",
        value_label="gain of the margin (logits)", is_upwards=True,
    )  # fmt: skip
    page.figure(
        f"enrichment_{file_safe(attribute)}", drawing, means,
        f"Enrichment on the clips of the search: {attribute}",
        "Mean gain; one cell of these was chosen, the one with the most right answers.",
    )  # fmt: skip
