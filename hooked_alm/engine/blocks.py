"""Run of one block over all bundles at once, with their edits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..components.attention import AttentionContext
from ..components.block import Block
from ..hooks import HookPoint
from ..points import SITES, Site
from ..stacks import Stack
from ..turns import restored
from .bundles import Bundle, FlatKeyValue, FlatStream, Placed, indices, rotary_tables
from .memories import attend_memories
from .mixing import attend_all


def run_block(block: Block, stack: Stack, bundles: Sequence[Bundle]) -> list[FlatStream]:
    """The residual stream of every bundle one block of a stack deeper, edits applied."""
    # All rows of all cells run as one prompt. Norms, projections and MLP treat a row by itself;
    # attention alone must know which rows belong together, so it mixes by ``_attend_all``.
    streams = torch.cat([bundle.resid for bundle in bundles])[None]
    rows = [(bundle.record, bundle.rows.flat) for bundle in bundles]
    context = AttentionContext(
        rotary=rotary_tables(rows, streams.device),
        kernel_masks={},
        additive_masks={},
        attend=partial(attend_all, bundles, stack, block),
        attend_memory=partial(attend_memories, bundles),
    )
    # A group writes resid_pre itself, on entering the block; keys and values that a bundle was
    # given have their edits already.
    inside: list[tuple[Site, ...]] = [
        tuple(
            site for site in SITES
            if site != "resid_pre" and not site.endswith("pattern")
            and not (bundle.own and site in ("k", "v"))
        )
        for bundle in bundles
    ]  # fmt: skip
    with _edits_attached(block, bundles, inside):
        out = block(streams, context)[0]
    return list(out.split([len(bundle.rows) for bundle in bundles]))


def own_key_values(block: Block, bundle: Bundle) -> FlatKeyValue:
    """Keys and values of the rows of a bundle, edits applied."""
    rotary = rotary_tables([(bundle.record, bundle.rows.flat)], bundle.resid.device)
    with _edits_attached(block, [bundle], [("k", "v")]):
        keys, values = block.attn.keys_values(block.ln1(bundle.resid[None]), rotary)
    return keys[0], values[0]


@contextmanager
def _edits_attached(
    block: Block, bundles: Sequence[Bundle], sites: Sequence[tuple[Site, ...]]
) -> Iterator[None]:
    """Attach hooks that act on flat activations, at some sites of every bundle."""
    by_site: dict[Site, dict[int, list[tuple[int, Placed]]]] = {}
    start = 0
    for bundle, some in zip(bundles, sites, strict=True):
        for placed in bundle.at(*some):
            here = by_site.setdefault(placed.mark.site, {})
            here.setdefault(placed.turn, []).append((start, placed))
        start += len(bundle.rows)
    hooks = {
        block.get_submodule(SITES[site].name): _hook([turns[turn] for turn in sorted(turns)])
        for site, turns in by_site.items()
    }

    def detach() -> None:
        for point, hook in hooks.items():
            for key in [key for key, one in point._forward_hooks.items() if one is hook]:
                del point._forward_hooks[key]

    with restored(detach):
        for point, hook in hooks.items():
            point.register_forward_hook(hook)
        yield


def _hook(turns: Sequence[Sequence[tuple[int, Placed]]]) -> Callable[..., Tensor]:
    """Hook that acts for several marks one after the other, each in all bundles at once."""

    def act(point: HookPoint, inputs: object, value: Tensor) -> Tensor:
        flat = value[0]
        is_copied = False
        for parts in turns:
            mark = parts[0][1].mark
            entries = np.concatenate([placed.entries for _, placed in parts])
            places = np.concatenate([start + placed.places for start, placed in parts])
            where = indices(mark, entries, places, flat)
            new = mark.act(flat[where], entries)
            if new is not None:
                # The block may still read the memory that the value is a view of.
                flat = flat if is_copied else flat.clone()
                is_copied = True
                flat[where] = new
        return flat[None]

    return act
