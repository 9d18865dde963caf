"""What dictionaries are worth on rows that they have not learnt."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm.inputs import ALMInput
from hooked_alm.methods.dictionary.quality import Inference, QualityCounts
from hooked_alm.methods.dictionary.splice import (
    RowEdit,
    feature_edit,
    reconstruction,
    splice_hooks,
)

from ..materials.clip_rows import ClipRows, HeldOutClips
from ..materials.dictionary_partners import Dictionaries
from ..materials.row_source import RowSource
from ..workbench.results import Row


def quality_rows(
    rows: RowSource, split: HeldOutClips, point: str, saes: Dictionaries
) -> Iterator[Row]:
    """How well each dictionary reconstructs the held-out rows, in use and as in training."""
    counts = {
        (seed, inference): QualityCounts(sae, inference)
        for seed, sae in saes.items()
        for inference in get_args(Inference)
    }
    for part in rows.parts(split.held_out):
        found = rows.values(part)[point]
        for one in counts.values():
            one.add(found)
    for (seed, inference), one in counts.items():
        yield {"point": point, "seed": seed, "inference": inference, **asdict(one.quality())}


@torch.no_grad()
def recovery_rows(
    rows: ClipRows, split: HeldOutClips, point: str, saes: Dictionaries
) -> Iterator[Row]:
    """What the answer to each held-out clip loses, with other rows in the place of its own.

    KL divergence in nats of the next token at the readout, from the run as it is: with
    reconstructions, with the mean of the held-out rows, with zeros; and with features that are
    taken apart and left alone.
    """
    n, total = 0, torch.zeros(())
    for part in rows.parts(split.held_out):
        found = rows.values(part)[point]
        n, total = n + len(found), total + found.float().sum(0)
    mean = total / n
    plain: dict[str, RowEdit] = {
        "kl_mean": lambda x: mean.expand_as(x),
        "kl_zero": torch.zeros_like,
    }
    for part in rows.parts(split.held_out):
        x = rows.heard(part)
        clean = _readout(rows, x)

        def lost(edit: RowEdit, x: ALMInput = x, clean: Tensor = clean) -> list[float]:
            other = _readout(rows, x, {point: edit})
            kl = (clean.exp() * (clean - other)).sum(-1)
            found: list[float] = kl.tolist()
            return found

        without = {name: lost(edit) for name, edit in plain.items()}
        for seed, sae in saes.items():
            by_clip = zip(
                part, lost(reconstruction(sae)), lost(feature_edit(sae, lambda f: f)), strict=True
            )
            for row, (clip, kl, kept) in enumerate(by_clip):
                yield {
                    "clip": rows.clips[clip].name, "group": split.groups[clip], "point": point,
                    "seed": seed, "kl": kl, **{k: v[row] for k, v in without.items()},
                    "kl_kept": kept,
                }  # fmt: skip


def _readout(
    rows: ClipRows, x: ALMInput, edits: Mapping[str, RowEdit] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities of the next token at each prompt's readout."""
    hooks = splice_hooks(rows.model, x, edits or {}, rows.config.spans)
    logits = rows.model.run_with_hooks(x, fwd_hooks=hooks)
    at = [x.spans.positions("readout", row)[-1] for row in range(len(x))]
    chosen: Tensor = logits[torch.arange(len(x)), torch.tensor(at)]
    return chosen.double().log_softmax(-1)
