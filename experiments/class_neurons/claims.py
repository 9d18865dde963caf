"""What a ``class_neurons`` run may establish, and the controls that vouch for it.

Source: M-ESN-3, M-ESN-4, M-ESN-8.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.methods.neurons.sets import NEURON_CONTROLS, SELECTORS
from hooked_alm.methods.statistics.grounding import grounding_coefficient

from ..materials.confounds import confounded
from ..workbench.claims import (
    MIN_ITEMS,
    Claim,
    Finding,
    around_zero,
    few,
    judged,
    not_measured,
    shown,
    within_rounding,
)
from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from .settings import OUT, SAME
from .tables import NeuronResults

EVEN = 0.5
"""Share of the audio where both inputs drive neurons alike."""
OF_CONTROL = {"random": "random ones", "layer": "random ones of the same blocks",
              "magnitude": "random ones as strong"}  # fmt: skip
INPUT = {"audio": "audio", "text": "instruction"}


def _specific(run: NeuronResults, selector: str) -> Finding:
    """The claim that taking a class's neurons out costs it more than other classes."""
    table = run["specificity"].set_index(["chosen_by", "measure"])
    row, accuracy = (table.loc[(selector, what)].to_dict() for what in ("lead", "right"))
    doses = run["doses"]
    mine = doses[(doses.chosen_by == selector) & (doses.alpha == OUT)]
    reasons = {
        **few(row["n"]),
        **_few_groups(row),
        **around_zero(row, "difference"),
        "other classes lose more": bool(row["high"] > 0 and row["mean"] > 0),
        **within_rounding(mine.lead - mine.lead_clean, mine.noise, "logits"),
    }
    facts = (
        f"Own items' right label loses {-row['own']:.2f} logits of its lead, other classes' "
        f"{-row['other']:.2f}: difference {shown(row)}; in accuracy {shown(accuracy)}"
    )
    if selector == run.config.selector:
        # Higher than 0: the random neurons cost as much of what sets their class apart.
        level = [OF_CONTROL[one] for one in NEURON_CONTROLS
                 if not row[f"beyond_{one}_high"] < 0]  # fmt: skip
        reasons[f"not surely more than {', '.join(level)}"] = bool(level)
        beyond = (
            f"{name} {row[f'beyond_{one}']:.2f} [{row[f'beyond_{one}_low']:.2f}, "
            f"{row[f'beyond_{one}_high']:.2f}]"
            for one, name in OF_CONTROL.items()
        )
        facts += f"; beyond {', '.join(beyond)}"
    return judged(
        f"The neurons that {selector} selects for a class matter more for it than for others",
        f"{facts}; n = {row['n']:.0f} items of {row['n_clusters']:.0f} groups",
        reasons | confounded(run["confounds"], run.config), numbers=row, unit="logits",
    )  # fmt: skip


def _few_groups(row: Mapping[str, Any]) -> dict[str, bool]:
    """What is sampled is groups: an interval of less than six is none."""
    is_unsure = bool(np.isnan(row["low"])) and row["n"] >= MIN_ITEMS
    return {f"only {row['n_clusters']:.0f} groups": is_unsure}


def _gain(run: NeuronResults) -> Finding:
    """The claim that making a class's neurons stronger makes the model lean to it."""
    table = run["dose_means"]
    means = dict(zip(zip(table.measure, table.alpha, strict=True), table["mean"], strict=True))
    row = run["dose_means"].set_index("measure").loc["rank"].to_dict()
    top = float(max(run.config.alphas))
    said, clean = means["said_of", top], means["said_of", SAME]
    off, kl = means["right", top], means["kl_rest", top]
    return judged(
        "Making the neurons of a class stronger makes the model lean to it elsewhere",
        f"On items of other classes, the rank correlation of strength and lead: {shown(row)}. At "
        f"alpha = {top:g} {said:.2f} of the answers are the class, without "
        f"{clean:.2f}; right are {off:.2f}, without "
        f"{means['right', SAME]:.2f}; KL of the rest of the answer "
        f"{kl:.2f} nats; n = {row['n']:.0f}",
        {
            **few(row['n'], "curves"), **_few_groups(row), **around_zero(row, "correlation"),
            "it leans away from it": bool(row['mean'] < 0),
        },
        numbers=row, unit="rank correlation",
    )  # fmt: skip


def _driven(run: NeuronResults) -> Finding:
    """The claim which input drives the neurons of a class."""
    anyone = "The neurons of a class are driven by one input"
    means = run["drive_means"].set_index(["chosen_by", "measure"])
    if means.empty:
        return not_measured(anyone, "no conflict has both inputs exchanged", "share of the audio")
    ours = means.loc[run.config.selector]
    row = ours.loc["share"].to_dict()
    if not row["n"]:
        return not_measured(
            anyone, f"no effects of both inputs together reach {run.config.min_drive:g}",
            "share of the audio",
        )  # fmt: skip
    name = "audio" if row["mean"] > EVEN else "text"
    is_sure = row["low"] > EVEN or row["high"] < EVEN
    effects = ", ".join(f"the {what} {shown(ours.loc[f'effect_{one}'].to_dict(), 3)}"
                        for one, what in INPUT.items())  # fmt: skip
    return judged(
        f"The neurons that {run.config.selector} selects are driven by the {INPUT[name]}",
        f"The audio's share of what moves them at the readout is {shown(row)}, 0.5 is even; "
        f"effects on the gate: {effects}; n = {row['n']:.0f} of "
        f"{row['n'] + row['n_undefined']:.0f} conflicts",
        {
            **few(row["n"], "conflicts"), **_few_groups(row),
            "not surely on one side of 0.5": not is_sure,
            **(confounded(run["confounds"], run.config) if name == "audio" else {}),
        },
        numbers=row, unit="share of the audio",
    )  # fmt: skip


CLAIMS = (
    Claim(name="specific_{}", rests_on=("doses", "neurons"), judge=_specific,
          per=lambda run: [*SELECTORS]),
    Claim(name="gain", rests_on=("doses", "neurons"), judge=_gain),
    Claim(name="drive", rests_on=("drive", "neurons"), judge=_driven),
)  # fmt: skip


def _rounding(run: NeuronResults) -> float:
    return ROUNDING["logit"][run.config.dtype]


def _unchanged(run: NeuronResults) -> Outcome:
    doses = run["doses"]
    same = doses[doses.alpha == SAME]
    off = [same.lead - same.lead_clean, same.kl_rest]
    return at_most(np.concatenate(off), _rounding(run), "logits or nats")


def _as_asked(run: NeuronResults) -> Outcome:
    answers = run["answers"].set_index("item")
    names = [column for column in answers if column.startswith("z_")]
    scores = answers[names]
    right = scores.to_numpy()[np.arange(len(answers)), [names.index(f"z_{c}") for c in answers.cls]]
    others = scores.where(~np.equal.outer(answers.cls.to_numpy(), [n[2:] for n in names]), -np.inf)
    lead = pd.Series(right - others.max(axis=1).to_numpy(), answers.index)
    doses = run["doses"].drop_duplicates("item")
    return at_most(doses.lead_clean.to_numpy() - lead[doses.item].to_numpy(), _rounding(run),
                   "logits")  # fmt: skip


def _counted(run: NeuronResults) -> Outcome:
    answers, logs = run["answers"], run["logs"]
    found = int(logs.n_rows.sum()) - int((answers.n_rows * answers.logged).sum())
    return at_most([found, logs.n_items.sum() - answers.logged.sum()], 0.0, "positions or items")


def _apart(run: NeuronResults) -> Outcome:
    answers, judged_on = run["answers"], {*run["doses"].group, *run["drive"].group}
    both = sorted(judged_on & {*answers.group[answers.logged == 1]})
    found = f"{', '.join(both)} in both" if both else f"{len(judged_on)} judged groups"
    return Outcome(found, "none is in both halves", not both)


def _lists(run: NeuronResults) -> Outcome:
    neurons = run["neurons"]
    sizes = neurons.groupby(["chosen_by", "draw", "cls"]).size()
    equal = sizes.drop(index="lape", level="chosen_by", errors="ignore")
    is_twice = neurons.duplicated(["chosen_by", "draw", "cls", "block", "neuron"]).any()
    ours = neurons[neurons.chosen_by == run.config.selector]
    drawn = neurons[neurons.chosen_by.isin(NEURON_CONTROLS)]
    shared = drawn.merge(ours[["block", "neuron"]].drop_duplicates(), on=["block", "neuron"])
    if run.config.selector == "lape":
        equal = sizes.loc[[name for name in sizes.index if name[0] in ("lap", "mad", "cas")]]
    passed = not is_twice and equal.nunique() == 1 and shared.empty
    found = f"lists of {', '.join(map(str, sorted({*equal})))}, {len(shared)} shared with random"
    return Outcome(found, "one size, and none shared", bool(passed))


def _shares(run: NeuronResults) -> Outcome:
    some = run["drive"][run["drive"].share.notna()]
    of_text = grounding_coefficient(
        some.effect_text.to_numpy(float), some.effect_audio.to_numpy(float),
        min_effect=run.config.min_drive,
    )  # fmt: skip
    return at_most(some.share.to_numpy(float) + of_text - 1, 1e-9)


CONTROLS = (
    *label_controls("answers", "doses", "drive"),
    Control(name="neurons at alpha = 0", of=("doses",), check=_unchanged,
            guards_against="values written at other neurons or positions than they came from"),
    Control(name="the unchanged run is the item as asked", of=("doses", "answers"),
            check=_as_asked, guards_against="changes measured on another prompt"),
    Control(name="the logs count every position of their items", of=("logs", "neurons"),
            check=_counted, guards_against="items that a log counts twice, or not at all"),
    Control(name="no group in both halves", of=("neurons", "doses", "drive"), check=_apart,
            guards_against="neurons judged on speakers that they were selected on"),
    Control(name="as many neurons for every class, none of them random", of=("neurons",),
            check=_lists, guards_against="classes or controls that differ in number"),
    Control(name="the shares of audio and instruction add up to 1", of=("drive",), check=_shares,
            guards_against="a share that is not made of its row's effects"),
)  # fmt: skip
