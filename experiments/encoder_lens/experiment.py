"""At which depth is a transcript settled, in the encoder and in the decoder?

Every clip is written down once for each depth of the encoder, by the model's own final norm and an
unchanged decoder; and the logit lens reads at which depth of the decoder each token is settled.

Source: Beyond Transcription (arXiv 2508.15882), DecoderLens (arXiv 2310.03686); M-BT-1 to M-BT-3.
"""

from collections.abc import Iterator

import pandas as pd

from ..materials.clips import ClipFile
from ..materials.read_by_depth import ReadByDepthExperiment
from ..workbench.experiment import UnitResult
from ..workbench.page import Page
from .claims import CLAIMS, CONTROLS
from .measure import ClipReader
from .pages import CAVEATS, fill_page, lead, method
from .settings import EncoderLensConfig
from .tables import TABLES, DepthResults, summarise


class EncoderLens(ReadByDepthExperiment[EncoderLensConfig]):
    """The encoder lens on any model whose audio encoder is hooked."""

    name = "encoder_lens"
    title = "Encoder lens"
    question = "At which depth is a transcript settled, in the encoder and in the decoder?"
    Config = EncoderLensConfig
    tables, controls, claims, caveats = TABLES, CONTROLS, CLAIMS, CAVEATS

    def read(self, clip: ClipFile) -> UnitResult:
        """All depths of a clip."""
        return ClipReader(self.model, self.ours, clip).result()

    def summaries(self, run: DepthResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of their depths."""
        yield "manifest", self.listed(run)
        yield from summarise(run)

    def lead(self, run: DepthResults) -> str:
        """What was read at which depths."""
        return lead(run)

    def page(self, page: Page, run: DepthResults) -> None:
        """Transcripts, how good they are at every depth, and the decoder's tokens."""
        fill_page(page, run, self.ours)

    def method(self, run: DepthResults) -> str:
        """How transcripts and intervals were made."""
        return method(run)
