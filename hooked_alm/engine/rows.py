"""Run of one block over the rows of many cells at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..components.attention import Attention, AttentionContext
from ..components.block import Block
from ..hooks import HookPoint
from ..points import SITES, Site
from ..stacks import Stack
from ..turns import restored
from .cells import Edit, Look
from .record import KeyValue, Record

CellRows = Float[Tensor, "cell row d_model"]
"""The residual stream of some cells at the rows that run."""
OwnKeyValue = tuple[
    Float[Tensor, "kv_head cell own_row d_head"], Float[Tensor, "kv_head cell own_row d_head"]
]


KERNEL_ROWS = 64
"""Rows from which on a cell's attention runs by the fused kernel. Explicit scores against the
kernel, with 12 cells, 800 keys and 8 heads of 64 on a CPU: 12.6 against 14.7 ms at 32 rows, 24.7
against 24.0 at 64, 97 against 48 at 128."""


class Placed(NamedTuple):
    """An edit of a cell, or a look at it, with its places among the rows that run."""

    cell: int
    places: list[int]
    mark: Edit | Look
    kept: Bool[Tensor, " pos"] | None = None
    """True at the positions of the mark that run; None if all do."""

    def act(self, value: Tensor) -> Tensor | None:
        """New values at the places, or None where it only looks."""
        every = value
        if self.kept is not None:
            # ``write`` expects all positions in their order: those that do not run are zeros here,
            # and dropped afterwards.
            every = value.new_zeros(len(self.kept), *value.shape[1:])
            every[self.kept.to(value.device)] = value
        if isinstance(self.mark, Look):
            self.mark.value = every
            return None
        new = self.mark.write(every).to(value.dtype)
        return new if self.kept is None else new[self.kept.to(value.device)]


@dataclass(eq=False)
class Bundle:
    """Cells that compute the same rows of one record, reading the same earlier keys and values."""

    record: Record
    rows: Int[Tensor, " row"]
    """Rows of the record that run."""
    resid: CellRows
    shared: KeyValue
    """Keys and values of rows that no cell changes; read by all cells, held once (rule 3)."""
    shared_rows: Int[Tensor, " key_row"]
    own_rows: Int[Tensor, " own_row"] | None = None
    """Rows whose keys each cell has for itself; None if the shared ones are all there is."""
    own: OwnKeyValue | None = None
    """Keys and values of ``own_rows``; None if they are made of the very rows that run."""
    marks: list[Placed] = field(default_factory=list)

    @property
    def key_rows(self) -> Int[Tensor, " key"]:
        """Rows of the keys that a cell reads: the shared ones, then its own."""
        own = [] if self.own_rows is None else [self.own_rows]
        return torch.cat([self.shared_rows, *own])

    def at(self, *sites: Site) -> list[Placed]:
        """Edits and looks of some sites."""
        return [placed for placed in self.marks if placed.mark.site in sites]


def run_block(block: Block, stack: Stack, bundles: Sequence[Bundle]) -> list[CellRows]:
    """The residual stream of every bundle one block of a stack deeper, edits applied."""
    # All rows of all cells run as one prompt. Norms, projections and MLP treat a row by itself;
    # attention alone must know which rows belong together, so it mixes by ``_attend_all``.
    context = AttentionContext(
        rotary=_rotary(bundles),
        kernel_masks={},
        additive_masks={},
        attend=partial(_attend_all, bundles, stack),
    )
    # A group writes resid_pre itself, on entering the block.
    inside = tuple(site for site in SITES if site != "resid_pre")
    with _edits_attached(block, bundles, inside):
        out = block(_flat(bundles), context)[0]
    return list(pieces(out, bundles))


def own_key_values(block: Block, bundle: Bundle) -> OwnKeyValue:
    """Keys and values of the rows of a bundle, edits applied."""
    with _edits_attached(block, [bundle], ("k", "v")):
        keys, values = block.attn.keys_values(block.ln1(_flat([bundle])), _rotary([bundle]))
    shape = bundle.resid.shape[:2]
    return keys[0].unflatten(1, shape), values[0].unflatten(1, shape)


def _flat(bundles: Sequence[Bundle]) -> Float[Tensor, "1 flat d_model"]:
    return torch.cat([bundle.resid.flatten(0, 1) for bundle in bundles])[None]


def pieces(flat: Tensor, bundles: Sequence[Bundle], dim: int = 0) -> Iterator[Tensor]:
    """The bundles' parts of a flat tensor, cells and rows apart again."""
    sizes = [bundle.resid.shape[:2] for bundle in bundles]
    parts = flat.split([cells * rows for cells, rows in sizes], dim=dim)
    return (part.unflatten(dim, size) for part, size in zip(parts, sizes, strict=True))


def _rotary(bundles: Sequence[Bundle]) -> tuple[Tensor, Tensor]:
    def table(which: int) -> Tensor:
        # Repeated cell by cell, in the order of ``_flat``.
        parts = [b.record.rotary[which][b.rows].repeat(len(b.resid), 1) for b in bundles]
        return torch.cat(parts)[None]

    return table(0), table(1)


@contextmanager
def _edits_attached(
    block: Block, bundles: Sequence[Bundle], sites: tuple[Site, ...]
) -> Iterator[None]:
    """Attach hooks that write edits into flat activations; ``_attend`` edits patterns itself."""
    by_site: dict[Site, list[tuple[int, Placed]]] = {}
    start = 0
    for bundle in bundles:
        n_cells, n_rows = bundle.resid.shape[:2]
        for placed in bundle.at(*sites):
            if placed.mark.site != "pattern":
                # Where the cell's rows begin among those of all cells.
                first = start + placed.cell * n_rows
                by_site.setdefault(placed.mark.site, []).append((first, placed))
        start += n_cells * n_rows
    hooks = {block.get_submodule(SITES[site].name): _hook(some) for site, some in by_site.items()}

    def detach() -> None:
        for point, hook in hooks.items():
            for key in [key for key, one in point._forward_hooks.items() if one is hook]:
                del point._forward_hooks[key]

    with restored(detach):
        for point, hook in hooks.items():
            point.register_forward_hook(hook)
        yield


def _hook(marks: list[tuple[int, Placed]]) -> Callable[..., Tensor]:
    def act(point: HookPoint, inputs: object, value: Tensor) -> Tensor:
        # The block may still read the memory that the value is a view of.
        value = value.clone()
        for first, placed in marks:
            where = torch.tensor(placed.places, device=value.device) + first
            new = placed.act(value[0, where])
            if new is not None:
                value[0, where] = new
        return value

    return act


def _attend_all(
    bundles: Sequence[Bundle],
    stack: Stack,
    attn: Attention,
    q: Float[Tensor, "1 head flat d_head"],
    k: Float[Tensor, "1 kv_head flat d_head"],
    v: Float[Tensor, "1 kv_head flat d_head"],
) -> Float[Tensor, "1 flat head d_head"]:
    """Mix values for every bundle, each over the keys that its cells see."""
    parts = (pieces(heads[0], bundles, dim=1) for heads in (q, k, v))
    mixed = [
        _attend(bundle, stack, attn, queries, (keys, values)).flatten(1, 2)
        for bundle, queries, keys, values in zip(bundles, *parts, strict=True)
    ]
    return torch.cat(mixed, dim=1).transpose(0, 1)[None]


def _attend(
    bundle: Bundle,
    stack: Stack,
    attn: Attention,
    q: Float[Tensor, "head cell row d_head"],
    fresh: OwnKeyValue,
) -> Float[Tensor, "head cell row d_head"]:
    """Attention over the shared keys and the cell's own, the shared ones once for all cells."""
    own = None if bundle.own_rows is None else bundle.own or fresh
    visible = _visible(bundle, stack, attn.sliding_window).to(q.device)
    if len(bundle.rows) >= KERNEL_ROWS and not bundle.at("pattern"):
        return _by_kernel(q, bundle.shared, own, visible, attn.scaling)
    # Explicit scores, by the formula and in the precision of Hugging Face's eager attention. The
    # queries of all cells meet the shared keys in one product (rule 3), their own keys in another;
    # the softmax is over both.
    keys, values = bundle.shared
    n_kv, n_shared = keys.shape[:2]
    by_kv = q.unflatten(0, (n_kv, -1))  # kv_head group cell row d_head
    scores = by_kv.flatten(1, 3) @ keys.transpose(1, 2)
    scores = scores.unflatten(1, by_kv.shape[1:4])
    if own is not None:
        scores = torch.cat([scores, torch.einsum("kgcre,kcse->kgcrs", by_kv, own[0])], dim=-1)
    scores.mul_(attn.scaling).masked_fill_(~visible, torch.finfo(scores.dtype).min)
    pattern = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    for placed in bundle.at("pattern"):
        _edit_pattern(pattern[:, :, placed.cell], bundle, placed)
    z = (pattern[..., :n_shared].flatten(1, 3) @ values).unflatten(1, by_kv.shape[1:4])
    if own is not None:
        z = z + torch.einsum("kgcrs,kcse->kgcre", pattern[..., n_shared:], own[1])
    return z.flatten(0, 1)


def _by_kernel(
    q: Float[Tensor, "head cell row d_head"],
    shared: KeyValue,
    own: OwnKeyValue | None,
    visible: Bool[Tensor, "row key"],
    scaling: float,
) -> Float[Tensor, "head cell row d_head"]:
    """Attention of a bundle by the fused kernel, which holds no scores.

    The kernel wants all keys of a cell in one piece: worth a copy where many rows read them.
    """
    n_groups, n_cells = q.shape[0] // shared[0].shape[0], q.shape[1]
    if own is None:  # all cells read the same keys: their rows are queries of one run
        q, visible = q.flatten(1, 2)[:, None], visible.repeat(n_cells, 1)
        keys, values = (part[:, None] for part in shared)
    else:
        keys, values = (
            torch.cat([part[:, None].expand(-1, n_cells, -1, -1), mine], dim=2)
            for part, mine in zip(shared, own, strict=True)
        )
    keys, values = (part.repeat_interleave(n_groups, 0) for part in (keys, values))
    z = F.scaled_dot_product_attention(
        q.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1),
        attn_mask=visible, scale=scaling,
    ).transpose(0, 1)  # fmt: skip
    return z if own is not None else z[:, 0].unflatten(1, (n_cells, -1))


def _visible(bundle: Bundle, stack: Stack, window: int | None) -> Bool[Tensor, "row key"]:
    """True where a row that runs attends to a key."""
    keys = bundle.key_rows
    seen = stack.sees(bundle.rows[:, None], keys)
    if window is None:
        return seen
    # Windows count padded positions, as the masks of a whole run do.
    at, key_at = bundle.record.where[bundle.rows, None], bundle.record.where[keys]
    return seen & (key_at > at - window)


def _edit_pattern(
    pattern: Float[Tensor, "kv_head group row key"], bundle: Bundle, placed: Placed
) -> None:
    """Edit one cell's pattern in place, spread out over the keys of the padded prompt meanwhile."""
    n_kv, n_groups, n_rows = pattern.shape[:3]
    padded = pattern.new_zeros(n_rows, n_kv * n_groups, bundle.record.n_pos)
    where = bundle.record.where[bundle.key_rows]
    padded[..., where] = pattern.flatten(0, 1).transpose(0, 1)
    new = placed.act(padded[placed.places])
    if new is not None:
        padded[placed.places] = new
    edited = padded[..., where].transpose(0, 1)
    pattern.copy_(edited.unflatten(0, (n_kv, n_groups)))
