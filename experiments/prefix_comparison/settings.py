"""Settings of ``prefix_comparison``, and what seed 002's own choices got wrong.

``variant: seed`` changes the defaults of the switches to what the seed did; each can also be set by
itself. The known defects of a run follow from its switches, not from its name.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from ..materials.bundled import PREFIX
from ..workbench.experiment import ExperimentConfig

PosMode = Literal["as_run", "left_pad", "gap", "filler"]
PrefixControl = Literal["original", "neutral", "repeat_spec", "wrong_task"]
Anchor = Literal["first_return", "last_return", "first_if", "first_loop"]
SEED_DEFAULTS: dict[str, Any] = {
    "lens_source": "hf_tuple",
    "concatenate": "text",
    "pos_modes": ("as_run", "left_pad"),
}


class PrefixComparisonConfig(ExperimentConfig):
    """What is compared, and how it is read; defaults are the corrected experiment."""

    items: str = Field(
        default="bundled", description="a JSONL file (see experiments/prefix_comparison/items.py)"
    )
    a: str | None = Field(default=None, description="first condition; None: the file's first")
    b: str | None = Field(default=None, description="second condition; None: the file's second")
    segment: str | None = Field(
        default=None, description="what a has and b has not; None: audio, else tool_response"
    )
    spec: str = Field(default="spec", description="segment that repeat_spec repeats")
    outcomes: Literal["auto", "file", "greedy"] = Field(
        default="auto",
        description="greedy: right if every token of the continuation is the top one",
    )
    classes: Literal["auto", "code", "speech"] = "auto"
    lens_source: Literal["hooks", "hf_tuple"] = "hooks"
    tuned_lens: str | None = Field(
        default=None,
        description="folder of a trained lens, such as RUN/lens of tuned_lens; None is the logit "
        "lens",
    )
    concatenate: Literal["ids", "text"] = "ids"
    pos_modes: tuple[PosMode, ...] = ("as_run", "left_pad", "gap", "filler")
    filler: str = Field(default="\n", min_length=1, description="attended neutral text, repeated")
    interventions: tuple[PrefixControl, ...] = ("original", "neutral", "repeat_spec", "wrong_task")
    n_bins: int = Field(default=20, ge=2, description="bins of progress through the continuation")
    first_k: int = Field(default=64, ge=1, description="tokens of the map of first tokens")
    anchors: tuple[Anchor, ...] = ("first_return", "last_return", "first_if", "first_loop")
    n_shown: int = Field(default=2, ge=0, description="items that get maps of their own")
    depth_axis: Literal["y", "x"] = Field(default="y", description="of the maps")
    truncate: bool = Field(
        default=False, description="cut over-long clips instead of refusing them"
    )
    max_bytes: int = Field(
        default=2**29,
        ge=1,
        description="all that a unit holds beside weights, prompts and one block of one run: "
        "residual streams, results, and the logits or attention rows at work; fixed, so that "
        "results do not depend on what memory is free",
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
    def _what_makes_sense(self) -> "PrefixComparisonConfig":
        if "as_run" not in self.pos_modes:
            raise ValueError("pos_modes must include as_run, which the others are compared with")
        return self

    def known_defects(self) -> dict[str, str]:
        """Defects of this run's settings, by their number in the correction register."""
        found: dict[str, str] = {}
        if "left_pad" in self.pos_modes and not {"gap", "filler"} & set(self.pos_modes):
            found["C5"] = (
                "Positions are matched by left padding alone. Under rotary embeddings it changes "
                "nothing, so that what it leaves unchanged is no evidence."
            )
        if self.lens_source == "hf_tuple":
            found["C6"] = (
                "The lens reads Hugging Face's hidden_states, whose last entry is normed already: "
                "at the last depth the final norm is applied twice."
            )
        if self.concatenate == "text":
            found["C39"] = (
                "Prefix and continuation are joined as text: tokens at the boundary may merge, "
                "and differ between the conditions."
            )
        return found
