"""Attention to the segments of a long prefix, summed while the model runs (M-002-11, S-6).

Every query of a run has one row of attention per head and layer, as long as the prefix. None is
kept: a few queries at a time, rows are summed by segment as soon as the keys are there.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...hooks import Hook, HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name
from ...spans import SPAN_NAMES
from ..result import MethodResult
from .attention_mass import attention_rows, visible_keys

WINDOW = 16
"""Latest tokens of the continuation that ``prior_output, latest`` counts."""
LATEST = f"prior_output, latest {WINDOW}"


def partition(x: ALMInput) -> list[str]:
    """Segments of one row in the order in which they first occur; they cover every position."""
    first = {
        name: min(start for start, _ in x.spans[name][0]) for name in x.spans if x.spans[name][0]
    }
    return sorted(first, key=lambda name: (first[name], name in SPAN_NAMES))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Mass(MethodResult):
    """Attention of a run's queries to its segments (M-002-11)."""

    segments: list[str]
    """Names that cover every visible key; then the latest tokens of the continuation."""
    mass: Float[np.ndarray, "layer query segment"]
    """Mean over heads; sums to 1 over the segments but the last."""
    density: Float[np.ndarray, "layer query segment"]
    """Mass relative to even attention; NaN where a segment has no visible key yet."""
    without_sink: Float[np.ndarray, "layer query segment"]
    """Mass of what does not fall on the sink; NaN for the sink itself."""
    heads: Float[np.ndarray, "layer head segment"]
    """Mean over queries."""

    def of_segment(self, values: np.ndarray, segment: str) -> np.ndarray:
        """One segment's part of some of these, zeros where the run lacks it."""
        if segment not in self.segments:
            return np.zeros(values.shape[:-1], values.dtype)
        return values[..., self.segments.index(segment)]


class MassMeter:
    """Hooks that sum a run's attention by segment while it runs; a few queries at a time."""

    at_once = 64
    """Queries whose rows are held together."""

    def __init__(self, model: HookedALM, x: ALMInput, queries: Int[Tensor, " query"]) -> None:
        """Hold nothing yet.

        Args:
            model: to be run.
            x: one row, whose spans cover every position; one of them is ``prior_output``.
            queries: positions whose attention is summed.
        """
        model.refuse_encoder("measuring attention to segments")
        self.model, self.x = model, x
        self.queries = queries.to(x.device)
        self.segments = [*partition(x), LATEST]
        self.masks = torch.stack([x.spans.mask(name)[0] for name in self.segments[:-1]], -1)
        self.masks = self.masks.to(x.device)
        self.held: Tensor | None = None
        # Made once: small tensors kept between large ones that come and go would split the heap.
        shape = (len(model.path), len(self.queries), len(self.segments))
        self.found = torch.empty(3, *shape, device=x.device)
        self.heads = torch.zeros(shape[0], model.cfg.n_heads, shape[2], device=x.device)

    def hooks(self) -> list[Hook]:
        """Hooks that hold every layer's queries, then sum once its keys are there."""
        hooks: list[Hook] = []
        for layer, block in enumerate(self.model.path):
            hooks += [(hook_name("rot_q", block), self._hold)]
            hooks += [(hook_name("rot_k", block), partial(self._sum, layer=layer))]
        return hooks

    def _hold(self, q: Tensor, hook: HookPoint) -> None:
        self.held = q.to(self.x.device)[:, self.queries]

    @torch.no_grad()
    def _sum(self, k: Tensor, hook: HookPoint, layer: int) -> None:
        assert self.held is not None
        k = k.to(self.x.device)
        for at in torch.arange(len(self.queries), device=k.device).split(self.at_once):
            queries = self.queries[at]
            visible = visible_keys(self.model, self.x, layer, queries[None])
            pattern = attention_rows(self.model, layer, self.held[:, at], k, visible)[0]
            *means, heads = self._by_segment(pattern, visible[0], queries)
            for kept, value in zip(self.found, means, strict=True):
                kept[layer, at] = value
            self.heads[layer] += heads

    def _by_segment(
        self,
        pattern: Float[Tensor, "head query key_pos"],
        visible: Tensor,
        queries: Int[Tensor, " query"],
    ) -> tuple[Tensor, ...]:
        keys = torch.arange(pattern.shape[-1], device=pattern.device)
        masks = self.masks.to(pattern.dtype)
        prior = self.masks[:, self.segments.index("prior_output")]
        # The query of token t is the position of token t − 1, the latest there is.
        latest = (prior & (queries[:, None] - keys < WINDOW) & visible).to(pattern.dtype)
        mass = torch.cat(
            [pattern @ masks, torch.einsum("hqk,qk->hq", pattern, latest)[..., None]], -1
        )
        seen = visible.to(pattern.dtype)
        counts = torch.cat([seen @ masks, latest.sum(-1, keepdim=True)], -1)
        even = counts / seen.sum(-1, keepdim=True)
        sink = mass[..., self.segments.index("sink"), None]
        rest = mass / torch.where(sink < 1, 1 - sink, torch.nan)
        rest[..., self.segments.index("sink")] = torch.nan
        density = mass.mean(0) / even.masked_fill(even == 0, torch.nan)
        return mass.mean(0), density, rest.mean(0), mass.sum(1)

    def result(self) -> Mass:
        """What was summed, after the run."""
        mass, density, without_sink = self.found.cpu().numpy()
        return Mass(
            segments=self.segments,
            mass=mass,
            density=density,
            without_sink=without_sink,
            heads=(self.heads / len(self.queries)).cpu().numpy(),
        )
