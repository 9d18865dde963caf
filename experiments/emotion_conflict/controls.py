"""The controls of ``emotion_conflict``: what must come out if its measurements are right.

Source: the invariants I2 to I7 and I9; M-000-9, M-000-12.
"""

import pandas as pd

from ..materials.conflict_claims import as_whole_runs
from ..workbench.claims import MIN_ITEMS
from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from .tables import EmotionResults


def _lens_end(run: EmotionResults) -> Outcome:
    depths, labels = run["depths"], [f"z_{name}" for name in run.inputs["labels"]]
    last = depths[depths.depth == run.n_blocks].set_index("unit")[labels]
    real = run["runs"].set_index("unit")[labels].loc[last.index]
    return at_most(last - real, ROUNDING["logit"][run.config.dtype], "logits")


def _own_run(run: EmotionResults) -> Outcome:
    patching = run["patching"]
    return as_whole_runs(run, patching[patching.donor == "self"]["shift"])


def _last_block(run: EmotionResults, *, with_readout: bool) -> pd.DataFrame:
    """Patches of the last block, by whether the readout is among what is patched."""
    patching, spans = run["patching"], run.config.patched_spans()
    chosen = [name for name, parts in spans.items() if ("readout" in parts) == with_readout]
    return patching[(patching.block == run.n_blocks - 1) & patching.span.isin(chosen)]


def _blind(run: EmotionResults) -> Outcome:
    return as_whole_runs(run, _last_block(run, with_readout=False)["shift"])


def _readout_at_the_end(run: EmotionResults) -> Outcome:
    cells = _last_block(run, with_readout=True)
    return as_whole_runs(run, cells["shift"] - cells.total_effect)


def _before_the_instruction(run: EmotionResults) -> Outcome:
    patching, is_speech = run["patching"], run.config.patched_spans()["audio"] == ("audio",)
    is_first = is_speech and run.inputs["audio_is_first"]
    cells = patching[(patching.donor == "text_swap") & (patching.span == "audio") & is_first]
    return as_whole_runs(run, cells["shift"])


def _all_positions(run: EmotionResults) -> Outcome:
    patching = run["patching"]
    cells = patching[(patching.span == "all") & patching.recovery.notna()]
    cells = cells[_has_equal_lengths(cells, run["runs"])]
    allowed = ROUNDING["logit"][run.config.dtype]
    return at_most(cells["shift"] - cells.total_effect, allowed, "logits")


def _has_equal_lengths(cells: pd.DataFrame, runs: pd.DataFrame) -> "pd.Series[bool]":
    """Whether base and donor are equally long, clip and instruction each."""
    audio = runs.groupby("clip").n_audio_tokens.first()
    template = runs[runs.condition.isin(["conflict", "consistent"])]
    words = template.n_tokens - template.n_audio_tokens
    words = words.groupby([template.prompt_language, template.named]).first()

    def text(named: str) -> "pd.Series[float]":
        keys = pd.MultiIndex.from_frame(cells[["prompt_language", named]])
        return pd.Series(words.reindex(keys).to_numpy(), cells.index)

    same_audio = cells["clip"].map(audio) == cells["donor_clip"].map(audio)
    return same_audio & (text("named") == text("donor_named"))


def _random_donor(run: EmotionResults) -> Outcome:
    """A donor that neither names nor speaks A should bring A less often than one that does.

    It may bring it sometimes: whatever disturbs the instruction leaves the voice.
    """
    patching, expected = run["patching"], "less often than the text-swap donor"
    start = patching[(patching.base < 0) & patching.donor.isin(["random_other", "text_swap"])]
    start = start.assign(hit=start.prediction == start.toward)
    counts = start.groupby(["donor", "block", "span"]).hit.agg(["sum", "size"])
    most = counts.groupby("donor").max().reindex(["random_other", "text_swap"], fill_value=0)
    if most["size"].min() < MIN_ITEMS:
        return Outcome("too few such items", expected, None)
    (k, n), (k_text, n_text) = most.astype(int).to_numpy().tolist()
    found = f"at most {k} of {n} in any cell, the text-swap donor {k_text} of {n_text}"
    return Outcome(found, expected, k / n < k_text / n_text)


def _mass_sum(run: EmotionResults) -> Outcome:
    sums = run["attention"].groupby(["unit", "layer"]).mass.sum()
    return at_most(sums - 1, ROUNDING["share"][run.config.dtype])


CONTROLS = (
    *label_controls("runs"),
    Control(name="lens at the last depth = logits", of=("depths", "delta"), check=_lens_end,
            guards_against="a lens with the final norm left out or applied twice (I2)"),
    Control(name="a run patched with itself", of=("patching",), check=_own_run,
            guards_against="a donor taken at another place than where it is written (I3)"),
    Control(name="last block, any span without the readout", of=("patching",), check=_blind,
            guards_against="an answer that is read at another position than the readout (I6)"),
    Control(name="audio span, other instruction, audio first", of=("patching",),
            check=_before_the_instruction,
            guards_against="text information that leaks into the audio span (I7)"),
    Control(name="all positions patched = the donor's answer", of=("patching",),
            check=_all_positions,
            guards_against="spans that leave positions out, or a donor of another run (I4)"),
    Control(name="last block, readout patched = the donor's answer", of=("patching",),
            check=_readout_at_the_end,
            guards_against="a donor state that the final norm or another block has changed (I5)"),
    Control(name="an unrelated donor does not bring the voice's label", of=("patching",),
            check=_random_donor,
            guards_against="any disturbance being taken for the donor's content"),
    Control(name="attention of the segments sums to 1", of=("attention",), check=_mass_sum,
            guards_against="positions that belong to no segment, or to two (I9)"),
)  # fmt: skip
