"""What a ``sae_compare`` run controls and claims."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from hooked_alm.methods.statistics.bootstrap import MIN_UNITS

from ..materials.dictionary_partners import COPY_CONTROL, found_again
from ..materials.feature_reading_claims import (
    READ_FACTORS,
    READING_CONTROLS,
    best_of,
    commonest,
    hits_of,
    leaks_of,
    surely_more,
)
from ..materials.feature_reading_tables import jackknifed, with_and_without
from ..workbench.claims import Claim, Finding, few, judged, not_measured, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from ..workbench.results import having
from .tables import ComparedResults

FEW_SHARE = 0.1
"""Of a dictionary's latents, up to which they are few."""
NONE_FEW = f"no k is at most {FEW_SHARE:.0%} of the latents, and less than the dimensions"

# --- Controls


def _twice(run: ComparedResults) -> Outcome:
    """Rows, activity and errors of the first pass against the second's means."""
    first = run["clips"].groupby("dictionary", sort=False)[["rows", "active", "error"]].sum()
    again = run["quality"].set_index("dictionary").loc[first.index]
    off = [
        first.rows / again.n_rows - 1,
        first.active / first.rows / again.l0 - 1,
        first.error / first.rows / (again.fvu * again.variance) - 1,
    ]
    return at_most(pd.concat(off), ROUNDING["relative"][run.config.dtype], "of itself")


def _every_row(run: ComparedResults) -> Outcome:
    return at_most(run["quality"].n_rows - run.inputs["rows"], 0.0, "rows")


CONTROLS = (
    Control(name="rows are read twice alike", of=("clips", "quality"), check=_twice,
            guards_against="features that are counted to another clip or dictionary"),
    Control(name="every row of every clip is read", of=("clips", "quality", "correlations"),
            check=_every_row,
            guards_against="padding that counts as sound, and clips that are cut"),
    COPY_CONTROL,
    *READING_CONTROLS,
)  # fmt: skip

# --- Claims


def _pairs(run: ComparedResults) -> Sequence[str]:
    pairs = run["partners"][["first", "second"]].drop_duplicates()
    return [f"{first} and {second}" for first, second in pairs.itertuples(index=False)]


def _agree(run: ComparedResults, pair: str) -> Finding:
    table = run["stability"]
    mine = table[(table["first"] + " and " + table["second"] == pair) & (table.how == "matched")]
    about = run.inputs["dictionaries"]
    seeds = {about[name].get("seed") for name in mine.iloc[0][["first", "second"]]}
    alike = (
        ["both began with the same directions"] if len(seeds - {None}) == len(seeds) == 1 else []
    )
    return found_again(f"{pair} have found the same directions", mine).doubted(*alike)


def _readers(run: ComparedResults) -> Sequence[str]:
    labels = [one["column"] for one in run.inputs["labels"]]
    return [f"{label} off {name}" for label in labels for name in run.inputs["dictionaries"]]


def _parts(run: ComparedResults, what: str) -> tuple[str, str, pd.DataFrame]:
    """Column, dictionary, and what was read of them or of the dictionary's point."""
    dictionaries = run.inputs["dictionaries"]
    name = next(one for one in dictionaries if what.endswith(f" off {one}"))
    label = what.removesuffix(f" off {name}")
    reads = run["reads"]
    is_ours = (reads.owner == name) | (reads.owner == dictionaries[name]["point"])
    return label, name, reads[is_ours & (reads.label == label)]


def _fewer(run: ComparedResults, what: str) -> Finding:
    """The claim that few latents tell more of a column than as many of the model's dimensions."""
    label, name, reads = _parts(run, what)
    claim = f"{label} is read off few latents of {name} better than off as many dimensions"
    codes, *others = (hits_of(reads, kind) for kind in ("codes", "rows", "principal"))
    at_random = hits_of(reads, "codes", at_random=True)
    # The last is all, of whatever width.
    narrow = {*others[0].columns[:-1]} & {*others[1].columns[:-1]}
    ks = [k for k in _few_of(run, name, codes) if k in narrow]
    if not ks:
        return not_measured(claim, NONE_FEW, "accuracy")
    best = np.fmax(*(other[ks].mean() for other in others))
    found = surely_more(run, codes[ks] - best_of(others, ks))
    k, n_groups = found["at"], codes.index.nunique()
    above = surely_more(run, codes[ks] - at_random[ks])
    told = surely_more(run, codes[ks] - commonest(run, label))
    return judged(
        claim,
        f"Of {len(codes)} clips of {n_groups} groups {codes[k].mean():.2f} off {k} latents, "
        f"{best[k]:.2f} off as many of the better of dimensions and principal directions: "
        f"{shown(found)} more; off as many latents at random {at_random[k].mean():.2f}",
        {
            **few(len(codes), "clips"),
            f"only {n_groups} groups, too few for an interval": n_groups < MIN_UNITS,
            **leaks_of(run, label),
            "not surely above the commonest label's share": not told["low"] > 0,
            "not surely more than at random": not above["low"] > 0,
            "not surely more": not found["low"] > 0,
        },
        numbers=found, unit="accuracy",
    )  # fmt: skip


def _few_of(run: ComparedResults, name: str, hits: pd.DataFrame) -> list[int]:
    """Numbers of features that are few of a dictionary's latents."""
    most = FEW_SHARE * run.inputs["dictionaries"][name]["d_sae"]
    return [int(k) for k in hits.columns if k <= most]


def _unlearnt(run: ComparedResults, what: str) -> Finding:
    """The claim that what tells a column is in few latents, so that without them it is not read."""
    label, name, reads = _parts(run, what)
    refit, at_random = (hits_of(reads, "codes", "refit", at_random=one) for one in (False, True))
    frozen, whole = hits_of(reads, "codes", "frozen"), refit[0]
    claim = f"Without few latents of {name}, {label} is not read as well, even by a new probe"
    if not (ks := [k for k in _few_of(run, name, refit) if k > 0]):
        return not_measured(claim, NONE_FEW, "accuracy")
    found, n_groups = surely_more(run, (at_random - refit)[ks]), refit.index.nunique()
    k = found["at"]
    told = surely_more(run, whole.to_frame() - commonest(run, label))
    return judged(
        claim,
        f"{whole.mean():.2f} with all; without the first {k} a new probe reads "
        f"{refit[k].mean():.2f}, the old one {frozen[k].mean():.2f}; a new one without as many at "
        f"random {at_random[k].mean():.2f}: {shown(found)} more",
        {
            **few(len(refit), "clips"),
            f"only {n_groups} groups, too few for an interval": n_groups < MIN_UNITS,
            **leaks_of(run, label),
            "with all, not surely above the commonest label's share": not told["low"] > 0,
            "not surely less than without as many at random": not found["low"] > 0,
        },
        numbers=found, unit="accuracy",
    )  # fmt: skip


def _names(run: ComparedResults) -> Sequence[str]:
    return [*run.inputs["dictionaries"]] if len(run["dci"]) else []


def _apart(run: ComparedResults, name: str, measure: str, claim: str) -> Finding:
    """The claim that codes hold factors apart more than rows do, and other directions of them."""
    point = run.inputs["dictionaries"][name]["point"]
    found = {
        kind: with_and_without(dci, measure)
        for kind, owner in (("codes", name), ("rows", point), ("rotated", name))
        for dci in [having(run["dci"], owner=owner, kind=kind)]
    }
    (whole, without), *others = found.values()
    more = [jackknifed(whole - other, without - rest) for other, rest in others]
    least = min(more, key=lambda one: np.nan_to_num(one["low"], nan=-np.inf))
    read = having(run["factors_read"], owner=name, kind="codes").set_index("factor")
    r2 = read.loc["mean of all", ["r2", "low", "high"]].rename({"r2": "mean"}).to_dict()
    return judged(
        claim.format(name),
        f"{whole:.2f} of the codes, {found['rows'][0]:.2f} of the rows, {found['rotated'][0]:.2f} "
        f"of the codes along random directions: codes − rows {shown(more[0])}, codes − random "
        f"directions {shown(more[1])}; held-out R² off the codes {shown(r2)}",
        {
            f"only {len(without)} folds, too few for an interval": len(without) < MIN_UNITS,
            "one factor alone": len(read) < 3,
            "the codes do not surely tell the factors": not r2["low"] > 0,
            "not surely more than of the rows": not more[0]["low"] > 0,
            "not surely more than along random directions": not more[1]["low"] > 0,
        },
        numbers={**least, "n": int(read.loc[read.index[:-1], "n_clips"].max())}, unit=measure,
    )  # fmt: skip


CLAIMS = (
    Claim(name="agree: {}", rests_on=("partners",), judge=_agree, per=_pairs),
    Claim(name="few: {}", rests_on=("reads",), judge=_fewer, per=_readers),
    Claim(name="deleted: {}", rests_on=("reads",), judge=_unlearnt, per=_readers),
    Claim(name="disentangled: {}", rests_on=READ_FACTORS, per=_names, judge=partial(
        _apart, measure="disentanglement",
        claim="Codes of {} are for single factors more than the rows they are of")),
    Claim(name="complete: {}", rests_on=READ_FACTORS, per=_names, judge=partial(
        _apart, measure="completeness",
        claim="Factors are in fewer codes of {} than in dimensions of the rows they are of")),
)  # fmt: skip
