"""HookedTransformer's hook points: each is here, of that shape, under that flag, in that order.

The tables are HookedTransformer 3.5.1's for grouped-query rotary models, written down from its runs
and not from this library; ``golden_hooks.json`` is this library's own list.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM, InputError
from tiny import TinyModels, hf_inputs
from tiny_text import FAMILIES, TextModels, text_batch

MODEL = {
    "hook_embed": "b p d", "ln_final.hook_scale": "b p 1", "ln_final.hook_normalized": "b p d",
    "unembed.hook_in": "b p d", "unembed.hook_out": "b p V",
}  # fmt: skip
BLOCK = {
    "hook_resid_pre": "b p d", "ln1.hook_scale": "b p 1", "ln1.hook_normalized": "b p d",
    "attn.hook_q": "b p H e", "attn.hook_k": "b p K e", "attn.hook_v": "b p K e",
    "attn.hook_rot_q": "b p H e", "attn.hook_rot_k": "b p K e", "attn.hook_attn_scores": "b H p p",
    "attn.hook_pattern": "b H p p", "attn.hook_z": "b p H e", "hook_attn_out": "b p d",
    "hook_resid_mid": "b p d", "ln2.hook_scale": "b p 1", "ln2.hook_normalized": "b p d",
    "mlp.hook_pre": "b p f", "mlp.hook_pre_linear": "b p f", "mlp.hook_post": "b p f",
    "hook_mlp_out": "b p d", "hook_resid_post": "b p d",
}  # fmt: skip
"""Always there, in firing order."""
FLAGGED = {
    "use_attn_result": {"attn.hook_result": "b p H d"},
    "use_split_qkv_input": {
        "hook_q_input": "b p H d", "hook_k_input": "b p K d", "hook_v_input": "b p K d",
    },
    "use_attn_in": {"hook_attn_in": "b p H d"},
    "use_hook_mlp_in": {"hook_mlp_in": "b p d"},
}  # fmt: skip
"""Of a block, only with the flag. Inputs split under a flag leave ``ln1``'s points as they are, of
which HookedTransformer keeps the v input's (see ``components/block.py``)."""
ORDER = """
    hook_resid_pre hook_attn_in hook_q_input hook_k_input hook_v_input ln1.hook_scale
    ln1.hook_normalized attn.hook_q attn.hook_k attn.hook_v attn.hook_rot_q attn.hook_rot_k
    attn.hook_attn_scores attn.hook_pattern attn.hook_z attn.hook_result hook_attn_out
    hook_resid_mid hook_mlp_in ln2.hook_scale ln2.hook_normalized mlp.hook_pre mlp.hook_pre_linear
    mlp.hook_post hook_mlp_out hook_resid_post
""".split()
OURS = {"mlp.hook_gate", *(f"attn.hook_{letter}_input" for letter in "qkv")}
OURS |= {f"attn.{letter}_norm.hook_{point}" for letter in "qk" for point in ("scale", "normalized")}
"""Points of a block that HookedTransformer lacks, or has under another name or with other axes."""
AUDIO = ("gqa", "mha", "ungrouped")


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> TextModels:
    return TextModels(tmp_path_factory.mktemp("text"))


@pytest.fixture(params=[*AUDIO, *FAMILIES])
def model(
    request: pytest.FixtureRequest, tiny_models: TinyModels, text_models: TextModels
) -> Iterator[HookedALM]:
    if request.param in FAMILIES:
        yield text_models.hooked(request.param)
        return
    model = tiny_models.hooked("mha" if request.param == "mha" else "gqa")
    model.set_ungroup_grouped_query_attention(request.param == "ungrouped")
    yield model
    model.set_ungroup_grouped_query_attention(False)


def inputs_of(model: HookedALM) -> dict[str, Any]:
    return text_batch() if model.audio is None else hf_inputs([[63], [23], []], [9, 14, 5])


@torch.no_grad()
def cached(model: HookedALM) -> dict[str, Tensor]:
    """What a cache without names keeps."""
    return model.run_with_cache(model.encode(**inputs_of(model)))[1].cache_dict


def check_shapes(model: HookedALM, cache: dict[str, Tensor], table: dict[str, str]) -> None:
    cfg, (batch, pos) = model.cfg, inputs_of(model)["input_ids"].shape
    n_kv_heads = cfg.n_heads if cfg.ungroup_grouped_query_attention else cfg.n_key_value_heads
    sizes = {"b": batch, "p": pos, "d": cfg.d_model, "H": cfg.n_heads, "K": n_kv_heads,
             "e": cfg.d_head, "f": cfg.d_mlp, "V": cfg.d_vocab, "1": 1}  # fmt: skip
    for name, axes in table.items():
        assert list(cache[name].shape) == [sizes[axis] for axis in axes.split()], name


def in_every_block(model: HookedALM, table: dict[str, str]) -> dict[str, str]:
    layers = range(model.cfg.n_layers)
    return {f"blocks.{layer}.{name}": axes for layer in layers for name, axes in table.items()}


def test_what_is_there_without_a_flag(model: HookedALM) -> None:
    cache = cached(model)
    check_shapes(model, cache, MODEL | in_every_block(model, BLOCK))
    flagged = [name for table in FLAGGED.values() for name in in_every_block(model, table)]
    assert not set(flagged) & set(cache)
    assert not {"hook_tokens", "hook_pos_embed"} & set(cache)


@pytest.mark.parametrize("flag", FLAGGED)
def test_what_a_flag_adds(model: HookedALM, flag: str) -> None:
    set_flag = getattr(model, f"set_{flag}")
    if flag == "use_attn_in" and model.cfg.n_groups > 1:
        with pytest.raises(InputError, match="grouped kv heads.*Use split q, k and v inputs"):
            set_flag(True)
        return
    before = set(cached(model))
    set_flag(True)
    cache = cached(model)
    set_flag(False)
    added = in_every_block(model, FLAGGED[flag])
    check_shapes(model, cache, MODEL | in_every_block(model, BLOCK) | added)
    assert set(cache) - before - set(model.aliases) == set(added)


def test_tokens_have_a_flag_but_no_setter(model: HookedALM) -> None:
    model.cfg.use_hook_tokens = True
    cache = cached(model)
    model.cfg.use_hook_tokens = False
    check_shapes(model, cache, {"hook_tokens": "b p"})
    assert torch.equal(cache["hook_tokens"], inputs_of(model)["input_ids"])


@torch.no_grad()
def test_firing_order(model: HookedALM) -> None:
    fired: list[str] = []
    names = model.matching(lambda name: not name.startswith("audio."))
    hooks = [(name, lambda value, hook: fired.append(hook.name)) for name in names]
    model.run_with_hooks(model.encode(**inputs_of(model)), fwd_hooks=hooks)
    expected = list(ORDER)
    if model.cfg.n_groups > 1:
        expected.remove("hook_attn_in")
    for layer in range(model.cfg.n_layers):
        prefix = f"blocks.{layer}."
        inside = [name.removeprefix(prefix) for name in fired if name.startswith(prefix)]
        assert [name for name in inside if name not in OURS] == expected
    around = [name for name in fired if not name.startswith("blocks.") and "_embed" not in name]
    assert around == ["hook_tokens", *(name for name in MODEL if name != "hook_embed")]
    assert fired.index("hook_embed") == fired.index("blocks.0.hook_resid_pre") - 1
