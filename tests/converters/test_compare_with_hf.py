"""``compare_with_hf``: equal where it is, and where it is not, the place of the fault."""

from typing import Any

import pytest
import torch
import transformers

from all_cases import CASES
from hooked_alm import HookedALM, compare_with_hf
from hooked_alm.converters.registry import family_of
from hooked_alm.errors import InputError
from tiny import TinyModels, hf_inputs

AUDIO = hf_inputs([[], [63], [23]], [9, 14, 6])


@pytest.mark.parametrize("name", CASES)
def test_every_family_of_transformers_is_equal(name: str, tmp_path: Any) -> None:
    """Every module of its blocks, and the logits."""
    case = CASES[name]
    case.save(tmp_path, torch.float32)
    model = HookedALM.from_pretrained(tmp_path, components=case.components(tmp_path))
    architecture = model.cfg.original_architecture
    family = family_of({"architectures": [architecture]}, tmp_path)
    if family.card.reference == "composed":
        pytest.skip("transformers has no class for it")
    hf = getattr(transformers, family.hf_class or architecture).from_pretrained(tmp_path).eval()
    short, middling, _ = case.clips
    found = compare_with_hf(model, hf, model.encode(**case.inputs([[middling], [short]], [9, 14])))
    assert found.is_equal, found.verdict()
    assert len(found.rows) == 12 * model.cfg.n_layers + 1
    assert {row.where.rpartition("hook_")[2] for row in found.rows} > {"z", "q", "resid_mid", "pre"}


@pytest.fixture
def pair(tiny_models: TinyModels) -> tuple[HookedALM, Any]:
    """Ours, freshly loaded, and Hugging Face's."""
    return HookedALM.from_pretrained(tiny_models.folder("gqa")), tiny_models.hf("gqa")


def test_the_first_difference_is_named(pair: tuple[HookedALM, Any]) -> None:
    model, hf = pair
    x = model.encode(**AUDIO)
    with torch.no_grad():
        model.blocks[1].attn.v_proj.weight[model.cfg.d_head + 3] += 1e-3  # kv head 1, unit 3
    found = compare_with_hf(model, hf, x)
    assert found.first is not None
    assert found.first.where == "blocks.1.attn.hook_v"
    assert (found.first.at["kv_head"], found.first.at["d_head"]) == (1, 3)
    assert all(row.is_equal for row in found.rows[: found.rows.index(found.first)])
    assert found.largest.max_abs_difference == max(row.max_abs_difference for row in found.rows)
    assert not found.passed
    shown = repr(found)
    assert "no (first at blocks.1.attn.hook_v, batch " in shown
    assert "blocks.0." not in shown
    # The index is of the padded batch.
    at = found.first.at
    _, cache = model.run_with_cache(x, names_filter="blocks.1.attn.hook_v")
    theirs = hf.get_decoder().layers[1].self_attn.v_proj
    seen = []
    handle = theirs.register_forward_hook(lambda _, args, out: seen.append(out))
    hf(**model.hf_arguments(x))
    handle.remove()
    apart = cache["blocks.1.attn.hook_v"] - seen[0].unflatten(-1, (-1, model.cfg.d_head))
    assert abs(apart[tuple(at.values())].item()) == found.first.max_abs_difference
    assert x.attention_mask[at["batch"], at["pos"]] == 1


def test_nan_is_a_difference(pair: tuple[HookedALM, Any]) -> None:
    model, hf = pair
    with torch.no_grad():
        model.blocks[2].mlp.up_proj.weight[5, 5] = torch.nan
    found = compare_with_hf(model, hf, model.encode(**AUDIO))
    assert str(found.first).startswith("blocks.2.mlp.hook_pre_linear")
    assert found.first is not None
    assert found.first.at["d_mlp"] == 5
    assert not found.passed


def test_what_cannot_be_compared_is_refused(
    pair: tuple[HookedALM, Any], tiny_models: TinyModels
) -> None:
    model, hf = pair
    x = model.encode(**AUDIO)
    hf.train()
    with pytest.raises(InputError, match="got a model in training mode, expected one in eval"):
        compare_with_hf(model, hf, x)
    hf.eval()
    hooks = [len(module._forward_hooks) for module in hf.modules()]
    layers, hf.get_decoder().layers = hf.get_decoder().layers, hf.get_decoder().layers[:2]
    with pytest.raises(InputError, match="with 2 blocks, expected one in eval mode with 4 blocks"):
        compare_with_hf(model, hf, x)
    hf.get_decoder().layers = layers
    assert compare_with_hf(model, hf, x).is_equal
    # transformers leaves hooks of its own once a test has asked it for hidden states.
    assert [len(module._forward_hooks) for module in hf.modules()] == hooks
