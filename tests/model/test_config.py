"""Configs that describe no decoder are refused in words, before anything is laid out."""

from dataclasses import replace
from typing import Any

import pytest

from hooked_alm import ConversionError
from hooked_alm.components.rotary import rotary_frequencies
from hooked_alm.config import Branch, HookedALMConfig

CFG = HookedALMConfig(
    n_layers=2, d_model=12, n_heads=4, n_key_value_heads=2, d_head=6, d_mlp=10, d_vocab=9,
    n_ctx=32, eps=1e-5, act_fn="silu", attn_bias="qkv", qk_norm=False, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    layer_types=("full_attention",) * 2, sliding_window=None,
    original_architecture="Qwen2ForCausalLM", model_name="made here",
)  # fmt: skip


def change(**fields: Any) -> HookedALMConfig:
    """A copy with other values, which come from files and are of any type."""
    cfg = replace(CFG)
    for name, value in fields.items():
        setattr(cfg, name, value)
    return cfg


NO_SIZE = (0, -1, 2**70, 2.0, True, "4", None, [4], float("nan"))
NO_REAL = (float("nan"), float("inf"), 1e300, True, "1", [1.0])


@pytest.mark.parametrize("name", ["n_layers", "d_model", "n_heads", "n_key_value_heads", "d_head",
                                  "d_mlp", "d_vocab", "n_ctx"])  # fmt: skip
@pytest.mark.parametrize("value", NO_SIZE)
def test_sizes(name: str, value: Any) -> None:
    with pytest.raises(ConversionError, match=f"{name} = .*, expected a whole number from 1 to"):
        change(**{name: value})


@pytest.mark.parametrize("name", ["n_layers", "d_model", "n_heads", "d_mlp", "d_vocab"])
def test_sizes_that_no_model_has(name: str) -> None:
    with pytest.raises(ConversionError, match=f"{name} = 1000000000, expected a whole number"):
        change(**{name: 10**9})


@pytest.mark.parametrize(
    "name", ["eps", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
             "logits_scaling"],
)  # fmt: skip
@pytest.mark.parametrize("value", NO_REAL)
def test_reals(name: str, value: Any) -> None:
    with pytest.raises(ConversionError, match=f"{name} = .*, expected a number"):
        change(**{name: value})


ROPES: dict[str, dict[str, float]] = {
    "default": {"rope_theta": 1e4},
    "linear": {"rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_theta": 1e4, "factor": 2.0, "beta_fast": 32, "attention_factor": 1.1},
    "llama3": {"rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, n) for kind, rope in ROPES.items() for n in rope]
)
@pytest.mark.parametrize("value", [0, -2.0, *NO_REAL])
def test_rotary_constants(kind: str, name: str, value: Any) -> None:
    """Each of them divides, or is a base."""
    rope = {"rope_type": kind, **ROPES[kind]}
    change(rope_parameters=rope)
    with pytest.raises(
        ConversionError, match=f"{name} = .*{kind} rotary.*, expected a number above"
    ):
        change(rope_parameters={**rope, name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eps": -1.0}, "eps = -1.0, expected a number that is not negative"),
        ({"logits_scaling": 0}, "logits_scaling = 0, expected a number other than 0"),
        ({"d_head": 7}, "d_head = 7, expected an even number"),
        ({"n_key_value_heads": 3}, "n_heads = 4 is not a multiple of n_key_value_heads = 3"),
        ({"layer_types": ("full_attention",)}, "1 layer_types for 2 layers"),
        ({"layer_types": ([], "x")}, r"layer_types \[\[\], 'x'\], expected"),
        ({"layer_types": ("sliding_attention",) * 2}, "sliding_window = None, expected the pos"),
        ({"sliding_window": 0, "layer_types": ("sliding_attention",) * 2}, "sliding_window = 0"),
        ({"branches": (Branch(head="a", prefix="b", n_layers=0, from_layer=1),)}, "0 layers of"),
        ({"branches": (Branch(head="a", prefix="b", n_layers=1, from_layer=5),)}, "from layer 5"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_type = None, expected one of"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor = None of its"),
        ({"rope_parameters": {"rope_type": [], "rope_theta": 1e4}}, r"rope_type = \[\], expected"),
        ({"rope_parameters": {"rope_type": "llama3", **ROPES["llama3"], "low_freq_factor": 4.0}},
         "low_freq_factor = 4.0 .*expected less than high_freq_factor = 4.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2]}},
         r"mrope_section = \[1, 2\], expected three numbers that add up to the 6 / 2"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": "x"}},
         "mrope_section = 'x', expected three numbers"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                              "partial_rotary_factor": 2}}, "partial_rotary_factor = 2, expected"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        change(**fields)


def test_extreme_values_that_compute() -> None:
    """What transformers takes and computes with is taken."""
    rope = {"rope_type": "default", "rope_theta": 10000}
    assert change(eps=0, rope_parameters=rope).eps == 0
    assert change(n_ctx=10**9).n_ctx == 10**9  # a length allocates nothing


def test_constants_that_no_table_knows() -> None:
    """Whatever else goes into the frequencies, they are finite, and one for each pair."""
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    with pytest.raises(
        ConversionError, match="computing the rotary positions .* expected 3 finite"
    ):
        rotary_frequencies(change(rope_parameters=rope))
    with pytest.raises(ConversionError, match="KeyError.*original_max_position_embeddings"):
        rotary_frequencies(change(rope_parameters={"rope_type": "yarn", **ROPES["yarn"]}))
