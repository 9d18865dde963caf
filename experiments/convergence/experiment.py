"""Do measures of where an encoder commits turn at the same depth?

Per clip: the depth from which the transcript is near the final one, at which the final transcript
becomes likely, from which the decoder settles its tokens, and at which the encoder's stream takes
its largest step towards its last state.

Source: the triple convergence of seed 003; M-TC.
"""

from collections.abc import Iterator

import pandas as pd

from ..materials.clips import ClipFile
from ..materials.read_by_depth import ReadByDepthExperiment
from ..workbench.experiment import UnitResult
from ..workbench.page import Page
from .claims import CLAIMS, CONTROLS
from .measure import DepthMeasures
from .pages import CAVEATS, fill_page, lead, method
from .settings import DEFECTS, ConvergenceConfig
from .tables import TABLES, AgreementResults, summarise
from .truths import TRUTHS


class Convergence(ReadByDepthExperiment[ConvergenceConfig]):
    """Triple convergence on any model whose audio encoder is hooked."""

    name = "convergence"
    title = "Convergence"
    question = "Do measures of where an encoder commits turn at the same depth?"
    Config = ConvergenceConfig
    tables, controls, claims, caveats = TABLES, CONTROLS, CLAIMS, CAVEATS
    defects = DEFECTS
    truths = TRUTHS

    def read(self, clip: ClipFile) -> UnitResult:
        """All depths of a clip."""
        return DepthMeasures(self.model, self.ours, clip).result(self.config)

    def summaries(self, run: AgreementResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of their depths."""
        yield "manifest", self.listed(run)
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
