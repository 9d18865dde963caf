"""Neurons that are held: against hooks on the published model, and what must change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_reference import with_positions
from hooked_alm import HookedALM, LogitDiff
from hooked_alm.errors import InputError
from hooked_alm.methods.neurons.gain import gain_neurons
from hooked_alm.methods.robustness.defences import DefenceKind, defence_hooks
from hooked_alm.methods.robustness.places import PLACES, NeuronPlace
from robust_cases import PAIRS, inputs_of, neurons_of, prompts, published
from tiny import TinyModels
from tolerances import PADDED_ROW

NEURONS = {"lm": [(0, 3), (2, 30), (0, 11)], "audio": [(0, 2), (1, 7)]}
ATOL = 10 * PADDED_ROW[torch.float32]
CASES: list[tuple[DefenceKind, int | None]] = [
    ("patch", None), ("patch", 1), ("bias", None), ("bias", 4), ("prune", None), ("prune", 4),
]  # fmt: skip


@pytest.fixture(scope="module")
def gqa(tiny_models: TinyModels) -> HookedALM:
    return tiny_models.hooked("gqa")


def logits_with(model: HookedALM, place: NeuronPlace, kind: DefenceKind, **options: Any) -> Tensor:
    clean, attacked = prompts(model)
    neurons = NEURONS[place]
    donor = clean if kind == "patch" else None
    hooks = defence_hooks(model, attacked, place, neurons, kind, donor=donor, **options)
    with torch.no_grad():
        found: Tensor = model.run_with_hooks(attacked, fwd_hooks=hooks)
    return found[:, -1]


def held(block: int, place: str, kind: str, last: int | None, clean: Tensor) -> Callable[..., Any]:
    """A hook on the published model: rows and neurons one by one."""

    def hook(_: object, given: object, out: Tensor) -> Tensor:
        out, rows = out.clone(), len(clean)
        for row in range(0 if last is None else rows - last, rows):
            for b, neuron in NEURONS[place]:
                if b == block:
                    at = out.flatten(0, -2)[row]
                    own = at[neuron].clone()
                    at[neuron] = {"patch": clean[row, block, neuron], "bias": own + 0.5,
                                  "prune": own * 0}[kind]  # fmt: skip
        return out

    return hook


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("kind", "last"), CASES)
def test_held_neurons_are_what_hooks_on_the_published_model_hold(
    gqa: HookedALM, tiny_models: TinyModels, place: NeuronPlace, kind: DefenceKind, last: int | None
) -> None:
    ours = logits_with(gqa, place, kind, last=last, bias=0.5)
    hf = tiny_models.hf("gqa")
    with torch.no_grad():
        plain = gqa(prompts(gqa)[1])[:, -1]
    assert not torch.allclose(ours, plain, atol=ATOL)
    for n, (pair, (clean, _)) in enumerate(zip(PAIRS, published(tiny_models, place), strict=True)):
        handles = [
            module.register_forward_hook(held(block, place, kind, last, clean))
            for block, module in enumerate(neurons_of(hf, place))
        ]
        with torch.no_grad():
            theirs = hf(**with_positions(inputs_of(pair, 4))).logits[0, -1]
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(ours[n], theirs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("place", PLACES)
def test_own_values_and_no_neurons_change_nothing(gqa: HookedALM, place: NeuronPlace) -> None:
    """A swapped call (C45) patches a clip with itself: it looks like a defence, and is none."""
    _, attacked = prompts(gqa)
    with torch.no_grad():
        plain = gqa(attacked)
    own = defence_hooks(gqa, attacked, place, NEURONS[place], "patch", donor=attacked)
    none = defence_hooks(gqa, attacked, place, [], "prune")
    with torch.no_grad():
        torch.testing.assert_close(gqa.run_with_hooks(attacked, fwd_hooks=own), plain,
                                   rtol=0, atol=ATOL)  # fmt: skip
        assert torch.equal(gqa.run_with_hooks(attacked, fwd_hooks=none), plain)


def test_pruning_is_the_gain_of_minus_one(gqa: HookedALM) -> None:
    _, attacked = prompts(gqa)
    found = gain_neurons(gqa, attacked, LogitDiff(3, 11), [NEURONS["lm"]], [-1.0])
    logits = logits_with(gqa, "lm", "prune")
    expected = torch.from_numpy(found.values[0, 0]).float()
    torch.testing.assert_close(logits[:, 3] - logits[:, 11], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("site", ["gate", "post"])
def test_a_bias_on_the_gate_moves_what_is_read_by_its_other_factor(
    gqa: HookedALM, site: Any
) -> None:
    """And a bias on what is read moves that by itself."""
    _, attacked = prompts(gqa)
    names = ["blocks.1.mlp.hook_pre_linear", "blocks.1.mlp.hook_post"]
    _, before = gqa.run_with_cache(attacked, names_filter=names)
    hooks = defence_hooks(gqa, attacked, "lm", [(1, 5)], "bias", bias=0.5, site=site)
    with gqa.hooks(fwd_hooks=hooks):
        _, after = gqa.run_with_cache(attacked, names_filter=names)
    moved = after[names[1]] - before[names[1]]
    real = torch.from_numpy(attacked.is_real)
    up = before[names[0]][..., 5][real] if site == "gate" else torch.ones(int(real.sum()))
    torch.testing.assert_close(moved[..., 5][real], 0.5 * up)
    assert not moved[..., 6].any()


@pytest.mark.parametrize("caches", [True, False])
def test_generated_tokens_are_held_where_asked(gqa: HookedALM, caches: bool) -> None:
    """The rows of later steps: those of the prompt alone unless every step is held."""
    attacked = prompts(gqa)[1][1]
    name, n = "blocks.1.mlp.hook_gate", attacked.shape[1]
    for every_step in (False, True):
        hooks = defence_hooks(gqa, attacked, "lm", [(1, 5)], "prune", every_step=every_step)
        _, cache = gqa.generate(
            attacked, 3, fwd_hooks=hooks, names_filter=name, use_past_kv_cache=caches,
            return_type="tokens", eos_token_id=None,
        )  # fmt: skip
        gate = cache[name][0, :, 5]
        assert len(gate) == n + 2
        assert not gate[:n].any()
        assert bool((gate[n:] == 0).all()) == every_step


@pytest.mark.parametrize(
    ("neurons", "kind", "options", "told"),
    [
        ([(9, 0)], "prune", {}, "expected blocks 0 to 3"),
        ([(0, 1), (0, 1)], "prune", {}, "named twice"),
        ([(0, 1)], "patch", {}, "got none, expected the prompts themselves"),
        ([(0, 1)], "patch", {"donor": 0}, r"got prompts of shape \(1, "),
        ([(0, 1)], "patch", {"donor": 1, "every_step": True}, "values for the prompt alone"),
        ([(0, 1)], "bias", {"span": "label"}, "looking up span 'label'"),
    ],
)  # fmt: skip
def test_refused(
    gqa: HookedALM, neurons: list[tuple[int, int]], kind: Any, options: dict[str, Any], told: str
) -> None:
    clean, attacked = prompts(gqa)
    if "donor" in options:
        options = options | {"donor": (clean[0], clean)[options["donor"]]}
    with pytest.raises(InputError, match=told):
        defence_hooks(gqa, attacked, "lm", neurons, kind, **options)
