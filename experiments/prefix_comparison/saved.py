"""Is a rebuilt prefix what the real run read? Compared token by token (card M-002-1)."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput

from .items import Saved, StrictRange


def check_saved(
    x: ALMInput,
    offsets: Sequence[tuple[int, int]] | None,
    saved: Saved,
    tokenizer: Any,
    field: str,
) -> None:
    """Compare a rebuilt prefix with what was recorded of the real one.

    Raises:
        InputError: they differ; it names the first token that does, and what either side has there.
    """
    ids = [int(token) for token in x.tokens[0]]
    if saved.token_ids is not None:
        _same(f"{field}.token_ids", saved.token_ids, ids, tokenizer.convert_ids_to_tokens(ids))
    if saved.token_texts is not None:
        # In whichever of two ways they were written down, all of them.
        pieces = tokenizer.convert_ids_to_tokens(ids)
        ways = [[decoded(tokenizer, i) for i in ids], pieces]
        found = [first_difference(saved.token_texts, way) for way in ways]
        agree = [len(ids) + 1 if at is None else at for at in found]
        likelier = max(range(2), key=agree.__getitem__)
        _same(f"{field}.token_texts", saved.token_texts, ways[likelier], ways[likelier])
    if saved.prompt_offsets is not None:
        if offsets is None:
            raise InputError(
                f"{field}.prompt_offsets: an audio prompt has none. Leave the field out"
            )
        _same(f"{field}.prompt_offsets", saved.prompt_offsets, list(offsets), [""] * len(ids))
    for name, ranges in (saved.token_spans or {}).items():
        made = segment_ranges(x, name)
        if [*map(tuple, ranges)] != made:
            raise InputError(
                f"{field}.token_spans.{name}: got {[list(r) for r in ranges]}, the rebuilt prefix "
                f"has {[list(r) for r in made]}. Rebuild the prefix from the run's own record"
            )


def segment_ranges(x: ALMInput, name: str) -> list[StrictRange]:
    """Token ranges of a segment; at the ends, sink and readout count as the segment beside them."""
    if name not in x.spans.ranges:
        return []
    ranges = list(x.spans[name][0])
    last = x.spans.n_pos - 1
    if ranges and ranges[0][0] == 1:
        ranges[0] = (0, ranges[0][1])
    if ranges and ranges[-1][1] == last:
        ranges[-1] = (ranges[-1][0], last + 1)
    return ranges


def first_difference(saved: Sequence[Any] | None, made: Sequence[Any]) -> int | None:
    """Index of the first element that differs or that one side lacks; None for equal lists."""
    pairs = enumerate(zip_longest(saved or [], made))
    return next((index for index, (one, other) in pairs if one != other), None)


def _same(field: str, saved: Sequence[Any], made: Sequence[Any], shown: Sequence[str]) -> None:
    at = first_difference(saved, made)
    if at is None:
        return
    got = repr(saved[at]) if at < len(saved) else "nothing"
    own = f"{made[at]!r} {shown[at]!r}".strip(" '") if at < len(made) else "nothing"
    raise InputError(
        f"{field}: the first token that differs is {at}: the real run has {got}, the rebuilt "
        f"prefix {own} ({len(saved)} and {len(made)} tokens). Rebuild the prefix from the run's "
        "own record"
    )


def decoded(tokenizer: Any, token: int) -> str:
    """One token as text."""
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)
