"""What a config says is acted on, states nothing, or is refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from all_cases import CASES
from hooked_alm import ConversionError, HookedALM, HookedALMError
from tiny import TinyModels, edit_config
from tiny_text import TextModels, text_batch

IDS = text_batch()["input_ids"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TextModels(tmp_path_factory.mktemp("text")).folder("llama")


def with_fields(folder: Path, out: Path, **fields: Any) -> Path:
    """A copy with other fields; a dotted name reaches into a part, ``...`` leaves a field out."""

    def change(config: dict[str, Any]) -> None:
        for path, value in fields.items():
            *parts, name = path.split(".")
            owner = config
            for part in parts:
                owner = owner[part]
            if value is ...:
                del owner[name]
            else:
                owner[name] = value

    return edit_config(folder, out, change)


@pytest.mark.parametrize(
    "fields",
    [
        {"unsloth_version": "2025.9.1", "unsloth_fixed": True, "model_name": "unsloth/x"},
        {"_name_or_path": "x", "_commit_hash": None, "_model_name_or_path": "from a GGUF"},
        {"trl_version": "0.20", "peft_version": "0.21", "transformers_version": None},
        {"unk_token_id": 0, "pretraining_tp": 2},
        {"quantization_config": None, "use_bidirectional_attention": None, "text_config": None},
        {"rope_scaling": None, "sliding_window": None, "head_dim": None, "new_field": None},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ..., "model_type": "llama"},
        {"architectures": "LlamaForCausalLM", "model_type": None},
        {"dtype": None},
        {"dtype": ..., "torch_dtype": "float32"},
        {"layer_types": ["full_attention"] * 3},
        {"max_position_embeddings": 10**9, "rms_norm_eps": 0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
        {
            "rope_parameters": ...,
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_theta": 9.0,
        },
    ],
)
@torch.no_grad()
def test_fields_that_state_nothing(llama: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """Null, and who saved it; what transformers computes with is computed with here."""
    folder = with_fields(llama, tmp_path / "m", **fields)
    hf = LlamaForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(HookedALM.from_pretrained(folder)(IDS), hf(IDS).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new_field": 0}, "does not act on new_field = 0"),
        ({"mlp_bias": True}, "does not act on mlp_bias = True"),
        ({"attention_bias": None}, "transformers refuses it.*attention_bias"),
        ({"layer_types": ["sliding_attention"] * 3}, "every layer attends to all before it"),
        ({"vocab_size": None}, "transformers refuses it.*vocab_size"),
        ({"num_attention_heads": 0}, "transformers refuses it.*ZeroDivisionError"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0, expected a whole number from 1"),
        ({"num_key_value_heads": 4}, "n_heads = 6 is not a multiple of n_key_value_heads = 4"),
        ({"head_dim": 0}, "head_dim = 0, expected a whole number from 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1, expected a whole number from 1 to"),
        ({"num_hidden_layers": True}, "transformers refuses it"),
        ({"num_hidden_layers": "3"}, "transformers refuses it"),
        ({"num_hidden_layers": 3.0}, "transformers refuses it"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, expected"),
        (
            {"hidden_size": 10**9, "head_dim": 10},
            "transformers refuses it|hidden_size = 1000000000",
        ),
        ({"intermediate_size": 10**9}, "intermediate_size = 1000000000, expected a whole number"),
        ({"vocab_size": 10**9}, "vocab_size = 1000000000, expected a whole number from 1 to"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0, expected no negative number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan, expected a number"),
        ({"rope_parameters": ..., "rope_theta": 0.0}, "rope_theta = 0.0 of its default rotary"),
        ({"rope_parameters": ..., "rope_theta": None}, "rope_theta = None of its default rotary"),
        ({"rope_parameters": ..., "rope_theta": "1e4"}, "rope_theta = '1e4' of its default"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 0}}, "factor = 0"),
        ({"rope_parameters.factor": float("inf")}, "factor = inf of its llama3 rotary"),
        ({"rope_parameters.rope_type": "dynamic"}, "rope_type = 'dynamic', expected one of"),
        ({"rope_parameters": 3}, "transformers refuses it"),
        ({"hidden_act": "sliu"}, "activation 'sliu', .*nearest: silu"),
        ({"architectures": [3]}, r"architectures = \[3\] and model_type = 'llama', expected"),
        ({"architectures": {"a": 1}}, "architectures = {'a': 1} and model_type"),
        ({"architectures": None, "model_type": []}, r"architectures = None and model_type = \[\]"),
        ({"text_config": []}, r"got text_config = \[\], expected an object"),
        ({"quantization_config": {"quant_method": ["x"]}}, "it is quantised"),
        ({"quantization_config": "gptq"}, "it is quantised"),
        ({"dtype": "bfloat61"}, "transformers refuses it|loading weights as 'bfloat61'"),
        ({"dtype": [1]}, r"loading weights as \[1\]: expected one of float32"),
        ({"id2label": [1]}, "transformers refuses it"),
    ],
)
def test_values_that_no_model_has(
    llama: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = with_fields(llama, tmp_path / "m", **fields)
    with pytest.raises(HookedALMError, match=f"(?s){message}"):
        HookedALM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("encoder_layers", 10**9, "encoder_layers = 1000000000, expected a whole number"),
        ("encoder_layers", -1, "encoder_layers = -1, expected a whole number"),
        ("encoder_attention_heads", 0, "encoder_attention_heads = 0, expected a whole number"),
        ("encoder_attention_heads", 5, "d_model = 24 is not a multiple of n_heads = 5"),
        ("d_model", 10**9, "d_model = 1000000000, expected a whole number"),
        ("d_model", "24", "transformers refuses it"),
        ("d_model", 24.0, "transformers refuses it"),
        ("num_mel_bins", True, "transformers refuses it"),
        ("max_source_positions", 0, "max_source_positions = 0, expected a whole number"),
        ("max_source_positions", None, "transformers refuses it"),
        ("dropout", 3.0, "dropout = 3.0, expected a number from 0 to 1"),
        ("dropout", float("nan"), "dropout = nan, expected a number from 0 to 1"),
        ("scale_embedding", 3, "transformers refuses it"),
        ("activation_function", "x", "got the activation 'x', expected one that transformers has"),
    ],
)
def test_encoders_that_no_model_has(
    tiny_models: TinyModels, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    fields = {f"audio_config.{path}": value}
    folder = with_fields(tiny_models.folder(), tmp_path / "m", **fields)
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        HookedALM.from_pretrained(folder)


@pytest.mark.parametrize("part", ["text_config", "audio_config"])
@pytest.mark.parametrize("value", [[], 3, "x", True])
def test_parts_that_are_no_objects(
    tiny_models: TinyModels, tmp_path: Path, part: str, value: Any
) -> None:
    folder = with_fields(tiny_models.folder(), tmp_path / "m", **{part: value})
    with pytest.raises(ConversionError, match=f"got {part} = .*, expected an object"):
        HookedALM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        (
            "Qwen2.5-Omni thinker",
            "audio_config.max_source_positions",
            3,
            "expected at most max_sou",
        ),
        ("Qwen2.5-Omni thinker", "audio_config.n_window", 0, "n_window = 0, expected a whole"),
        ("Qwen3-ASR", "audio_config.n_window_infer", 3, "n_window_infer = .* or more, got 3"),
        ("GLM-ASR", "audio_config.rope_parameters.rope_theta", 0.0, "rope_theta = 0.0 of its"),
        ("GLM-ASR", "audio_config.rope_parameters.partial_rotary_factor", 2, "a part of each head"),
        ("Granite-Speech", "window_size", 7, "window_size = 7 is not a multiple of downsample"),
        ("Granite-Speech", "text_config.logits_scaling", 0.0, "logits_scaling = 0.0, expected"),
        ("Granite-Speech", "text_config.embedding_multiplier", float("inf"), "_multiplier = inf"),
        ("Music Flamingo", "audio_frame_step", 0.0, "audio_frame_step = 0.0, expected a number ab"),
        ("Music Flamingo", "rope_parameters.partial_rotary_factor", 1.0, "turn .* dimensions of"),
        ("MiMo-Audio", "empty_id", 10**9, "empty_id = 1000000000, expected an id of the vocab"),
        ("Kimi-Audio", "kimia_mimo_layers", 0, "kimia_mimo_layers = 0, expected a whole"),
        ("Qwen-Audio", "rotary_emb_base", 0, "rotary_emb_base = 0, expected a number above 0"),
        ("Qwen-Audio", "layer_norm_epsilon", -1.0, "layer_norm_epsilon = -1.0, expected no neg"),
    ],
)
def test_families_check_what_is_their_own(
    tmp_path: Path, name: str, path: str, value: Any, message: str
) -> None:
    case, made = CASES[name], tmp_path / "made" / "model"
    made.mkdir(parents=True)
    case.save(made, torch.float32)
    folder = with_fields(made, tmp_path / "m", **{path: value})
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        HookedALM.from_pretrained(folder, components=case.components(made))


@torch.no_grad()
def test_a_config_without_a_dtype(llama: Path, tmp_path: Path) -> None:
    """The weights' own, as Hugging Face has it."""
    LlamaForCausalLM.from_pretrained(llama).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    folder = with_fields(tmp_path / "half", tmp_path / "m", dtype=...)
    model, hf = HookedALM.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    assert model.cfg.dtype == hf.dtype == torch.bfloat16
    assert torch.equal(model(IDS), hf(IDS).logits)
    assert HookedALM.from_pretrained(folder, dtype="float32").cfg.dtype == torch.float32
    assert "dtype" not in json.loads((folder / "config.json").read_text())
