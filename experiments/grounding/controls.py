"""The controls of ``grounding``: what must come out if its measurements are right.

Source: the invariants I3 to I8; M-GC.
"""

import pandas as pd

from hooked_alm.methods.statistics.grounding import grounding_coefficient

from ..materials.conflict_claims import as_whole_runs
from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from ..workbench.results import having
from .plan import INPUTS
from .settings import ALL
from .tables import GroundingResults, items


def _effects(cells: pd.DataFrame, beyond: str | None = None) -> pd.Series:
    """Both inputs' effects, of those that were exchanged, or what they are beyond a column."""
    parts = [
        cells[f"effect_{name}"] - (0 if beyond is None else cells[f"{beyond}_{name}"])
        for name in INPUTS
    ]
    return pd.concat(parts).dropna()


def _own_run(run: GroundingResults) -> Outcome:
    return as_whole_runs(run, run["unpatched"]["shift"])


def _whole_exchange(run: GroundingResults) -> Outcome:
    known = having(items(run), equal_lengths=True)[["pair", *(f"te_{name}" for name in INPUTS)]]
    cells = having(run["grounding"], span=ALL).merge(known, on="pair", suffixes=("_cell", ""))
    return at_most(_effects(cells, "te"), ROUNDING["logit"][run.config.dtype], "logits")


def _blind(run: GroundingResults) -> Outcome:
    cells = having(run["grounding"], depth=run.n_blocks, span=("audio", "text", "struct"))
    return as_whole_runs(run, _effects(cells))


def _readout_at_the_end(run: GroundingResults) -> Outcome:
    cells = having(run["grounding"], depth=run.n_blocks, span="readout")
    return as_whole_runs(run, _effects(cells, "te"))


def _before_the_instruction(run: GroundingResults) -> Outcome:
    spans = ("audio",) if run.inputs["audio_is_first"] else ()
    return as_whole_runs(run, having(run["grounding"], span=spans).effect_text.dropna())


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
