"""Pruning of edges against a naive loop over whole runs."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.patching.metrics import KL, LogitDiff, Logits, OnLogits
from hooked_alm.methods.patching.paths import Edge, all_edges, patch_edges
from hooked_alm.methods.patching.pruning import PrunedCircuit, prune_edges
from path_cases import BASE, DONOR, ENGINES
from tolerances import PATHS

IN_ORDER: list[Edge] = [
    ("blocks.3.hook_mlp_out", "logits"),
    ("blocks.1.attn.hook_z[4]", "logits"),
    ("hook_embed", "logits"),
    ("blocks.2.attn.hook_z[5]", "blocks.2.hook_mlp_in"),
    ("blocks.2.attn.hook_z[1]", "blocks.2.hook_mlp_in"),
    ("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_in"),
    ("blocks.1.hook_mlp_out", "blocks.2.attn.hook_k_input[0]"),
    ("blocks.0.attn.hook_z[3]", "blocks.2.attn.hook_k_input[1]"),
    ("blocks.1.hook_mlp_out", "blocks.2.attn.hook_v_input[0]"),
    ("blocks.0.hook_mlp_out", "blocks.1.attn.hook_q_input[2]"),
    ("hook_embed", "blocks.1.attn.hook_q_input[2]"),
    ("hook_embed", "blocks.0.hook_mlp_in"),
]
"""Last receiver first, and of each the last sender first, as in the paper's algorithm."""
SOME_ORDER = [IN_ORDER[i] for i in np.random.default_rng(0).permutation(len(IN_ORDER))]
Batches = tuple[ALMInput, ALMInput]


@pytest.fixture
def pair(gqa: HookedALM) -> Batches:
    return gqa.encode(**BASE), gqa.encode(**DONOR)


def kl(model: HookedALM, base: ALMInput) -> OnLogits:
    """KL(base || run) per row at the readout, of whole logits."""
    unpruned = model(base)[:, -1].log_softmax(-1)

    def diverged(logits: Tensor) -> Tensor:
        patched = logits[:, -1].log_softmax(-1)
        return F.kl_div(patched, unpruned, reduction="none", log_target=True).sum(-1)

    return OnLogits(diverged)


def naive(
    without: Callable[[list[Edge]], float], edges: list[Edge], threshold: float
) -> PrunedCircuit:
    """Algorithm 1 of Conmy et al. on a function of removed edges."""
    removed: list[Edge] = []
    kept: list[Edge] = []
    values, tested = [without([])], []
    for edge in edges:
        value = without([*removed, edge])
        tested.append((edge, value - values[-1]))
        if value - values[-1] < threshold:
            removed.append(edge)
            values.append(value)
        else:
            kept.append(edge)
    return PrunedCircuit(
        kept=tuple(kept), removed=tuple(removed), values=tuple(values), tested=tuple(tested)
    )


def assert_same(found: PrunedCircuit, expected: PrunedCircuit, threshold: float) -> None:
    rises = np.array([rise for _, rise in expected.tested])
    # No edge is so near to the threshold that rounding decides.
    assert np.abs(rises - threshold).min() > 5 * PATHS[torch.float32]
    assert (found.kept, found.removed) == (expected.kept, expected.removed)
    assert [edge for edge, _ in found.tested] == [edge for edge, _ in expected.tested]
    worst = np.abs(np.array([rise for _, rise in found.tested]) - rises).max()
    assert worst <= PATHS[torch.float32]
    assert np.abs(np.array(found.values) - np.array(expected.values)).max() <= PATHS[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize(("place", "threshold"), [("all", 0.02), ("audio", 7e-4)])
def test_equal_to_the_naive_loop(
    gqa: HookedALM, pair: Batches, place: str, threshold: float
) -> None:
    """Whole runs under hooks, one by one, by the divergence that is the default."""
    base, donor = pair
    of = kl(gqa, base)

    def without(edges: list[Edge]) -> float:
        found = patch_edges(gqa, base, donor, of, {"": edges}, places=[place], engine="hooks")
        return float(found.values.mean())

    expected = naive(without, IN_ORDER, threshold)
    assert min(len(expected.kept), len(expected.removed)) >= 3
    # What an edge costs depends on those that went before it.
    alone = np.array([without([edge]) for edge in IN_ORDER])
    assert np.abs(alone - [rise for _, rise in expected.tested]).max() > threshold / 20
    options: dict[str, Any] = {"candidates": SOME_ORDER, "place": place}
    for engine in ENGINES:
        found = prune_edges(gqa, base, donor, threshold, engine=engine, **options)
        assert_same(found, expected, threshold)
    named = prune_edges(gqa, base, donor, threshold, KL("base"), max_bytes=1, **options)
    assert_same(named, expected, threshold)


@torch.no_grad()
def test_another_metric_may_fall(gqa: HookedALM, pair: Batches) -> None:
    """A removal that lowers the metric is always accepted; the next is compared with that."""
    base, donor = pair
    of, threshold = LogitDiff(5, 77), 0.03

    def without(edges: list[Edge]) -> float:
        found = patch_edges(gqa, base, donor, of, {"": edges}, engine="hooks")
        return float(found.values.mean())

    expected = naive(without, IN_ORDER, threshold)
    assert min(np.diff(expected.values)) < -0.05
    assert len(expected.kept) >= 2
    found = prune_edges(gqa, base, donor, threshold, of, candidates=SOME_ORDER)
    assert_same(found, expected, threshold)


@torch.no_grad()
def test_values_are_those_of_the_removed_set(gqa: HookedALM, pair: Batches) -> None:
    """And candidates are all that is tested."""
    base, donor = pair
    of = LogitDiff(5, 77)
    edges = IN_ORDER[3:9]
    found = prune_edges(gqa, base, donor, 0.05, of, candidates=edges)
    assert [edge for edge, _ in found.tested] == edges
    assert sorted(found.kept + found.removed) == sorted(edges)
    assert found.removed
    steps = {str(n): found.removed[:n] for n in range(len(found.values))}
    whole = patch_edges(gqa, base, donor, of, steps).values.mean(axis=(1, 2))
    assert np.abs(whole - np.array(found.values)).max() <= PATHS[torch.float32]
    assert len(whole) == len(found.removed) + 1


@torch.no_grad()
def test_all_or_nothing(gqa: HookedALM, pair: Batches) -> None:
    """A huge threshold removes all candidates, a tiny one keeps those that matter."""
    base, donor = pair
    everything = prune_edges(gqa, base, donor, 1e9, candidates=IN_ORDER)
    assert (everything.kept, everything.removed) == ((), tuple(IN_ORDER))
    mattering = prune_edges(gqa, base, donor, 1e-9, candidates=IN_ORDER[:1])
    assert (mattering.kept, mattering.removed, mattering.values[1:]) == (
        tuple(IN_ORDER[:1]),
        (),
        (),
    )
    nothing = prune_edges(gqa, base, donor, 1.0, candidates=[])
    assert (nothing.kept, nothing.removed, nothing.tested) == ((), (), ())
    assert abs(nothing.values[0]) <= PATHS[torch.float32]


@torch.no_grad()
def test_an_edge_is_tested_once(gqa: HookedALM, pair: Batches) -> None:
    """Also where it is given twice or under two spellings."""
    base, donor = pair
    edge = ("blocks.0.attn.hook_z[3]", "blocks.2.attn.hook_k_input[1]")
    alias = ("blocks.0.attn.hook_result[3]", "blocks.2.hook_k_input[1]")
    (once,) = prune_edges(gqa, base, donor, 1e9, candidates=[edge]).tested
    assert once[1] > 20 * PATHS[torch.float32]
    for edges in ([edge, edge], [edge, alias]):
        (found,) = prune_edges(gqa, base, donor, 1e9, candidates=edges).tested
        assert abs(found[1] - once[1]) <= PATHS[torch.float32]


@pytest.fixture
def few_edges(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Edge]]:
    """What ``all_edges`` answers while pruning."""
    edges = IN_ORDER[:2]
    monkeypatch.setattr("hooked_alm.methods.patching.pruning.all_edges", lambda model: edges)
    return iter([edges])


@torch.no_grad()
def test_without_candidates_every_edge_may_go(
    gqa: HookedALM, pair: Batches, few_edges: Iterator[list[Edge]]
) -> None:
    found = prune_edges(gqa, *pair, 1e9)
    assert [edge for edge, _ in found.tested] == next(few_edges)


@torch.no_grad()
def test_keys_of_query_heads(gqa: HookedALM, pair: Batches) -> None:
    """With k and v per query head there are more receivers; three make a group."""
    of = LogitDiff(5, 77)
    heads = [("hook_embed", f"blocks.2.attn.hook_k_input[{h}]") for h in (3, 4, 5)]
    found = prune_edges(gqa, *pair, 1e9, of, candidates=heads, kv="query")
    group = [("hook_embed", "blocks.2.attn.hook_k_input[1]")]
    whole = prune_edges(gqa, *pair, 1e9, of, candidates=group)
    assert abs(found.values[-1] - whole.values[-1]) <= PATHS[torch.float32]
    assert abs(whole.values[-1] - whole.values[0]) > 20 * PATHS[torch.float32]
    assert not gqa.cfg.ungroup_grouped_query_attention


@pytest.mark.parametrize("threshold", [0.0, -0.1, float("nan")])
def test_thresholds_that_are_not_positive(gqa: HookedALM, pair: Batches, threshold: float) -> None:
    with pytest.raises(InputError, match="expected a positive number"):
        prune_edges(gqa, *pair, threshold, candidates=IN_ORDER)


@pytest.mark.parametrize(
    ("edges", "told"),
    [
        ([("blocks.9.hook_mlp_out", "logits")], "blocks.9 is not on the way"),
        ([("blocks.1.hook_mlp_in", "logits")], "naming the sender"),
        ([("hook_embed", "blocks.*.hook_mlp_in")], "names 4 nodes"),
        ([("blocks.2.hook_mlp_out", "blocks.1.hook_mlp_in")], "the receiver comes first"),
        ([("hook_embed", "blocks.2.attn.hook_k_input[2]")], "got index 2, expected 0 to 1"),
        ([("hook_embed", "blocks.1.hook_resid_mid"), IN_ORDER[0]], "and others at once"),
    ],
)
def test_edges_that_are_refused(
    gqa: HookedALM, pair: Batches, edges: list[Edge], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        prune_edges(gqa, *pair, 0.1, candidates=[*IN_ORDER[:1], *edges])


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_with_several_values_are_refused(
    gqa: HookedALM, pair: Batches, engine: Any
) -> None:
    with pytest.raises(InputError, match="a metric with 3 values: expected one number"):
        prune_edges(gqa, *pair, 0.1, Logits([5, 6, 7]), candidates=IN_ORDER, engine=engine)
    one = prune_edges(gqa, *pair, 1e9, LogitDiff(5, 6), candidates=IN_ORDER[:1], engine=engine)
    assert len(one.values) == 2
    assert len(all_edges(gqa)) > len(IN_ORDER)
