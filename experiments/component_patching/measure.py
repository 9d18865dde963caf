"""What is measured of a clip: how likely its two words are while components are patched.

The transcript is given up to where the two words differ; the metric is what the log-probability of
the acoustic word is above that of the contextual one. Components are patched at all positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.methods.patching.distance import donor_distance
from hooked_alm.methods.patching.metrics import Logits
from hooked_alm.methods.patching.patch import patch, run_pair
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.methods.patching.run_pair import RunPair
from hooked_alm.points import Site, sites_of

from ..materials.stand_ins import noise_like, silence_like
from ..materials.transcription import Transcription, whose
from ..workbench.experiment import UnitResult
from ..workbench.results import Row
from .items import ContextItem
from .settings import ComponentPatchingConfig, PatchedSite, PatchedStack

ALL = -1
"""In place of a head: all of a site."""
POINTS: dict[PatchedSite, tuple[Site, ...]] = {
    "block": ("resid_post",), "attn": ("attn_out",), "cross_attn": ("cross_attn_out",),
    "mlp": ("mlp_out",), "head": ("z", "cross_attn.z"),
}  # fmt: skip


class PatchedPoint(NamedTuple):
    """A site of one stack, as results name it and as the engine does."""

    stack: PatchedStack
    name: str
    site: Site
    is_head: bool


def patched_points(model: HookedALM, config: ComponentPatchingConfig) -> list[PatchedPoint]:
    """The sites that are patched; a stack without cross-attention has none of its."""
    found = []
    for stack in config.stacks:
        known = sites_of(_stack(model, stack).path_cfg)
        for name in config.sites:
            for site in POINTS[name]:
                if site in known:
                    called = "cross_head" if site == "cross_attn.z" else name
                    found.append(PatchedPoint(stack, called, site, name == "head"))
    return found


def _stack(model: HookedALM, stack: PatchedStack) -> HookedALM:
    return model.towards("encoder") if stack == "encoder" else model


class Patcher:
    """A model, and what its components are patched towards."""

    def __init__(
        self, model: HookedALM, ours: Transcription, config: ComponentPatchingConfig
    ) -> None:
        self.model, self.ours, self.config = model, ours, config

    @torch.no_grad()
    def result(self, item: ContextItem) -> UnitResult:
        """All cells of a clip."""
        x, who = self._asked(item), whose(item.clip)
        metric = Logits(item.tokens)
        names, clips = zip(*self._references(item), strict=True)
        references = ALMInput.joined([replace(x, clips=(clip,)) for clip in clips])
        points = groupby(patched_points(self.model, self.config), lambda point: point.stack)
        rows = [
            row for stack, some in points
            for row in self._cells(stack, [*some], x, references, names, metric)
        ]  # fmt: skip
        logits = self.model(ALMInput.joined([x, references]))[:, -1].float()
        odds = _log_odds(logits[:, [*item.tokens]].cpu().numpy())
        runs: list[Row] = [
            {"reference": reference, "draw": draw, "value": float(value[0])}
            for (reference, draw), value in zip((("none", 0), *names), odds, strict=True)
        ]
        tables = {"runs": runs, "patched": rows}
        return UnitResult.of(who, tables)

    def _cells(
        self,
        stack: PatchedStack,
        points: Sequence[PatchedPoint],
        x: ALMInput,
        references: ALMInput,
        names: Sequence[tuple[str, int]],
        metric: Logits,
    ) -> Iterator[Row]:
        """A row for every cell of a stack, in which the clip and its references run once."""
        sites, engine = [point.site for point in points], self.config.engine
        ran = run_pair(_stack(self.model, stack), x, references, metric, sites, engine)
        for point in points:
            for some, alphas in self._sweeps(point, names):
                base, donors = x[[0] * len(some)], references[[*some]]
                cells = self._patched(point, base, donors, metric, alphas, ran.towards(some))
                yield from cells.rows([names[i] for i in some])
            yield from self._patched(point, x, "zero", metric, (1.0,), ran.towards(None)).rows()

    def _sweeps(
        self, point: PatchedPoint, names: Sequence[tuple[str, int]]
    ) -> list[tuple[range, tuple[float, ...]]]:
        """References of a point by number, noise before others, with their strengths.

        Heads are many: they are replaced, by one draw of noise. What stands beside noise replaces.
        """
        if point.is_head:
            return [(range(1), (1.0,))]
        n = self.config.n_noise
        return [(range(n), self.config.alphas), (range(n, len(names)), (1.0,))]

    def _asked(self, item: ContextItem) -> ALMInput:
        """The clip's transcript up to where its two words differ."""
        x = self.ours.input(item.clip).to(self.model.cfg.device)
        return x.answered(torch.tensor([item.begun], dtype=torch.long, device=x.device))

    def _references(self, item: ContextItem) -> Iterator[tuple[tuple[str, int], AudioClip]]:
        """Name, draw and sound of every reference; all fill as many positions as the clip."""
        path = item.clip.path
        for draw in range(self.config.n_noise):
            seed = f"{self.config.seed}/{item.clip.name}/{draw}"
            yield ("noise", draw), noise_like(self.model, path, None, seed)
        yield ("silence", 0), silence_like(self.model, path)
        if item.donor is not None:
            yield ("pair", 0), self.ours.heard(item.donor)

    def _patched(
        self,
        point: PatchedPoint,
        base: ALMInput,
        donor: ALMInput | Literal["zero"],
        metric: Logits,
        alphas: tuple[float, ...],
        runs: RunPair,
    ) -> "PatchedCells":
        model = _stack(self.model, point.stack)
        heads: Literal["each"] | None = "each" if point.is_head else None
        # By number: rows of the encoder that hear a clip's end are another's padding.
        places = [(*model.positions_of(base[[0]]).attention_mask[0].nonzero()[:, 0].tolist(),)]
        values = patch(
            model, base, donor, metric, runs=runs, site=point.site, heads=heads, places=places,
            mode="interpolate", coefficients=alphas, engine=self.config.engine,
            max_bytes=self.config.max_bytes,
        )  # fmt: skip
        moved = donor_distance(
            model, base, donor, site=point.site, heads=heads, places=places, runs=runs
        )
        return PatchedCells(point, values, moved)


class PatchedCells(NamedTuple):
    """The cells of one site, of some clips that are one under several references."""

    point: PatchedPoint
    values: PatchResult
    moved: Float[np.ndarray, "layer *head place example"]
    """By a patch of strength 1."""

    def rows(self, names: Sequence[tuple[str, int]] = (("zero", 0),)) -> Iterator[Row]:
        """A row for every cell, of references with these names and draws."""
        alphas = self.values.axes["coefficient"]
        odds, base = _log_odds(self.values.values), _log_odds(self.values.base)
        for cell in np.ndindex(odds.shape[:-1]):
            k, layer, *head, _, example = cell
            reference, draw = names[example]
            yield {
                "stack": self.point.stack, "site": self.point.name, "layer": layer,
                "head": head[0] if head else ALL, "reference": reference, "draw": draw,
                "alpha": alphas[k], "value": float(odds[cell][0]), "base": float(base[example][0]),
                "stranger": float(odds[cell][1]), "stranger_base": float(base[example][1]),
                "moved": alphas[k] * float(self.moved[cell[1:]]),
            }  # fmt: skip


def _log_odds(logits: Float[np.ndarray, "*cell token"]) -> Float32[np.ndarray, "*cell pair"]:
    """First token above second: of an item's own pair, then of the strangers; NaN without any."""
    logits = logits.astype(np.float32)
    odds = logits[..., ::2] - logits[..., 1::2]
    nothing = np.full((*odds.shape[:-1], 2 - odds.shape[-1]), np.nan, np.float32)
    return np.concatenate([odds, nothing], axis=-1)


def check_donor(ours: Transcription, item: ContextItem) -> None:
    """Refuse a donor whose clip fills other positions than the item's.

    Raises:
        InputError: it does.
    """
    if item.donor is None:
        return
    own, theirs = (ours.input(one).shape[1] for one in (item.clip, item.donor))
    if own != theirs:
        raise InputError(
            f"donor: got a prompt of {theirs} positions, expected {own} as of the clip itself. Cut "
            "the longer clip, or put silence behind the other"
        )
