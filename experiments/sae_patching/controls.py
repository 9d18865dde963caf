"""The controls of ``sae_patching``: what must come out if its edits are what they claim to be."""

import json

import pandas as pd

from ..workbench.controls import ROUNDING, Control, Outcome, at_most, label_controls
from .tables import ExchangeResults


def _of(run: ExchangeResults, family: str) -> pd.DataFrame:
    edits = run["edits"]
    return edits[edits.family == family]


def _rows_stay(run: ExchangeResults) -> Outcome:
    return at_most(_of(run, "none").moved, 0.0)


def _answer_stays(run: ExchangeResults) -> Outcome:
    allowed = 0.0 if run.config.engine == "hooks" else ROUNDING["logit"][run.config.dtype]
    return at_most(_of(run, "none")["shift"], allowed, "logits")


def _own_error(run: ExchangeResults) -> Outcome:
    return at_most(run["exchanges"].error_change, ROUNDING["relative"]["float32"], "of the rows")


def _as_far(run: ExchangeResults) -> Outcome:
    cells = ["pair", "n_latents", "alpha"]
    moved = run["edits"].pivot(index=cells, columns="family", values="moved")
    moved = moved[moved.chosen > 0]
    off = pd.concat([moved[one] / moved.chosen - 1 for one in ("push", "random")]).dropna()
    return at_most(off, ROUNDING["relative"]["float32"], "of the distance")


def _other_clips(run: ExchangeResults) -> Outcome:
    known, rows = run.inputs["groups"], run["exchanges"]
    own = [
        {known[one] for one in pair if one}
        for pair in zip(rows["clip"], rows.donor_clip, strict=True)
    ]
    out = map(json.loads, rows.without)
    return at_most([len(a - {*b}) for a, b in zip(own, out, strict=True)], 0.0, "groups")


CONTROLS = (
    *label_controls("runs", "edits"),
    Control(name="no latent exchanged: rows stay, bit by bit", of=("edits",), check=_rows_stay,
            guards_against="an edit that puts reconstructions where it should leave rows alone"),
    Control(name="no latent exchanged: the answer stays", of=("edits",), check=_answer_stays,
            guards_against="rows that are written at other places than they were read"),
    Control(name="all features exchanged: the row's own error is left", of=("edits",),
            check=_own_error,
            guards_against="an exchange that drops what the dictionary does not reconstruct"),
    Control(name="pushes move rows as far as the chosen latents", of=("edits",), check=_as_far,
            guards_against="a comparison of pushes of different size"),
    Control(name="latents are chosen on other groups", of=("edits",), check=_other_clips,
            guards_against="latents that are tested on the clips that they were chosen on"),
)  # fmt: skip
