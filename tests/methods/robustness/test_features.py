"""Features that are written from a donor: by hand on rows, and controls of equal size."""

import pytest
import torch
from torch import Tensor

from hooked_alm import ALMInput, HookedALM
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.robustness.features import feature_hooks, feature_log
from robust_cases import prompts
from tiny import TinyModels

POINTS = ("blocks.1.hook_resid_post", "audio.encoder.blocks.0.hook_resid_post")


@pytest.fixture(scope="module")
def gqa(tiny_models: TinyModels) -> HookedALM:
    return tiny_models.hooked("gqa")


def rows(model: HookedALM, x: ALMInput, point: str) -> Tensor:
    return next(iter(rows_of(model, x, point, "audio").values())).values[point]


def dictionary(model: HookedALM, x: ALMInput, point: str) -> SparseAutoencoder:
    mine = rows(model, x, point)
    cfg = DictionaryConfig(d_in=mine.shape[1], d_sae=23, architecture="topk", k=4)
    return SparseAutoencoder.initialised(cfg, mine, seed=0)


@pytest.mark.parametrize("point", POINTS)
def test_rows_are_those_of_the_card(gqa: HookedALM, point: str) -> None:
    """M-SP-5: x + sum over S of (f' - f) W_dec; of no features nothing; dense ones move as far."""
    clean, attacked = prompts(gqa)
    sae = dictionary(gqa, clean, point)
    x, theirs = (rows(gqa, one, point) for one in (attacked, clean))
    f, g = sae.encode(x), sae.encode(theirs)
    some = [int(n) for n in (g - f).abs().sum(0).topk(3).indices]

    def written(latents: list[int], *, is_dense: bool = False) -> Tensor:
        hooks = feature_hooks(gqa, sae, point, latents, attacked, clean, is_dense=is_dense)
        with gqa.hooks(fwd_hooks=hooks):
            return rows(gqa, attacked, point)

    expected = x.clone()
    for n in some:
        expected += (g[:, n] - f[:, n])[:, None] * sae.W_dec[n]
    torch.testing.assert_close(written(some), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(written([]), x, rtol=0, atol=1e-5)
    size = (expected - x).norm(dim=1)
    assert size.max() > 0.01
    moved = written(some, is_dense=True) - x
    torch.testing.assert_close(moved.norm(dim=1), size, rtol=1e-3, atol=1e-4)
    towards = torch.nn.functional.cosine_similarity(moved, theirs - x)[size > 0.01]
    torch.testing.assert_close(towards, torch.ones_like(towards), rtol=0, atol=1e-3)


@pytest.mark.parametrize("point", POINTS)
def test_the_log_is_of_both_prompts(gqa: HookedALM, point: str) -> None:
    clean, attacked = prompts(gqa)
    sae = dictionary(gqa, clean, point)
    log = feature_log(gqa, sae, point, clean, attacked)
    pairs = [
        [sae.encode(rows(gqa, x[row], point)) for x in (clean, attacked)]
        for row in range(len(clean))
    ]
    assert int(log.items) == len(clean)
    assert int(log.rows) == sum(len(f) for f, _ in pairs)
    expected = torch.stack([(g - f).sum(0).abs() for f, g in pairs]).sum(0)
    torch.testing.assert_close(log.abs_sum[0].float(), expected, rtol=1e-3, atol=1e-3)
