"""Teacher forcing: a prefix and the continuation as one run, and runs changed in one respect.

Prefix and continuation are joined as ids (defect C39), so that both conditions predict the same
tokens. Position modes match the length of two prefixes; interventions replace the content of one
segment by as many tokens. Source: cards M-002-2, M-002-13 and M-002-14.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.spans import Range, as_ranges

from ..materials.stand_ins import silence_like
from .prompts import PreparedItem, as_input
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


def positions_of(x: ALMInput, segment: str) -> list[int]:
    """Positions of a segment; none where the input lacks it."""
    return x.spans.positions(segment, 0) if segment in x.spans.ranges else []


def teacher_forced(name: str, prefix: ALMInput, continuation: Sequence[int]) -> PrefixRun:
    """A prefix followed by the continuation's ids; these are the segment ``prior_output``."""
    ids = torch.tensor([list(continuation)], device=prefix.device)
    return _run(name, prefix.extend(ids), prefix)


def joined_as_text(model: HookedALM, one: PreparedItem, name: str) -> PrefixRun:
    """The run as the seed document may be read: tokens of the joined text (defect C39).

    The continuation begins where the prefix alone would end.

    Raises:
        InputError: no token is left to predict.
    """
    prefix, continuation = one.prefixes[name], one.item.continuation
    if prefix.text is not None:
        encoded = model.tokenizer(prefix.text + continuation, add_special_tokens=False)
        whole = as_input(model, encoded["input_ids"])
    else:
        heard = [list(prefix.x.clips)] if prefix.x.clips else None
        asked = one.item.conditions[name].asked
        whole = model.prepare(heard, segments=asked, answer_prefix=continuation)
    start = prefix.x.shape[1]
    if whole.shape[1] <= start:
        raise InputError(
            f"joining {name} and its continuation as text: got {whole.shape[1]} tokens for a "
            f"prefix of {start}; all of the continuation merges into it. Use concatenate=ids"
        )
    return _run(name, whole, prefix.x)


def _run(name: str, whole: ALMInput, prefix: ALMInput) -> PrefixRun:
    start = prefix.shape[1]
    ranges = {**prefix.spans.ranges, "prior_output": [[(start, whole.shape[1])]]}
    x = replace(whole, spans=replace(whole.spans, ranges=ranges))
    return PrefixRun(name=name, x=x, start=start)


# --- Position modes


def matched(run: PrefixRun, n: int, mode: PosMode, model: HookedALM, filler: str) -> PrefixRun:
    """A run whose continuation stands ``n`` positions later.

    ``left_pad``: behind masked pads, all position ids moved; under rotary embeddings nothing
    changes (defect C5). ``gap``: position ids jump before the readout, so that every query of the
    continuation is farther from the prefix. ``filler``: attended neutral tokens behind the first.
    """
    x = run.x
    if mode == "gap":
        later = torch.arange(x.shape[1], device=x.device) >= run.start - 1
        return replace(run, x=replace(x, position_ids=x.position_ids + n * later), name=mode)
    if mode == "filler":
        moved = _inserted(x, 1, filler_ids(model, filler, n), is_seen=True)
    else:
        moved = _inserted(x, 0, [model.tokenizer.pad_token_id or 0] * n, is_seen=False)
    return PrefixRun(name=mode, x=moved, start=run.start + n)


def _inserted(x: ALMInput, at: int, ids: Sequence[int], *, is_seen: bool) -> ALMInput:
    n = len(ids)

    def widened(values: Tensor, new: Any) -> Tensor:
        new = torch.as_tensor(new, dtype=values.dtype, device=values.device)
        new = new.expand(*values.shape[:-1], n)
        return torch.cat([values[..., :at], new, values[..., at:]], dim=-1)

    def moved(old: Sequence[Range]) -> list[Range]:
        return as_ranges(i + n * (i >= at) for start, stop in old for i in range(start, stop))

    ranges: dict[str, list[list[Range]]] = {name: [moved(x.spans[name][0])] for name in x.spans}
    clips = [[moved(clip) for clip in x.spans.clips[0]]] if x.spans.clips else ()
    if is_seen:
        ranges["filler"] = [[(at, at + n)]]
    later = torch.arange(x.shape[1], device=x.device) >= at
    return replace(
        x,
        tokens=widened(x.tokens, list(ids)),
        attention_mask=widened(x.attention_mask, int(is_seen)),
        # Explicit: pads, too, shift what comes after them.
        position_ids=widened(x.position_ids + n * later, range(at, at + n)),
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


@dataclass(frozen=True, eq=False)
class Contents:
    """Other content for a segment of one item's run under condition a."""

    model: HookedALM
    items: Sequence[PreparedItem]
    """Every item: ``wrong_task`` borrows from the next one that fits."""
    index: int
    run: PrefixRun
    """The run of the item at ``index``; its ``name`` is the condition's."""
    segment: str
    """``audio`` has its clips exchanged, any other segment its tokens."""
    config: PrefixComparisonConfig

    def interventions(self) -> tuple[list[PrefixRun], dict[str, str]]:
        """The changed runs, and why some cannot be made."""
        change = self._clips if self.segment == "audio" else self._tokens
        made: list[PrefixRun] = []
        left_out: dict[str, str] = {}
        for kind in self.config.interventions:
            new = change(kind)
            if isinstance(new, str):
                left_out[kind] = new
            else:
                made.append(replace(self.run, name=f"{kind} {self.segment}", x=new))
        return made, left_out

    def _others(self) -> Iterator[ALMInput]:
        """Prefixes of the items after this one, then before it, that continue otherwise."""
        own = self.items[self.index].continuation
        for one in (*self.items[self.index + 1 :], *self.items[: self.index]):
            if one.continuation != own:
                yield one.prefixes[self.run.name].x

    def _tokens(self, kind: PrefixControl) -> ALMInput | str:
        """The run with other tokens, or why there are none."""
        x, spec = self.run.x, self.config.spec
        at = positions_of(x, self.segment)
        own = x.tokens[0, at].tolist()
        if kind == "original":
            new = own
        elif kind == "neutral":
            new = filler_ids(self.model, self.config.filler, len(own))
        elif kind == "repeat_spec":
            new = x.tokens[0, positions_of(x, spec)].tolist()
            if not new:
                return f"there is no segment {spec!r} to repeat"
        else:
            others = (o.tokens[0, positions_of(o, self.segment)].tolist() for o in self._others())
            new = next((ids for ids in others if ids and ids != own), [])
            if not new:
                return "there is no other content to borrow"
        tokens = x.tokens.clone()
        tokens[0, at] = tokens.new_tensor(list(islice(cycle(new), len(own))))
        return replace(x, tokens=tokens)

    def _clips(self, kind: PrefixControl) -> ALMInput | str:
        """The run with other clips, or why there are none."""
        x = self.run.x
        if kind == "original":
            return x
        if kind == "repeat_spec":
            return "audio has no text to repeat"
        if kind == "neutral":
            paths, cut = (
                self.items[self.index].item.conditions[self.run.name].audio,
                self.config.truncate,
            )
            silent = [silence_like(self.model, path, truncate=cut) for path in paths]
            return replace(x, clips=tuple(silent))
        lengths = [clip.n_tokens for clip in x.clips]
        for other in self._others():
            if [clip.n_tokens for clip in other.clips] == lengths:
                return replace(x, clips=other.clips)
        return "no other item continues otherwise after audio as long"


def position_runs(x: ALMInput) -> list[list[int]]:
    """Position ids as half-open ranges ``[start, stop]``, consecutive ones joined."""
    ids = x.position_ids.reshape(-1, x.shape[1])[0].tolist()  # of three rotary axes, the first
    return [list(one) for one in as_ranges(ids)]
