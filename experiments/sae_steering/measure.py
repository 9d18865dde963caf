"""Clips heard through an encoder whose rows are changed, and what is active in them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.dictionary.autoencoder import SparseAutoencoder
from hooked_alm.methods.dictionary.splice import RowEdit, splice_hooks
from hooked_alm.methods.dictionary.steering import Activity

from ..materials.clip_activities import activity_features
from ..materials.clips import ClipFile
from ..materials.kept_features import ClipFeatures
from ..materials.transcription import Transcription, whose
from ..workbench.results import Row
from .plan import Arm


class Steering:
    """A Whisper whose encoder's rows are changed at one point, by a dictionary of them."""

    def __init__(self, ours: Transcription, sae: SparseAutoencoder, point: str) -> None:
        self.ours, self.sae, self.point = ours, sae, point

    @torch.no_grad()
    def active(self, clips: Sequence[ClipFile]) -> tuple[list[Row], list[ClipFeatures]]:
        """What is active in some clips: a row of a table for each, and what is kept of it."""
        x = self.ours.unheard(clips)
        found = rows_of(self.ours.model, x, self.point)["encoder"]
        places = found.index["prompt"]
        rows, kept = list[Row](), list[ClipFeatures]()
        for i, clip in enumerate(clips):
            mine = found.values[self.point][torch.from_numpy(places == i)].float()
            activity, again = Activity.of(self.sae, [mine]), self.sae(mine)
            lost = (mine - again).square().sum() / (mine - mine.mean(0)).square().sum()
            rows.append({
                **whose(clip), "holds": self.ours.holds(clip), "rows": len(mine),
                "l0": float(activity.frequency.sum()), "unexplained": float(lost),
            })  # fmt: skip
            kept.append(activity_features(activity))
        return rows, kept

    def as_is(self, clips: Sequence[ClipFile]) -> list[Row]:
        """Clips as the model writes them down."""
        said = self.ours.write(self.ours.prompts(clips))
        return [self.ours.row(clip, tokens) for clip, tokens in zip(clips, said, strict=True)]

    @torch.no_grad()
    def steered(self, clips: Sequence[ClipFile], arm: Arm, alpha: float) -> list[Row]:
        """Clips as it writes them down while rows are changed.

        ``moved`` is how far the rows of a clip are moved, relative to their length; ``off`` how
        far, likewise, rows without features are from all other features decoded, plus what the
        dictionary does not reconstruct: where features are taken out at strength 1, else NaN.
        """
        model, x = self.ours.model, self.ours.unheard(clips)
        assert model.audio is not None
        seen = _Watched(arm.edit(self.sae, alpha))
        # The encoder hears a clip once, before anything is written.
        with model.hooks(fwd_hooks=splice_hooks(model, x, {self.point: seen})):
            memory = model.audio.heard(x)
        said = self.ours.write(replace(x, memory=memory))
        n_rows = model.encoder_rows(x).prompts.spans.mask("audio").sum(1).tolist()
        before, after = seen.before.split(n_rows), seen.after.split(n_rows)
        without = after
        if is_checked := arm.name == "features" and alpha == 1:
            without = self._without(seen.before, arm).split(n_rows)
        return [
            {
                **self.ours.row(clip, said[i]), "arm": arm.name, "draw": arm.draw, "alpha": alpha,
                "moved": _relative(after[i] - before[i], before[i]),
                "off": _relative(after[i] - without[i], before[i]) if is_checked else np.nan,
            }
            for i, clip in enumerate(clips)
        ]  # fmt: skip

    def _without(self, rows: Tensor, arm: Arm) -> Tensor:
        """Rows without some features, put together from what is left."""
        features = self.sae.encode(rows)
        error = rows - self.sae.decode(features)
        return self.sae.decode(features.index_fill(1, torch.tensor(arm.latents), 0.0)) + error


class _Watched:
    """An edit that keeps the rows before and after."""

    before: Tensor
    after: Tensor

    def __init__(self, edit: RowEdit) -> None:
        self.edit = edit

    def __call__(self, rows: Tensor) -> Tensor:
        self.before, self.after = rows, self.edit(rows)
        return self.after


def _relative(apart: Tensor, rows: Tensor) -> float:
    return float(apart.norm(dim=-1).sum() / rows.norm(dim=-1).sum())
