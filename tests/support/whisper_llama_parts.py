"""Tiny Whisper and LLaMA checkpoints, and the LLaMA of transformers that hears embeddings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, processors
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from family_case import Inputs, Run, residuals, save_hf
from tiny import MELS, N_BPE, VOCAB, byte_level_bpe

D_MODEL, D_AUDIO = 54, 24
FRAMES = 100
"""Of a full window, which is a second."""
LLAMA: dict[str, Any] = dict(
    hidden_size=D_MODEL, intermediate_size=34, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, vocab_size=VOCAB, max_position_embeddings=211,
    rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    rope_parameters=dict(
        rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=32,
    ),
)  # fmt: skip
WHISPER: dict[str, Any] = dict(
    d_model=D_AUDIO, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=38,
    decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=30, num_mel_bins=MELS,
    max_source_positions=FRAMES // 2, vocab_size=VOCAB, max_target_positions=9, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip


def save_llama(folder: Path, dtype: torch.dtype, *, tied: bool = False) -> LlamaForCausalLM:
    """A text model on disk."""
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    save_hf(model, folder, dtype)
    return model


def save_whisper(folder: Path, dtype: torch.dtype, *, layers: int = 2) -> WhisperEncoder:
    """A transcriber on disk, decoder and all; returns its encoder."""
    model = WhisperForConditionalGeneration(WhisperConfig(**WHISPER | {"encoder_layers": layers}))
    save_hf(model, folder, dtype)
    return model.model.encoder


LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
"""The chat template of LLaMA 3: messages are plain text, of any role."""
LLAMA_3_SPECIALS = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|reserved_special_token_87|>",
)  # fmt: skip


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """LLaMA 3's tokenizer in small: bytes, some merges, and a BOS before everything."""
    bpe = byte_level_bpe()
    bpe.add_special_tokens([AddedToken(word, special=True) for word in LLAMA_3_SPECIALS])
    bos = LLAMA_3_SPECIALS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, N_BPE)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token="<|eot_id|>", chat_template=LLAMA_3
    )
    assert len(tokenizer) <= VOCAB
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return tokenizer


def noise(seconds: float, seed: int = 3) -> np.ndarray:
    """A clip at 16 kHz."""
    return (0.1 * np.random.default_rng(seed).standard_normal(round(16000 * seconds))).astype(
        np.float32
    )


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """A checkpoint of which transformers has no class."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({**config, "torch_dtype": str(dtype).removeprefix("torch.")})
    )
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def encoder_of(folder: Path, dtype: torch.dtype, attention: str) -> WhisperEncoder:
    """The encoder of a transcriber, as transformers loads it."""
    whisper = WhisperForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    )
    return whisper.model.encoder.eval()


class HearingLlama:
    """LLaMA of transformers, run on embeddings that a family's own recipe makes."""

    def __init__(
        self,
        lm: LlamaForCausalLM,
        embed: Callable[[Inputs, Any], tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        """``embed`` gives embeddings, mask and positions, from the arguments and the LM's table."""
        self.lm, self.embed = lm.eval(), embed

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Run:
        """See ``Reference``."""
        embeds, mask, positions = self.embed(inputs, self.lm.model.embed_tokens)
        return residuals(
            self.lm.model,
            lambda: (
                self.lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
            ),
        )

    @torch.no_grad()
    def greedy(self, inputs: Inputs, n: int) -> Tensor:
        """See ``Reference``; transformers makes the positions itself."""
        embeds, mask, _ = self.embed(inputs, self.lm.model.embed_tokens)
        tokens: Tensor = self.lm.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=n, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return tokens


def load_llama(folder: Path, dtype: torch.dtype, attention: str) -> LlamaForCausalLM:
    """The text model, as transformers loads it."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


def padded_left(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of embeddings, zeros before the shorter ones; mask; positions that count real ones."""
    width = max(map(len, rows))
    embeds = torch.stack([torch.cat([r.new_zeros(width - len(r), r.shape[1]), r]) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return embeds, mask, (mask.cumsum(-1) - 1).clamp(min=0)
