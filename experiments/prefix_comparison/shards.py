"""Arrays of an item inside its shard, and the maps over all items that are made of them.

Source: cards M-002-7 and M-002-8.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from ..workbench.run_folder import RunFolder
from .settings import PrefixComparisonConfig
from .tokens import Tokens, anchor_of, around, binned, first_tokens

METRICS = ("delta", "js")


def pack(values: np.ndarray) -> dict[str, Any]:
    """An array as JSON: its bytes in base64, which are smaller than digits, and exact."""
    plain = np.ascontiguousarray(values)
    data = base64.b64encode(plain.tobytes()).decode()
    return {"dtype": plain.dtype.str, "shape": list(plain.shape), "data": data}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """What ``pack`` was given."""
    flat = np.frombuffer(base64.b64decode(packed["data"]), dtype=packed["dtype"])
    return flat.reshape(packed["shape"]).copy()


@dataclass
class NanMean:
    """Mean of maps that leave cells open; every map has the same weight."""

    total: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def add(self, values: Float[np.ndarray, "depth column"]) -> None:
        """Take one map in."""
        is_known: Bool[np.ndarray, "depth column"] = np.isfinite(values)
        self.total = self.total + np.where(is_known, values, 0)
        self.count = self.count + is_known

    def mean(self) -> Float[np.ndarray, "depth column"]:
        """NaN where no map has a value."""
        out = np.full(self.total.shape, np.nan)
        return np.divide(self.total, self.count, out=out, where=self.count > 0)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one item's shard holds beside its tables."""

    item: str
    quadrant: str
    tokens: Tokens
    delta: Float[np.ndarray, "depth token"]
    js: Float[np.ndarray, "depth token"]
    heads: Float[np.ndarray, "layer head"]
    nll: Float[np.ndarray, "run depth any_token"]
    runs: list[str]


def shards(folder: RunFolder, items: pd.DataFrame) -> Iterator[Shard]:
    """One item after the other, so that no more than one is held."""
    for item, quadrant in zip(items.item, items.quadrant, strict=True):
        record = folder.read_unit(f"{item}__as_run")["record"]
        parts = record["tokens"]
        tokens = Tokens(**{name: parts[name] for name in parts if name != "ids"})
        semantic = tokens.semantic
        nll, js = unpack(record["nll"]), unpack(record["js"])
        yield Shard(
            item=item,
            quadrant=quadrant,
            tokens=tokens,
            delta=(nll[0] - nll[1])[:, semantic].astype(np.float64),
            js=js[0][:, semantic].astype(np.float64),
            heads=unpack(record["heads"]),
            nll=nll,
            runs=record["runs"],
        )


MapKey = tuple[str, str, str]
"""Alignment, metric, and quadrant or ``all``."""


@dataclass
class Maps:
    """Maps of depth by aligned token, over all items and by quadrant."""

    found: dict[MapKey, NanMean] = field(default_factory=dict)
    heads: NanMean = field(default_factory=NanMean)
    most: int = 0
    """Semantic tokens of the longest item."""
    anchored: dict[str, int] = field(default_factory=dict)
    """Items that have each anchor."""

    def add(self, shard: Shard, config: PrefixComparisonConfig) -> None:
        """Take one item in."""
        self.heads.add(shard.heads.astype(np.float64))
        self.most = max(self.most, len(shard.tokens.semantic))
        for metric in METRICS:
            values = getattr(shard, metric)
            for group in ("all", shard.quadrant):
                self._add(("progress", metric, group), binned(values, config.n_bins))
            self._add(("first", metric, "all"), first_tokens(values, config.first_k))
        for anchor in config.anchors:
            at = anchor_of(shard.tokens, anchor)
            self.anchored[anchor] = self.anchored.get(anchor, 0) + (at is not None)
            if at is not None:
                for metric in METRICS:
                    self._add((anchor, metric, "all"), around(getattr(shard, metric), at))

    def _add(self, key: MapKey, values: np.ndarray) -> None:
        self.found.setdefault(key, NanMean()).add(values)
