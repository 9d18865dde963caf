"""What blocks add to the stream: by hand, and from a plain Hugging Face model."""

import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.methods.reading.contributions import block_contributions, contributions_of
from tiny import TinyModels, hf_inputs


def one(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, None, None]


def test_a_block_that_erases() -> None:
    """x = (3, 4), attn = -x: ratio 1, cosine -1."""
    found = contributions_of(one(3, 4), one(-3, -4), one(0, 0), centred=False)
    assert (found.attn.item(), found.attn_cosine.item()) == (1.0, pytest.approx(-1))
    assert found.both.item() == 1.0


@pytest.mark.parametrize("constant", [0.0, 10.0])
def test_a_constant_that_no_layer_norm_reads(constant: float) -> None:
    """x = (1, -1) + c (1, 1), attn = (-1, 1): raw, 1 and -1 become .0995 and -.0995."""
    x, attn = one(1 + constant, -1 + constant), one(-1, 1)
    centred = contributions_of(x, attn, one(0, 0), centred=True)
    raw = contributions_of(x, attn, one(0, 0), centred=False)
    assert (centred.attn.item(), centred.attn_cosine.item()) == pytest.approx((1, -1))
    expected = 1.0 if constant == 0 else 0.0995
    assert (raw.attn.item(), -raw.attn_cosine.item()) == pytest.approx((expected,) * 2, abs=5e-5)


def test_a_plain_model(tiny_models: TinyModels) -> None:
    """Every block's ratios at the last position, from hooks on Hugging Face's modules."""
    inputs = hf_inputs([[63], [23]], [9, 14])
    reference = tiny_models.hf()
    kept: dict[str, list[Tensor]] = {"x": [], "attn": [], "mlp": []}
    handles = []
    for layer in reference.model.language_model.layers:
        handles += [
            layer.register_forward_pre_hook(lambda m, a: kept["x"].append(a[0][:, -1])),
            layer.self_attn.register_forward_hook(lambda m, a, o: kept["attn"].append(o[0][:, -1])),
            layer.mlp.register_forward_hook(lambda m, a, o: kept["mlp"].append(o[:, -1])),
        ]
    model = HookedALM.from_pretrained(tiny_models.folder())
    x = model.encode(**inputs)
    with torch.no_grad():
        reference(**inputs, position_ids=x.position_ids)
    for handle in handles:
        handle.remove()
    stream, attn, mlp = (torch.stack(kept[name]).double() for name in ("x", "attn", "mlp"))
    found = block_contributions(model, x)
    assert not found.centred
    for ours, theirs in [
        (found.attn, attn.norm(dim=-1) / stream.norm(dim=-1)),
        (found.mlp, mlp.norm(dim=-1) / stream.norm(dim=-1)),
        (found.both, (attn + mlp).norm(dim=-1) / stream.norm(dim=-1)),
        (found.mlp_cosine, torch.cosine_similarity(mlp, stream, dim=-1)),
    ]:
        torch.testing.assert_close(ours[..., 0], theirs, rtol=1e-12, atol=1e-12)
