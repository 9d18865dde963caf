"""Settings of ``prefix_comparison``.

``variant: seed`` changes the defaults of the switches to what seed 002 did; each can also be set by
itself. The known defects of a run follow from its switches, not from its name.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..materials.sources import Source
from ..workbench.settings import MOST_BYTES, ExperimentConfig

PosMode = Literal["as_run", "left_pad", "gap", "filler"]
PrefixControl = Literal["original", "neutral", "repeat_spec", "wrong_task"]
Anchor = Literal["first_return", "last_return", "first_if", "first_loop"]


class PrefixComparisonConfig(ExperimentConfig):
    """What is compared, and how it is read; defaults are the corrected experiment."""

    KNOWN_WITH: ClassVar = ("items",)
    SEED_DEFAULTS: ClassVar[dict[str, Any]] = {
        "lens_source": "hf_tuple",
        "concatenate": "text",
        "pos_modes": ("as_run", "left_pad"),
    }

    items: Source = Field(
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
    classes: Literal["auto", "code", "speech"] = Field(
        default="auto", description="kinds of tokens to tell apart; auto goes by the items' audio"
    )
    lens_source: Literal["hooks", "hf_tuple"] = Field(
        default="hooks",
        description="residual streams that are read; hf_tuple applies the final norm twice at the "
        "last depth",
    )
    tuned_lens: str | None = Field(
        default=None,
        description="folder of a trained lens, such as RUN/lens of tuned_lens; None is the logit "
        "lens",
    )
    concatenate: Literal["ids", "text"] = Field(
        default="ids",
        description="prefix and continuation are joined as tokens, or as text, whose tokens may "
        "merge where they meet",
    )
    pos_modes: tuple[PosMode, ...] = Field(
        default=("as_run", "left_pad", "gap", "filler"),
        description="ways to match the prefixes' lengths; as_run matches none, and has to be there",
    )
    filler: str = Field(default="\n", min_length=1, description="attended neutral text, repeated")
    interventions: tuple[PrefixControl, ...] = Field(
        default=("original", "neutral", "repeat_spec", "wrong_task"),
        description="what the segment's content is exchanged for; original puts its own in again",
    )
    n_bins: int = Field(
        default=20, ge=2, le=10_000, description="bins of progress through the continuation"
    )
    first_k: int = Field(
        default=64, ge=1, le=10**6, description="tokens of the map of first tokens"
    )
    anchors: tuple[Anchor, ...] = Field(
        default=("first_return", "last_return", "first_if", "first_loop"),
        description="tokens of code around which maps are aligned",
    )
    n_shown: int = Field(default=2, ge=0, le=10_000, description="items that get maps of their own")
    depth_axis: Literal["y", "x"] = Field(default="y", description="of the maps")
    truncate: bool = Field(
        default=False, description="cut over-long clips instead of refusing them"
    )
    max_bytes: int = Field(
        default=2**29,
        ge=1,
        le=MOST_BYTES,
        description="all that a unit holds beside weights, prompts and one block of one run: "
        "residual streams, results, and the logits or attention rows at work; fixed, so that "
        "results do not depend on what memory is free",
    )

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "PrefixComparisonConfig":
        if "as_run" not in self.pos_modes:
            raise ValueError("pos_modes must include as_run, which the others are compared with")
        return self
