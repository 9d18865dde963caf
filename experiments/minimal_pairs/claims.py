"""What a ``minimal_pairs`` run controls and claims."""

import numpy as np

from ..materials.pair_acceptance import EVERY
from ..workbench.claims import Claim, Finding, few, judged, not_measured, shown
from ..workbench.controls import FAIL, ROUNDING, SKIPPED, Control, Outcome, at_most
from .tables import PairResults, of

N_NAMED = 4
NO_GAP = 0.05
"""Share of an effect that is no difference worth a claim."""


def _whole_exchange(run: PairResults) -> Outcome:
    first = run["depths"].query("depth == 0 and place == 'audio'")
    return at_most(first.value - first.donor, ROUNDING["logit"][run.config.dtype], "logits")


def _last_block_is_blind(run: PairResults) -> Outcome:
    heads = run["heads"]
    last = heads[(heads.layer == run.n_blocks - 1) & (heads.place != "readout")]
    return at_most(last[["patched", "ablated"]], ROUNDING["logit"][run.config.dtype], "logits")


CONTROLS = (
    Control(name="written clips are heard as those that were measured", of=("clips", "written"),
            check=lambda run: at_most(run["written"].difference, 0.0, "of a feature"),
            guards_against="files that are not the clips that were accepted"),
    Control(name="the audio at depth 0 is the whole exchange", of=("depths",),
            check=_whole_exchange,
            guards_against="prompts of a pair that differ in more than their clip"),
    Control(name="heads of the last block move nothing but at the readout", of=("heads",),
            check=_last_block_is_blind,
            guards_against="heads patched or removed at other positions than they are said to be"),
)  # fmt: skip


def _sets(run: PairResults) -> list[str]:
    return run["sets"].attribute.tolist()


def _measured(run: PairResults) -> list[str]:
    return run["curves"].attribute.drop_duplicates().tolist()


def _alone(run: PairResults, attribute: str) -> Finding:
    """The claim that the accepted pairs of a set differ in one thing, as far as it was measured."""
    row = of(run["sets"], attribute).iloc[0]
    pairs, criteria = of(run["pairs"], attribute), of(run["acceptance"], attribute)
    passing = pairs[pairs.accepted]
    of_set = criteria[(criteria.pair == EVERY) & (criteria.verdict == FAIL)]
    kept = criteria[criteria.pair.isin([EVERY, *passing.pair])]
    judged_by = kept[kept.verdict != SKIPPED].criterion.drop_duplicates()
    unread = [one for one in run.config.others if one not in {*run["probes"].query("reads").column}]
    facts = (
        f"{row.accepted} of {row.n} pairs are accepted"
        + (f"; rejected by {row.rejected_by}" if row.rejected_by else "")
        + f". Judged by {', '.join(judged_by) or 'nothing'}"
        + (f"; no probe reads {', '.join(unread)}" if unread else "")
    )
    change = run.draws.row(passing.own_probe, passing.group.tolist()) if len(passing) else {}
    if change and change["n"]:
        facts += f". The probe of what they differ in changes by {shown(change)}"
    return judged(
        f"These pairs differ in {attribute} alone, as far as measured",
        facts,
        {
            "no pair is accepted": passing.empty,
            **{f"rejected as a set by {one}": True for one in of_set.criterion},
            **(few(row.groups, "groups") if len(passing) else {}),
            "who speaks is not known": not (pairs.speaker != "").all(),
            "what is said is not known": not (pairs.text != "").all(),
        },
        numbers={"mean": row.accepted / row.n, "n": row.n},
        unit="share of pairs",
    )


def _directions(run: PairResults, attribute: str) -> Finding:
    """The claim that necessity and sufficiency part, at the cell where they do most."""
    claim = f"Noising and denoising of {attribute} differ"
    cells = of(run["gaps"], attribute).dropna(subset=["mean"])
    if cells.empty:
        return not_measured(claim, "no pair has an effect to share", "share")
    surest = np.maximum(cells.low, -cells.high).fillna(-np.inf)
    is_any = surest.max() > NO_GAP
    worst = cells.loc[surest.idxmax() if is_any else cells["mean"].abs().idxmax()].to_dict()
    n = int(worst["n"])
    return judged(
        claim,
        f"{'Surest' if is_any else 'Largest'} at the {worst['place']}, depth {worst['depth']}: "
        f"noising brings {worst['noising']:.2f} of the effect, denoising "
        f"{worst['denoising']:.2f}; difference {shown(worst)} (band over {len(cells)} "
        f"cells), {n} groups with an effect",
        {
            **few(n, "groups"),
            f"no difference is surely above {NO_GAP:g}": not is_any,
        },
        numbers=worst,
        unit="share",
    )


def _backup(run: PairResults, attribute: str) -> Finding:
    """The warning that patching and ablation disagree: heads that only one of them shows."""
    heads, least = of(run["backup"], attribute), run.config.min_effect
    alone = heads[heads.alone != ""].sort_values("patched", key=np.abs, ascending=False)
    named = [
        f"L{one.layer}H{one.head} at the {one.place} (patched {one.patched:+.2f}, "
        f"{run.config.ablation} ablation {one.ablated:+.2f})"
        for one in alone.head(N_NAMED).itertuples()
    ]
    n_moving = ((heads.patched_low > least) | (heads.patched_high < -least)).sum()
    facts = (
        f"{len(alone)} of {len(heads)} heads and places are moved surely by one and surely not by "
        f"the other ({least:g} logits); patching moves {n_moving}"
        + (f". {', '.join(named)}" if named else "")
    )
    # A head that ablation alone shows has none that stands in for it: it is missed by itself.
    is_backup = alone.empty or (alone.alone == "patched").any()
    why = (
        f"Other heads may stand in for some that carry {attribute} (backup)"
        if is_backup
        else f"Heads that do not carry {attribute} are missed where they are removed"
    )
    return judged(
        f"{why}: patching and ablation disagree",
        facts,
        {**few(heads.n_groups.max(), "groups"), "no head is moved by one alone": alone.empty},
        numbers={"mean": len(alone), "n": heads.n_groups.max()},
        unit="heads",
    )


CLAIMS = (
    Claim(name="{}: alone", rests_on=("clips",), judge=_alone, per=_sets),
    Claim(name="{}: directions", rests_on=("depths",), judge=_directions, per=_measured),
    Claim(name="{}: backup", rests_on=("heads",), judge=_backup, per=_measured),
)
