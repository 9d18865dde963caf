"""The bundled models' format: a small Qwen2-Audio checkpoint with tokenizer and processor.

Same classes, files and chat template as the published model; only the sizes and the vocabulary
differ, and a ``Design`` says them. Also asks a model questions the way a user would, through
processor and ``generate``.
"""

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>",
)  # fmt: skip
MELS = 80
BPE_VOCAB = 480
MAX_POSITION = 512
CHAT_FRAME = ("system\nYou are a helpful assistant.", "\n", "user\nAudio 1: ", "assistant\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """Vocabulary and sizes of a pair of bundled models."""

    words: tuple[str, ...]
    """The answers; each becomes one token."""
    questions: tuple[str, ...]
    """Texts that the tokenizer's merges are learnt from."""
    chunk_s: int
    """Longest clip, in seconds."""
    audio: Mapping[str, int]
    """Sizes of the audio tower, in the config's own field names."""
    text: Mapping[str, int]
    """Sizes of the decoder, in the config's own field names."""


def build_processor(design: Design) -> Qwen2AudioProcessor:
    """Tokenizer, feature extractor and the class's own chat template."""
    extractor = WhisperFeatureExtractor(
        feature_size=MELS, chunk_length=design.chunk_s, return_attention_mask=True
    )
    return Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=build_tokenizer(design))


def build_tokenizer(design: Design) -> PreTrainedTokenizerFast:
    """Byte-level BPE learnt from the questions; each answer is one token wherever it stands."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCAB, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    # Without the answers, which are added below.
    cut = "|".join(map(re.escape, design.words))
    texts = (*CHAT_FRAME, *design.questions)
    bpe.train_from_iterator(
        [part for text in texts for part in re.split(cut, text) if part], trainer
    )
    # Added, not merged: inside the quotes of an instruction BPE would join a word to its quote.
    bpe.add_tokens([AddedToken(word, normalized=False) for word in design.words])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIALS), padding_side="left", model_max_length=MAX_POSITION,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return tokenizer


def build_model(
    design: Design, processor: Qwen2AudioProcessor, seed: int
) -> Qwen2AudioForConditionalGeneration:
    """An untrained model whose initial scales suit its small width."""
    tokenizer = processor.tokenizer
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in SPECIALS}
    frames = 100 * design.chunk_s
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder", "num_mel_bins": MELS, **design.audio,
            "max_source_positions": frames // 2,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokenizer), **design.text,
            "max_position_embeddings": MAX_POSITION,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        },
        audio_token_index=ids["<|AUDIO|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    initialise(model)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=8, eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    return model


@torch.no_grad()
def initialise_matrices(model: nn.Module, n_layers: int) -> None:
    """Weights of std 1/sqrt(fan_in); branches start small.

    The library's std of 0.02 is meant for widths of thousands: at width 96 it starves every layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d):
            std = module.weight[0].numel() ** -0.5
            if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")):
                std /= math.sqrt(2 * n_layers)
            module.weight.normal_(0, std)
            if module.bias is not None:
                module.bias.zero_()


@torch.no_grad()
def initialise(model: Qwen2AudioForConditionalGeneration) -> None:
    """Matrices, embedding and head for a small width; positions are Whisper's sinusoids."""
    initialise_matrices(model, n_layers=model.config.text_config.num_hidden_layers)
    model.get_input_embeddings().weight.normal_(0, 0.5)
    model.lm_head.weight.mul_(0.5)
    positions = model.model.audio_tower.embed_positions.weight
    count, width = positions.shape
    scale = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1))
    angle = torch.arange(count)[:, None] * scale[None]
    positions.copy_(torch.cat([angle.sin(), angle.cos()], dim=1))


def hear(
    model: Qwen2AudioForConditionalGeneration, mels: Tensor, frames: Tensor
) -> tuple[Tensor, Tensor]:
    """Projected audio tokens [clip, token, d_model] and how many of them each clip fills."""
    tower = model.model.audio_tower
    filled, tokens = tower._get_feat_extract_output_lengths(frames)
    states = tower(mels, attention_mask=_seen(filled, tower.max_source_positions)).last_hidden_state
    return model.model.multi_modal_projector(states), tokens


def hear_up_to(
    model: Qwen2AudioForConditionalGeneration, block: int, mels: Tensor, frames: Tensor
) -> tuple[Tensor, Tensor]:
    """What arrives at a block of the tower [clip, position, width] and how much each clip fills."""
    tower = model.model.audio_tower
    filled, _ = tower._get_feat_extract_output_lengths(frames)
    mask = _seen(filled, tower.max_source_positions)
    return tower(mels, attention_mask=mask, output_hidden_states=True).hidden_states[block], filled


def hear_from(
    model: Qwen2AudioForConditionalGeneration, block: int, states: Tensor, filled: Tensor
) -> tuple[Tensor, Tensor]:
    """What `hear` gives, of what `hear_up_to` gave."""
    tower = model.model.audio_tower
    for layer in tower.layers[block:]:
        states = layer(states, _seen(filled, states.shape[1]))
    pooled = tower.layer_norm(tower.avg_pooler(states.mT).mT)
    return model.model.multi_modal_projector(pooled), filled // 2


def _seen(filled: Tensor, n: int) -> Tensor:
    """Which of n positions of the tower each clip's see."""
    return (torch.arange(n)[None] < filled[:, None])[:, None, None].expand(-1, 1, n, -1)


def chat_text(processor: Qwen2AudioProcessor, prompt: str) -> str:
    """The question in the chat frame, one audio placeholder, ready for the answer."""
    return str(processor.apply_chat_template(_conversation(prompt), add_generation_prompt=True))


def _conversation(prompt: str) -> list[dict[str, object]]:
    content = [{"type": "audio", "audio": "placeholder"}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def ask(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    prompts: Sequence[str],
    clips: Sequence[NDArray[np.float32]],
    *,
    batch: int = 16,
) -> list[str]:
    """Greedy answers with their special tokens, so that a missing end of turn shows."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = processor(
            text=[chat_text(processor, prompt) for prompt in prompts[start : start + batch]],
            audio=list(clips[start : start + batch]),
            sampling_rate=processor.feature_extractor.sampling_rate,
            return_tensors="pt", padding=True,
        )  # fmt: skip
        out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(out, skip_special_tokens=False)
        answers += [text.replace(processor.tokenizer.pad_token, "") for text in texts]
    return answers


def read_folder(folder: Path) -> Qwen2AudioForConditionalGeneration:
    """A checkpoint that ``write_folder`` wrote."""
    return Qwen2AudioForConditionalGeneration.from_pretrained(folder)


def write_folder(
    folder: Path, model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor
) -> None:
    """The checkpoint in the published layout."""
    model.save_pretrained(folder)
    # safetensors writes for the owner alone.
    (folder / "model.safetensors").chmod(0o644)
    # A tokenizer that has padded a batch would save that as its own setting.
    processor.tokenizer.backend_tokenizer.no_padding()
    processor.save_pretrained(folder)
    # Also under the name that the published folder and older readers use.
    processor.feature_extractor.save_pretrained(folder)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder beside this one that takes its place once everything is in it."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
