"""Every hook point, none left out, holds what Hugging Face computes; where it cannot, our choice.

The reference is recorded by PyTorch hooks on Hugging Face's modules (see ``hf_reference``).
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from encoder_reference import CLOSE, encoder_recorded, layers_that_run
from hf_reference import every_point, first_difference, with_positions
from hooked_alm import HookedALM
from tiny import TinyModels, hf_inputs
from tiny_text import FAMILIES, TextModels, text_batch
from tolerances import OTHER_KERNEL

AUDIO = hf_inputs([[], [63], [23]], [9, 14, 6])
"""Left-padded, audio of different lengths, and a row without."""
EAGER_ONLY = {"hook_attn_scores", "hook_pattern"}


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> TextModels:
    return TextModels(tmp_path_factory.mktemp("text"))


def recorded(model: HookedALM, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    _, cache = model.run_with_cache(model.encode(**inputs), names_filter=lambda name: True)
    return cache.cache_dict


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gqa", "mha", "mqa, sliding", *FAMILIES])
def test_every_point_is_hugging_faces(
    tiny_models: TinyModels,
    text_models: TextModels,
    name: str,
    attention: str,
    dtype: torch.dtype,
) -> None:
    """Bit by bit, pads included, but for what heads write: Hugging Face adds heads up at once."""
    models: Any = text_models if name in FAMILIES else tiny_models
    inputs = text_batch() if name in FAMILIES else with_positions(AUDIO)
    hf = models.hf(name, dtype, attention)
    with encoder_recorded(layers_that_run(lambda: hf(**inputs))) as heard:
        expected = every_point(hf, inputs)
    expected |= heard
    found = recorded(models.hooked(name, dtype, attention), inputs)
    # Behind the pooling; the whole of it is `hook_encoder_out`.
    for point in ("hook_scale", "hook_normalized"):
        found.pop(f"audio.encoder.ln_final.{point}", None)
    left_out = {point.rpartition(".")[2] for point in set(found) - set(expected)}
    assert left_out == (set() if attention == "eager" else EAGER_ONLY)
    assert set(expected) <= set(found)
    results = {
        point: expected.pop(point)
        for point in list(expected)
        if point.endswith("hook_result" if "encoder" not in point else CLOSE)
    }
    difference = first_difference(expected, found)
    assert difference is None, difference
    close = OTHER_KERNEL[dtype]
    for point, result in results.items():
        torch.testing.assert_close(found[point], result, atol=close, rtol=close)


@torch.no_grad()
def test_masked_scores_and_pad_rows_are_hugging_faces(gqa: HookedALM) -> None:
    """Not HookedTransformer's minus infinity, and not its zeros in rows that see nothing."""
    cache = recorded(gqa, AUDIO)
    real = AUDIO["attention_mask"].bool()
    sees = real[:, None, :] & torch.ones(real.shape[1], real.shape[1]).tril().bool()
    for layer in range(gqa.cfg.n_layers):
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"].transpose(1, 2)
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"].transpose(1, 2)
        lowest = torch.finfo(scores.dtype).min
        seen = sees.unsqueeze(2).expand_as(scores)
        assert (scores[~seen] == lowest).all()
        assert (scores[seen] > lowest).all()
        assert (pattern[~real] == 1 / real.shape[1]).all()
        assert (pattern[real][~seen[real]] == 0).all()


@torch.no_grad()
def test_the_norm_before_attention_fires_once_beside_split_inputs(gqa: HookedALM) -> None:
    """On the shared stream; what a hook made of a head's input is divided by its own scale."""
    inputs = with_positions(AUDIO)
    block, head = gqa.blocks[1], 4
    plain = recorded(gqa, inputs)
    fired: list[str] = []
    seen: dict[str, Tensor] = {}

    def note(value: Tensor, hook: Any) -> None:
        fired.append(re.sub(r".*\.1\.", "", hook.name))
        seen[hook.name] = value.clone()

    def change_one_head(value: Tensor, hook: Any) -> Tensor:
        note(value, hook)
        value[:, :, head] *= torch.linspace(1, 3, value.shape[-1])
        return value

    hooks: list[Any] = [("blocks.1.hook_q_input", change_one_head)]
    for point in ("hook_k_input", "hook_v_input", "ln1.hook_scale", "ln1.hook_normalized"):
        hooks.append((f"blocks.1.{point}", note))
    hooks.append(("blocks.1.attn.hook_q", note))
    gqa.run_with_hooks(gqa.encode(**inputs), fwd_hooks=hooks)
    before = ["hook_q_input", "hook_k_input", "hook_v_input"]
    assert fired == [*before, "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q"]
    for point in ("ln1.hook_scale", "ln1.hook_normalized"):
        assert torch.equal(seen[f"blocks.1.{point}"], plain[f"blocks.1.{point}"])
    changed = plain["blocks.1.hook_resid_pre"] * torch.linspace(1, 3, gqa.cfg.d_model)
    own_scale = (changed.pow(2).mean(-1, keepdim=True) + gqa.cfg.eps).sqrt()
    q = plain["blocks.1.attn.hook_q"].clone()
    q[:, :, head] = (changed / own_scale * block.ln1.w) @ block.attn.W_Q[head]
    q[:, :, head] += block.attn.b_Q[head]
    close = OTHER_KERNEL[torch.float32]
    torch.testing.assert_close(seen["blocks.1.attn.hook_q"], q, atol=close, rtol=close)
