"""Converters account for every tensor and every config field; anything else is refused by name."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from hf_reference import with_positions
from hooked_alm import ConversionError, HookedALM, InputError
from hooked_alm.checkpoint import SafetensorsCheckpoint
from hooked_alm.converters import load_model
from hooked_alm.converters.devices import Destinations
from hooked_alm.converters.families import qwen2_audio
from hooked_alm.converters.rules import Drop, Lora, Rename, Split, fill, plan
from tiny import (
    TinyModels,
    edit_config,
    edit_tensors,
    hf_inputs,
    qwen2_audio_config,
    save_qwen2_audio,
)

INPUTS = hf_inputs([[63], [23]], [9, 14])
LAYER = "language_model.model.layers.2"
HEAD = "language_model.lm_head.weight"


@torch.no_grad()
def equals_hugging_face(model: HookedALM, folder: Path) -> bool:
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    return torch.equal(model(model.encode(**INPUTS)), hf(**with_positions(INPUTS)).logits)


# Tensors.


def drop(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def put(**new: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | new


def transpose(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: tensors[name].T.contiguous()}


def copy(name: str, to: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {to: tensors[name].clone()}


BAD_TENSORS: dict[str, tuple[Callable[..., Any], str]] = {
    "missing bias": (
        drop(f"{LAYER}.self_attn.k_proj.bias"),
        r"1 tensors do not fit.*\n  missing tensor for blocks.2.attn.k_proj.bias \[20\]\n",
    ),
    "missing head": (drop(HEAD), r"missing tensor for unembed.weight \[337, 54\]"),
    "missing embedding of the encoder": (
        drop("audio_tower.embed_positions.weight"),
        r"missing tensor for audio.encoder.embed_positions.weight \[50, 24\]",
    ),
    "missing layer": (
        lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(LAYER)},
        r"12 tensors do not fit",
    ),
    "extra tensor": (put(adapter=torch.ones(3)), r"unexpected tensor adapter \[3\]"),
    "extra bias": (
        put(**{f"{LAYER}.self_attn.o_proj.bias": torch.ones(54)}),
        r"unexpected tensor .*o_proj.bias \[54\]",
    ),
    "extra layer": (
        copy(
            f"{LAYER}.input_layernorm.weight",
            "language_model.model.layers.4.input_layernorm.weight",
        ),
        r"unexpected tensor .*layers.4.input_layernorm.weight",
    ),
    "transposed": (
        transpose(f"{LAYER}.mlp.up_proj.weight"),
        r"up_proj.weight has shape \[54, 34\], expected \[34, 54\]",
    ),
    "both names of one parameter": (
        copy(HEAD, "lm_head.weight"),
        r"lm_head.weight and .*lm_head.weight both fill unembed.weight",
    ),
    "almost the right name": (
        copy(HEAD, "xlanguage_model.lm_head.weight"),
        r"unexpected tensor xlanguage_model",
    ),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_tensors_that_do_not_fit(tiny_models: TinyModels, tmp_path: Path, fault: str) -> None:
    change, message = BAD_TENSORS[fault]
    for source in (tiny_models.folder("mha"), tiny_models.folder()):
        folder = edit_tensors(source, tmp_path / source.name, change)
        if source == tiny_models.folder():
            with pytest.raises(ConversionError, match=message):
                load_model(folder)
        else:  # other shapes, the same refusal
            with pytest.raises(ConversionError, match="tensors do not fit the model"):
                load_model(folder)


def test_all_offenders_are_listed_at_once(tiny_models: TinyModels, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors[f"{LAYER}.self_attn.k_proj.bias"]
        tensors["adapter"] = torch.ones(3)
        tensors[HEAD] = tensors[HEAD][:5]
        return tensors

    folder = edit_tensors(tiny_models.folder(), tmp_path / "m", change)
    with pytest.raises(ConversionError) as error:
        load_model(folder)
    message = str(error.value)
    assert "3 tensors do not fit" in message
    assert all(part in message for part in ("k_proj.bias", "adapter", "shape [5, 54]"))
    many = edit_tensors(
        tiny_models.folder(),
        tmp_path / "n",
        lambda t: t | {f"x{i}": torch.ones(1) for i in range(99)},
    )
    with pytest.raises(ConversionError, match="99 tensors do not fit(.|\n)*and 89 more"):
        load_model(many)


def test_not_a_number_in_a_tensor(tiny_models: TinyModels, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.mlp.gate_proj.weight"][3, 4] = float("nan")

    folder = edit_tensors(tiny_models.folder(), tmp_path / "m", change)
    with pytest.raises(ConversionError, match="layers.2.mlp.gate_proj.weight .*holds NaN"):
        load_model(folder)


def test_shards(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = save_qwen2_audio(
        tmp_path / "m", qwen2_audio_config(), torch.float32, max_shard_size="100KB"
    )
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert equals_hugging_face(load_model(folder), folder)
    state, whole = load_model(folder).state_dict(), tiny_models.hooked().state_dict()
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in state)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / shards[1].name).write_bytes(shards[1].read_bytes()[:-7])
    with pytest.raises(ConversionError, match=f"{shards[1].name} .*truncated or damaged"):
        load_model(cut)
    (cut / shards[1].name).unlink()
    with pytest.raises(ConversionError, match=f"{shards[1].name}: the file is missing"):
        load_model(cut)
    # A shard of another checkpoint.
    shutil.copy(shards[0], cut / shards[1].name)
    with pytest.raises(ConversionError, match="index.json and the shards disagree"):
        load_model(cut)


def test_no_weights(tiny_models: TinyModels, tmp_path: Path) -> None:
    shutil.copy(tiny_models.folder() / "config.json", tmp_path)
    with pytest.raises(ConversionError, match="found neither model.safetensors nor"):
        load_model(tmp_path)


def test_every_parameter_is_filled_from_the_file(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.folder())
    stored = load_file(tiny_models.folder() / "model.safetensors")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert len(list(model.parameters())) == len(stored)
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in stored.values())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_can_be_edited_without_touching_the_file(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_models.folder(), folder)
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert load_model(folder).W_E.any()


# The comparison with Hugging Face fails when a converter is wrong.


SWAPS = {
    "gate and up": ("gate_proj|up_proj", {"gate_proj": "up_proj", "up_proj": "gate_proj"}),
    "the norms": (
        "input_layernorm|post_attention_layernorm",
        {
            "input_layernorm": "post_attention_layernorm",
            "post_attention_layernorm": "input_layernorm",
        },
    ),
    "k and v": ("k_proj|v_proj", {"k_proj": "v_proj", "v_proj": "k_proj"}),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_names_break_parity(tiny_models: TinyModels, tmp_path: Path, swap: str) -> None:
    """What no shape tells apart, the comparison does."""
    pattern, other = SWAPS[swap]
    folder = edit_tensors(
        tiny_models.folder(),
        tmp_path / "m",
        lambda tensors: {
            re.sub(pattern, lambda m: other[m[0]], n)
            if "layers" in n and "audio" not in n
            else n: t
            for n, t in tensors.items()
        },
    )
    wrong = load_model(folder)
    assert not equals_hugging_face(wrong, tiny_models.folder())
    assert equals_hugging_face(load_model(tiny_models.folder()), tiny_models.folder())


def test_wrong_rules_break_parity(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same mistake in a converter; the first rule that fits a name decides."""
    mlp = r"language_model\.model\.layers\.(\d+)\.mlp"
    swapped = [
        Rename(rf"{mlp}\.{name}_proj\.weight", rf"blocks.\1.mlp.{other}_proj.weight")
        for name, other in (("gate", "up"), ("up", "gate"))
    ]
    rules = (*swapped, *qwen2_audio.FAMILY.rules)
    monkeypatch.setattr(qwen2_audio, "FAMILY", dataclasses.replace(qwen2_audio.FAMILY, rules=rules))
    assert not equals_hugging_face(load_model(tiny_models.folder()), tiny_models.folder())
    # Biases that were forgotten on purpose are still parameters without a tensor.
    rules = (Drop(r".*self_attn\.q_proj\.bias", "forgotten"), *rules[2:])
    monkeypatch.setattr(qwen2_audio, "FAMILY", dataclasses.replace(qwen2_audio.FAMILY, rules=rules))
    with pytest.raises(
        ConversionError, match=r"missing tensor for blocks.0.attn.q_proj.bias \[60\]"
    ):
        load_model(tiny_models.folder())


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.self_attn.q_proj.bias",
        f"{LAYER}.post_attention_layernorm.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear.bias",
        "audio_tower.layers.0.self_attn.v_proj.bias",
        "audio_tower.embed_positions.weight",
    ],
)
def test_one_wrong_number_breaks_parity(tiny_models: TinyModels, tmp_path: Path, name: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        # Not at a corner: the last positions of the encoder are padding.
        tensors[name].view(-1)[7] += 1e-3

    folder = edit_tensors(tiny_models.folder(), tmp_path / "m", change)
    wrong = load_model(folder)
    assert not equals_hugging_face(wrong, tiny_models.folder())
    assert equals_hugging_face(wrong, folder)


# Configs.


def set_field(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parts, last = path.split(".")

    def change(config: dict[str, Any]) -> None:
        for part in parts:
            config = config[part]
        config[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("logit_scale", 2.0),
        ("text_config.attn_logit_softcapping", 30.0),
        ("text_config.use_mrope", True),
        ("text_config.attention_bias", False),
        ("audio_config.use_conformer", True),
    ],
)
def test_unknown_fields_are_refused(
    tiny_models: TinyModels, tmp_path: Path, path: str, value: Any
) -> None:
    folder = edit_config(tiny_models.folder(), tmp_path / "m", set_field(path, value))
    name = path.rpartition(".")[2]
    with pytest.raises(ConversionError, match=f"does not act on {name} = {value}"):
        load_model(folder)


def test_all_unknown_fields_are_listed(tiny_models: TinyModels, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_config"] |= {"b_field": 1, "a_field": "x"}

    folder = edit_config(tiny_models.folder(), tmp_path / "m", change)
    with pytest.raises(ConversionError, match="a_field = 'x', b_field = 1"):
        load_model(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("_name_or_path", "Qwen/Qwen2-Audio-7B"),
        ("text_config.use_mrope", False),
        ("text_config.temperature", 0.3),
        ("text_config.attention_dropout", 0.1),
        ("audio_config.encoder_layerdrop", 0.1),
    ],
)
def test_fields_that_change_nothing_are_accepted(
    tiny_models: TinyModels, tmp_path: Path, path: str, value: Any
) -> None:
    folder = edit_config(tiny_models.folder(), tmp_path / "m", set_field(path, value))
    assert equals_hugging_face(load_model(folder), folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.num_key_value_heads", 4, "n_heads = 6 is not a multiple of"),
        ("text_config.num_hidden_layers", 3, "transformers refuses it(.|\n)*layer_types"),
        ("text_config.hidden_size", "wide", "transformers refuses it(.|\n)*hidden_size"),
        ("text_config.rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
         "rope_type = 'dynamic', expected one of"),
        ("text_config.intermediate_size", 35, r"shape \[34, 54\], expected \[35, 54\]"),
        ("text_config.head_dim", 12, r"expected \[72, 54\]"),
        ("audio_config.num_mel_bins", 9, r"conv1.weight has shape \[24, 8, 3\], expected \[24, 9"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(
    tiny_models: TinyModels, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    folder = edit_config(tiny_models.folder(), tmp_path / "m", set_field(path, value))
    with pytest.raises(ConversionError, match=message):
        load_model(folder)


def sparse(config: dict[str, Any]) -> dict[str, Any]:
    """As Qwen2-Audio-7B publishes it: hardly any text field, rope in the old form."""
    text, audio = config["text_config"], config["audio_config"]
    return {
        "architectures": config["architectures"],
        "model_type": "qwen2_audio",
        "audio_token_index": config["audio_token_index"],
        "ignore_index": -100,
        "vocab_size": text["vocab_size"],
        "torch_dtype": "float32",
        "transformers_version": "4.38.1",
        "audio_config": {
            name: audio[name]
            for name in ("model_type", "num_mel_bins", "encoder_layers", "encoder_attention_heads",
                         "encoder_ffn_dim", "encoder_layerdrop", "d_model", "dropout",
                         "attention_dropout", "activation_function", "activation_dropout",
                         "scale_embedding", "max_source_positions")
        },
        "text_config": {
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "intermediate_size": text["intermediate_size"],
            "max_position_embeddings": 8192,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000,
            "sliding_window": 32768,
            "torch_dtype": "bfloat16",
            "use_mrope": False,
            "vocab_size": text["vocab_size"],
        },
    }  # fmt: skip


def test_the_sparse_published_config(tmp_path: Path) -> None:
    """Sizes that the file leaves out come from transformers' defaults: 32 layers and heads."""
    from accelerate import init_empty_weights

    from hooked_alm.converters.loading import lay_out

    folder = tmp_path / "m"
    full = qwen2_audio_config().to_dict()
    full["architectures"] = ["Qwen2AudioForConditionalGeneration"]
    full["text_config"]["intermediate_size"] = 11008
    full["text_config"]["vocab_size"] = 156032
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sparse(full)))
    with init_empty_weights():
        model = lay_out(folder).model
    cfg = model.cfg
    sizes = (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.d_mlp)
    assert sizes == (32, 4096, 32, 32, 128, 11008)
    assert cfg.rope_parameters == {"rope_type": "default", "rope_theta": 10000}
    assert set(cfg.layer_types) == {"full_attention"}
    assert cfg.sliding_window is None
    assert not cfg.tie_word_embeddings
    assert (cfg.d_vocab, cfg.n_ctx, cfg.eps, cfg.act_fn) == (156032, 8192, 1e-5, "silu")


def test_a_sparse_config_runs(tiny_models: TinyModels, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> dict[str, Any]:
        small = sparse(config)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim"):  # fmt: skip
            small["text_config"][name] = config["text_config"][name]
        return small

    folder = edit_config(tiny_models.folder(), tmp_path / "m", change)
    model = load_model(folder)
    assert model.cfg.dtype == torch.float32
    assert equals_hugging_face(model, folder)


@pytest.mark.parametrize("where", ["quantization_config", "text_config.quantization_config"])
def test_quantised_checkpoints_are_refused_by_name(
    tiny_models: TinyModels, tmp_path: Path, where: str
) -> None:
    quantised = {"quant_method": "gptq", "bits": 4}
    folder = edit_config(tiny_models.folder(), tmp_path / "m", set_field(where, quantised))
    with pytest.raises(ConversionError, match=r"it is quantised \(gptq\).*original checkpoint"):
        load_model(folder)


def test_unsupported_architectures_list_the_supported(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    for change, named in (
        (set_field("architectures", ["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        (lambda config: {**config, "architectures": None, "model_type": "gpt2"}, "gpt2"),
    ):
        folder = edit_config(tiny_models.folder(), tmp_path / named, change)
        with pytest.raises(
            ConversionError,
            match=f"architecture {named} is not supported. Supported: .*Qwen2AudioForCond",
        ):
            load_model(folder)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it has no config.json"):
        load_model(tmp_path)
    for text in ("", "{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConversionError, match="it is no JSON object"):
            load_model(tmp_path)
    for missing in (tmp_path / "missing", str(tmp_path / "missing"), "./missing", ""):
        with pytest.raises(InputError, match="there is no such folder"):
            load_model(missing)
    with pytest.raises(InputError, match="the package carries bundled:.*, bundled:follows_voice"):
        load_model("bundled:follows_nobody")
    with pytest.raises(InputError, match="it is no folder, and the Hugging Face hub gave none"):
        load_model("nobody/nothing")


def test_options_with_wrong_values(tiny_models: TinyModels) -> None:
    folder = tiny_models.folder()
    with pytest.raises(InputError, match="'float8': expected one of float32, bfloat16, float16"):
        load_model(folder, dtype="float8")
    with pytest.raises(InputError, match="expected one of float32"):
        load_model(folder, dtype=torch.int8)
    with pytest.raises(InputError, match="attn_implementation='fast', expected one of sdpa, eager"):
        load_model(folder, attn_implementation="fast")
    with pytest.raises(InputError, match=r"got components \['text_model'\]"):
        load_model(folder, components={"text_model": "x"})


def test_dtype_by_name(tiny_models: TinyModels) -> None:
    model = HookedALM.from_pretrained(str(tiny_models.folder()), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # Rotary tables are made in fp32 whatever the weights are.
    assert model.rotary.inv_freq.dtype == torch.float32


def test_device_map(tiny_models: TinyModels) -> None:
    plain = tiny_models.hooked()
    with torch.no_grad():
        for device_map in ({"": "cpu"}, "auto"):
            model = load_model(tiny_models.folder(), device_map=device_map)
            x = model.encode(**INPUTS)
            assert torch.equal(model(x), plain(x))
            names = model.matching(lambda name: True)
            logits, cache = model.run_with_cache(x, names_filter=names)
            assert torch.equal(logits, plain(x))
            assert set(names) <= set(cache.keys())


# Rules, on their own.


def checkpoint_of(folder: Path, **shapes: tuple[int, ...]) -> SafetensorsCheckpoint:
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return SafetensorsCheckpoint(folder)


def test_dropped_tensors_carry_their_reason(tmp_path: Path) -> None:
    rules = [Drop(r".*_inv_freq", "computed from the config"), Rename(r"w_(\d+)", r"x.\1")]
    found = plan(checkpoint_of(tmp_path, a_inv_freq=(3,), w_7=(2,)), rules, {"x.7": (2,)})
    assert found.dropped == {"a_inv_freq": "computed from the config"}
    assert found.sources == {"x.7": "w_7"}


def test_the_first_rule_that_fits_decides(tmp_path: Path) -> None:
    rules = [Rename("w", "x"), Drop(".*", "everything else")]
    checkpoint = checkpoint_of(tmp_path, w=(2,), v=(1,))
    found = plan(checkpoint, rules, {"x": (2,)})
    assert found.sources == {"x": "w"}
    assert set(found.dropped) == {"v"}
    with pytest.raises(ConversionError, match="missing tensor for x"):
        plan(checkpoint, rules[::-1], {"x": (2,)})


def test_only_parameters_declared_tied_may_be_absent(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    assert plan(checkpoint, [], {"x": (2,)}, tied=["x"]).sources == {}
    with pytest.raises(ConversionError, match="missing tensor for y"):
        plan(checkpoint, [], {"x": (2,), "y": (2,)}, tied=["x"])


def test_fused_rows_go_to_their_parameters(gqa: HookedALM, tmp_path: Path) -> None:
    """In order, each as many rows as it has; of its own memory."""
    tensors = {"fused": torch.arange(14.0).reshape(7, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    rules = [Split("fused", ("q.weight", "k.weight", "v.weight"))]
    model = torch.nn.ModuleDict({n: torch.nn.Linear(2, size, bias=False)
                                 for n, size in (("q", 4), ("k", 2), ("v", 1))})  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = plan(checkpoint, rules, shapes)
    fill(model, gqa.cfg, checkpoint, found, Destinations({"": "cpu"}))
    rows = [model[name].weight for name in "qkv"]
    assert torch.equal(torch.cat([row.detach() for row in rows]), tensors["fused"])
    assert {row.untyped_storage().nbytes() for row in rows} == {32, 16, 8}
    with pytest.raises(ConversionError, match=r"fused has shape \[7, 2\], expected \[8, 2\]"):
        plan(checkpoint, rules, shapes | {"v.weight": (2, 2)})
    both = [*rules, Rename("fused", "q.weight")]
    assert plan(checkpoint, both, shapes).rows == found.rows


def test_updates_are_added_on_loading(gqa: HookedALM, tmp_path: Path) -> None:
    """``W + s B A``, by hand; half of one, or another width, is refused."""
    draw = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(size, generator=draw) for size in ((5, 4), (2, 4), (5, 2)))
    rules = [Rename("w", "x.weight"), Lora("a", "x.weight", "A", 3.0),
             Lora("b", "x.weight", "B", 3.0)]  # fmt: skip
    model = torch.nn.ModuleDict({"x": torch.nn.Linear(4, 5, bias=False)})
    shapes = {"x.weight": (5, 4)}

    def stored(**tensors: Tensor) -> SafetensorsCheckpoint:
        save_file(tensors, tmp_path / "model.safetensors")
        return SafetensorsCheckpoint(tmp_path)

    checkpoint = stored(w=w, a=a, b=b)
    found = plan(checkpoint, rules, shapes)
    fill(model, gqa.cfg, checkpoint, found, Destinations({"": "cpu"}))
    assert torch.equal(model["x"].weight.detach(), w + (b @ a) * 3.0)
    with pytest.raises(ConversionError, match="a has no factor B beside it"):
        plan(stored(w=w, a=a), rules, shapes)
    with pytest.raises(ConversionError, match=r"does not fit x.weight \[5, 4\]"):
        plan(stored(w=w, a=a, b=b[:3].clone()), rules, shapes)
