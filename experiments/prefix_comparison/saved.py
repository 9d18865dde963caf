"""Is a rebuilt prefix what the real run read? Compared token by token (card M-002-1)."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput

from .items import Saved, StrictRange

CURE = "Rebuild the prefix from the run's own record"


def check_saved(
    x: ALMInput, offsets: Sequence[tuple[int, int]] | None, saved: Saved, tokenizer: Any, field: str
) -> None:
    """Compares a rebuilt prefix with what was recorded of the real one.

    Raises:
        InputError: they differ; it names the first token that does, and what either side has there.
    """
    if saved.prompt_offsets is not None and offsets is None:
        raise InputError(f"{field}.prompt_offsets: an audio prompt has none. Leave the field out")
    ids = x.tokens[0].tolist()
    pieces = tokenizer.convert_ids_to_tokens(ids)
    # Texts were written down in one of two ways, all of them.
    texts = [[decoded(tokenizer, token) for token in ids], pieces]
    for name, ways in (("token_ids", [ids]), ("token_texts", texts), ("prompt_offsets", [offsets])):
        recorded = getattr(saved, name)
        if recorded is not None and recorded not in ways:
            raise InputError(f"{field}.{name}: {_difference(recorded, ways, pieces)}. {CURE}")
    for name, ranges in (saved.token_spans or {}).items():
        made = _segment_ranges(x, name)
        if ranges != made:
            raise InputError(
                f"{field}.token_spans.{name}: got {[list(r) for r in ranges]}, the rebuilt prefix "
                f"has {[list(r) for r in made]}. {CURE}"
            )


def _segment_ranges(x: ALMInput, name: str) -> list[StrictRange]:
    """Token ranges of a segment; at the ends, sink and readout count as the segment beside them."""
    ranges = list(x.spans[name][0]) if name in x.spans.ranges else []
    last = x.spans.n_pos - 1
    if ranges and ranges[0][0] == 1:
        ranges[0] = (0, ranges[0][1])
    if ranges and ranges[-1][1] == last:
        ranges[-1] = (ranges[-1][0], last + 1)
    return ranges


def _difference(saved: Sequence[Any], ways: Sequence[Any], pieces: Sequence[str]) -> str:
    """The first token that differs, by the way that agrees the longest."""
    pairs = [enumerate(zip_longest(saved, made)) for made in ways]
    differ = [next(i for i, (one, own) in some if one != own) for some in pairs]
    at = max(differ)
    made = ways[differ.index(at)]
    got = repr(saved[at]) if at < len(saved) else "nothing"
    own = f"{made[at]!r} ({pieces[at]!r})" if at < len(made) else "nothing"
    return (
        f"the first token that differs is {at}: the real run has {got}, the rebuilt prefix {own} "
        f"({len(saved)} and {len(made)} tokens)"
    )


def decoded(tokenizer: Any, token: int) -> str:
    """One token as text."""
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)
