"""Edge attribution patching: what ``path_patch(mode="edge")`` would find, to first order.

The score of an edge is ``(a_u(donor) - a_u(base)) . dL/d input_v``, u the sender's message to the
stream and ``input_v`` the stream as one receiver reads it, before its norm. EAP takes the gradient
at the base, EAP-IG its mean over runs whose embeddings lie between donor and base. Sign: patched -
base, as ``path_patch`` has it.

No stream is ever copied per head: the gradient at a receiver's input is that at its q, k, v or
normalised MLP input, taken back through its weight and its norm.

Source: Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, product
from operator import attrgetter
from typing import Annotated, Any, Literal, Unpack, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...components.norm import LayerNorm, RMSNorm
from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name
from ..patching.alignment import Place
from ..patching.choice import per_query_head, place_ticks
from ..patching.edges import EdgeSets
from ..patching.graph import Graph
from ..patching.measurement import Measurement
from ..patching.metrics import Metric, OnLogits
from ..patching.nodes import Receiver, Sender, receivers, senders
from ..patching.options import HeadsOption, Option, PlacesOption, SharedOptions, takes
from ..patching.paths import Nodes, NodeT, node_sets, set_names
from ..patching.placement import Chosen, Placement
from .gradients import GradientRun, embeddings_of, gradient_runs
from .trust import Attribution, CheckOptions, attribution, score_table

EdgeMethod = Literal["eap", "eap-ig"]
Endpoint = Literal["base", "donor"]
CHUNK_BYTES = 2**28
"""Bytes of messages that are held at once."""


class EdgeAttributionOptions(SharedOptions, HeadsOption, PlacesOption, CheckOptions, total=False):
    """Options of ``attribute_edges``. EAP-IG needs prompts of one length, whatever the policy."""

    method: Annotated[EdgeMethod, Option("eap", '"eap" or "eap-ig".')]
    steps: Annotated[int, Option(5, 'm of EAP-IG; of no effect on "eap".')]
    endpoint: Annotated[
        Endpoint,
        Option(
            "base",
            'which end of the way from donor to base EAP-IG includes. "base" is the paper\'s, '
            'k = 1, ..., m in ``donor + k/m (base - donor)``; "donor" that of its published code, '
            'k = 0, ..., m - 1. With one step, "base" is EAP.',
        ),
    ]


@torch.inference_mode(mode=False)
@torch.no_grad()
@takes(EdgeAttributionOptions, places=("all",))
def attribute_edges(
    model: HookedALM,
    base: ALMInput,
    donor: ALMInput,
    metric: Metric | OnLogits,
    from_nodes: Nodes,
    to_nodes: Nodes,
    **options: Unpack[EdgeAttributionOptions],
) -> Attribution:
    """Approximate every cell of a ``path_patch`` in edge mode, and check some of them exactly.

    It costs a forward and a backward per step and value of the metric, whatever the number of
    edges. With "eap", a divergence from the base (``KL()``) is flat: all its scores are 0.

    Args:
        model: to run; its weights get no gradients.
        base: prompts that would be patched.
        donor: as many prompts, whose messages would be sent. EAP-IG also needs base and donor to be
            of one length, padding included, since whole prompts are interpolated.
        metric: differentiable.
        from_nodes: as in ``path_patch``; the score of a set is the sum over its pairs, and over the
            positions of a place.
        to_nodes: as in ``path_patch``; sets are summed over in the same way.

    Returns:
        Scores with the axes of ``path_patch``; NaN where the receiver comes before the sender.

    Raises:
        InputError: a node that is no such thing, places that do not align, an unknown method, a
            metric without a gradient, or prompts that cannot be interpolated.
    """
    method, steps, endpoint = options["method"], options["steps"], options["endpoint"]
    places = list(options["places"])
    if method not in get_args(EdgeMethod) or endpoint not in get_args(Endpoint) or steps < 1:
        raise InputError(
            f"attributing edges with method={method!r}, endpoint={endpoint!r}, steps={steps}: "
            "expected 'eap' or 'eap-ig', 'base' or 'donor', and at least one step."
        )
    model.refuse_encoder("attributing edges")
    model.refuse_cross_attention("attributing edges")
    with per_query_head(model, options["kv"] == "query"):
        from_sets = node_sets(model, from_nodes, senders)
        if any(node.is_before_path for one in from_sets for node in one):
            raise InputError(
                f"attributing edges from {from_nodes}: gradients are taken from the embeddings on, "
                "with the audio heard already. `path_patch` patches paths out of the encoder."
            )
        to_sets = node_sets(model, to_nodes, receivers)
        # Shares of the way from base to donor.
        shift = 0 if endpoint == "base" else 1
        ways = [0.0] if method == "eap" else [(k + shift) / steps for k in range(steps)]
        edges = _Edges(model, base, donor, metric, from_sets, to_sets, places, options)
        axes: dict[str, tuple[Any, ...]] = {
            "sender": set_names(from_sets), "receiver": set_names(to_sets),
            "place": place_ticks(places),
        }  # fmt: skip
        scores = edges.scores(ways, options["rows_at_once"])

        def exact(chosen: Sequence[int]) -> Tensor:
            sets, place = np.divmod(chosen, len(places))
            unique, which = np.unique(sets, return_inverse=True)
            pairs = [
                [(s, r) for s in from_sets[i] for r in to_sets[j] if s.writes < r.reads]
                for i, j in zip(*np.divmod(unique, len(to_sets)), strict=True)
            ]
            graph = Graph(
                model, base, donor, metric, EdgeSets.of_pairs(pairs), places,
                {"engine": "fast", "precision": "model", "policy": options["policy"],
                 "max_bytes": options["max_bytes"]},
            )  # fmt: skip
            cells = which * len(places) + place
            marks, n_cells = graph.marks(graph.edges), len(pairs) * len(places)
            return graph.measured.values(n_cells, marks, only=cells) - graph.measured.base_values

        return attribution(
            edges.measured,
            axes,
            scores,
            exact,
            engine=method,
            options=options,
            site="path",
            mode="edge",
            length_ratios=edges.placement.length_ratios,
        )


class _Edges:
    """The runs of base and donor, messages of senders, and gradients at receivers' inputs."""

    def __init__(
        self,
        model: HookedALM,
        base: ALMInput,
        donor: ALMInput,
        metric: Metric | OnLogits,
        from_sets: Sequence[tuple[Sender, ...]],
        to_sets: Sequence[tuple[Receiver, ...]],
        places: Sequence[Place],
        options: EdgeAttributionOptions,
    ) -> None:
        self.model, self.n_places = model, len(places)
        self.placement = Placement(model, base, donor, places, options["policy"])
        self.from_sets, self.to_sets = from_sets, to_sets
        # Senders in the order in which they write, so that whoever hears hears the first of them;
        # those of one hook point together, and so the receivers.
        self.senders = sorted(
            {s for one in from_sets for s in one}, key=lambda s: (s.writes, s.activation, s)
        )
        self.receivers = sorted(
            {r for one in to_sets for r in one}, key=lambda r: (r.reads, _receiving_point(r), r)
        )
        written = sorted({sender.activation for sender in self.senders})
        self.measured = Measurement(
            model, base, donor, metric, max_bytes=options["max_bytes"], keep=written,
            keep_of_donor=written,
        )  # fmt: skip
        self._weights: dict[str, Tensor] = {}

    def scores(
        self, ways: Sequence[float], rows_at_once: int | None
    ) -> Float[Tensor, "cell batch label"]:
        """Scores of every pair of sets and place, means over points of the way to the donor."""
        shape = len(self.from_sets), len(self.to_sets), self.n_places
        found = score_table(int(np.prod(shape)), self.measured)
        table = found.view(*shape, *found.shape[1:])
        runs_of_ways = zip(*(
            gradient_runs(
                self.measured, self._embeddings(way), self._needed(), rows_at_once=rows_at_once
            )
            for way in ways
        ), strict=True)  # fmt: skip
        for runs in runs_of_ways:
            for (at, row), place in product(enumerate(runs[0].rows), range(self.n_places)):
                matrix = self._matrix(runs, at, row, place)
                by_set = _summed(matrix, self.from_sets, self.senders)
                by_set = _summed(by_set.T, self.to_sets, self.receivers).T
                table[:, :, place, row, runs[0].label] = by_set
        # A set without an edge: all of its receivers come before all of its senders.
        never = np.iinfo(int).max
        writes = np.array([min((s.writes for s in one), default=never) for one in self.from_sets])
        reads = np.array([max((r.reads for r in one), default=-1) for one in self.to_sets])
        table[on_device(writes[:, None] >= reads, table)] = torch.nan
        return found

    def _embeddings(self, way: float) -> Float[Tensor, "batch pos d_model"]:
        """Embeddings at some share of the way from the base's to the donor's."""
        base, donor, runs = self.measured.base, self.measured.donor, self.measured.donor_runs
        assert donor is not None
        assert runs is not None
        ours = embeddings_of(self.measured.base_runs, base)
        if not way:
            return ours
        is_same = base.shape == donor.shape and all(
            torch.equal(getattr(base, name), getattr(donor, name))
            for name in ("attention_mask", "position_ids")
        )
        if not is_same:
            raise InputError(
                f"interpolating from the donor to the base: prompts of {tuple(donor.shape)} and "
                f"{tuple(base.shape)} positions, or padded differently. EAP-IG moves every "
                "position at once; use prompts of equal length, or method='eap'."
            )
        return ours + way * (embeddings_of(runs, donor) - ours)

    def _needed(self) -> list[str]:
        """Points whose gradients or values make up those at the receivers' inputs."""
        streams = [receiver.stream for receiver in self.receivers if not receiver.is_stream]
        return sorted({*streams, *map(_receiving_point, self.receivers)})

    def _matrix(
        self, runs: Sequence[GradientRun], at: int, row: int, place: int
    ) -> Float[Tensor, "sender receiver"]:
        """Scores of all pairs of nodes; 0 where the receiver comes first."""
        spots = np.flatnonzero(self.placement.spots.cells == place * len(self.measured.base) + row)
        total = self.measured.base_values.new_zeros(
            len(self.senders), len(self.receivers), dtype=torch.float64
        )
        writes = np.array([sender.writes for sender in self.senders])
        per_spot = 4 * self.model.cfg.d_model * len(self.senders)
        n = max(CHUNK_BYTES // per_spot, 1)
        for start in range(0, len(spots), n):
            part = spots[start : start + n]
            parts = [one.to(total.device) for one in self._messages(part)]
            messages = torch.cat(parts).flatten(1)
            first = 0
            for nodes, slopes in self._slopes(runs, at, part):
                n_heard = int(np.searchsorted(writes, nodes[0].reads))
                stop = first + len(nodes)
                heard = messages[:n_heard] @ slopes.flatten(1).T.to(total.device)
                total[:n_heard, first:stop] += heard
                first = stop
        return total

    def _messages(self, part: Chosen) -> Iterator[Float[Tensor, "sender pos d_model"]]:
        """Messages of senders, donor minus base, in order."""
        spots, runs = self.placement.spots, self.measured.donor_runs
        assert runs is not None
        for point, some in groupby(self.senders, attrgetter("activation")):
            nodes = list(some)
            theirs = spots.of_donor(runs.kept[point], part)
            change = (theirs - spots.of_base(self.measured.base_runs.kept[point], part)).float()
            if nodes[0].unit is None:
                yield change[None]
                continue
            block, is_head = self.model.block(nodes[0].layer), nodes[0].kind == "head"
            stored = block.attn.W_O if is_head else block.mlp.W_out
            weight, change = self._weight(point, stored.float), change.transpose(0, 1)
            units = on_device(np.array([node.unit for node in nodes], int), change)
            weight, change = weight[units], change[units]
            yield change @ weight if is_head else change[..., None] * weight[:, None]

    def _slopes(
        self, runs: Sequence[GradientRun], at: int, part: Chosen
    ) -> Iterator[tuple[list[Receiver], Float[Tensor, "receiver pos d_model"]]]:
        """Gradients at receivers' inputs, by point and in order; means over the runs."""
        positions = self.placement.spots.positions[part]
        for point, some in groupby(self.receivers, _receiving_point):
            nodes = list(some)
            total: Tensor | None = None
            for run in runs:
                gradient = run.gradients[point][at]
                where = on_device(positions, gradient)
                one = self._slope(run, nodes, gradient[where].float(), at, where)
                total = one if total is None else total.add_(one)
            assert total is not None
            yield nodes, total / len(runs)

    def _slope(
        self, run: GradientRun, nodes: list[Receiver], gradient: Tensor, at: int, where: Tensor
    ) -> Float[Tensor, "receiver pos d_model"]:
        """Gradient at the inputs of receivers of one point, in one run."""
        first = nodes[0]
        if first.is_stream:
            return gradient[None].clone()
        block, kind = self.model.block(first.layer), first.kind
        stream = run.values[first.stream][at, where]
        if kind == "mlp":
            return _through_norm(block.mlp_norm, stream, gradient[None])
        units = on_device(np.array([node.unit for node in nodes], int), gradient)

        def make() -> Tensor:
            stored = {"q": block.attn.W_Q, "k": block.attn.W_K, "v": block.attn.W_V}[kind]
            # One kv head in so many query heads, all alike.
            by_head = stored[:: len(stored) // gradient.shape[1]].transpose(1, 2)
            return by_head.float() * block.ln1.weight.float()

        weight = self._weight(_receiving_point(first), make)
        read = gradient.transpose(0, 1)[units] @ weight[units]
        return _through_norm(block.ln1, stream, read)

    def _weight(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A weight in fp32, made once a call."""
        if name not in self._weights:
            self._weights[name] = make()
        return self._weights[name]


def _summed(
    scores: Float[Tensor, "node other"], sets: Sequence[tuple[NodeT, ...]], nodes: Sequence[NodeT]
) -> Float[Tensor, "set other"]:
    """Sums of scores over the nodes of every set."""
    place = {node: i for i, node in enumerate(nodes)}
    members = on_device(np.array([place[node] for one in sets for node in one]), scores)
    owners = on_device(np.repeat(np.arange(len(sets)), [len(one) for one in sets]), scores)
    found = scores.new_zeros(len(sets), scores.shape[1])
    return found.index_add_(0, owners, scores[members])


def _receiving_point(receiver: Receiver) -> str:
    """Hook point at which the gradient of a receiver is taken."""
    at = "ln2.normalized" if receiver.kind == "mlp" else receiver.kind
    return hook_name(at, receiver.block)


def _through_norm(
    norm: RMSNorm | LayerNorm,
    stream: Float[Tensor, "pos d_model"],
    gradient: Float[Tensor, "receiver pos d_model"],
) -> Float[Tensor, "receiver pos d_model"]:
    """Gradient at a norm's input, from that at its output before its weight.

    For ``n = x / s`` with ``s^2 = mean(x^2) + eps``: ``(g - n mean(n g)) / s``. A LayerNorm takes
    the means of ``x`` and ``g`` off before.
    """
    scale, stream = norm.scale(stream), stream.float()
    if isinstance(norm, LayerNorm):
        stream, gradient = (x - x.mean(-1, keepdim=True) for x in (stream, gradient))
    normalized = stream / scale
    along = torch.einsum("vpd,pd->vp", gradient, normalized)[..., None] / normalized.shape[-1]
    return torch.addcmul(gradient, normalized, along, value=-1).div_(scale)
