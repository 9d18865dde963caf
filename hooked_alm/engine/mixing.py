"""Attention of bundles: every cell over the keys that it sees, shared ones once for all cells."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..components.attention import Attention
from ..components.block import Block
from ..stacks import Stack
from .bundles import Bundle, FlatKeyValue, Mask, Placed, indices, rotary_tables
from .record import KeyValue, on_device
from .rows import CellRows, RowSets

KERNEL_ROWS = 64
"""Rows from which on a cell's attention runs by the fused kernel. Explicit scores against the
kernel, with 12 cells, 800 keys and 8 heads of 64 on a CPU: 12.6 against 14.7 ms at 32 rows, 24.7
against 24.0 at 64, 97 against 48 at 128."""


def attend_all(
    bundles: Sequence[Bundle],
    stack: Stack,
    block: Block,
    attn: Attention,
    q: Float[Tensor, "1 head flat d_head"],
    k: Float[Tensor, "1 kv_head flat d_head"],
    v: Float[Tensor, "1 kv_head flat d_head"],
) -> Float[Tensor, "1 flat head d_head"]:
    """Mix values for every bundle, each over the keys that its cells see."""
    sizes = [len(bundle.rows) for bundle in bundles]
    parts = (heads[0].split(sizes, dim=1) for heads in (q, k, v))
    mixed = [
        (_attend_touched if bundle.is_base else _attend)(
            bundle, stack, block, queries, (keys, values)
        )
        for bundle, queries, keys, values in zip(bundles, *parts, strict=True)
    ]
    return torch.cat(mixed, dim=1).transpose(0, 1)[None]


def _attend(
    bundle: Bundle,
    stack: Stack,
    block: Block,
    q: Float[Tensor, "head flat d_head"],
    fresh: FlatKeyValue,
) -> Float[Tensor, "head flat d_head"]:
    """Attention of all heads over the shared keys and each cell's own."""
    rows, own = bundle.rows, bundle.own_by_cell(fresh)
    visible = bundle.visible(stack, block.attn.sliding_window, q)
    by_kv = rows.by_cell(q).unflatten(0, (len(bundle.shared[0]), -1))
    z = mix(by_kv, bundle.shared, own, visible, block.attn.scaling, _pattern_edit(bundle))
    return rows.joined(z.flatten(0, 1))


def _attend_touched(
    bundle: Bundle,
    stack: Stack,
    block: Block,
    q: Float[Tensor, "head flat d_head"],
    fresh: FlatKeyValue,
) -> Float[Tensor, "head flat d_head"]:
    """Attention of cells that were the base run up to here: the base's but for touched heads.

    The base's is computed once for all cells; a touched head over the shared keys, or over the
    cell's own in their place.
    """
    rows, own = bundle.rows, bundle.own_by_cell(fresh)
    window, scaling = block.attn.sliding_window, block.attn.scaling
    n_kv = len(bundle.shared[0])
    run, first = np.unique(rows.flat, return_index=True)
    place = on_device(first, q)
    queries, base = q[:, place], bundle.resid[place]
    if bundle.at("q"):  # the cells' own are not the base's
        rotary = rotary_tables([(bundle.record, run)], q.device)
        queries = block.attn.queries(block.ln1(base[None]), rotary)[0]
    alone = Bundle(
        record=bundle.record, rows=CellRows(RowSets([run], len(bundle.record)), np.zeros(1, int)),
        resid=base, shared=bundle.shared, shared_rows=bundle.shared_rows, masks=bundle.masks,
    )  # fmt: skip
    z = mix(
        queries[:, None].unflatten(0, (n_kv, -1)), bundle.shared, None,
        alone.visible(stack, window, q), scaling,
    ).flatten(0, 1)[:, 0]  # fmt: skip
    z = z[:, on_device(np.searchsorted(run, rows.flat), z)]
    heads, cells = _touched(bundle, len(q), n_kv)
    if not len(heads):
        return z
    at = on_device(heads, z)
    of_kv = at // (len(q) // n_kv)
    slots = at[:, None], on_device(cells, z)
    keys, values = bundle.shared
    if own is not None:
        own = own[0][of_kv[:, None], slots[1]], own[1][of_kv[:, None], slots[1]]
    visible = bundle.visible(stack, window, q)
    if visible is not None and visible.shape[2] > 1:
        visible = visible[0, 0][slots[1]][:, None]
    mixed = mix(
        rows.by_cell(q)[slots][:, None], (keys[of_kv], values[of_kv]), own, visible, scaling,
        _pattern_edit(bundle),
    )  # fmt: skip
    places = rows.places_of(cells)
    kept = np.flatnonzero(places >= 0)
    of_head = np.repeat(heads, places[0].size)[kept]
    z[on_device(of_head, z), on_device(places.ravel()[kept], z)] = mixed.flatten(0, 3)[
        on_device(kept, z)
    ]
    return z


def _touched(
    bundle: Bundle, n_heads: int, n_kv: int
) -> tuple[Int[np.ndarray, " touched"], Int[np.ndarray, "touched slot"]]:
    """Heads that the edits of this block touch, and for each the cells in which they do.

    Heads that are touched in fewer cells than others repeat one: it is computed again.
    """
    per_group = n_heads // n_kv
    pairs = [np.zeros(0, int)]
    for site, placed in (
        (placed.mark.site, placed) for placed in bundle.at("q", "k", "v", "pattern")
    ):
        units = placed.mark.units
        # Patterns are edited with all of their heads at hand, in the order of the cells.
        if units is None or site == "pattern":
            cells = np.arange(len(bundle.rows.counts)) if site == "pattern" else placed.cells
            heads = np.arange(n_heads)
        else:
            cells, heads = placed.cells, units[placed.entries][:, None]
            if site != "q":
                heads = heads * per_group + np.arange(per_group)
        pairs.append(np.unique(heads * len(bundle.rows.counts) + cells[:, None]))
    heads, cells = np.divmod(np.unique(np.concatenate(pairs)), len(bundle.rows.counts))
    found, first, counts = np.unique(heads, return_index=True, return_counts=True)
    steps = np.minimum(np.arange(counts.max(initial=0)), counts[:, None] - 1)
    return found, cells[first[:, None] + steps]


EditPattern = Callable[[Float[Tensor, "kv group cell row key"]], None]


def mix(
    q: Float[Tensor, "kv group cell row d_head"],
    shared: KeyValue,
    own: tuple[Float[Tensor, "kv cell own d_head"], Float[Tensor, "kv cell own d_head"]] | None,
    visible: Mask | None,
    scaling: float,
    edit: EditPattern | None = None,
) -> Float[Tensor, "kv group cell row d_head"]:
    """Attention over the shared keys and each cell's own, the shared ones once for all cells."""
    if q.shape[3] >= KERNEL_ROWS and edit is None:
        return _by_kernel(q, shared, own, visible, scaling)
    # Explicit scores, by the formula and in the precision of Hugging Face's eager attention. The
    # queries of all cells meet the shared keys in one product (rule 3), their own keys in another;
    # the softmax is over both.
    keys, values = shared
    n_shared, n_own = keys.shape[1], 0 if own is None else own[0].shape[2]
    # Into one piece of memory: on a CPU, tensors of this size come page by page.
    flat = q.flatten(1, 3)
    scores = q.new_empty(*flat.shape[:2], n_shared + n_own)
    torch.baddbmm(
        scores[..., :n_shared], flat, keys.transpose(1, 2), beta=0, alpha=scaling,
        out=scores[..., :n_shared],
    )  # fmt: skip
    apart = scores.unflatten(1, q.shape[1:4])
    if own is not None:
        apart[..., n_shared:] = torch.einsum("kgcre,kcse->kgcrs", q, own[0]) * scaling
    if visible is not None:
        apart.masked_fill_(~visible, torch.finfo(scores.dtype).min)
    pattern = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    apart = pattern.unflatten(1, q.shape[1:4])
    if edit is not None:
        edit(apart)
    z = torch.bmm(pattern[..., :n_shared], values).unflatten(1, q.shape[1:4])
    return (
        z if own is None else z + torch.einsum("kgcrs,kcse->kgcre", apart[..., n_shared:], own[1])
    )


def _by_kernel(
    q: Float[Tensor, "kv group cell row d_head"],
    shared: KeyValue,
    own: tuple[Float[Tensor, "kv cell own d_head"], Float[Tensor, "kv cell own d_head"]] | None,
    visible: Mask | None,
    scaling: float,
) -> Float[Tensor, "kv group cell row d_head"]:
    """Attention by the fused kernel, which holds no scores.

    The kernel wants all keys of a cell in one piece: worth a copy where many rows read them.
    """
    n_groups, n_cells = q.shape[1:3]
    heads = q.flatten(0, 1)
    # By heads or the same for all; there is one head to a group wherever they differ.
    mask = None if visible is None else visible.flatten(0, 1)
    if own is None:  # all cells read the same keys: their rows are queries of one run
        keys, values = (part.repeat_interleave(n_groups, 0)[None] for part in shared)
        if mask is not None:
            mask = mask.expand(-1, n_cells, -1, -1).flatten(1, 2)
        z = F.scaled_dot_product_attention(
            heads.flatten(1, 2)[None], keys, values, attn_mask=mask, scale=scaling
        )[0].unflatten(1, (n_cells, -1))
    else:
        keys, values = (
            torch.cat([part[:, None].expand(-1, n_cells, -1, -1), mine], dim=2)
            .repeat_interleave(n_groups, 0).transpose(0, 1)
            for part, mine in zip(shared, own, strict=True)
        )  # fmt: skip
        mask = None if mask is None else mask.transpose(0, 1)
        z = F.scaled_dot_product_attention(
            heads.transpose(0, 1), keys, values, attn_mask=mask, scale=scaling
        ).transpose(0, 1)
    return z.unflatten(0, q.shape[:2])


def _pattern_edit(bundle: Bundle) -> EditPattern | None:
    """The function that edits the patterns of a bundle in place, if any are to be."""
    placed = sorted(bundle.at("pattern"), key=lambda one: one.turn)
    return partial(_edit_pattern, bundle, placed) if placed else None


def _edit_pattern(
    bundle: Bundle, turns: Sequence[Placed], pattern: Float[Tensor, "kv group cell row key"]
) -> None:
    """Edit patterns, spread out over the keys of the padded prompt meanwhile."""
    keys, columns = bundle.shared_rows, np.arange(len(bundle.shared_rows))
    if bundle.own_rows is not None:
        # Cells whose patterns are edited are grouped by what they have of their own, which stands
        # in place of the shared keys of the same rows.
        own = bundle.own_rows.flat[: bundle.own_rows.longest]
        columns = np.append(columns[~np.isin(keys, own)], len(keys) + np.arange(len(own)))
        keys = np.append(keys, own)
    where = on_device(bundle.record.where.numpy()[keys[columns]], pattern)
    kept = on_device(columns, pattern)
    apart = pattern.flatten(0, 1).permute(1, 2, 0, 3)  # a view: cell row head key
    for placed in turns:
        rows = placed.places - bundle.rows.starts[placed.cells]
        at = on_device(placed.cells, pattern), *indices(placed.mark, placed.entries, rows, pattern)
        value = apart[at]
        padded = value.new_zeros(*value.shape[:-1], bundle.record.n_pos)
        padded[..., where] = value[..., kept]
        new = placed.mark.act(padded, placed.entries)
        if new is not None:
            value[..., kept] = new[..., where]
            apart[at] = value
