"""The controls of ``grounding``: what must come out if its measurements are right.

Source: the invariants I3 to I8; M-GC.
"""

import pandas as pd

from hooked_alm.methods.statistics.grounding import grounding_coefficient

from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from .plan import INPUTS
from .settings import ALL
from .tables import GroundingResults, items


def _patch_rounding(run: GroundingResults) -> float:
    """Between a patched run and the whole run that it must equal."""
    return 0.0 if run.config.engine == "hooks" else ROUNDING["logit"][run.config.dtype]


def _effects(cells: pd.DataFrame) -> pd.Series:
    """Both inputs' effects, of those that were exchanged."""
    return pd.concat([cells[f"effect_{name}"] for name in INPUTS]).dropna()


def _own_run(run: GroundingResults) -> Outcome:
    return at_most(run["unpatched"]["shift"], _patch_rounding(run), "logits")


def _whole_exchange(run: GroundingResults) -> Outcome:
    known = items(run)
    known = known[known.equal_lengths.astype(bool)][["pair", *(f"te_{name}" for name in INPUTS)]]
    cells = run["grounding"]
    both = cells[cells.span == ALL].merge(known, on="pair", suffixes=("_cell", ""))
    off = pd.concat([both[f"effect_{name}"] - both[f"te_{name}"] for name in INPUTS]).dropna()
    return at_most(off, ROUNDING["logit"][run.config.dtype], "logits")


def _last_depth(run: GroundingResults, *spans: str) -> pd.DataFrame:
    cells = run["grounding"]
    return cells[(cells.depth == run.n_blocks) & cells.span.isin(spans)]


def _blind(run: GroundingResults) -> Outcome:
    cells = _last_depth(run, "audio", "text", "struct")
    return at_most(_effects(cells), _patch_rounding(run), "logits")


def _readout_at_the_end(run: GroundingResults) -> Outcome:
    cells = _last_depth(run, "readout")
    off = pd.concat([cells[f"effect_{name}"] - cells[f"te_{name}"] for name in INPUTS]).dropna()
    return at_most(off, _patch_rounding(run), "logits")


def _before_the_instruction(run: GroundingResults) -> Outcome:
    cells = run["grounding"]
    cells = cells[(cells.span == "audio") & bool(run.inputs["audio_is_first"])]
    return at_most(cells.effect_text.dropna(), _patch_rounding(run), "logits")


def _shares(run: GroundingResults) -> Outcome:
    cells = pd.concat([run["grounding"], run["nodes"]])
    cells = cells[cells.gc.notna()] if run.config.gc_form == "share" else cells.iloc[:0]
    of_text = grounding_coefficient(
        cells.effect_text.to_numpy(float), cells.effect_audio.to_numpy(float),
        min_effect=run.config.min_effect,
    )  # fmt: skip
    return at_most(cells.gc + of_text - 1, 1e-9)


CONTROLS = (
    *label_controls("runs", "grounding", "nodes"),
    Control(name="a run patched with itself", of=("grounding", "nodes"), check=_own_run,
            guards_against="a donor taken at another place than where it is written (I3)"),
    Control(name="all positions exchanged, at any depth = the other run", of=("grounding", "runs"),
            check=_whole_exchange,
            guards_against="spans that leave positions out, or a donor of another run (I4, I8)"),
    Control(name="last depth, any span without the readout", of=("grounding",), check=_blind,
            guards_against="an answer that is read at another position than the readout (I6)"),
    Control(name="last depth, readout exchanged = the other run", of=("grounding",),
            check=_readout_at_the_end,
            guards_against="a donor state that the final norm or another block has changed (I5)"),
    Control(name="audio span, other instruction, audio first", of=("grounding",),
            check=_before_the_instruction,
            guards_against="text information that leaks into the audio span (I7)"),
    Control(name="the shares of audio and text add up to 1", of=("grounding", "nodes"),
            check=_shares,
            guards_against="a coefficient that is not made of its row's effects"),
)  # fmt: skip
