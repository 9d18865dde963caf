"""Path patching of Hugging Face models with PyTorch hooks alone, from the papers' definitions.

Nodes are tuples of kind, block and head or neuron. Senders: ``embed``, ``head``, ``attn``, ``mlp``,
``neuron``; receivers: ``q``, ``k``, ``v``, ``mlp``, ``resid_pre``, ``resid_mid``, ``resid_post``.
Every run is a whole forward of the whole batch, in which each hook point is looked at, and edited
where somebody asks for it.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_reference import decoder_of

Node = tuple[str, int, int | None]
Point = tuple[str, int]
Seen = dict[Point, Tensor]
Edits = Mapping[Point, Callable[[Tensor, Seen], Tensor]]
Where = Sequence[tuple[list[int], list[int]]]
"""Per row: positions, and the donor's positions that stand for them."""

EMBED: Node = ("embed", 0, None)
NAMES = {
    "embed": "hook_embed",
    "head": "blocks.{}.attn.hook_z[{}]",
    "attn": "blocks.{}.hook_attn_out",
    "mlp": "blocks.{}.hook_mlp_out",
    "neuron": "blocks.{}.mlp.hook_post[{}]",
}
READ_NAMES = {
    **{part: "blocks.{}.attn.hook_" + part + "_input[{}]" for part in "qkv"},
    "mlp": "blocks.{}.hook_mlp_in",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
}
SEEN_AT = {"embed": "in", "head": "z", "attn": "attn", "mlp": "mlp", "neuron": "post"}


def sender_name(node: Node) -> str:
    return NAMES[node[0]].format(*node[1:])


def receiver_name(node: Node) -> str:
    return READ_NAMES[node[0]].format(*node[1:])


def comes_before(sender: Node, receiver: Node) -> bool:
    """Whether the stream that the receiver reads has the sender's message in it."""
    steps = {"embed": 0, "head": 1, "attn": 1, "mlp": 2, "neuron": 2}
    reads = {"mlp": 1, "resid_mid": 1, "resid_post": 2}
    written = 0 if sender[0] == "embed" else 2 * sender[1] + steps[sender[0]]
    return written <= 2 * receiver[1] + reads.get(receiver[0], 0)


def run(hf: Any, inputs: Mapping[str, Tensor], edits: Edits | None = None) -> tuple[Tensor, Seen]:
    """Logits of one forward, and what passed its points, after the edits.

    Points by block: ``in``, ``q``, ``k``, ``v``, ``z``, ``attn``, ``mid`` (looked at only),
    ``mlp_in``, ``post``, ``mlp``, ``out``.
    """
    edits, seen = edits or {}, Seen()

    def passed(point: Point, value: Tensor) -> Tensor:
        seen[point] = edits[point](value, seen) if point in edits else value
        return seen[point]

    def before(point: Point) -> Callable[..., Any]:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (passed(point, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": passed(point, kwargs["hidden_states"])}

        return hook

    def after(point: Point) -> Callable[..., Any]:
        return lambda _, args, out: passed(point, out)

    handles = []
    for layer, block in enumerate(decoder_of(hf).layers):
        attn = block.self_attn
        entered = {
            "in": block, "z": attn.o_proj, "mid": block.post_attention_layernorm,
            "mlp_in": block.mlp, "post": block.mlp.down_proj,
        }  # fmt: skip
        left = {
            "q": attn.q_proj, "k": attn.k_proj, "v": attn.v_proj, "attn": attn.o_proj,
            "mlp": block.mlp, "out": block,
        }  # fmt: skip
        for kind, module in entered.items():
            hook = before((kind, layer))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        handles += [m.register_forward_hook(after((kind, layer))) for kind, m in left.items()]
    try:
        return hf(**inputs).logits, seen
    finally:
        for handle in handles:
            handle.remove()


def written(hf: Any, node: Node, seen: Seen) -> Tensor:
    """What a sender added to the stream, ``[batch, pos, d_model]``."""
    kind, layer, unit = node
    value = seen[SEEN_AT[kind], layer]
    if unit is None:
        return value
    block = decoder_of(hf).layers[layer]
    if kind == "neuron":
        return value[..., unit, None] * block.mlp.down_proj.weight[:, unit]
    own = columns(hf, unit)
    return value[..., own] @ block.self_attn.o_proj.weight[:, own].T


def columns(hf: Any, head: int) -> slice:
    """Where a head is in a projection."""
    width = decoder_of(hf).layers[0].self_attn.head_dim
    return slice(head * width, (head + 1) * width)


def edge_patched(
    hf: Any,
    base: Mapping[str, Tensor],
    donor: Mapping[str, Tensor],
    edges: Sequence[tuple[Node, Node]],
    where: Where,
    frozen_norm: bool = False,
) -> Tensor:
    """Logits of one run in which receivers read donor messages of senders instead of its own."""
    _, theirs = run(hf, donor)
    into: dict[Node, list[Node]] = {}
    for sender, receiver in edges:
        into.setdefault(receiver, []).append(sender)

    def patched(stream: Tensor, receiver: Node, seen: Seen) -> Tensor:
        stream = stream.clone()
        for sender in into[receiver]:
            new, old = written(hf, sender, theirs), written(hf, sender, seen)
            for row, (ours, aligned) in enumerate(where):
                stream[row, ours] += new[row, aligned] - old[row, ours]
        return stream

    return _run_with_inputs(hf, base, list(into), patched, where, frozen_norm)[0]


def ioi_patched(
    hf: Any,
    base: Mapping[str, Tensor],
    donor: Mapping[str, Tensor],
    senders: Sequence[Node],
    receivers: Sequence[Node],
    where: Where,
) -> Tensor:
    """Wang et al. 2022, appendix B: logits of run D, after runs A (donor), B (base) and C."""
    (_, run_a), (_, run_b) = run(hf, donor), run(hf, base)
    edits: dict[Point, Callable[[Tensor, Seen], Tensor]] = {}
    for layer in range(len(decoder_of(hf).layers)):
        heads = [unit for kind, at, unit in senders if (kind, at) == ("head", layer)]

        def frozen(_: Tensor, seen: Seen, layer: int = layer, heads: Any = heads) -> Tensor:
            z = run_b["z", layer].clone()
            for head in heads:
                for row, (ours, aligned) in enumerate(where):
                    z[row, ours, columns(hf, head)] = run_a["z", layer][
                        row, aligned, columns(hf, head)
                    ]
            return z

        edits["z", layer] = frozen
    for kind, layer, _ in senders:
        if kind == "head":
            continue
        point = (SEEN_AT[kind], layer)

        def sent(value: Tensor, seen: Seen, point: Point = point) -> Tensor:
            value = value.clone()
            for row, (ours, aligned) in enumerate(where):
                value[row, ours] = run_a[point][row, aligned]
            return value

        edits[point] = sent
    _, run_c = run(hf, base, edits)

    def patched(stream: Tensor, receiver: Node, seen: Seen) -> Tensor:
        kind, layer, _ = receiver
        point = {"mlp": "mid", "resid_mid": "mid", "resid_post": "out"}.get(kind, "in")
        return run_c[point, layer]

    return _run_with_inputs(hf, base, receivers, patched, where, False)[0]


def chain_patched(
    hf: Any,
    base: Mapping[str, Tensor],
    donor: Mapping[str, Tensor],
    chain: Sequence[Node],
    where: Where,
) -> tuple[Tensor, list[Tensor]]:
    """Logits at the end of a chain, and the messages ``[batch, pos, d_model]`` on the way.

    One whole run per receiver, in which nothing but its input has the message in it. What its
    attention or MLP then writes more than in the base run is the next message.
    """
    (_, ours), (_, theirs) = run(hf, base), run(hf, donor)
    new, old = written(hf, chain[0], theirs), written(hf, chain[0], ours)
    message = torch.zeros_like(old)
    for row, (here, there) in enumerate(where):
        message[row, here] = new[row, there] - old[row, here]
    real: Where = [(row.nonzero().flatten().tolist(), []) for row in base["attention_mask"]]
    messages, logits = [], torch.empty(0)
    for receiver in chain[1:]:
        messages.append(message)

        def patched(stream: Tensor, _: Node, __: Seen, message: Tensor = message) -> Tensor:
            return stream + message

        logits, seen = _run_with_inputs(hf, base, [receiver], patched, real, False)
        if receiver[0] in ("q", "k", "v", "mlp"):
            point = ("mlp" if receiver[0] == "mlp" else "attn", receiver[1])
            message = (seen[point] - ours[point]) * base["attention_mask"][..., None]
    return logits, messages


def _run_with_inputs(
    hf: Any,
    base: Mapping[str, Tensor],
    receivers: Sequence[Node],
    patched: Callable[[Tensor, Node, Seen], Tensor],
    where: Where,
    frozen_norm: bool,
) -> tuple[Tensor, Seen]:
    """A run in which each receiver reads another stream, ``patched`` of its own."""

    def at_places(old: Tensor, new: Tensor, part: slice = slice(None)) -> Tensor:
        out = old.clone()
        for row, (ours, _) in enumerate(where):
            out[row, ours, part] = new[row, ours, part]
        return out

    def normed(norm: Any, stream: Tensor, new: Tensor) -> Tensor:
        if not frozen_norm:
            return norm.forward(new)
        rms = (stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return new / rms * norm.weight

    edits: dict[Point, Callable[[Tensor, Seen], Tensor]] = {}
    for receiver in receivers:
        kind, layer, _ = receiver
        block = decoder_of(hf).layers[layer]
        point = {"mlp": "mlp_in", "resid_pre": "in", "resid_post": "out", "resid_mid": "attn"}.get(
            kind, kind
        )

        earlier = edits.get((point, layer))  # another head's

        def edit(
            value: Tensor,
            seen: Seen,
            receiver: Node = receiver,
            block: Any = block,
            earlier: Any = earlier,
        ) -> Tensor:
            value = value if earlier is None else earlier(value, seen)
            kind, layer, unit = receiver
            if kind in ("resid_pre", "resid_post"):
                return at_places(value, patched(value, receiver, {**seen, ("in", layer): value}))
            if kind == "resid_mid":
                stream = seen["in", layer] + value
                new = patched(stream, receiver, {**seen, ("attn", layer): value})
                return at_places(value, new - seen["in", layer])
            if kind == "mlp":
                stream = seen["mid", layer]
                norm = block.post_attention_layernorm
                return at_places(value, normed(norm, stream, patched(stream, receiver, seen)))
            stream = seen["in", layer]
            new = normed(block.input_layernorm, stream, patched(stream, receiver, seen))
            projection = getattr(block.self_attn, f"{kind}_proj")
            return at_places(value, projection.forward(new), columns(hf, unit))

        edits[point, layer] = edit
    return run(hf, base, edits)


def all_edges(hf: Any) -> list[tuple[Node, Node]]:
    """Every edge between embedding, heads, MLPs and the last stream."""
    layers = range(len(decoder_of(hf).layers))
    attn = decoder_of(hf).layers[0].self_attn
    n_heads = attn.q_proj.out_features // attn.head_dim
    n_kv = attn.k_proj.out_features // attn.head_dim
    senders: list[Node] = [EMBED]
    receivers: list[Node] = [("resid_post", layers[-1], None)]
    for layer in layers:
        senders += [("head", layer, head) for head in range(n_heads)] + [("mlp", layer, None)]
        receivers += [("mlp", layer, None)]
        receivers += [("q", layer, head) for head in range(n_heads)]
        receivers += [(part, layer, head) for part in "kv" for head in range(n_kv)]
    return [(s, r) for r in receivers for s in senders if comes_before(s, r)]


def ungrouped(hf: Any) -> Any:
    """The same function with a kv head of its own, by copies, for every query head."""
    twin = copy.deepcopy(hf)
    for block in decoder_of(twin).layers:
        attn = block.self_attn
        for projection in (attn.k_proj, attn.v_proj):
            for name, parameter in list(projection.named_parameters()):
                by_head = parameter.detach().unflatten(0, (-1, attn.head_dim))
                copies = by_head.repeat_interleave(attn.num_key_value_groups, 0).flatten(0, 1)
                setattr(projection, name, torch.nn.Parameter(copies))
            projection.out_features = len(projection.weight)
        attn.num_key_value_groups = 1
    return twin
