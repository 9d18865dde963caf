"""Blocks of an adapter switched on and off, one by one and in every combination."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import hook_name
from ..result import MethodResult
from .updates import block_updates

SwitchReading = Literal["denoise", "noise"]
"""``denoise``: one block's update on, all others off; what it suffices for. ``noise``: its update
off, all others on; what needs it."""
ReadLogits = Callable[[Float[Tensor, "batch vocab"]], Float[Tensor, "batch value"]]
"""What is kept of the logits at every prompt's readout."""
MOST_COMBINED = 12
"""Blocks whose combinations are all run: 2 ** 13 blocks."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SwitchedBlocks(MethodResult):
    """What is read of the base, of the whole adapter, and with one block switched."""

    blocks: Int[np.ndarray, " block"]
    """Blocks that have an update."""
    off: Float[Tensor, "batch value"]
    """Of the base model: no update acts."""
    on: Float[Tensor, "batch value"]
    """Of the whole adapter."""
    denoise: Float[Tensor, "block batch value"]
    noise: Float[Tensor, "block batch value"]
    erased: Float[Tensor, "block batch value"]
    """With the updates of a block and of all below it off; the last is the base."""
    resumed: Float[Tensor, "batch value"]
    """Of the whole adapter, gone on with at the block in the middle: the same as ``on``."""


def adapted_blocks(model: HookedALM) -> list[int]:
    """Blocks of the path in use that have an update of their own.

    Raises:
        InputError: no adapter is kept apart in any of them.
    """
    found = sorted({one.block for one in block_updates(model)})
    if not found:
        raise InputError(
            "switching an adapter block by block: the model has no update in its blocks, or it is "
            "merged. Load it with from_pretrained(..., lora=folder, merge_lora=False)."
        )
    return found


@contextmanager
def switched(model: HookedALM, on: Sequence[int]) -> Iterator[None]:
    """Updates of some blocks act, and no others; afterwards what acted before.

    Updates that belong to no block of the path, such as an encoder's, are left as they are.
    """
    adapted_blocks(model)  # there are some
    own = [(one.update, one.block) for one in block_updates(model)]
    before = [update.is_on for update, _ in own]
    with model.turn:
        for update, number in own:
            update.is_on = number in on
    try:
        yield
    finally:
        with model.turn:
            for (update, _), was_on in zip(own, before, strict=True):
                update.is_on = was_on


@torch.no_grad()
def switch_blocks(model: HookedALM, x: ALMInput, read: ReadLogits) -> SwitchedBlocks:
    """What is read when one block's update is switched on alone, off alone, or off with all below.

    Below a block that is switched nothing changes, so its run goes on from the stream that enters
    it: bit for bit what the whole run gives, at half its cost. An update that only stands in the
    encoder or the projector acts throughout.

    Args:
        model: with an adapter kept apart.
        x: prompts.
        read: of logits ``[batch, vocab]`` at the readouts; such as scores of labels.

    Source: M-LO-4, M-LO-8.

    Raises:
        InputError: no block has an update.
    """
    blocks = adapted_blocks(model)
    names = [hook_name("resid_pre", model.path[number]) for number in blocks]
    at = torch.tensor([x.spans.positions("readout", row)[-1] for row in range(len(x))])
    rows = torch.arange(len(x))

    def whole(on: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        with switched(model, on):
            logits, kept = model.run_with_cache(x, names_filter=names, return_cache_object=False)
        return read(logits[rows, at.to(logits.device)]), [kept[name] for name in names]

    def from_block(block: int, stream: Tensor, on: Sequence[int]) -> Tensor:
        with switched(model, on):
            logits = model(stream, start_at_layer=block, inputs=x)
        return read(logits[rows, at.to(logits.device)])

    off, plain = whole([])
    on, adapted = whole(blocks)
    denoise = [
        from_block(block, stream, [block]) for block, stream in zip(blocks, plain, strict=True)
    ]
    noise = [
        from_block(block, stream, [one for one in blocks if one != block])
        for block, stream in zip(blocks, adapted, strict=True)
    ]
    erased = [
        from_block(block, stream, blocks[n + 1 :])
        for n, (block, stream) in enumerate(zip(blocks, plain, strict=True))
    ]
    middle = len(blocks) // 2
    return SwitchedBlocks(
        blocks=np.array(blocks), off=off, on=on, denoise=torch.stack(denoise),
        noise=torch.stack(noise), erased=torch.stack(erased),
        resumed=from_block(blocks[middle], adapted[middle], blocks),
    )  # fmt: skip


@torch.no_grad()
def every_combination(
    model: HookedALM, x: ALMInput, read: ReadLogits
) -> dict[frozenset[int], Float[Tensor, "batch value"]]:
    """What is read with every set of blocks on; streams below a block are shared by all above it.

    2 ** (n + 1) blocks run for n blocks with an update, in place of 2 ** n forwards.

    Args:
        model: with an adapter kept apart.
        x: prompts.
        read: of logits at the readouts, as in ``switch_blocks``.

    Raises:
        InputError: no block has an update, or more than 12 have one.
    """
    blocks = adapted_blocks(model)
    if len(blocks) > MOST_COMBINED:
        raise InputError(
            f"running every combination of an adapter's blocks: got {len(blocks)} blocks with an "
            f"update, expected {MOST_COMBINED} at most, of which there are "
            f"{2**MOST_COMBINED}. Switch them one by one: switch_blocks."
        )
    at = torch.tensor([x.spans.positions("readout", row)[-1] for row in range(len(x))])
    rows, found, n_blocks = torch.arange(len(x)), dict[frozenset[int], Tensor](), len(model.path)

    def run(stream: Tensor, first: int, on: frozenset[int]) -> None:
        """All sets that agree with `on` below a block, from the stream that enters it."""
        if first == n_blocks:
            found[on] = read(unembedded(stream))
            return
        for also in (False, True) if first in blocks else (False,):
            now = on | {first} if also else on
            with switched(model, [*now]):
                out = model(stream, start_at_layer=first, stop_at_layer=first + 1, inputs=x)
            run(out, first + 1, now)

    def unembedded(stream: Tensor) -> Tensor:
        logits: Tensor = model(stream, start_at_layer=n_blocks, inputs=x)
        return logits[rows, at.to(logits.device)]

    run(model(x, stop_at_layer=0), 0, frozenset())
    return found


def shapley_values(
    worth: dict[frozenset[int], Float[Tensor, "batch value"]],
) -> dict[int, Float[Tensor, "batch value"]]:
    """Each block's share of what all of them do together: its mean gain over all orders.

    They add up to the worth of all minus that of none.

    Args:
        worth: what is read for every set of blocks.

    Source: Shapley 1953; M-LO-8.
    """
    players = sorted(frozenset[int]().union(*worth))
    n = len(players)
    found = {}
    for player in players:
        others = [one for one in players if one != player]
        gains = [
            math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            * (worth[frozenset(some) | {player}] - worth[frozenset(some)])
            for size in range(n)
            for some in itertools.combinations(others, size)
        ]  # fmt: skip
        found[player] = torch.stack(gains).sum(0)
    return found
