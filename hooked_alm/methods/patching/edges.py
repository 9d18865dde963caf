"""Edges between nodes, in sets that are patched at once, as columns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Int

from ...errors import InputError
from .nodes import Receiver, Sender

NodePair = tuple[Sender, Receiver]
Edges = Int[np.ndarray, " edge"]
Column = Int[np.ndarray, " row"]
Node = TypeVar("Node")


@dataclass(frozen=True, eq=False)
class EdgeSets:
    """Edges of several sets, each edge once in a set."""

    senders: list[Sender]
    receivers: list[Receiver]
    n_sets: int
    owner: Edges
    """Set of every edge."""
    sender: Edges
    receiver: Edges

    @classmethod
    def of_pairs(cls, sets: Sequence[Sequence[NodePair]]) -> "EdgeSets":
        """The edges of sets that are written out."""
        senders = list(dict.fromkeys(s for pairs in sets for s, _ in pairs))
        receivers = list(dict.fromkeys(r for pairs in sets for _, r in pairs))
        at_sender = {node: i for i, node in enumerate(senders)}
        at_receiver = {node: i for i, node in enumerate(receivers)}
        codes = [
            (i, at_sender[s], at_receiver[r]) for i, pairs in enumerate(sets) for s, r in pairs
        ]
        # An edge that was named twice sends its message once.
        columns = np.unique(np.array(codes, int).reshape(-1, 3), axis=0).T
        return cls(senders, receivers, len(sets), *columns)

    @classmethod
    def between(
        cls, from_sets: Sequence[Sequence[Sender]], to_sets: Sequence[Sequence[Receiver]]
    ) -> "EdgeSets":
        """Edges of every product of sets, the first ones slowest; none runs against the stream."""
        senders = list(dict.fromkeys(node for one in from_sets for node in one))
        receivers = list(dict.fromkeys(node for one in to_sets for node in one))
        (of, s), (to, r) = _columns(from_sets, senders), _columns(to_sets, receivers)
        writes = np.array([node.writes for node in senders], int)
        reads = np.array([node.reads for node in receivers], int)
        is_heard = np.array([node.is_heard_as_memory for node in senders], bool)
        of_memory = np.array([node.is_of_memory for node in receivers], bool)
        # See ``tells``.
        i, j = np.nonzero((writes[s][:, None] < reads[r]) & (is_heard[s][:, None] == of_memory[r]))
        return cls(senders, receivers, len(from_sets) * len(to_sets),
                   of[i] * len(to_sets) + to[j], s[i], r[j])  # fmt: skip

    @cached_property
    def points(self) -> list[list[int]]:
        """Senders of every hook point."""
        return alike(self.senders, lambda node: node.activation)

    @cached_property
    def writes(self) -> Int[np.ndarray, " sender"]:
        """Place of every sender among the writes to the stream."""
        return np.array([node.writes for node in self.senders], int)

    @cached_property
    def reads(self) -> Int[np.ndarray, " receiver"]:
        """Place among the writes of what every receiver reads."""
        return np.array([node.reads for node in self.receivers], int)

    @cached_property
    def first(self) -> Int[np.ndarray, " set"]:
        """The first reading of each set: up to there, its run is the base run."""
        found = np.full(self.n_sets, np.iinfo(int).max)
        np.minimum.at(found, self.owner, self.reads[self.receiver])
        return found

    @cached_property
    def is_empty(self) -> Bool[np.ndarray, " set"]:
        """Whether a set has no edge at all."""
        return np.bincount(self.owner, minlength=self.n_sets) == 0

    def check(self) -> None:
        """Refuse edges that cannot be patched at once, because one holds another.

        Raises:
            InputError: the residual stream beside what reads it, or attention and MLPs beside their
                heads and neurons.
        """
        heard = np.unique(self.owner * len(self.receivers) + self.receiver)
        owner, receiver = np.divmod(heard, max(len(self.receivers), 1))
        crowded = np.bincount(owner, minlength=self.n_sets)[owner] > 1
        for at in np.unique(receiver[crowded]):
            node = self.receivers[at]
            if node.is_stream and not node.is_end:
                raise InputError(
                    f"patching edges into {node.name} and others at once: everything behind the "
                    "residual stream reads it already. Give it a set of its own."
                )
        whole = {"attn": "attn", "head": "attn", "cross_attn": "cross_attn",
                 "cross_head": "cross_attn", "mlp": "mlp", "neuron": "mlp"}  # fmt: skip
        by_part: dict[tuple[int, str], list[int]] = {}
        for i, sender in enumerate(self.senders):
            by_part.setdefault((sender.layer, whole.get(sender.kind, "embed")), []).append(i)
        for members in by_part.values():
            wholes = [i for i in members if self.senders[i].unit is None]
            if not wholes or len(wholes) == len(members):
                continue
            parts = [i for i in members if self.senders[i].unit is not None]
            for i in wholes:
                mine, theirs = self.owner[self.sender == i], self.owner[np.isin(self.sender, parts)]
                if np.isin(mine, theirs).any():
                    raise InputError(
                        f"patching edges from {self.senders[i].name} and from parts of it at once: "
                        "their messages would count twice. Name the whole or its parts."
                    )


def _columns(sets: Sequence[Sequence[object]], nodes: Sequence[object]) -> tuple[Edges, Edges]:
    """Set and node of every member."""
    place = {node: i for i, node in enumerate(nodes)}
    members = [sorted({place[node] for node in one}) for one in sets]
    owner = np.repeat(np.arange(len(sets)), [len(one) for one in members])
    return owner, np.array([i for one in members for i in one], int)


class Hearings(NamedTuple):
    """Senders that are heard together, and by which rows."""

    members: Bool[np.ndarray, "hearing sender"]
    which: Column
    """Hearing of every row."""

    @classmethod
    def of_owners(cls, n_senders: int, owner: Column, sender: Column, n: int) -> "Hearings":
        """What ``n`` owners hear, of which equals are one, from pairs of owner and sender."""
        codes = np.unique(owner * n_senders + sender)
        owners, senders = np.divmod(codes, n_senders)
        ends = np.searchsorted(owners, np.arange(n), side="right").tolist()
        data, size = senders.tobytes(), senders.itemsize
        known: dict[bytes, int] = {}
        which, start = np.zeros(n, int), 0
        for i, end in enumerate(ends):
            which[i] = known.setdefault(data[start * size : end * size], len(known))
            start = end
        members = np.zeros((len(known), n_senders), bool)
        for row, one in zip(members, known, strict=True):
            row[np.frombuffer(one, senders.dtype)] = True
        return cls(members, which)

    def rows(self, chosen: Int[np.ndarray, " chosen"]) -> "Hearings":
        """The same for some of the rows, or one row several times."""
        return self._replace(which=self.which[chosen])

    def only(self, senders: Bool[np.ndarray, " sender"]) -> "Hearings":
        """What is heard of some senders."""
        return self._replace(members=self.members & senders)


def alike(nodes: Sequence[Node], kind: Callable[[Node], Any]) -> list[list[int]]:
    """Indices of nodes by what kind they are of, in the order of the kinds."""
    order = sorted(range(len(nodes)), key=lambda i: kind(nodes[i]))
    return [list(some) for _, some in groupby(order, key=lambda i: kind(nodes[i]))]
