"""Cross-attention of bundles: what an unchanged memory holds is read once for all cells."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..components.cross_attention import CrossAttention
from ..points import SITES
from .bundles import Bundle, InMemory, Placed, indices
from .mixing import mix
from .record import KeyValue, on_device

_BEHIND = [*SITES][[*SITES].index("cross_attn.pattern") + 1 :]
"""Sites whose edits leave the queries of their block's cross-attention as they were."""


def attend_memories(
    bundles: Sequence[Bundle], attn: CrossAttention, q: Float[Tensor, "1 head flat d_head"]
) -> Float[Tensor, "1 flat head d_head"]:
    """Mix the memories' values for every bundle."""
    parts = q[0].split([len(bundle.rows) for bundle in bundles], dim=1)
    mixed = [_attend(bundle, attn, part) for bundle, part in zip(bundles, parts, strict=True)]
    return torch.cat(mixed, dim=1).transpose(0, 1)[None]


def _attend(
    bundle: Bundle, attn: CrossAttention, q: Float[Tensor, "head flat d_head"]
) -> Float[Tensor, "head flat d_head"]:
    """Attention over the base's memory; then, of cells that have another, over theirs."""
    assert bundle.record.memory is not None
    memory = bundle.record.memory[bundle.layer]
    if bundle.is_base and all(placed.mark.site in _BEHIND for placed in bundle.marks):
        # Every cell has the base's queries: each row once.
        run, first = np.unique(bundle.rows.flat, return_index=True)
        z = _over(memory, attn, q[:, on_device(first, q)], None)
        z = z[:, on_device(np.searchsorted(run, bundle.rows.flat), z)]
    else:
        z = _over(memory, attn, q, bundle)
    return _over_own(bundle, memory, attn, q, z) if bundle.of_memory else z


def _over(
    memory: KeyValue, attn: CrossAttention, q: Float[Tensor, "head flat d_head"],
    bundle: Bundle | None,
) -> Float[Tensor, "head flat d_head"]:  # fmt: skip
    """Attention of all rows, whatever cell they are of, over one memory."""
    edited = [] if bundle is None else bundle.at("cross_attn.pattern")
    edit = partial(_edit_pattern, edited) if edited else None
    by_kv = q.unflatten(0, (len(memory[0]), -1))[:, :, None]
    return mix(by_kv, memory, None, None, attn.scaling, edit).flatten(0, 1)[:, 0]


def _edit_pattern(
    turns: Sequence[Placed], pattern: Float[Tensor, "kv group 1 flat memory_row"]
) -> None:
    """Edit patterns in place."""
    apart = pattern.flatten(0, 1)[:, 0].transpose(0, 1)  # a view: flat head memory_row
    for placed in sorted(turns, key=lambda one: one.turn):
        at = indices(placed.mark, placed.entries, placed.places, pattern)
        new = placed.mark.act(apart[at], placed.entries)
        if new is not None:
            apart[at] = new


def _over_own(
    bundle: Bundle, memory: KeyValue, attn: CrossAttention, q: Float[Tensor, "head flat d_head"],
    z: Float[Tensor, "head flat d_head"],
) -> Float[Tensor, "head flat d_head"]:  # fmt: skip
    """The outputs with those of heads in whose cells keys or values of the memory are edited."""
    cells, kv_heads = _touched(bundle.of_memory, len(memory[0]))
    head_of, cell_of = on_device(kv_heads, q), on_device(cells, q)
    own = [part[head_of] for part in memory]
    place = np.full((len(bundle.rows.counts), len(memory[0])), -1)
    place[cells, kv_heads] = np.arange(len(cells))
    for one in bundle.of_memory:
        values = own[0 if one.mark.site == "cross_attn.k" else 1]
        rows = on_device(one.rows, values)
        if one.mark.units is None:
            pair, rows = on_device(place[one.cells], values), rows[:, None]
        else:
            pair = on_device(place[one.cells, one.mark.units[one.entries]], values)
        new = one.mark.act(values[pair, rows], one.entries)
        if new is not None:
            values[pair, rows] = new
    by_kv = bundle.rows.by_cell(q).unflatten(0, (len(memory[0]), -1))
    queries = by_kv[head_of, :, cell_of]  # pair group row d_head
    keys, values = (part[:, None].expand(-1, queries.shape[1], -1, -1) for part in own)
    mixed = F.scaled_dot_product_attention(queries, keys, values, scale=attn.scaling)
    places = bundle.rows.places_of(cells)  # pair row
    kept = places >= 0
    found = z.unflatten(0, (len(memory[0]), -1)).clone()
    pairs, at = kept.nonzero()
    found[
        on_device(kv_heads[pairs], z), :, on_device(places[kept], z)
    ] = mixed[on_device(pairs, z), :, on_device(at, z)]  # fmt: skip
    return found.flatten(0, 1)


def _touched(
    of_memory: Sequence[InMemory], n_kv: int
) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
    """Cells and kv heads whose keys or values are edited."""
    codes = [np.zeros(0, int)]
    for one in of_memory:
        if one.mark.units is None:
            codes.append((np.unique(one.cells)[:, None] * n_kv + np.arange(n_kv)).ravel())
        else:
            codes.append(np.unique(one.cells * n_kv + one.mark.units[one.entries]))
    cells, heads = np.divmod(np.unique(np.concatenate(codes)), n_kv)
    return cells, heads
