"""Settings of ``attribute_lens``, and what AudioLens' own choices got wrong.

``variant: seed`` changes the defaults of the switches below to what its published code does; each
switch can also be set by itself. The known defects of a run follow from its switches, not from its
name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from hooked_alm.errors import InputError
from hooked_alm.methods.patching.enrich import EnrichMode
from hooked_alm.methods.patching.options import Engine

from ..materials.attribute_prompts import AttributesConfig
from ..materials.attributes import PromptFormat
from ..workbench.claims import Defect
from ..workbench.settings import EngineBytes, TunedLensFolder

EnrichControl = Literal["other_depth", "other_clip", "noise"]
DepthOrBlock = Annotated[int, Field(ge=0, le=10_000)]


class AttributeLensConfig(AttributesConfig):
    """What is asked about which clips; the switches' defaults are the corrected experiment."""

    KNOWN_WITH: ClassVar = ("audio", "attributes")
    SEED_DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "prompts": ("prefix",),
        "causal_prompt": "prefix",
        "rotate_options": False,
        "absences": False,
        "enrich_modes": ("add", "average_input"),
        "enrich_controls": (),
    }

    model: str = Field(default="bundled:follows_voice", description="id, folder or bundled:NAME")
    causal_prompt: PromptFormat = Field(
        default="question", description="format under which attention is knocked out, the audio "
        "taken away, and states enriched; another one, if it was asked, tells success from failure"
    )  # fmt: skip
    tuned_lens: TunedLensFolder = None
    margin: float = Field(
        default=0.2, ge=0, le=100, description="above chance, as a share of it, where depths begin "
        "to count in the critical layer"
    )  # fmt: skip
    window: int = Field(
        default=3, ge=1, le=10_000, description="blocks in which attention is knocked out at once; "
        "all of them at once are a window too"
    )  # fmt: skip
    absences: bool = Field(
        default=True, description="ask without the audio, and without a transcript, too"
    )
    enrich_modes: tuple[EnrichMode, ...] = Field(
        default=("add", "average"),
        description="of enrichment; average_input skips the block, () is no enrichment",
    )
    enrich_sources: tuple[DepthOrBlock, ...] | None = Field(
        default=None, min_length=1, description="depths whose states enrich others; None is all"
    )
    enrich_layers: tuple[DepthOrBlock, ...] | None = Field(
        default=None, min_length=1, description="blocks whose output is enriched; None is all"
    )
    coefficient: float = Field(default=1.0, ge=-1e6, le=1e6, description="of what is added")
    enrich_controls: tuple[EnrichControl, ...] = Field(
        default=get_args(EnrichControl), description="what else the chosen block is enriched with"
    )
    validation_share: float = Field(
        default=0.5, gt=0, lt=1, description="share of the clips on which source, block and mode "
        "of the enrichment are chosen; it is judged on the others"
    )  # fmt: skip
    engine: Engine = Field(
        default="fast", description="of the sweeps; hooks is one whole forward per cell"
    )
    max_bytes: EngineBytes = 2**28

    def check_enrichment(self, n_blocks: int) -> None:
        """Refuse depths and blocks that a model lacks.

        Raises:
            InputError: the settings name some.
        """
        for name, given in (("enrich_sources", self.enrich_sources),
                            ("enrich_layers", self.enrich_layers)):  # fmt: skip
            if wrong := [one for one in given or () if one >= n_blocks]:
                raise InputError(
                    f"enriching: got {wrong} in {name}, expected 0 to {n_blocks - 1}: the model "
                    f"has {n_blocks} blocks, and enriches with what enters one."
                )

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "AttributeLensConfig":
        if self.label_mode == "sequence":
            raise ValueError(
                "label_mode 'sequence' has no lens: use first_token or variants, and labels that "
                "begin with different tokens"
            )
        if self.causal_prompt not in self.prompts:
            raise ValueError(f"causal_prompt must be one of prompts: {', '.join(self.prompts)}")
        for name in ("prompts", "enrich_modes", "enrich_controls"):
            if len({*getattr(self, name)}) < len(getattr(self, name)):
                raise ValueError(f"{name} must have each only once")
        return self


DEFECTS = (
    Defect("C47", ("enrichment", "enrichment_search"), lambda c: "average_input" in c.enrich_modes,
           "The average is taken with what enters the block, and replaces what leaves it: the "
           "block is skipped."),
    Defect("M-AL-5", ("enrichment",), lambda c: bool(c.enrich_modes) and not c.enrich_controls,
           "Nothing else enriches the block: a gain may be that of any change of its norm."),
)  # fmt: skip
