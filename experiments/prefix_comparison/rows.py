"""Rows of a unit's tables, from what was measured on the runs of one item."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hooked_alm.methods.reading.divergence import Divergence

from ..workbench.experiment import Row
from .measure import Mass, partial_spearman, spearman
from .plan import PrefixRun
from .prompts import PreparedItem
from .tokens import Tokens


def run_rows(
    one: PreparedItem,
    runs: Sequence[PrefixRun],
    roles: Sequence[str],
    found: Divergence,
    tokens: Tokens,
    masses: Sequence[Mass],
    segment: str,
    outcomes: str,
) -> Iterator[Row]:
    """Each prefix at the output: loss, divergence from b, attention, and whether it was right."""
    nll, hit = found.nll[-1], found.hit[-1]
    pair = 0
    for i, (run, role, mass) in enumerate(zip(runs, roles, masses, strict=True)):
        js = 0.0
        if i != 1:
            js = float(found.js[-1, pair, tokens.semantic].mean())
            pair += 1
        is_exact = bool(hit[i].all())
        given = one.item.conditions[run.name].outcome if role != "intervention" else None
        right = is_exact if outcomes == "greedy" else given
        yield {
            "run": run.name,
            "role": role,
            "n_prefix": run.start,
            "n_segment": len(_positions(run, segment)),
            "nll": float(nll[i, tokens.semantic].mean()),
            "delta": float((nll[i] - nll[1])[tokens.semantic].mean()),
            "js": js,
            "nll_sum": float(nll[i].double().sum()),
            "mass": float(of_segment(mass, mass.mass, segment).mean()),
            "hit_share": float(hit[i, tokens.semantic].float().mean()),
            "exact": is_exact,
            # NaN where nobody knows: a changed prefix whose outcome is not computed here.
            "right": float("nan") if right is None else float(right),
        }


def item_row(
    runs: Sequence[PrefixRun], found: Divergence, tokens: Tokens, by_run: Sequence[Row]
) -> Row:
    """Sizes, ΔNLL and outcome of one item."""
    a, b = by_run[0], by_run[1]
    n = found.nll.shape[-1]
    return {
        "n_prefix_a": runs[0].start,
        "n_prefix_b": runs[1].start,
        "n_tokens": n,
        "n_semantic": len(tokens.semantic),
        "n_fragments": sum(tokens.is_fragment),
        "boundary_differs": runs[0].targets.tolist() != runs[1].targets.tolist(),
        "nll_a": a["nll"],
        "nll_b": b["nll"],
        "delta": a["delta"],
        "js": a["js"],
        "right_a": bool(a["right"]),
        "right_b": bool(b["right"]),
        "quadrant": f"G{int(a['right'])}{int(b['right'])}",
    }


def of_segment(mass: Mass, values: np.ndarray, segment: str) -> np.ndarray:
    """Values of the segment in question, zeros where a run lacks it."""
    if segment not in mass.segments:
        return np.zeros(values.shape[:-1], values.dtype)
    return values[..., mass.segments.index(segment)]


def mass_rows(runs: Sequence[PrefixRun], masses: Sequence[Mass], own: str) -> Iterator[Row]:
    """By layer: all segments of a and b, of other runs the one in question."""
    for i, (run, mass) in enumerate(zip(runs, masses, strict=True)):
        for j, segment in enumerate(mass.segments):
            if i > 1 and segment != own:
                continue
            columns = {
                "mass": mass.mass[..., j].mean(axis=1),
                "density": _nanmean(mass.density[..., j]),
                "without_sink": _nanmean(mass.without_sink[..., j]),
            }
            for layer in range(len(mass.mass)):
                numbers = {name: float(values[layer]) for name, values in columns.items()}
                yield {"run": run.name, "layer": layer, "segment": segment, **numbers}


def coupling_rows(found: Divergence, tokens: Tokens, mass: Mass, segment: str) -> Iterator[Row]:
    """Does the benefit of a token go with the attention that its prediction pays?"""
    delta = (found.nll[:, 0] - found.nll[:, 1])[:, tokens.semantic].cpu().numpy()
    classes = [tokens.classes[index] for index in tokens.semantic]
    read = of_segment(mass, mass.mass, segment)
    for layer in range(len(read)):
        x, y = read[layer].astype(np.float64), delta[layer + 1].astype(np.float64)
        yield {
            "layer": layer,
            "n": len(x),
            "rho": spearman(x, y),
            "partial": partial_spearman(x, y, classes),
        }


def _positions(run: PrefixRun, segment: str) -> list[int]:
    return run.x.spans.positions(segment, 0) if segment in run.x.spans.ranges else []


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over queries of what is defined; NaN where nothing is."""
    defined = np.isfinite(values)
    total = np.where(defined, values, 0).sum(axis=1)
    n = defined.sum(axis=1)
    return np.divide(total, n, out=np.full(len(n), np.nan, total.dtype), where=n > 0)


def curve_rows(runs: Sequence[PrefixRun], found: Divergence, tokens: Tokens) -> Iterator[Row]:
    """Means over the semantic tokens, by depth, of every run but b."""

    def mean(values: torch.Tensor) -> list[float]:
        return values[:, tokens.semantic].mean(-1).tolist()

    baseline = mean(found.nll[:, 1])
    others = [i for i in range(len(runs)) if i != 1]
    for pair, i in enumerate(others):
        columns = {
            "nll": mean(found.nll[:, i]),
            "nll_b": baseline,
            "delta": mean(found.nll[:, i] - found.nll[:, 1]),
            "js": mean(found.js[:, pair]),
            "kl": mean(found.kl[:, pair]),
            "kl_back": mean(found.kl_back[:, pair]),
        }
        for depth in range(len(baseline)):
            numbers = {name: values[depth] for name, values in columns.items()}
            yield {"run": runs[i].name, "depth": depth, **numbers}


def class_rows(found: Divergence, tokens: Tokens) -> Iterator[Row]:
    """Means over the semantic tokens of each class, by depth."""
    delta = found.nll[:, 0] - found.nll[:, 1]
    for name in dict.fromkeys(tokens.classes[index] for index in tokens.semantic):
        own = [index for index in tokens.semantic if tokens.classes[index] == name]
        for depth in range(len(delta)):
            yield {
                "class": name,
                "depth": depth,
                "n": len(own),
                "delta": float(delta[depth, own].mean()),
                "js": float(found.js[depth, 0, own].mean()),
            }
