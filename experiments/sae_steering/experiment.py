"""Does taking out the features of non-speech stop a model from writing about noise?

Clips are split in two. On some it is seen which features of a dictionary are more active where
nothing is said; the others are written down as the model is, and with these features taken out of
what its encoder hears, beside controls that change as much: how often words are written of nothing,
and how many words of speech are wrong.

Source: AudioSAE (arXiv 2602.05027); M-SAE-3.
"""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from hooked_alm.errors import InputError
from hooked_alm.methods.activations.selection import kept_points

from ..materials.clip_activities import read_activities
from ..materials.clips import ClipFile, Sounds, sound_units
from ..materials.kept_features import files_of, keep_features
from ..materials.transcription import TranscriptionExperiment
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Tables
from .claims import CLAIMS, CONTROLS
from .measure import Steering
from .pages import CAVEATS, fill_page, lead, method
from .plan import ChoiceClips, LatentRows, Steered, Unsteered, arms, halves, strengths
from .settings import SAESteeringConfig
from .tables import TABLES, SteeringResults, summarise
from .truths import TRUTHS


class SAESteering(TranscriptionExperiment[SAESteeringConfig]):
    """Features of non-speech, taken out of a Whisper's encoder."""

    name = "sae_steering"
    title = "SAE steering"
    question = (
        "Does taking out the features of non-speech stop a model from writing about noise, and "
        "what does it cost in words?"
    )
    Config = SAESteeringConfig
    tables = TABLES
    controls, claims, caveats = CONTROLS, CLAIMS, CAVEATS
    leaves = ("arrays",)
    truths = TRUTHS

    def identify(self) -> dict[str, Any]:
        """Reads dictionary and clips, and decides on which of these features are chosen."""
        self.dictionary = self.config.read_dictionary()
        found = super().identify()
        self.parts = halves(self.ours, self.config)
        return {**found, "dictionary": self.dictionary.described, "parts": self.parts}

    def check_model(self) -> None:
        """Refuse a model that does not transcribe, and a dictionary of other rows."""
        config, dictionary = self.config, self.dictionary
        assert self.model.audio is not None
        if not self.model.audio.is_memory:
            raise InputError(
                f"steering what {config.model!r} writes down: got a model that answers prompts, "
                "expected one that transcribes, such as Whisper. What features do to answers is "
                "sae_patching's question."
            )
        (point,) = kept_points(self.model, dictionary.point)
        if point.kind != "encoder":
            raise InputError(
                f"steering by {config.dictionary}: got a dictionary of {point.name}, expected one "
                "of the encoder's rows, audio.encoder....; the decoder has none that hear a clip. "
                "Train one: hooked-alm run sae_train -s 'points=[audio.encoder.blocks."
                "*.hook_resid_post]'"
            )
        dictionary.check(point, config.dictionary)
        if 2 * config.n_latents > (n := dictionary.sae.cfg.d_sae):
            raise InputError(
                f"choosing n_latents={config.n_latents} features: the dictionary has {n}, expected "
                "twice as many as are chosen, for as many others beside them. Choose fewer."
            )

    def load(self) -> None:
        """Loads the weights; the dictionary goes where the model is."""
        super().load()
        sae = self.dictionary.sae.to(self.model.cfg.device)
        self.steering = Steering(self.ours, sae, self.dictionary.point)

    def units(self) -> list[Unit]:
        """Batches of clips on which features are chosen, of the others, then how all sound."""
        chosen = [
            Unit(f"chosen__{first}", ChoiceClips(some))
            for first, some in self._batches("discovery")
        ]
        as_is = [
            Unit(f"as_is__{first}", Unsteered(some)) for first, some in self._batches("held-out")
        ]
        return chosen + as_is + sound_units(self.ours.clips)

    def _batches(self, part: str) -> Iterator[tuple[str, tuple[ClipFile, ...]]]:
        clips = [clip for clip in self.ours.clips if self.parts[clip.name] == part]
        size = self.config.batch_size
        for start in range(0, len(clips), size):
            yield clips[start].name, tuple(clips[start : start + size])

    def further_units(self, tables: Tables) -> list[Unit]:
        """The clips on which nothing was chosen, under every arm at every strength."""
        files = files_of(tables["features"])
        known = read_activities(self.folder, files)
        is_silent = (tables["chosen"].holds == "no_speech").to_numpy()
        no_speech, speech = known.of(is_silent), known.of(~is_silent)
        every = arms(self.dictionary.sae, no_speech, speech, self.config)
        units = [Unit("latents", LatentRows.of(every, no_speech, speech))]
        for arm, alpha in strengths(every, self.config):
            draw = f"_{arm.draw}" if arm.name == "random" else ""
            units += [
                Unit(
                    f"{arm.name}{draw}__{alpha:g}__{first}",
                    Steered(arm, alpha, some),
                )
                for first, some in self._batches("held-out")
            ]
        return units

    def measure(self, unit: Unit) -> UnitResult:
        """Some clips as they are, or steered; what is active in them; or how they sound."""
        work = unit.payload
        if isinstance(work, Sounds):
            return work.measured()
        if isinstance(work, LatentRows):
            return UnitResult({"latents": [*work.rows]})
        if isinstance(work, ChoiceClips):
            rows, kept = self.steering.active(work.clips)
            tables = keep_features(self.folder, unit.id, "model", kept).tables
            return UnitResult({"chosen": rows, **tables})
        if isinstance(work, Unsteered):
            return UnitResult({"transcripts": self.steering.as_is(work.clips)})
        return UnitResult({"steered": self.steering.steered(work.clips, work.arm, work.alpha)})

    def summaries(self, run: SteeringResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of their transcripts."""
        yield "manifest", self.listed(run)
        yield from summarise(run)

    def lead(self, run: SteeringResults) -> str:
        """What was taken out of what."""
        return lead(run)

    def page(self, page: Page, run: SteeringResults) -> None:
        """What is written of nothing, what steering does to it, and which features it takes."""
        fill_page(page, run, self.ours)

    def method(self, run: SteeringResults) -> str:
        """How features were chosen, and transcripts and intervals made."""
        return method(run)
