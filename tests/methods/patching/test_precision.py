"""Sweeps in fp32 from weights in bf16: those of the same weights in a model in fp32."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.patching.metrics import KL, Logits, OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import patch_chains, patch_edges, path_patch
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.precision import in_float32
from tiny_text import TextModels, text_batch
from tolerances import ENGINE

HEAD, QUERY, KEY = (
    "blocks.0.attn.hook_z[1]", "blocks.1.attn.hook_q_input[2]", "blocks.1.attn.hook_k_input[0]",
)  # fmt: skip
METRIC = Logits([5, 17])
Call = Callable[..., PatchResult]
CALLS: dict[str, Call] = {
    **{f"patch {site}": partial(patch, site=site, places=["text", "readout"])
       for site in ("resid_pre", "z", "k", "post", "pattern")},
    "heads": partial(patch, site="z", heads="each", places=["readout"]),
    "edges": lambda *run, **options: path_patch(
        *run, [HEAD, "hook_embed"], [QUERY, KEY, "blocks.1.hook_mlp_in", "logits"], **options
    ),
    "ioi": lambda *run, **options: path_patch(*run, HEAD, [QUERY, "logits"], mode="ioi", **options),
    "sets": lambda *run, **options: patch_edges(
        *run, {"": [(HEAD, QUERY), ("blocks.1.hook_mlp_out", "logits")]}, **options
    ),
    "chains": lambda *run, **options: patch_chains(*run, [(HEAD, KEY, "logits")], **options),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[HookedALM, HookedALM]:
    """A model in bf16, and the same numbers in fp32."""
    models = TextModels(tmp_path_factory.mktemp("text"))
    low = models.hooked("qwen3", torch.bfloat16)
    high = models.hooked("qwen3")
    high.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    return low, high


def batches(model: HookedALM) -> tuple[ALMInput, ALMInput]:
    base = text_batch()
    return model.encode(**base), model.encode(**{**base, "input_ids": base["input_ids"].flip(0)})


@pytest.mark.parametrize("engine", ["fast", "hooks"])
@pytest.mark.parametrize("name", CALLS)
def test_equal_to_the_model_in_fp32(
    pair: tuple[HookedALM, HookedALM], name: str, engine: Any
) -> None:
    low, high = pair
    x, other = batches(low)
    found = CALLS[name](low, x, other, METRIC, precision="float32", engine=engine)
    expected = CALLS[name](high, x, other, METRIC, engine=engine)
    limit = ENGINE[torch.float32] * np.abs(expected.base).max()
    for ours, theirs in zip(_parts(found), _parts(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)
    assert found.noise is None
    rounded = CALLS[name](low, x, other, METRIC, engine=engine)
    assert np.nanmax(np.abs(rounded.values - found.values)) > 20 * limit


def _parts(result: PatchResult) -> list[np.ndarray]:
    return [result.values, result.base, result.donor]


@pytest.mark.parametrize("metric", [KL(), OnLogits(lambda logits: logits[:, -1, :7])])
def test_metrics_of_the_whole_vocabulary(pair: tuple[HookedALM, HookedALM], metric: Any) -> None:
    low, high = pair
    x, other = batches(low)
    found = patch(low, x, other, metric, places=["text"], precision="float32")
    expected = patch(high, x, other, metric, places=["text"])
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-4)


def test_nothing_of_it_stays(pair: tuple[HookedALM, HookedALM]) -> None:
    """Weights, hooks and dtype are as before, also after an error within."""
    low, _ = pair
    x, _ = batches(low)
    before = {name: value.clone() for name, value in low.state_dict().items()}
    logits = low(x)

    def fails(value: torch.Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), in_float32(low):
        low.run_with_hooks(x, fwd_hooks=[("blocks.1.mlp.hook_post", fails)])
    with in_float32(low):
        assert low(x).dtype == torch.float32
    assert low.cfg.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in low.state_dict().items())
    assert all(value.dtype == torch.bfloat16 for value in low.parameters())
    assert not any(one._forward_pre_hooks for one in low.modules())
    assert torch.equal(low(x), logits)


def test_refusals(pair: tuple[HookedALM, HookedALM], monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = pair
    x, other = batches(low)
    with in_float32(high):
        assert not any(one._forward_pre_hooks for one in high.modules())
    monkeypatch.setattr(low.cfg, "attn_implementation", "flash_attention_2")
    with pytest.raises(InputError, match="flash_attention_2 knows half precision alone"):
        patch(low, x, other, METRIC, precision="float32")


def test_audio_stays_as_it_was_heard(tiny_models: Any) -> None:
    """The encoder runs in bf16; its output enters the blocks as it is."""
    from engine_runs import BASE

    model = tiny_models.hooked("gqa", torch.bfloat16)
    x = model.encode(**BASE)
    heard = model(x, stop_at_layer=0)
    with in_float32(model):
        assert torch.equal(model(x, stop_at_layer=0), heard.float())


@pytest.mark.parametrize("engine", ["fast", "hooks"])
def test_logits_of_a_metric_are_read_in_fp32(tmp_path: Path, engine: Any) -> None:
    """From the stream as it is: in bf16 a logit near 100 has steps of 1/2."""
    model = TextModels(tmp_path).hooked("qwen3", torch.bfloat16)
    with torch.no_grad():
        model.ln_final.weight.mul_(64)
    x, other = batches(model)
    logits = model(x).detach()[:, -1, [5, 17]].double().numpy()
    for metric in (METRIC, KL()):
        found = patch(model, x, other, metric, site="mlp_out", places=["text"], engine=engine)
        stream = [model(p, stop_at_layer=model.cfg.n_layers)[:, -1].detach() for p in (x, other)]
        base, donor = (_by_hand(model, one) for one in stream)
        if isinstance(metric, KL):
            np.testing.assert_allclose(found.base, 0, atol=1e-5)
            np.testing.assert_allclose(found.donor, _divergence(base, donor), rtol=1e-4, atol=1e-9)
        else:
            np.testing.assert_allclose(found.base, base[:, [5, 17]], rtol=1e-5)
            assert np.abs(found.base - logits).max() > 0.05
    assert model.unembed.weight.dtype == torch.bfloat16
    assert not model.ln_final._forward_pre_hooks


def _by_hand(model: HookedALM, stream: torch.Tensor) -> torch.Tensor:
    stream = stream.double()
    scale = (stream.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    return (
        stream / scale * model.ln_final.w.detach().double()
    ) @ model.unembed.W_U.detach().double()


def _divergence(base: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    log_p, log_q = base.log_softmax(-1), donor.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
