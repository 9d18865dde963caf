"""transformers' own generation loop, around a hooked model.

``GenerationMixin`` runs the loop and owns the KV cache; each step is one call of the hooked model
on the whole sequence so far, of which the cache holds all but the last position.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .errors import InputError
from .hooks import Hook
from .inputs import ALMInput


class GenerationLoop(PreTrainedModel, GenerationMixin):
    """A hooked model as ``GenerationMixin`` needs to see it."""

    main_input_name = "input_ids"
    # Checked by transformers when the config names the kernel; the hooked model runs it.
    _supports_sdpa = _supports_flash_attn = True

    def __init__(
        self, model: Any, prompt: ALMInput, after_step: Callable[[int], None] | None
    ) -> None:
        config = self.config_of(model)
        config._attn_implementation = model.cfg.attn_implementation
        super().__init__(config)
        # Not as a submodule: this object lives for one call.
        self.__dict__.update(hooked=model, prompt=prompt, after_step=after_step, has_run=False)
        # After the constructor, which sets one of its own.
        self.generation_config = model.generation_config or GenerationConfig()

    @staticmethod
    def config_of(model: Any) -> PreTrainedConfig:
        """Sizes that the loop reads."""
        layer_types = [block.attn.layer_type for block in model.all_blocks()]
        return PreTrainedConfig(
            vocab_size=model.cfg.d_vocab,
            # A hooked branch keeps its keys and values behind the trunk's.
            num_hidden_layers=len(layer_types),
            layer_types=layer_types,
            sliding_window=model.cfg.sliding_window,
        )

    def arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` for the prompts, beside the given options."""
        return {"inputs": self.prompt.tokens, "attention_mask": self.prompt.attention_mask}

    def hooks(self, options: dict[str, Any]) -> list[Hook]:
        """Hooks of the loop's own."""
        return []

    def results(self, found: Any) -> tuple[Tensor, dict[str, Any]]:
        """New tokens ``[batch, new]``, and what else ``generate`` has found."""
        return found[:, self.prompt.shape[1] :], {}

    @staticmethod
    def options() -> set[str]:
        """Names of what transformers' ``generate`` takes."""
        named = inspect.signature(GenerationMixin.generate).parameters
        return {*named, *GenerationConfig().to_dict(), "past_key_values"} - {"self", "kwargs"}

    def _prepare_generated_length(
        self,
        generation_config: GenerationConfig,
        has_default_max_length: bool,
        *args: Any,
        **more: Any,
    ) -> GenerationConfig:
        """Let a number of new tokens go before the checkpoint's longest length, without a word."""
        is_given = generation_config.max_new_tokens is not None
        found: GenerationConfig = super()._prepare_generated_length(
            generation_config, has_default_max_length or is_given, *args, **more
        )
        return found

    @property
    def device(self) -> torch.device:
        """Device of the prompt."""
        return self.prompt.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""
        return self.hooked.cfg.dtype

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, options: Any
    ) -> None:
        """Refuse what the loop cannot do: no earlier place knows the whole configuration."""
        super()._validate_generation_mode(generation_mode, generation_config, options)
        for name in ("prefill_chunk_size", "token_healing"):
            if value := getattr(generation_config, name):
                raise InputError(
                    f"generating: got {name}={value}, but the prompt runs as it is, in one piece. "
                    "Leave it out."
                )
        if self.after_step is not None:
            _check_steps(generation_mode, generation_config)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Arguments of a step: the prompt with the new tokens behind it, and the cache."""
        # Beams and several return sequences repeat each prompt in place.
        copies = input_ids.shape[0] // len(self.prompt)
        x = self.prompt
        if copies > 1:
            x = x[torch.arange(len(x)).repeat_interleave(copies)]
        new = input_ids[:, x.shape[1] :]
        return {"input_ids": x.extend(new), "past_key_values": past_key_values}

    def forward(
        self,
        input_ids: ALMInput,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of one step, which runs what the cache does not hold of the sequence so far."""
        self.has_run = True
        logits = self.hooked(input_ids, past_key_values=past_key_values)
        if self.after_step is not None:
            self.after_step(input_ids.shape[1])
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def _check_steps(mode: GenerationMode, config: GenerationConfig) -> None:
    """Refuse what does not append one position to every row at each step.

    Raises:
        InputError: beams, an assistant, or a KV cache of fixed size.
    """
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"caching while generating: got {mode.value.replace('_', ' ')}, expected greedy "
            "search or sampling, where each row is one sequence from its start. Generate the "
            "tokens first, then cache one run over them: "
            "model.run_with_cache(x.extend(tokens[:, :-1]))."
        )
    if config.cache_implementation not in (None, "dynamic"):
        raise InputError(
            f"caching while generating: got cache_implementation="
            f"{config.cache_implementation!r}, expected 'dynamic': others show keys of "
            "positions that do not exist yet."
        )
