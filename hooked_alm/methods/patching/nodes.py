"""Nodes of the residual graph: senders write to the stream, receivers read it.

A node is named by a hook point and, where it has several, a head or neuron:
``blocks.9.attn.hook_z[3]``, ``blocks.14.attn.hook_q_input[7]``, ``blocks.2.hook_mlp_out``,
``hook_embed``, ``logits``. ``*`` stands for every layer or every index.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from ...errors import InputError
from ...model import HookedALM
from ...points import ENCODER, RECEIVERS, SENDERS, Point, Reader, Site, hook_name

SenderKind = Literal["embed", "attn", "head", "cross_attn", "cross_head", "mlp", "neuron"]
LOGITS, ENCODER_END = "logits", f"{ENCODER}ln_final"
"""Receivers that stand for the stream behind the last block of the path."""
_SITES: dict[str, Site] = {
    "mlp": "post", "cross_q": "cross_attn.q", "cross_k": "cross_attn.k", "cross_v": "cross_attn.v",
}  # fmt: skip
"""Sites that are edited for receivers whose kind is not its name."""


def _kind(point: Point, has_unit: bool) -> SenderKind:
    """Kind of a sender at a point: the whole that writes, or one of its parts."""
    unit = point.unit if has_unit else None
    if unit == "head" and point.writes == "cross_attn":
        return "cross_head"
    return cast(SenderKind, unit or point.writes)


# Only where sweeps can edit: a head is seen at z, not at the costly ``hook_result``.
_ACTIVATIONS = {
    _kind(point, True): point
    for point in SENDERS.values()
    if point.reach or point.writes == "embed"
}
"""Points that show senders' activations: a writer's whole, or its units. All heads together are the
attention, all neurons the MLP."""

# Block of any stack, point below it, and in brackets the head or neuron.
_NAME = re.compile(
    r"(?:(?P<block>[\w.]*blocks\.(?:\d+|\*))\.)?(?P<point>[a-z_.]+)(?:\[(?P<unit>\d+|\*)\])?"
)


@dataclass(frozen=True, order=True)
class Sender:
    """A writer to the residual stream.

    The stream is written in the order embedding, attention 0, cross-attention 0, MLP 0, attention
    1, ...
    """

    layer: int
    kind: SenderKind
    unit: int | None = None
    """Head or neuron, where the sender is one."""
    name: str = field(default="", compare=False)
    block: str = field(default="", compare=False)
    """Name of the block that it is in."""
    is_heard_as_memory: bool = field(default=False, compare=False)
    """Whether it is in an audio encoder that cross-attention alone reads."""

    @property
    def writes(self) -> int:
        """Place among the writes: -1 for the embedding, then three for each block."""
        # Heads write with their attention, neurons with their MLP.
        places = {"embed": -1, "attn": 0, "head": 0, "cross_attn": 1, "cross_head": 1}
        return 3 * self.layer + places.get(self.kind, 2)

    @property
    def site(self) -> Site:
        """Site at which a sweep edits or sees the activation; the embedding has none."""
        return cast(Site, _ACTIVATIONS[self.kind].short)

    @property
    def activation(self) -> str:
        """Hook point that shows the activation."""
        if self.kind == "embed":
            return self.name
        return hook_name(_ACTIVATIONS[self.kind].short, self.block)

    @property
    def is_before_path(self) -> bool:
        """Whether the sender is in the audio encoder, and the path is not."""
        return self.layer < 0


@dataclass(frozen=True, order=True)
class Receiver:
    """A reader of the residual stream, or the stream itself at one place."""

    layer: int
    kind: Reader
    unit: int | None = None
    """Query head for q, kv head for k and v."""
    # Not compared: ``logits`` is a residual stream, too, and split inputs have two names.
    name: str = field(default="", compare=False)
    block: str = field(default="", compare=False)
    """Name of the block that it is in."""
    is_crossed: bool = field(default=False, compare=False)
    """Whether the block has cross-attention."""

    @property
    def reads(self) -> int:
        """Place among the writes: those before it are read, those from it on can change."""
        places = {"resid_mid": 1, "cross_q": 1, "cross_k": 1, "cross_v": 1, "mlp": 2,
                  "resid_mid_cross": 2, "resid_post": 3}  # fmt: skip
        return 3 * self.layer + places.get(self.kind, 0)

    @property
    def is_of_memory(self) -> bool:
        """Whether the receiver reads a memory, not the stream."""
        return self.kind in ("cross_k", "cross_v")

    @property
    def is_stream(self) -> bool:
        """Whether the receiver is the stream itself, which everything behind it reads."""
        return self.kind.startswith("resid")

    @property
    def is_end(self) -> bool:
        """Whether nothing on the path reads the stream any more: the head does, or the decoder."""
        return self.name in (LOGITS, ENCODER_END)

    @property
    def stream_site(self) -> Site:
        """Site of the stream that the receiver reads, or is."""
        if self.is_stream:
            return cast(Site, self.kind)
        if self.kind == "mlp" and self.is_crossed:
            return "resid_mid_cross"
        return "resid_mid" if self.kind in ("mlp", "cross_q") else "resid_pre"

    @property
    def stream(self) -> str:
        """Hook point of the stream that the receiver reads, or is; or of the memory."""
        if self.is_of_memory:
            return hook_name("hook_audio_embed")
        return hook_name(self.stream_site, self.block)

    @property
    def site(self) -> Site:
        """Site that is edited to make the receiver act on another input.

        That is its q, k or v, or the MLP's neurons: the input itself is read by others, too.
        """
        return _SITES.get(self.kind) or cast(Site, self.kind)


def senders(model: HookedALM, names: str | Sequence[str]) -> list[Sender]:
    """Senders of some names, in order; ``*`` gives one for each block, head or neuron.

    Raises:
        InputError: a point that does not write to the stream, or a layer or index out of range.
    """
    found = []
    for name in _listed(names):
        block, point, unit = _split(name, "sender", SENDERS)
        if unit is not None and SENDERS[point].unit is None:
            raise InputError(f"naming the sender {name!r}: {point} has no parts to index.")
        kind = _kind(SENDERS[point], unit is not None)
        for layer, at in _blocks(model, name, block, "sender"):
            cfg = model.config_of(name)
            size = cfg.d_mlp if kind == "neuron" else cfg.n_heads
            is_heard = layer < 0 and model.cfg.cross_attention
            for index in _indices(name, unit, size):
                full = name if kind == "embed" else _full_name(at, point, index)
                found.append(Sender(layer, kind, index, full, at, is_heard))
    return found


def receivers(model: HookedALM, names: str | Sequence[str]) -> list[Receiver]:
    """Receivers of some names, in order; ``logits`` is the stream after the last block.

    So is ``audio.encoder.ln_final`` where the path is the encoder's.

    Raises:
        InputError: a point that does not read the stream, or a layer or index out of range.
    """
    found = []
    for name in _listed(names):
        # Nothing but the head reads the last stream; the receiver keeps the name that was given.
        end = LOGITS if model.part is None else ENCODER_END
        given = hook_name("resid_post", model.path[-1]) if name == end else name
        block, point, unit = _split(given, "receiver", RECEIVERS, end)
        kind = RECEIVERS[point].reads
        assert kind is not None
        has_heads = RECEIVERS[point].unit is not None
        if has_heads != (unit is not None):
            raise InputError(
                f"naming the receiver {name!r}: {point} "
                + ("needs a head, as in '[3]' or '[*]'." if has_heads else "has no heads.")
            )
        # Grouped heads share a k and a v, so there are fewer of these to name.
        cfg = model.path_cfg
        size = cfg.n_heads if kind in ("q", "cross_q") else cfg.n_key_value_heads
        for layer, at in _blocks(model, name, block, "receiver"):
            for index in _indices(name, unit, size):
                full = name if name == end else _full_name(at, point, index)
                found.append(Receiver(layer, kind, index, full, at, cfg.cross_attention))
    return found


def tells(sender: Sender, receiver: Receiver) -> bool:
    """Whether a receiver reads what a sender writes."""
    is_read = sender.is_heard_as_memory == receiver.is_of_memory
    return is_read and sender.writes < receiver.reads


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _full_name(block: str, point: str, unit: int | None) -> str:
    return ".".join(filter(None, (block, point))) + ("" if unit is None else f"[{unit}]")


def _split(
    name: str, role: str, known: Mapping[str, Point], end: str = ""
) -> tuple[str | None, str, str | None]:
    """Block, point and index of a name; ``end`` is one more name that there is."""
    match = _NAME.fullmatch(name)
    point = match["point"] if match else ""
    if match and match["block"] is None:
        point = point.removeprefix(ENCODER)
    # The embedding alone stands outside of blocks.
    if match is None or point not in known or (match["block"] is None) != (point == "hook_embed"):
        raise InputError(
            f"naming the {role} {name!r}: expected a hook point and, in brackets, a head or "
            f"neuron, as in 'blocks.9.{list(known)[1]}[3]'. A {role} is one of "
            f"{', '.join(known)}" + (f", {end}." if end else ".")
        )
    return match["block"], point, match["unit"]


def _blocks(model: HookedALM, name: str, given: str | None, role: str) -> list[tuple[int, str]]:
    """Blocks on the path in use, with their places; ``*`` is all of a stack.

    What senders in the audio encoder write comes before the path to a head: their layers, counted
    back from it, are negative.
    """
    is_inside = model.part is not None
    path = dict(enumerate(model.path))
    if role == "sender" and name.startswith(ENCODER) and not is_inside:
        before = model.towards("encoder").path
        path = {layer - len(before): block for layer, block in enumerate(before)}
    if given is None and name.startswith(ENCODER) >= is_inside:
        return [(min(path), "")]
    # Layers count along the path, names within their stack: the two differ in a branch.
    stack, _, index = (given or "").rpartition(".")
    found = [
        (layer, block)
        for layer, block in path.items()
        if block == given or (index == "*" and block.startswith(f"{stack}."))
    ]
    if not found:
        blocks = list(path.values())
        raise InputError(
            f"naming the {role} {name!r}: {given or name} is not on the way "
            + ("through the encoder" if is_inside else f"to the {model.head} head")
            + f", which is {blocks[0]} to {blocks[-1]}, {len(blocks)} blocks."
            + (
                " Paths between nodes of the encoder take model.towards('encoder')."
                if name.startswith(ENCODER) and not is_inside
                else ""
            )
        )
    return found


def _indices(name: str, given: str | None, size: int) -> Sequence[int | None]:
    if given is None:
        return [None]
    if given == "*":
        return range(size)
    if int(given) >= size:
        raise InputError(f"naming {name!r}: got index {given}, expected 0 to {size - 1}.")
    return [int(given)]
