"""From an item's conditions to prompts, segments, and the check against what the real run saved.

A prompt's positions are partitioned: ``sink`` (the first), ``readout`` (the last), and between them
the item's segments, ``audio`` and ``audio_struct``, and ``struct`` (template).

Source: card M-002-1.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from hooked_alm import HookedALM
from hooked_alm.chat_template import render_chat
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip
from hooked_alm.spans import SPAN_NAMES, as_ranges

from ..materials.hearing import Hearing
from ..materials.records import collect
from ..materials.stand_ins import silence_like
from ..workbench.identity import file_sha256
from .items import Condition, PrefixItem
from .saved import check_saved

MARK = 0xE000
"""First of the private-use characters that stand in for messages while a template is rendered."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """A prefix as the model reads it: one row, without padding."""

    x: ALMInput
    offsets: list[tuple[int, int]] | None = None
    """Character range of each token in the rendered text; None for an audio model's prompt."""
    text: str | None = None
    """The rendered text; None likewise."""

    @property
    def ids(self) -> list[int]:
        """Token ids, placeholders expanded."""
        return self.x.tokens[0].tolist()


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedItem:
    """An item with its prompts and the tokens of its continuation."""

    item: PrefixItem
    prefixes: dict[str, Prefix]
    continuation: list[int]
    offsets: list[tuple[int, int]]
    """Character range of each of its tokens in the continuation."""

    def to(self, device: torch.device) -> "PreparedItem":
        """The item with its prompts on another device."""
        moved = {name: replace(one, x=one.x.to(device)) for name, one in self.prefixes.items()}
        return replace(self, prefixes=moved)


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
    reader = _Reader(model, truncate)

    def prepared(item: PrefixItem) -> PreparedItem:
        prefixes = {name: reader.prefix(name, one) for name, one in item.conditions.items()}
        ids, offsets = reader.encoded(item.continuation, "continuation: ")
        longest = max(prefixes, key=lambda name: prefixes[name].x.shape[1])
        n = prefixes[longest].x.shape[1] + len(ids)
        if n > model.cfg.n_ctx:
            raise InputError(
                f"conditions.{longest}: got {n} tokens with the continuation, expected at most "
                f"{model.cfg.n_ctx}, which the model was made for. Leave the item out, or shorten "
                "it"
            )
        return PreparedItem(item=item, prefixes=prefixes, continuation=ids, offsets=offsets)

    return collect("preparing items", prepared, items, lambda item: item.where or item.id)


def as_input(model: HookedALM, ids: Sequence[int]) -> ALMInput:
    """One unpadded row of token ids."""
    row = torch.tensor([list(ids)])
    return model.encode(input_ids=row, attention_mask=torch.ones_like(row))


def _read_clip(model: HookedALM, truncate: bool, source: tuple[Path, bool]) -> AudioClip:
    path, is_silent = source
    read = silence_like if is_silent else HookedALM.read_clip
    return read(model, path, truncate=truncate)


class _Reader:
    """What makes prompts of conditions."""

    def __init__(self, model: HookedALM, truncate: bool) -> None:
        self.model = model
        hearing = Hearing(partial(_read_clip, model, truncate))
        self.clip = cache(lambda path, is_silent: hearing.clip((path, is_silent)))

    def prefix(self, name: str, condition: Condition) -> Prefix:
        field = f"conditions.{name}"
        try:
            if condition.prefix is not None:
                prefix = self._of_text(condition.prefix)
            elif condition.messages is not None:
                prefix = self._of_chat(condition.messages, condition.names(), condition.tools)
            else:
                prefix = self._of_audio(condition)
            if prefix.x.shape[1] < 2:
                raise InputError(f"got {prefix.x.shape[1]} token, expected two or more")
        except InputError as error:
            raise InputError(f"{field}: {error}") from error
        if (saved := condition.saved) is not None:
            check_saved(prefix.x, prefix.offsets, saved, self.model.tokenizer, f"{field}.saved")
        return prefix

    def encoded(self, text: str, where: str = "") -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text to which nothing is added, and their ranges of characters."""
        found = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if not found["input_ids"]:
            raise InputError(f"{where}got {text!r}, which has no token")
        return list(found["input_ids"]), [(a, b) for a, b in found["offset_mapping"]]

    def _of_text(self, segments: Sequence[tuple[str, str]]) -> Prefix:
        """Each token belongs to the segment that its first character stands in."""
        text = "".join(words for _, words in segments)
        ids, offsets = self.encoded(text)
        owners = [name for name, words in segments for _ in words]
        names = [owners[min(start, len(owners) - 1)] for start, _ in offsets]
        x = _partitioned(as_input(self.model, ids), names)
        return Prefix(x=x, offsets=offsets, text=text)

    def _of_chat(
        self, messages: Sequence[Mapping[str, Any]], names: Sequence[str], tools: Any
    ) -> Prefix:
        """Messages by the template; a private-use character stands in for each text at first.

        Searching the prompt for the texts would find them in the template, or in each other.
        """
        texts = [message["content"] for message in messages if message.get("content")]
        given = {chr(MARK + i): one for i, one in enumerate(zip(names, texts, strict=True))}
        left = iter(given)
        marked = [{**m, "content": next(left)} if m.get("content") else m for m in messages]
        parts = re.split(f"({'|'.join(given) or '(?!)'})", self._rendered(marked, tools))
        segments = [given.get(part, ("struct", part)) for part in parts]
        if "".join(words for _, words in segments) != self._rendered(messages, tools):
            raise InputError(
                "messages: got a template that rewrites their text (trims it, perhaps), so that "
                "segments cannot be located. Give the rendered text in prefix"
            )
        return self._of_text(segments)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        prompts, tokenizer = self.model.prompts, self.model.tokenizer
        template = prompts.chat_template if prompts is not None else None
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise InputError("messages: the tokenizer has no chat template. Give prefix instead")
        return render_chat(
            tokenizer,
            [{key: value for key, value in one.items() if key != "segment"} for one in messages],
            template,
            tools=tools,
            add_generation_prompt=messages[-1]["role"] != "assistant",
        )

    def _of_audio(self, condition: Condition) -> Prefix:
        heard = [self.clip(path, condition.silent) for path in condition.audio]
        asked = condition.asked
        x = self.model.prepare([heard] if heard else None, segments=asked)
        names = ["struct"] * x.shape[1]
        own = dict.fromkeys(name for name, _ in asked or [] if name != "text")
        for name in ("text", "audio_struct", "audio", *own):
            for position in x.spans.positions(name, 0):
                names[position] = name
        return Prefix(x=_partitioned(x, names))


def _partitioned(x: ALMInput, names: Sequence[str]) -> ALMInput:
    """The input with these segments as its spans, but for its ends."""
    labels = ["sink", *names[1:-1], "readout"] if len(names) > 1 else ["readout"]
    found = dict.fromkeys([*labels, *sorted(SPAN_NAMES)])
    ranges = {
        name: [as_ranges(at for at, label in enumerate(labels) if label == name)] for name in found
    }
    return replace(x, spans=replace(x.spans, ranges=ranges))


def sha256(text: str) -> str:
    """Hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def prefix_check(items: Sequence[PreparedItem]) -> list[dict[str, Any]]:
    """What identifies every prefix, and what it was compared with: ``prefix_check.json``."""
    return [
        {
            "item": one.item.id,
            "condition": name,
            "n_tokens": len(one.prefixes[name].ids),
            "sha256_of_ids": sha256(" ".join(map(str, one.prefixes[name].ids))),
            "sha256_of_audio": [file_sha256(path) for path in condition.audio],
            "silent": condition.silent,
            "compared": sorted(condition.saved.model_fields_set) if condition.saved else [],
            # A difference ends the run before it begins.
            "first_differing_token": None,
        }
        for one in items
        for name, condition in one.item.conditions.items()
    ]
