"""Do measures of where an encoder commits turn at the same depth?

Per clip: the depth from which the transcript is near the final one, at which the final transcript
becomes likely, from which the decoder settles its tokens, and at which the encoder's stream takes
its largest step towards its last state.

Source: the triple convergence of seed 003; M-TC.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from ..materials.clips import Sounds, described_table, manifest, sound_units
from ..materials.subject import ModelExperiment, described
from ..materials.transcription import Transcription
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from .claims import CLAIMS, CONTROLS
from .measure import DepthMeasures
from .pages import CAVEATS, fill_page, lead, method
from .settings import DEFECTS, ConvergenceConfig
from .tables import TABLES, AgreementResults, summarise
from .truths import TRUTHS


class Convergence(ModelExperiment[ConvergenceConfig]):
    """Triple convergence on any model whose audio encoder is hooked."""

    name = "convergence"
    title = "Convergence"
    question = "Do measures of where an encoder commits turn at the same depth?"
    Config = ConvergenceConfig
    tables, controls, claims, caveats = TABLES, CONTROLS, CLAIMS, CAVEATS
    defects = DEFECTS
    truths = TRUTHS

    def identify(self) -> dict[str, Any]:
        """Reads the clips."""
        self.ours = Transcription(self.config)
        self.model = self.lay_out(hears=True)
        self.model.towards("encoder")  # refuses an encoder without hooks
        return {
            "model": described(self.model, self.config),
            **described_table(self.config.source),
            "clips": self.ours.described(self.ours.hear(self.model)),
        }

    def units(self) -> list[Unit]:
        """A unit for each clip, then how the clips sound."""
        units = [Unit(f"clip__{one.name}", one) for one in self.ours.clips]
        return units + sound_units(self.ours.clips)

    def measure(self, unit: Unit) -> UnitResult:
        """All depths of a clip, or the sound of some clips."""
        work = unit.payload
        if isinstance(work, Sounds):
            return work.measured()
        return DepthMeasures(self.model, self.ours, work).result(self.config)

    def summaries(self, run: AgreementResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of their depths."""
        yield "manifest", manifest(self.ours.clips, run["sounds"])
        yield from summarise(run)

    def lead(self, run: AgreementResults) -> str:
        """What is compared."""
        return lead(run)

    def page(self, page: Page, run: AgreementResults) -> None:
        """Curves, the depths at which they turn, and how often these agree."""
        fill_page(page, run)

    def method(self, run: AgreementResults) -> str:
        """How depths and chance were found."""
        return method(run)
