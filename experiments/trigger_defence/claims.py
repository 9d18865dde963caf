"""What a ``trigger_defence`` run may establish, and the controls that vouch for it.

Source: M-SP-1 to M-SP-5.
"""

from dataclasses import replace

from hooked_alm.methods.robustness.places import PLACES

from ..materials.attack_results import ATTACK_CLAIM, attack_controls
from ..workbench.claims import Claim, Finding, around_zero, few, judged, not_measured, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from ..workbench.results import having
from .plan import DRAWN, FEATURES
from .tables import DefenceResults, beyond, judged_defences, of

TOLERATED = 0.05
"""Share of clean clips whose right answer a defence may cost."""
UNIT = "share of clips"
PLACE = {"lm": "the language model's neurons", "audio": "the audio encoder's neurons",
         FEATURES: "the dictionary's features", "input": "the clip"}  # fmt: skip
KIND = {
    "patch": "patched from", "dense": "moved as far, all together, towards", "bias": "shifted",
    "prune": "pruned", "denoise": "without noise", "noise": "with more noise",
    "clean": "the clean clip", "denoised": "the clip without noise",
    "random": "random ones", "layer": "random ones of the same blocks",
}  # fmt: skip


def in_words(name: str) -> str:
    """A defence, as sentences name it."""
    place, *held = name.split("_")
    return " ".join([PLACE[place], *(KIND[one] for one in held)])


def _restores(run: DefenceResults, name: str) -> Finding:
    """Whether holding the sensitive neurons restores more than holding drawn ones."""
    claim = f"It is the sensitive ones that restore answers: {in_words(name)}"
    if run["defended"].empty:
        return not_measured(claim, "no attack reached its target", UNIT)
    defence = judged_defences(run.config)[name]
    apart = {one: beyond(run, defence, replace(defence, chosen_by=one)) for one in DRAWN}
    row, found = of(run["restored"], defence).iloc[0], apart["layer"]
    level = [KIND[one] for one, numbers in apart.items() if not numbers["low"] > 0]
    more = ", ".join(f"{shown(one)} more than with {KIND[kind]}" for kind, one in apart.items())
    return judged(
        claim,
        f"With {run.config.percent:g} % held so, {row.restored_mean:.2f} of {row.n} clips have "
        f"their clean answer again, {more}; of the margin {row.recovered_mean:.2f} is recovered",
        {**few(found["n"], "clips"), f"not surely more than {', '.join(level)}": bool(level)},
        numbers=found, unit=UNIT,
    )  # fmt: skip


def _compared(run: DefenceResults, *names: str) -> Finding | None:
    """Which of two defences restores more; None where one of them was not run."""
    known = judged_defences(run.config)
    if not {*names} <= {*known}:
        return None
    if run["defended"].empty:
        claim = f"One restores more: {' or '.join(map(in_words, names))}"
        return not_measured(claim, "no attack reached its target", UNIT)
    shares = {one: of(run["restored"], known[one]).restored_mean.iloc[0] for one in names}
    more, less = sorted(names, key=lambda one: -shares[one])
    found = beyond(run, known[more], known[less])
    return judged(
        f"{in_words(more).capitalize()} restore more than {in_words(less)}",
        f"{shares[more]:.2f} and {shares[less]:.2f} of the clips have their clean answer again "
        f"with {run.config.percent:g} % held so: {shown(found)} more",
        {**few(found["n"], "clips"), **around_zero(found, "difference")},
        numbers=found, unit=UNIT,
    )  # fmt: skip


def _cost(run: DefenceResults, name: str) -> Finding:
    """Whether a defence leaves answers to clean clips alone, within what is tolerated."""
    defence = judged_defences(run.config, attacked=False)[name]
    row, table = of(run["kept_answers"], defence).iloc[0], of(run["costs"], defence)
    found = run.draws.row(table.lost, table.group.tolist())
    return judged(
        f"At most {TOLERATED:g} of the clean clips lose their right answer: {in_words(name)}",
        f"Right are {row.right_mean:.2f} of {row.n} clean clips, {shown(found)} fewer than "
        f"without; {row.alarm_mean:.2f} of the answers change, false alarms",
        {**few(found["n"], "clips"), f"more than {TOLERATED:g} may": found["high"] > TOLERATED,
         **({"the loss has no interval": True} if found["high"] != found["high"] else {})},
        numbers=found, unit=UNIT,
    )  # fmt: skip


CLAIMS = (
    ATTACK_CLAIM,
    Claim(name="restores_{}", rests_on=("defences", "sensitivity"), judge=_restores,
          per=lambda run: [name for name, one in judged_defences(run.config).items()
                           if one.place in PLACES]),
    Claim(name="place", rests_on=("defences",),
          judge=lambda run: _compared(run, "lm_patch_clean", "audio_patch_clean")),
    Claim(name="features", rests_on=("defences",),
          judge=lambda run: _compared(run, "features_patch_clean", "features_dense_clean")),
    Claim(name="cost_{}", rests_on=("utility",), judge=_cost,
          per=lambda run: [name for name, one in
                           judged_defences(run.config, attacked=False).items()
                           if one.donor != "clean"]),
)  # fmt: skip


def _rounding(run: DefenceResults) -> float:
    return ROUNDING["logit"][run.config.dtype]


def _own_values(run: DefenceResults) -> Outcome:
    same = having(run["utility"], kind="patch", donor="clean", place=[*PLACES])
    return at_most(same.margin - same.margin_before, _rounding(run), "logits")


def _moves(run: DefenceResults) -> Outcome:
    patched = having(run["defences"], kind="patch", donor="clean", place=[*PLACES],
                     chosen_by="sensitive", percent=max(run.config.percents))  # fmt: skip
    n_moved = int(((patched.margin - patched.margin_before).abs() > _rounding(run)).sum())
    found = f"{n_moved} of {len(patched)} clips' scores move"
    return Outcome(found, "some do", n_moved > 0)


def _same_clips(run: DefenceResults) -> Outcome:
    found = run["defences"].drop_duplicates("clip").set_index("clip")
    alone = run["attack"].set_index("clip").loc[found.index]
    off = [*(found.margin_clean - alone.margin_clean), *(found.margin_before - alone.margin)]
    return at_most(off, _rounding(run), "logits")


def _apart(run: DefenceResults) -> Outcome:
    table = run["attack"]
    chosen_on = {*table.group[table.half == "discovery"]}
    both = sorted(chosen_on & {*run["defences"].group, *run["utility"].group})
    found = f"{', '.join(both)} in both" if both else f"{len(chosen_on)} groups chosen on"
    return Outcome(found, "none is in both", not both)


def _drawn(run: DefenceResults) -> Outcome:
    table, key = having(run["sensitivity"], place=[*PLACES]), ["place", "block", "neuron"]
    sizes = table.groupby(["place", "chosen_by", "draw"]).size().groupby("place").nunique()
    chosen = having(table, chosen_by="sensitive")[key]
    shared = having(table, chosen_by=[*DRAWN]).merge(chosen, on=key)
    passed = bool((sizes == 1).all()) and shared.empty
    found = f"{sizes.max()} sizes in a place, {len(shared)} neurons shared"
    return Outcome(found, "one size, none shared", passed)


CONTROLS = (
    *label_controls("attack", "defences", "utility"),
    *attack_controls("defences"),
    Control(name="a clean clip's own values change nothing", of=("defences", "utility"),
            check=_own_values,
            guards_against="values written at other neurons or rows than they came from"),
    Control(name="a patch is no identity", of=("defences",), check=_moves,
            guards_against="the attacked clip's own values in the place of the clean ones"),
    Control(name="clips are heard alike when attacked and when defended",
            of=("attack", "defences"), check=_same_clips,
            guards_against="another perturbation than the one that was found"),
    Control(name="no group in both halves", of=("defences", "utility"), check=_apart,
            guards_against="defences judged on speakers that neurons were selected on"),
    Control(name="as many drawn neurons, none of them sensitive", of=("sensitivity", "defences"),
            check=_drawn, guards_against="controls of another number, or that hold the same"),
)  # fmt: skip
