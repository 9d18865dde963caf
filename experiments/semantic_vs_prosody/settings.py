"""Settings of ``semantic_vs_prosody``, and what seed 001's own choices got wrong.

``variant: seed`` changes the defaults of the switches below to what the seed did; each switch can
also be set by itself. The known defects of a run follow from its switches, not from its name.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from hooked_alm.methods.patching.alignment import AlignPolicies
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.reading.labels import LabelMode

from ..materials.bundled import PREFIX
from ..workbench.experiment import ExperimentConfig
from .flips import Delta, Ties
from .items import EMOTIONS, PAIR_TYPES, QUESTIONS, PairType

SweepControl = Literal["self", "same_labels", "silence", "noise"]
CONTROLS: tuple[SweepControl, ...] = ("self", "same_labels", "silence", "noise")
Align = Literal["error", "resample_linear", "nearest", "truncate", "pad_last", "dtw"]
LensSource = Literal["hooks", "hf_tuple"]
FlipCondition = Literal["movable", "all"]

SPANS: dict[str, tuple[str, ...]] = {
    "audio": ("audio",),
    "text": ("text",),
    "struct": ("audio_struct", "struct"),
    "readout": ("readout",),
    "all": ("audio", "text", "audio_struct", "struct", "readout", "sink"),
}
"""What is patched together, under which name."""

SEED_DEFAULTS: dict[str, Any] = {
    "lens_source": "hf_tuple",
    "ties": "first",
    "fidelity": False,
    "flip_condition": "all",
    "delta": "logit",
    "spans": ("audio",),
    "controls": (),
}


class SemanticVsProsodyConfig(ExperimentConfig):
    """What to run; see the switches' defaults for the corrected experiment."""

    model: str = Field(
        default="bundled:follows_semantics", description="id, folder or bundled:NAME"
    )
    audio: str = Field(
        default="bundled",
        description="manifest.csv (path, semantic_label, prosody_label, speaker, text), or its "
        "folder",
    )
    prompt: str = Field(default=QUESTIONS["overall"], min_length=1)
    labels: Mapping[str, str | tuple[str, ...]] = Field(
        default_factory=lambda: {str(emotion): str(emotion) for emotion in EMOTIONS},
        description="label -> how the answer spells it",
    )
    label_mode: LabelMode = "first_token"
    truncate: bool = Field(
        default=False, description="cut over-long clips instead of refusing them"
    )
    pair_types: tuple[PairType, ...] = Field(default=PAIR_TYPES, min_length=1)
    n_pairs: int | None = Field(
        default=60,
        ge=1,
        description="pairs of each type, before they are reversed; None is all there are",
    )
    align: Align = Field(default="resample_linear", description="clips of unequal duration")
    spans: tuple[str, ...] = tuple(SPANS)
    controls: tuple[SweepControl, ...] = CONTROLS
    lens_source: LensSource = Field(
        default="hooks",
        description="hf_tuple: hidden_states[1:], whose last entry has passed the final norm",
    )
    ties: Ties = "split"
    fidelity: bool = Field(default=True, description="how far the lens is from the output")
    flip_condition: FlipCondition = Field(
        default="movable",
        description="pairs in the main flip rates: those whose donor says the target and whose "
        "base does not, or all",
    )
    delta: Delta = "logit_diff"
    min_effect: float = Field(
        default=0.5, gt=0, description="logits; recovery is undefined below this total effect"
    )
    cluster: Literal["text", "speaker", "item"] = Field(
        default="text", description="what intervals resample: whole sentences, speakers, or clips"
    )
    n_resamples: int = Field(default=2000, ge=1000)
    engine: Engine = Field(default="fast", description="hooks is one whole forward per cell")
    max_bytes: int = Field(
        default=2**28,
        ge=1,
        description="activations that the fast engine holds; fixed, so that results do not depend "
        "on what memory is free",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_variant(cls, values: dict[str, Any]) -> dict[str, Any]:
        defaults = dict(SEED_DEFAULTS) if values.get("variant") == "seed" else {}
        if str(values.get("model", PREFIX)).startswith(PREFIX):
            defaults["n_threads"] = 1  # matrices this small are slower on several threads
        return {**defaults, **values}

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "SemanticVsProsodyConfig":
        if len(self.labels) < 2:
            raise ValueError("labels must name at least two emotions")
        if self.label_mode == "sequence":
            raise ValueError(
                "label_mode 'sequence' has no lens: use first_token or variants, and labels that "
                "begin with different tokens"
            )
        wrong = [name for name in self.spans if name not in SPANS]
        if wrong or "audio" not in self.spans or len(set(self.spans)) < len(self.spans):
            raise ValueError(
                f"spans must be some of {', '.join(SPANS)}, each once and audio among them"
            )
        return self

    def align_policies(self) -> AlignPolicies:
        """For clips of unequal duration what is set; the prompt's words are the same."""
        return {"audio": self.align}

    def known_defects(self) -> dict[str, str]:
        """Defects of this run's settings, by their number in the correction register."""
        found: dict[str, str] = {}
        if self.lens_source == "hf_tuple":
            found["C6"] = (
                "The lens norms Hugging Face's hidden_states, whose last entry has passed the "
                "final norm already: the last point of its curves is not the model's output."
            )
        if self.ties == "first":
            found["M-001-2"] = (
                "A tie goes to the label that is listed first, so that win rates lean towards it."
            )
        if self.flip_condition == "all":
            found["C7"] = (
                "Flip to target is counted over all pairs, without base rate and ceiling: it holds "
                "pairs that were at the target before, and cannot exceed how often the donor "
                "itself says the target."
            )
        if self.delta == "logit":
            found["C31"] = (
                "The shift is that of a single logit, which moves with any shift of all logits."
            )
        if not self.fidelity:
            found["C32"] = (
                "The lens' distance from the output is not shown: a margin near 0 in early layers "
                "may only say that the lens reads nothing there."
            )
        if not {*self.controls} - {"self"}:
            found["M-001-5"] = (
                "No other donors are patched: that the answer moves is not told apart from what "
                "any other audio would do."
            )
        if "readout" not in self.spans:
            found["M-001-8"] = (
                "Only the audio is patched: that its effect decays does not say where the "
                "information went."
            )
        return found
