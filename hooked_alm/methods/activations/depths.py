"""Where points stand: which of them belong to one curve, and how many blocks each has behind it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...model import HookedALM
from ...points import ENCODER, hook_name
from .selection import KeptPoint, hooked_encoder, kept_points

_IN_BLOCK = re.compile(r"(.*blocks)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class PlacedPoint:
    """A point of a stream, such as the decoder's, at a depth."""

    name: str
    stream: str
    """``decoder``, ``encoder``, or the point in the block behind it: ``decoder attn.hook_z``."""
    depth: int
    """Blocks passed, that of the point included where the point holds what the block made."""


def placed_points(
    model: HookedALM, patterns: Sequence[str] | None = None
) -> tuple[list[KeptPoint], list[PlacedPoint]]:
    """Points with where they stand; what leaves a block and what the next one gets are read once.

    Args:
        model: with or without its weights.
        patterns: see ``kept_points``; None is the decoder's stream and, where it is hooked, the
            audio encoder's, at every depth.

    Raises:
        HookNameError: see ``kept_points``.
    """
    passed = {block: number for number, block in enumerate(model.path)}
    found: dict[tuple[str, int], tuple[KeptPoint, PlacedPoint]] = {}
    for point in kept_points(model, _streams(model) if patterns is None else [*patterns]):
        place = _place(point.name, passed)
        found.setdefault((place.stream, place.depth), (point, place))
    return [point for point, _ in found.values()], [place for _, place in found.values()]


def _streams(model: HookedALM) -> list[str]:
    stacks = [model.path]
    if (encoder := hooked_encoder(model)) is not None:
        stacks.append(tuple(f"{ENCODER}blocks.{i}" for i in range(encoder.cfg.n_layers)))
    names = []
    for blocks in stacks:
        names += [hook_name("resid_pre", blocks[0]), *(hook_name("resid_post", b) for b in blocks)]
    return names


def _place(name: str, passed: dict[str, int]) -> PlacedPoint:
    if (found := _IN_BLOCK.fullmatch(name)) is None:
        return PlacedPoint(name, name, 0)
    stack, number, point = found.groups()
    block = passed.get(f"{stack}.{number}", int(number))
    depth = block if point == "hook_resid_pre" else block + 1
    stream = "encoder" if stack.startswith(ENCODER) else "decoder"
    if point not in ("hook_resid_pre", "hook_resid_post"):
        stream = f"{stream} {point}"
    return PlacedPoint(name, stream, depth)
