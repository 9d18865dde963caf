"""Settings of ``semantic_vs_prosody``, and what seed 001's own choices got wrong.

``variant: seed`` changes the defaults of the switches below to what the seed did; each switch can
also be set by itself. The known defects of a run follow from its switches, not from its name.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.reading.labels import LabelMode
from hooked_alm.methods.statistics.label_scores import Delta, Ties

from ..materials.sources import Source
from ..workbench.batches import BatchedConfig
from ..workbench.claims import Defect
from ..workbench.settings import EngineBytes, Truncate
from .items import EMOTIONS, PAIR_TYPES, QUESTIONS, PairType

SweepControl = Literal["self", "same_labels", "silence", "noise"]
CONTROL_DONORS: tuple[SweepControl, ...] = get_args(SweepControl)
Align = Literal["error", "resample_linear", "nearest", "truncate", "pad_last", "dtw"]

SPANS: dict[str, tuple[str, ...]] = {
    "audio": ("audio",),
    "text": ("text",),
    "struct": ("audio_struct", "struct"),
    "readout": ("readout",),
    "all": ("audio", "text", "audio_struct", "struct", "readout", "sink"),
}
"""What is patched together, under which name."""


class SemanticVsProsodyConfig(BatchedConfig):
    """What to run; the switches' defaults are the corrected experiment."""

    KNOWN_WITH: ClassVar = ("audio", "labels")
    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "lens_source": "hf_tuple",
        "ties": "first",
        "fidelity": False,
        "flip_condition": "all",
        "delta": "logit",
        "spans": ("audio",),
        "controls": (),
    }

    model: str = Field(
        default="bundled:follows_semantics", description="id, folder or bundled:NAME"
    )
    audio: Source = Field(
        default="bundled",
        description="manifest.csv (path, semantic_label, prosody_label, speaker, text), or its "
        "folder",
    )
    prompt: str = Field(
        default=QUESTIONS["overall"], min_length=1, description="what is asked about every clip"
    )
    labels: Mapping[str, str | tuple[str, ...]] = Field(
        default_factory=lambda: {str(emotion): str(emotion) for emotion in EMOTIONS},
        description="label -> how the answer spells it",
    )
    label_mode: LabelMode = Field(
        default="first_token",
        description="an answer's score: of its first token, or of the best of several spellings",
    )
    truncate: Truncate = False
    pair_types: tuple[PairType, ...] = Field(
        default=PAIR_TYPES, min_length=1, description="what pairs differ in: the words, the voice"
    )
    n_pairs: int | None = Field(
        default=60,
        ge=1,
        le=10**6,
        description="pairs of each type, before they are reversed; None is all there are",
    )
    align: Align = Field(default="resample_linear", description="clips of unequal duration")
    spans: tuple[str, ...] = Field(
        default=tuple(SPANS), description="what is replaced together, at every depth"
    )
    controls: tuple[SweepControl, ...] = Field(
        default=CONTROL_DONORS, description="donors that do not say the target"
    )
    lens_source: Literal["hooks", "hf_tuple"] = Field(
        default="hooks",
        description="hf_tuple: hidden_states[1:], whose last entry has passed the final norm",
    )
    ties: Ties = Field(
        default="split", description="labels that score alike share the win, or the first has it"
    )
    fidelity: bool = Field(default=True, description="how far the lens is from the output")
    flip_condition: Literal["movable", "all"] = Field(
        default="movable",
        description="pairs in the main flip rates: those whose donor says the target and whose "
        "base does not, or all",
    )
    delta: Delta = Field(
        default="logit_diff",
        description="the shift towards the target: against the base's answer, of its "
        "log-probability among the labels, or of its logit alone",
    )
    min_effect: float = Field(
        default=0.5,
        gt=0,
        le=1e6,
        description="logits; recovery is undefined below this total effect",
    )
    cluster: Literal["text", "speaker", "item"] = Field(
        default="text", description="what intervals resample: whole sentences, speakers, or clips"
    )
    engine: Engine = Field(default="fast", description="hooks is one whole forward per cell")
    max_bytes: EngineBytes = 2**28

    @property
    def is_calibration(self) -> bool:
        """Whether a bundled model is asked one of the questions that it was trained on."""
        return super().is_calibration and self.prompt in QUESTIONS.values()

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "SemanticVsProsodyConfig":
        if len(self.labels) < 2:
            raise ValueError("labels must name at least two emotions")
        if self.label_mode == "sequence":
            raise ValueError(
                "label_mode 'sequence' has no lens: use first_token or variants, and labels that "
                "begin with different tokens"
            )
        own = {*self.spans}
        if not {"audio"} <= own <= {*SPANS} or len(own) < len(self.spans):
            raise ValueError(
                f"spans must be some of {', '.join(SPANS)}, each once and audio among them"
            )
        return self


DEFECTS = (
    Defect("C6", ("lens",), lambda config: config.lens_source == "hf_tuple",
           "The lens norms Hugging Face's hidden_states, whose last entry has passed the final "
           "norm already: the last point of its curves is not the model's output."),
    Defect("M-001-2", ("lens",), lambda config: config.ties == "first",
           "A tie goes to the label that is listed first, so that win rates lean towards it."),
    Defect("C7", ("patches",), lambda config: config.flip_condition == "all",
           "Flip to target is counted over all pairs, without base rate and ceiling: it holds "
           "pairs that were at the target before, and cannot exceed how often the donor itself "
           "says the target."),
    Defect("C31", ("patches",), lambda config: config.delta == "logit",
           "The shift is that of a single logit, which moves with any shift of all logits."),
    Defect("C32", ("lens",), lambda config: not config.fidelity,
           "The lens' distance from the output is not shown: a margin near 0 in early layers may "
           "only say that the lens reads nothing there."),
    Defect("M-001-5", ("patches",), lambda config: not {*config.controls} - {"self"},
           "No other donors are patched: that the answer moves is not told apart from what any "
           "other audio would do."),
    Defect("M-001-8", ("patches",), lambda config: "readout" not in config.spans,
           "Only the audio is patched: that its effect decays does not say where the information "
           "went."),
)  # fmt: skip
