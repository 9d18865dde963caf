"""Features as units: the engine against the plain loop, hooks by hand, and their gradient."""

import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM, LogitDiff
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.attribution.features import attribute_features
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.dictionary.splice import feature_edit, splice_hooks
from hooked_alm.methods.patching.features import patch_features
from tiny import hf_inputs
from tolerances import ENGINE

POINTS = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.0.hook_resid_pre"]
ENCODER = "audio.encoder.blocks.0.hook_resid_post"
TOLERANCE = ENGINE[torch.float32] * 10  # logits of the order of 10
METRIC = LogitDiff(3, 7)


def inputs(model: HookedALM, seed: int = 1) -> ALMInput:
    return model.encode(**hf_inputs([[40], [77]], [9, 6], seed))


def dictionary(model: HookedALM, x: ALMInput, point: str, n: int = 31) -> SparseAutoencoder:
    rows = next(iter(rows_of(model, x, point).values())).values[point]
    cfg = DictionaryConfig(d_in=rows.shape[1], d_sae=n, architecture="topk", k=4)
    sae = SparseAutoencoder.initialised(cfg, rows, seed=0)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(n, generator=torch.Generator().manual_seed(1)))
    return sae


def metric_of(logits: Tensor) -> Tensor:
    found: Tensor = logits[:, -1, 3] - logits[:, -1, 7]
    return found


@pytest.mark.parametrize("point", [*POINTS, ENCODER])
@pytest.mark.parametrize("is_run", [True, False])
def test_the_engine_is_the_loop(gqa: HookedALM, point: str, is_run: bool) -> None:
    base, donor = inputs(gqa), inputs(gqa, seed=2)
    sae = dictionary(gqa, base, point)
    options = {"places": ("audio",), "sae": sae, "point": point}
    given = donor if is_run else "zero"
    fast = patch_features(gqa, base, given, METRIC, **options)
    loop = patch_features(gqa, base, given, METRIC, engine="hooks", **options)
    assert fast.axes == loop.axes
    assert len(fast.axes["feature"]) > 4
    torch.testing.assert_close(
        torch.tensor(fast.values), torch.tensor(loop.values), rtol=0, atol=TOLERANCE
    )
    assert (fast.effect != 0).any(axis=(1, 2)).mean() > 0.5


@pytest.mark.parametrize("point", [POINTS[0], ENCODER])
def test_taking_a_feature_out_is_an_edit_that_keeps_the_error(gqa: HookedALM, point: str) -> None:
    """Against ``splice_hooks``, which knows nothing of the engine."""
    base = inputs(gqa)
    sae = dictionary(gqa, base, point)
    found = patch_features(gqa, base, "zero", METRIC, sae, point, places=("audio",))
    for number, feature in enumerate(found.axes["feature"]):

        def without(f: Tensor, feature: int = feature) -> Tensor:
            return f.index_fill(-1, torch.tensor([feature]), 0.0)

        hooks = splice_hooks(gqa, base, {point: feature_edit(sae, without)})
        expected = metric_of(gqa.run_with_hooks(base, fwd_hooks=hooks))
        torch.testing.assert_close(
            torch.tensor(found.values[number, 0]).float(), expected, rtol=0, atol=TOLERANCE
        )


def test_all_features_at_once_are_the_reconstruction(gqa: HookedALM) -> None:
    """Together, exchanged features carry all of the donor that the dictionary reconstructs."""
    base, donor, point = inputs(gqa), inputs(gqa, seed=2), POINTS[0]
    sae = dictionary(gqa, base, point)
    every = tuple(range(sae.cfg.d_sae))
    found = patch_features(
        gqa, base, donor, METRIC, sae, point, features=[every, 3, ()], places=("audio", "readout")
    )
    assert found.axes == {
        "feature": (every, 3, ()), "place": ("audio", "readout"), "example": (0, 1),
    }  # fmt: skip
    _, cache = gqa.run_with_cache(donor, names_filter=point)
    mask = base.spans.mask("audio")[..., None]

    def exchanged(value: Tensor, hook: object) -> Tensor:
        return torch.where(mask, value + sae(cache[point]) - sae(value), value)

    expected = metric_of(gqa.run_with_hooks(base, fwd_hooks=[(point, exchanged)]))
    torch.testing.assert_close(
        torch.tensor(found.values[0, 0]).float(), expected, rtol=0, atol=TOLERANCE
    )
    assert (found.effect[2] == 0).all()


def test_scores_are_the_slope_of_a_small_patch(gqa: HookedALM) -> None:
    """Half the difference of two patches of ± 1 % of a feature's change, by hooks."""
    base, donor, point = inputs(gqa), inputs(gqa, seed=2), POINTS[0]
    sae = dictionary(gqa, base, point)
    scores = attribute_features(
        gqa, base, donor, METRIC, sae, point, places=("audio",), check=4, seed=0
    )
    assert scores.checked is not None
    assert len(scores.checked.coordinates) == 4
    _, cache = gqa.run_with_cache(donor, names_filter=point)
    theirs, mask = sae.encode(cache[point]), base.spans.mask("audio")[..., None]
    features = scores.scores.axes["feature"]
    largest = abs(scores.effect).max()
    for number in range(0, len(features), 5):
        i = features[number]
        moved = []
        for size in (0.01, -0.01):

            def nudged(value: Tensor, hook: object, i: int = i, size: float = size) -> Tensor:
                change = (theirs - sae.encode(value))[..., i, None] * sae.W_dec[i]
                return torch.where(mask, value + size * change, value)

            moved.append(metric_of(gqa.run_with_hooks(base, fwd_hooks=[(point, nudged)])))
        slope = (moved[0] - moved[1]) / 0.02
        found = torch.tensor(scores.effect[number, 0]).float()
        torch.testing.assert_close(found, slope, rtol=0, atol=0.02 * largest + 2e-3)


def test_refused(gqa: HookedALM) -> None:
    base = inputs(gqa)
    sae = dictionary(gqa, base, POINTS[0])
    with pytest.raises(InputError, match="expected a point of the blocks"):
        patch_features(gqa, base, "zero", METRIC, sae, "blocks.0.attn.hook_z")
    with pytest.raises(InputError, match=r"features \[31, 99\]: the dictionary has features 0 to"):
        patch_features(gqa, base, "zero", METRIC, sae, POINTS[0], features=[(2, 99), 31])
    narrow = SparseAutoencoder(DictionaryConfig(d_in=5, d_sae=9, architecture="topk", k=2))
    with pytest.raises(InputError, match="rows of width 5"):
        patch_features(gqa, base, "zero", METRIC, narrow, POINTS[0])
    with pytest.raises(InputError, match="attributing features"):
        attribute_features(gqa.towards("encoder"), base, "zero", METRIC, sae, ENCODER)
