"""A tiny LLaMA 3.2 with a tokenizer that merges " A", questions for it, and plain HF's answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_reference import decoder_of
from hooked_alm.experiments.head_statistics.experiment import HeadStatistics
from hooked_alm.experiments.head_statistics.settings import HeadStatisticsConfig
from tiny import randomise

N_LAYERS, N_HEADS, N_KV_HEADS, D_HEAD = 3, 8, 2, 6
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SIZES = 31, 24, 45, 27, 38, 29, 33, 40, 26
"""Characters of each question: rows of a batch get different lengths."""

INSTRUCTION = (
    "You are a careful reasoner. Read the question and choose the single best answer from the "
    "options.\nThink step-by-step privately, but do not reveal your reasoning.\nReturn only the "
    "letter of the correct option ({}).\n\n"
)


def llama_folder(folder: Path) -> Path:
    """LLaMA 3.2's geometry: four query heads per kv head, llama3 rope, tied head; BOS in front."""
    config = LlamaConfig(
        hidden_size=N_HEADS * D_HEAD, intermediate_size=34, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=N_KV_HEADS, head_dim=D_HEAD,
        vocab_size=337, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
        },
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    randomise(model)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as LLaMA 3's: a letter is one token with the space before it; no pad."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = ["Answer: A Answer: B Answer: C Answer: D Answer: E Question: Options:"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[BOS, EOS],
    )  # fmt: skip
    bpe.train_from_iterator([*corpus, INSTRUCTION], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


def item(number: int, n_options: int = 4, **changes: Any) -> dict[str, Any]:
    """A question of ARC's format."""
    labels = list("ABCDEFG"[:n_options])
    made = {
        "id": f"item{number}",
        "question": f"Number {number}, " + "why " * (SIZES[number % len(SIZES)] // 4) + "?",
        "choices": {"text": [f"because {number + k}" for k in range(n_options)], "label": labels},
        "answerKey": labels[number % n_options],
    }
    return {**made, **changes}


def write_items(file: Path, items: Sequence[Mapping[str, Any] | str]) -> Path:
    """A JSONL file; strings go in as they are."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in items]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def some_items(n: int = 9) -> list[dict[str, Any]]:
    """Of four and of five options."""
    return [item(i, 5 if i % 4 == 3 else 4) for i in range(n)]


def experiment(model: Path, data: Path, **settings: Any) -> HeadStatistics:
    """The experiment, on one thread."""
    values = {"n_threads": 1, "max_length": 2000, **settings}
    return HeadStatistics(
        HeadStatisticsConfig.model_validate({"model": str(model), "data_dir": str(data), **values})
    )


def tables(whole: HeadStatistics) -> dict[str, pd.DataFrame]:
    """Measured tables and summaries of a run that writes no folder."""
    inputs = whole.identify()
    whole.load()
    rows: dict[str, list[Any]] = {}
    for unit in whole.units():
        for name, found in whole.measure(unit).tables.items():
            rows.setdefault(name, []).extend(found)
    run = whole.results(whole.config, inputs, {name: pd.DataFrame(r) for name, r in rows.items()})
    for name, table in whole.summaries(run):
        run.tables[name] = table
    return run.tables


# --- The same with nothing but Hugging Face and PyTorch hooks


def prompt(one: Mapping[str, Any], *, is_seed: bool) -> str:
    """``arc_mcq_v1``, written out from the seed document."""
    letters = one["choices"]["label"]
    named = ["A", "B", "C", "D"] if is_seed else letters
    lines = [f"{k}. {t}" for k, t in zip(letters, one["choices"]["text"], strict=True)]
    return (
        INSTRUCTION.format(", ".join(named[:-1]) + f", or {named[-1]}")
        + f"Question: {one['question']}\nOptions:\n" + "\n".join(lines)
        + ("\n\nAnswer: " if is_seed else "\n\nAnswer:")
    )  # fmt: skip


def hf_batches(
    tokenizer: Any, prompts: Sequence[str], size: int, cut: int | None = None
) -> list[dict[str, Tensor]]:
    """Left-padded arguments of Hugging Face's forward."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or EOS
    batches = []
    for first in range(0, len(prompts), size):
        ids = [tokenizer(text)["input_ids"][:cut] for text in prompts[first : first + size]]
        made = dict(tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        made["position_ids"] = (made["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        batches.append(made)
    return batches


@torch.no_grad()
def hf_head_outputs(hf: Any, inputs: Mapping[str, Tensor], *, is_seed: bool = False) -> Tensor:
    """What the heads put out, ``[layer, batch, pos, head, d_head]``.

    The input of ``o_proj``; for the seed attention weights times values, under eager attention.
    """
    layers = decoder_of(hf).layers
    d_head = layers[0].self_attn.head_dim
    seen: list[Tensor] = []
    handles = []
    for layer in layers:
        if is_seed:
            projection = layer.self_attn.v_proj
            handles.append(
                projection.register_forward_hook(lambda _, args, output: seen.append(output))
            )
        else:
            projection = layer.self_attn.o_proj
            handles.append(
                projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            )
    output = hf(**inputs, use_cache=False, output_attentions=is_seed)
    for handle in handles:
        handle.remove()
    heads = [one.unflatten(-1, (-1, d_head)) for one in seen]
    if is_seed:
        heads = [
            (
                weights @ v.transpose(1, 2).repeat_interleave(weights.shape[1] // v.shape[2], dim=1)
            ).transpose(1, 2)
            for weights, v in zip(output.attentions, heads, strict=True)
        ]
    return torch.stack(heads)


@torch.no_grad()
def hf_contributions(hf: Any, z: Tensor) -> Tensor:
    """``‖W_O[:, h d_h : (h + 1) d_h] z‖``, ``[layer, batch, pos, head]``, slice by slice."""
    width = z.shape[-1]
    found = []
    for layer, z_layer in zip(decoder_of(hf).layers, z, strict=True):
        weight = layer.self_attn.o_proj.weight.float()
        by_head = [
            (z_layer[..., h, :].float() @ weight[:, h * width : (h + 1) * width].T).norm(dim=-1)
            for h in range(z.shape[-2])
        ]
        found.append(torch.stack(by_head, dim=-1))
    return torch.stack(found)


def per_item(values: Tensor, mask: Tensor, token_agg: str) -> np.ndarray:
    """``[layer, batch, pos, head]`` -> ``[batch, layer, head]``, row by row."""
    rows = []
    for row, real in enumerate(mask.bool()):
        norms = values[:, row, real]
        rows.append(norms[:, -1] if token_agg == "last" else norms.double().mean(dim=1))
    return torch.stack(rows).numpy()
