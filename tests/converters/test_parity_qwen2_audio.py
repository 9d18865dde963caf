"""Logits and every activation equal Hugging Face's, bit by bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from hf_reference import first_difference, hf_activations, with_positions
from hooked_alm import ALMInput, HookedALM
from tiny import (
    PLACEHOLDER,
    VARIANTS,
    VOCAB,
    TinyModels,
    edit_tensors,
    hf_inputs,
    qwen2_audio_config,
    save_qwen2_audio,
)

# Per row, the mel frames of its clips; per row, the number of text tokens.
CASES = {
    "one clip": ([[63]], [9]),
    "left-padded, audio of different lengths": ([[63], [23]], [9, 14]),
    "two clips and one": ([[30, 17], [97]], [8, 5]),
    "audio in one row only": ([[], [40]], [12, 7]),
    "text only": ([[]], [11]),
    "left-padded text": ([[], []], [7, 12]),
}


def everything(model: HookedALM, x: ALMInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with every point of the model recorded, and what was recorded."""
    logits, cache = model.run_with_cache(x, names_filter=lambda name: True)
    return logits, {**cache.cache_dict, **norm_outputs(model, cache.cache_dict)}


def norm_outputs(model: HookedALM, cache: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the norms return, which has no hook point: the scale times ``hook_normalized``."""
    norms = [name.removesuffix(".hook_normalized") for name in cache if "hook_normalized" in name]
    return {
        f"{name}.out": model.get_submodule(name).w * cache[f"{name}.hook_normalized"]
        for name in norms
    }


SMALL = ("left-padded, audio of different lengths", "two clips and one")
"""Cases for variants that differ from ``gqa`` and ``mha`` in one thing only."""


def check(hf: Any, model: HookedALM, inputs: Mapping[str, Tensor], case: str) -> None:
    """Equality of all activations and of logits, with every point recorded and with none."""
    reference = hf_activations(hf, with_positions(inputs))
    x = model.encode(**inputs)
    logits, recorded = everything(model, x)
    difference = first_difference(reference, recorded)
    assert difference is None, f"{case}: {difference}"
    assert torch.equal(logits, reference["unembed.hook_out"]), case
    assert torch.equal(model(x), reference["unembed.hook_out"]), case


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_equal_to_hugging_face(
    tiny_models: TinyModels, variant: str, dtype: torch.dtype, attention: str
) -> None:
    hf = tiny_models.hf(variant, dtype, attention)
    model = tiny_models.hooked(variant, dtype, attention)
    for case in CASES if variant in ("gqa", "mha") else SMALL:
        check(hf, model, hf_inputs(*CASES[case]), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_layout_and_dtype_on_disk_gives_the_same_model(
    tiny_models: TinyModels, dtype: torch.dtype
) -> None:
    inputs = hf_inputs(*CASES["two clips and one"])
    for stored in (torch.float32, torch.bfloat16):
        for folder in (
            tiny_models.folder("gqa", stored),
            tiny_models.in_memory_layout("gqa", stored),
        ):
            hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
            model = HookedALM.from_pretrained(folder, dtype=dtype)
            assert model.cfg.dtype == dtype
            check(hf, model, inputs, folder.name)
        # What the file says is the default.
        assert HookedALM.from_pretrained(folder).cfg.dtype == stored


@torch.no_grad()
def test_tied_head(tiny_models: TinyModels, tmp_path: Path) -> None:
    untied = tiny_models.folder("declared tied")
    folder = edit_tensors(
        untied, tmp_path / "m", lambda tensors: tensors.pop("language_model.lm_head.weight")
    )
    model = HookedALM.from_pretrained(folder)
    assert model.cfg.tie_word_embeddings
    assert model.unembed.weight is model.embed.weight
    # transformers 5.23 ties no Qwen2-Audio: it would leave a missing head random.
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(untied).eval()
    hf.lm_head.weight = hf.model.language_model.embed_tokens.weight
    check(hf, model, hf_inputs(*CASES["one clip"]), "tied")
    # A head that the checkpoint stores is used, whatever its config declares.
    assert not tiny_models.hooked("declared tied").cfg.tie_word_embeddings


ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 211 / 4},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@torch.no_grad()
def test_scaled_rotary_positions(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = qwen2_audio_config()
    config.text_config.rope_parameters = {"rope_theta": 5000.0, **rope}
    folder = save_qwen2_audio(tmp_path / "m", config, torch.float32)
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    model = HookedALM.from_pretrained(folder)
    assert model.cfg.rope_parameters["rope_type"] == rope["rope_type"]
    check(hf, model, hf_inputs(*CASES["two clips and one"]), rope["rope_type"])


@torch.no_grad()
def test_unusual_inputs(tiny_models: TinyModels) -> None:
    hf, model = tiny_models.hf(), tiny_models.hooked()
    full = hf_inputs([[100], [99]], [4, 5])
    check(hf, model, full, "clips of a whole second")
    long_pad = hf_inputs([[7], [100]], [2, 60])
    check(hf, model, long_pad, "more pads than text")
    right = hf_inputs([[63], [23]], [9, 14])
    pads = (right["attention_mask"] == 0).sum(1)
    for name in ("input_ids", "attention_mask"):
        rows = zip(right[name], pads.tolist(), strict=True)
        right[name] = torch.stack([row.roll(-n) for row, n in rows])
    assert right["attention_mask"][1, -1] == 0
    check(hf, model, right, "right-padded")
    shifted = hf_inputs([[63]], [9])
    positions = torch.arange(shifted["input_ids"].shape[1])[None] + 31
    expected = hf(**shifted, position_ids=positions).logits
    assert torch.equal(model(model.encode(**shifted, position_ids=positions)), expected)
    # Ids alone, as TransformerLens' tools pass them.
    text = hf_inputs([[]], [11])
    assert torch.equal(model(text["input_ids"]), hf(input_ids=text["input_ids"]).logits)


@torch.no_grad()
def test_clips_of_one_position(tiny_models: TinyModels) -> None:
    hf, model = tiny_models.hf(), tiny_models.hooked()
    inputs = hf_inputs([[4], [5]], [9, 6])
    assert (inputs["input_ids"] == PLACEHOLDER).sum() == 2
    reference = hf_activations(hf, with_positions(inputs))
    _, recorded = everything(model, model.encode(**inputs))
    # Without adjacent placeholders HF takes an older path, which embeds pads as zeros.
    difference = first_difference(reference, recorded, rows=inputs["attention_mask"].bool())
    assert difference is None, difference


def every_point(model: HookedALM) -> list[str]:
    return model.matching(lambda name: True)


@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa, sliding"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_observing_never_changes_the_run(tiny_models: TinyModels, variant: str, mode: Any) -> None:
    model = tiny_models.hooked(variant)
    inputs = hf_inputs(*CASES["two clips and one"])
    fired: list[str] = []

    def look(value: Tensor, hook: Any) -> None:
        fired.append(hook.name)

    def give_back(value: Tensor, hook: Any) -> Tensor:
        return value

    def give_a_copy(value: Tensor, hook: Any) -> Tensor:
        return value.detach().clone()

    with mode():
        expected = tiny_models.hf(variant)(**with_positions(inputs)).logits
        x = model.encode(**inputs)
        names = every_point(model)
        for hook in (look, give_back, give_a_copy):
            hooks = [(name, hook) for name in names]
            assert torch.equal(model.run_with_hooks(x, fwd_hooks=hooks), expected), hook.__name__
            with model.hooks(fwd_hooks=hooks):
                logits, cache = model.run_with_cache(x, names_filter=names)
            assert torch.equal(logits, expected), hook.__name__
            # Split inputs are stored under two names.
            assert set(cache.keys()) - set(model.aliases) == set(names)
        assert sorted(fired) == sorted(2 * names)  # each once in each of two runs
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_pattern_observed_under_sdpa_is_a_pattern(gqa: HookedALM, tiny_models: TinyModels) -> None:
    # Without audio, whose encoder has two kernels as well.
    inputs = hf_inputs(*CASES["left-padded text"])
    eager = hf_activations(tiny_models.hf(attention="eager"), with_positions(inputs))
    x = gqa.encode(**inputs)
    _, cache = gqa.run_with_cache(x, names_filter=lambda name: name.endswith("hook_pattern"))
    # Below the first attention both kernels have seen the same numbers.
    assert torch.equal(cache["pattern", 0], eager["blocks.0.attn.hook_pattern"])
    assert len(cache) == gqa.cfg.n_layers


def test_gradients_equal(gqa: HookedALM, tiny_models: TinyModels) -> None:
    """With respect to the merged embeddings, so at audio positions too, and to every layer."""
    hf, inputs = tiny_models.hf(), hf_inputs(*CASES["two clips and one"])
    expected: dict[str, Tensor] = {}
    residuals: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: residuals.append(args[0]))
        for layer in hf.model.language_model.layers
    ]
    loss = hf(**with_positions(inputs)).logits[:, -1, 5].sum()
    for handle in handles:
        handle.remove()
    for layer, gradient in enumerate(torch.autograd.grad(loss, residuals)):
        expected[f"blocks.{layer}.hook_resid_pre"] = gradient
    expected["hook_embed"] = expected["blocks.0.hook_resid_pre"]
    found: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        found[hook.name] = gradient.clone()

    x = gqa.encode(**inputs)
    with gqa.hooks(bwd_hooks=[(name, keep) for name in expected]):
        gqa(x)[:, -1, 5].sum().backward()
    gqa.zero_grad()
    difference = first_difference(expected, found)
    assert difference is None, difference
    assert (found["hook_embed"][x.spans.mask("audio")].abs().amax(-1) > 0).all()


def few_ulps(module_name: str, parameter: str) -> Any:
    """One element of one parameter, by about 16 units in the last place: one may round away."""

    def fault(model: HookedALM) -> None:
        weight = model.get_submodule(module_name).get_parameter(parameter)
        weight.view(-1)[-1] *= 1 + 2**-19

    return fault


def swap_gate_and_up(model: HookedALM) -> None:
    mlp = model.blocks[2].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def set_attribute(module_name: str, attribute: str, value: Any) -> Any:
    return lambda model: setattr(model.get_submodule(module_name), attribute, value)


FAULTS = {
    "audio.hook_encoder_out": few_ulps("audio.encoder.blocks.1.mlp", "up_proj.bias"),
    "audio.hook_projector_out": few_ulps("audio.projector", "linear.bias"),
    "hook_text_embed": few_ulps("embed", "weight"),
    "blocks.0.ln1.out": set_attribute("blocks.0.ln1", "eps", 1e-6),
    "blocks.1.attn.hook_k": few_ulps("blocks.1.attn", "k_proj.bias"),
    "blocks.0.attn.hook_rot_q": set_attribute("rotary", "attention_scaling", 1.0000001),
    "blocks.3.attn.hook_z": set_attribute("blocks.3.attn", "scaling", 0.3162),
    "blocks.2.hook_attn_out": few_ulps("blocks.2.attn", "o_proj.weight"),
    "blocks.3.ln2.out": few_ulps("blocks.3.ln2", "weight"),
    "blocks.2.mlp.hook_pre": swap_gate_and_up,
    "blocks.0.hook_mlp_out": few_ulps("blocks.0.mlp", "down_proj.weight"),
    "ln_final.out": few_ulps("ln_final", "weight"),
    "unembed.hook_out": few_ulps("unembed", "weight"),
}
"""First activation that has to be reported -> what goes wrong with the model."""


@torch.no_grad()
def test_the_comparison_finds_every_fault(tiny_models: TinyModels) -> None:
    inputs = hf_inputs(*CASES["two clips and one"])
    inputs["input_ids"][0, -1] = VOCAB - 1  # where the fault in the embedding is
    reference = hf_activations(tiny_models.hf(), with_positions(inputs))
    for name, fault in FAULTS.items():
        model = HookedALM.from_pretrained(tiny_models.folder())
        _, recorded = everything(model, model.encode(**inputs))
        assert first_difference(reference, recorded) is None
        fault(model)
        _, recorded = everything(model, model.encode(**inputs))
        difference = first_difference(reference, recorded)
        assert difference is not None, name
        assert difference.startswith(f"{name} differs by"), (name, difference)
