"""Which points to keep: patterns on names, and what one row of a point is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...encoder import HookedEncoder
from ...errors import HookNameError, InputError, nearest
from ...model import HookedALM
from ...points import ENCODER, point_of

RowKind = Literal["prompt", "encoder", "module"]
"""What a row is: a position of a prompt, a frame of the hooked audio encoder, or a frame of any
other module's output."""
KINDS: dict[tuple[str, str], RowKind] = {
    ("batch", "pos"): "prompt",
    ("window", "encoder_pos"): "encoder",
}
"""First two axes of a point -> what its rows are."""
MOST_OF_A_RANGE = 10_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class KeptPoint:
    """A point, and the axes of a row of it that are laid side by side."""

    name: str
    kind: RowKind
    shape: tuple[int, ...]
    """Shape of a row: ``(d_model,)``, or ``(head, d_head)``."""

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return width_of(self.shape)


def width_of(shape: Sequence[int]) -> int:
    """Numbers in a row of some shape."""
    width = 1
    for size in shape:
        width *= size
    return width


def kept_points(
    model: HookedALM, patterns: str | Iterable[str] | Sequence[KeptPoint]
) -> list[KeptPoint]:
    """The points of a model that patterns select, in the order of the model; no weight is read.

    Args:
        model: with or without its weights.
        patterns: names, or patterns; see ``select_names``. Points that were selected before are
            given back, which is faster.

    Raises:
        HookNameError: a pattern that matches nothing, or a point that has no row for every position
            of a prompt or of the encoder.
    """
    given = [patterns] if isinstance(patterns, str) else [*patterns]
    if given and all(isinstance(one, KeptPoint) for one in given):
        return [one for one in given if isinstance(one, KeptPoint)]
    shapes = model.hook_shapes()
    plain = [str(one) if _is_pattern(one) else model.resolve(one) for one in given]
    found, refused = [], []
    for name in select_names(plain, shapes):
        reason = _without_rows(model, name)
        if reason is None:
            kind = KINDS[_axes(name)]
            sizes = [axis.rpartition("=")[2] for axis in shapes[name].split()[2:]]
            found.append(KeptPoint(name, kind, tuple(map(int, sizes))))
        else:
            refused.append(f"{name} ({reason})")
    if refused:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise HookNameError(
            f"keeping rows of {', '.join(refused[:4])}{more}: expected points with a row for every "
            "position, such as hook_resid_post or attn.hook_z. Leave them out."
        )
    return found


def select_names(patterns: str | Iterable[str], known: Iterable[str]) -> list[str]:
    """The names that some patterns match, in the order of ``known``.

    A pattern is a name in which ``*`` stands for anything without a dot, ``{0,4}`` for one of some
    texts, and ``{0..4}`` for the numbers from 0 to 4, both included.

    Raises:
        HookNameError: a pattern that matches no name, or is none.
    """
    given, known = [patterns] if isinstance(patterns, str) else [*patterns], [*known]
    chosen: set[str] = set()
    for pattern in given:
        matcher = _compiled(pattern)
        if not (found := {name for name in known if matcher.fullmatch(name)}):
            raise HookNameError(
                f"selecting points with {pattern!r}: it matches none of the {len(known)} names. "
                f"Nearest: {nearest(pattern, known)}. In a pattern, * is anything without a dot, "
                "{0,4} either, {0..4} the numbers from 0 to 4."
            )
        chosen |= found
    if not chosen:
        raise HookNameError("selecting points: got no names, expected one or more.")
    return [name for name in known if name in chosen]


def split_patterns(text: str) -> list[str]:
    """Patterns that commas separate, but for the commas between braces."""
    return [part for one in re.split(r",(?![^{]*\})", text) if (part := one.strip())]


def _is_pattern(name: object) -> bool:
    return isinstance(name, str) and bool(re.search(r"[*{}]", name))


def _compiled(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise HookNameError(f"selecting points with {pattern!r}: expected a name or a pattern.")
    parts = re.split(r"(\*|\{[^{}]*\})", pattern)
    if any(brace in part for part in parts[::2] for brace in "{}"):
        raise HookNameError(f"selecting points with {pattern!r}: got a brace without its other.")
    texts = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            texts.append(re.escape(part))
        elif part == "*":
            texts.append(r"[^.]*")
        else:
            texts.append(_either(pattern, part[1:-1]))
    return re.compile("".join(texts))


def _either(pattern: str, inside: str) -> str:
    """What ``{...}`` stands for, as a regular expression."""
    every: list[str] = []
    for one in inside.split(","):
        if numbers := _RANGE.fullmatch(one.strip()):
            first, last = int(numbers[1]), int(numbers[2])
            if not 0 <= last - first < MOST_OF_A_RANGE:
                raise HookNameError(
                    f"selecting points with {pattern!r}: got the range {one.strip()}, expected "
                    "numbers from the smaller to the larger."
                )
            every += map(str, range(first, last + 1))
        else:
            every.append(re.escape(one.strip()))
    return f"(?:{'|'.join(every)})"


def _axes(name: str) -> tuple[str, str]:
    """The first two axes of a point; a missing one is empty."""
    first, second, *_ = [*point_of(name).axes.split(), "", ""]
    return first, second


def _without_rows(model: HookedALM, name: str) -> str | None:
    """Why a point has no row for every position, or None."""
    axes = point_of(name).axes.split()
    if {"key_pos", "encoder_key_pos", "memory_pos"} & {*axes[2:]}:
        return "it has two axes of positions"
    if _axes(name) not in KINDS:
        # What is heard arrives in the prompt, at hook_embed.
        return f"its axes are {' '.join(axes)}"
    if len(axes) == 2:
        return "it holds no activation"
    encoder = hooked_encoder(model)
    is_shorter = encoder is not None and (encoder.cfg.pooling > 1 or encoder.is_packed)
    if name.startswith(f"{ENCODER}ln_final.") and is_shorter:
        return "it comes behind a pooling, which leaves fewer positions than the blocks have"
    return None


def hooked_encoder(model: HookedALM) -> HookedEncoder | None:
    """The model's encoder where its blocks are hooked, or None."""
    return None if model.audio is None else model.audio.hooked_encoder


def spans_by_kind(
    kinds: Iterable[RowKind], spans: Sequence[str], known: Mapping[RowKind, Iterable[str]]
) -> dict[RowKind, list[str]]:
    """Those of the spans that rows of each kind have; ``all`` is every position.

    Raises:
        InputError: a span that no rows have, or rows that have none of them.
    """
    kinds, names = [*kinds], {kind: [*known[kind]] for kind in kinds}
    every = {"all", *(name for some in names.values() for name in some)}
    if (unknown := [name for name in spans if name not in every]) or not spans:
        raise InputError(
            f"choosing spans: got {', '.join(unknown) or 'none'}, expected some of "
            f"{', '.join(sorted(every))}."
        )
    found = {kind: [one for one in spans if one in ("all", *names[kind])] for kind in kinds}
    for kind in kinds:
        if not found[kind]:
            raise InputError(
                f"choosing spans of {kind} points: got {', '.join(spans)}, expected some of all, "
                f"{', '.join(sorted(names[kind]))}. Name one, or leave these points out."
            )
    return found
