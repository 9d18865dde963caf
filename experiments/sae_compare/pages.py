"""The page of a ``sae_compare`` run: one table of all dictionaries, then every comparison."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd

from ..materials.clips import file_safe, of_whom
from ..materials.dictionary_partners import draw_partners
from ..materials.feature_reading_tables import MEASURES
from ..workbench import figures
from ..workbench.page import Page
from ..workbench.results import having
from .tables import PAIR, ComparedResults

KINDS = {
    "codes": "latents", "rows": "dimensions of the rows",
    "principal": "principal directions of the rows", "rotated": "random directions of the codes",
}  # fmt: skip
CAVEATS = (
    "All of it is on the clips of this run: a latent that fires in none of them counts as dead "
    "here, and is of neither dictionary when directions are compared.",
    "A dictionary that reconstructs better with more active latents is not a better one: compare "
    "unexplained variance at the same number of active latents a row.",
    "That a label is read off some features, or no more without them, says nothing of what the "
    "model uses. What it uses, only edits of its run show.",
    "Clips are told apart by means over their rows; what is in the order of rows alone is not "
    "read.",
    "Of several dictionaries and labels, some claim holds by chance: each is judged by itself.",
)


def lead(run: ComparedResults) -> str:
    """What was compared on what."""
    about = run.inputs["dictionaries"]
    named = "; ".join(
        f"{name} ({one['architecture']}, {one['d_sae']} latents of {one['point']})"
        for name, one in about.items()
    )
    return (
        f"{len(about)} dictionaries are read on {run.inputs['rows']:,} rows of "
        f"{len(run.inputs['clips'])} clips ({of_whom(run['manifest'])}): {named}."
    )


def fill_page(page: Page, run: ComparedResults) -> None:
    """One table, what could not be compared, then every comparison."""
    page.section("All dictionaries")
    page.table("What each is worth, in short", "dictionaries")
    for text in not_compared(run):
        page.note(text)
    page.table("Reconstruction in use, with intervals over groups of clips", "reconstruction")
    if not run["partners"].empty:
        page.section("The same directions")
        matched = run["partners"][run["partners"]["how"] == "matched"]
        for number, (key, mine) in enumerate(matched.groupby(PAIR, sort=False)):
            draw_partners(page, mine, f"partners_{number:03d}", f"{key[1]} and {key[2]}")
        page.table(
            "Latents with a partner, beside what noise and no training have in common; and how "
            "activations of partners go together, beside those of latents that were dealt out",
            "stability",
        )
    for label in dict.fromkeys(run["k_sparse"]["label"]):
        page.section(label)
        for number, (name, one) in enumerate(run.inputs["dictionaries"].items()):
            file = f"{file_safe(label)}__{number:03d}"
            _few(page, run, label, name, one["point"], f"few_{file}")
            _deleted(page, run, label, name, f"deleted_{file}")
    page.table("All that was read", "k_sparse")
    if not run["dci"].empty:
        page.section("Acoustic factors")
        for number, (name, one) in enumerate(run.inputs["dictionaries"].items()):
            _factors(page, run, name, one["point"], f"{number:03d}")
        page.table("How factors are held apart, with jackknife intervals", "held_apart")
        page.table("Every factor: held-out R², and R² on the clips that are learnt", "factors_read")


def not_compared(run: ComparedResults) -> Iterator[str]:
    """What the list of dictionaries leaves out, or has otherwise than it looks."""
    about, model = run.inputs["dictionaries"], run.inputs["model"]["name"]
    if foreign := {
        k: v["of_model"] for k, v in about.items() if v["of_model"] not in (None, model)
    }:
        said = ", ".join(f"{name} of {of}" for name, of in foreign.items())
        yield f"Read on rows of {model}, and, by their files, of other models: {said}."
    apart = [f"{a} and {b}" for a, b in combinations(about, 2)
             if about[a]["point"] != about[b]["point"]]  # fmt: skip
    if apart:
        yield (
            f"Of other points, so that their directions are not compared: {', '.join(apart)}. What "
            "is read off them, and what they leave of their own rows, can be."
        )
    if plain := [name for name, one in about.items() if one["noise"] is None]:
        yield f"No dictionary of noise lies beside {', '.join(plain)} (sae_train leaves some)."
    kept = {*run["factors"]["factor"]}
    if still := [name for name in run.config.factors if name not in kept]:
        yield f"Not read, since they do not vary whichever fold is held out: {', '.join(still)}."


def _curves(
    page: Page, name: str, parts: list[pd.DataFrame], title: str, caption: str, how: str
) -> None:
    some = pd.concat(parts)[["of", "k", "accuracy", "low", "high"]]
    some = some.assign(doublings=np.log2(some["k"].clip(lower=0.5)))
    drawing = figures.curves(
        some, "doublings", "accuracy", group="of", title=title,
        x_label="features, as a power of 2 (−1: none)", y_limits=(-0.03, 1.03),
    )  # fmt: skip
    page.figure(name, drawing, some, caption, how)


def _few(page: Page, run: ComparedResults, label: str, name: str, point: str, file: str) -> None:
    kept = having(run["k_sparse"], label=label, how="kept")
    codes = having(kept, owner=name, kind="codes")
    parts = [
        codes[codes.ranked != "random"].assign(of=KINDS["codes"]),
        codes[codes.ranked == "random"].assign(of="latents at random"),
    ]
    for kind in ("rows", "principal"):
        own = having(kept, owner=point, kind=kind)
        parts.append(own[own.ranked != "random"].assign(of=KINDS[kind]))
    _curves(
        page, file, parts, name,
        f"How often {label} is read off few features, of clips that the probe was not trained on",
        "Features come in the order of what they tell, on the training clips alone, and count "
        "alike whatever their spread: small principal directions are mostly noise. Latents that "
        "are about the label lie above dimensions and principal directions at small k. Bands are "
        "95 % intervals over what is held out together.",
    )  # fmt: skip


def _deleted(page: Page, run: ComparedResults, label: str, name: str, file: str) -> None:
    parts = []
    for how, said in {"refit": "a new probe", "frozen": "the old probe"}.items():
        mine = having(run["k_sparse"], label=label, owner=name, kind="codes", how=how)
        for is_random, end in ((False, ""), (True, ", at random")):
            parts.append(mine[(mine.ranked == "random") == is_random].assign(of=f"{said}{end}"))
    _curves(
        page, file, parts, name,
        f"How often {label} is read once latents are deleted",
        "The old probe stumbles over what it knew; a new one shows what is left. Where what tells "
        "the label is in few latents, a new probe falls long before one that lost as many at "
        "random.",
    )  # fmt: skip


def _factors(page: Page, run: ComparedResults, name: str, point: str, file: str) -> None:
    owners = {"codes": name, "rotated": name, "rows": point}
    bars = pd.concat([
        having(run["held_apart"], owner=owner, kind=kind).assign(
            of=KINDS[kind], mean=lambda some, m=measure: some[m], measure=measure,
            low=lambda some, m=measure: some[f"{m}_low"],
            high=lambda some, m=measure: some[f"{m}_high"],
        )[["measure", "of", "mean", "low", "high"]]
        for measure in MEASURES
        for kind, owner in owners.items()
    ])  # fmt: skip
    drawing = figures.bars(bars, "measure", group="of", title=name, y_label="1: one alone")
    page.figure(
        f"apart_{file}", drawing, bars, "Whether factors and codes go one to one",
        "Disentanglement: a code is for one factor; completeness: a factor is in one code. Random "
        "directions of the same codes are as many, and span the same.",
    )  # fmt: skip
    r2 = pd.concat([
        having(run["factors_read"], owner=owner, kind=kind).assign(of=KINDS[kind])
        for kind, owner in owners.items()
    ])[["factor", "of", "r2", "low", "high", "r2_learnt"]]  # fmt: skip
    drawing = figures.bars(r2, "factor", "r2", group="of", title=name, y_label="held-out R²",
                           reference=0)  # fmt: skip
    page.figure(
        f"factors_{file}", drawing, r2, "How well factors are read",
        "Of clips that the Lasso was not trained on; below 0 it tells less than knowing the mean "
        "of the training clips. R² on the training clips is in the numbers beside.",
    )  # fmt: skip


def method(run: ComparedResults) -> str:
    """How dictionaries were compared."""
    config = run.config
    by = run.inputs["held_out_by"] or "clip"
    factors = (
        f"Factors: Lassos with a penalty of {config.alpha:g} of standardised codes; importances "
        "are absolute coefficients, codes that do not vary over the clips are left out. "
        "Disentanglement is 1 − H / ln(factors) of each code, weighted with its share of all "
        "importances; completeness 1 − H / ln(codes). Their intervals are those of the "
        "delete-a-group jackknife over folds. "
    )
    return (
        f"Model: {config.model}, {config.dtype}. Rows of the spans {', '.join(config.spans)}, "
        f"padding left out; features as in use. Labels are read off means over a clip, held out by "
        f"{by} ({config.cv} folds, {config.n_folds} or as many as there are), by logistic "
        f"regression; features are ranked by {config.ranked_by.replace('_', ' ')}, or "
        f"{config.n_random} times at random. {factors if config.factors else ''}Intervals resample "
        f"groups of clips, or latents, {config.n_resamples} times with seed {config.seed}."
    )
