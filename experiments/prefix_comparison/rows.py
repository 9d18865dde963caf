"""Rows of a unit's tables, and its record, from what was measured on the runs of one item."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from hooked_alm.methods.reading.divergence import Divergence
from hooked_alm.methods.reading.segment_mass import Mass
from hooked_alm.methods.statistics.rank_correlation import partial_spearman, spearman

from ..workbench.results import Row
from .plan import PrefixRun, position_runs, positions_of
from .shards import divided, pack
from .tokens import Tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One item's runs, the first of them a and the second b, and what was found on them."""

    who: Mapping[str, str]
    """The item and its group."""
    runs: Sequence[PrefixRun]
    roles: Sequence[str]
    found: Divergence
    """Losses of every run, and divergences of every run but b from b."""
    tokens: Tokens
    masses: Sequence[Mass]
    segment: str
    """What a has and b has not."""
    given: Mapping[str, bool | None] | None
    """Condition -> whether it succeeded; None: a run is right if every token is the top one."""

    def tables(self) -> dict[str, list[Row]]:
        """The rows of every table."""
        runs = list(self._runs())
        tables = {
            "items": [self._item(*runs[:2])],
            "runs": runs,
            "curves": self._curves(),
            "classes": self._classes(),
            "mass": self._mass(),
            "coupling": self._coupling(),
        }
        return {name: [{**self.who, **row} for row in rows] for name, rows in tables.items()}

    def record(self) -> dict[str, Any]:
        """What maps are drawn from, and which tokens stood where."""
        ids = self.runs[0].targets[: len(self.tokens.texts)].tolist()
        mass = self.masses[0]
        return {
            "tokens": {"ids": ids, **asdict(self.tokens)},
            "spans": {run.name: run.x.spans.to_json() for run in self.runs},
            "position_ids": {run.name: position_runs(run.x) for run in self.runs},
            "nll": pack(self.found.nll.transpose(0, 1).cpu().numpy()),
            "js": pack(self.found.js.transpose(0, 1).cpu().numpy()),
            "heads": pack(mass.of_segment(mass.heads, self.segment)),
        }

    def _delta(self, run: int = 0) -> Float[Tensor, "depth token"]:
        """ΔNLL of a run against b."""
        return self.found.nll[:, run] - self.found.nll[:, 1]

    def _runs(self) -> Iterator[Row]:
        """Each prefix at the output: loss, divergence from b, attention, and whether it was right.

        ``right`` is NaN where nobody knows: a changed prefix whose outcome is not computed here.
        """
        nll, hit, semantic = self.found.nll[-1], self.found.hit[-1], self.tokens.semantic
        js = self.found.js[-1][:, semantic].mean(-1).tolist()
        js.insert(1, 0.0)  # b against itself
        for i, (run, mass) in enumerate(zip(self.runs, self.masses, strict=True)):
            is_exact = bool(hit[i].all())
            right = is_exact if self.given is None else self.given.get(run.name)
            yield {
                "run": run.name,
                "role": self.roles[i],
                "n_prefix": run.start,
                "n_segment": len(positions_of(run.x, self.segment)),
                "nll": float(nll[i, semantic].mean()),
                "delta": float(self._delta(i)[-1, semantic].mean()),
                "js": js[i],
                "nll_sum": float(nll[i].double().sum()),
                "mass": float(mass.of_segment(mass.mass, self.segment).mean()),
                "hit_share": float(hit[i, semantic].float().mean()),
                "exact": is_exact,
                "right": float("nan") if right is None else float(right),
            }

    def _item(self, a: Row, b: Row) -> Row:
        """Sizes, ΔNLL and outcome."""
        return {
            "n_prefix_a": a["n_prefix"],
            "n_prefix_b": b["n_prefix"],
            "n_tokens": len(self.tokens.texts),
            "n_semantic": len(self.tokens.semantic),
            "n_fragments": sum(self.tokens.is_fragment),
            "boundary_differs": self.runs[0].targets.tolist() != self.runs[1].targets.tolist(),
            "nll_a": a["nll"],
            "nll_b": b["nll"],
            "delta": a["delta"],
            "js": a["js"],
            "right_a": bool(a["right"]),
            "right_b": bool(b["right"]),
            "quadrant": f"G{int(a['right'])}{int(b['right'])}",
        }

    def _curves(self) -> Iterator[Row]:
        """Means over the semantic tokens, by depth, of every run but b."""
        found, nll = self.found, self.found.nll
        for pair, i in enumerate(i for i in range(len(self.runs)) if i != 1):
            about = {"run": self.runs[i].name, "depth": range(len(nll))}
            losses = {"nll": nll[:, i], "nll_b": nll[:, 1], "delta": self._delta(i)}
            apart = {name: getattr(found, name)[:, pair] for name in ("js", "kl", "kl_back")}
            yield from by_depth(about, self.tokens.semantic, **losses, **apart)

    def _classes(self) -> Iterator[Row]:
        """Means over the semantic tokens of each class, by depth."""
        found = self.found
        of_class: dict[str, list[int]] = {}
        for index in self.tokens.semantic:
            of_class.setdefault(self.tokens.classes[index], []).append(index)
        for name, own in of_class.items():
            about = {"class": name, "depth": range(len(found.nll)), "n": len(own)}
            yield from by_depth(about, own, delta=self._delta(), js=found.js[:, 0])

    def _mass(self) -> Iterator[Row]:
        """By layer: all segments of a and b, of other runs the one in question."""
        for i, (run, mass) in enumerate(zip(self.runs, self.masses, strict=True)):
            for j, segment in enumerate(mass.segments):
                if i < 2 or segment == self.segment:
                    yield from by_point(
                        {
                            "run": run.name,
                            "layer": range(len(mass.mass)),
                            "segment": segment,
                            "mass": mass.mass[..., j].mean(axis=1),
                            "density": _nanmean(mass.density[..., j]),
                            "without_sink": _nanmean(mass.without_sink[..., j]),
                        }
                    )

    def _coupling(self) -> Iterator[Row]:
        """Does the benefit of a token go with the attention that its prediction pays?"""
        semantic, mass = self.tokens.semantic, self.masses[0]
        delta = self._delta()[1:, semantic].cpu().numpy().astype(np.float64)
        read = mass.of_segment(mass.mass, self.segment).astype(np.float64)
        classes = [self.tokens.classes[index] for index in semantic]
        for layer, (x, y) in enumerate(zip(read, delta, strict=True)):
            rho, partial = spearman(x, y), partial_spearman(x, y, classes)
            yield {"layer": layer, "n": len(x), "rho": rho, "partial": partial}


def by_point(columns: Mapping[str, Any]) -> list[Row]:
    """A row per depth or layer; columns are values of all of them, or one that they share."""
    rows = pd.DataFrame(columns).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def by_depth(
    about: Mapping[str, Any], tokens: Sequence[int], **values: Float[Tensor, "depth token"]
) -> list[Row]:
    """A row per depth: columns as in `by_point`, then the mean of each value over some tokens."""
    means = {name: one[:, tokens].mean(-1).tolist() for name, one in values.items()}
    return by_point({**about, **means})


def _nanmean(values: Float[np.ndarray, "layer query"]) -> Float[np.ndarray, " layer"]:
    """Mean over queries of what is defined; NaN where nothing is."""
    is_known = np.isfinite(values)
    return divided(np.where(is_known, values, 0).sum(axis=1), is_known.sum(axis=1))
