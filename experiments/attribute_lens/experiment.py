"""Where are a clip's attributes read, and how does the answer get at them?

Every clip is asked for its attributes in up to three formats. The lens says from which depth on the
label can be read, at the readout and at the word that names the attribute; attention knockout, what
is answered without the audio, and enrichment say what is used.

Source: AudioLens (Neo Ho et al. 2025); M-AL-1 to M-AL-5.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from hooked_alm.inputs import ALMInput

from ..materials.attribute_experiment import AttributeWork
from ..materials.clips import sound_units
from ..materials.enrichment import ENRICHMENT_DEFECTS, EnrichmentExperiment
from ..materials.trained_lens import described_lens, open_lens
from ..workbench.experiment import Unit
from ..workbench.page import Page
from ..workbench.results import ItemRows
from .claims import CLAIMS, CONTROLS
from .measure import AttributeMeasures, Knockouts, Reading
from .pages import CAVEATS, fill_page, lead, method
from .settings import AttributeLensConfig
from .tables import MAY_LACK, TABLES, AttributeResults, summarise
from .truths import TRUTHS


class AttributeLens(EnrichmentExperiment[AttributeLensConfig]):
    """AudioLens on any model with an audio front-end, any attributes and labels."""

    name = "attribute_lens"
    title = "Attribute lens"
    question = "Where are a clip's attributes read, and how does the answer get at them?"
    Config = AttributeLensConfig
    tables, may_lack = TABLES, MAY_LACK
    defects, controls, claims, caveats = ENRICHMENT_DEFECTS, CONTROLS, CLAIMS, CAVEATS
    truths = TRUTHS

    def identify(self) -> dict[str, Any]:
        """Reads the clips and the lens, and checks every prompt and what is to be enriched."""
        return {**super().identify(), **described_lens(self.config.tuned_lens)}

    def load(self) -> None:
        """Loads the weights, and the lens."""
        super().load()
        self.lenses = {"logit": open_lens(None, self.model)}
        if self.config.tuned_lens is not None:
            self.lenses["tuned"] = open_lens(self.config.tuned_lens, self.model)

    def units(self) -> list[Unit]:
        """Readings, knockouts, and the search for an enrichment; then how the clips sound."""
        asked = [self.asked(*item) for item in self.items]
        units = self.batched(map(Reading, self.readings())) + self.batched(map(Knockouts, asked))
        return units + self.searches() + sound_units(self.recordings)

    def tables_of(self, works: Sequence[AttributeWork], x: ALMInput) -> dict[str, ItemRows]:
        """Some forwards with their read-outs, or some sweeps."""
        prompts, attribute = [work.prompt for work in works], works[0].prompt.attribute
        ours = AttributeMeasures(
            self.model, self.prompts.labels[attribute], prompts, x, self.config, self.lenses,
            self.prompts.mention(attribute, x),
        )  # fmt: skip
        if isinstance(works[0], Knockouts):
            return {"knockout": ours.knockouts()}
        if not isinstance(works[0], Reading):
            return self.enriched(works, ours)
        if (heard := prompts[0].heard) != "audio":
            return {"absences": ours.answers(heard=heard)}
        return ours.reading()

    def summaries(self, run: AttributeResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield from super().summaries(run)
        yield from summarise(run)

    def lead(self, run: AttributeResults) -> str:
        """What was asked of which clips."""
        return lead(run)

    def page(self, page: Page, run: AttributeResults) -> None:
        """What was asked, answers, lens, attention and enrichment."""
        fill_page(page, run, self.recordings)

    def method(self, run: AttributeResults) -> str:
        """How scores and intervals were made."""
        return method(run)
