"""What attacks on clips come to: tables, controls, the claim that they work, and the page.

Source: M-SP-1.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..workbench import figures
from ..workbench.claims import Claim, Finding, few, judged, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from ..workbench.page import Page
from ..workbench.results import Results
from .attacks import AttackConfig
from .kept_attacks import KEPT
from .recordings import Recording

AttackResults = Results[Any]
"""Of a run whose settings are an ``AttackConfig``."""
ATTACK_TABLES = {
    "attack": "a clip that is attacked: answers, losses and sizes",
    "losses": "a clip's loss at a step of its attack",
    **KEPT,
}


def reached(run: AttackResults) -> pd.DataFrame:
    """Attacked clips whose clean answer is another than the target, and who brings it about.

    ``reached``: the attack; ``reached_control``: noise of equal size; ``difference``: of both.
    """
    table = run["attack"]
    table = table[table.answer_clean != table.target]
    mine, control = (
        (table[name] == table.target).astype(float) for name in ("answer", "answer_control")
    )
    return table.assign(reached=mine, reached_control=control, difference=mine - control)


def attacks(run: AttackResults) -> pd.DataFrame:
    """How often attacks and their controls reach the target; how large, and how long, they are."""
    tables = {
        **dict.fromkeys(("reached", "reached_control", "difference"), reached(run)),
        **dict.fromkeys(("loss_start", "loss", "n_steps", "snr_db", "snr_control_db"),
                        run["attack"]),
    }  # fmt: skip
    return pd.DataFrame([
        {"measure": what, **run.draws.row(table[what], table.group.tolist())}
        for what, table in tables.items()
    ])  # fmt: skip


def how_attacked(config: AttackConfig) -> str:
    """By what clips are attacked, in words."""
    if config.attack == "trigger":
        return "a chord of steady tones, which twins of bundled models were trained to hear"
    return (
        f"a perturbation of at most {config.eps:g} of full scale, searched in {config.steps} steps "
        f"of {config.alpha:g} at most, along the sign of a gradient that is normalised and keeps "
        f"0.2 of the last, until the loss is below {config.stop_loss:g}"
    )


def add_attacks(page: Page, run: AttackResults, recordings: Sequence[Recording]) -> None:
    """How often the target is the answer, the losses, and some clips."""
    page.table("How often the target is the answer, and how large attacks are", "attacks")
    steps = run["losses"].pivot(index="clip", columns="step", values="loss").ffill(axis=1)
    ends = steps.agg(["median", "min", "max"]).T.set_axis(["mean", "low", "high"], axis=1)
    drawing = figures.curves(ends := ends.reset_index(), "step", y_label="nats a token")
    page.figure(
        "loss", drawing, ends, "The loss of the target while the clips are attacked",
        "Median, least and largest over clips; those whose search has stopped stay where they are.",
    )  # fmt: skip
    mine, column = run["attack"].set_index("clip"), run.config.label_column
    some = [one for one in recordings if one.name in mine.index]
    shown = page.sample(some, lambda one: one.label, seed=run.config.seed, most=8)
    said = {"answer": "answer_clean", "attacked": "answer", "under noise": "answer_control"}
    page.play(
        shown, f"{shown.which}, as recorded.",
        lambda one: {column: one.label} | {k: mine[v][one.name] for k, v in said.items()},
    )  # fmt: skip


def _attack(run: AttackResults) -> Finding:
    """Whether the attack reaches its target, and noise of its size does not."""
    rows, both = run["attacks"].set_index("measure"), reached(run)
    found = rows.loc["difference"].to_dict()
    return judged(
        "The attack brings its target about, beyond noise of equal size",
        f"The target is the answer to {both.reached.sum():.0f} of {len(both)} clips, under noise "
        f"of the same size to {both.reached_control.sum():.0f}: {shown(found)} more; it is "
        f"{rows['mean']['snr_db']:.1f} dB below the clip",
        {**few(found["n"], "clips"), "not surely more": not found["low"] > 0},
        numbers=found, unit="share of clips",
    )  # fmt: skip


def _small(run: AttackResults) -> Outcome:
    table, config = run["attack"], run.config
    beyond_eps = table.largest - (config.eps if config.attack == "pgd" else table.largest)
    off = [*beyond_eps.clip(lower=0), *(table.loudest - 1).clip(lower=0)]
    return at_most(off, ROUNDING["nat"]["float32"], "of full scale")


def _as_large(run: AttackResults) -> Outcome:
    table = run["attack"][run["attack"].largest > 0]
    return at_most(table.snr_control_db - table.snr_db, 0.1, "dB")


ATTACK_CLAIM = Claim(name="attack", rests_on=("attack",), judge=_attack)


def attack_controls(*also: str) -> tuple[Control, Control]:
    """Controls that an attack is small, and the noise beside it as large.

    Args:
        also: other tables whose meaning depends on it.
    """
    return (
        Control(name="perturbations are within eps and full scale", of=("attack", *also),
                check=_small, guards_against="an attack that is no small change"),
        Control(name="the control noise is as large", of=("attack",), check=_as_large,
                guards_against="noise that is weaker than what it controls"),
    )  # fmt: skip
