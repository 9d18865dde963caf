"""Which components make a recogniser write the word that context calls for?

Sentences that call for one word, in which another is said: every component of encoder and decoder
is patched, step by step, towards what it does where nothing of the sentence is heard, and it is
read off whether the word that is said becomes the likelier one.

Source: Beyond Transcription (arXiv 2508.15882); M-BT-4.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from hooked_alm.errors import InputError

from ..materials.clips import Sounds, sound_units
from ..materials.records import collect
from ..materials.transcription import TranscriptionExperiment
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from .claims import CLAIMS, CONTROLS
from .items import context_items
from .measure import Patcher, check_donor, patched_points
from .pages import CAVEATS, fill_page, lead, method
from .settings import ComponentPatchingConfig
from .tables import TABLES, PatchingResults, summarise


class ComponentPatching(TranscriptionExperiment[ComponentPatchingConfig]):
    """Component patching on any recogniser whose encoder is hooked."""

    name = "component_patching"
    title = "Component patching"
    question = "Which components make a recogniser write the word that context calls for?"
    Config = ComponentPatchingConfig
    tables, controls, claims, caveats = TABLES, CONTROLS, CLAIMS, CAVEATS

    def check_model(self) -> None:
        """Refuse an encoder without hooks, where it is to be patched, and sites that are not."""
        if not patched_points(self.model, self.config):
            raise InputError(
                f"patching {self.config.model!r}: neither {' nor '.join(self.config.stacks)} has "
                f"any of the sites {', '.join(self.config.sites)}. Add attn, mlp or block."
            )

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and tells their words apart."""
        about = super().identify()
        self.items = context_items(self.ours)
        ours = self.ours
        collect(
            "pairing clips", lambda one: check_donor(ours, one), self.items,
            lambda one: one.clip.where,
        )  # fmt: skip
        return about

    def load(self) -> None:
        """Loads the weights."""
        super().load()
        self.patcher = Patcher(self.model, self.ours, self.config)

    def units(self) -> list[Unit]:
        """A unit for each sentence that is asked about, then how the clips sound."""
        units = [Unit(f"clip__{one.clip.name}", one) for one in self.items]
        return units + sound_units(self.ours.clips)

    def measure(self, unit: Unit) -> UnitResult:
        """All components of a clip, or the sound of some clips."""
        work = unit.payload
        return work.measured() if isinstance(work, Sounds) else self.patcher.result(work)

    def summaries(self, run: PatchingResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of their cells."""
        yield "manifest", self.listed(run)
        yield from summarise(run)

    def lead(self, run: PatchingResults) -> str:
        """What was patched, and why."""
        return lead(run)

    def page(self, page: Page, run: PatchingResults) -> None:
        """The clips, what every component restores, and how it grows with the strength."""
        fill_page(page, run, self.items)

    def method(self, run: PatchingResults) -> str:
        """How values and intervals were made."""
        return method(run)
