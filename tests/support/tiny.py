"""Tiny random checkpoints and prompts: all sizes different, every parameter re-randomised.

Default initialisation leaves norms at 1 and biases at 0, so that a converter which forgets them
would pass; equal sizes hide swapped axes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.utils import logging as transformers_logging

from hooked_alm import HookedALM

transformers_logging.disable_progress_bar()

VOCAB = 337
N_LAYERS = 4
MELS = 8
MAX_SOURCE_POSITIONS = 50
"""Half the mel frames of one second, which is the feature extractor's ``chunk_length``."""

# 256 bytes, then merges, then the special tokens; checked in `build_tokenizer`.
N_BPE = 320
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)
PAD, IM_START, IM_END, PLACEHOLDER, AUDIO_BOS, AUDIO_EOS = range(N_BPE, N_BPE + len(SPECIALS))

CORPUS = [
    "What emotion does the speaker convey in this recording? Answer with one word.",
    "You are a helpful assistant. system user assistant Audio 1: Audio 2: happy sad angry",
    "说话人的情绪是什么？请用一个词回答。高兴 悲伤 愤怒",
]
RARE_TEXT = "罕见字：龘"
"""Characters outside the corpus: every one is several tokens."""


def qwen2_audio_config(
    *,
    n_heads: int = 6,
    n_kv_heads: int = 2,
    sliding: bool = False,
    tied: bool = False,
    d_model: int = 54,
    d_head: int | None = 10,
) -> Qwen2AudioConfig:
    """Decoder: 4 layers, d 54, head 10 wide, MLP 34. Encoder: 2 layers, d 24, 8 mels.

    Args:
        n_heads: query heads.
        n_kv_heads: key/value heads.
        sliding: the last two layers see a window of 5 positions.
        tied: declare the unembedding to be the embedding.
        d_model: width of the residual stream.
        d_head: written into the config; None leaves it to be ``d_model / n_heads``.
    """
    return Qwen2AudioConfig(
        text_config=dict(
            model_type="qwen2", hidden_size=d_model, intermediate_size=34,
            num_hidden_layers=N_LAYERS, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads,
            vocab_size=VOCAB, max_position_embeddings=211, rms_norm_eps=1e-5, rope_theta=5000.0,
            use_sliding_window=sliding, sliding_window=5 if sliding else None, max_window_layers=2,
            tie_word_embeddings=tied, **({} if d_head is None else {"head_dim": d_head}),
        ),
        audio_config=dict(
            model_type="qwen2_audio_encoder", d_model=24, encoder_layers=2,
            encoder_attention_heads=3, encoder_ffn_dim=38, num_mel_bins=MELS,
            max_source_positions=MAX_SOURCE_POSITIONS,
        ),
        audio_token_index=PLACEHOLDER,
        tie_word_embeddings=tied,
    )  # fmt: skip


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fresh values for every parameter: norms near 1, everything else near 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.1 * noise if is_norm else 0.15 * noise)


def save_qwen2_audio(
    folder: Path, config: Qwen2AudioConfig, dtype: torch.dtype, **save_options: Any
) -> Path:
    """A checkpoint on disk, in the published key layout."""
    model = Qwen2AudioForConditionalGeneration(config).eval()
    randomise(model)
    assert model.config.text_config.num_hidden_layers == N_LAYERS
    model.to(dtype).save_pretrained(folder, **save_options)
    return folder


def edit_tensors(folder: Path, out: Path, change: Any) -> Path:
    """A copy of a one-shard checkpoint, its tensors changed in place or replaced by ``change``."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    changed = change(tensors)
    tensors = changed if isinstance(changed, dict) else tensors
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def edit_config(folder: Path, out: Path, change: Any) -> Path:
    """A copy of a checkpoint, its ``config.json`` changed in place or replaced by ``change``."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    changed = change(config)
    config = changed if isinstance(changed, dict) else config
    (out / "config.json").write_text(json.dumps(config))
    return out


def resave_in_memory_layout(folder: Path, out: Path) -> Path:
    """The same checkpoint with the key names that the model has in memory."""

    def renamed(name: str) -> str:
        name = name.replace("language_model.model.", "model.language_model.")
        name = name.replace("language_model.lm_head", "lm_head")
        return f"model.{name}" if name.startswith(("audio_tower", "multi_modal_proj")) else name

    return edit_tensors(
        folder, out, lambda tensors: {renamed(name): value for name, value in tensors.items()}
    )


def n_audio_tokens(frames: int) -> int:
    """Positions that a clip of so many mel frames fills: two strides of 2."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def hf_inputs(clip_frames: list[list[int]], n_text: list[int], seed: int = 1) -> dict[str, Any]:
    """What a processor would return: rows with the given clips, left-padded, features random.

    Args:
        clip_frames: per row, mel frames of each clip.
        n_text: per row, number of text tokens (split around the clips).
        seed: of text and features.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, features, masks = [], [], []
    for clips, n in zip(clip_frames, n_text, strict=True):
        ids = torch.randint(3, N_BPE, (n,), generator=generator).tolist()
        row = ids[: n // 2]
        for frames in clips:
            row += [AUDIO_BOS] + [PLACEHOLDER] * n_audio_tokens(frames) + [AUDIO_EOS]
            features.append(torch.randn(MELS, 2 * MAX_SOURCE_POSITIONS, generator=generator))
            masks.append(torch.arange(2 * MAX_SOURCE_POSITIONS) < frames)
        rows.append(row + ids[n // 2 :])
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if features:
        inputs["input_features"] = torch.stack(features)
        inputs["feature_attention_mask"] = torch.stack(masks).long()
    return inputs


def byte_level_bpe(n: int = N_BPE) -> Tokenizer:
    """Bytes, and merges up to so many tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen2-Audio's special tokens."""
    bpe = byte_level_bpe()
    # Before the fast tokenizer, which would otherwise number its own special tokens first.
    bpe.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=list(SPECIALS),
    )
    ids = tokenizer.convert_tokens_to_ids(list(SPECIALS))
    assert ids == [PAD, IM_START, IM_END, PLACEHOLDER, AUDIO_BOS, AUDIO_EOS], ids
    assert len(tokenizer) <= VOCAB
    return tokenizer


def build_processor() -> Qwen2AudioProcessor:
    """The tokenizer, and a feature extractor for clips of at most a second."""
    extractor = WhisperFeatureExtractor(
        feature_size=MELS, chunk_length=1, sampling_rate=16000, return_attention_mask=True
    )
    return Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=build_tokenizer())


VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"n_kv_heads": 6},
    "mqa, sliding": {"n_heads": 5, "n_kv_heads": 1, "sliding": True},
    "mha, sliding": {"n_kv_heads": 6, "sliding": True},
    "no head_dim": {"d_model": 48, "d_head": None},
    "declared tied": {"tied": True},
}
"""Decoders by name: arguments of ``qwen2_audio_config``."""


class TinyModels:
    """Checkpoints by variant, and models loaded from them, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[Any, Any] = {}

    def folder(self, variant: str = "gqa", dtype: torch.dtype = torch.float32) -> Path:
        """A checkpoint; the one of ``gqa`` in float32 has processor files."""

        def make() -> Path:
            config = qwen2_audio_config(**VARIANTS[variant])
            folder = save_qwen2_audio(self.root / f"{variant} {dtype}", config, dtype)
            if (variant, dtype) == ("gqa", torch.float32):
                build_processor().save_pretrained(folder)
            return folder

        return self._once(("folder", variant, dtype), make)

    def in_memory_layout(self, variant: str = "gqa", dtype: torch.dtype = torch.float32) -> Path:
        """The same checkpoint with the names that the model has in memory."""
        source = self.folder(variant, dtype)
        out = self.root / f"{source.name} in memory"
        return self._once(out, lambda: resave_in_memory_layout(source, out))

    def hooked(
        self, variant: str = "gqa", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> HookedALM:
        """Ours; shared between tests, so hooks and edits have to be undone."""
        model = self._once(
            ("hooked", variant, dtype, attention),
            lambda: HookedALM.from_pretrained(
                self.folder(variant), dtype=dtype, attn_implementation=attention
            ),
        )
        model.zero_grad()  # of whatever test had it before
        return model

    def hf(
        self, variant: str = "gqa", dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> Qwen2AudioForConditionalGeneration:
        """Hugging Face's, loaded as users load it; shared between tests."""
        return self._once(
            ("hf", variant, dtype, attention),
            lambda: Qwen2AudioForConditionalGeneration.from_pretrained(
                self.folder(variant), dtype=dtype, attn_implementation=attention
            ).eval(),
        )

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]
