"""Chains of more than two nodes, of which each hears only the one before it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.cells import Edits, Given, Looks
from ...engine.record import on_device
from ...points import Site, hook_name
from ...stacks import ranges_of, rows_in
from .edges import Column, EdgeSets, Hearings, alike
from .messages import NO_SET, Messages, Stream
from .nodes import Receiver, Sender
from .placement import Chosen

Chain = tuple[Sender, Sequence[Receiver]]


class Told(NamedTuple):
    """What chains have to tell, at which positions."""

    chains: Column
    rows: Column
    positions: Column
    stream: Stream

    def cells(self, n_rows: int) -> Column:
        """Cells of the engine."""
        return self.chains * n_rows + self.rows

    def of(self, value: Float[Tensor, "batch pos *features"]) -> Tensor:
        """An activation where the message is heard."""
        return value[on_device(self.rows, value), on_device(self.positions, value)]

    def only(self, chosen: Chosen) -> "Told":
        """Some rows of it, without the stream."""
        return Told(self.chains[chosen], self.rows[chosen], self.positions[chosen], self.stream)


def chain_edits(messages: Messages, chains: Sequence[Chain]) -> list[Edits]:
    """Edits of the last receivers of chains, by the messages that reach them.

    Chains through the same kinds of nodes of the same blocks go together.
    """
    edits: list[Edits] = []
    if not messages.n_spots:
        return edits  # the place is a pad of every row
    for some in alike(chains, _kinds):
        each = np.arange(len(some))
        chain, spot = (
            np.repeat(each, messages.n_spots),
            np.tile(np.arange(messages.n_spots), len(some)),
        )
        spoken = EdgeSets.between([[chains[i][0] for i in some]], [])
        sender = np.array([spoken.senders.index(chains[i][0]) for i in some])
        heard = Hearings.of_owners(len(spoken.senders), each, sender, len(some)).rows(chain)
        stream = messages.delta(spoken, heard, np.full(len(chain), NO_SET), spot, {})
        rows, positions = messages.spots.rows[spot], messages.spots.positions[spot]
        message = Told(np.array(some)[chain], rows, positions, stream)
        *relays, last = (
            {i: chains[i][1][step] for i in some} for step in range(len(chains[some[0]][1]))
        )
        for those in relays:
            message = _passed_on(messages, those, message)
        edits.append(_received(messages, last, message))
    return edits


def _kinds(chain: Chain) -> list[tuple[int, str]]:
    sender, receivers = chain
    return [(sender.layer, sender.kind), *((one.layer, one.kind) for one in receivers)]


def _received(messages: Messages, receivers: Mapping[int, Receiver], message: Told) -> Edits:
    """The edit of receivers that hear a message over their base input."""
    first, units = next(iter(receivers.values())), None
    if first.is_stream:
        values, is_added = message.stream, True
    else:
        base = message.of(messages.kept[first.stream])
        stream = base + message.stream.to(base.device)
        values, is_added = messages.of_stream(first, stream), False
        if first.unit is not None:
            units = np.array([receivers[i].unit for i in message.chains.tolist()], int)
            at = torch.arange(len(units), device=values.device)
            values = values[at, on_device(units, values)]
    return Edits(
        site=first.site, layer=first.layer, units=units, write=Given(values, is_added),
        cells=message.cells(len(messages.placement.base)), positions=message.positions,
    )  # fmt: skip


def _passed_on(messages: Messages, relays: Mapping[int, Receiver], message: Told) -> Told:
    """What relays write on hearing a message over their base input, minus what the base's do."""
    edit, first = _received(messages, relays, message), next(iter(relays.values()))
    block = messages.model.block(first.layer)
    if first.kind == "mlp":
        # Row by row: the message goes on where it came.
        assert isinstance(edit.write, Given)
        before = message.of(messages.kept[hook_name("post", first.block)])
        # A difference, to which the projection's bias does not add.
        change = edit.write.values - before
        return message._replace(stream=change @ block.mlp.W_out.to(change.dtype))
    # Attention mixes rows: its block runs with this edit, and z shows what changed where.
    attn = block.cross_attn if first.kind.startswith("cross") else block.attn
    site: Site = "cross_attn.z" if first.kind.startswith("cross") else "z"
    is_query = first.kind in ("q", "cross_q")
    heard = message if is_query else _readers(messages, message, first)
    n_rows = len(messages.placement.base)
    looks = Looks(
        site=site, layer=first.layer, cells=heard.cells(n_rows), positions=heard.positions
    )
    # Query heads that one of the receivers serves.
    per_unit = 1 if is_query else messages.model.path_cfg.n_groups
    stream = messages.zeros(len(heard.chains))
    for cells in messages.measured.observed([edit, looks], first.layer):
        mine = np.flatnonzero(np.isin(looks.cells, cells))
        part = heard.only(mine)
        change = looks.at(mine) - part.of(messages.kept[hook_name(site, first.block)])
        own = np.array([relays[i].unit for i in part.chains.tolist()], int)
        touched = own[:, None] == np.arange(change.shape[1]) // per_unit
        change = change * on_device(touched, change)[..., None]
        there = on_device(mine, stream)
        written = change.flatten(1) @ attn.W_O.flatten(0, 1).to(change.dtype)
        stream[there] = written.to(stream.device)
    return heard._replace(stream=stream)


def _readers(messages: Messages, message: Told, relay: Receiver) -> Told:
    """The same chains at all positions that attend to where they are heard; no stream yet."""
    base, stack = messages.measured.base, messages.model.path_stacks[relay.layer]
    if relay.is_of_memory:  # every position does
        cells = np.unique(message.cells(len(base)))
        real = [base.is_real[cell % len(base)].nonzero()[0] for cell in cells]
        cells, positions = np.repeat(cells, [len(one) for one in real]), np.concatenate(real)
        chains, rows = np.divmod(cells, len(base))
        return Told(chains, rows, positions, message.stream[:0])
    if messages.model.part is not None:
        base = messages.placement.base
    cells, found = message.cells(len(base)), []
    known: dict[tuple[int, bytes], Column] = {}  # most chains are heard at the same positions
    for cell in np.unique(cells):
        row, heard = int(cell % len(base)), message.positions[cells == cell]
        if (row, heard.tobytes()) not in known:
            # Stacks count from the first real position, messages in the padded prompt.
            real = base.is_real[row].nonzero()[0]
            at = ranges_of(torch.from_numpy(heard - real[0]))
            places = rows_in(stack.reached(at, int(real[-1] - real[0]) + 1)).numpy()
            known[row, heard.tobytes()] = real[np.isin(real - real[0], places)]
        positions = known[row, heard.tobytes()]
        found.append((np.full(len(positions), cell), positions))
    cells, positions = (np.concatenate(column) for column in zip(*found, strict=True))
    chains, rows = np.divmod(cells, len(base))
    return Told(chains, rows, positions, message.stream[:0])


def relayed(relay: Receiver) -> list[str]:
    """Hook points whose base values are compared to find what a relay passes on."""
    kinds: dict[str, Site] = {"mlp": "post", "q": "z", "k": "z", "v": "z"}
    return [hook_name(kinds.get(relay.kind, "cross_attn.z"), relay.block)]
