"""The tables of a ``sae_patching`` run, and what is averaged over their exchanges."""

from collections.abc import Iterator

import pandas as pd

from ..materials.clips import SOUNDS
from ..materials.kept_features import FEATURES
from ..workbench.intervals import Draws
from ..workbench.results import Results
from .settings import SAEPatchingConfig

ExchangeResults = Results[SAEPatchingConfig]
TABLES = {
    "runs": "a forward: a clip under an instruction, in its role in an exchange, and the answer",
    "edits": "an exchange by one edit of the clip's rows: the answer, and how far either moves",
    "exchanges": "a clip whose features are exchanged: n_latents of either label, chosen on others",
    **FEATURES,
    **SOUNDS,
}
EDIT = ["family", "n_latents", "alpha"]
MEASURES = ("flipped", "stayed", "shift", "recovery", "moved", "label_mass")
BESIDE = {
    "matched": "as many others that are as active",
    "scaled": "these others, scaled to move rows as far",
    "frequent": "as many that are most often active",
    "random": "a push as far in a random direction",
    "push": "the same push without a dictionary",
}
"""Families that stand beside the chosen latents, in words."""


def summarise(run: ExchangeResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Every summary but the clips', by the name of its file."""
    edits, draws = run["edits"], run.draws
    whole = edits[edits.family == "rows"].set_index("pair")["shift"]
    whole = edits.pair.map(whole.where(whole.abs() >= run.config.min_effect))
    edits = edits.assign(recovery=edits["shift"] / whole)
    parts = [part for _, part in edits.groupby("condition", sort=False)]
    for name, make in (("edit_means", _edit_means), ("compared", _compared)):
        found = [table for part in parts for table in make(part, draws)]
        yield name, pd.concat(found, ignore_index=True)


def _edit_means(edits: pd.DataFrame, draws: Draws) -> Iterator[pd.DataFrame]:
    """Means of every edit under a condition, over exchanges that have the measure.

    A row per edit and ``measure``. ``flipped``: the share of answers that become the other label's,
    of those that were another; ``stayed``: that stay, of those that are not the voice's; ``shift``:
    how far the logit of that label moves against the voice's; ``recovery``: the part of what whole
    rows move it by, where that is ``min_effect`` or more; ``moved``: how far rows move;
    ``label_mass``: the probability of all labels. ``activity`` is that of the edit's latents.
    """
    activity = edits.groupby(EDIT)["activity"].mean()
    for measure in MEASURES:
        wide = _by_edit(edits, measure)
        yield _points(wide, draws, edits, measure=measure, activity=activity.reindex(wide.columns))


def _compared(edits: pd.DataFrame, draws: Draws) -> Iterator[pd.DataFrame]:
    """How much more often the chosen latents flip the answer than what stands beside them.

    A row per number of latents and family, of strength 1, exchange by exchange.
    """
    wide = _by_edit(edits[edits.alpha == 1], "flipped").droplevel("alpha", axis=1)
    for family in BESIDE:
        yield _points(wide["chosen"] - wide[family], draws, edits, family=family)


def _by_edit(edits: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A measure of every exchange, by edit; edits in the order in which they were made."""
    wide = edits.pivot(index=["pair", "clip"], columns=EDIT, values=measure)
    return wide.reindex(columns=pd.MultiIndex.from_frame(edits[EDIT].drop_duplicates()))


def _points(wide: pd.DataFrame, draws: Draws, edits: pd.DataFrame, **about: object) -> pd.DataFrame:
    """A row per column, with its interval over clips."""
    given = {name: getattr(value, "array", value) for name, value in about.items()}
    return draws.columns(wide, about={"condition": edits.condition.iloc[0], **given})
