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
from typing import Any, TypeVar, Unpack, get_args

import torch

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import ENCODER, hook_name
from .chains import chain_edits, relayed
from .choice import per_query_head
from .edges import EdgeSets, NodePair
from .graph import Graph
from .measurement import in_precision
from .metrics import Metric, OnLogits
from .nodes import ENCODER_END, LOGITS, Receiver, Sender, receivers, senders, tells
from .options import ChainOptions, EdgeSetOptions, NormMode, PathMode, PathOptions, takes
from .results import PatchResult

NodeT = TypeVar("NodeT", Sender, Receiver)
Nodes = str | Sequence[str | Sequence[str]]
"""Names of nodes, one or several; ``*`` stands for all layers or heads, a tuple is one set."""
Edge = tuple[str, str]
"""Names of a sender and a receiver."""


@torch.no_grad()
@takes(PathOptions)
def path_patch(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    metric: Metric | OnLogits,
    from_nodes: Nodes,
    to_nodes: Nodes,
    **options: Unpack[PathOptions],
) -> PatchResult:
    """Patch what every sender tells every receiver, one pair at a time.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts as ``base``, whose messages are sent; they stay at their positions.
        metric: what is read off each run.
        from_nodes: senders, by hook point and head, as in ``blocks.9.attn.hook_z[3]``: heads
            (hook_z), attention and MLP outputs, neurons (mlp.hook_post), ``hook_embed``. ``*``
            stands for each layer or head; a tuple of names is one set, patched at once.
        to_nodes: receivers: ``attn.hook_q_input[7]``, ``attn.hook_k_input[1]`` and
            ``attn.hook_v_input[1]`` (by kv head), ``hook_mlp_in``, the residual stream, or
            ``logits``. A sender may be in a hooked audio encoder (``audio.encoder.blocks.3...``):
            its message is what the encoder's final norm, the projector and the merge make of it,
            added to what enters the decoder. Where cross-attention reads the encoder, it is heard
            by ``cross_attn.hook_k[1]`` and ``cross_attn.hook_v[1]`` alone, and places are rows of
            the encoder. With ``model.towards("encoder")`` receivers are in the encoder, too,
            ``audio.encoder.ln_final`` the last of them, and places are its rows.

    Returns:
        Axes ``sender``, ``receiver``, ``place``, ``example`` and, if the metric has several values,
        ``label``; NaN where the receiver comes before the sender.

    Raises:
        InputError: a node that is no such thing, places that do not align, or options that
            contradict each other.
    """
    mode, norm = options["mode"], options["norm"]
    # Around the names, too: it decides how many k and v heads there are.
    with (
        in_precision(options["precision"], model),
        per_query_head(model, options["kv"] == "query"),
    ):
        from_sets = node_sets(model, from_nodes, senders)
        to_sets = node_sets(model, to_nodes, receivers)
        _check_modes(mode, norm, from_sets, to_sets)
        _check_memory(from_sets, to_sets)
        edges = EdgeSets.between(from_sets, to_sets)
        graph = Graph(
            model, base, donor, metric, edges, options["places"], options, norm=norm, mode=mode
        )
        axes = {"sender": set_names(from_sets), "receiver": set_names(to_sets)}
        return graph.answer(axes, site="path", mode=mode)


@torch.no_grad()
@takes(EdgeSetOptions, places=("all",))
def patch_edges(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    metric: Metric | OnLogits,
    edge_sets: Mapping[str, Sequence[Edge]],
    **options: Unpack[EdgeSetOptions],
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
        donor: as many prompts as ``base``.
        metric: what is read off each run.
        edge_sets: name -> edges, of sender and receiver as in ``path_patch``.

    Returns:
        Axes ``edges``, ``place``, ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: an edge whose receiver comes before its sender, or nodes that do not exist.

    Source: the edge ablation of ACDC (Conmy et al. 2023), removed edges at the donor's value.
    """
    with (
        in_precision(options["precision"], model),
        per_query_head(model, options["kv"] == "query"),
    ):
        sets = EdgeSets.of_pairs([parse_edges(model, edges) for edges in edge_sets.values()])
        graph = Graph(model, base, donor, metric, sets, options["places"], options)
        return graph.answer({"edges": tuple(edge_sets)}, site="edges", mode="edge")


def parse_edges(model: HookedALM, edges: Sequence[Edge]) -> list[NodePair]:
    """Pairs of senders and receivers from pairs of their names.

    Raises:
        InputError: nodes that do not exist, or a receiver that comes before its sender.
    """
    writers = {name: _one(senders(model, name), name) for name, _ in edges}
    readers = {name: _one(receivers(model, name), name) for _, name in edges}
    pairs = [(writers[s], readers[r]) for s, r in edges]
    for sender, receiver in pairs:
        if not tells(sender, receiver):
            raise InputError(
                f"patching the edge {sender.name} -> {receiver.name}: the receiver comes first, or "
                "reads something else. Name a receiver that reads what the sender has written."
            )
    return pairs


@torch.no_grad()
@takes(ChainOptions)
def patch_chains(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    metric: Metric | OnLogits,
    chains: Sequence[Sequence[str]],
    **options: Unpack[ChainOptions],
) -> PatchResult:
    """Patch paths of more than two nodes, of which each hears only the one before it.

    The sender's message changes the first receiver's input and nothing else; what that receiver
    then writes more than in the base run is the message to the next. A k or v receiver passes its
    message on at every position that attends to it.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts as ``base``.
        metric: what is read off each run.
        chains: each a sender and two or more receivers in the order of the stream, as in
            ``path_patch``: ``("blocks.2.attn.hook_z[1]", "blocks.5.attn.hook_v_input[0]",
            "logits")``. ``place`` is where the sender's message is.

    Returns:
        Axes ``chain``, ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: nodes out of order or that do not exist, or a residual stream on the way.
    """
    with in_precision(options["precision"], model):
        parsed = [_chain(model, chain) for chain in chains]
        # The graph keeps what these read and write. They are not patched: messages go step by step.
        pairs = [[(sender, receiver)] for sender, those in parsed for receiver in those]
        relays = [relay for _, those in parsed for relay in those[:-1]]
        graph = Graph(
            model, base, donor, metric, EdgeSets.of_pairs(pairs), [options["place"]], options,
            placed=[those[0] for _, those in parsed],
            also_keep=[name for relay in relays for name in relayed(relay)],
        )  # fmt: skip
        found, noise = graph.measured.swept(len(parsed), chain_edits(graph.messages, parsed))
        return graph.measured.result(
            {"chain": tuple(tuple(chain) for chain in chains)},
            found,
            noise,
            site="chain",
            mode="edge",
            length_ratios=graph.placement.length_ratios,
        )


def all_edges(model: HookedALM) -> list[Edge]:
    """Names of all edges between embedding, heads, MLPs and logits, sender before receiver.

    With a path through the encoder, its final norm stands for the logits.
    """
    # Stacks on the path, each once and in order: ``*`` in a name stands for the blocks of one.
    stacks = dict.fromkeys(block.rpartition(".")[0] for block in model.path)

    def every(*points: str) -> list[str]:
        return [hook_name(point, f"{stack}.*") for stack in stacks for point in points]

    crossed = model.path_cfg.cross_attention
    heads = (f"{name}[*]" for name in every("z", *(["cross_attn.z"] if crossed else [])))
    mlps = every("mlp_out")
    split = ["attn.q_input", "attn.k_input", "attn.v_input", *(["cross_attn.q"] if crossed else [])]
    inputs = (f"{name}[*]" for name in every(*split))
    is_inside = model.part is not None
    writers = senders(model, [f"{ENCODER if is_inside else ''}hook_embed", *heads, *mlps])
    end = ENCODER_END if is_inside else LOGITS
    readers = receivers(model, [*inputs, *every("mlp_in"), end])
    return [(s.name, r.name) for r in readers for s in writers if tells(s, r)]


def _chain(model: HookedALM, names: Sequence[str]) -> tuple[Sender, list[Receiver]]:
    if len(names) < 3:
        raise InputError(
            f"patching the chain {list(names)}: expected a sender and two or more receivers. "
            "`path_patch` patches a single edge."
        )
    sender = _one(senders(model, names[0]), names[0])
    those: list[Receiver] = []
    writes = sender.writes
    for name in names[1:]:
        if those and those[-1].is_stream:
            raise InputError(
                f"patching the chain {list(names)}: {those[-1].name} is no node that passes on. "
                "Put the residual stream or logits last."
            )
        receiver = _one(receivers(model, name), name)
        is_read = not receiver.is_of_memory if those else tells(sender, receiver)
        if not is_read or writes >= receiver.reads:
            raise InputError(
                f"patching the chain {list(names)}: {name} comes too early in it. Give nodes in "
                "the order in which they read and write the stream."
            )
        those.append(receiver)
        # What a relay passes on is written by its attention, or its MLP, behind what it reads.
        writes = receiver.reads
    return sender, those


def node_sets(
    model: HookedALM, names: Nodes, parse: Callable[[HookedALM, Any], list[NodeT]]
) -> list[tuple[NodeT, ...]]:
    """Sets of nodes: a name is a set of its own, a tuple of names one set together."""
    listed = [names] if isinstance(names, str) else names
    sets: list[tuple[NodeT, ...]] = []
    for name in listed:
        # A name with ``*`` gives several nodes, each a set of its own.
        found = parse(model, name)
        sets += [(node,) for node in found] if isinstance(name, str) else [tuple(found)]
    return sets


def set_names(sets: Sequence[tuple[NodeT, ...]]) -> tuple[Any, ...]:
    """Sets of nodes as coordinates."""
    return tuple(one[0].name if len(one) == 1 else tuple(n.name for n in one) for one in sets)


def _one(found: list[NodeT], name: str) -> NodeT:
    if len(found) != 1:
        raise InputError(f"patching edges: {name!r} names {len(found)} nodes. Name each edge.")
    return found[0]


def _check_memory(
    from_sets: Sequence[tuple[Sender, ...]], to_sets: Sequence[tuple[Receiver, ...]]
) -> None:
    """Refuse paths that do not exist where cross-attention alone reads the encoder."""
    told = {node.is_heard_as_memory for one in from_sets for node in one}
    heard = {node.is_of_memory for one in to_sets for node in one}
    if (told | heard) - (told & heard) or len(heard) > 1:
        raise InputError(
            f"patching paths from {set_names(from_sets)[:2]} to {set_names(to_sets)[:2]}: keys and "
            "values of cross-attention read the encoder, and nothing else does. Give senders in "
            "the encoder with receivers cross_attn.hook_k and hook_v, or neither."
        )


def _check_modes(
    mode: str,
    norm: str,
    from_sets: Sequence[tuple[Sender, ...]],
    to_sets: Sequence[tuple[Receiver, ...]],
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
    if mode == "ioi" and any(node.is_before_path for one in from_sets for node in one):
        raise InputError(
            "patching paths from the encoder into the decoder with mode='ioi': what of the "
            "encoder would be frozen is not defined. Use 'edge', or model.towards('encoder')."
        )
    # The base's norm scale stands for one receiver's input; the stream has no norm, sets have
    # several.
    single = all(len(one) == 1 and not one[0].is_stream for one in to_sets)
    if norm == "frozen" and (mode == "ioi" or not single):
        raise InputError(
            "patching paths with norm='frozen': only single q, k, v and MLP receivers in "
            "mode='edge' have a norm of their own to freeze."
        )
