"""The page of an ``activations`` run: what is stored, and what it may be used for."""

from collections.abc import Mapping

import pandas as pd

from hooked_alm.display import amount
from hooked_alm.methods.activations.selection import width_of
from hooked_alm.methods.activations.store import StoreCard

from ..workbench.page import Page
from .tables import StoredResults

ROWS_ARE = {
    "prompt": "positions of a prompt",
    "encoder": "frames of the audio encoder that hear the clip, 50 a second",
}
CAVEATS = (
    "Neighbours are alike: frames of a clip, clips of a speaker and sentences in several voices "
    "are no independent rows. Split by speaker (ActivationReader.split), and judge on groups that "
    "nothing was learnt from.",
    "What can be read from a row need not be used by the model: a probe or a dictionary shows what "
    "is there, patching what it does.",
    "A row holds what its prompt and batch made of it: positions behind the clip also depend on "
    "the instruction, and in low precision on what else was in the batch.",
    "Recordings that may not be passed on may be recognisable in these rows as well.",
)


def lead(run: StoredResults) -> str:
    """What is stored, and where."""
    stores = run["stores"]
    parts = [
        f"{row.rows:,} {ROWS_ARE[row.kind]}, {amount(row.bytes)}, in {row.folder}"
        for row in stores.itertuples()
    ]
    n = len(run.inputs["clips"])
    return (
        f"The run stored activations of {n} clips: {'; '.join(parts)}.\n\n"
        "ActivationReader of hooked_alm reads them, shuffled and split by group."
    )


def fill_page(page: Page, run: StoredResults, cards: Mapping[str, StoreCard]) -> None:
    """Sizes, points and counts."""
    page.section("What is stored")
    page.table("Stores", "stores")
    points = [
        {"kind": kind, "point": name, "shape of a row": " × ".join(map(str, shape)),
         "width": width_of(shape), "dtype": card.contents.dtype}
        for kind, card in cards.items()
        for name, shape in card.contents.points.items()
    ]  # fmt: skip
    page.table("Points", pd.DataFrame(points))
    page.table("Rows by span", "spans")
    if len(run["labels"]):
        page.table("Clips and rows by what the table of clips says", "labels")
    page.note(
        "Before a probe learns a label, look at these counts: values that differ in their number "
        "of rows, or in who speaks them, can be told apart by that alone."
    )


def method(run: StoredResults) -> str:
    """How clips were run."""
    config = run.config
    under = "without an instruction" if config.prompt is None else f"under {config.prompt!r}"
    return (
        f"Model: {config.model}, {config.dtype}. Clips ran {under}, {config.batch_size} at once, "
        f"left-padded; the spans {', '.join(config.spans)} were kept in {config.kept_dtype}. Rows "
        "are those that run_with_cache of the same batch has."
    )
