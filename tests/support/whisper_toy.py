"""A tiny Whisper with processor files, multilingual or English alone, and its reference."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from hooked_alm import HookedALM
from tiny import byte_level_bpe, randomise

MELS, POSITIONS, TARGETS = 10, 50, 60
"""Mel bins, positions of a second of audio, and of the decoder's prompts."""
N_BPE = 280
LANGUAGES = {"<|en|>": N_BPE + 2, "<|zh|>": N_BPE + 3}
SPECIALS = (
    "<|endoftext|>", "<|startoftranscript|>", *LANGUAGES, "<|translate|>", "<|transcribe|>",
    "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
IDS = {token: N_BPE + i for i, token in enumerate(SPECIALS)}
END, START, NO_TIMESTAMPS = (
    IDS[f"<|{name}|>"] for name in ("endoftext", "startoftranscript", "notimestamps")
)
TIMES = NO_TIMESTAMPS + 1
"""Id of ``<|0.00|>``; there are 51, up to a second."""
VOCAB = TIMES + 51
LAYERS = {"encoder": 3, "decoder": 2}


def config(**changes: Any) -> WhisperConfig:
    """Heads 12 and 24 wide, so that a misplaced scale shows; no two sizes alike."""
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB, num_mel_bins=MELS, encoder_layers=3, encoder_attention_heads=4,
        decoder_layers=2, decoder_attention_heads=2, encoder_ffn_dim=56, decoder_ffn_dim=72,
        d_model=48, max_source_positions=POSITIONS, max_target_positions=TARGETS,
        pad_token_id=END, bos_token_id=END, eos_token_id=END, decoder_start_token_id=START,
    )  # fmt: skip
    return WhisperConfig(**{**sizes, **changes})


def generation(is_multilingual: bool = True) -> GenerationConfig:
    """Every setting that published files have."""
    own: dict[str, Any] = {}
    if is_multilingual:
        own = {
            "lang_to_id": LANGUAGES,
            "task_to_id": {task: IDS[f"<|{task}|>"] for task in ("transcribe", "translate")},
        }
    return GenerationConfig(
        decoder_start_token_id=START, eos_token_id=END, pad_token_id=END, bos_token_id=END,
        max_length=TARGETS, no_timestamps_token_id=NO_TIMESTAMPS, max_initial_timestamp_index=25,
        is_multilingual=is_multilingual, prev_sot_token_id=IDS["<|startofprev|>"],
        suppress_tokens=[7, 11, START, *LANGUAGES.values(), IDS["<|startofprev|>"],
                         IDS["<|nospeech|>"]],
        begin_suppress_tokens=[32, END], alignment_heads=[[0, 1], [1, 0], [1, 1]],
        return_timestamps=False, **own,
    )  # fmt: skip


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Whisper's control tokens and times."""
    bpe = byte_level_bpe(N_BPE)
    bpe.add_special_tokens([AddedToken(word, special=True) for word in SPECIALS])
    bpe.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>") for i in range(51)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS),
    )  # fmt: skip
    assert made.convert_tokens_to_ids("<|0.00|>") == TIMES
    assert len(made) == VOCAB
    return made


def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=MELS, chunk_length=1)


def save(
    folder: Path, dtype: torch.dtype = torch.float32, is_multilingual: bool = True, **changes: Any
) -> Path:
    """A randomised checkpoint with everything that a published one has."""
    model = WhisperForConditionalGeneration(config(**changes)).eval()
    randomise(model)
    model.tie_weights()
    model.generation_config = generation(is_multilingual)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    extractor().save_pretrained(folder)
    return folder


def mel(n: int = 2, seed: int = 0) -> Tensor:
    """Spectrograms of noise."""
    return torch.randn(n, MELS, 2 * POSITIONS, generator=torch.Generator().manual_seed(seed))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """A recording of noise that swells and fades."""
    n = round(16000 * seconds)
    found: np.ndarray = np.random.default_rng(seed).normal(0, 0.1, n) * np.sin(np.arange(n) / 4000)
    return found.astype(np.float32)


def prompts(n_text: tuple[int, ...] = (9, 6), seed: int = 1) -> dict[str, Any]:
    """Arguments of ``forward``: left-padded prompts, a spectrogram each."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, N_BPE, (n,), generator=draw).tolist() for n in n_text]
    width = max(n_text)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in n_text])
    return {
        "input_features": mel(len(n_text)),
        "decoder_input_ids": torch.tensor([[END] * (width - len(row)) + row for row in rows]),
        "decoder_attention_mask": mask,
        "decoder_position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


class Whispers:
    """Checkpoints, models and references, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[Any, Any] = {}

    def folder(self, dtype: torch.dtype = torch.float32, is_multilingual: bool = True) -> Path:
        where = self.root / f"{dtype} {is_multilingual}"
        return self._once(where, lambda: save(where, dtype, is_multilingual))

    def hooked(
        self, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **folder: Any
    ) -> HookedALM:
        """Ours; shared, so hooks and edits have to be undone."""
        model = self._once(
            ("ours", dtype, attention, *folder.items()),
            lambda: HookedALM.from_pretrained(
                self.folder(**folder), dtype=dtype, attn_implementation=attention
            ),
        )
        model.zero_grad()  # of whatever test had it before
        return model

    def hf(
        self, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **folder: Any
    ) -> WhisperForConditionalGeneration:
        """Hugging Face's; shared."""
        return self._once(
            ("theirs", dtype, attention, *folder.items()),
            lambda: WhisperForConditionalGeneration.from_pretrained(
                self.folder(**folder), dtype=dtype, attn_implementation=attention
            ).eval(),
        )

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]
