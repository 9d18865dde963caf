"""What is measured: clips as they are, then clips without some heads that the gradient chose."""

from dataclasses import dataclass
from itertools import product
from typing import Literal, cast, get_args

import numpy as np
import pandas as pd

from hooked_alm.methods.attribution.head_gates import HeadKind

from ..materials.clips import ClipFile
from ..materials.kept_features import FeatureFiles
from .settings import AsrComponentsConfig, HeadScope

Failure = Literal["loop", "hallucination"]
"""A transcript that goes in circles; words where nothing is said."""
FAILURES: tuple[Failure, ...] = get_args(Failure)
ALL = -1
"""In place of a block: all of them."""


@dataclass(frozen=True)
class HeadNode:
    """A head that is left out, of one block or of all."""

    kind: HeadKind
    layer: int
    head: int

    @property
    def scope(self) -> HeadScope:
        """What is left out at once."""
        return "all_blocks" if self.layer == ALL else "cell"

    @property
    def name(self) -> str:
        """As results name it: ``cross L2H3``, ``self head 1 in all blocks``."""
        where = (
            f"head {self.head} in all blocks" if self.layer == ALL else f"L{self.layer}H{self.head}"
        )
        return f"{self.kind} {where}"


@dataclass(frozen=True)
class AsIs:
    """Clips written down with all heads, and the screen of those that fail."""

    clips: tuple[ClipFile, ...]


@dataclass(frozen=True)
class WithoutHead:
    """Clips written down without a head."""

    node: HeadNode
    clips: tuple[ClipFile, ...]
    why: str
    """The failures that it was chosen for, or ``random``."""
    means: FeatureFiles
    """Where every clip's mean outputs of heads are; empty where zeros take their place."""


def nodes_of(screen: pd.DataFrame, kind: str, scope: HeadScope) -> pd.DataFrame:
    """Heads of a kind and scope, with mean effect and norm over the clips that were screened."""
    some = screen[screen.kind == kind]
    means = some.groupby(["layer", "head"], sort=True)[["effect", "norm"]].mean().reset_index()
    if scope == "cell":
        return means
    every = means.groupby("head", sort=True)[["effect", "norm"]].sum().reset_index()
    return every.assign(layer=ALL)


def chosen_nodes(screen: pd.DataFrame, config: AsrComponentsConfig) -> dict[HeadNode, list[str]]:
    """Heads to leave out -> why: for which failure, or as one of the random ones.

    Closing a head that a failure needs makes its words less likely: the lowest effects first. The
    random ones are those of the others whose norms are nearest to the first one's.
    """
    found: dict[HeadNode, list[str]] = {}
    rng = np.random.default_rng(config.seed)
    for failure in FAILURES:
        mine = screen[screen.of == failure]
        for kind, scope in product(config.kinds, config.scopes):
            table = nodes_of(mine, kind, scope).sort_values("effect", kind="stable")
            first = table[: config.n_exact]
            for node in _heads(first, kind):
                found.setdefault(node, []).append(failure)
            others = table[config.n_exact :]
            if first.empty or others.empty:
                continue
            apart = (others.norm - first.norm.iloc[0]).abs() + 1e-9 * rng.random(len(others))
            near = others.loc[apart.sort_values(kind="stable").index[: config.n_random]]
            for node in _heads(near, kind):
                if "random" not in found.setdefault(node, []):
                    found[node].append("random")
    return found


def _heads(table: pd.DataFrame, kind: HeadKind) -> list[HeadNode]:
    return [
        HeadNode(kind, int(cast(int, row.layer)), int(cast(int, row.head)))
        for row in table.itertuples()
    ]
