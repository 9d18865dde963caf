"""Attribution patching: what ``patch`` would find, to first order, from one gradient.

The score of a node is ``(n(donor) - n(base)) . dL/dn`` at the base run, in ``patch``'s convention
(noising, if base is the clean prompt): it approximates patched - base. Gradients saturate where a
softmax does; ``qk_fix`` (AtP*) computes the softmax of patched queries and keys exactly, and takes
the gradient behind it.

Source: Kramar et al. 2024 (AtP*), equations of AtP and of the QK fix; without GradDrop.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...components.attention import Attention
from ...components.rotary import rotate
from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...masks import attention_masks
from ...model import HookedALM
from ...points import Site, hook_name
from ...stacks import Stack, ranges_of, rows_in
from ..patching.choice import Choice, Units, per_query_head
from ..patching.donors import Donor, DonorValues, run_of
from ..patching.measurement import Measurement
from ..patching.metrics import Metric, OnLogits
from ..patching.options import NodeOptions, Option, takes
from ..patching.patch import DonorWrite, check_node_options, edits_of_nodes
from ..patching.placement import Chosen, Placement
from .gradients import GradientRun, embeddings_of, gradient_runs
from .trust import Attribution, CheckOptions, attribution, score_table


class NodeAttributionOptions(NodeOptions, CheckOptions, total=False):
    """Options of ``attribute_nodes``."""

    qk_fix: Annotated[
        bool,
        Option(
            False,
            "for sites q and k, the change of the attention rows themselves (for k, of all queries "
            "that see it) times the gradient at the pattern.",
        ),
    ]


@torch.inference_mode(mode=False)
@torch.no_grad()
@takes(NodeAttributionOptions)
def attribute_nodes(
    model: HookedALM,
    base: ALMInput,
    donor: Donor,
    metric: Metric | OnLogits,
    **options: Unpack[NodeAttributionOptions],
) -> Attribution:
    """Approximate every cell of a ``patch`` sweep, and check some of them exactly.

    It costs a forward and a backward per value of the metric, whatever the number of cells. A
    divergence from the base (``KL()``, ``JS()``) is flat there: all its scores are 0.

    Args:
        model: to run; its weights get no gradients.
        base: as in ``patch``.
        donor: as in ``patch``; the score is the gradient times what the mode changes.
        metric: differentiable.

    Returns:
        Scores with the axes of ``patch``.

    Raises:
        InputError: what ``patch`` raises; several layers at once; a metric without a gradient;
            ``qk_fix`` at another site.
    """
    check_node_options("attributing", model, options)
    site, qk_fix = options["site"], options["qk_fix"]
    if qk_fix and site not in ("q", "k"):
        raise InputError(f"attributing {site} with qk_fix: it is for sites 'q' and 'k'.")
    with per_query_head(model, options["kv"] == "query" and site in ("k", "v")):
        model.refuse_encoder("attributing nodes")
        model.refuse_cross_attention("attributing nodes")
        choice = Choice.of(model, base.shape[1], options)
        if any(len(joint) > 1 for joint in choice.layers):
            raise InputError(
                f"attributing layers {options['layers']}: of several at once, the later hear the "
                "earlier, and no gradient holds for them together. Give them one by one, or use "
                "`patch`."
            )
        nodes = _Nodes(model, base, donor, metric, choice, options)
        return attribution(
            nodes.measured,
            choice.axes,
            nodes.scores(),
            nodes.exact,
            engine="atp, qk fix" if qk_fix else "atp",
            options=options,
            site=site,
            mode=options["mode"],
            length_ratios=nodes.placement.length_ratios,
        )


class _Nodes:
    """The runs of base and donor, and what a patch would change in them."""

    def __init__(
        self,
        model: HookedALM,
        base: ALMInput,
        donor: Donor,
        metric: Metric | OnLogits,
        choice: Choice,
        options: NodeAttributionOptions,
    ) -> None:
        self.model, self.base, self.choice, self.options = model, base, choice, options
        self.layers = [layer for (layer,) in choice.layers]
        self.site = site = options["site"]
        run = run_of(donor)
        self.placement = Placement(model, base, run, choice.places, options["policy"])
        self.spots = self.placement.spots
        self.values = DonorValues(model, donor, self.placement)
        names = [hook_name(site, model.path[layer]) for layer in self.layers]
        # The pattern is not on the path of fused attention: its gradient is that of z, times v.
        self.behind: Site = "z" if options["qk_fix"] or site == "pattern" else site
        also = [hook_name("q", model.path[b]) for b in self.layers] if options["qk_fix"] else []
        self.measured = Measurement(
            model, base, run, metric, max_bytes=options["max_bytes"],
            keep=sorted({*names, *also}), keep_of_donor=names if run is not None else (),
        )  # fmt: skip
        if options["mode"] != "scale":
            self.values.read(site, names, self.measured)
        self.kept = self.measured.base_runs.kept

    def scores(self) -> Float[Tensor, "cell batch label"]:
        """Scores of every combination of layers, units and places."""
        n_places, n_rows = len(self.choice.places), len(self.base)
        found = score_table(len(self.layers) * len(self.choice.units) * n_places, self.measured)
        table = found.view(len(self.layers), len(self.choice.units), n_places, *found.shape[1:])
        names = [hook_name(self.behind, self.model.path[layer]) for layer in self.layers]
        embeddings = embeddings_of(self.measured.base_runs, self.base)
        n_at_once = self.options["rows_at_once"]
        for run in gradient_runs(self.measured, embeddings, names, rows_at_once=n_at_once):
            mine = np.flatnonzero(np.isin(self.spots.rows, run.rows))
            for i, layer in enumerate(self.layers):
                by_spot = self._by_unit(run, layer, mine).double()
                by_cell = by_spot.new_zeros(n_places * n_rows, by_spot.shape[1])
                by_cell.index_add_(0, on_device(self.spots.cells[mine], by_cell), by_spot)
                chosen = by_cell @ _members(self.choice.units, by_spot)
                table[i, ..., run.label] += chosen.T.unflatten(1, (n_places, n_rows)).to(found)
        return found

    def exact(self, cells: Sequence[int]) -> Tensor:
        """Effects of some cells by the exact engine."""
        n_cells = len(self.layers) * len(self.choice.units) * len(self.choice.places)
        edits = edits_of_nodes(self.choice, self.site, self.spots, len(self.base), self._write)
        patched = self.measured.values(n_cells, edits, only=np.array(cells))
        return patched - self.measured.base_values

    def _write(self, layer: int, spots: Chosen, units: Chosen | None = None) -> DonorWrite:
        theirs = partial(self.values.values, hook_name(self.site, self.model.path[layer]))
        return DonorWrite(self.options["mode"], self.options["coefficient"], theirs, spots, units)

    def _by_unit(self, run: GradientRun, layer: int, mine: Chosen) -> Float[Tensor, "spot unit"]:
        """Scores of some spots, of each of the site's units by itself."""
        block = self.model.path[layer]
        kept = self.kept[hook_name(self.site, block)]
        before = self.spots.of_base(kept.transpose(1, 2) if self.site == "pattern" else kept, mine)
        after = self._write(layer, mine)(before, np.arange(len(mine)))
        gradient = run.gradients[hook_name(self.behind, block)]
        if self.options["qk_fix"]:
            return self._fixed(
                layer, mine, before, after, dict(zip(run.rows, gradient, strict=True))
            )
        # Rows of a run are consecutive ones of the batch.
        slope = self.spots._replace(rows=self.spots.rows - run.rows[0]).of_base(gradient, mine)
        change, slope = after.float() - before.float(), slope.float()
        if self.site == "pattern":
            slope = self._of_pattern(layer, mine, slope, change.shape[-1])
        product = change * slope
        return product.flatten(2).sum(2) if product.ndim > 2 else product

    def _of_pattern(
        self, layer: int, mine: Chosen, slope: Float[Tensor, "spot head d_head"], n_pos: int
    ) -> Float[Tensor, "spot head pos"]:
        """Gradient at the pattern from that at z, which is the pattern times v; 0 at pads."""
        found = slope.new_zeros(*slope.shape[:2], n_pos)
        rows = self.spots.rows[mine]
        for row in np.unique(rows).tolist():
            record, here = self.measured.base_runs.records[row], np.flatnonzero(rows == row)
            at = on_device(here, slope)
            v = record.key_values(layer)[1].transpose(0, 1).float()
            part = torch.einsum("phe,jhe->phj", slope[at], _per_query_head(v, slope.shape[1]))
            spread = part.new_zeros(*part.shape[:2], n_pos)
            spread[..., record.where.to(part.device)] = part
            found[at] = spread
        return found

    def _fixed(
        self, layer: int, mine: Chosen, before: Tensor, after: Tensor, gradients: dict[int, Tensor]
    ) -> Float[Tensor, "spot unit"]:
        """Scores with the QK fix: of a place as a whole, written down at its first spot."""
        found = before.new_zeros(*before.shape[:2], dtype=torch.float64)
        cells, first = np.unique(self.spots.cells[mine], return_index=True)
        softmax: dict[int, _Row] = {}
        for cell, start in zip(cells, first, strict=True):
            here = np.flatnonzero(self.spots.cells[mine] == cell)
            row = int(self.spots.rows[mine][start])
            if row not in softmax:
                softmax[row] = self._softmax(layer, row, gradients[row])
            exchanged = softmax[row].of_queries if self.site == "q" else softmax[row].of_keys
            rows = self.measured.base_runs.records[row].rows_of(self.spots.positions[mine][here])
            at = on_device(here, before)
            found[start] = exchanged(torch.from_numpy(rows), before[at], after[at])
        return found

    def _softmax(self, layer: int, row: int, gradient: Float[Tensor, "pos head d_head"]) -> "_Row":
        record = self.measured.base_runs.records[row]
        attn: Attention = self.model.block(layer).attn
        stack = self.model.path_stacks[layer]
        masks = attention_masks(
            self.model.cfg, stack, "eager", self.base.attention_mask[row : row + 1], None,
            record.resid[0][None].new_zeros(1, *self.base.shape[1:], 1), None,
        )  # fmt: skip
        mask = masks[attn.layer_type][0, 0][record.where][:, record.where]
        q = self.kept[hook_name("q", self.model.path[layer])][row, record.where]
        k, v = record.key_values(layer)
        return _Row(attn, stack, (q, k, v), record.rotary, mask, gradient[record.where])


class _Row:
    """Attention of one row at its real positions, in fp64: what patched queries and keys do to z.

    ``sum_j (pattern' - pattern)_j dL/dpattern_j``, where ``dL/dpattern_ij`` is ``dL/dz_i . v_j``,
    is ``(z' - z) . dL/dz``.
    """

    def __init__(
        self,
        attn: Attention,
        stack: Stack,
        heads: tuple[Tensor, Tensor, Tensor],
        rotary: tuple[Tensor, Tensor] | None,
        mask: Float[Tensor, "row key_row"],
        gradient: Float[Tensor, "row head d_head"],
    ) -> None:
        """Take q before rotation, k and v as recorded in ``heads``, and the ``gradient`` at z."""
        q, *others = heads
        self.attn, self.stack, self.rotary, self.n_heads = attn, stack, rotary, q.shape[1]
        self.mask, self.gradient = mask.double(), gradient.double()
        k, v = (part.transpose(0, 1).double() for part in others)
        self.k, self.v = (_per_query_head(part, self.n_heads) for part in (k, v))
        self.q = self._rotated(attn.q_norm, q, torch.arange(len(q)))

    def of_queries(
        self,
        rows: Int[Tensor, " patched"],
        before: Float[Tensor, "patched head d_head"],
        after: Float[Tensor, "patched head d_head"],
    ) -> Float[Tensor, " head"]:
        """Scores of queries exchanged at some rows."""
        new, old = (self._rotated(self.attn.q_norm, q, rows) for q in (after, before))
        moved = self._z(new, self.k, rows) - self._z(old, self.k, rows)
        return (moved * self.gradient[rows]).sum((0, 2))

    def of_keys(
        self,
        rows: Int[Tensor, " patched"],
        before: Float[Tensor, "patched kv_head d_head"],
        after: Float[Tensor, "patched kv_head d_head"],
    ) -> Float[Tensor, " kv_head"]:
        """Scores of keys exchanged at some rows, over every query that may see them."""
        readers = rows_in(self.stack.reached(ranges_of(rows), len(self.q)))

        def z(k: Tensor) -> Tensor:
            own = _per_query_head(self._rotated(self.attn.k_norm, k, rows), self.n_heads)
            return self._z(self.q[readers], self.k.index_copy(0, rows.to(own.device), own), readers)

        moved = z(after) - z(before)
        by_head = (moved * self.gradient[readers]).sum((0, 2))
        return by_head.view(before.shape[1], -1).sum(1)

    def _z(self, q: Tensor, k: Tensor, rows: Int[Tensor, " query"]) -> Tensor:
        scores = torch.einsum("ihe,jhe->hij", q, k) * self.attn.scaling + self.mask[rows]
        return torch.einsum("hij,jhe->ihe", scores.softmax(-1), self.v)

    def _rotated(self, norm: nn.Module, heads: Tensor, rows: Int[Tensor, " row"]) -> Tensor:
        assert self.rotary is not None  # encoders, whose positions are in the stream, are refused
        cos, sin = (table[rows][None] for table in self.rotary)
        return rotate(norm(heads).transpose(0, 1)[None], (cos, sin))[0].transpose(0, 1).double()


def _per_query_head(heads: Float[Tensor, "pos kv_head d_head"], n_heads: int) -> Tensor:
    return heads.repeat_interleave(n_heads // heads.shape[1], dim=1)


def _members(units: Sequence[Units], scores: Tensor) -> Float[Tensor, "unit chosen"]:
    """1 where a unit is among those that are patched together; None is all of them."""
    found = np.zeros((scores.shape[1], len(units)))
    for i, some in enumerate(units):
        found[slice(None) if some is None else list(some), i] = 1.0
    return on_device(found, scores)
