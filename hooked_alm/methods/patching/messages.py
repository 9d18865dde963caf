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

from ...components.block import Block
from ...engine.cells import Looks
from ...engine.record import on_device
from ...model import HookedALM
from ...points import ENCODER, hook_name
from .edges import Column, EdgeSets, Hearings
from .measurement import HEARD_BYTES, Measurement, heard_as
from .nodes import Receiver, Sender
from .options import NormMode
from .placement import Chosen, Placement, Spots

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
        self,
        model: HookedALM,
        placement: Placement,
        measured: Measurement,
        norm: NormMode,
        outside: Spots | None = None,
    ) -> None:
        """Take runs that kept what senders write and receivers read.

        ``outside`` are the encoder's rows, where senders are in there and the path is not.
        """
        self.outside = outside
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
        is_outside = np.array([sender.is_before_path for sender in edges.senders], bool)
        if (heard.members & is_outside).any():
            what = heard.members.tobytes(), heard.which.tobytes(), spots.tobytes()
            through = partial(self._through_encoder, edges, heard.only(is_outside), spots)
            total = total + self._messages.of((edges, *what), through)
            heard = heard.only(~is_outside)
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
            make = partial(self._written, self.spots, senders, mine, spot, is_late, ours)
            units, asked = tuple(s.unit for s in senders), (here, mine.which, spot)
            key = point, units, *(part.tobytes() for part in asked)
            found = self._messages.of(key, make) if ours is None else make()
            total.index_add_(0, on_device(rows, total), found.to(total.device))
        return total

    def zeros(self, n_rows: int) -> Stream:
        """Streams that hold nothing yet."""
        is_inside = self.model.part is not None
        like = next(v for name, v in self.kept.items() if name.startswith(ENCODER) == is_inside)
        return like.new_zeros(n_rows, self.model.path_cfg.d_model)

    def _through_encoder(self, edges: EdgeSets, heard: Hearings, spots: Chosen) -> Stream:
        """What the decoder reads otherwise for messages of senders in the encoder.

        These are added to the encoder's last stream at all of its rows; the final norm, projector
        and merge are run on the sum. With cross-attention, it is the memory that changes.
        """
        measured, at = self.measured, self.outside
        assert at is not None
        assert measured.encoder_rows is not None
        end = hook_name("resid_post", self.model.towards("encoder").path[-1])
        rows = self.spots.rows[spots]
        found = self.zeros(len(spots))
        for row in np.unique(rows).tolist():
            here = np.flatnonzero(rows == row)
            hearings, hearing = np.unique(heard.which[here], return_inverse=True)
            mine = np.flatnonzero(at.rows == row)
            runs = measured.encoder_rows.prompts.is_real[row].nonzero()[0]
            if not len(runs):
                continue  # a prompt without a clip hears nothing of it
            base = self.kept[end][row][on_device(runs, self.kept[end])]
            # Rows that no donor's were aligned with send no message.
            place = np.searchsorted(runs, at.positions[mine])
            n_at_once = max(HEARD_BYTES // base.nbytes, 1)
            for start in range(0, len(hearings), n_at_once):
                some = hearings[start : start + n_at_once]
                which, spot = np.repeat(some, len(mine)), np.tile(mine, len(some))
                target = (np.arange(len(some))[:, None] * len(runs) + place).ravel()
                total = base.repeat(len(some), 1)
                for nodes in edges.points:
                    members = heard.members[:, nodes]
                    told = np.flatnonzero(np.any(members, axis=1, keepdims=True)[which, 0])
                    if len(told):
                        part = Hearings(members, which[told])
                        senders = [edges.senders[i] for i in nodes]
                        sent = self._written(at, senders, part, spot[told], np.zeros(0, int), None)
                        told_to = on_device(target[told], total)
                        total = total.index_add(0, told_to, sent.to(total.device))
                # The base runs beside them: where nothing is told, nothing changes by rounding.
                streams = torch.cat([base[None], total.unflatten(0, (len(some), -1))])
                entering = heard_as(self.model, measured.base, measured.encoder_rows, row, streams)
                change = entering[1:] - entering[:1]
                there = np.flatnonzero((hearing >= start) & (hearing < start + len(some)))
                positions = self.spots.positions[spots[here[there]]]
                found[on_device(here[there], found)] = change[
                    on_device(hearing[there] - start, change), on_device(positions, change)
                ].to(found)
        return found

    def _written(
        self, at: Spots, senders: Sequence[Sender], heard: Hearings, spots: Chosen,
        is_late: Int[np.ndarray, " late"], ours: Tensor | None,
    ) -> Stream:  # fmt: skip
        """Messages of senders of one hook point, summed by row: all of them in one product."""
        runs, first = self.measured.donor_runs, senders[0]
        assert runs is not None
        base = at.of_base(self.kept[first.activation], spots)
        if ours is not None:
            base = base.index_copy(0, on_device(is_late, base), ours)
        change = at.of_donor(runs.kept[first.activation], spots) - base
        if first.unit is None:
            return change
        block = cast(Block, self.model.get_submodule(first.block))
        weight = block.mlp.W_out
        if first.kind != "neuron":
            attn = block.cross_attn if first.kind == "cross_head" else block.attn
            weight = attn.W_O.flatten(0, 1)
        sends = np.zeros((len(heard.members), change.shape[1]), bool)
        sends[:, np.array([sender.unit for sender in senders], int)] = heard.members
        mask = on_device(sends, change)[on_device(heard.which, change)]
        change = change * mask.reshape(*mask.shape, *[1] * (change.ndim - 2))
        return change.flatten(1) @ weight.to(change.dtype)

    def reached(self, edges: EdgeSets, heard: Hearings, spots: Chosen, reads: int) -> Stream:
        """Streams at a reading place, heads frozen, MLPs recomputed (``ioi``).

        Place ``3 b`` is before block b, ``3 b + 1`` behind its attention, ``3 b + 2`` before its
        MLP.
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
            told = self.delta(edges, some, nobody, spots[: len(stream)], {})
            return stream + told.to(stream.device)

        for layer in range(n_layers):
            block, name = self.model.block(layer), self.model.path[layer]
            # Up to its first sender a row is the base run.
            begins = spots[first == layer]
            base = self.spots.of_base(self.kept[hook_name("resid_pre", name)], begins)
            stream = torch.cat([stream.to(base.device), base])
            if not len(stream):
                continue
            found[3 * layer] = stream = with_messages(sent(("embed",), layer))
            here = spots[: len(stream)]
            stream = stream + self.spots.of_base(self.kept[hook_name("attn_out", name)], here)
            found[3 * layer + 1] = stream = with_messages(sent(("head", "attn"), layer))
            if block.cfg.cross_attention:
                read = self.kept[hook_name("cross_attn_out", name)]
                stream = stream + self.spots.of_base(read, here)
                stream = with_messages(sent(("cross_head", "cross_attn"), layer))
            found[3 * layer + 2] = stream
            if 3 * layer + 2 >= max(wanted):
                break
            normed = block.mlp_norm.affine(block.mlp_norm.normalize(stream))
            written = block.mlp.written(block.mlp.neurons(normed[None])[0])
            # An MLP that sends does not listen: it writes what the donor's wrote.
            mlps = sent(("mlp",), layer)
            sends = np.any(mlps.members, axis=1, keepdims=True)[mlps.which, 0]
            if sends.any():
                theirs = self.spots.of_donor(runs.kept[hook_name("mlp_out", name)], here)
                written = torch.where(on_device(sends, stream)[:, None], theirs, written)
            stream = stream + written
        found[3 * n_layers] = stream
        return np.argsort(order), {at: one for at, one in found.items() if at in wanted}

    def of_stream(self, receiver: Receiver, stream: Stream, base: Stream | None = None) -> Tensor:
        """q, k or v ``[row, head, d_head]``, or the MLP's neurons, read off a stream."""
        block, kind = self.model.block(receiver.layer), receiver.kind
        crosses = kind.startswith("cross")
        part = cast(Literal["q", "k", "v"], kind.removeprefix("cross_"))
        if receiver.is_of_memory:  # as it is: the encoder has normed it
            return block.cross_attn.project(part, stream[None])[0]
        ln = block.mlp_norm if kind == "mlp" else block.ln2 if crosses else block.ln1
        if self.norm == "frozen":
            # As ``normalize`` does it, with the base's scale.
            assert base is not None
            normed = ln.affine(ln.divided(stream, ln.scale(base)))
        else:
            normed = ln.affine(ln.normalize(stream))
        if kind == "mlp":
            return block.mlp.neurons(normed[None])[0]
        return (block.cross_attn if crosses else block.attn).project(part, normed[None])[0]
