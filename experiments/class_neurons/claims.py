"""What a ``class_neurons`` run may establish, and the controls that vouch for it.

Source: M-ESN-3, M-ESN-4, M-ESN-8.
"""

import numpy as np

from hooked_alm.methods.neurons.sets import NEURON_CONTROLS, SELECTORS

from ..materials.class_items import none_in_both
from ..materials.conflict_claims import input_finding, shares_add_up
from ..materials.confounds import confounded
from ..workbench.claims import (
    Claim,
    Finding,
    around_zero,
    few_of,
    judged,
    not_measured,
    shown,
    within_rounding,
)
from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from ..workbench.results import having
from .settings import OUT, SAME
from .tables import NeuronResults

EVEN = 0.5
"""Share of the audio where both inputs drive neurons alike."""
OF_CONTROL = {"random": "random ones", "layer": "random ones of the same blocks",
              "magnitude": "random ones as strong"}  # fmt: skip
ENDS = {"mean": "", "low": "_low", "high": "_high"}
INPUT = {"audio": "audio", "text": "instruction"}


def _specific(run: NeuronResults, selector: str) -> Finding:
    """The claim that taking a class's neurons out costs it more than other classes."""
    table = run["specificity"].set_index(["chosen_by", "measure"])
    row, accuracy = (table.loc[(selector, what)].to_dict() for what in ("lead", "right"))
    mine = having(run["doses"], chosen_by=selector, alpha=OUT)
    n_groups = mine.groupby("cls").group.nunique()
    alone = [*map(str, n_groups.index[n_groups < 2])]
    reasons = {
        f"{', '.join(alone)}: judged on one group alone": bool(alone),
        **few_of(row),
        **around_zero(row, "difference"),
        "other classes lose more": bool(row["high"] > 0 and row["mean"] > 0),
        **within_rounding(mine.lead - mine.lead_clean, mine.noise, "logits"),
    }
    facts = (
        f"Own items' right label loses {-row['own']:.2f} logits of its lead, other classes' "
        f"{-row['other']:.2f}: difference {shown(row)}; in accuracy {shown(accuracy)}"
    )
    if selector == run.config.selector:
        beyond = {
            name: {end: row[f"beyond_{one}{suffix}"] for end, suffix in ENDS.items()}
            for one, name in OF_CONTROL.items()
        }
        # Higher than 0: the random neurons cost as much of what sets their class apart.
        level = [name for name, ends in beyond.items() if not ends["high"] < 0]
        reasons[f"not surely more than {', '.join(level)}"] = bool(level)
        facts += f"; beyond {', '.join(f'{name} {shown(ends)}' for name, ends in beyond.items())}"
    return judged(
        f"The neurons that {selector} selects for a class matter more for it than for others",
        f"{facts}; n = {row['n']:.0f} items of {row['n_clusters']:.0f} groups",
        reasons | confounded(run["confounds"], run.config), numbers=row, unit="logits",
    )  # fmt: skip


def _gain(run: NeuronResults) -> Finding:
    """The claim that making a class's neurons stronger makes the model lean to it."""
    means = run["dose_means"].set_index(["measure", "alpha"])["mean"]
    row = run["dose_means"].set_index("measure").loc["rank"].to_dict()
    top = float(max(run.config.alphas))
    return judged(
        "Making the neurons of a class stronger makes the model lean to it elsewhere",
        f"On items of other classes, the rank correlation of strength and lead: {shown(row)}. At "
        f"alpha = {top:g} {means['said_of', top]:.2f} of the answers are the class, without "
        f"{means['said_of', SAME]:.2f}; right are {means['right', top]:.2f}, without "
        f"{means['right', SAME]:.2f}; KL of the rest of the answer {means['kl_rest', top]:.2f} "
        f"nats; n = {row['n']:.0f}",
        {
            **few_of(row, "curves"), **around_zero(row, "correlation"),
            "it leans away from it": bool(row["mean"] < 0),
        },
        numbers=row, unit="rank correlation",
    )  # fmt: skip


def _driven(run: NeuronResults) -> Finding:
    """The claim which input drives the neurons of a class."""
    anyone, unit = "The neurons of a class are driven by one input", "share of the audio"
    means = run["drive_means"].set_index(["chosen_by", "measure"])
    if means.empty:
        return not_measured(anyone, "no conflict has both inputs exchanged", unit)
    ours = means.loc[run.config.selector]
    row = ours.loc["share"].to_dict()
    if not row["n"]:
        why = f"no effects of both inputs together reach {run.config.min_drive:g}"
        return not_measured(anyone, why, unit)
    effects = ", ".join(f"the {what} {shown(ours.loc[f'effect_{one}'].to_dict(), 3)}"
                        for one, what in INPUT.items())  # fmt: skip
    return input_finding(
        run, row, EVEN, INPUT,
        f"The neurons that {run.config.selector} selects are driven by the {{}}",
        f"The audio's share of what moves them at the readout is {shown(row)}, 0.5 is even; "
        f"effects on the gate: {effects}; n = {row['n']:.0f} of "
        f"{row['n'] + row['n_undefined']:.0f} conflicts",
        few_of(row, "conflicts"), unit,
    )  # fmt: skip


CLAIMS = (
    Claim(name="specific_{}", rests_on=("doses", "neurons"), judge=_specific,
          per=lambda run: [*SELECTORS]),
    Claim(name="gain", rests_on=("doses", "neurons"), judge=_gain),
    Claim(name="drive", rests_on=("drive", "neurons"), judge=_driven),
)  # fmt: skip


def _unchanged(run: NeuronResults) -> Outcome:
    same = having(run["doses"], alpha=SAME)
    off = [same.lead - same.lead_clean, same.kl_rest]
    return at_most(np.concatenate(off), ROUNDING["logit"][run.config.dtype], "logits or nats")


def _as_asked(run: NeuronResults) -> Outcome:
    answers, doses = run["answers"], run["doses"].drop_duplicates("item")
    scores = answers.set_index("item").filter(regex="^z_")
    own = dict(zip(answers.item, "z_" + answers.cls, strict=True))
    leads = [
        scores.loc[item, own[item]] - scores.loc[item].drop(own[item]).max() for item in doses.item
    ]
    return at_most(doses.lead_clean - leads, ROUNDING["logit"][run.config.dtype], "logits")


def _counted(run: NeuronResults) -> Outcome:
    answers, logs = run["answers"], run["logs"]
    found = int(logs.n_rows.sum()) - int((answers.n_rows * answers.logged).sum())
    return at_most([found, logs.n_items.sum() - answers.logged.sum()], 0.0, "positions or items")


def _apart(run: NeuronResults) -> Outcome:
    answers, judged_on = run["answers"], [*run["doses"].group, *run["drive"].group]
    return none_in_both(answers.group[answers.logged == 1], judged_on)


def _lists(run: NeuronResults) -> Outcome:
    neurons, ours = run["neurons"], run.config.selector
    sizes = neurons.groupby(["chosen_by", "draw", "cls"]).size()
    # lape has fewer where no more pass its bar, and then so have the random ones beside it.
    equal = sizes.drop(index=["lape", *(NEURON_CONTROLS if ours == "lape" else ())],
                       level="chosen_by", errors="ignore")  # fmt: skip
    is_twice = neurons.duplicated(["chosen_by", "draw", "cls", "block", "neuron"]).any()
    mine = having(neurons, chosen_by=ours)[["block", "neuron"]].drop_duplicates()
    shared = having(neurons, chosen_by=NEURON_CONTROLS).merge(mine, on=["block", "neuron"])
    passed = not is_twice and equal.nunique() == 1 and shared.empty
    found = f"lists of {', '.join(map(str, sorted({*equal})))}, {len(shared)} shared with random"
    return Outcome(found, "one size, and none shared", bool(passed))


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
    Control(name="the shares of audio and instruction add up to 1", of=("drive",),
            check=lambda run: shares_add_up(run["drive"], "share", run.config.min_drive),
            guards_against="a share that is not made of its row's effects"),
)  # fmt: skip
