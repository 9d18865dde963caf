"""From an item's conditions to prompts, segments, and the check against what the real run saved.

A prompt's positions are partitioned: ``sink`` (the first), ``readout`` (the last), and between them
the item's segments, ``audio`` and ``audio_struct``, and ``struct`` (template).

Source: card M-002-1.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooked_alm import HookedALM
from hooked_alm.audio import read_audio
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.spans import SPAN_NAMES, as_ranges

from ..materials.clip_table import collect
from .items import Condition, PrefixItem, sha256
from .saved import check_saved

ClipsRead = dict[tuple[Path, bool], AudioClip]
"""Clips by file and whether they are silenced."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """A prefix as the model reads it: one row, without padding."""

    x: ALMInput
    offsets: list[tuple[int, int]] | None
    """Character range of each token in the rendered text; None for an audio model's prompt."""
    text: str | None
    """The rendered text; None likewise."""

    @property
    def ids(self) -> list[int]:
        """Token ids, placeholders expanded."""
        return [int(token) for token in self.x.tokens[0]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedItem:
    """An item with its prompts and the tokens of its continuation."""

    item: PrefixItem
    prefixes: dict[str, Prefix]
    continuation: list[int]
    offsets: list[tuple[int, int]]
    """Character range of each of its tokens in the continuation."""


def prepare_items(
    model: HookedALM, items: Sequence[PrefixItem], *, truncate: bool = False
) -> list[PreparedItem]:
    """Every prompt, checked against what was saved of it; a clip is read once.

    Raises:
        InputError: what cannot be built, or differs from what was saved, by line and field.
    """
    if model.tokenizer is None:
        raise InputError(
            f"preparing items for {model.cfg.model_name!r}: its folder has no tokenizer. Add it."
        )
    clips: ClipsRead = {}

    def prepared(item: PrefixItem) -> PreparedItem:
        encoded = model.tokenizer(
            item.continuation, add_special_tokens=False, return_offsets_mapping=True
        )
        if not encoded["input_ids"]:
            raise InputError(f"continuation: got {item.continuation!r}, which has no token")
        one = PreparedItem(
            item=item,
            prefixes={
                name: _prefix(model, name, condition, clips, truncate)
                for name, condition in item.conditions.items()
            },
            continuation=list(encoded["input_ids"]),
            offsets=[(a, b) for a, b in encoded["offset_mapping"]],
        )
        _check_length(model, one)
        return one

    return collect("preparing items", prepared, items, lambda item: item.where or item.id)


def _check_length(model: HookedALM, one: PreparedItem) -> None:
    longest = max(one.prefixes, key=lambda name: one.prefixes[name].x.shape[1])
    n = one.prefixes[longest].x.shape[1] + len(one.continuation)
    if n > model.cfg.n_ctx:
        raise InputError(
            f"conditions.{longest}: got {n} tokens with the continuation, expected at most "
            f"{model.cfg.n_ctx}, which the model was made for. Leave the item out, or shorten it"
        )


def _prefix(
    model: HookedALM, name: str, condition: Condition, clips: ClipsRead, truncate: bool
) -> Prefix:
    field = f"conditions.{name}"
    try:
        if condition.prefix is not None:
            made = _tokenised(model, "".join(text for _, text in condition.prefix))
            prefix = _with_segments(made, _ends(condition.prefix))
        elif condition.messages is not None:
            prefix = _chat(model, condition)
        else:
            prefix = _audio_prompt(model, condition, clips, truncate)
    except InputError as error:
        raise InputError(f"{field}: {error}") from error
    if prefix.x.shape[1] < 2:
        raise InputError(f"{field}: got {prefix.x.shape[1]} token, expected two or more")
    if condition.saved is not None:
        check_saved(prefix.x, prefix.offsets, condition.saved, model.tokenizer, f"{field}.saved")
    return prefix


# --- Three ways to make a prompt


def _tokenised(model: HookedALM, text: str) -> Prefix:
    # Nothing is added: what the model read is given whole.
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if not encoded["input_ids"]:
        raise InputError(f"got {text!r}, which has no token")
    ids = torch.tensor([encoded["input_ids"]])
    x = model.encode(input_ids=ids, attention_mask=torch.ones_like(ids))
    return Prefix(x=x, offsets=[(a, b) for a, b in encoded["offset_mapping"]], text=text)


def _ends(segments: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    ends, at = [], 0
    for name, text in segments:
        at += len(text)
        ends.append((name, at))
    return ends


def _with_segments(made: Prefix, ends: Sequence[tuple[str, int]]) -> Prefix:
    """Each token belongs to the segment that its first character stands in."""
    assert made.offsets is not None
    names = [
        next((name for name, end in ends if start < end), ends[-1][0]) for start, _ in made.offsets
    ]
    return replace(made, x=_partitioned(made.x, names))


def _chat(model: HookedALM, condition: Condition) -> Prefix:
    """Messages by the template; a private-use character stands in for each text at first.

    Searching the prompt for the texts would find them in the template, or in each other.
    """
    messages = condition.messages or []
    texts = [message["content"] for message in messages if message.get("content")]
    names = condition.names()
    marks = iter(range(len(texts)))
    marked = [
        {**m, "content": chr(0xE000 + next(marks)) if m.get("content") else m.get("content")}
        for m in messages
    ]
    ends: list[tuple[str, int]] = []
    rendered = ""
    for char in _render(model, marked, condition.tools):
        index = ord(char) - 0xE000
        if 0 <= index < len(texts):
            ends.append(("struct", len(rendered)))
            rendered += texts[index]
            ends.append((names[index], len(rendered)))
        else:
            rendered += char
    ends.append(("struct", len(rendered)))
    if rendered != _render(model, messages, condition.tools):
        raise InputError(
            "messages: got a template that rewrites their text (trims it, perhaps), so that "
            "segments cannot be located. Give the rendered text in prefix"
        )
    return _with_segments(_tokenised(model, rendered), ends)


def _render(model: HookedALM, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
    template = model.prompts.chat_template if model.prompts is not None else None
    if template is None and not getattr(model.tokenizer, "chat_template", None):
        raise InputError("messages: the tokenizer has no chat template. Give prefix instead")
    return model.tokenizer.apply_chat_template(
        [{key: value for key, value in one.items() if key != "segment"} for one in messages],
        tools=tools,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=messages[-1]["role"] != "assistant",
    )


def _audio_prompt(
    model: HookedALM, condition: Condition, clips: ClipsRead, truncate: bool
) -> Prefix:
    heard = [_clip(model, path, condition.silent, clips, truncate) for path in condition.paths]
    segments = condition.segments or ([("text", condition.text)] if condition.text else None)
    x = model.prepare([heard] if heard else None, segments=segments)
    names = ["struct"] * x.shape[1]
    own = list(dict.fromkeys(name for name, _ in segments or [] if name != "text"))
    for name in ("text", "audio_struct", "audio", *own):
        for position in x.spans.positions(name, 0):
            names[position] = name
    return Prefix(x=_partitioned(x, names), offsets=None, text=None)


def _clip(
    model: HookedALM, path: Path, is_silent: bool, clips: ClipsRead, truncate: bool
) -> AudioClip:
    if (path, is_silent) not in clips:
        clips[path, is_silent] = (
            silence_like(model, path, truncate)
            if is_silent
            else model.read_clip(path, truncate=truncate)
        )
    return clips[path, is_silent]


def silence_like(model: HookedALM, path: Path, truncate: bool) -> AudioClip:
    """A clip of zeros, as long as a file."""
    if model.prompts is None:
        raise InputError("silent: the model hears no audio, or its folder has no processor files")
    rate = model.prompts.feature_extractor.sampling_rate
    longest = model.prompts.front_end.tokens.max_seconds
    samples = read_audio(path, sampling_rate=rate, max_seconds=longest, truncate=truncate).samples
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*silent")  # it is meant to be
        clip = model.read_clip((np.zeros_like(samples), rate))
    return replace(clip, name=f"silence like {path.name}")


def _partitioned(x: ALMInput, names: Sequence[str]) -> ALMInput:
    """The input with these segments as its spans, but for its ends."""
    labels = ["sink", *names[1:-1], "readout"] if len(names) > 1 else ["readout"]
    found = dict.fromkeys([*labels, *sorted(SPAN_NAMES)])
    ranges = {
        name: [as_ranges(at for at, label in enumerate(labels) if label == name)] for name in found
    }
    return replace(x, spans=replace(x.spans, ranges=ranges))


def prefix_check(items: Sequence[PreparedItem]) -> list[dict[str, Any]]:
    """What identifies every prefix, and what it was compared with: ``prefix_check.json``."""
    rows = []
    for one in items:
        for name, prefix in one.prefixes.items():
            saved = one.item.conditions[name].saved
            compared = sorted(saved.model_fields_set) if saved else []
            audio = [sha256(path.read_bytes()) for path in one.item.conditions[name].paths]
            rows.append(
                {
                    "item": one.item.id,
                    "condition": name,
                    "n_tokens": len(prefix.ids),
                    "sha256_of_ids": sha256(" ".join(map(str, prefix.ids))),
                    "sha256_of_audio": audio,
                    "silent": one.item.conditions[name].silent,
                    "compared": compared,
                    # A difference ends the run before it begins.
                    "first_differing_token": None,
                }
            )
    return rows
