"""The controls of ``grounding``: what must come out if its measurements are right.

Source: the invariants I3 to I8; M-GC.
"""

import pandas as pd

from ..materials.conflict_claims import as_whole_runs, shares_add_up
from ..materials.conflict_runs import INPUTS
from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from ..workbench.results import having
from .settings import ALL
from .tables import GroundingResults


def _effects(run: GroundingResults, beyond: str | None = None, **cells: object) -> pd.Series:
    """Both inputs' effects in some cells, of those that were exchanged.

    With a name of another measure, what they are beyond it.
    """
    found = having(run["grounding"], **cells)
    parts = [
        found[f"effect_{name}"] - (0 if beyond is None else found[f"{beyond}_{name}"])
        for name in INPUTS
    ]
    return pd.concat(parts).dropna()


def _whole_exchange(run: GroundingResults) -> Outcome:
    """Of items whose runs are equally long, so that all positions are the whole of the other."""
    known = having(run["items"], equal_lengths=True).set_index("pair")
    cells = having(run["grounding"], span=ALL, pair=[*known.index])
    off = [cells[f"effect_{one}"] - known.loc[cells.pair, f"te_{one}"].array for one in INPUTS]
    return at_most(pd.concat(off).dropna(), ROUNDING["logit"][run.config.dtype], "logits")


def _before_the_instruction(run: GroundingResults) -> Outcome:
    spans = ("audio",) if run.inputs["audio_is_first"] else ()
    return as_whole_runs(run, having(run["grounding"], span=spans).effect_text.dropna())


def _shares(run: GroundingResults) -> Outcome:
    cells = pd.concat([run["grounding"], run["nodes"]])
    cells = cells if run.config.gc_form == "share" else cells.iloc[:0]
    return shares_add_up(cells, "gc", run.config.min_effect)


CONTROLS = (
    *label_controls("runs", "grounding", "nodes"),
    Control(name="a run patched with itself", of=("grounding", "nodes"),
            check=lambda run: as_whole_runs(run, run["unpatched"]["shift"]),
            guards_against="a donor taken at another place than where it is written (I3)"),
    Control(name="all positions exchanged, at any depth = the other run", of=("grounding", "runs"),
            check=_whole_exchange,
            guards_against="spans that leave positions out, or a donor of another run (I4, I8)"),
    Control(name="last depth, any span without the readout", of=("grounding",),
            check=lambda run: as_whole_runs(
                run, _effects(run, depth=run.n_blocks, span=("audio", "text", "struct"))),
            guards_against="an answer that is read at another position than the readout (I6)"),
    Control(name="last depth, readout exchanged = the other run", of=("grounding",),
            check=lambda run: as_whole_runs(
                run, _effects(run, "te", depth=run.n_blocks, span="readout")),
            guards_against="a donor state that the final norm or another block has changed (I5)"),
    Control(name="audio span, other instruction, audio first", of=("grounding",),
            check=_before_the_instruction,
            guards_against="text information that leaks into the audio span (I7)"),
    Control(name="the shares of audio and text add up to 1", of=("grounding", "nodes"),
            check=_shares,
            guards_against="a coefficient that is not made of its row's effects"),
)  # fmt: skip
