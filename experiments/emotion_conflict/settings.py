"""Settings of ``emotion_conflict``, and what seed 000's own choices got wrong.

``variant: seed`` changes the defaults of the switches below to what the seed did; each switch can
also be set by itself. The known defects of a run follow from its switches, not from its name.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from hooked_alm.methods.patching.alignment import AlignPolicies, AlignPolicy
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.reading.labels import LabelMode
from hooked_alm.methods.reading.lens import LensNorm

from ..materials.bundled import PREFIX
from ..materials.ob1 import EMOTIONS, LABELS, Emotion, Language, PromptMode
from ..workbench.experiment import ExperimentConfig
from .critical_layer import CriticalMethod

DonorKind = Literal["self", "text_swap", "audio_swap", "both", "random_other"]
DONORS: tuple[DonorKind, ...] = ("self", "text_swap", "audio_swap", "both", "random_other")

SPANS: dict[str, tuple[str, ...]] = {
    "label": ("label",),
    "text": ("text",),
    "audio": ("audio",),
    "audio_struct": ("audio_struct",),
    "struct": ("struct",),
    "readout": ("readout",),
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

SEED_DEFAULTS: dict[str, Any] = {
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


class EmotionConflictConfig(ExperimentConfig):
    """What to run; see the switches' defaults for the corrected experiment."""

    audio: str = Field(
        default="bundled", description="folder of OB1-named clips, or with a manifest"
    )
    n_clips: int | None = Field(default=None, description="how many clips there must be")
    prompt_language: Literal["clip", "zh", "en"] = "clip"
    pairs: Literal["map", "all_pairs"] = "map"
    modes: tuple[PromptMode, ...] = (
        "audio_only", "conflict", "consistent", "mention_only", "list_all", "irrelevant_adjective",
    )  # fmt: skip
    labels: Mapping[Language, Mapping[Emotion, str | tuple[str, ...]]] = Field(
        default_factory=lambda: LABELS
    )
    label_mode: LabelMode = "first_token"
    truncate: bool = Field(
        default=False, description="cut over-long clips instead of refusing them"
    )
    loudness_dbfs: float | None = Field(
        default=None, description="scale every clip to this level, so that it cannot tell the label"
    )
    lens_norm: LensNorm = "final"
    tuned_lens: str | None = Field(
        default=None,
        description="folder of a trained lens, such as RUN/lens of tuned_lens; None is the logit "
        "lens",
    )
    lens_depths: Literal["all", "without_output"] = "all"
    contrast: Literal["matched_pair", "seed"] = "matched_pair"
    critical_method: CriticalMethod = "resolve"
    donors: tuple[DonorKind, ...] = DONORS
    donor_index: Literal["same_site", "seed_hs"] = "same_site"
    audio_positions: Literal["speech_only", "not_text"] = "speech_only"
    align: AlignPolicy = "resample_linear"
    patch_layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="blocks; None is all"
    )
    engine: Engine = Field(
        default="fast", description="of the patching; hooks is one whole forward per cell"
    )
    max_bytes: int = Field(
        default=2**30,
        ge=1,
        description="activations that the fast engine holds; fixed, so that results do not depend "
        "on what memory is free",
    )
    min_effect: float = Field(
        default=0.5, gt=0, description="logits; below this total effect a recovery is undefined"
    )
    n_resamples: int = Field(default=2000, ge=1000)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_variant(cls, values: dict[str, Any]) -> dict[str, Any]:
        defaults = dict(SEED_DEFAULTS) if values.get("variant") == "seed" else {}
        if str(values.get("model", PREFIX)).startswith(PREFIX):
            defaults["n_threads"] = 1  # matrices this small are slower on several threads
        return {**defaults, **values}

    @model_validator(mode="after")
    def _modes_that_the_summary_needs(self) -> "EmotionConflictConfig":
        if missing := {"audio_only", "conflict"} - set(self.modes):
            raise ValueError(f"modes must include {', '.join(sorted(missing))}")
        if self.label_mode == "sequence":
            raise ValueError(
                "label_mode 'sequence' has no lens: use first_token or variants, and labels that "
                "begin with different tokens"
            )
        if self.tuned_lens is not None and self.lens_norm != "final":
            raise ValueError("tuned_lens was trained under the final norm: lens_norm must be final")
        for language, words in self.labels.items():
            if set(words) != set(EMOTIONS):
                raise ValueError(f"labels.{language} must name {', '.join(EMOTIONS)}")
        return self

    def patched_spans(self) -> dict[str, tuple[str, ...]]:
        """Name -> spans that are patched together."""
        return SEED_SPANS if self.audio_positions == "not_text" else SPANS

    def align_policies(self) -> AlignPolicies:
        """For clips of unequal duration what is set; for labels of unequal token count, nearest."""
        if self.align in ("error", "min_len"):
            return self.align
        return {"audio": self.align, "text": "nearest", "label": "nearest"}

    def patched_layers(self, n_layers: int) -> tuple[int, ...]:
        """Blocks to patch; of the seed's list for 28 blocks, those that exist, and the last."""
        if self.patch_layers is not None:
            return self.patch_layers
        if self.variant == "seed":
            return tuple(sorted({b for b in SEED_LAYERS if b < n_layers} | {n_layers - 1}))
        return tuple(range(n_layers))

    def known_defects(self) -> dict[str, str]:
        """Defects of this run's settings, by their number in the correction register."""
        found: dict[str, str] = {}
        if self.donor_index == "seed_hs":
            found["C1"] = (
                "The patch writes the donor's state before a block in place of the state after it, "
                "so that even patching a run with itself changes the answer."
            )
        if self.audio_positions == "not_text":
            found["C3"] = (
                "'Audio' means every position that is no instruction, the readout included: at "
                "the last block it overwrites the answer itself."
            )
        if not {"text_swap", "audio_swap"} <= set(self.donors):
            found["C4"] = (
                "One donor only: with the same audio in base and donor no voice information is "
                "exchanged, so that text dominance is built in."
            )
        if self.lens_norm == "none":
            found["C6"] = (
                "The lens leaves the final norm out: signs can flip, and curves follow the "
                "residual norm."
            )
        if self.contrast == "seed":
            found["C8"] = "Under the consistent prompt the contrast is a label minus itself: 0."
        if not {"mention_only", "list_all"} & set(self.modes):
            found["C9"] = (
                "No control prompt names the emotion without instructing it, so that copying the "
                "word looks like obeying it."
            )
        if self.align == "min_len":
            found["C10"] = "Positions are matched from the start: after a length change, wrongly."
        if self.lens_depths == "without_output":
            found["C11"] = "The lens covers the embeddings but not the output."
        if self.critical_method.startswith("second_diff"):
            found["C27"] = "The critical layer is a second difference, which amplifies noise."
        return found
