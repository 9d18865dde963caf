"""Patch spans of one run with another run's activations (blocks S-3, S-12).

One full forward per cell: the plain loop that a reader can check by eye.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError
from ..hooks import HookPoint
from ..inputs import ALMInput
from ..model import HookedALM
from .alignment import Alignment, AlignPolicies, align

Site = Literal["resid_pre", "resid_post", "z"]
PatchMode = Literal["replace", "interpolate", "add"]
Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, "batch label"]]

SITE_HOOKS: dict[Site, str] = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "z": "blocks.{layer}.attn.hook_z",
}


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One intervention: which donor values go where, and how.

    ``replace`` writes d; ``interpolate`` writes ``(1 - c) a + c d``; ``add`` writes ``a + c d``.
    """

    site: Site
    layer: int
    alignments: Sequence[Alignment]
    """One per row of the batch."""
    heads: Sequence[int] | None = None
    """With site ``z``: query heads to patch; None is all."""
    mode: PatchMode = "replace"
    coefficient: float = 1.0

    @property
    def hook_name(self) -> str:
        """Where the patch acts."""
        return SITE_HOOKS[self.site].format(layer=self.layer)

    def hook(self, donor: Float[Tensor, "batch pos *features"]) -> Callable[..., Tensor]:
        """A forward hook that writes the donor's values."""

        def write(value: Tensor, hook: HookPoint) -> Tensor:
            patched = value.clone()
            for row, alignment in enumerate(self.alignments):
                ours: Any = (row, alignment.base)
                theirs = alignment.donor_values(donor[row])
                if self.heads is not None:
                    positions = torch.tensor(alignment.base, dtype=torch.long)  # may be empty
                    ours = (row, positions[:, None], list(self.heads))
                    theirs = theirs[:, list(self.heads)]
                patched[ours] = self._mixed(value[ours], theirs.to(value.dtype))
            return patched

        return write

    def _mixed(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.mode == "replace":
            return theirs
        if self.mode == "interpolate":
            return (1 - self.coefficient) * ours + self.coefficient * theirs
        return ours + self.coefficient * theirs


@dataclass(frozen=True, kw_only=True)
class PatchSweep:
    """Label scores of every cell of a sweep, with the runs it is measured against."""

    layers: tuple[int, ...]
    spans: tuple[tuple[str, ...], ...]
    scores: Float[Tensor, "layer span batch label"]
    base: Float[Tensor, "batch label"]
    donor: Float[Tensor, "batch label"]
    length_ratios: tuple[dict[str, float], ...]
    """Per row: span -> donor length / base length."""


@torch.no_grad()
def donor_activations(
    model: HookedALM, donor: ALMInput, site: Site, layers: Sequence[int]
) -> tuple[Float[Tensor, "batch pos vocab"], dict[int, Tensor]]:
    """The donor's logits, and its activations at the very hook points that will be patched."""
    names = {SITE_HOOKS[site].format(layer=layer): layer for layer in layers}
    logits, cache = model.run_with_cache(donor, names_filter=names, return_cache_object=False)
    return logits, {layer: cache[name] for name, layer in names.items()}


@torch.no_grad()
def patch_spans(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    spans: Sequence[str | Sequence[str]],
    metric: Metric,
    *,
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    mode: PatchMode = "replace",
    coefficient: float = 1.0,
    policy: AlignPolicies = "error",
    donor_values: dict[int, Tensor] | None = None,
) -> PatchSweep:
    """Patch each span at each block and read the metric, one full forward per cell.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts, whose activations are written in.
        spans: each a span name, or several names patched together.
        metric: label scores from the logits.
        site: resid_post of block b is depth b + 1, resid_pre depth b; z is before the output
            projection.
        layers: blocks; None is all.
        heads: with ``z``, query heads.
        mode: see ``Patch``.
        coefficient: see ``Patch``.
        policy: for spans of unequal length, see ``align``.
        donor_values: per block, values to write instead of the donor's own at the same site. For
            reproducing work that took them elsewhere.

    Raises:
        InputError: batches of different size, layers or heads that do not exist, spans that do
            not align.
    """
    cfg = model.cfg
    chosen = tuple(range(cfg.n_layers)) if layers is None else tuple(layers)
    _check_choice("layer", chosen, cfg.n_layers)
    _check_choice("head", heads or (), cfg.n_heads)
    if heads is not None and site != "z":
        raise InputError(f"patching heads {list(heads)} of {site}: only site 'z' has heads.")
    if len(base) != len(donor):
        raise InputError(f"patching {len(base)} base rows with {len(donor)} donor rows.")
    groups = tuple((span,) if isinstance(span, str) else tuple(span) for span in spans)
    features = None
    if "dtw" in ({policy} if isinstance(policy, str) else policy.values()):
        features = model(base, stop_at_layer=0), model(donor, stop_at_layer=0)
    alignments = [
        [
            align(base, donor, group, row=row, policy=policy,
                  features=None if features is None else (features[0][row], features[1][row]))
            for row in range(len(base))
        ]
        for group in groups
    ]  # fmt: skip
    donor_logits, values = donor_activations(model, donor, site, chosen)
    values = values if donor_values is None else donor_values
    cells = [
        [
            _run_cell(
                model,
                base,
                metric,
                values[layer],
                Patch(site=site, layer=layer, alignments=per_row, heads=heads, mode=mode,
                      coefficient=coefficient),
            )
            for per_row in alignments
        ]
        for layer in chosen
    ]  # fmt: skip
    return PatchSweep(
        layers=chosen,
        spans=groups,
        scores=torch.stack([torch.stack(row) for row in cells]),
        base=metric(model(base)),
        donor=metric(donor_logits),
        length_ratios=tuple(
            {name: ratio for group in alignments for name, ratio in group[row].length_ratio.items()}
            for row in range(len(base))
        ),
    )


def _run_cell(
    model: HookedALM, base: ALMInput, metric: Metric, donor: Tensor, patch: Patch
) -> Tensor:
    return metric(model.run_with_hooks(base, fwd_hooks=[(patch.hook_name, patch.hook(donor))]))


def _check_choice(what: str, chosen: Sequence[int], size: int) -> None:
    if wrong := [index for index in chosen if not 0 <= index < size]:
        raise InputError(f"choosing {what} {wrong}: the model has {what}s 0 to {size - 1}.")
