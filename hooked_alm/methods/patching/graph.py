"""What nodes of the residual graph tell one another, and the cells that change it."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.cells import Cell, Edit, Site, hooks_of
from ...errors import InputError
from ...hooks import HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from .alignment import AlignPolicies, Place
from .donors import DonorValues
from .measurement import Engine, Measurement
from .metrics import Metric, OnLogits
from .nodes import Node, Receiver
from .patch import place_ticks
from .results import PatchResult

PathMode = Literal["edge", "ioi"]
NormMode = Literal["exact", "frozen"]
Stream = Float[Tensor, "pos d_model"]
Pairs = Sequence[tuple[Node, Node]]
"""Senders and receivers whose edges are patched at once."""
CACHED_STREAM_BYTES = 2**29
"""Streams of ``ioi`` that are kept instead of computed again for every receiver."""

SENDER_POINTS = {
    "embed": "hook_embed",
    "attn": "hook_attn_out",
    "head": "attn.hook_z",
    "mlp": "hook_mlp_out",
    "neuron": "mlp.hook_post",
}
SENDER_SITES: Mapping[str, Site] = {
    "attn": "attn_out", "head": "z", "mlp": "mlp_out", "neuron": "post",
}  # fmt: skip


class Graph:
    """The runs of base and donor, and the cells that patch edges between their nodes."""

    def __init__(
        self,
        model: HookedALM,
        base: ALMInput,
        donor: ALMInput,
        metric: Metric | OnLogits,
        pair_sets: Sequence[Pairs],
        places: Sequence[Place],
        *,
        policy: AlignPolicies,
        norm: NormMode,
        mode: PathMode,
        engine: Engine,
        max_bytes: int | None,
        also_keep: Sequence[str] = (),
    ) -> None:
        self.model, self.places, self.norm, self.mode = model, list(places), norm, mode
        for pairs in pair_sets:
            check_set(pairs)
        self.values = DonorValues(model, base, donor, self.places, policy)
        written = {sending_point(s) for pairs in pair_sets for s, _ in pairs}
        read = {_point_read(r) for pairs in pair_sets for _, r in pairs}
        if mode == "ioi":
            read |= {"hook_embed", *(f"{block}.hook_attn_out" for block in model.path)}
            read |= {f"{block}.hook_resid_pre" for block in model.path}
        self.measured = Measurement(
            model, base, donor, metric, engine=engine, max_bytes=max_bytes,
            keep=sorted({*written, *read, *also_keep}), keep_of_donor=sorted(written),
        )  # fmt: skip
        self.message = lru_cache(maxsize=512)(self._message)
        self.received = lru_cache(maxsize=8)(self._received)
        per_stream = base.shape[1] * model.cfg.d_model * 4 * 2 * len(model.path)
        self.streams = lru_cache(maxsize=max(CACHED_STREAM_BYTES // per_stream, 1))(self._streams)

    def answer(
        self,
        axes: Mapping[str, tuple[Any, ...]],
        pair_sets: Sequence[Pairs],
        **about: Any,
    ) -> PatchResult:
        """Measure every set of pairs at every place."""
        cell = self.ioi_cell if self.mode == "ioi" else self.edge_cell
        cells = [
            [cell(tuple(dict.fromkeys(pairs)), row, place) for row in range(len(self.values.base))]
            for pairs, place in product(pair_sets, range(len(self.places)))
        ]
        found = self.measured.values(cells)
        for i, (pairs, _) in enumerate(product(pair_sets, self.places)):
            if not pairs and "receiver" in axes:
                found[i] = torch.nan
        every = {**axes, "place": place_ticks(self.places)}
        return self.measured.result(every, found, length_ratios=self.values.length_ratios, **about)

    def base_rows(self, name: str, row: int, place: int) -> Tensor:
        """A base activation at a place."""
        return self.measured.base_runs.kept[name][row, self.values.alignments[place][row].base]

    def donor_rows(self, name: str, row: int, place: int) -> Tensor:
        """A donor activation, aligned with the place."""
        runs = self.measured.donor_runs
        assert runs is not None
        return self.values.alignments[place][row].donor_values(runs.kept[name][row])

    def written(self, node: Node, activation: Tensor) -> Stream:
        """What a node adds to the stream, from its activation ``[pos, ...]``."""
        if node.unit is None:
            return activation
        block = self.model.block(node.layer)
        if node.kind == "head":
            return activation[:, node.unit] @ block.attn.W_O[node.unit]
        return activation[:, node.unit, None] * block.mlp.W_out[node.unit]

    def _message(self, node: Node, row: int, place: int) -> Stream:
        """What the donor's node writes more than the base's."""
        pair = (rows(sending_point(node), row, place) for rows in (self.donor_rows, self.base_rows))
        theirs, ours = (self.written(node, activation) for activation in pair)
        return theirs - ours

    def edge_cell(self, pairs: tuple[tuple[Node, Node], ...], row: int, place: int) -> Cell:
        """Edits that give each receiver its senders' messages, everything else recomputed.

        The first receivers read what the base run has there. Later ones, and messages of senders
        behind a receiver, are taken from the run as it goes.
        """
        positions = self.values.alignments[place][row].base
        if not pairs or not positions:
            return Cell(row, ())
        first = min(receiver.reads for _, receiver in pairs)
        seen: dict[str, Tensor] = {}
        edits = {
            sending_point(s): Edit(
                SENDER_SITES[s.kind], s.layer, positions, partial(_see, seen, sending_point(s))
            )
            for s, _ in pairs
            if s.writes >= first
        }
        by_receiver: dict[Node, list[Node]] = {}
        for sender, receiver in pairs:
            by_receiver.setdefault(receiver, []).append(sender)
        received: list[Edit] = []
        for receiver, those in by_receiver.items():
            at = _point_read(receiver)
            online = {s: sending_point(s) for s in those if s.writes >= first}
            delta = partial(self._delta, tuple(those), online, seen, row, place)
            if receiver.kind.startswith("resid"):
                site: Any = receiver.kind
                received.append(Edit(site, receiver.layer, positions, partial(_add, delta)))
                continue
            if receiver.reads <= first:
                key = (tuple(those), receiver.layer, receiver.kind, row, place)
                value = partial(self.received, *key)
            else:
                site = "resid_mid" if receiver.kind == "mlp" else "resid_pre"
                if at not in edits:
                    edits[at] = Edit(site, receiver.layer, positions, partial(_see, seen, at))
                value = partial(self._read, receiver, seen, delta)
            received.append(_receive(receiver, positions, value))
        # What an MLP writes is looked at after its input was patched.
        return Cell(row, (*received, *edits.values()))

    def _delta(
        self,
        those: tuple[Node, ...],
        online: Mapping[Node, str],
        seen: Mapping[str, Tensor],
        row: int,
        place: int,
    ) -> Stream:
        """Sum of the senders' messages: donor minus base, or minus what this run has written."""
        total: Tensor | float = 0.0
        for sender in those:
            if sender in online:
                theirs = self.donor_rows(online[sender], row, place)
                ours = seen[online[sender]]
                total = total + (self.written(sender, theirs) - self.written(sender, ours))
            else:
                total = total + self.message(sender, row, place)
        assert isinstance(total, Tensor)
        return total

    def _received(
        self, those: tuple[Node, ...], layer: int, kind: Receiver, row: int, place: int
    ) -> Tensor:
        """What the first receivers of a kind make of some messages, every head at once."""
        at = f"{self.model.path[layer]}.hook_resid_{'mid' if kind == 'mlp' else 'pre'}"
        base = self.base_rows(at, row, place)
        delta = self._delta(those, {}, {}, row, place)
        return self._of_stream(layer, kind, base + delta, base)

    def _read(
        self, receiver: Node, seen: Mapping[str, Tensor], delta: Callable[[], Stream]
    ) -> Tensor:
        """The same from a stream that this run has changed already."""
        stream = seen[_point_read(receiver)] + delta()
        return self._of_stream(receiver.layer, receiver.kind, stream, None)

    def _of_stream(self, layer: int, kind: str, stream: Stream, base: Stream | None) -> Tensor:
        """q, k or v ``[pos, head, d_head]``, or the MLP's neurons, read off a stream."""
        block = self.model.block(layer)
        ln = block.ln2 if kind == "mlp" else block.ln1
        if self.norm == "frozen":
            assert base is not None
            normed = (stream.float() / ln.scale(base)).to(stream.dtype) * ln.weight
        else:
            normed = ln.normalize(stream) * ln.weight
        if kind == "mlp":
            return block.mlp.neurons(normed[None])[0]
        return block.attn.project(kind, normed[None])[0]  # type: ignore[arg-type]

    def chain_cell(self, chain: Sequence[Node], row: int) -> Cell:
        """The edit of a chain's last receiver, by what reaches it."""
        positions = list(self.values.alignments[0][row].base)
        if not positions:
            return Cell(row, ())
        message = self.message(chain[0], row, 0)
        for relay in chain[1:-1]:
            positions, message = self._passed_on(relay, row, positions, message)
        last = chain[-1]
        if last.kind.startswith("resid"):
            site: Any = last.kind
            write = partial(_add, lambda: message)
            return Cell(row, (Edit(site, last.layer, positions, write),))
        stream = self.measured.base_runs.kept[_point_read(last)][row, positions] + message
        value = self._of_stream(last.layer, last.kind, stream, None)
        return Cell(row, (_receive(last, positions, lambda: value),))

    def _passed_on(
        self, relay: Node, row: int, positions: list[int], message: Stream
    ) -> tuple[list[int], Float[Tensor, "passed d_model"]]:
        """What a receiver writes more than in the base run, and where, when it hears a message."""
        kept = self.measured.base_runs.kept
        stream = kept[_point_read(relay)][row]
        new = self._of_stream(relay.layer, relay.kind, stream[positions] + message, None)
        if relay.kind == "mlp":
            block = self.model.block(relay.layer)
            before = kept[f"{relay.block}.mlp.hook_post"][row, positions]
            return positions, block.mlp.written(new - before)
        edit = _receive(relay, positions, lambda: new)
        x = self.values.base[row]
        name = f"{relay.block}.attn.hook_z"
        seen: dict[str, Tensor] = {}

        def see(value: Tensor, hook: HookPoint) -> None:
            seen[name] = value

        with self.model.hooks(
            fwd_hooks=[*hooks_of([Cell(0, (edit,))], self.model.path), (name, see)]
        ):
            self.model(
                kept[f"{relay.block}.hook_resid_pre"][row][None],
                start_at_layer=relay.layer,
                stop_at_layer=relay.layer + 1,
                inputs=x,
            )
        block = self.model.block(relay.layer)
        delta = seen[name][0] - kept[name][row]
        if relay.kind != "q":
            real = x.attention_mask[0].bool().tolist()
            positions = [pos for pos in range(min(positions), len(real)) if real[pos]]
        return positions, torch.einsum("phe,hed->pd", delta[positions], block.attn.W_O)

    def ioi_cell(self, pairs: tuple[tuple[Node, Node], ...], row: int, place: int) -> Cell:
        """Receivers get what reaches them from the senders through MLPs alone, heads frozen."""
        positions = self.values.alignments[place][row].base
        if not pairs or not positions:
            return Cell(row, ())
        those = tuple(dict.fromkeys(sender for sender, _ in pairs))
        edits = []
        for receiver in dict.fromkeys(receiver for _, receiver in pairs):

            def reached(receiver: Node = receiver) -> Tensor:
                return self.streams(those, row, place)[receiver.reads]

            if receiver.kind.startswith("resid"):
                site: Any = receiver.kind
                write = partial(_replace, reached)
                edits.append(Edit(site, receiver.layer, positions, write))
                continue

            def value(receiver: Node = receiver, reached: Any = reached) -> Tensor:
                return self._of_stream(receiver.layer, receiver.kind, reached(), None)

            edits.append(_receive(receiver, positions, value))
        return Cell(row, tuple(edits))

    def _streams(self, those: tuple[Node, ...], row: int, place: int) -> list[Stream]:
        """The stream at every read, senders at the donor's, heads frozen, MLPs recomputed.

        Entry ``2 b`` is before block b, ``2 b + 1`` between its attention and its MLP.
        """
        first = min(sender.layer for sender in those)
        stream = self.base_rows(f"{self.model.path[first]}.hook_resid_pre", row, place)
        if any(sender.kind == "embed" for sender in those):
            stream = self.donor_rows("hook_embed", row, place)
        streams = [stream] * (2 * first + 1)
        for layer in range(first, len(self.model.path)):
            block, name = self.model.block(layer), self.model.path[layer]
            sent = [sender for sender in those if sender.layer == layer]
            stream = stream + self.base_rows(f"{name}.hook_attn_out", row, place)
            for sender in sent:
                if sender.kind in ("head", "attn"):
                    stream = stream + self.message(sender, row, place)
            streams.append(stream)
            if mlp := next((sender for sender in sent if sender.kind == "mlp"), None):
                stream = stream + self.donor_rows(sending_point(mlp), row, place)
            else:
                normed = block.ln2.normalize(stream) * block.ln2.weight
                stream = stream + block.mlp.written(block.mlp.neurons(normed[None])[0])
            streams.append(stream)
        return streams


def check_set(pairs: Pairs) -> None:
    """Refuse edges that cannot be patched at once, because one holds another.

    Raises:
        InputError: the residual stream beside what reads it, or attention and MLPs beside their
            heads and neurons.
    """
    readers = {receiver for _, receiver in pairs}
    streams = [n for n in readers if n.kind.startswith("resid") and n.name != "logits"]
    if streams and len(readers) > 1:
        raise InputError(
            f"patching edges into {streams[0].name} and others at once: everything behind the "
            "residual stream reads it already. Give it a set of its own."
        )
    parts = {"attn": "head", "mlp": "neuron"}
    writers = {sender for sender, _ in pairs}
    for sender in writers:
        if any((n.kind, n.layer) == (parts.get(sender.kind), sender.layer) for n in writers):
            raise InputError(
                f"patching edges from {sender.name} and from parts of it at once: their messages "
                "would count twice. Name the whole or its parts."
            )


def relayed(relay: Node) -> list[str]:
    """Points whose base values say what a relay writes more."""
    if relay.kind == "mlp":
        return [f"{relay.block}.mlp.hook_post"]
    return [f"{relay.block}.attn.hook_z", f"{relay.block}.hook_resid_pre"]


def sending_point(sender: Node) -> str:
    """Where a sender's activation is read."""
    return ".".join(filter(None, (sender.block, SENDER_POINTS[sender.kind])))


def _point_read(receiver: Node) -> str:
    site = receiver.kind if receiver.kind.startswith("resid") else "resid_pre"
    site = "resid_mid" if receiver.kind == "mlp" else site
    return f"{receiver.block}.hook_{site}"


def _see(seen: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    seen[name] = value
    return value


def _add(delta: Callable[[], Tensor], value: Tensor) -> Tensor:
    return value + delta()


def _replace(new: Callable[[], Tensor], value: Tensor) -> Tensor:
    return new()


def _write_head(new: Callable[[], Tensor], head: int, value: Tensor) -> Tensor:
    out = value.clone()
    out[:, head] = new()[:, head]
    return out


def _receive(receiver: Node, positions: list[int], value: Callable[[], Tensor]) -> Edit:
    """The edit that makes a receiver act on another input."""
    if receiver.kind == "mlp":
        return Edit("post", receiver.layer, positions, partial(_replace, value))
    assert receiver.unit is not None
    site: Any = receiver.kind
    return Edit(site, receiver.layer, positions, partial(_write_head, value, receiver.unit))
