"""Edge attribution patching: what ``path_patch(mode="edge")`` would find, to first order.

The score of an edge is ``(a_u(donor) - a_u(base)) . dL/d input_v``, u the sender's message to the
stream and ``input_v`` the stream as one receiver reads it, before its norm. EAP takes the gradient
at the base, EAP-IG its mean over runs whose embeddings lie between donor and base. Sign: patched -
base, as ``path_patch`` has it.

No stream is ever copied per head: the gradient at a receiver's input is that at its q, k, v or
normalised MLP input, taken back through its weight and its norm.

Source: Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby, product
from operator import attrgetter
from typing import Annotated, Any, Literal, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ...components.norm import RMSNorm
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name
from ..patching.alignment import Place
from ..patching.choice import per_query_head, place_ticks
from ..patching.graph import NodePair
from ..patching.measurement import Measurement
from ..patching.metrics import Metric, OnLogits
from ..patching.nodes import Receiver, Sender, receivers, senders
from ..patching.options import HeadsOption, Option, PlacesOption, SharedOptions, takes
from ..patching.paths import Nodes, node_sets, pair_sets, patch_edges, set_names
from ..patching.placement import Placement
from .gradients import GradientRun, embeddings_of, gradient_runs
from .trust import Attribution, CheckOptions, attribution, score_table

EdgeMethod = Literal["eap", "eap-ig"]
Endpoint = Literal["base", "donor"]
CHUNK_BYTES = 2**28
"""Bytes of messages and gradients that are held at once."""


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
    with per_query_head(model, options["kv"] == "query"):
        from_sets = node_sets(model, from_nodes, senders)
        to_sets = node_sets(model, to_nodes, receivers)
        pairs = pair_sets(from_sets, to_sets)
        # Shares of the way from base to donor.
        shift = 0 if endpoint == "base" else 1
        ways = [0.0] if method == "eap" else [(k + shift) / steps for k in range(steps)]
        edges = _Edges(model, base, donor, metric, from_sets, to_sets, places, options)
        scores = edges.scores(pairs, ways, options["rows_at_once"])
        axes: dict[str, tuple[Any, ...]] = {
            "sender": set_names(from_sets), "receiver": set_names(to_sets),
            "place": place_ticks(places),
        }  # fmt: skip

        def exact(chosen: Sequence[int]) -> Tensor:
            found: dict[int, Tensor] = {}
            for place in sorted({cell % len(places) for cell in chosen}):
                here = [cell for cell in chosen if cell % len(places) == place]
                named = {
                    str(cell): [(s.name, r.name) for s, r in pairs[cell // len(places)]]
                    for cell in here
                }
                result = patch_edges(
                    model, base, donor, metric, named, places=[places[place]],
                    policy=options["policy"], kv=options["kv"], max_bytes=options["max_bytes"],
                )  # fmt: skip
                found |= zip(here, torch.from_numpy(result.effect[:, 0]), strict=True)
            return torch.stack([found[cell] for cell in chosen])

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
        self.model, self.places = model, places
        self.placement = Placement(model, base, donor, places, options["policy"])
        # In the order in which they are computed: those of one hook point together.
        self.senders = sorted({s for one in from_sets for s in one}, key=attrgetter("activation"))
        self.receivers = sorted({r for one in to_sets for r in one}, key=_receiving_point)
        written = sorted({sender.activation for sender in self.senders})
        self.measured = Measurement(
            model, base, donor, metric, max_bytes=options["max_bytes"], keep=written,
            keep_of_donor=written,
        )  # fmt: skip

    def scores(
        self,
        pairs: Sequence[Sequence[NodePair]],
        ways: Sequence[float],
        rows_at_once: int | None,
    ) -> Float[Tensor, "cell batch label"]:
        """Scores of every pair of sets and place, means over points of the way to the donor."""
        found = score_table(len(pairs) * len(self.places), self.measured)
        table = found.view(len(pairs), len(self.places), *found.shape[1:])
        table[[i for i, members in enumerate(pairs) if not members]] = torch.nan
        sender = {node: i for i, node in enumerate(self.senders)}
        receiver = {node: i for i, node in enumerate(self.receivers)}
        owners = torch.tensor([i for i, some in enumerate(pairs) for _ in some], dtype=torch.long)
        ends = [(sender[s], receiver[r]) for some in pairs for s, r in some]
        senders, receivers = torch.tensor(ends, dtype=torch.long).view(-1, 2).T
        for way in ways:
            runs = gradient_runs(
                self.measured, self._embeddings(way), self._needed(), rows_at_once=rows_at_once
            )
            for run in runs:
                for (at, row), place in product(enumerate(run.rows), range(len(self.places))):
                    matrix = self._matrix(run, at, row, place) / len(ways)
                    scores = matrix[senders, receivers]
                    table[:, place, row, run.label].index_add_(0, owners, scores)
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
        self, run: GradientRun, at: int, row: int, place: int
    ) -> Float[Tensor, "sender receiver"]:
        """Scores of all pairs of nodes, meaningless where the receiver comes first."""
        n_nodes = len(self.senders) + len(self.receivers)
        n = max(CHUNK_BYTES // (4 * self.model.cfg.d_model * n_nodes), 1)
        where = torch.tensor(self.placement.positions(place, row), dtype=torch.long)
        total = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.float64)
        for part in torch.arange(len(where)).split(n):
            messages = torch.cat([*self._messages(row, place, part)])
            slopes = torch.cat([*self._slopes(run, at, where[part])])
            total += torch.einsum("upd,vpd->uv", messages, slopes).double().cpu()
        return total

    def _messages(self, row: int, place: int, part: Tensor) -> Iterator[Tensor]:
        """Messages of senders, donor minus base, ``[sender, pos, d_model]``, in order."""
        alignment, runs = self.placement.alignments[place][row], self.measured.donor_runs
        assert runs is not None
        for point, some in groupby(self.senders, attrgetter("activation")):
            nodes = list(some)
            theirs = alignment.donor_values(runs.kept[point][row])
            ours = self.measured.base_runs.kept[point][row, alignment.base]
            change = (theirs - ours)[part].float()
            units = [node.unit for node in nodes if node.unit is not None]
            block = self.model.block(nodes[0].layer)
            if nodes[0].kind == "head":
                weight = block.attn.W_O[units].float()
                yield torch.einsum("phe,hed->hpd", change[:, units], weight)
            elif nodes[0].kind == "neuron":
                weight = block.mlp.W_out[units].float()
                yield torch.einsum("pn,nd->npd", change[:, units], weight)
            else:
                yield change[None]

    def _slopes(self, run: GradientRun, at: int, where: Tensor) -> Iterator[Tensor]:
        """Gradients at receivers' inputs, ``[receiver, pos, d_model]``, in order."""
        for point, some in groupby(self.receivers, _receiving_point):
            nodes = list(some)
            gradient = run.gradients[point][at, where].float()
            block = self.model.block(nodes[0].layer)
            if nodes[0].is_stream:
                yield gradient[None]
                continue
            stream, kind = run.values[nodes[0].stream][at, where], nodes[0].kind
            if kind == "mlp":
                yield _through_norm(block.ln2, stream, gradient[None])
            else:
                units = [node.unit for node in nodes]
                weight = {"q": block.attn.W_Q, "k": block.attn.W_K, "v": block.attn.W_V}[kind]
                # One kv head in so many query heads, all alike.
                weight = weight[:: len(weight) // gradient.shape[1]][units].float()
                read = torch.einsum("phe,hde->hpd", gradient[:, units], weight)
                yield _through_norm(block.ln1, stream, read * block.ln1.weight.float())


def _receiving_point(receiver: Receiver) -> str:
    """Hook point at which the gradient of a receiver is taken."""
    at = "ln2.normalized" if receiver.kind == "mlp" else receiver.kind
    return hook_name(at, receiver.block)


def _through_norm(
    norm: RMSNorm,
    stream: Float[Tensor, "pos d_model"],
    gradient: Float[Tensor, "receiver pos d_model"],
) -> Float[Tensor, "receiver pos d_model"]:
    """Gradient at a norm's input, from that at its output before the scale.

    For ``n = x / s`` with ``s^2 = mean(x^2) + eps``: ``(g - n mean(n g)) / s``.
    """
    scale = norm.scale(stream)
    normalized = stream.float() / scale
    return (gradient - normalized * (normalized * gradient).mean(-1, keepdim=True)) / scale
