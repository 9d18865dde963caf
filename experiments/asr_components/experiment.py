"""Which heads of a decoder make a transcript go in circles, or out of nothing?

Clips are written down; what fails is screened by one gradient; then the first heads, and others of
about the same norm, are left out at every step of decoding, of all clips: what is cured, and what
it costs.

Source: Beyond Transcription (arXiv 2508.15882), Calm-Whisper (arXiv 2505.12969); M-BT-7.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pandas as pd

from hooked_alm.errors import InputError
from hooked_alm.methods.attribution.head_gates import HeadMeans, head_kinds

from ..materials.clips import ClipFile, Sounds, sound_units
from ..materials.kept_features import files_of, keep_features, kept_features
from ..materials.transcription import TranscriptionExperiment, whose
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from .claims import CLAIMS, CONTROLS
from .measure import Decoder, points_of
from .pages import CAVEATS, fill_page, lead, method
from .plan import FAILURES, AsIs, Failure, WithoutHead, chosen_nodes
from .settings import AsrComponentsConfig
from .tables import MAY_LACK, TABLES, ComponentResults, summarise
from .truths import TRUTHS


class AsrComponents(TranscriptionExperiment[AsrComponentsConfig]):
    """Heads that carry failures of transcription, on any model that writes down speech."""

    name = "asr_components"
    title = "ASR components"
    question = "Which heads of a decoder make a transcript go in circles, or out of nothing?"
    Config = AsrComponentsConfig
    tables, may_lack = TABLES, MAY_LACK
    controls, claims, caveats = CONTROLS, CLAIMS, CAVEATS
    leaves = ("arrays",)
    truths = TRUTHS
    truth_settings: ClassVar = {"scopes": ("cell",), "n_exact": 4, "n_random": 2}

    def check_model(self) -> None:
        """Refuse a decoder without the kinds of heads that are asked for."""
        config = self.config
        if lacking := [kind for kind in config.kinds if kind not in head_kinds(self.model)]:
            raise InputError(
                f"leaving out heads of {config.model!r}: its decoder has no {lacking[0]}-"
                "attention. Set kinds=[self]."
            )

    def load(self) -> None:
        """Loads the weights."""
        super().load()
        self.decoder = Decoder(self.model, self.ours)

    # --- Units

    def units(self) -> list[Unit]:
        """Batches of clips with all heads, then how the clips sound."""
        units = [Unit(f"as_is__{first.name}", AsIs(some)) for first, some in self._batches()]
        return units + sound_units(self.ours.clips)

    def further_units(self, tables: Tables) -> list[Unit]:
        """The same batches without each head that the screen has chosen."""
        screen = tables.get("screen")
        chosen = {} if screen is None or screen.empty else chosen_nodes(screen, self.config)
        means = files_of(tables["features"]) if self.config.ablation == "mean" else ()
        return [
            Unit(
                f"without__{node.name.replace(' ', '_')}__{first.name}",
                WithoutHead(node, some, ", ".join(why), means),
            )
            for node, why in chosen.items()
            for first, some in self._batches()
        ]

    def _batches(self) -> Iterator[tuple[ClipFile, tuple[ClipFile, ...]]]:
        clips, size = self.ours.clips, self.config.batch_size
        for start in range(0, len(clips), size):
            yield clips[start], tuple(clips[start : start + size])

    def measure(self, unit: Unit) -> UnitResult:
        """Some clips with all heads, or without one; or how they sound."""
        work = unit.payload
        if isinstance(work, Sounds):
            return work.measured()
        if isinstance(work, AsIs):
            return self._as_is(unit.id, work.clips)
        node = work.node
        x, stead = self.ours.prompts(work.clips), self._stead(work)
        about: Row = {"node": node.name, "kind": node.kind, "layer": node.layer}
        about |= {"head": node.head, "why": work.why}
        rows = [
            {**self.decoder.row(clip, tokens), **about}
            for clip, tokens in zip(work.clips, self.decoder.write(x, node, stead), strict=True)
        ]
        return UnitResult({"ablated": rows})

    def _stead(self, work: WithoutHead) -> HeadMeans:
        """What is written in a head's stead."""
        if not work.means:
            return {}
        return {
            name: kept_features(self.folder, name, work.means).mean(0)
            for name in points_of(self.model, work.node)
        }

    def _as_is(self, unit_id: str, clips: Sequence[ClipFile]) -> UnitResult:
        x, screen = self.ours.prompts(clips), list[Row]()
        rows, written = [], self.decoder.write(x)
        for i, (clip, tokens) in enumerate(zip(clips, written, strict=True)):
            rows.append(row := self.decoder.row(clip, tokens))
            is_invented = row["holds"] == "no_speech" and row["heard"] and tokens
            fails: dict[Failure, Any] = {"loop": row["loops"], "hallucination": is_invented}
            for of in (failure for failure in FAILURES if fails[failure]):
                found = self.decoder.screen(x[i], tokens, of)
                screen += [{**whose(clip), **one} for one in found]
        tables = {"transcripts": rows, **({"screen": screen} if screen else {})}
        if self.config.ablation == "mean":
            means = self.decoder.means(x, written, self.config.kinds)
            tables |= keep_features(self.folder, unit_id, "model", means).tables
        return UnitResult(tables, {"tokens": written})

    # --- What is made of it

    def summaries(self, run: ComponentResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of their transcripts."""
        yield "manifest", self.listed(run)
        yield from summarise(run)

    def lead(self, run: ComponentResults) -> str:
        """What was written down, and what fails."""
        return lead(run)

    def page(self, page: Page, run: ComponentResults) -> None:
        """What fails, which heads it rests on, and what leaving them out cures and costs."""
        fill_page(page, run, self.ours)

    def method(self, run: ComponentResults) -> str:
        """How transcripts, choices and intervals were made."""
        return method(run)
