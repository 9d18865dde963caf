"""Generation by transformers' own loop, so that every processor and option means the same.

``GenerationMixin`` runs the loop and owns the KV cache; each step is one call of the hooked model
on the whole sequence so far, of which the cache holds all but the last position.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .errors import InputError
from .inputs import ALMInput
from .model import HookedALM


def generate(
    model: HookedALM,
    x: ALMInput,
    *,
    max_new_tokens: int | None = None,
    return_type: Literal["text", "tokens"] = "text",
    use_past_kv_cache: bool = True,
    **options: Any,
) -> list[str] | Tensor:
    """Continue each prompt of a left-padded batch.

    Args:
        model: whose hooks fire at every step; ``model.pos_offset`` is then the position of the
            first row a hook sees (0 in the first step; without the KV cache, in every step).
        x: the prompts.
        max_new_tokens: tokens to add; None follows the checkpoint's generation config.
        return_type: the new text, one string per row, or the new tokens ``[batch, new]``.
        use_past_kv_cache: keep keys and values between steps, or run the whole sequence again.
        options: transformers ``generate`` arguments (``do_sample``, ``temperature``, ``top_k``,
            ``num_beams``, ``logits_processor``, ...), over the checkpoint's generation config.

    Raises:
        InputError: text was asked for without a tokenizer, scores were asked for, or the batch is
            padded on the right.
    """
    if return_type == "text" and model.tokenizer is None:
        raise InputError(
            f"generating text with {model.cfg.model_name!r}: its folder has no tokenizer. Use "
            'return_type="tokens", or add the tokenizer files.'
        )
    if not bool(x.attention_mask[:, -1].all()):
        raise InputError(
            "generating: the batch is padded on the right, so new tokens would follow pads. Pad "
            "on the left."
        )
    if options.pop("return_dict_in_generate", False):
        raise InputError(
            "generating: return_dict_in_generate is not supported, only text or tokens are "
            "returned. Record scores with a hook on unembed.hook_out."
        )
    loop = _Loop(model, x)
    sequences = loop.generate(
        inputs=x.tokens,
        attention_mask=x.attention_mask,
        use_cache=use_past_kv_cache,
        return_dict_in_generate=False,
        **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
        **options,
    )
    new = sequences[:, x.shape[1] :]
    if return_type == "tokens":
        return new
    return model.tokenizer.batch_decode(new, skip_special_tokens=True)


class _Loop(PreTrainedModel, GenerationMixin):
    """What ``GenerationMixin`` needs to see of a model."""

    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, model: HookedALM, prompt: ALMInput) -> None:
        cfg = model.cfg
        config = PreTrainedConfig(
            vocab_size=cfg.d_vocab,
            num_hidden_layers=cfg.n_layers,
            layer_types=list(cfg.layer_types),
            sliding_window=cfg.sliding_window,
        )
        config._attn_implementation = cfg.attn_implementation
        super().__init__(config)
        # Not as a submodule: this object lives for one call.
        self.__dict__.update(hooked=model, prompt=prompt)
        self.generation_config = model.generation_config or GenerationConfig()

    @property
    def device(self) -> torch.device:
        return self.prompt.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hooked.cfg.dtype

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
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
        logits = self.hooked(input_ids, past_key_values=past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
