"""ACDC on exact edge effects: a circuit is what is left when edges the metric spares are gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ..result import MethodResult
from .choice import per_query_head
from .edges import EdgeSets, NodePair
from .graph import Graph
from .measurement import in_precision
from .metrics import KL, Metric, OnLogits
from .options import PruneOptions, takes
from .paths import Edge, all_edges, parse_edges


@dataclass(frozen=True, kw_only=True, repr=False)
class PrunedCircuit(MethodResult):
    """Edges of a model that were kept, and the cost of each removal."""

    kept: tuple[Edge, ...]
    """The circuit, in the order of testing."""
    removed: tuple[Edge, ...]
    """The other edges, in the order of their removal."""
    values: tuple[float, ...]
    """The metric, mean over examples: with all edges, then after every removal."""
    tested: tuple[tuple[Edge, float], ...]
    """Edges in the order of testing, each with the metric's rise without it."""


@torch.no_grad()
@takes(PruneOptions, place="all")
def prune_edges(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    threshold: float,
    metric: Metric | OnLogits | None = None,
    **options: Unpack[PruneOptions],
) -> PrunedCircuit:
    """Remove, last receiver first, every edge without which the metric rises less than a threshold.

    A removed edge carries what its sender would write in the donor run; everything else is
    recomputed. Edges are tested one after the other, each with those that went before it.

    Args:
        model: to run.
        base: prompts on which the circuit should do what the model does.
        donor: the corrupted prompts.
        threshold: least rise of the metric that keeps an edge, in its unit; the higher, the smaller
            the circuit.
        metric: quantity to be kept low, mean over examples; None is KL(unpruned || pruned) at the
            readout, in nats.

    Raises:
        InputError: a threshold that is not positive, a metric with several values, or edges that do
            not exist.

    Source: Conmy et al. 2023, algorithm 1.
    """
    if not threshold > 0:
        raise InputError(f"pruning with threshold {threshold}: expected a positive number.")
    candidates = options["candidates"]
    with (
        in_precision(options["precision"], model),
        per_query_head(model, options["kv"] == "query"),
    ):
        # Within the context, which decides how many k and v heads there are.
        edges = all_edges(model) if candidates is None else list(candidates)
        # Under two spellings, an edge is still one.
        named = dict(zip(parse_edges(model, edges), edges, strict=True))
        pairs = sorted(((edge, pair) for pair, edge in named.items()), key=_order)
        every = EdgeSets.of_pairs([[pair for _, pair in pairs]])
        place = [options["place"]]
        graph = Graph(model, base, donor, metric or KL("base"), every, place, options)
        return _pruned(graph, pairs, threshold)


def _order(edge: tuple[Edge, NodePair]) -> tuple[int, str, int, int, int]:
    """Last receiver first, and of each receiver the last sender first."""
    sender, receiver = edge[1]
    return -receiver.reads, receiver.kind, receiver.unit or 0, -sender.writes, -(sender.unit or 0)


def _pruned(
    graph: Graph, pairs: Sequence[tuple[Edge, NodePair]], threshold: float
) -> PrunedCircuit:
    gone: list[tuple[Edge, NodePair]] = []
    kept: list[Edge] = []
    values = [_value(graph.measured.base_values)]
    tested: list[tuple[Edge, float]] = []
    for edge, pair in pairs:
        without = EdgeSets.of_pairs([[pair for _, pair in [*gone, (edge, pair)]]])
        # One edge at a time: each is tested on what the removals before it have left.
        value = _value(graph.measured.values(1, graph.marks(without))[0])
        tested.append((edge, value - values[-1]))
        if value - values[-1] < threshold:
            gone.append((edge, pair))
            values.append(value)
        else:
            kept.append(edge)
    return PrunedCircuit(
        kept=tuple(kept),
        removed=tuple(edge for edge, _ in gone),
        values=tuple(values),
        tested=tuple(tested),
    )


def _value(per_example: torch.Tensor) -> float:
    if per_example.ndim != 1:
        raise InputError(
            f"pruning by a metric with {per_example.shape[1]} values: expected one number. Use "
            "a metric without labels, such as LogitDiff."
        )
    return float(per_example.double().mean())
