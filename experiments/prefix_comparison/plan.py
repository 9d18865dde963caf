"""Teacher forcing: a prefix and the continuation as one run, and runs changed in one respect.

Prefix and continuation are joined as ids (defect C39), so that both conditions predict the same
tokens. Position modes match the length of two prefixes; interventions replace the content of one
segment by as many tokens. Source: cards M-002-2, M-002-13 and M-002-14.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.spans import SPAN_NAMES, Range, as_ranges

from .items import Condition
from .prompts import Prefix, PreparedItem, silence_like
from .settings import PosMode, PrefixComparisonConfig, PrefixControl


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixRun:
    """A prefix with its continuation, one row."""

    name: str
    x: ALMInput
    start: int
    """Position of the continuation's first token."""

    @property
    def targets(self) -> Int[Tensor, " token"]:
        """The continuation's tokens."""
        ids = self.x.tokens if self.x.text_tokens is None else self.x.text_tokens
        return ids[0, self.start :]

    @property
    def queries(self) -> Int[Tensor, " token"]:
        """For each token of the continuation, the position that predicts it: the one before."""
        return torch.arange(self.start, self.x.shape[1]) - 1


def teacher_forced(name: str, prefix: ALMInput, continuation: Sequence[int]) -> PrefixRun:
    """A prefix followed by the continuation's ids; these are the segment ``prior_output``."""
    ids = torch.tensor([list(continuation)], device=prefix.device)
    x, start = prefix.extend(ids), prefix.shape[1]
    spans = {**prefix.spans.ranges, "prior_output": [[(start, x.shape[1])]]}
    return PrefixRun(name=name, x=replace(x, spans=replace(x.spans, ranges=spans)), start=start)


def joined_as_text(
    model: HookedALM, name: str, condition: Condition, prefix: Prefix, continuation: str
) -> PrefixRun:
    """As the seed document may be read: the tokens of the joined text (defect C39).

    The continuation begins where the prefix alone would end.

    Raises:
        InputError: no token is left to predict.
    """
    start = len(prefix.ids)
    if prefix.text is not None:
        encoded = model.tokenizer(prefix.text + continuation, add_special_tokens=False)
        ids = torch.tensor([encoded["input_ids"]])
        whole = model.encode(input_ids=ids, attention_mask=torch.ones_like(ids))
    else:
        given = condition.segments or ([("text", condition.text)] if condition.text else None)
        heard = [list(prefix.x.clips)] if prefix.x.clips else None
        whole = model.prepare(heard, segments=given, answer_prefix=continuation)
    if whole.shape[1] <= start:
        raise InputError(
            f"joining {name} and its continuation as text: got {whole.shape[1]} tokens for a "
            f"prefix of {start}; all of the continuation merges into it. Use concatenate=ids"
        )
    spans = {**prefix.x.spans.ranges, "prior_output": [[(start, whole.shape[1])]]}
    return PrefixRun(
        name=name,
        x=replace(whole, spans=replace(whole.spans, ranges=spans)),
        start=start,
    )


# --- Position modes


def matched(run: PrefixRun, n: int, mode: PosMode, model: HookedALM, filler: str) -> PrefixRun:
    """A run whose continuation stands ``n`` positions later.

    ``left_pad``: behind masked pads, all position ids moved; under rotary embeddings nothing
    changes (defect C5). ``gap``: position ids jump before the readout, so that every query of the
    continuation is farther from the prefix. ``filler``: attended neutral tokens behind the first.
    """
    x = run.x
    at = {"left_pad": 0, "gap": run.start - 1, "filler": 1}[mode]
    if mode == "gap":
        later = torch.arange(x.shape[1], device=x.device) >= at
        moved = replace(x, position_ids=x.position_ids + n * later)
        return replace(run, x=moved, name=mode)
    padding = model.tokenizer.pad_token_id
    ids = (
        filler_ids(model, filler, n)
        if mode == "filler"
        else [0 if padding is None else padding] * n
    )
    return PrefixRun(
        name=mode, x=_inserted(x, at, ids, is_seen=mode == "filler"), start=run.start + n
    )


def _inserted(x: ALMInput, at: int, ids: Sequence[int], *, is_seen: bool) -> ALMInput:
    n = len(ids)

    def widened(values: Tensor, new: Any) -> Tensor:
        new = torch.as_tensor(new, dtype=values.dtype, device=values.device).expand(1, n)
        return torch.cat([values[:, :at], new, values[:, at:]], dim=1)

    def moved(old: Sequence[Range]) -> list[Range]:
        positions = (pos for start, stop in old for pos in range(start, stop))
        return as_ranges(pos + n * (pos >= at) for pos in positions)

    ranges: dict[str, list[list[Range]]] = {name: [moved(x.spans[name][0])] for name in x.spans}
    clips = [[moved(clip) for clip in x.spans.clips[0]]] if x.spans.clips else ()
    if is_seen:
        ranges["filler"] = [[(at, at + n)]]
    before, after = x.position_ids[..., :at], x.position_ids[..., at:] + n
    new_ids = torch.arange(at, at + n, device=x.device).expand(*before.shape[:-1], n)
    return replace(
        x,
        tokens=widened(x.tokens, [list(ids)]),
        attention_mask=widened(x.attention_mask, int(is_seen)),
        # Explicit: pads, too, shift what comes after them.
        position_ids=torch.cat([before, new_ids, after], dim=-1),
        spans=replace(x.spans, ranges=ranges, n_pos=x.shape[1] + n, clips=clips),
    )


def filler_ids(model: HookedALM, filler: str, n: int) -> list[int]:
    """The filler's tokens, repeated to ``n``.

    Raises:
        InputError: it has no token.
    """
    ids = model.tokenizer(filler, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"filler: got {filler!r}, which has no token. Choose another text.")
    return list(islice(cycle(ids), n))


# --- Content interventions


def interventions(
    model: HookedALM,
    items: Sequence[PreparedItem],
    index: int,
    run: PrefixRun,
    segment: str,
    config: PrefixComparisonConfig,
) -> tuple[list[PrefixRun], dict[str, str]]:
    """The run of one item with other content in a segment, and why some cannot be made.

    Args:
        model: whose tokenizer and front-end make the new content.
        items: all of them; ``wrong_task`` borrows from the next one that fits.
        index: of the item.
        run: of the item under condition a; its ``name`` is the condition's.
        segment: of the prefix; ``audio`` has its clips exchanged, any other its tokens.
        config: which interventions, the filler, and the segment that ``repeat_spec`` repeats.
    """
    made: list[PrefixRun] = []
    left_out: dict[str, str] = {}
    for kind in config.interventions:
        try:
            if segment == "audio":
                changed = _with_clips(model, items, index, run, kind, config)
            else:
                changed = _with_tokens(model, items, index, run, kind, segment, config)
        except _NotPossibleError as error:
            left_out[kind] = str(error)
        else:
            made.append(replace(run, name=f"{kind} {segment}", x=changed))
    return made, left_out


class _NotPossibleError(Exception):
    """An intervention that this item does not allow."""


def _with_tokens(
    model: HookedALM,
    items: Sequence[PreparedItem],
    index: int,
    run: PrefixRun,
    kind: PrefixControl,
    segment: str,
    config: PrefixComparisonConfig,
) -> ALMInput:
    x = run.x
    positions = _positions(x, segment)
    own = x.tokens[0, positions].tolist()
    if kind == "original":
        new = own
    elif kind == "neutral":
        new = filler_ids(model, config.filler, len(own))
    else:
        is_repeat = kind == "repeat_spec"
        source = (
            x.tokens[0, _positions(x, config.spec)].tolist()
            if is_repeat
            else _borrowed(items, index, run.name, segment)
        )
        if not source:
            what = f"segment {config.spec!r} to repeat" if is_repeat else "other content to borrow"
            raise _NotPossibleError(f"there is no {what}")
        new = list(islice(cycle(source), len(own)))
    tokens = x.tokens.clone()
    tokens[0, positions] = torch.tensor(new, dtype=tokens.dtype, device=tokens.device)
    return replace(x, tokens=tokens)


def _positions(x: ALMInput, segment: str) -> list[int]:
    return x.spans.positions(segment, 0) if segment in x.spans.ranges else []


def _others(items: Sequence[PreparedItem], index: int) -> list[PreparedItem]:
    """The items after this one, then those before it, that continue otherwise."""
    own = items[index].continuation
    return [one for one in [*items[index + 1 :], *items[:index]] if one.continuation != own]


def _borrowed(items: Sequence[PreparedItem], index: int, condition: str, segment: str) -> list[int]:
    own = items[index].prefixes[condition].x
    kept = own.tokens[0, _positions(own, segment)].tolist()
    for one in _others(items, index):
        x = one.prefixes[condition].x
        found = x.tokens[0, _positions(x, segment)].tolist()
        if found and found != kept:
            return found
    return []


def _with_clips(
    model: HookedALM,
    items: Sequence[PreparedItem],
    index: int,
    run: PrefixRun,
    kind: PrefixControl,
    config: PrefixComparisonConfig,
) -> ALMInput:
    x = run.x
    clips: tuple[AudioClip, ...] | None
    if kind == "original":
        clips = x.clips
    elif kind == "neutral":
        paths = items[index].item.conditions[run.name].paths
        clips = tuple(silence_like(model, path, config.truncate) for path in paths)
    elif kind == "repeat_spec":
        raise _NotPossibleError("audio has no text to repeat")
    else:
        lengths = [clip.n_tokens for clip in x.clips]
        others = (other.prefixes[run.name].x.clips for other in _others(items, index))
        clips = next((c for c in others if [clip.n_tokens for clip in c] == lengths), None)
        if clips is None:
            raise _NotPossibleError("no other item continues otherwise after audio as long")
    return replace(x, clips=clips)


def position_runs(x: ALMInput) -> list[list[int]]:
    """Position ids as half-open ranges ``[start, stop]``, consecutive ones joined."""
    ids = x.position_ids.reshape(-1, x.shape[1])[0].tolist()  # of three rotary axes, the first
    runs: list[list[int]] = []
    for position in ids:
        if runs and runs[-1][1] == position:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    return runs


def partition(run: PrefixRun) -> list[str]:
    """Segments of a run in the order in which they first occur; they cover every real position."""
    first = {
        name: min(start for start, _ in run.x.spans[name][0])
        for name in run.x.spans
        if run.x.spans[name][0]
    }
    return sorted(first, key=lambda name: (first[name], name in SPAN_NAMES))
