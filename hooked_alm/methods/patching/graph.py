"""Edges between nodes of the residual graph, as edits of a sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...engine.cells import Edits, Indices, Looks, Marks
from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import Site, hook_name
from .alignment import AlignPolicies, Place
from .choice import place_ticks
from .edges import Column, Edges, EdgeSets, Hearings, alike
from .measurement import Measurement
from .messages import NO_SET, Looked, Messages
from .metrics import Metric, OnLogits
from .nodes import Receiver
from .options import ExactOptions, NormMode, PathMode
from .placement import Placement, Spots
from .results import PatchResult

EdgeFlags = Bool[np.ndarray, " edge"]


class _Where(TypedDict):
    """Cells and positions of marks."""

    cells: Indices
    positions: Indices


class Graph:
    """The runs of base and donor, and the edits that patch edges between their nodes.

    Cells are sets at places: ``set * n_places + place``.
    """

    def __init__(
        self,
        model: HookedALM,
        base: ALMInput,
        donor: ALMInput,
        metric: Metric | OnLogits,
        edges: EdgeSets,
        places: Sequence[Place],
        options: ExactOptions,
        *,
        norm: NormMode = "exact",
        mode: PathMode = "edge",
        placed: Sequence[Receiver] | None = None,
        also_keep: Sequence[str] = (),
    ) -> None:
        """Run both, keeping what the edges read and write.

        Args:
            model: to run.
            base: prompts to be patched.
            donor: as many prompts as ``base``.
            metric: what is read off each run.
            edges: sets, each patched in a run of its own.
            places: where messages are read.
            options: policy, engine and max_bytes of the sweep.
            norm: see ``path_patch``.
            mode: see ``path_patch``.
            placed: receivers that the places are about; None is all of them.
            also_keep: further points of the base.

        Raises:
            InputError: places of a memory and of prompts at once.
        """
        edges.check()
        self.mode, self.edges = mode, edges
        heard = edges.receivers if placed is None else placed
        of_memory = {receiver.is_of_memory for receiver in heard}
        if len(of_memory) > 1:
            raise InputError(
                "patching edges into keys and values of cross-attention and into others at once: "
                "their places are rows of the encoder. Patch them in two calls."
            )
        # Rows of a memory are the encoder's.
        where = model.towards("encoder") if True in of_memory else model
        self.placement = Placement(where, base, donor, places, options["policy"])
        written = {sender.activation for sender in edges.senders}
        read = {receiver.stream for receiver in edges.receivers}
        is_outside = any(sender.is_before_path for sender in edges.senders)
        if is_outside:
            read |= {hook_name("resid_post", model.towards("encoder").path[-1])}
        if mode == "ioi":
            # Heads are frozen: the stream is put together of the base's attention outputs.
            crossed = ["cross_attn_out"] if model.path_cfg.cross_attention else []
            kept = ("attn_out", "resid_pre", *crossed)
            read |= {hook_name(at, b) for at in kept for b in model.path}
        self.measured = Measurement(
            model, base, donor, metric, engine=options["engine"], max_bytes=options["max_bytes"],
            keep=sorted({*written, *read, *also_keep}), keep_of_donor=sorted(written),
        )  # fmt: skip
        outside = None
        if is_outside:
            outside = _rows_outside(model.towards("encoder"), base, donor, options["policy"])
        self.messages = Messages(model, self.placement, self.measured, norm, outside)

    def answer(self, axes: Mapping[str, tuple[Any, ...]], **about: Any) -> PatchResult:
        """Measure every set at every place."""
        n_places = len(self.placement.places)
        found, noise = self.measured.swept(self.edges.n_sets * n_places, self.marks(self.edges))
        if "receiver" in axes:
            # No edge is left where the receiver comes first: that is no cell, not an effect of 0.
            found[np.repeat(self.edges.is_empty, n_places)] = torch.nan
        every = {**axes, "place": place_ticks(self.placement.places)}
        return self.measured.result(
            every, found, noise, length_ratios=self.placement.length_ratios, **about
        )

    def marks(self, edges: EdgeSets) -> list[Marks]:
        """Edits that give receivers their messages, everything else recomputed, with their looks.

        Receivers of one kind in one block are edited together.
        """
        looks = {} if self.mode == "ioi" else self._looks(edges)
        marks: list[Marks] = [one.looks for one in looks.values()]
        units = np.array([0 if node.unit is None else node.unit for node in edges.receivers], int)
        n_senders, n_receivers = len(edges.senders), len(edges.receivers)
        # In ``ioi`` every receiver of a set hears all of its senders.
        of_sets = Hearings.of_owners(n_senders, edges.owner, edges.sender, edges.n_sets)
        for nodes in alike(edges.receivers, lambda node: (node.layer, node.kind)):
            mine = np.isin(edges.receiver, nodes)
            heard = edges.owner[mine] * n_receivers + edges.receiver[mine]
            pairs, pair = np.unique(heard, return_inverse=True)
            if not len(pairs):
                continue
            sets, readers = np.divmod(pairs, n_receivers)
            first = edges.receivers[nodes[0]]
            if self.mode == "ioi":
                hearings, depends = of_sets.rows(sets), np.full(len(sets), NO_SET)
            else:
                hearings = Hearings.of_owners(n_senders, pair, edges.sender[mine], len(pairs))
                # Up to its first reading a set's run is the base run; a memory always is.
                is_late = (edges.reads[readers] > edges.first[sets]) & (not first.is_of_memory)
                depends = np.where(is_late, sets, NO_SET)
            unit = None if first.unit is None else np.repeat(units[readers], self.messages.n_spots)
            marks.append(Edits(
                site=first.site, layer=first.layer, units=unit, **self._everywhere(sets),
                write=_Receive(self, first, hearings, depends, unit, edges, looks),
            ))  # fmt: skip
        return marks

    def _everywhere(self, sets: Int[np.ndarray, " set"]) -> _Where:
        """Cells and positions of some sets at every spot, one set after the other."""
        per_set = len(self.placement.places) * len(self.placement.base)
        spots = self.placement.spots
        first = np.repeat(sets * per_set, self.messages.n_spots)
        cells, positions = (np.tile(part, len(sets)) for part in (spots.cells, spots.positions))
        return {"cells": first + cells, "positions": positions}

    def _looks(self, edges: EdgeSets) -> dict[str, Looked]:
        """Looks by hook name: at what senders write and receivers read behind a first receiver."""
        first = edges.first[edges.owner]
        is_node = np.array(
            [not (node.is_stream or node.is_of_memory) for node in edges.receivers], bool
        )
        wanted: dict[tuple[str, Site, int], list[int]] = {}

        def want(
            point: Callable[[int], tuple[str, Site, int]], ends: Edges, late: EdgeFlags
        ) -> None:
            seen = np.unique(ends[late] * edges.n_sets + edges.owner[late])
            for node, one in zip(
                *(part.tolist() for part in np.divmod(seen, edges.n_sets)), strict=True
            ):
                wanted.setdefault(point(node), []).append(one)

        def written(node: int) -> tuple[str, Site, int]:
            sender = edges.senders[node]
            return sender.activation, sender.site, sender.layer

        def read(node: int) -> tuple[str, Site, int]:
            receiver = edges.receivers[node]
            return receiver.stream, receiver.stream_site, receiver.layer

        # What the encoder writes is the base's, whatever is patched behind it.
        want(written, edges.sender, edges.writes[edges.sender] >= first)
        is_late = (edges.reads[edges.receiver] > first) & is_node[edges.receiver]
        want(read, edges.receiver, is_late)
        looked = {}
        for (name, site, layer), sets in wanted.items():
            unique = np.unique(sets)
            looks = Looks(site=site, layer=layer, **self._everywhere(unique))
            looked[name] = Looked(looks, unique, self.messages.n_spots)
        return looked


def _rows_outside(
    encoder: HookedALM, base: ALMInput, donor: ALMInput, policy: AlignPolicies
) -> Spots:
    """All rows of the encoder, aligned clip by clip; what pads them as far as both have it."""
    ours, theirs = (encoder.positions_of(x).spans["padding"] for x in (base, donor))
    is_padded = any(map(any, ours)) and [*map(bool, ours)] == [*map(bool, theirs)]
    of_audio = policy if isinstance(policy, str) else policy.get("audio", "error")
    every = ("audio", "padding") if is_padded else "audio"
    by_span: AlignPolicies = {"audio": of_audio, "padding": "truncate"}
    return Placement(encoder, base, donor, [every], by_span).spots


@dataclass(frozen=True, eq=False)
class _Receive:
    """What receivers of one kind in one block do with their messages, as a rule.

    An entry is a set, one of its receivers and a spot, the spots fastest. What the same senders
    tell is computed once for all who hear it.
    """

    graph: Graph
    receiver: Receiver
    """Any of them."""
    heard: Hearings
    """By set and receiver."""
    depends: Column
    """The set, if its run is not the base run any more where it is read, or ``NO_SET``."""
    units: Indices | None
    edges: EdgeSets
    looks: Mapping[str, Looked]

    def __call__(self, own: Tensor, entries: Indices) -> Tensor:
        """New values of some entries."""
        messages, receiver = self.graph.messages, self.receiver
        n_spots, n_sets = messages.n_spots, self.edges.n_sets + 1
        pair, spot = np.divmod(entries, n_spots)
        # One row for whatever hears the same, in the same run, at the same spot.
        codes = (self.heard.which[pair] * n_sets + self.depends[pair] + 1) * n_spots + spot
        codes, first, row = np.unique(codes, return_index=True, return_inverse=True)
        heard, sets, spots = self.heard.rows(pair[first]), self.depends[pair[first]], spot[first]
        at = on_device(row, own)
        if self.graph.mode == "ioi":
            stream = messages.reached(self.edges, heard, spots, receiver.reads).to(own.device)
            if receiver.is_stream:
                return stream[at]
            base = None
        else:
            delta = messages.delta(self.edges, heard, sets, spots, self.looks)
            if receiver.is_stream:
                # Added to whatever the stream holds by then.
                return own + delta.to(own.device)[at]
            base = messages.spots.of_base(messages.kept[receiver.stream], spots)
            if (is_late := sets != NO_SET).any():
                seen = self.looks[receiver.stream].at(sets[is_late], spots[is_late])
                base = base.index_copy(0, on_device(is_late.nonzero()[0], base), seen)
            stream = base + delta.to(base.device)
        values = messages.of_stream(receiver, stream, base)
        if self.units is None:
            return values[at]
        return values[at, on_device(self.units[entries], own)]
