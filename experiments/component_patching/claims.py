"""What a ``component_patching`` run controls, and may establish.

Source: Beyond Transcription (arXiv 2508.15882); M-BT-4.
"""

from functools import partial

from ..materials.resampling import mean_of
from ..workbench.claims import Claim, Finding, few, judged, not_measured, shown
from ..workbench.controls import ROUNDING, Control, Outcome, at_most
from .settings import PatchedStack
from .tables import CELL, PatchingResults, best, held_out, named, own

PATCHED = ("runs", "patched")


# --- Controls


def _nothing_at_zero(run: PatchingResults) -> Outcome:
    """At strength 0 a patch changes nothing."""
    table = run["patched"]
    still = table[table.alpha == 0]
    return at_most(still.value - still.base, ROUNDING["logit"][run.config.dtype], "nats")


def _last_block_is_the_reference(run: PatchingResults) -> Outcome:
    """With all that a stack's last block leaves replaced, the run is the reference's."""
    table = run["patched"]
    table = table[(table.site == "block") & (table.alpha == 1) & (table.reference != "zero")]
    last = table.groupby("stack")["layer"].transform("max")
    keys = ["clip", "reference", "draw"]
    both = table[table.layer == last].merge(run["runs"], on=keys, suffixes=("", "_whole"))
    return at_most(both.value - both.value_whole, ROUNDING["logit"][run.config.dtype], "nats")


def _every_cell_of_every_clip(run: PatchingResults) -> Outcome:
    """Every component is patched in the same clips."""
    every = {*own(run)["clip"]}
    cells = run["patched"][run["patched"].reference.isin(["noise", "silence", "zero"])]
    found = cells.groupby([*CELL, "reference", "alpha"])["clip"].agg(set)
    n_other = int((found != every).sum())
    expected = f"{len(every)} clips for every cell"
    return Outcome(f"other clips for {n_other} of {len(found)} cells", expected, not n_other)


CONTROLS = (
    Control(name="strength 0 changes nothing", of=("patched",), check=_nothing_at_zero,
            guards_against="a patch that does something by itself"),
    Control(name="the last block replaced is the reference", of=PATCHED,
            check=_last_block_is_the_reference,
            guards_against="values of another run, or written elsewhere"),
    Control(name="every component is patched in the same clips", of=("patched",),
            check=_every_cell_of_every_clip, guards_against="shares over different clips"),
)  # fmt: skip


# --- Claims


def _restores(run: PatchingResults, stack: PatchedStack) -> Finding:
    """Whether one component of a stack, chosen on some clips, restores the words of the others."""
    claim, component = f"One component of the {stack} puts context over sound", best(run, stack)
    if component is None:
        return not_measured(claim, _why_none(run, stack), "rate")
    mine = held_out(run, component)
    if mine.empty:
        return not_measured(claim, "no clip is left to judge it on", "rate")
    found = mean_of(run, mine, "restored")
    silent = held_out(run, component, "silence").restored.mean()
    by_chance = held_out(run, component, column="stranger_restored").stranger_restored.mean()
    return judged(
        f"{claim}: {named(component)}",
        f"Chosen on other clips, replacing it by noise makes the word that is said likelier than "
        f"the contextual one in {shown(found)} of {len(mine)} clips in which it is not; silence in "
        f"{silent:.2f}. Two words of another sentence change places likewise in {by_chance:.2f}",
        {
            **few(found["n_clusters"], run.config.resampled),
            "not surely more than half of the clips": not found["low"] > 0.5,
            "not surely more often than words of other sentences": not found["low"] > by_chance,
        },
        numbers=found,
        unit="rate",
    )


def _why_none(run: PatchingResults, stack: PatchedStack) -> str:
    if stack not in run.config.stacks:
        return f"the {stack} was not patched"
    return "in no clip is the contextual word likelier"


def _which_stack(run: PatchingResults) -> Finding:
    """Which stack it is: the best component of either, on the clips that none was chosen on."""
    claim = "Context is put over sound in the encoder, not in the decoder"
    chosen = [best(run, stack) for stack in ("encoder", "decoder")]
    encoder, decoder = chosen
    if encoder is None or decoder is None:
        return not_measured(
            claim, "not both stacks were patched in clips that are misheard", "rate"
        )
    both = [held_out(run, one).set_index("clip") for one in (encoder, decoder)]
    gap = (both[0].restored - both[1].restored).dropna().reset_index()
    if gap.empty:
        return not_measured(claim, "no clip is left to judge it on", "rate")
    who = gap.assign(speaker=both[0].speaker.loc[gap["clip"]].to_numpy())
    found = run.draws.row(gap.restored, run.config.clusters(who))
    if found["high"] < 0:
        claim = "Context is put over sound in the decoder, not in the encoder"
    rates = [float(one.restored.mean()) for one in both]
    return judged(
        claim,
        f"Noise in {named(encoder)} restores {rates[0]:.2f} of the clips that it was not chosen "
        f"on, noise in {named(decoder)} {rates[1]:.2f}: {shown(found)} apart",
        {
            **few(found["n_clusters"], run.config.resampled),
            "the interval of the difference includes 0": bool(found["low"] <= 0 <= found["high"]),
            "the better one does not restore half of the clips": max(rates) < 0.5,
        },
        numbers=found,
        unit="rate",
    )


CLAIMS = (
    Claim(name="encoder_component", rests_on=PATCHED, judge=partial(_restores, stack="encoder")),
    Claim(name="decoder_component", rests_on=PATCHED, judge=partial(_restores, stack="decoder")),
    Claim(name="encoder_not_decoder", rests_on=PATCHED, judge=_which_stack),
)
