"""Attribution patching: what ``patch`` would find, to first order, from one gradient.

The score of a node is ``(n(donor) - n(base)) . dL/dn`` at the base run, in ``patch``'s convention
(noising, if base is the clean prompt): it approximates patched - base. Gradients saturate where a
softmax does; ``qk_fix`` (AtP*) computes the softmax of patched queries and keys exactly, and takes
the gradient behind it.

Source: Kramar et al. 2024 (AtP*), equations of AtP and of the QK fix; without GradDrop.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...components.attention import Attention
from ...components.rotary import rotate
from ...engine.cells import Cell, Edit, Site, site_name
from ...engine.record import Record
from ...errors import InputError
from ...inputs import ALMInput
from ...masks import attention_masks
from ...model import HookedALM
from ..patching.alignment import AlignPolicies, Place
from ..patching.donors import Donor, DonorValues
from ..patching.measurement import Measurement
from ..patching.metrics import Metric, OnLogits
from ..patching.patch import (
    Joint,
    PatchMode,
    Write,
    joint_indices,
    joint_ticks,
    per_query_head,
    place_ticks,
    units_of,
)
from .gradients import GradientRun, embeddings_of, gradient_runs
from .trust import Attribution, attribution, score_table

Units = tuple[int, ...] | None


@torch.inference_mode(mode=False)
@torch.no_grad()
def attribute_nodes(
    model: HookedALM,
    base: ALMInput,
    donor: Donor,
    metric: Metric | OnLogits,
    *,
    site: Site = "resid_post",
    layers: Sequence[Joint] | None = None,
    heads: Sequence[Joint] | Literal["each"] | None = None,
    neurons: Sequence[Joint] | Literal["each"] | None = None,
    places: Sequence[Place] | Literal["each"] = ("audio",),
    mode: PatchMode = "replace",
    coefficient: float = 1.0,
    policy: AlignPolicies = "error",
    kv: Literal["group", "query"] = "group",
    qk_fix: bool = False,
    check: int = 0,
    seed: int = 0,
    rows_at_once: int | None = None,
    max_bytes: int | None = None,
) -> Attribution:
    """Approximate every cell of a ``patch`` sweep, and check some of them exactly.

    It costs a forward and a backward per value of the metric, whatever the number of cells. A
    divergence from the base (``KL()``, ``JS()``) is flat there: all its scores are 0.

    Args:
        model: to run; its weights get no gradients.
        base: as in ``patch``.
        donor: as in ``patch``.
        metric: differentiable.
        site: as in ``patch``.
        layers: blocks, one by one; None is each.
        heads: as in ``patch``.
        neurons: as in ``patch``.
        places: as in ``patch``.
        mode: as in ``patch``; the score is the gradient times what the mode changes.
        coefficient: as in ``patch``.
        policy: as in ``patch``.
        kv: as in ``patch``.
        qk_fix: for sites q and k, the change of the attention rows themselves (for k, of all later
            queries) times the gradient at the pattern.
        check: number of cells whose exact effect is measured besides: half of them those of the
            largest score, half drawn from the others.
        seed: of the drawing.
        rows_at_once: rows of the batch whose graph is held at a time; None is all.
        max_bytes: memory budget of the exact engine.

    Returns:
        Scores with the axes of ``patch``.

    Raises:
        InputError: what ``patch`` raises; several layers at once; a metric without a gradient;
            ``qk_fix`` at another site.
    """
    if mode not in get_args(PatchMode):
        raise InputError(f"attributing with mode {mode!r}: expected one of {get_args(PatchMode)}.")
    if qk_fix and site not in ("q", "k"):
        raise InputError(f"attributing {site} with qk_fix: it is for sites 'q' and 'k'.")
    with per_query_head(model, kv == "query" and site in ("k", "v")):
        blocks = joint_indices("layer", layers, len(model.path))
        if any(len(joint) > 1 for joint in blocks):
            raise InputError(
                f"attributing layers {layers}: of several at once, the later hear the earlier, and "
                "no gradient holds for them together. Give them one by one, or use `patch`."
            )
        unit, units = units_of(model, site, heads, neurons)
        where = list(range(base.shape[1])) if places == "each" else list(places)
        nodes = _Nodes(
            model, base, donor, metric, site, [b for (b,) in blocks], where,
            mode=mode, coefficient=coefficient, policy=policy, qk_fix=qk_fix, max_bytes=max_bytes,
        )  # fmt: skip
        scores = nodes.scores(units, rows_at_once)
        axes = {"layer": joint_ticks(blocks), **({unit: joint_ticks(units)} if unit else {})}
        axes["place"] = place_ticks(where)
        cells = list(product([b for (b,) in blocks], units, range(len(where))))
        return attribution(
            nodes.measured,
            axes,
            scores,
            lambda chosen: nodes.exact([cells[i] for i in chosen]),
            engine="atp, qk fix" if qk_fix else "atp",
            check=check,
            seed=seed,
            site=site,
            mode=mode,
            length_ratios=nodes.values.length_ratios,
        )


class _Nodes:
    """The runs of base and donor, and what a patch would change in them."""

    def __init__(
        self,
        model: HookedALM,
        base: ALMInput,
        donor: Donor,
        metric: Metric | OnLogits,
        site: Site,
        layers: Sequence[int],
        places: Sequence[Place],
        *,
        mode: PatchMode,
        coefficient: float,
        policy: AlignPolicies,
        qk_fix: bool,
        max_bytes: int | None,
    ) -> None:
        self.model, self.base, self.site, self.layers, self.places = (
            model, base, site, layers, places,
        )  # fmt: skip
        self.mode, self.coefficient, self.qk_fix = mode, coefficient, qk_fix
        self.values = DonorValues(model, base, donor, places, policy)
        names = [site_name(site, model.path[layer]) for layer in layers]
        # The pattern is not on the path of fused attention: its gradient is that of z, times v.
        self.behind: Site = "z" if qk_fix or site == "pattern" else site
        also = [site_name("q", model.path[layer]) for layer in layers] if qk_fix else []
        self.measured = Measurement(
            model, base, self.values.run, metric, max_bytes=max_bytes, keep=sorted({*names, *also}),
            keep_of_donor=names if self.values.run is not None else (),
        )  # fmt: skip
        if mode != "scale":
            self.values.read(site, names, self.measured)
        self.kept = self.measured.base_runs.kept

    def scores(
        self, units: Sequence[Units], rows_at_once: int | None
    ) -> Float[Tensor, "cell batch label"]:
        """Of every product of layers, units and places."""
        n_cells = len(self.layers) * len(units) * len(self.places)
        found = score_table(n_cells, self.measured)
        table = found.view(len(self.layers), len(units), len(self.places), *found.shape[1:])
        names = [site_name(self.behind, self.model.path[layer]) for layer in self.layers]
        embeddings = embeddings_of(self.measured.base_runs, self.base)
        runs = gradient_runs(self.measured, embeddings, names, rows_at_once=rows_at_once)
        for run in runs:
            for (i, layer), (at, row) in product(enumerate(self.layers), enumerate(run.rows)):
                for place, score in enumerate(self._by_unit(run, layer, at, row)):
                    table[i, :, place, row, run.label] = _over(units, score.double().cpu())
        return found

    def exact(self, cells: Sequence[tuple[int, Units, int]]) -> Tensor:
        """Effects of some cells by the exact engine."""

        def edit(layer: int, units: Units, place: int, row: int) -> Edit:
            positions = self.values.alignments[place][row].base
            return Edit(self.site, layer, positions, self._write(layer, place, row, units))

        patched = self.measured.values(
            [[Cell(row, (edit(*cell, row),)) for row in range(len(self.base))] for cell in cells]
        )
        return patched - self.measured.base_values

    def _write(self, layer: int, place: int, row: int, units: Units = None) -> Write:
        name = site_name(self.site, self.model.path[layer])
        theirs = partial(self.values.values, name, row, place, units)
        return Write(self.mode, self.coefficient, theirs, units)

    def _by_unit(
        self, run: GradientRun, layer: int, at: int, row: int
    ) -> Iterator[Float[Tensor, " unit"]]:
        """Scores of every place, of each of the site's units by itself."""
        block = self.model.path[layer]
        kept = self.kept[site_name(self.site, block)]
        own = (kept.transpose(1, 2) if self.site == "pattern" else kept)[row]
        gradient = run.gradients[site_name(self.behind, block)][at]
        softmax = self._softmax(layer, row, gradient) if self.qk_fix else None
        for place, alignments in enumerate(self.values.alignments):
            where = alignments[row].base
            before = own[where]
            after = self._write(layer, place, row)(before)
            if softmax is not None:
                exchanged = softmax.of_queries if self.site == "q" else softmax.of_keys
                yield exchanged(self.measured.base_runs.records[row].rows_of(where), before, after)
                continue
            change, slope = after.float() - before.float(), gradient[where].float()
            if self.site == "pattern":
                record = self.measured.base_runs.records[row]
                v = record.key_values(layer)[1].transpose(0, 1).float()
                slope = torch.einsum("phe,jhe->phj", slope, _per_query_head(v, slope.shape[1]))
                change = change[..., record.where]
            product = change * slope
            yield product.flatten(2).sum((0, 2)) if product.ndim > 2 else product.sum(0)

    def _softmax(self, layer: int, row: int, gradient: Float[Tensor, "pos head d_head"]) -> "_Row":
        record = self.measured.base_runs.records[row]
        attn: Attention = self.model.block(layer).attn
        masks = attention_masks(
            self.model.cfg, "eager", self.base.attention_mask[row : row + 1], None,
            record.resid[0][None].new_zeros(1, *self.base.shape[1:], 1), None,
        )  # fmt: skip
        mask = masks[attn.layer_type][0, 0][record.where][:, record.where]
        q = self.kept[site_name("q", self.model.path[layer])][row, record.where]
        return _Row(attn, record, q, mask, gradient[record.where])


class _Row:
    """One row's attention at its real positions, in fp64: what patched queries and keys do to z.

    ``sum_j (pattern' - pattern)_j dL/dpattern_j``, where ``dL/dpattern_ij`` is ``dL/dz_i . v_j``,
    is ``(z' - z) . dL/dz``.
    """

    def __init__(
        self,
        attn: Attention,
        record: Record,
        q: Float[Tensor, "row head d_head"],
        mask: Float[Tensor, "row key_row"],
        gradient: Float[Tensor, "row head d_head"],
    ) -> None:
        """``q`` before rotation; ``gradient`` at z."""
        self.attn, self.rotary, self.n_heads = attn, record.rotary, q.shape[1]
        self.mask, self.gradient = mask.double(), gradient.double()
        k, v = (part.transpose(0, 1).double() for part in record.key_values(attn.layer_idx))
        self.k, self.v = (_per_query_head(part, self.n_heads) for part in (k, v))
        self.q = self._rotated(attn.q_norm, q, torch.arange(len(record)))

    def of_queries(
        self,
        rows: Int[Tensor, " patched"],
        before: Float[Tensor, "patched head d_head"],
        after: Float[Tensor, "patched head d_head"],
    ) -> Float[Tensor, " head"]:
        """Of queries exchanged at some rows."""
        new, old = (self._rotated(self.attn.q_norm, q, rows) for q in (after, before))
        moved = self._z(new, self.k, rows) - self._z(old, self.k, rows)
        return (moved * self.gradient[rows]).sum((0, 2))

    def of_keys(
        self,
        rows: Int[Tensor, " patched"],
        before: Float[Tensor, "patched kv_head d_head"],
        after: Float[Tensor, "patched kv_head d_head"],
    ) -> Float[Tensor, " kv_head"]:
        """Of keys exchanged at some rows, to every query from there on."""
        readers = torch.arange(int(rows.min()) if len(rows) else len(self.q), len(self.q))

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
        cos, sin = (table[rows][None] for table in self.rotary)
        return rotate(norm(heads).transpose(0, 1)[None], (cos, sin))[0].transpose(0, 1).double()


def _per_query_head(heads: Float[Tensor, "pos kv_head d_head"], n_heads: int) -> Tensor:
    return heads.repeat_interleave(n_heads // heads.shape[1], dim=1)


def _over(units: Sequence[Units], scores: Float[Tensor, " unit"]) -> Float[Tensor, " chosen"]:
    """Sums over the units that are patched together; None is all of them."""
    members = [range(len(scores)) if one is None else one for one in units]
    owner = torch.tensor([i for i, some in enumerate(members) for _ in some], dtype=torch.long)
    flat = torch.tensor([unit for some in members for unit in some], dtype=torch.long)
    return scores.new_zeros(len(units)).index_add(0, owner, scores[flat])
