"""LLaMA, Qwen2 and Qwen3, text only: equal to Hugging Face, and strings go straight in."""

from pathlib import Path

import pytest
import torch
import transformers

from hooked_alm import ConversionError, HookedALM, InputError
from hooked_alm.converters.parity import run_ours, verify
from tiny_text import FAMILIES, LLAMA_SIZES, N_POS, TextModels, text_batch


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> TextModels:
    return TextModels(tmp_path_factory.mktemp("text"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_hugging_face(
    models: TextModels, name: str, attn: str, dtype: torch.dtype
) -> None:
    """Every depth and the logits, also while every hook point is watched."""
    hf = models.hf(name, dtype, attn)
    model = models.hooked(name, dtype, attn)
    inputs = text_batch()
    expected = hf(**inputs, output_hidden_states=True)
    found = run_ours(model, model.encode(**inputs))
    for depth, state in enumerate(expected.hidden_states[:-1]):
        assert torch.equal(found[f"depth {depth}"], state), f"first difference at depth {depth}"
    assert torch.equal(found["logits"], expected.logits)
    possible = [n for n in model.hook_dict if not model.unfireable(n)]
    watched, cache = model.run_with_cache(model.encode(**inputs), names_filter=possible)
    assert torch.equal(watched, expected.logits)
    assert set(cache.keys()) == set(possible)


@torch.no_grad()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_at_every_length(models: TextModels, name: str, attn: str) -> None:
    """Kernels treat the last rows of a block apart, and may round by how keys lie in memory."""
    hf, model = models.hf(name, attention=attn), models.hooked(name, attention=attn)
    ids = torch.arange(80)[None] % 97
    different = [
        n for n in range(1, 81) if not torch.equal(model(ids[:, :n]), hf(ids[:, :n]).logits)
    ]
    assert different == []


@pytest.mark.parametrize("name", FAMILIES)
def test_verify_and_generation(models: TextModels, name: str) -> None:
    """`verify` covers text models; greedy tokens are Hugging Face's, with and without cache."""
    assert verify(str(models.folder(name))).is_equal
    hf = models.hf(name)
    model = models.hooked(name)
    inputs = text_batch()
    options = {"max_new_tokens": 6, "do_sample": False}
    for use_cache in (True, False):
        expected = hf.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=use_cache,
            **options,
        )[:, N_POS:]  # fmt: skip
        found = model.generate(
            model.encode(**inputs), return_type="tokens", use_past_kv_cache=use_cache, **options
        )
        assert torch.equal(found, expected)


def test_the_variants_are_there(models: TextModels) -> None:
    """Each family brings what the others lack, or the parity above would show nothing."""
    llama, qwen2, qwen3 = (models.hooked(name) for name in FAMILIES)
    assert llama.unembed.weight is llama.embed.weight
    assert llama.blocks[0].attn.q_proj.bias is None
    assert qwen2.blocks[0].attn.q_proj.bias is not None
    assert qwen2.blocks[2].attn.sliding_window == 5
    assert qwen3.blocks[0].attn.q_norm.w.std() > 0.01
    assert "blocks.0.attn.q_norm.hook_normalized" in qwen3.hook_dict
    assert "blocks.0.attn.q_norm.hook_normalized" not in qwen2.hook_dict


def test_a_text_model_says_so(models: TextModels) -> None:
    """No audio, no prepare; a bias that the family has no place for is refused."""
    model = models.hooked("llama")
    with pytest.raises(InputError, match="it is a text model and hears no audio"):
        model.prepare(text="hello")
    with pytest.raises(InputError, match="its folder has no tokenizer"):
        model("hello")


def test_an_attention_bias_is_refused(tmp_path: Path) -> None:
    """LLaMA's config can ask for one; no supported checkpoint has it."""
    config = transformers.LlamaConfig(**LLAMA_SIZES, attention_bias=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="does not act on attention_bias = True"):
        HookedALM.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_declared_axes_are_the_shapes(models: TextModels, name: str) -> None:
    """What `hooked-alm hooks` prints is what a hook gets."""
    model = models.hooked(name)
    inputs = text_batch()
    shapes = model.hook_shapes()
    _, cache = model.run_with_cache(model.encode(**inputs), names_filter=list(shapes))
    free = {"batch": 3, "pos": N_POS, "query_pos": N_POS, "key_pos": N_POS, "1": 1}
    for point, axes in shapes.items():
        sizes = [int(a.partition("=")[2]) if "=" in a else free[a] for a in axes.split()]
        assert list(cache[point].shape) == sizes, point
