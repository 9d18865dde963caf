"""References composed of transformers' blocks: a language model that reads embeddings."""

import re
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank

from family_case import Inputs, Run, residuals
from tiny import VOCAB, build_tokenizer

# transformers' names of a Whisper-type encoder, and OpenAI's.
OPENAI = {
    r"layers\.(\d+)\.self_attn\.q_proj": r"blocks.\1.attn.query",
    r"layers\.(\d+)\.self_attn\.k_proj": r"blocks.\1.attn.key",
    r"layers\.(\d+)\.self_attn\.v_proj": r"blocks.\1.attn.value",
    r"layers\.(\d+)\.self_attn\.out_proj": r"blocks.\1.attn.out",
    r"layers\.(\d+)\.self_attn_layer_norm": r"blocks.\1.attn_ln",
    r"layers\.(\d+)\.fc1": r"blocks.\1.mlp.0",
    r"layers\.(\d+)\.fc2": r"blocks.\1.mlp.2",
    r"layers\.(\d+)\.final_layer_norm": r"blocks.\1.mlp_ln",
}


class ComposedLM:
    """``lm`` is any ``*ForCausalLM``; what enters its first block is composed in a subclass."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm.eval()

    def embeddings(self, inputs: Inputs) -> Tensor:
        """``[batch, pos, d_model]``, audio merged in."""
        raise NotImplementedError

    def embedded(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, to be written into."""
        rows: Tensor = F.embedding(ids, self.lm.get_input_embeddings().weight)
        return rows.clone()

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Run:
        """See ``family_case.Reference``."""
        embeds = self.embeddings(inputs)

        def logits() -> Tensor:
            found: Tensor = self.lm(
                inputs_embeds=embeds,
                attention_mask=inputs["attention_mask"],
                position_ids=inputs["position_ids"],
            ).logits
            return found

        return residuals(self.lm.model, logits)

    @torch.no_grad()
    def greedy(self, inputs: Inputs, n: int) -> Tensor:
        """transformers' own generation; it makes the positions itself."""
        new: Tensor = self.lm.generate(
            inputs_embeds=self.embeddings(inputs),
            attention_mask=inputs["attention_mask"],
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return new


def in_openai_names(tensors: dict[str, Tensor], positions: str, norm: str) -> dict[str, Tensor]:
    """A Whisper-type encoder of transformers, its tensors renamed."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in OPENAI.items():
            name = re.sub(theirs, ours, name)
        name = name.replace("embed_positions.weight", positions)
        renamed[re.sub(r"^layer_norm", norm, name)] = tensor
    return renamed


def pooled_states(encoder: Any, mel: Tensor, additive_mask: Tensor) -> Tensor:
    """A ``Qwen2AudioEncoder``, layer by layer, on a spectrogram of any length.

    Args:
        encoder: transformers' module, whose own ``forward`` takes one length only.
        mel: ``[clip, mel, frame]``.
        additive_mask: ``[clip, half_frame]``, 0 where a position may be attended to.
    """
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    mask = additive_mask[:, None, None].expand(-1, 1, x.shape[1], -1)
    for layer in encoder.layers:
        x = layer(x, mask)
    return encoder.layer_norm(encoder.avg_pooler(x.transpose(1, 2)).transpose(1, 2))


def log_mel(samples: Tensor, n_mels: int) -> Tensor:
    """OpenAI's log-mel spectrogram ``[mel, frame]``, as published inference code has it."""
    filters = mel_filter_bank(201, n_mels, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    stft = torch.stft(samples, 400, 160, window=torch.hann_window(400), return_complex=True)
    power = torch.from_numpy(filters).float().T @ stft[..., :-1].abs() ** 2
    log = power.clamp(min=1e-10).log10()
    return (log.maximum(log.max() - 8.0) + 4.0) / 4.0


def tokenizer_with(*words: str) -> Any:
    """The tiny tokenizer with more special tokens, numbered on."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(word, special=True) for word in words], special_tokens=True)
    assert len(tokenizer) <= VOCAB
    return tokenizer


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """A recording at 16 kHz."""
    draw = np.random.default_rng(seed)
    return (0.1 * draw.standard_normal(round(16000 * seconds))).astype(np.float32)
