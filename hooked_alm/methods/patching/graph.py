"""Messages between nodes of the residual graph, and the cells that patch them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.cells import Cell, Edit, Look, hooks_of
from ...errors import InputError
from ...hooks import HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name
from ...stacks import ranges_of, rows_in
from .alignment import Place
from .choice import place_ticks
from .measurement import Measurement
from .metrics import Metric, OnLogits
from .nodes import Receiver, Sender
from .options import ExactOptions, NormMode, PathMode
from .placement import Placement
from .results import PatchResult

Stream = Float[Tensor, "pos d_model"]
NodePair = tuple[Sender, Receiver]
Pairs = Sequence[NodePair]
"""Senders and receivers whose edges are patched at once."""
Kept = TypeVar("Kept")
CACHED_STREAM_BYTES = 2**29
"""Bytes of the streams of ``ioi`` that are kept, not computed again for every receiver."""


class Latest(Generic[Kept]):
    """A cache of the values that were made or asked for last, at most ``size`` of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.made: OrderedDict[Hashable, Kept] = OrderedDict()

    def of(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """The value of a key, made if it is not kept."""
        if key not in self.made:
            self.made[key] = make()
            if len(self.made) > self.size:
                self.made.popitem(last=False)
        self.made.move_to_end(key)
        return self.made[key]


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
        options: ExactOptions,
        *,
        norm: NormMode = "exact",
        mode: PathMode = "edge",
        also_keep: Sequence[str] = (),
    ) -> None:
        """Run both, keeping what the pairs read and write.

        Args:
            model: to run.
            base: prompts to be patched.
            donor: as many prompts as ``base``.
            metric: what is read off each run.
            pair_sets: each patched in a run of its own.
            places: where messages are read.
            options: policy, engine and max_bytes of the sweep.
            norm: see ``path_patch``.
            mode: see ``path_patch``.
            also_keep: further points of the base.
        """
        self.model, self.norm, self.mode = model, norm, mode
        for pairs in pair_sets:
            check_set(pairs)
        self.placement = Placement(model, base, donor, places, options["policy"])
        written = {sender.activation for pairs in pair_sets for sender, _ in pairs}
        read = {receiver.stream for pairs in pair_sets for _, receiver in pairs}
        if mode == "ioi":
            # Heads are frozen: the stream is put together of the base's attention outputs.
            read |= {"hook_embed"}
            read |= {hook_name(at, b) for at in ("attn_out", "resid_pre") for b in model.path}
        self.measured = Measurement(
            model, base, donor, metric, engine=options["engine"], max_bytes=options["max_bytes"],
            keep=sorted({*written, *read, *also_keep}), keep_of_donor=sorted(written),
        )  # fmt: skip
        self._messages: Latest[Stream] = Latest(512)
        self._received: Latest[Tensor] = Latest(8)
        # Bytes of one entry at most: all positions in fp32, before every attention and MLP.
        per_stream = base.shape[1] * model.cfg.d_model * 4 * 2 * len(model.path)
        self._streams: Latest[list[Stream]] = Latest(max(CACHED_STREAM_BYTES // per_stream, 1))

    def answer(
        self,
        axes: Mapping[str, tuple[Any, ...]],
        pair_sets: Sequence[Pairs],
        **about: Any,
    ) -> PatchResult:
        """Measure every set of pairs at every place."""
        places = self.placement.places
        cell = self.ioi_cell if self.mode == "ioi" else self.edge_cell
        cells = [
            [
                # A pair that was named twice sends its message once.
                cell(tuple(dict.fromkeys(pairs)), row, place)
                for row in range(len(self.placement.base))
            ]
            for pairs, place in product(pair_sets, range(len(places)))
        ]
        found = self.measured.values(cells)
        for i, (pairs, _) in enumerate(product(pair_sets, places)):
            # No pair is left where the receiver comes first: that is no edge, not an effect of 0.
            if not pairs and "receiver" in axes:
                found[i] = torch.nan
        every = {**axes, "place": place_ticks(places)}
        return self.measured.result(
            every, found, length_ratios=self.placement.length_ratios, **about
        )

    def base_rows(self, name: str, row: int, place: int) -> Tensor:
        """A base activation at a place, ``[pos, *features]``."""
        return self.measured.base_runs.kept[name][row, self.placement.positions(place, row)]

    def donor_rows(self, name: str, row: int, place: int) -> Tensor:
        """A donor activation aligned with a place of the base, ``[pos, *features]``."""
        runs = self.measured.donor_runs
        assert runs is not None
        return self.placement.alignments[place][row].donor_values(runs.kept[name][row])

    def written(self, sender: Sender, activation: Tensor) -> Stream:
        """Write of a sender to the stream, made of its activation ``[pos, *features]``."""
        if sender.unit is None:
            return activation
        block = self.model.block(sender.layer)
        if sender.kind == "head":
            return activation[:, sender.unit] @ block.attn.W_O[sender.unit]
        return activation[:, sender.unit, None] * block.mlp.W_out[sender.unit]

    def message(self, sender: Sender, row: int, place: int) -> Stream:
        """Message of a sender: its write in the donor run minus that in the base run."""

        def make() -> Stream:
            pair = (r(sender.activation, row, place) for r in (self.donor_rows, self.base_rows))
            theirs, ours = (self.written(sender, activation) for activation in pair)
            return theirs - ours

        return self._messages.of((sender, row, place), make)

    def edge_cell(self, pairs: tuple[NodePair, ...], row: int, place: int) -> Cell:
        """Edits that give each receiver its senders' messages, everything else recomputed.

        The first receivers read the base run. What later ones read, and what senders behind a
        receiver write, is taken from the run as it goes.
        """
        positions = self.placement.positions(place, row)
        if not pairs or not positions:
            return Cell(row, ())
        # Before this place the cell's run is the base run; behind it, nodes may have changed.
        first = min(receiver.reads for _, receiver in pairs)
        # What is seen of the run as it goes: senders' activations, and streams.
        looks = {
            sender.activation: Look(sender.site, sender.layer, positions)
            for sender, _ in pairs
            if sender.writes >= first
        }
        by_receiver: dict[Receiver, list[Sender]] = {}
        for sender, receiver in pairs:
            by_receiver.setdefault(receiver, []).append(sender)
        edits = []
        for receiver, those in by_receiver.items():
            online = {s: looks[s.activation] for s in those if s.writes >= first}
            # Called when the receiver's block runs: by then the looks below it have values.
            delta = partial(self._delta, tuple(those), online, row, place)
            if receiver.is_stream:
                # Added to whatever the stream holds by then.
                edits.append(Edit(receiver.site, receiver.layer, positions, partial(_add, delta)))
                continue
            # Unchanged so far: base plus messages, the same for all heads of a kind.
            if receiver.reads <= first:
                value = partial(self._first_received, tuple(those), receiver, row, place)
            else:
                at = receiver.stream
                if at not in looks:
                    looks[at] = Look(receiver.stream_site, receiver.layer, positions)
                value = partial(self._read, receiver, looks[at], delta)
            edits.append(_receive(receiver, positions, value))
        return Cell(row, tuple(edits), tuple(looks.values()))

    def _delta(
        self, those: tuple[Sender, ...], online: Mapping[Sender, Look], row: int, place: int
    ) -> Stream:
        """Sum of the senders' messages: donor minus base, or minus what this run has written."""
        total: Tensor | float = 0.0
        for sender in those:
            if sender in online:
                theirs = self.donor_rows(sender.activation, row, place)
                ours = online[sender].value
                total = total + (self.written(sender, theirs) - self.written(sender, ours))
            else:
                total = total + self.message(sender, row, place)
        assert isinstance(total, Tensor)
        return total

    def _first_received(
        self, those: tuple[Sender, ...], receiver: Receiver, row: int, place: int
    ) -> Tensor:
        """Activation of the first receivers of a kind under some messages, every head at once."""

        def make() -> Tensor:
            base = self.base_rows(receiver.stream, row, place)
            delta = self._delta(those, {}, row, place)
            return self._of_stream(receiver, base + delta, base)

        return self._received.of((those, receiver.layer, receiver.kind, row, place), make)

    def _read(self, receiver: Receiver, stream: Look, delta: Callable[[], Stream]) -> Tensor:
        """Activation of a later receiver: its stream, as this run has changed it, plus messages."""
        return self._of_stream(receiver, stream.value + delta(), None)

    def _of_stream(self, receiver: Receiver, stream: Stream, base: Stream | None) -> Tensor:
        """q, k or v ``[pos, head, d_head]``, or the MLP's neurons, read off a stream."""
        block, kind = self.model.block(receiver.layer), receiver.kind
        ln = block.ln2 if kind == "mlp" else block.ln1
        if self.norm == "frozen":
            # As ``normalize`` does it, with the base's scale.
            assert base is not None
            normed = (stream.float() / ln.scale(base)).to(stream.dtype) * ln.weight
        else:
            normed = ln.normalize(stream) * ln.weight
        if kind == "mlp":
            return block.mlp.neurons(normed[None])[0]
        return block.attn.project(cast(Literal["q", "k", "v"], kind), normed[None])[0]

    def chain_cell(self, sender: Sender, receivers: Sequence[Receiver], row: int) -> Cell:
        """Cell that edits the last receiver of a chain, by the message that reaches it."""
        positions = list(self.placement.positions(0, row))
        if not positions:
            return Cell(row, ())
        message = self.message(sender, row, 0)
        *relays, last = receivers
        for relay in relays:
            # Every relay hears the message over its base input, so that no other path is open.
            positions, message = self._passed_on(relay, row, positions, message)
        if last.is_stream:
            write = partial(_add, lambda: message)
            return Cell(row, (Edit(last.site, last.layer, positions, write),))
        stream = self.measured.base_runs.kept[last.stream][row, positions] + message
        value = self._of_stream(last, stream, None)
        return Cell(row, (_receive(last, positions, lambda: value),))

    def _passed_on(
        self, relay: Receiver, row: int, positions: list[int], message: Stream
    ) -> tuple[list[int], Float[Tensor, "passed d_model"]]:
        """Positions and message of a relay: its write on hearing a message minus the base's."""
        kept = self.measured.base_runs.kept
        new = self._of_stream(relay, kept[relay.stream][row][positions] + message, None)
        block = self.model.block(relay.layer)
        if relay.kind == "mlp":
            # Row by row: the message goes on where it came.
            before = kept[hook_name("post", relay.block)][row, positions]
            return positions, block.mlp.written(new - before)
        # Attention mixes rows: its block runs with this edit, and z shows what changed where.
        edit = _receive(relay, positions, lambda: new)
        x = self.placement.base[row]
        name = hook_name("z", relay.block)
        seen: dict[str, Tensor] = {}

        def see(value: Tensor, hook: HookPoint) -> None:
            seen[name] = value

        with self.model.hooks(
            fwd_hooks=[*hooks_of([Cell(0, (edit,))], self.model.path), (name, see)]
        ):
            self.model(
                kept[hook_name("resid_pre", relay.block)][row][None],
                start_at_layer=relay.layer,
                stop_at_layer=relay.layer + 1,
                inputs=x,
            )
        delta = seen[name][0] - kept[name][row]
        if relay.kind != "q":
            # Whoever attends to these positions hears the message. Stacks count real positions,
            # messages those of the padded prompt.
            real = x.attention_mask[0].bool().nonzero().flatten().cpu()
            heard = ranges_of(torch.searchsorted(real, torch.tensor(positions)))
            stack = self.model.path_stacks[relay.layer]
            positions = real[rows_in(stack.reached(heard, len(real)))].tolist()
        return positions, torch.einsum("phe,hed->pd", delta[positions], block.attn.W_O)

    def ioi_cell(self, pairs: tuple[NodePair, ...], row: int, place: int) -> Cell:
        """Cell whose receivers get what reaches them through MLPs alone, heads frozen."""
        positions = self.placement.positions(place, row)
        if not pairs or not positions:
            return Cell(row, ())
        those = tuple(dict.fromkeys(sender for sender, _ in pairs))
        edits = []
        for receiver in dict.fromkeys(receiver for _, receiver in pairs):
            reached = partial(self._reached, those, receiver, row, place)
            if receiver.is_stream:
                write = partial(_replace, reached)
                edits.append(Edit(receiver.site, receiver.layer, positions, write))
                continue

            def value(receiver: Receiver = receiver, reached: Any = reached) -> Tensor:
                return self._of_stream(receiver, reached(), None)

            edits.append(_receive(receiver, positions, value))
        return Cell(row, tuple(edits))

    def _reached(
        self, those: tuple[Sender, ...], receiver: Receiver, row: int, place: int
    ) -> Stream:
        """The stream that a receiver reads in ``ioi``."""
        streams = self._streams.of(
            (those, row, place), partial(self._frozen_streams, those, row, place)
        )
        return streams[receiver.reads]

    def _frozen_streams(self, those: tuple[Sender, ...], row: int, place: int) -> list[Stream]:
        """Streams at all places of reading: senders as in the donor, heads frozen, MLPs recomputed.

        Entry ``2 b`` is before block b, ``2 b + 1`` between its attention and its MLP.
        """
        first = min(sender.layer for sender in those)
        stream = self.base_rows(hook_name("resid_pre", self.model.path[first]), row, place)
        if any(sender.kind == "embed" for sender in those):
            stream = self.donor_rows("hook_embed", row, place)
        # No receiver reads before the first sender; these entries only keep the count.
        streams = [stream] * (2 * first + 1)
        for layer in range(first, len(self.model.path)):
            block, name = self.model.block(layer), self.model.path[layer]
            sent = [sender for sender in those if sender.layer == layer]
            stream = stream + self.base_rows(hook_name("attn_out", name), row, place)
            for sender in sent:
                if sender.kind in ("head", "attn"):
                    stream = stream + self.message(sender, row, place)
            streams.append(stream)
            # An MLP that sends does not listen: it writes what the donor's wrote.
            if mlp := next((sender for sender in sent if sender.kind == "mlp"), None):
                stream = stream + self.donor_rows(mlp.activation, row, place)
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
    streams = [one for one in readers if one.is_stream and one.name != "logits"]
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


def relayed(relay: Receiver) -> list[str]:
    """Hook points whose base values are compared to find what a relay passes on."""
    points = ("post",) if relay.kind == "mlp" else ("z", "resid_pre")
    return [hook_name(point, relay.block) for point in points]


def _add(delta: Callable[[], Tensor], value: Tensor) -> Tensor:
    return value + delta()


def _replace(new: Callable[[], Tensor], value: Tensor) -> Tensor:
    return new()


def _write_head(new: Callable[[], Tensor], head: int, value: Tensor) -> Tensor:
    # ``new`` has every head of the kind; only this one receives.
    out = value.clone()
    out[:, head] = new()[:, head]
    return out


def _receive(receiver: Receiver, positions: list[int], value: Callable[[], Tensor]) -> Edit:
    """The edit that makes a receiver act on another input."""
    write = partial(_replace, value)
    if receiver.unit is not None:
        write = partial(_write_head, value, receiver.unit)
    return Edit(receiver.site, receiver.layer, positions, write)
