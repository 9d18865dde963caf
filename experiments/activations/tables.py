"""Tables and controls of an ``activations`` run."""

from collections.abc import Iterator

import pandas as pd

from ..workbench.controls import Control, Outcome, at_most
from ..workbench.results import Results
from .settings import ActivationsConfig

StoredResults = Results[ActivationsConfig]
TABLES = {
    "shards": "a shard of a store: its rows, bytes and hashes",
    "clips": "a clip's rows of one kind, at one span",
}


def _as_planned(run: StoredResults) -> Outcome:
    shards = run["shards"]
    return at_most(shards["rows"] - shards["planned"], 0.0, "rows")


def _every_clip(run: StoredResults) -> Outcome:
    clips = run["clips"]
    found = clips.groupby(["kind", "clip"])["rows"].sum()
    expected = clips["kind"].nunique() * len(run.inputs["clips"])
    empty = int((found == 0).sum()) + expected - len(found)
    return Outcome(f"{empty} clips without rows", "none", empty == 0)


CONTROLS = (
    Control(name="rows are as many as were told", of=("shards", "clips"), check=_as_planned,
            guards_against="spans that were counted otherwise than they were kept"),
    Control(name="every clip has rows", of=("clips",), check=_every_clip,
            guards_against="spans that some prompts lack, and an index that loses clips"),
)  # fmt: skip


def summarise(run: StoredResults) -> Iterator[tuple[str, pd.DataFrame]]:
    """Size of each store, and its rows by span and by every label with few values."""
    shards = run["shards"]
    stores = shards.groupby("kind", sort=False)[["rows", "bytes"]].sum().reset_index()
    stores["points"] = [len(run.inputs["points"][kind]) for kind in stores["kind"]]
    stores["dtype"], stores["folder"] = run.config.kept_dtype, "activations/" + stores["kind"]
    yield "stores", stores
    yield "spans", run["clips"].groupby(["kind", "span"], sort=False)["rows"].sum().reset_index()
    yield "labels", label_table(run)


def label_table(run: StoredResults) -> pd.DataFrame:
    """Clips and rows by kind, column of the clips' table, and its value."""
    per_clip = run["clips"].groupby(["kind", "clip"], sort=False)["rows"].sum().reset_index()
    parts = []
    for column, texts in run.inputs["labels"].items():
        value = per_clip["clip"].map(dict(zip(run.inputs["clips"], texts, strict=True)))
        counted = per_clip.assign(value=value).groupby(["kind", "value"], sort=True)["rows"]
        found = counted.agg(["size", "sum"]).reset_index()
        found.insert(1, "column", column)
        parts.append(found.rename(columns={"size": "clips", "sum": "rows"}))
    columns = ["kind", "column", "value", "clips", "rows"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
