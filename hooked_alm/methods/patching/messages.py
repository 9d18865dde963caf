"""What nodes of the residual graph tell each other: the donor's writes minus the base's."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...engine.cells import Looks
from ...engine.record import on_device
from ...model import HookedALM
from ...points import hook_name
from .edges import Column, EdgeSets, Hearings
from .measurement import Measurement
from .nodes import Receiver, Sender
from .options import NormMode
from .placement import Chosen, Placement

Stream = Float[Tensor, "row d_model"]
Kept = TypeVar("Kept")
NO_SET = -1
"""In place of a set: the run is the base run, whichever set is patched."""
CACHED_BYTES = 2**29
"""Bytes of messages, and of streams of ``ioi``, that are kept, not computed again for every
receiver."""


class Latest(Generic[Kept]):
    """A cache of the values that were made or asked for last, of so many bytes at most."""

    def __init__(self, max_bytes: int, size: Callable[[Kept], int]) -> None:
        self.left, self.size = max_bytes, size
        self.made: OrderedDict[Hashable, Kept] = OrderedDict()

    def of(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """The value of a key, made if it is not kept."""
        if key not in self.made:
            self.made[key] = make()
            self.left -= self.size(self.made[key])
            while self.left < 0 and len(self.made) > 1:
                self.left += self.size(self.made.popitem(last=False)[1])
        self.made.move_to_end(key)
        return self.made[key]


@dataclass(frozen=True, eq=False)
class Looked:
    """Looks at a point in some sets, at every spot."""

    looks: Looks
    sets: Int[np.ndarray, " set"]
    n_spots: int

    def at(self, sets: Column, spots: Column) -> Tensor:
        """Values ``[row, *features]`` in some sets, at a spot each."""
        return self.looks.at(np.searchsorted(self.sets, sets) * self.n_spots + spots)


class Messages:
    """The runs of base and donor, and messages between their nodes at every spot of the places."""

    def __init__(
        self, model: HookedALM, placement: Placement, measured: Measurement, norm: NormMode
    ) -> None:
        """Take runs that kept what senders write and receivers read."""
        self.model, self.placement, self.measured, self.norm = model, placement, measured, norm
        self.spots = placement.spots
        self.n_spots = len(self.spots.cells)
        self._messages: Latest[Stream] = Latest(CACHED_BYTES, lambda one: one.nbytes)
        self._streams: Latest[tuple[Column, dict[int, Tensor]]] = Latest(
            CACHED_BYTES, lambda some: sum(one.nbytes for one in some[1].values())
        )

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """Activations of the base by hook name."""
        return self.measured.base_runs.kept

    def delta(
        self, edges: EdgeSets, heard: Hearings, sets: Column, spots: Chosen,
        looks: Mapping[str, Looked],
    ) -> Stream:  # fmt: skip
        """Sums of messages: writes of senders in the donor run minus in the base run, or in ours.

        Args:
            edges: of the senders.
            heard: senders of every row.
            sets: sets in whose runs they are heard, or ``NO_SET``.
            spots: spot of every row.
            looks: activations of those runs.
        """
        total = self.zeros(len(spots))
        is_heard = np.bincount(heard.members.nonzero()[1], minlength=len(edges.senders)) > 0
        for nodes in edges.points:
            chosen = [i for i in nodes if is_heard[i]]
            here = heard.members[:, chosen]
            rows = np.flatnonzero(here[heard.which].any(axis=1))
            if not len(rows):
                continue
            point, spot = edges.senders[chosen[0]].activation, spots[rows]
            is_late = np.flatnonzero(sets[rows] != NO_SET)
            is_late = is_late[edges.writes[chosen[0]] >= edges.first[sets[rows[is_late]]]]
            senders, mine = [edges.senders[i] for i in chosen], Hearings(here, heard.which[rows])
            ours = looks[point].at(sets[rows[is_late]], spot[is_late]) if len(is_late) else None
            make = partial(self._written, senders, mine, spot, is_late, ours)
            units, asked = tuple(s.unit for s in senders), (here, mine.which, spot)
            key = point, units, *(part.tobytes() for part in asked)
            found = self._messages.of(key, make) if ours is None else make()
            total.index_add_(0, on_device(rows, total), found)
        return total

    def zeros(self, n_rows: int) -> Stream:
        """Streams that hold nothing yet."""
        example = self.measured.base_runs.records or None
        like = next(iter(self.kept.values())) if example is None else example[0].resid[0]
        return like.new_zeros(n_rows, self.model.cfg.d_model)

    def _written(
        self, senders: Sequence[Sender], heard: Hearings, spots: Chosen,
        is_late: Int[np.ndarray, " late"], ours: Tensor | None,
    ) -> Stream:  # fmt: skip
        """Messages of senders of one hook point, summed by row: all of them in one product."""
        runs, first = self.measured.donor_runs, senders[0]
        assert runs is not None
        base = self.spots.of_base(self.kept[first.activation], spots)
        if ours is not None:
            base = base.index_copy(0, on_device(is_late, base), ours)
        change = self.spots.of_donor(runs.kept[first.activation], spots) - base
        if first.unit is None:
            return change
        block = self.model.block(first.layer)
        weight = block.attn.W_O.flatten(0, 1) if first.kind == "head" else block.mlp.W_out
        sends = np.zeros((len(heard.members), change.shape[1]), bool)
        sends[:, np.array([sender.unit for sender in senders], int)] = heard.members
        mask = on_device(sends, change)[on_device(heard.which, change)]
        change = change * mask.reshape(*mask.shape, *[1] * (change.ndim - 2))
        return change.flatten(1) @ weight.to(change.dtype)

    def reached(self, edges: EdgeSets, heard: Hearings, spots: Chosen, reads: int) -> Stream:
        """Streams at a reading place, heads frozen, MLPs recomputed (``ioi``).

        Place ``2 b`` is before block b, ``2 b + 1`` between its attention and its MLP.
        """
        rows, wanted = np.arange(len(spots)), {int(one) for one in edges.reads}
        per_row = self.zeros(1).nbytes * len(wanted)
        if per_row * len(heard.members) * self.n_spots <= CACHED_BYTES:
            # For whoever will ask: most receivers ask for more senders than those below them.
            n = len(heard.members)
            rows = heard.which * self.n_spots + spots
            heard = heard._replace(which=np.repeat(np.arange(n), self.n_spots))
            spots = np.tile(np.arange(self.n_spots), n)
        key = edges, heard.members.tobytes(), heard.which.tobytes(), spots.tobytes()
        place, streams = self._streams.of(
            key, partial(self._frozen_streams, edges, heard, spots, wanted)
        )
        return streams[reads][on_device(place[rows], streams[reads])]

    def _frozen_streams(
        self, edges: EdgeSets, heard: Hearings, spots: Chosen, wanted: set[int]
    ) -> tuple[Column, dict[int, Tensor]]:
        """Place of every row in the streams, and these by reading place, rows that begin first."""
        runs, n_layers = self.measured.donor_runs, len(self.model.path)
        assert runs is not None
        layers = np.array([sender.layer for sender in edges.senders])
        first = np.where(heard.members, layers, n_layers).min(axis=1)[heard.which]
        order = np.argsort(first, kind="stable")
        heard, spots, first = heard.rows(order), spots[order], first[order]
        stream, found = self.zeros(0), dict[int, Tensor]()

        def sent(kinds: tuple[str, ...], layer: int) -> Hearings:
            some = np.array([s.kind in kinds and s.layer == layer for s in edges.senders])
            return heard.only(some).rows(np.arange(len(stream)))

        def with_messages(some: Hearings) -> Stream:
            if not some.members.any():
                return stream
            nobody = np.full(len(stream), NO_SET)
            return stream + self.delta(edges, some, nobody, spots[: len(stream)], {})

        for layer in range(n_layers):
            block, name = self.model.block(layer), self.model.path[layer]
            # Up to its first sender a row is the base run.
            begins = spots[first == layer]
            base = self.spots.of_base(self.kept[hook_name("resid_pre", name)], begins)
            stream = torch.cat([stream, base])
            if not len(stream):
                continue
            found[2 * layer] = stream = with_messages(sent(("embed",), layer))
            here = spots[: len(stream)]
            stream = stream + self.spots.of_base(self.kept[hook_name("attn_out", name)], here)
            found[2 * layer + 1] = stream = with_messages(sent(("head", "attn"), layer))
            if 2 * layer + 1 >= max(wanted):
                break
            normed = block.ln2.normalize(stream) * block.ln2.weight
            written = block.mlp.written(block.mlp.neurons(normed[None])[0])
            # An MLP that sends does not listen: it writes what the donor's wrote.
            mlps = sent(("mlp",), layer)
            sends = np.any(mlps.members, axis=1, keepdims=True)[mlps.which, 0]
            if sends.any():
                theirs = self.spots.of_donor(runs.kept[hook_name("mlp_out", name)], here)
                written = torch.where(on_device(sends, stream)[:, None], theirs, written)
            stream = stream + written
        found[2 * n_layers] = stream
        return np.argsort(order), {at: one for at, one in found.items() if at in wanted}

    def of_stream(self, receiver: Receiver, stream: Stream, base: Stream | None = None) -> Tensor:
        """q, k or v ``[row, head, d_head]``, or the MLP's neurons, read off a stream."""
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
