"""LLaMA, Qwen2 and Qwen3, text only: equal to Hugging Face, and strings go straight in."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hooked_alm import ConversionError, HookedALM, InputError
from hooked_alm.converters.parity import run_ours, verify
from hooked_alm.inputs import positions_from_mask
from tiny import randomise

SIZES: dict[str, Any] = dict(
    hidden_size=56, intermediate_size=34, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=10, vocab_size=97, max_position_embeddings=211,
    rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 60}, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True
    ),
    "qwen2": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, rope_theta=1e6),
}
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
}
FAMILIES = tuple(CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One randomised checkpoint per family, as Hugging Face saves it."""
    saved = {}
    for name, config in CONFIGS.items():
        saved[name] = tmp_path_factory.mktemp(name)
        model = CLASSES[name](config).eval()
        randomise(model)
        if name == "llama":
            model.tie_weights()
        model.save_pretrained(saved[name])
    return saved


def batch() -> dict[str, Tensor]:
    """A left-padded pair of unequal length."""
    ids = torch.randint(1, 97, (2, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions_from_mask(mask),
    }


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_hugging_face(
    folders: dict[str, Path], name: str, attn: str, dtype: torch.dtype
) -> None:
    """Every depth and the logits, also while every hook point is watched."""
    hf = CLASSES[name].from_pretrained(folders[name], dtype=dtype, attn_implementation=attn)
    model = HookedALM.from_pretrained(folders[name], dtype=dtype, attn_implementation=attn)
    inputs = batch()
    expected = hf.eval()(**inputs, output_hidden_states=True)
    found = run_ours(model, model.encode(**inputs))
    for depth, state in enumerate(expected.hidden_states[:-1]):
        assert torch.equal(found[f"depth {depth}"], state), f"first difference at depth {depth}"
    assert torch.equal(found["logits"], expected.logits)
    possible = [n for n in model.hook_dict if not model.unfireable(n)]
    watched, cache = model.run_with_cache(model.encode(**inputs), names_filter=possible)
    assert torch.equal(watched, expected.logits)
    assert set(cache.keys()) == set(possible)


@pytest.mark.parametrize("name", FAMILIES)
def test_verify_and_generation(folders: dict[str, Path], name: str) -> None:
    """`verify` covers text models; greedy tokens are Hugging Face's, with and without cache."""
    assert verify(str(folders[name])).is_equal
    hf = CLASSES[name].from_pretrained(folders[name]).eval()
    model = HookedALM.from_pretrained(folders[name])
    inputs = batch()
    options = {"max_new_tokens": 6, "do_sample": False}
    for use_cache in (True, False):
        expected = hf.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=use_cache,
            **options,
        )[:, 13:]  # fmt: skip
        found = model.generate(
            model.encode(**inputs), return_type="tokens", use_past_kv_cache=use_cache, **options
        )
        assert torch.equal(found, expected)


def test_the_variants_are_there(folders: dict[str, Path]) -> None:
    """Each family brings what the others lack, or the parity above would show nothing."""
    llama, qwen2, qwen3 = (HookedALM.from_pretrained(folders[name]) for name in FAMILIES)
    assert llama.unembed.weight is llama.embed.weight
    assert llama.blocks[0].attn.q_proj.bias is None
    assert qwen2.blocks[0].attn.q_proj.bias is not None
    assert qwen2.blocks[2].attn.sliding_window == 5
    assert qwen3.blocks[0].attn.q_norm.w.std() > 0.01
    assert "blocks.0.attn.q_norm.hook_normalized" in qwen3.hook_dict
    assert "blocks.0.attn.q_norm.hook_normalized" not in qwen2.hook_dict


def test_a_text_model_says_so(folders: dict[str, Path]) -> None:
    """No audio, no prepare; a bias that the family has no place for is refused."""
    model = HookedALM.from_pretrained(folders["llama"])
    with pytest.raises(InputError, match="it is a text model and hears no audio"):
        model.prepare(text="hello")
    with pytest.raises(InputError, match="it has no tokenizer for text"):
        model("hello")


def test_an_attention_bias_is_refused(tmp_path: Path) -> None:
    """LLaMA's config can ask for one; no supported checkpoint has it."""
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 60}, attention_bias=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="does not act on attention_bias = True"):
        HookedALM.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_declared_axes_are_the_shapes(folders: dict[str, Path], name: str) -> None:
    """What `hooked-alm hooks` prints is what a hook gets."""
    model = HookedALM.from_pretrained(folders[name])
    inputs = batch()
    shapes = model.hook_shapes()
    _, cache = model.run_with_cache(model.encode(**inputs), names_filter=list(shapes))
    free = {"batch": 2, "pos": 13, "query_pos": 13, "key_pos": 13, "1": 1}
    for point, axes in shapes.items():
        sizes = [int(a.partition("=")[2]) if "=" in a else free[a] for a in axes.split()]
        assert list(cache[point].shape) == sizes, point
