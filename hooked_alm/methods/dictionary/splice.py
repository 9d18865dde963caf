"""Rows of a run, replaced by what a dictionary makes of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ...encoder_rows import EncoderRows
from ...inputs import ALMInput
from ...model import HookedALM
from ..activations.selection import kept_points
from .autoencoder import SparseAutoencoder

RowEdit = Callable[[Float[Tensor, "row d_in"]], Float[Tensor, "row d_in"]]
"""Rows -> what stands in their place."""
FeatureEdit = Callable[[Float[Tensor, "row latent"]], Float[Tensor, "row latent"]]
SpliceHook = tuple[str, Callable[[Tensor, Any], Tensor]]


def splice_hooks(
    model: HookedALM,
    x: ALMInput,
    edits: Mapping[str, RowEdit],
    spans: str | Sequence[str] = "audio",
) -> list[SpliceHook]:
    """Hooks that replace the rows of some spans: of ``run_with_hooks``, ``generate``, ``hooks``.

    ::

        hooks = splice_hooks(model, x, {point: reconstruction(sae)})
        logits = model.run_with_hooks(x, fwd_hooks=hooks)

    Args:
        model: that runs.
        x: the prompts that it will run on.
        edits: hook point -> what is done to its rows, heads side by side.
        spans: of the prompts, whose rows are replaced; of the encoder's, always the rows that hear
            the clip.

    Raises:
        HookNameError: a point that has no row for every position.
        InputError: a span that the prompts lack.
    """
    hooks = list[SpliceHook]()
    for name, edit in edits.items():
        (point,) = kept_points(model, name)
        if point.kind == "encoder":
            rows = model.encoder_rows(x)
            hooks.append((point.name, partial(_in_windows, edit=edit, rows=rows)))
        else:
            mask = spliced_rows(x, spans)
            hooks.append((point.name, partial(_in_prompts, edit=edit, mask=mask)))
    return hooks


def spliced_rows(x: ALMInput, spans: str | Sequence[str]) -> Bool[Tensor, "batch pos"]:
    """Rows of prompts that a splice replaces: those of some spans, pads left out."""
    named = [spans] if isinstance(spans, str) else [*spans]
    mask: Tensor = torch.stack([x.spans.mask(span) for span in named]).any(0)
    return mask & torch.from_numpy(x.is_real)


@dataclass(frozen=True, eq=False)
class Splice:
    """What stands in the place of rows in every run of a sweep; see ``splice_hooks``.

    ::

        patch(model, base, donor, metric, splice=Splice({point: reconstruction(sae)}))
    """

    edits: Mapping[str, RowEdit]
    """Hook point -> what is done to its rows."""
    spans: str | Sequence[str] = "audio"
    """Of the prompts, whose rows are replaced."""

    def hooks(self, model: HookedALM, x: ALMInput) -> list[SpliceHook]:
        """Hooks that do it in a run of some prompts.

        Raises:
            HookNameError: a point that has no row for every position.
            InputError: a span that the prompts lack.
        """
        return splice_hooks(model, x, self.edits, self.spans)


def _in_prompts(value: Tensor, hook: object, *, edit: RowEdit, mask: Tensor) -> Tensor:
    n_new = value.shape[1] - mask.shape[1]
    if n_new < 0:  # a step of generation, whose prompt is in the cache
        return value
    mask = F.pad(mask, (0, n_new)).to(value.device)  # without a cache the prompt comes again
    changed = value.clone()
    changed[mask] = applied(value[mask], edit)
    return changed


def _in_windows(value: Tensor, hook: Any, *, edit: RowEdit, rows: EncoderRows) -> Tensor:
    flat = rows.by_prompt(hook.name, value).clone()
    mask = rows.prompts.spans.mask("audio").to(value.device)
    flat[mask] = applied(flat[mask], edit)
    return rows.by_window(hook.name, flat, value)


def applied(rows: Tensor, edit: RowEdit) -> Tensor:
    """Rows of a point after an edit, in their own dtype and shape."""
    return edit(rows.flatten(1).float()).to(rows.dtype).view_as(rows)


def reconstruction(sae: SparseAutoencoder) -> RowEdit:
    """The edit that puts reconstructions in the place of rows."""
    return sae.forward


def feature_edit(sae: SparseAutoencoder, change: FeatureEdit) -> RowEdit:
    """The edit that changes features and keeps what the dictionary does not reconstruct.

    ``x + decode(change(f)) - decode(f)``: where features are left alone rows are, too, bit by bit.
    """

    def edit(x: Tensor) -> Tensor:
        features = sae.encode(x)
        return x + (sae.decode(change(features)) - sae.decode(features))

    return edit
