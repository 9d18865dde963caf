"""Arrays of an item inside its shard, and the maps over all items that are made of them.

Source: cards M-002-7 and M-002-8.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..workbench.run_folder import RunFolder
from .settings import PrefixComparisonConfig
from .tokens import ANCHOR_WINDOW, Tokens, anchor_of, binned, window

METRICS = ("delta", "js")
"""What a map shows, in the order of its first axis."""


def pack(values: np.ndarray) -> dict[str, Any]:
    """An array as JSON: its bytes in base64, which are smaller than digits, and exact."""
    plain = np.ascontiguousarray(values)
    data = base64.b64encode(plain.tobytes()).decode()
    return {"dtype": plain.dtype.str, "shape": list(plain.shape), "data": data}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """What ``pack`` was given."""
    flat = np.frombuffer(base64.b64decode(packed["data"]), dtype=packed["dtype"])
    return flat.reshape(packed["shape"]).copy()


def divided(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Quotients; NaN where nothing was counted."""
    out = np.full(total.shape, np.nan, total.dtype)
    return np.divide(total, count, out=out, where=count > 0)


@dataclass
class NanMean:
    """Mean of maps that leave cells open; every map has the same weight."""

    total: np.ndarray = field(default_factory=lambda: np.zeros(()))
    count: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def add(self, values: Float[np.ndarray, "*map"]) -> None:
        """Takes one map in."""
        is_known = np.isfinite(values)
        self.total = self.total + np.where(is_known, values, 0)
        self.count = self.count + is_known

    def mean(self) -> Float[np.ndarray, "*map"]:
        """NaN where no map has a value."""
        return divided(self.total, self.count)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one item's shard holds beside its tables."""

    item: str
    quadrant: str
    tokens: Tokens
    maps: Float[np.ndarray, "metric depth token"]
    """ΔNLL and JS of a against b on the semantic tokens."""
    heads: Float[np.ndarray, "layer head"]
    nll: Float[np.ndarray, "run depth any_token"]


def shards(folder: RunFolder, items: pd.DataFrame) -> Iterator[Shard]:
    """One item after the other, so that no more than one is held."""
    for item, quadrant in zip(items.item, items.quadrant, strict=True):
        record = folder.read_unit(f"{item}__as_run")["record"]
        tokens = Tokens(**{name: of for name, of in record["tokens"].items() if name != "ids"})
        nll = unpack(record["nll"])
        maps = np.stack([nll[0] - nll[1], unpack(record["js"])[0]])
        yield Shard(
            item=item,
            quadrant=quadrant,
            tokens=tokens,
            maps=maps[..., tokens.semantic].astype(np.float64),
            heads=unpack(record["heads"]),
            nll=nll,
        )


@dataclass
class Maps:
    """Maps of depth by aligned token, over all items and by quadrant."""

    found: dict[tuple[str, str], NanMean] = field(default_factory=dict)
    """By alignment, and quadrant or ``all``."""
    heads: NanMean = field(default_factory=NanMean)
    most: int = 0
    """Semantic tokens of the longest item."""
    anchored: dict[str, int] = field(default_factory=dict)
    """Items that have each anchor."""

    def add(self, shard: Shard, config: PrefixComparisonConfig) -> None:
        """Takes one item in."""
        self.heads.add(shard.heads.astype(np.float64))
        self.most = max(self.most, len(shard.tokens.semantic))
        found = {("first", "all"): window(shard.maps, 0, config.first_k)}
        for group in ("all", shard.quadrant):
            found["progress", group] = binned(shard.maps, config.n_bins)
        for name in config.anchors:
            at = anchor_of(shard.tokens, name)
            self.anchored[name] = self.anchored.get(name, 0) + (at is not None)
            if at is not None:
                found[name, "all"] = window(shard.maps, *(at + end for end in ANCHOR_WINDOW))
        for key, values in found.items():
            self.found.setdefault(key, NanMean()).add(values)
