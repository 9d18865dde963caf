"""What is measured on the runs of one item: losses, divergences, attention, and their coupling.

Source: cards M-002-3, M-002-4 (see ``methods.reading.divergence``), M-002-11 and M-002-12; block
S-6.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.hooks import Hook, HookPoint
from hooked_alm.methods.reading.attention_mass import attention_rows, visible_keys
from hooked_alm.methods.reading.divergence import Divergence, compare_depths, lockstep
from hooked_alm.methods.reading.tuned_lens import TunedLens
from hooked_alm.points import hook_name

from .memory import left_over, queries_at_once
from .plan import PrefixRun, partition
from .settings import PrefixComparisonConfig

WINDOW = 16
"""Latest tokens of the continuation that ``prior_output, latest`` counts."""
LATEST = f"prior_output, latest {WINDOW}"
MOST_CORRELATED = 0.999
"""Where Fisher's z is cut off: a perfect rank correlation of few tokens is infinite."""


def compare(
    model: HookedALM,
    runs: Sequence[PrefixRun],
    pairs: Sequence[tuple[int, int]],
    config: PrefixComparisonConfig,
    meters: Sequence["MassMeter"] = (),
    lens: TunedLens | None = None,
) -> Divergence:
    """Losses of runs and divergences of pairs at depths 0..L, over every token in common.

    One forward per run; ``config.max_bytes`` is what all of it may hold. Under
    ``lens_source="hf_tuple"`` the last depth is what Hugging Face calls ``hidden_states[-1]``,
    which is normed already (defect C6).
    """
    n = min(len(run.targets) for run in runs)
    queries = torch.stack([run.queries[:n] for run in runs])
    targets = torch.stack([run.targets[:n] for run in runs])
    hooks = [meter.hooks() for meter in meters]
    depths = lockstep(model, [run.x for run in runs], queries, hooks)
    if config.lens_source == "hf_tuple":
        depths = _as_hidden_states(model, depths)
    left = left_over(
        model,
        [run.x.shape[1] for run in runs],
        max(len(run.targets) for run in runs),
        max((len(meter.segments) for meter in meters), default=0),
        config.max_bytes,
    )
    for meter in meters:
        meter.at_once = queries_at_once(model, meter.x.shape[1], left)
    return compare_depths(model, depths, targets, pairs, lens=lens, max_bytes=left)


def _as_hidden_states(model: HookedALM, depths: Iterator[Tensor]) -> Iterator[Tensor]:
    for depth, rows in enumerate(depths):
        with torch.no_grad():
            yield model.head_norm(rows) if depth == len(model.path) else rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Mass:
    """Attention of a run's queries to its segments (card M-002-11)."""

    segments: list[str]
    """They cover every visible key; then the latest tokens of the continuation."""
    mass: Float[np.ndarray, "layer query segment"]
    """Mean over heads; sums to 1 over the segments but the last."""
    density: Float[np.ndarray, "layer query segment"]
    """Mass relative to even attention; NaN where a segment has no visible key yet."""
    without_sink: Float[np.ndarray, "layer query segment"]
    """Mass of what does not fall on the sink; NaN for the sink itself."""
    heads: Float[np.ndarray, "layer head segment"]
    """Mean over queries."""


class MassMeter:
    """Hooks that sum a run's attention by segment while it runs; a few queries at a time."""

    at_once = 64
    """Queries whose rows are held together."""

    def __init__(self, model: HookedALM, run: PrefixRun, queries: Int[Tensor, " query"]) -> None:
        self.model, self.x = model, run.x
        self.queries = queries.to(run.x.device)
        self.segments = [*partition(run), LATEST]
        self.masks = torch.stack([run.x.spans.mask(name)[0] for name in self.segments[:-1]], -1)
        self.masks = self.masks.to(run.x.device)
        self.held: Tensor | None = None
        # Made once: small tensors kept between large ones that come and go would split the heap.
        shape = (len(model.path), len(self.queries), len(self.segments))
        self.found = torch.empty(3, *shape, device=run.x.device)
        self.heads = torch.zeros(shape[0], model.cfg.n_heads, shape[2], device=run.x.device)

    def hooks(self) -> list[Hook]:
        """For every layer: hold the queries, then sum once the keys are there."""
        hooks: list[Hook] = []
        for layer, block in enumerate(self.model.path):
            hooks += [(hook_name("rot_q", block), self._hold)]
            hooks += [(hook_name("rot_k", block), partial(self._sum, layer=layer))]
        return hooks

    def _hold(self, q: Tensor, hook: HookPoint) -> None:
        self.held = q[:, self.queries]

    @torch.no_grad()
    def _sum(self, k: Tensor, hook: HookPoint, layer: int) -> None:
        assert self.held is not None
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
        """After the run."""
        mass, density, without_sink = self.found.cpu().numpy()
        return Mass(
            segments=self.segments,
            mass=mass,
            density=density,
            without_sink=without_sink,
            heads=(self.heads / len(self.queries)).cpu().numpy(),
        )


# --- Does attention go with the benefit?


def spearman(x: Float[np.ndarray, " token"], y: Float[np.ndarray, " token"]) -> float:
    """Rank correlation; NaN where one of the two is constant, or there are fewer than 3."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


def partial_spearman(
    x: Float[np.ndarray, " token"], y: Float[np.ndarray, " token"], classes: Sequence[str]
) -> float:
    """Rank correlation of what position in the continuation and token class do not explain.

    Ranks of both are regressed on the rank of the position and on indicators of the classes; NaN
    where these leave fewer than three degrees of freedom, or nothing of one of the two.
    """
    names = sorted(set(classes))
    columns = [np.ones(len(x)), np.arange(len(x), dtype=np.float64)]
    columns += [np.array([one == name for one in classes], np.float64) for name in names[1:]]
    design = np.stack(columns, axis=1)
    if len(x) - design.shape[1] < 3:
        return float("nan")
    left = [_residual(stats.rankdata(values), design) for values in (x, y)]
    size = [float(np.linalg.norm(one)) for one in left]
    # What is left of a column that the design explains is rounding.
    if min(size) < 1e-9 * len(x):
        return float("nan")
    return float(left[0] @ left[1] / (size[0] * size[1]))


def _residual(
    values: Float[np.ndarray, " token"], design: Float[np.ndarray, "token column"]
) -> Float[np.ndarray, " token"]:
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def fisher_z(rho: Float[np.ndarray, " *item"]) -> Float[np.ndarray, " *item"]:
    """``arctanh``, cut off at ±0.999; NaN stays."""
    return np.arctanh(np.clip(rho, -MOST_CORRELATED, MOST_CORRELATED))
