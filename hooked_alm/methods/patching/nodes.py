"""Nodes of the residual graph: what writes to the stream, and what reads it.

A node is named by a hook point and, where it has several, a head or neuron:
``blocks.9.attn.hook_z[3]``, ``blocks.14.attn.hook_q_input[7]``, ``blocks.2.hook_mlp_out``,
``hook_embed``, ``logits``. ``*`` stands for every layer or every index.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ...errors import InputError
from ...model import HookedALM

Sender = Literal["embed", "attn", "head", "mlp", "neuron"]
Receiver = Literal["q", "k", "v", "mlp", "resid_pre", "resid_mid", "resid_post"]

SENDERS: dict[str, tuple[Sender, Sender | None]] = {
    "hook_embed": ("embed", None),
    "attn.hook_z": ("attn", "head"),
    "attn.hook_result": ("attn", "head"),
    "hook_attn_out": ("attn", None),
    "hook_mlp_out": ("mlp", None),
    "mlp.hook_post": ("mlp", "neuron"),
}
"""Point -> what it is without and with an index. All heads together are the attention."""

RECEIVERS: dict[str, tuple[Receiver, bool]] = {
    **{f"{at}hook_{part}{end}": (part, True) for part in ("q", "k", "v")
       for at, end in (("attn.", "_input"), ("", "_input"), ("attn.", ""))},
    "hook_mlp_in": ("mlp", False),
    "hook_resid_pre": ("resid_pre", False),
    "hook_resid_mid": ("resid_mid", False),
    "hook_resid_post": ("resid_post", False),
}  # fmt: skip
"""Point -> what reads there, and whether it has heads."""

_NAME = re.compile(
    r"(?:(?P<block>(?:mimo_)?blocks\.(?:\d+|\*))\.)?(?P<point>[a-z_.]+)(?:\[(?P<unit>\d+|\*)\])?"
)


@dataclass(frozen=True, order=True)
class Node:
    """A writer or a reader of the residual stream.

    The stream is written in the order embedding, attention 0, MLP 0, attention 1, ...
    """

    layer: int
    kind: Sender | Receiver
    unit: int | None = None
    name: str = field(default="", compare=False)
    block: str = field(default="", compare=False)
    """Name of the block that it is in."""

    @property
    def writes(self) -> int:
        """Place of a sender among the writes: -1 for the embedding, then 0, 1, 2, ..."""
        return {"embed": -1, "attn": 2 * self.layer, "head": 2 * self.layer}.get(
            self.kind, 2 * self.layer + 1
        )

    @property
    def reads(self) -> int:
        """A receiver reads the writes before this place, and changes those from it on."""
        return 2 * self.layer + {"mlp": 1, "resid_mid": 1, "resid_post": 2}.get(self.kind, 0)


def senders(model: HookedALM, names: str | Sequence[str]) -> list[Node]:
    """Writers by name.

    Raises:
        InputError: a point that does not write to the stream, or a layer or index out of range.
    """
    return [node for name in _listed(names) for node in _parse(model, name, "sender")]


def receivers(model: HookedALM, names: str | Sequence[str]) -> list[Node]:
    """Readers by name; ``logits`` is the stream after the last block.

    Raises:
        InputError: a point that does not read the stream, or a layer or index out of range.
    """
    last = f"{model.path[-1]}.hook_resid_post"
    return [
        replace(node, name=name) if name == "logits" else node
        for name in _listed(names)
        for node in _parse(model, last if name == "logits" else name, "receiver")
    ]


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _parse(model: HookedALM, name: str, role: Literal["sender", "receiver"]) -> Iterator[Node]:
    match = _NAME.fullmatch(name)
    known = SENDERS if role == "sender" else RECEIVERS
    point = match["point"] if match else ""
    if match is None or point not in known or (match["block"] is None) != (point == "hook_embed"):
        raise InputError(
            f"naming the {role} {name!r}: expected a hook point and, in brackets, a head or "
            f"neuron, as in 'blocks.9.{list(known)[1]}[3]'. A {role} is one of "
            f"{', '.join(known)}" + (", logits." if role == "receiver" else ".")
        )
    kind, size = _kind_and_size(model, name, point, match["unit"], role)
    for layer, block in _blocks(model, name, match["block"]):
        for unit in (
            [None] if match["unit"] is None else _indices(name, "index", match["unit"], size)
        ):
            full = ".".join(filter(None, (block, point)))
            yield Node(layer, kind, unit, full + ("" if unit is None else f"[{unit}]"), block)


def _blocks(model: HookedALM, name: str, given: str | None) -> list[tuple[int, str]]:
    """Blocks on the path to the head in use, with their places; ``*`` is all of a stack."""
    if given is None:
        return [(0, "")]
    stack, _, index = given.rpartition(".")
    found = [
        (layer, block)
        for layer, block in enumerate(model.path)
        if block == given or (index == "*" and block.startswith(f"{stack}."))
    ]
    if not found:
        raise InputError(
            f"naming {name!r}: {given} is not on the way to the {model.head} head, which is "
            f"{model.path[0]} to {model.path[-1]}, {len(model.path)} blocks."
        )
    return found


def _kind_and_size(
    model: HookedALM, name: str, point: str, unit: str | None, role: str
) -> tuple[Sender | Receiver, int]:
    cfg = model.cfg
    if role == "sender":
        whole, part = SENDERS[point]
        if unit is not None and part is None:
            raise InputError(f"naming the sender {name!r}: {point} has no parts to index.")
        return (whole if unit is None or part is None else part), (
            cfg.d_mlp if part == "neuron" else cfg.n_heads
        )
    kind, has_heads = RECEIVERS[point]
    if has_heads != (unit is not None):
        raise InputError(
            f"naming the receiver {name!r}: {point} "
            + ("needs a head, as in '[3]' or '[*]'." if has_heads else "has no heads.")
        )
    return kind, cfg.n_heads if kind == "q" else cfg.n_key_value_heads


def _indices(name: str, what: str, given: str, size: int) -> range:
    if given == "*":
        return range(size)
    if int(given) >= size:
        raise InputError(f"naming {name!r}: {what} {given}, but there are {size}.")
    return range(int(given), int(given) + 1)
