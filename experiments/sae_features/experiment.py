"""Features of a sparse autoencoder: on what do they fire, and when in it?

A dictionary is read on clips: which features are active in which, where in the clip most, and
whether more of them are of one domain (a voice's emotion, a speaker) than if domains were dealt out
at random. The strongest clips of some features are played, with the activation by time below.

Source: M-SAE-5, M-SAE-7.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from hooked_alm.errors import InputError
from hooked_alm.points import ENCODER

from ..materials.clip_rows import ClipRows
from ..materials.recordings import load_clips
from ..materials.subject import ModelExperiment
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from .claims import CLAIMS, CONTROLS
from .pages import CAVEATS, fill_page, lead, method
from .settings import SAEFeaturesConfig
from .tables import TABLES, FeatureResults, shown_features, strongest_clips, summarise

N_PROMOTED = 5
"""Tokens of a feature that its page names."""


@dataclass(frozen=True)
class _Shown:
    """Features that are shown, each with its strongest clips; the payload of a unit."""

    clips: dict[int, tuple[int, ...]]


class SAEFeatures(ModelExperiment[SAEFeaturesConfig]):
    """Units read some clips; a further one reads the shown features row by row."""

    name = "sae_features"
    title = "Features"
    question = "On what do the features of a sparse autoencoder fire?"
    Config = SAEFeaturesConfig
    tables, controls, claims, caveats = TABLES, CONTROLS, CLAIMS, CAVEATS

    def identify(self) -> dict[str, Any]:
        """Reads dictionary and clips, and refuses what does not go together."""
        config = self.config
        dictionary = config.read_dictionary()
        self.sae, self.point = dictionary.sae, dictionary.point
        self.clips = load_clips(config.source)
        self.domains = [self._domain(number) for number in range(len(self.clips))]
        self.model = self.lay_out(hears=True)
        self.rows = ClipRows.planned(self.model, self.clips, [self.point], config)
        dictionary.check(self.rows.points[0], config.dictionary)
        if wrong := [i for i in config.features or () if not 0 <= i < self.sae.cfg.d_sae]:
            raise InputError(
                f"showing features {wrong}: the dictionary has 0 to {self.sae.cfg.d_sae - 1}."
            )
        return {
            **self.rows.described,
            "dictionary": dictionary.described,
            "domains": {value: self.domains.count(value) for value in sorted({*self.domains})},
            "rows": self.rows.count(range(len(self.clips))),
        }  # fmt: skip

    def _domain(self, number: int) -> str:
        clip, column = self.clips[number], self.config.domain
        if not clip.cells.get(column):
            raise InputError(
                f"{clip.where}: {column}: missing, expected the clip's domain. Fill it in, or name "
                "another column: -s domain=..."
            )
        return clip.cells[column]

    def load(self) -> None:
        """Loads the weights; the dictionary goes where the model is."""
        super().load()
        self.sae.to(self.model.cfg.device)

    # --- Units

    def units(self) -> list[Unit]:
        """Units for some parts of the clips each."""
        parts = self.rows.parts(range(len(self.clips)))
        size = self.config.unit_batches
        return [
            Unit(f"clips__{first:05d}", parts[first : first + size])
            for first in range(0, len(parts), size)
        ]

    def further_units(self, tables: Tables) -> list[Unit]:
        """A unit for the features that are shown."""
        numbers = {clip.name: number for number, clip in enumerate(self.clips)}
        shown = {
            feature: tuple(numbers[clip] for clip in strongest_clips(tables, feature, self.config))
            for feature in shown_features(tables, self.domains_by_clip, self.config)
        }
        return [Unit("shown", _Shown(shown))] if shown else []

    @property
    def domains_by_clip(self) -> dict[str, str]:
        """Domain of every clip, by its name."""
        return {clip.name: one for clip, one in zip(self.clips, self.domains, strict=True)}

    def measure(self, unit: Unit) -> UnitResult:
        """What is active in some clips, or the shown features row by row."""
        work = unit.payload
        if isinstance(work, _Shown):
            return self._show(work)
        found = UnitResult({"activity": [], "clips": []})
        for part in work:
            for clip, features, seconds in self._features(part):
                self._add(found, clip, features, seconds)
        return found

    @torch.no_grad()
    def _features(self, part: list[int]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Clip, features of its rows, and where in it they begin, of clips that run together."""
        rows = self.rows.run(part)
        features = self.sae.encode(rows.values[self.rows.points[0].name].float())
        seconds = torch.from_numpy(rows.index["seconds"])
        pairs = zip(
            self.rows.by_clip(features, part), self.rows.by_clip(seconds, part), strict=True
        )
        return [(clip, *pair) for clip, pair in zip(part, pairs, strict=True)]

    def _add(
        self, found: UnitResult, clip: int, features: torch.Tensor, seconds: torch.Tensor
    ) -> None:
        name, is_on = self.clips[clip].name, features > 0
        highest, place = features.max(0)
        share, mean = is_on.double().mean(0), features.double().mean(0)
        found.tables["clips"].append(
            {"clip": name, "rows": len(features), "l0": float(is_on.sum(1).double().mean())}
        )
        for latent in is_on.any(0).nonzero().flatten().tolist():
            found.tables["activity"].append({
                "clip": name, "feature": latent, "highest": float(highest[latent]),
                "at": float(seconds[int(place[latent])]), "share": float(share[latent]),
                "mean": float(mean[latent]),
            })  # fmt: skip

    def _show(self, work: _Shown) -> UnitResult:
        needed = sorted({clip for clips in work.clips.values() for clip in clips})
        by_clip = {
            clip: (features, seconds)
            for part in self.rows.parts(needed)
            for clip, features, seconds in self._features(part)
        }
        frames: list[Row] = []
        for feature, clips in work.clips.items():
            for clip in clips:
                values, seconds = by_clip[clip]
                for row, value in enumerate(values[:, feature].tolist()):
                    frames.append({
                        "feature": feature, "clip": self.clips[clip].name, "row": row,
                        "seconds": float(seconds[row]), "activation": value,
                    })  # fmt: skip
        return UnitResult({"frames": frames, "promoted": self._promoted([*work.clips])})

    def _promoted(self, features: list[int]) -> list[Row]:
        """Tokens that each feature's direction raises most, read as the final norm scales them."""
        model = self.model
        is_of_stream = self.sae.cfg.d_in == model.cfg.d_model
        if not is_of_stream or self.point.startswith(ENCODER):
            return []
        directions = self.sae.W_dec[features] * getattr(model.head_norm, "weight", 1.0)
        logits = directions.float() @ model.head_unembed.directions().float().T
        logits -= logits.mean(-1, keepdim=True)
        best = logits.topk(N_PROMOTED)
        return [
            {"feature": feature, "rank": rank, "token": model.to_string([token]), "logit": logit}
            for feature, tokens, values in zip(
                features, best.indices.tolist(), best.values.tolist(), strict=True
            )
            for rank, (token, logit) in enumerate(zip(tokens, values, strict=True))
        ]

    # --- What is made of it

    def summaries(self, run: FeatureResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """Every feature, and how many are of each domain."""
        return summarise(run, self.domains_by_clip)

    def lead(self, run: FeatureResults) -> str:
        """What was read on what."""
        return lead(run)

    def page(self, page: Page, run: FeatureResults) -> None:
        """Domains, then the shown features with their clips."""
        fill_page(page, run, self.clips)

    def method(self, run: FeatureResults) -> str:
        """How features were read and domains judged."""
        return method(run)
