"""Settings of ``head_statistics``, and what seed 004's own choices got wrong.

Keys keep the seed's names; its YAML files load, but for ``output_dir``, which is ``--out`` here.
``variant: seed`` changes the defaults of the switches below to what the seed did; each can also be
set by itself. The known defects of a run follow from its switches, not from the variant's name.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.methods.reading.head_norms import HeadOutput, TokenAgg, Weighting

from ..materials.sources import Source
from ..workbench.batches import BatchedConfig, BatchSize, UnitBatches

Form = Literal["corrected", "seed"]
SEED_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class HeadStatisticsConfig(BatchedConfig):
    """Which questions, which tokens of them, and how their norms are summed up."""

    KNOWN_WITH: ClassVar = ("data_dir",)
    SEED_DEFAULTS: ClassVar = {
        "head_output": "pattern_times_v",
        "template_form": "seed",
        "overflow": "right",
        "batch_order": "file",
    }

    data_dir: Source = Field(
        default="bundled:multiple_choice",
        description="a JSONL file of multiple-choice items, or a folder that holds ARC",
    )
    max_samples: int = Field(
        default=5000, ge=-1, le=10**8, description="items of the file; -1 is all"
    )
    batch_size: BatchSize = 4
    unit_batches: UnitBatches = 16
    batch_order: Literal["length", "file"] = Field(
        default="length", description="items of about one length run together, or neighbours do"
    )
    max_length: int = Field(
        default=384, ge=1, le=10**7, description="positions of a prompt, audio included"
    )
    overflow: Literal["skip", "left", "right"] = Field(
        default="skip", description="longer prompts are left out, or cut at one end"
    )
    token_agg: TokenAgg = Field(
        default="last", description="last token, or the mean norm of all tokens of an item"
    )
    weighting: Weighting = Field(
        default="samples", description="with token_agg all: what counts once, items or tokens"
    )
    ddof: Literal[0, 1] = Field(default=1, description="std is √(M2/(n − ddof))")
    head_output: HeadOutput = Field(
        default="hook_z", description="what the output projection reads, or computed again"
    )
    template_name: str = Field(default="arc_mcq_v1", description="as registered")
    template_form: Form = Field(
        default="corrected", description="the prompt ends with 'Answer:', or as the seed's did"
    )
    few_shot: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="solved examples in every prompt: the file's first items",
    )
    prompt_format: Literal["auto", "raw", "chat"] = Field(
        default="auto", description="chat template, or raw text; auto is chat if items have audio"
    )

    @model_validator(mode="before")
    @classmethod
    def _seed_spellings(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "output_dir" in values:
            raise ValueError("output_dir is no setting here: give the folder as --out")
        if {"model", "model_path"} <= values.keys():
            raise ValueError("model_path is model: give one of them")
        values = {"model" if key == "model_path" else key: v for key, v in values.items()}
        if (dtype := str(values.get("dtype"))) in SEED_DTYPES:
            values["dtype"] = SEED_DTYPES[dtype]
        if values.get("attn_implementation", "") is None:
            values["attn_implementation"] = "sdpa"  # what transformers makes of null
        return values

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "HeadStatisticsConfig":
        if self.max_samples == 0:
            raise ValueError("max_samples must be -1 (all) or at least 1")
        if self.batch_positions is not None and self.batch_order == "file":
            raise ValueError("batch_positions needs batch_order length: file has batches of a size")
        if self.weighting == "tokens" and self.token_agg == "last":
            raise ValueError("weighting tokens needs token_agg all: last has one token an item")
        if self.head_output == "pattern_times_v" and self.attn_implementation.startswith("flash"):
            raise ValueError("head_output pattern_times_v needs a pattern, which flash has not")
        return self
