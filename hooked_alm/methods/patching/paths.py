"""Path patching: what one node tells another, exactly.

An edge is patched by giving its receiver the input it would have if only the sender's message had
been the donor's. That is a patch of the receiver's own q, k, v or MLP output, so a sweep over edges
is a sweep over nodes with computed values, and costs what that costs.

Two quantities go by the name of path patching, and are different numbers: ``mode="edge"``
patches the residual edge alone (Miller's edge patching; TransformerLens' direct path);
``mode="ioi"`` all paths between the two that pass through MLPs, heads frozen (Wang et al. 2022,
appendix B).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal, get_args

import torch

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from .alignment import AlignPolicies, Place
from .graph import Graph, NormMode, PathMode, relayed
from .measurement import Engine
from .metrics import Metric, OnLogits
from .nodes import Node, receivers, senders
from .patch import per_query_head
from .results import PatchResult

Nodes = str | Sequence[str | Sequence[str]]
"""One name (``*`` stands for all layers or heads), or several; a tuple is patched as one set."""
Edge = tuple[str, str]
"""Names of a sender and a receiver."""


@torch.no_grad()
def path_patch(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    metric: Metric | OnLogits,
    from_nodes: Nodes,
    to_nodes: Nodes,
    *,
    mode: PathMode = "edge",
    places: Sequence[Place] = ("readout",),
    policy: AlignPolicies = "error",
    kv: Literal["group", "query"] = "group",
    norm: NormMode = "exact",
    engine: Engine = "fast",
    max_bytes: int | None = None,
) -> PatchResult:
    """Patch what every sender tells every receiver, one pair at a time.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts, whose messages are sent.
        metric: what is read off each run.
        from_nodes: senders, by hook point and head, as in ``blocks.9.attn.hook_z[3]``: heads
            (hook_z), attention and MLP outputs, neurons (mlp.hook_post), ``hook_embed``. ``*``
            stands for each layer or head; a tuple of names is one set, patched at once.
        to_nodes: receivers: ``attn.hook_q_input[7]``, k and v likewise, ``hook_mlp_in``, the
            residual stream, or ``logits``.
        mode: "edge" or "ioi"; see the module.
        places: where the message is read, as in ``patch``; messages stay at their position.
        policy: for places of unequal length, see ``align``.
        kv: "query" reads k and v once per query head instead of per kv head.
        norm: "frozen" divides by the base run's norm instead of the new one: the linearisation that
            gradient methods make.
        engine: "fast", or "hooks" for the plain loop.
        max_bytes: memory budget of the fast engine.

    Returns:
        Axes ``sender``, ``receiver``, ``place``, ``example`` and, if the metric has several values,
        ``label``; NaN where the receiver comes before the sender.

    Raises:
        InputError: a node that is no such thing, places that do not align, or options that
            contradict each other.
    """
    with per_query_head(model, kv == "query"):
        from_sets = node_sets(model, from_nodes, senders)
        to_sets = node_sets(model, to_nodes, receivers)
        _check_modes(mode, norm, from_sets, to_sets)
        pairs = [
            [(s, r) for s in some for r in others if s.writes < r.reads]
            for some, others in product(from_sets, to_sets)
        ]
        graph = Graph(
            model, base, donor, metric, pairs, places, policy=policy, norm=norm, mode=mode,
            engine=engine, max_bytes=max_bytes,
        )  # fmt: skip
        axes = {"sender": set_names(from_sets), "receiver": set_names(to_sets)}
        return graph.answer(axes, pairs, site="path", mode=mode)


@torch.no_grad()
def patch_edges(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    metric: Metric | OnLogits,
    edge_sets: Mapping[str, Sequence[Edge]],
    *,
    places: Sequence[Place] = ("all",),
    policy: AlignPolicies = "error",
    kv: Literal["group", "query"] = "group",
    engine: Engine = "fast",
    max_bytes: int | None = None,
) -> PatchResult:
    """Patch whole sets of edges at once, each set in a run of its own.

    Within a set every receiver gets, over its own online input, what the set's senders would have
    added in the donor run instead of what they add now; everything else is recomputed. To see what
    a circuit does alone (faithfulness) patch every edge but its own, with the corrupted prompt as
    donor: ``{"circuit": [e for e in all_edges(model) if e not in circuit]}``; to see what is left
    without it (completeness), its own.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts.
        metric: what is read off each run.
        edge_sets: name -> edges, of sender and receiver as in ``path_patch``.
        places: where messages are replaced; "all" is the whole prompt.
        policy: see ``align``.
        kv: see ``path_patch``.
        engine: see ``path_patch``.
        max_bytes: see ``path_patch``.

    Returns:
        Axes ``edges``, ``place``, ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: an edge whose receiver comes before its sender, or nodes that do not exist.

    Source: the edge ablation of ACDC (Conmy et al. 2023), removed edges at the donor's value.
    """
    with per_query_head(model, kv == "query"):
        sets = [parse_edges(model, edges) for edges in edge_sets.values()]
        graph = Graph(
            model, base, donor, metric, sets, places, policy=policy, norm="exact", mode="edge",
            engine=engine, max_bytes=max_bytes,
        )  # fmt: skip
        return graph.answer({"edges": tuple(edge_sets)}, sets, site="edges", mode="edge")


def parse_edges(model: HookedALM, edges: Sequence[Edge]) -> list[tuple[Node, Node]]:
    """Senders and receivers by name.

    Raises:
        InputError: nodes that do not exist, or a receiver that comes before its sender.
    """
    known: dict[tuple[str, str], Node] = {}
    for role, parse in (("sender", senders), ("receiver", receivers)):
        for name in dict.fromkeys(edge[role == "receiver"] for edge in edges):
            (known[role, name],) = _one(parse(model, name), name)
    pairs = [(known["sender", s], known["receiver", r]) for s, r in edges]
    for sender, receiver in pairs:
        if sender.writes >= receiver.reads:
            raise InputError(
                f"patching the edge {sender.name} -> {receiver.name}: the receiver comes first."
            )
    return pairs


@torch.no_grad()
def patch_chains(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    metric: Metric | OnLogits,
    chains: Sequence[Sequence[str]],
    *,
    place: Place = "readout",
    policy: AlignPolicies = "error",
    engine: Engine = "fast",
    max_bytes: int | None = None,
) -> PatchResult:
    """Patch paths of more than two nodes: each hears only the one before it.

    The sender's message changes the first receiver's input and nothing else; what that receiver
    then writes more than in the base run is the message to the next. A k or v receiver passes its
    message on at every later position that attends to it.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts.
        metric: what is read off each run.
        chains: each a sender and two or more receivers in the order of the stream, as in
            ``path_patch``: ``("blocks.2.attn.hook_z[1]", "blocks.5.attn.hook_v_input[0]",
            "logits")``.
        place: where the sender's message is.
        policy: see ``align``.
        engine: see ``path_patch``.
        max_bytes: see ``path_patch``.

    Returns:
        Axes ``chain``, ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: nodes out of order or that do not exist, or a residual stream on the way.
    """
    parsed = [_chain(model, chain) for chain in chains]
    pairs = [[(chain[0], receiver)] for chain in parsed for receiver in chain[1:]]
    graph = Graph(
        model, base, donor, metric, pairs, [place], policy=policy, norm="exact", mode="edge",
        engine=engine, max_bytes=max_bytes,
        also_keep=[name for chain in parsed for relay in chain[1:-1] for name in relayed(relay)],
    )  # fmt: skip
    cells = [[graph.chain_cell(chain, row) for row in range(len(base))] for chain in parsed]
    found = graph.measured.values(cells)
    return graph.measured.result(
        {"chain": tuple(tuple(chain) for chain in chains)},
        found,
        site="chain",
        mode="edge",
        length_ratios=graph.values.length_ratios,
    )


def all_edges(model: HookedALM) -> list[Edge]:
    """Every edge between embedding, heads, MLPs and logits, as pairs of names."""
    writers = senders(model, ["hook_embed", "blocks.*.attn.hook_z[*]", "blocks.*.hook_mlp_out"])
    readers = receivers(
        model,
        [*(f"blocks.*.attn.hook_{part}_input[*]" for part in "qkv"), "blocks.*.hook_mlp_in",
         "logits"],
    )  # fmt: skip
    return [(s.name, r.name) for r in readers for s in writers if s.writes < r.reads]


def _chain(model: HookedALM, names: Sequence[str]) -> list[Node]:
    if len(names) < 3:
        raise InputError(
            f"patching the chain {list(names)}: expected a sender and two or more receivers. "
            "`path_patch` patches a single edge."
        )
    (sender,) = _one(senders(model, names[0]), names[0])
    nodes = [sender]
    for name in names[1:]:
        (receiver,) = _one(receivers(model, name), name)
        writes = (
            nodes[-1].writes if len(nodes) == 1 else 2 * nodes[-1].layer + (nodes[-1].kind == "mlp")
        )
        if writes >= receiver.reads:
            raise InputError(f"patching the chain {list(names)}: {name} comes too early in it.")
        nodes.append(receiver)
    if on_the_way := [node.name for node in nodes[1:-1] if node.kind.startswith("resid")]:
        raise InputError(
            f"patching the chain {list(names)}: {on_the_way[0]} is no node that passes on. Put "
            "the residual stream or logits last."
        )
    return nodes


def node_sets(
    model: HookedALM, names: Nodes, parse: Callable[[HookedALM, Any], list[Node]]
) -> list[tuple[Node, ...]]:
    """Each name on its own, tuples of names together."""
    listed = [names] if isinstance(names, str) else names
    sets: list[tuple[Node, ...]] = []
    for name in listed:
        found = parse(model, name)
        sets += [(node,) for node in found] if isinstance(name, str) else [tuple(found)]
    return sets


def set_names(sets: Sequence[tuple[Node, ...]]) -> tuple[Any, ...]:
    """Sets of nodes as coordinates."""
    return tuple(one[0].name if len(one) == 1 else tuple(n.name for n in one) for one in sets)


def _one(found: list[Node], name: str) -> list[Node]:
    if len(found) != 1:
        raise InputError(f"patching edges: {name!r} names {len(found)} nodes. Name each edge.")
    return found


def _check_modes(
    mode: str, norm: str, from_sets: Sequence[tuple[Node, ...]], to_sets: Sequence[Any]
) -> None:
    if mode not in get_args(PathMode) or norm not in get_args(NormMode):
        raise InputError(
            f"patching paths with mode={mode!r}, norm={norm!r}: expected mode 'edge' or 'ioi' and "
            "norm 'exact' or 'frozen'."
        )
    if mode == "ioi" and any(node.kind == "neuron" for one in from_sets for node in one):
        raise InputError(
            "patching paths from neurons with mode='ioi': their MLPs are recomputed. Use 'edge'."
        )
    single = all(len(one) == 1 and not one[0].kind.startswith("resid") for one in to_sets)
    if norm == "frozen" and (mode == "ioi" or not single):
        raise InputError(
            "patching paths with norm='frozen': only single q, k, v and MLP receivers in "
            "mode='edge' have a norm of their own to freeze."
        )
