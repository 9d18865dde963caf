"""Dispatched operations of a sweep: as many for a few heads, nodes or positions as for many."""

from collections import Counter
from functools import partial
from itertools import product
from typing import Any

import pytest

from engine_runs import Case
from hooked_alm import HookedALM
from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.neurons.gain import gain_neurons
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import patch_chains, patch_edges, path_patch
from operations import operations
from tiny import hf_inputs

BASE, OTHER = (hf_inputs([[31], [23]], [6, 4], seed=seed) for seed in (1, 2))
METRIC = LogitDiff(7, 9)


@pytest.fixture
def pair(gqa: HookedALM) -> Case:
    base, donor = gqa.encode(**BASE), gqa.encode(**OTHER)
    return Case(gqa, base, donor, base, donor)


def heads(layer: int, chosen: list[int], point: str = "hook_z") -> list[str]:
    return [f"blocks.{layer}.attn.{point}[{head}]" for head in chosen]


FEW, MANY = [4, 1], [0, 1, 2, 3, 4]
NODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    site: ({"site": site, name: few}, {"site": site, name: many})
    for site, name, few, many in (
        ("z", "heads", FEW, MANY), ("q", "heads", FEW, MANY), ("pattern", "heads", FEW, MANY),
        ("k", "heads", FEW, MANY), ("v", "heads", FEW, MANY),
        ("post", "neurons", [3, 7], "each"), ("pre", "neurons", [3, 7], "each"),
    )
}  # fmt: skip
NODES["strengths"] = tuple(
    {"site": "z", "heads": MANY, "mode": "interpolate", "coefficients": cs}
    for cs in ((0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0))
)  # fmt: skip
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Of as many rows as the class of sizes has: 4 to 7 to the end.
    f"each position, {site}": (
        {"site": site, "places": [10, 12]}, {"site": site, "places": [9, 10, 11, 12]}
    )
    for site in ("resid_pre", "k", "z", "mlp_out")
}  # fmt: skip
PLACES["a longer place"] = {"places": [(11, 12)]}, {"places": [(9, 10, 11, 12)]}


@pytest.mark.parametrize(
    ("name", "donor"),
    [*product([*NODES, *PLACES], ["run"]),
     *product(["z", "k", "post", "a longer place"], ["zero", "self"])],
)  # fmt: skip
def test_nodes(pair: Case, name: str, donor: str) -> None:
    """Heads, neurons and positions, in all blocks; of a run, a constant, a scale."""
    few, many = {**NODES, **PLACES}[name]
    given: Any = pair.donor if donor == "run" else donor
    mode: Any = "scale" if donor == "self" else "replace"
    found = [
        operations(partial(
            patch, pair.model, pair.base, given, METRIC,
            **{"places": ["readout"], "mode": mode, "coefficient": 0.5, "kv": "query", **options},
        ))
        for options in (few, many)
    ]  # fmt: skip
    assert found[0] == found[1]
    assert found[0].total() > 100


def test_gains_of_neurons(pair: Case) -> None:
    """Sets of neurons of two blocks, and strengths."""
    few, many = (
        [[(0, 3), (1, 7)], [(0, 2), (1, 1)]],
        [[(0, n), (0, n + 1), (1, 2 * n)] for n in range(5)],
    )
    found = [
        operations(
            partial(gain_neurons, pair.model, pair.base, METRIC, sets, alphas, place="readout")
        )
        for sets, alphas in ((few, [-1.0]), (many, [-1.0, 0.5]))
    ]
    assert found[0] == found[1]


def swept(pair: Case, from_nodes: Any, to_nodes: Any, **options: Any) -> Counter[str]:
    run = pair.model, pair.base, pair.donor, METRIC
    return operations(partial(path_patch, *run, from_nodes, to_nodes, kv="query", **options))


@pytest.mark.parametrize("mode", ["edge", "ioi"])
@pytest.mark.parametrize("into", ["q", "k", "mlp", "logits"])
def test_edges(pair: Case, into: str, mode: Any) -> None:
    """Senders of two blocks, and receivers; at more positions."""
    receivers = {
        "q": [heads(2, FEW, "hook_q_input"), heads(2, MANY, "hook_q_input")],
        "k": [heads(2, some, "hook_k_input") for some in (FEW, MANY)],
        "mlp": [["blocks.2.hook_mlp_in"]] * 2, "logits": [["logits"]] * 2,
    }[into]  # fmt: skip
    few, many = (heads(0, some) + heads(1, some) for some in (FEW, MANY))
    found = [
        swept(pair, few, receivers[0], mode=mode),
        swept(pair, many, receivers[0], mode=mode),
        swept(pair, many, receivers[1], mode=mode),
    ]
    assert found[0] == found[1] == found[2]
    if mode == "edge" and into in ("mlp", "logits"):
        # Beside the base's own mixing, which all cells share, none is done where they enter.
        assert (
            found[0]["aten.baddbmm.out"]
            < swept(pair, few, heads(2, [1], "hook_q_input"))["aten.baddbmm.out"]
        )
    places = [
        swept(pair, few, receivers[0], mode=mode, places=[at]) for at in ((9, 10), (9, 10, 11, 12))
    ]
    assert places[0] == places[1]


def test_sets_of_edges(pair: Case) -> None:
    """Later receivers of a set read what the earlier ones have changed."""
    sets = [
        {"": [*product([*heads(0, some), "hook_embed"], heads(1, some, "hook_q_input")),
              *product(heads(1, some), ["blocks.2.hook_mlp_in"])]}
        for some in (FEW, MANY)
    ]  # fmt: skip
    found = [
        operations(partial(patch_edges, pair.model, pair.base, pair.donor, METRIC, some))
        for some in sets
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("through", ["q", "k", "v", "mlp"])
def test_chains(pair: Case, through: str) -> None:
    """Through heads of one block, or its MLP."""
    relays = ["blocks.1.hook_mlp_in"] if through == "mlp" else None
    few, many = (
        [
            (sender, relay, "blocks.2.hook_mlp_in", "logits")
            for sender in heads(0, some)
            for relay in relays or heads(1, units, f"hook_{through}_input")
        ]
        for some, units in ((FEW, [1]), (MANY, [0, 1]))
    )
    found = [
        operations(partial(patch_chains, pair.model, pair.base, pair.donor, METRIC, chains))
        for chains in (few, many)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_attribution(pair: Case, method: Any) -> None:
    found = [
        operations(partial(
            attribute_edges, pair.model, pair.base, pair.donor, METRIC,
            heads(0, some) + heads(1, some), heads(2, some, "hook_q_input"), method=method, steps=2,
        ))
        for some in (FEW, MANY)
    ]  # fmt: skip
    assert found[0] == found[1]


def test_a_function_of_ones_own_costs_a_call_per_cell(pair: Case) -> None:
    """The count can differ."""
    from engine_runs import Cell, Edit, marks_of
    from hooked_alm.methods.patching.measurement import Measurement

    measured = Measurement(pair.model, pair.base, None, METRIC)
    counts = [
        operations(lambda n=n: measured.values(
            n, marks_of([Cell(0, [Edit("z", 1, [12], lambda own: 0.5 * own)])] * n, 2)
        )).total()
        for n in (1, 5)
    ]  # fmt: skip
    assert counts[1] - counts[0] >= 4
