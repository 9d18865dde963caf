"""Attention knockout against Hugging Face under a mask, and masked scores, by either engine."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_reference import decoder_of, with_positions
from hooked_alm import HookedALM, InputError
from hooked_alm.methods.patching.knock_out import knock_out, random_keys, windows
from hooked_alm.methods.patching.metrics import Logits
from tiny import N_LAYERS, PLACEHOLDER, TinyModels, hf_inputs
from tolerances import ENGINE, FAST_ENGINE

INPUTS = hf_inputs([[63], [23]], [9, 14])
TOKENS = (3, 77, 301)
LAST = INPUTS["input_ids"].shape[1] - 1
WINDOWS: tuple[Any, ...] = (1, (0, 1), tuple(range(N_LAYERS)))


def audio_mask() -> Tensor:
    """Where the clips stand, from their placeholders."""
    return INPUTS["input_ids"] == PLACEHOLDER


def random_mask() -> Tensor:
    """Other keys in either row, none of them the readout."""
    mask = torch.zeros(INPUTS["input_ids"].shape, dtype=torch.bool)
    mask[0, [2, 5, 11]] = True
    mask[1, [7, 8, 20, 24]] = True
    return mask


def by_hugging_face(hf: Any, hidden: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Logits at the readout where attention masks of some blocks hide keys from its query."""

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"].clone()
        if mask.dtype == torch.bool:
            mask[:, :, LAST] &= ~hidden[:, None]
        else:
            mask[:, :, LAST].masked_fill_(hidden[:, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    layers = decoder_of(hf).layers
    handles = [layers[b].register_forward_pre_hook(hide, with_kwargs=True) for b in blocks]
    try:
        with torch.no_grad():
            return hf(**with_positions(INPUTS)).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("engine", ["fast", "hooks"])
@pytest.mark.parametrize("variant", ["gqa", "mha"])
def test_every_cell_is_hugging_face_under_a_mask(
    tiny_models: TinyModels, variant: str, engine: Any
) -> None:
    model, hf = tiny_models.hooked(variant), tiny_models.hf(variant)
    sets = {"audio": audio_mask(), "random": random_mask()}
    found = knock_out(
        model, model.encode(**INPUTS), Logits(TOKENS), layers=WINDOWS, engine=engine,
        keys={"audio": "audio", "random": sets["random"], "none": torch.zeros_like(audio_mask())},
    )  # fmt: skip
    assert found.axes["layer"] == (1, (0, 1), tuple(range(N_LAYERS)))
    assert found.axes["keys"] == ("audio", "random", "none")
    for i, window in enumerate(WINDOWS):
        blocks = (window,) if isinstance(window, int) else window
        for name, hidden in sets.items():
            theirs = by_hugging_face(hf, hidden, blocks)[:, TOKENS]
            ours = found.values[i, found.axes["keys"].index(name)]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=FAST_ENGINE[torch.float32])
            assert np.abs(ours - found.base).max() > 0.01
        np.testing.assert_allclose(found.values[i, 2], found.base, rtol=0, atol=1e-5)


def scores_without(model: HookedALM, row: int, query: int, keys: list[int], head: int) -> Tensor:
    """Logits at the readout where block 2 lacks keys of one head and query, by its scores."""

    def hide(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[row, head, query, keys] = float("-inf")
        return scores

    x = model.encode(**INPUTS)
    hooks = [("blocks.2.attn.hook_attn_scores", hide)]
    return model.run_with_hooks(x, fwd_hooks=hooks)[row, -1, list(TOKENS)]


@pytest.mark.parametrize("engine", ["fast", "hooks"])
@torch.no_grad()
def test_heads_and_queries_are_chosen_alone(gqa: HookedALM, engine: Any) -> None:
    x, hidden = gqa.encode(**INPUTS), random_mask()
    for query in (LAST, 22):
        found = knock_out(
            gqa, x, Logits(TOKENS), keys={"some": hidden}, queries=query, layers=[2],
            heads=[1, 4], engine=engine,
        )  # fmt: skip
        assert [*found.axes] == ["layer", "head", "keys", "example", "label"]
        for h, head in enumerate((1, 4)):
            for row in (0, 1):
                keys = hidden[row].nonzero().flatten().tolist()
                theirs = scores_without(gqa, row, query, keys, head)
                np.testing.assert_allclose(
                    found.values[0, h, 0, row], theirs, rtol=0,
                    atol=ENGINE[torch.float32] * np.abs(found.base).max(),
                )  # fmt: skip
        assert np.abs(found.effect).max() > 1e-3


@torch.no_grad()
def test_a_query_that_sees_itself_alone_reads_its_own_value(gqa: HookedALM) -> None:
    """The pattern is 1 on itself: z of every head is the value of its group, at the readout."""
    x = gqa.encode(**INPUTS)
    rest = torch.ones_like(audio_mask())
    rest[:, LAST] = False
    found = knock_out(gqa, x, Logits(TOKENS), keys={"all but itself": rest}, layers=[3])
    _, cache = gqa.run_with_cache(x, names_filter="blocks.3.attn.hook_v")
    own = cache["blocks.3.attn.hook_v"][:, LAST].repeat_interleave(3, dim=1)

    def write(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, LAST] = own
        return z

    theirs = gqa.run_with_hooks(x, fwd_hooks=[("blocks.3.attn.hook_z", write)])[:, -1]
    np.testing.assert_allclose(
        found.values[0, 0], theirs[:, TOKENS], rtol=0, atol=FAST_ENGINE[torch.float32]
    )


@torch.no_grad()
def test_half_precision_says_its_noise(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa", torch.bfloat16)
    x = model.encode(**INPUTS)
    found = knock_out(model, x, Logits(TOKENS), keys={"audio": "audio"})
    plain = knock_out(model, x, Logits(TOKENS), keys={"audio": "audio"}, engine="hooks")
    assert found.noise is not None
    np.testing.assert_allclose(found.values, plain.values, rtol=0, atol=FAST_ENGINE[torch.bfloat16])
    exact = knock_out(model, x, Logits(TOKENS), keys={"audio": "audio"}, precision="float32")
    assert exact.noise is None or not exact.noise.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": {"all": torch.ones(2, LAST + 1, dtype=torch.bool)}}, "no key left"),
        ({"keys": {"nothing": "sink-hole"}}, "looking up span 'sink-hole'"),
        ({"keys": {"short": torch.ones(2, 3, dtype=torch.bool)}}, r"got a mask of \(2, 3\)"),
        ({"keys": {"audio": "audio"}, "layers": [9]}, "the model has layers 0 to 3"),
        ({"keys": {"audio": "audio"}, "heads": [6]}, "the model has heads 0 to 5"),
    ],
)
def test_what_cannot_be_is_refused(gqa: HookedALM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        knock_out(gqa, gqa.encode(**INPUTS), Logits(TOKENS), **options)


def test_windows_are_each_once_and_all_blocks_are_one() -> None:
    assert windows(4, 3) == [(0, 1, 2), (1, 2, 3), (3,), (0, 1, 2, 3)]
    assert windows(3, 3) == windows(3, 9) == [(2,), (0, 1, 2)]
    assert windows(1, 1) == [(0,)]
    assert windows(2, 1) == [(0,), (1,), (0, 1)]


def test_random_keys_are_as_many_and_neither_the_first_nor_the_last(gqa: HookedALM) -> None:
    x, sizes = gqa.encode(**INPUTS), [3, 20]
    every = torch.zeros(x.shape, dtype=torch.bool)
    for seed in range(30):
        drawn = random_keys(x, sizes, [np.random.default_rng(seed)] * 2)
        assert drawn.sum(dim=1).tolist() == sizes
        every |= drawn
    real = torch.from_numpy(x.is_real)
    first = real.int().argmax(dim=1)
    real[[0, 1], first], real[:, LAST] = False, False
    assert torch.equal(every[1], real[1])
    assert not (every & ~real).any()
