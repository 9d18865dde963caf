"""Settings of ``emotion_conflict``, and what seed 000's own choices got wrong.

``variant: seed`` changes the defaults of the switches below to what the seed did; each switch can
also be set by itself. The known defects of a run follow from its switches, not from its name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from hooked_alm.errors import InputError
from hooked_alm.methods.patching.alignment import AlignPolicies
from hooked_alm.methods.reading.lens import LensNorm
from hooked_alm.methods.statistics.critical_layer import CriticalMethod

from ..materials.conflict_runs import DonorKind
from ..materials.conflict_settings import ConflictConfig
from ..materials.instructions import PromptMode
from ..workbench.claims import Defect
from ..workbench.settings import TunedLensFolder

SPANS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("label", "text", "audio", "audio_struct", "struct", "readout")},
    "text+readout": ("text", "readout"),
    "all": ("text", "audio", "audio_struct", "struct", "readout", "sink"),
}
"""What is patched together, under which name."""

# Seed 000 calls every position that is no instruction token "audio": the readout is among them.
SEED_SPANS = {
    "text": ("text",),
    "audio": ("audio", "audio_struct", "struct", "readout", "sink"),
}
SEED_LAYERS = (0, 5, 10, 15, 20, 25, 27)
"""Blocks that the seed patched, of 28."""


class EmotionConflictConfig(ConflictConfig):
    """What to run; the switches' defaults are the corrected experiment."""

    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "modes": ("audio_only", "conflict", "consistent"),
        "lens_norm": "none",
        "lens_depths": "without_output",
        "contrast": "seed",
        "critical_method": "second_diff_abs",
        "donors": ("text_swap",),
        "donor_index": "seed_hs",
        "audio_positions": "not_text",
        "align": "min_len",
    }

    modes: tuple[PromptMode, ...] = Field(
        default=get_args(PromptMode), description="conditions that every clip is asked under"
    )
    lens_norm: LensNorm = Field(
        default="final", description="norm that the lens applies before the unembedding"
    )
    tuned_lens: TunedLensFolder = None
    lens_depths: Literal["all", "without_output"] = Field(
        default="all", description="whether the lens is read at the output too"
    )
    contrast: Literal["matched_pair", "seed"] = Field(
        default="matched_pair",
        description="Δlogit is T minus A in every condition; the seed's is A minus A in consistent",
    )
    critical_method: CriticalMethod = Field(
        default="resolve", description="the primary of five definitions of the depth of a turn"
    )
    donors: tuple[DonorKind, ...] = Field(
        default=get_args(DonorKind), description="runs whose states are patched in; () is none"
    )
    donor_index: Literal["same_site", "seed_hs"] = Field(
        default="same_site", description="seed_hs writes the state before a block after it"
    )
    audio_positions: Literal["speech_only", "not_text"] = Field(
        default="speech_only", description="what the span audio is: frames of speech, or all else"
    )
    patch_layers: tuple[Annotated[int, Field(ge=-10_000, le=10_000)], ...] | None = Field(
        default=None, min_length=1, description="blocks; None is all"
    )

    @model_validator(mode="after")
    def _modes_that_the_summary_needs(self) -> "EmotionConflictConfig":
        if missing := {"audio_only", "conflict"} - set(self.modes):
            raise ValueError(f"modes must include {', '.join(sorted(missing))}")
        if self.tuned_lens is not None and self.lens_norm != "final":
            raise ValueError("tuned_lens was trained under the final norm: lens_norm must be final")
        return self

    def patched_spans(self) -> dict[str, tuple[str, ...]]:
        """Name -> spans that are patched together."""
        return SEED_SPANS if self.audio_positions == "not_text" else SPANS

    def align_policies(self) -> AlignPolicies:
        """As for all spans, for that of the label alone."""
        policies = super().align_policies()
        return policies if isinstance(policies, str) else {**policies, "label": "nearest"}

    def patched_layers(self, n_layers: int) -> tuple[int, ...]:
        """Blocks to patch; of the seed's list for 28 blocks, those that exist, and the last.

        Raises:
            InputError: blocks were asked for that the model lacks.
        """
        if wrong := [b for b in self.patch_layers or () if not 0 <= b < n_layers]:
            raise InputError(f"patching blocks {wrong}: the model has blocks 0 to {n_layers - 1}.")
        if self.patch_layers is not None:
            return self.patch_layers
        if self.variant == "seed":
            return tuple(sorted({b for b in SEED_LAYERS if b < n_layers} | {n_layers - 1}))
        return tuple(range(n_layers))


DEFECTS = (
    Defect("C1", ("patching",), lambda config: config.donor_index == "seed_hs",
           "The patch writes the donor's state before a block in place of the state after it, so "
           "that even patching a run with itself changes the answer."),
    Defect("C3", ("patching",), lambda config: config.audio_positions == "not_text",
           "'Audio' means every position that is no instruction, the readout included: at the "
           "last block it overwrites the answer itself."),
    Defect("C4", ("patching",), lambda c: not {"text_swap", "audio_swap"} <= {*c.donors},
           "One donor only: with the same audio in base and donor no voice information is "
           "exchanged, so that text dominance is built in."),
    Defect("C6", ("depths", "delta"), lambda config: config.lens_norm == "none",
           "The lens leaves the final norm out: signs can flip, and curves follow the residual "
           "norm."),
    Defect("C8", ("delta",), lambda config: config.contrast == "seed",
           "Under the consistent prompt the contrast is a label minus itself: 0."),
    Defect("C9", ("answer_follows",), lambda c: not {"mention_only", "list_all"} & {*c.modes},
           "No control prompt names the emotion without instructing it, so that copying the word "
           "looks like obeying it."),
    Defect("C10", ("patching",), lambda config: config.align == "min_len",
           "Positions are matched from the start: after a length change, wrongly."),
    Defect("C11", ("delta",), lambda config: config.lens_depths == "without_output",
           "The lens covers the embeddings but not the output."),
    Defect("C27", ("delta",), lambda config: config.critical_method.startswith("second_diff"),
           "The critical layer is a second difference, which amplifies noise."),
)  # fmt: skip
