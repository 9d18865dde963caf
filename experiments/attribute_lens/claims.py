"""What an ``attribute_lens`` run controls, and may establish.

Source: AudioLens, its conclusions; M-AL-2 to M-AL-5.
"""

import numpy as np

from hooked_alm.methods.statistics.information import drops_from_peak

from ..materials.attribute_answers import (
    answered_finding,
    attributes_of,
    audio_finding,
    told_apart_by,
)
from ..materials.enrichment_findings import enrichment_finding
from ..materials.resampling import mean_of, over
from ..workbench.claims import Claim, Finding, around_zero, few, judged, not_measured, shown
from ..workbench.controls import (
    ROUNDING,
    Control,
    Outcome,
    at_most,
    label_controls,
    same_at_the_end,
)
from ..workbench.results import having
from .tables import AttributeResults, above

MOST_UNDEFINED = 0.05
"""Share of the replicates that may lack a depth before its interval means nothing."""


# --- Controls


def _lens_ends_in_the_answer(run: AttributeResults) -> Outcome:
    """Information at the last depth of the readout is that of the answer itself (M-AL-2)."""
    lens, on = having(run["information"], position="readout"), ["clip", "attribute", "prompt"]
    return same_at_the_end(
        run, lens, run["answers"], on=on, column="label_mass", unit="probability"
    )


def _mass_is_a_share(run: AttributeResults) -> Outcome:
    return at_most((run["information"].label_mass - 1).clip(lower=0), ROUNDING["share"]["float32"])


def _nothing_changes(run: AttributeResults, **cells: object) -> Outcome:
    gains = having(run["knockout"], query="mention", **cells).gain
    return at_most(gains, ROUNDING["logit"][run.config.dtype], "logits")


def _blind_queries(run: AttributeResults) -> Outcome:
    """A mention before the audio cannot be kept from it: nothing may change."""
    names = [name for name, behind in run.inputs["audio_is_behind"].items() if behind]
    return _nothing_changes(run, keys="audio", attribute=names)


def _last_block(run: AttributeResults) -> Outcome:
    """What the mention sees in the last block, the readout reads no more."""
    return _nothing_changes(run, first=run.n_blocks - 1)


CONTROLS = (
    *label_controls("answers", "information", "knockout", "enrichment"),
    Control(name="the lens ends in the output", of=("information",), check=_lens_ends_in_the_answer,
            guards_against="a lens with the final norm left out or applied twice (I2)"),
    Control(name="no labels hold more than all probability", of=("information",),
            check=_mass_is_a_share, guards_against="labels that are counted twice"),
    Control(name="a mention before the audio is blind to it", of=("knockout",),
            check=_blind_queries,
            guards_against="queries, or keys, at other positions than they are said to be"),
    Control(name="the mention's last block is not read", of=("knockout",), check=_last_block,
            guards_against="a readout that is edited in the mention's stead"),
)  # fmt: skip


# --- Claims


def _readable(run: AttributeResults, attribute: str) -> Finding:
    rows = having(run["critical"], attribute=attribute, prompt=run.config.causal_prompt,
                  position="readout", lens="logit")  # fmt: skip
    # A label may lead all others by a hair, in clip after clip, where none has been read.
    at = having(rows, measure="p_correct_soft", definition="resolve").iloc[0]
    layer = having(rows, measure="hit", definition="weighted").depth.iloc[0]
    numbers = {"mean": at.depth, "low": at.low, "high": at.high, "n": at.n}
    bar, claim = above(run, attribute), f"The {attribute} can be read at the readout"
    facts = f"Its probability among the labels is not above {bar:.2f} at the last depth"
    if np.isfinite(at.depth):
        claim += f" from depth {at.depth:.0f} on"
        facts = (
            f"Its probability among the labels stays above {bar:.2f} from depth "
            f"{shown(numbers, 0)} of 0 to {run.n_blocks} on"
        )
    undefined = f"undefined, as that share is above {bar:.2f} at no depth"
    return judged(
        claim,
        f"{facts}. The critical layer, a mean depth weighted by the share of clips whose label "
        f"leads, is {f'{layer:.2f}' if np.isfinite(layer) else undefined}",
        {
            **few(at.n, "clips"),
            "no such depth in some resamples": not at.undefined <= MOST_UNDEFINED,
            **told_apart_by(run, attribute),
        },
        numbers=numbers,
        unit="depth",
    )


def _direct(run: AttributeResults, attribute: str) -> Finding:
    """Whether the readout reads the audio, or what was collected where the attribute is named."""
    whole = {"attribute": attribute, "query": "readout", "first": 0, "last": run.n_blocks - 1}
    cells = having(run["knockout"], **whole)
    claim = f"The readout gets the {attribute} from the audio itself"
    if not {"mention", "audio"} <= {*cells["keys"]}:
        return not_measured(claim, "no words name the attribute apart from the readout", "logits")
    lost = -cells.pivot(index=["clip", "speaker"], columns="keys", values="gain")
    lost = lost.assign(gap=lost.audio - lost.mention).reset_index()
    costs = {name: mean_of(run, lost, name) for name in ("audio", "mention", "random", "gap")}
    gap, used = costs["gap"], "audio"
    if not gap["mean"] > 0:
        used, claim = "mention", f"The readout gets the {attribute} from where it is named"
    by_chance = mean_of(run, lost.assign(more=lost[used] - lost.random), "more")
    shares = having(run["knockouts"], **whole).set_index("keys").share
    said = {name: f"{shown(costs[name])}" for name in costs}
    return judged(
        claim,
        "Kept from them in all blocks, the right label leads by less: without the audio by "
        f"{said['audio']} logits ({_share(shares['audio'])}), without the mention by "
        f"{said['mention']} ({_share(shares['mention'])}), without as many random keys as the "
        f"audio has by {said['random']}",
        {
            **few(gap["n_clusters"], run.config.resampled),
            **around_zero(gap, "difference"),
            "the cost is not surely above 0": not costs[used]["low"] > 0,
            "not surely more than random keys": not by_chance["low"] > 0,
        },
        numbers=gap,
        unit="logits",
    )


def _share(share: float) -> str:
    if not np.isfinite(share):
        return "what silence costs is not surely above 0"
    return f"{max(share, 0.0):.0%} of what silence costs"


def _peaks(run: AttributeResults, attribute: str) -> Finding | None:
    """AudioLens' mode of failure: read at some depth, and lost again."""
    table = having(run["outcomes"], attribute=attribute, lens="logit")
    claim = f"Where the {attribute} is answered wrong, it had been read at an earlier depth"
    if table.empty:
        return None
    told_by, prompt = table.told_by.iloc[0], run.config.causal_prompt
    wrong = having(run["answers"], attribute=attribute, prompt=told_by, hit=0)["clip"]
    curves = having(run["information"], attribute=attribute, prompt=prompt, position="readout",
                    lens="logit", clip=[*wrong])  # fmt: skip
    if curves.empty:
        return not_measured(claim, "no clip is answered wrong", "rate", f"By the format {told_by}")
    who, hits = over(curves, "hit")
    found = mean_of(run, who.assign(drop=drops_from_peak(hits)), "drop")
    return judged(
        claim,
        f"Of {len(who)} clips answered wrong under the format {told_by}, {hits[:, -1].mean():.2f} "
        f"read right at the last depth; at the depth where most others do, {shown(found)} more",
        {
            **few(found["n_clusters"], run.config.resampled),
            "not surely more": not found["low"] > 0,
            "the answer that the curve ends in tells what is wrong": told_by == prompt,
        },
        numbers=found,
        unit="rate",
    )


CLAIMS = tuple(
    Claim(name=f"{name}_{{}}", rests_on=rests_on, judge=judge, per=attributes_of)
    for name, rests_on, judge in (
        ("answers", ("answers",), answered_finding),
        ("uses_the_audio", ("answers", "absences"), audio_finding),
        ("readable", ("information",), _readable),
        ("direct", ("knockout",), _direct),
        ("peaks_and_drops", ("information", "answers"), _peaks),
        ("enrichment", ("enrichment", "enrichment_search"), enrichment_finding),
    )
)
