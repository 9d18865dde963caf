"""Settings of ``head_statistics``, and what seed 004's own choices got wrong.

Keys keep the seed's names; its YAML files load, but for ``output_dir``, which is ``--out`` here.
``variant: seed`` changes the defaults of the switches below to what the seed did; each can also be
set by itself. The known defects of a run follow from its switches, not from the variant's name.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from ..materials.bundled import PREFIX
from ..workbench.experiment import ExperimentConfig

TokenAgg = Literal["last", "all"]
Weighting = Literal["samples", "tokens"]
HeadOutput = Literal["hook_z", "pattern_times_v"]
Overflow = Literal["skip", "left", "right"]
Form = Literal["corrected", "seed"]
PromptFormat = Literal["auto", "raw", "chat"]

SEED_NAMES = {"model_path": "model"}
"""The seed's name of a setting -> the workbench's."""
SEED_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SEED_DEFAULTS: dict[str, Any] = {
    "head_output": "pattern_times_v",
    "template_form": "seed",
    "overflow": "right",
}
DEFECTS = {
    "C34": "Attention is computed again from pattern and values, although the input of the output "
    "projection is what the heads wrote; with a fused kernel it is another rounding of it.",
    "C35": "The prompt ends with a space: where the tokenizer merges it with the letter, the last "
    "token is not the one that predicts the answer, and labels by token count are shifted.",
    "C36": "The instruction lists the letters A to D, whatever options there are.",
    "C37": "Prompts that are too long lose their end, and with it 'Answer:'.",
}


class HeadStatisticsConfig(ExperimentConfig):
    """Which questions, which tokens of them, and how their norms are summed up."""

    data_dir: str = Field(
        default="bundled:multiple_choice",
        description="a JSONL file of multiple-choice items, or a folder that holds ARC",
    )
    max_samples: int = Field(default=5000, ge=-1, description="items of the file; -1 is all")
    batch_size: int = Field(default=4, ge=1)
    unit_batches: int = Field(
        default=16, ge=1, description="batches that are kept together; a killed run loses fewer"
    )
    max_length: int = Field(default=384, ge=1, description="positions of a prompt, audio included")
    overflow: Overflow = Field(
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
        default=0, ge=0, description="solved examples in every prompt: the file's first items"
    )
    prompt_format: PromptFormat = Field(
        default="auto", description="chat template, or raw text; auto is chat if items have audio"
    )
    device_map: str | None = Field(default=None, description="accelerate's placement, such as auto")

    @model_validator(mode="before")
    @classmethod
    def _seed_spellings_and_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "output_dir" in values:
            raise ValueError("output_dir is no setting here: give the folder as --out")
        if both := [seed for seed, ours in SEED_NAMES.items() if {seed, ours} <= values.keys()]:
            raise ValueError(f"{both[0]} is {SEED_NAMES[both[0]]}: give one of them")
        values = {SEED_NAMES.get(key, key): value for key, value in values.items()}
        dtype = values.get("dtype")
        if isinstance(dtype, str) and dtype in SEED_DTYPES:
            values["dtype"] = SEED_DTYPES[dtype]
        if values.get("attn_implementation", "") is None:
            values["attn_implementation"] = "sdpa"  # what transformers makes of null
        defaults = dict(SEED_DEFAULTS) if values.get("variant") == "seed" else {}
        if str(values.get("model", PREFIX)).startswith(PREFIX):
            defaults["n_threads"] = 1  # matrices this small are slower on several threads
        return {**defaults, **values}

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "HeadStatisticsConfig":
        if self.max_samples == 0:
            raise ValueError("max_samples must be -1 (all) or at least 1")
        if self.weighting == "tokens" and self.token_agg == "last":
            raise ValueError("weighting tokens needs token_agg all: last has one token an item")
        if self.head_output == "pattern_times_v" and self.attn_implementation.startswith("flash"):
            raise ValueError("head_output pattern_times_v needs a pattern, which flash has not")
        if self.device_map is not None and self.device != "cpu":
            raise ValueError("give device or device_map, not both")
        return self

    def known_defects(self) -> dict[str, str]:
        """Defects of this run's settings, by their number in the correction register."""
        is_present = {
            "C34": self.head_output == "pattern_times_v",
            "C35": self.template_form == "seed",
            "C36": self.template_form == "seed",
            "C37": self.overflow == "right",
        }
        return {name: DEFECTS[name] for name, holds in is_present.items() if holds}
