"""Do the decoder's states tell, where it ends a transcript, that it is wrong?

Clips are written down; probes read off the stream, at the step that decides whether to end, whether
the transcript is right, and whether anything was said at all. They are held against what needs no
state: durations, numbers of tokens, log-probabilities, compression ratios.

Source: Beyond Transcription (arXiv 2508.15882); M-BT-5.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.depths import PlacedPoint

from ..materials.clips import ClipFile, Sounds, sound_units
from ..materials.held_out_labels import check_grouped, held_out_by
from ..materials.kept_features import ClipFeatures, keep_features
from ..materials.probe_claims import PROBE_CONTROLS, PROBE_DEFECTS, probe_claims
from ..materials.probe_fits import ProbeFit, fit_units
from ..materials.transcript_tables import MOST_NOT_GREEDY
from ..materials.transcription import WORDS, TranscriptionExperiment
from ..workbench.controls import Control, Outcome, at_most
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from .measure import baselines_of, transcript_rows
from .pages import CAVEATS, fill_page, lead, method
from .plan import Unread, labels_of
from .settings import TranscriptProbesConfig
from .tables import MAY_LACK, TABLES, TranscriptResults, summarise_transcripts


def _is_greedy(run: TranscriptResults) -> Outcome:
    return at_most(run["transcripts"].not_greedy.mean(), MOST_NOT_GREEDY, "of the tokens")


class TranscriptProbes(TranscriptionExperiment[TranscriptProbesConfig]):
    """Units write some clips down and keep features; further ones fit probes of them."""

    name = "transcript_probes"
    title = "Transcript probes"
    question = "Do the decoder's states tell, where it ends a transcript, that it is wrong?"
    Config = TranscriptProbesConfig
    tables, may_lack, caveats = TABLES, MAY_LACK, CAVEATS
    controls = (
        *PROBE_CONTROLS,
        Control(
            name="the transcript is what one pass finds likeliest", of=("transcripts", "reads"),
            check=_is_greedy,
            guards_against="states that are read at another position than the one that ends it",
        ),
    )  # fmt: skip
    claims = probe_claims("decodable", "deeper", "selective")
    defects = PROBE_DEFECTS
    leaves = ("arrays",)

    def identify(self) -> dict[str, Any]:
        """Reads the clips, and what is said in them."""
        found, clips = super().identify(), self.ours.clips
        if self.ours.words is None:
            raise InputError(
                f"probing transcripts: the clips have no column {' or '.join(WORDS)}, expected "
                "what is said in each, and empty cells where nothing is. Add it to their table."
            )
        self.by = held_out_by(clips, self.config)
        check_grouped([one for one in clips if self.ours.holds(one) == "speech"], self.by)
        return {**found, "baselines": baselines_of(self.model)}

    # --- Units

    def units(self) -> list[Unit]:
        """Units that write some clips down, then how the clips sound."""
        clips, size = self.ours.clips, self.config.batch_size
        units = [
            Unit(f"transcripts__{first:06d}", tuple(clips[first : first + size]))
            for first in range(0, len(clips), size)
        ]
        return units + sound_units(clips)

    def further_units(self, tables: Tables) -> list[Unit]:
        """A unit for each label and baseline, and each label and depth."""
        labels, unread = labels_of(self.ours.clips, tables["transcripts"], self.by, self.config)
        points = [
            PlacedPoint(name, "decoder", depth)
            for depth, name in enumerate(self.model.depth_names())
        ]
        baselines = baselines_of(self.model)
        units = fit_units(labels, baselines, {"model": points}, tables["features"])
        return units + ([Unit("unread", unread)] if unread.why else [])

    def measure(self, unit: Unit) -> UnitResult:
        """Some transcripts, how clips sound, or the probes of a label and a depth."""
        work = unit.payload
        if isinstance(work, Sounds):
            return work.measured()
        if isinstance(work, Unread):
            return work.result()
        if isinstance(work, ProbeFit):
            names = [one.name for one in self.ours.clips]
            return work.result(self.folder, names, self.config)
        x = self.ours.prompts(work)
        said = self.ours.write(x)
        rows = [*self.along(work, x, said)]
        kept = keep_features(self.folder, unit.id, "model", [features for _, features in rows])
        return UnitResult(
            {**kept.tables, "transcripts": [row for row, _ in rows]}, {"tokens": said}
        )

    def along(
        self, clips: Sequence[ClipFile], x: ALMInput, said: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Row, ClipFeatures]]:
        """Reads transcripts once more; see `transcript_rows`."""
        yield from transcript_rows(self.ours, clips, x, said)

    # --- What is made of it

    def summaries(self, run: TranscriptResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what is made of their transcripts and probes."""
        yield "manifest", self.listed(run)
        yield from summarise_transcripts(run)

    def lead(self, run: TranscriptResults) -> str:
        """What was written down, and what was read of it."""
        return lead(run)

    def page(self, page: Page, run: TranscriptResults) -> None:
        """Transcripts and their labels, then every label by depth."""
        fill_page(page, run, self.ours)

    def method(self, run: TranscriptResults) -> str:
        """How transcripts, probes and intervals were made."""
        return method(run)
