"""What an ``attribute_lens`` run controls, and may establish.

Source: AudioLens, its conclusions; M-AL-2 to M-AL-5.
"""

import numpy as np

from ..materials.confounds import confounded
from ..workbench.claims import Claim, Finding, around_zero, few, judged, not_measured, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from ..workbench.results import having
from .tables import (
    AttributeResults,
    above,
    attributes_of,
    lost_in_silence,
    mean_of,
    wide,
)

MOST_UNDEFINED = 0.05
"""Share of the replicates that may lack a depth before its interval means nothing."""


# --- Controls


def _lens_ends_in_the_answer(run: AttributeResults) -> Outcome:
    """Information at the last depth of the readout is that of the answer itself (M-AL-2)."""
    last = having(run["information"], depth=run.n_blocks, position="readout")
    both = last.merge(
        run["answers"], on=["clip", "attribute", "prompt"], suffixes=("", "_answered")
    )
    # The lens is fp32; the output is the model's precision.
    off = both.label_mass - both.label_mass_answered
    return at_most(off, ROUNDING["logit"][run.config.dtype], "probability")


def _mass_is_a_share(run: AttributeResults) -> Outcome:
    return at_most((run["information"].label_mass - 1).clip(lower=0), ROUNDING["share"]["float32"])


def _blind_queries(run: AttributeResults) -> Outcome:
    """A mention before the audio cannot be kept from it: nothing may change."""
    names = [name for name, behind in run.inputs["audio_is_behind"].items() if behind]
    blind = having(run["knockout"], query="mention", keys="audio", attribute=names)
    return at_most(blind.gain, ROUNDING["logit"][run.config.dtype], "logits")


def _last_block(run: AttributeResults) -> Outcome:
    """What the mention sees in the last block, the readout reads no more."""
    cells = having(run["knockout"], query="mention", first=run.n_blocks - 1)
    return at_most(cells.gain, ROUNDING["logit"][run.config.dtype], "logits")


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


def _else(run: AttributeResults, attribute: str) -> dict[str, bool]:
    """What else than the attribute the clips may be told apart by."""
    return confounded(having(run["confounds"], attribute=attribute), run.config)


def _hears(run: AttributeResults, attribute: str) -> Finding:
    rows = having(run["accuracy"], attribute=attribute, heard="audio")
    row = having(rows, prompt=run.config.causal_prompt).iloc[0].to_dict()
    chance = max(row["chance"], 1 / len(run.inputs["labels"][attribute]))
    others = "".join(
        f", {one['mean']:.2f} under the format {one['prompt']}"
        for one in rows.to_dict("records")
        if one["prompt"] != run.config.causal_prompt
    )
    return judged(
        f"The model answers the {attribute}",
        f"Right in {shown(row)} of {int(row['n'])} clips under the format "
        f"{run.config.causal_prompt}{others}; by chance in {chance:.2f}",
        {
            **few(row["n_clusters"], run.config.resampled),
            f"not surely above chance, {chance:.2f}": not row["low"] > chance,
            **_else(run, attribute),
        },
        numbers=row,
        unit="rate",
    )


def _uses_the_audio(run: AttributeResults, attribute: str) -> Finding:
    """Whether it is the audio that the answer is made of (C47)."""
    claim = f"The answer to the {attribute} rests on the audio"
    lost = lost_in_silence(run, attribute)
    if not lost["n"]:
        return not_measured(claim, "nothing was taken away", "logits")
    without = having(run["accuracy"], attribute=attribute).query("heard != 'audio'")
    said = ", ".join(f"{one['mean']:.2f} ({one['heard']})" for one in without.to_dict("records"))
    return judged(
        claim,
        f"With silence in its place the right label leads by {shown(lost)} logits less; right "
        f"without the audio, or a transcript: {said}",
        {
            **few(lost["n_clusters"], run.config.resampled),
            "the loss is not surely above 0": not lost["low"] > 0,
        },
        numbers=lost,
        unit="logits",
    )


def _readable(run: AttributeResults, attribute: str) -> Finding:
    rows = having(run["critical"], attribute=attribute, prompt=run.config.causal_prompt,
                  position="readout", lens="logit")  # fmt: skip
    # A label may lead all others by a hair, in clip after clip, where none has been read.
    at = having(rows, measure="p_correct_soft", definition="resolve").iloc[0]
    mean = having(rows, measure="hit", definition="weighted").iloc[0]
    numbers = {"mean": at.depth, "low": at.low, "high": at.high, "n": at.n}
    bar = above(run, attribute)
    facts = f"Its probability among the labels is not above {bar:.2f} at the last depth"
    if np.isfinite(at.depth):
        facts = (
            f"Its probability among the labels stays above {bar:.2f} from depth "
            f"{shown(numbers, 0)} of 0 to {run.n_blocks} on"
        )
    layer = f"{mean.depth:.2f}"
    if not np.isfinite(mean.depth):
        layer = f"undefined, as that share is above {bar:.2f} at no depth"
    facts += (
        ". The critical layer, a mean depth weighted by the share of clips whose label leads, is "
        f"{layer}"
    )
    return judged(
        f"The {attribute} can be read at the readout"
        + (f" from depth {at.depth:.0f} on" if np.isfinite(at.depth) else ""),
        facts,
        {
            **few(at.n, "clips"),
            "no such depth in some resamples": not at.undefined <= MOST_UNDEFINED,
            **_else(run, attribute),
        },
        numbers=numbers,
        unit="depth",
    )


def _direct(run: AttributeResults, attribute: str) -> Finding:
    """Whether the readout reads the audio, or what was collected where the attribute is named."""
    whole = {"attribute": attribute, "query": "readout", "first": 0, "last": run.n_blocks - 1}
    every = having(run["knockout"], **whole)
    gains = every.pivot(index=["clip", "speaker"], columns="keys", values="gain")
    claim = f"The readout gets the {attribute} from the audio itself"
    if "mention" not in gains or "audio" not in gains:
        return not_measured(claim, "no words name the attribute apart from the readout", "logits")
    who = gains.index.to_frame(index=False)
    costs = {keys: run.draws.row(-gains[keys], run.config.clusters(who)) for keys in gains}
    gap = run.draws.row(gains["mention"] - gains["audio"], run.config.clusters(who))
    is_direct = gap["mean"] > 0
    if not is_direct:
        claim = f"The readout gets the {attribute} from where it is named"
    used = "audio" if is_direct else "mention"
    by_chance = run.draws.row(gains["random"] - gains[used], run.config.clusters(who))
    shares = having(run["knockouts"], **whole).set_index("keys").share
    facts = (
        "Kept from them in all blocks, the right label leads by less: without the audio by "
        f"{shown(costs['audio'])} logits ({_share(shares['audio'])}), without the mention by "
        f"{shown(costs['mention'])} ({_share(shares['mention'])}), without as many random keys "
        f"as the audio has by {shown(costs['random'])}"
    )
    return judged(
        claim,
        facts,
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
    who, hits = wide(curves, "hit")
    # The peak is chosen on the mean of the other clips, so that it is no peak of noise.
    total = hits.sum(axis=0)
    peaks = (total - hits)[:, :-1].argmax(axis=1)
    drop = hits[np.arange(len(hits)), peaks] - hits[:, -1]
    found = run.draws.row(drop, run.config.clusters(who))
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


def _enrichment(run: AttributeResults, attribute: str) -> Finding | None:
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


CLAIMS = (
    Claim(name="answers_{}", rests_on=("answers",), judge=_hears, per=attributes_of),
    Claim(name="uses_the_audio_{}", rests_on=("answers", "absences"), judge=_uses_the_audio,
          per=attributes_of),
    Claim(name="readable_{}", rests_on=("information",), judge=_readable, per=attributes_of),
    Claim(name="direct_{}", rests_on=("knockout",), judge=_direct, per=attributes_of),
    Claim(name="peaks_and_drops_{}", rests_on=("information", "answers"), judge=_peaks,
          per=attributes_of),
    Claim(name="enrichment_{}", rests_on=("enrichment", "enrichment_search"), judge=_enrichment,
          per=attributes_of),
)  # fmt: skip
