"""Minimal pairs from a file: prompts that differ in one thing, and the answer each calls for.

One JSON object a line (see `records`)::

    {"base":  {"audio": "sad.wav", "text": "Which emotion is it?"},
     "donor": {"audio": "angry.wav", "segments": [["text", "Which emotion"], ["ask", " is it?"]]},
     "answers": {"base": "sad", "donor": "angry"},
     "group": "speaker 3", "contrast": "voice", "id": "s3-01"}

``audio`` is a file, relative to the pairs file, or a list of files for one prompt; without it the
prompt is text alone. The instruction is ``text``, or ``segments`` of it with names, which become
spans. ``answers`` begin the model's answer as they stand: give " sad" if it begins with a space.
Pairs of one ``group`` share a source (a clip, a speaker) and are no independent evidence; without
it every pair stands alone. ``contrast`` names what differs, and pairs of one contrast are summed up
together. ``id`` names the pair in results; without it, its line does.

Any sweep takes what ``prepare_pairs`` makes: a base, a donor, and a token for either answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip

from ..workbench.identity import file_sha256
from .hearing import Hearing
from .records import Files, LineRecord, Name, Parts, Words, collect, read_records

SIDES = ("base", "donor")


class Side(BaseModel):
    """One prompt: clips, and an instruction as ``text`` or in named ``segments``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    audio: Files = ()
    text: Words | None = None
    segments: Parts | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "Side":
        if self.text is not None and self.segments is not None:
            raise ValueError("text or segments, not both")
        if not self.audio and not self.parts:
            raise ValueError("audio, an instruction, or both")
        return self

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Named parts of the instruction; a plain one is called text."""
        return (("text", self.text),) if self.text is not None else self.segments or ()

    def described(self) -> dict[str, Any]:
        """What identifies the prompt, as JSON: names and hashes of clips, and words."""
        hashes = [[p.name, file_sha256(p)] for p in self.audio]
        return {"audio": hashes, "segments": [list(part) for part in self.parts]}


def _answers(value: Any) -> tuple[str, str]:
    found: Any = tuple(value.get(side) for side in SIDES) if isinstance(value, dict) else value
    is_whole = not isinstance(value, dict) or value.keys() == {*SIDES}
    is_text = isinstance(found, tuple) and all(isinstance(a, str) and a.strip() for a in found)
    if is_whole and is_text and len(set(found)) == len(SIDES):
        return found
    raise ValueError("an object with base and donor, two different texts")


class Pair(LineRecord):
    """Two prompts and their answers."""

    base: Side
    donor: Side
    answers: Annotated[tuple[str, str], BeforeValidator(_answers)]
    """What base and donor call for."""
    contrast: Name = "pair"

    @model_validator(mode="after")
    def _differs(self) -> "Pair":
        if self.base == self.donor:
            raise ValueError("a donor that differs from the base")
        return self

    def described(self) -> dict[str, Any]:
        """What identifies it, as JSON: names and hashes of clips, words, answers."""
        names = {"id": self.id, "group": self.group, "contrast": self.contrast}
        sides = {name: getattr(self, name).described() for name in SIDES}
        return {**names, "answers": list(self.answers), **sides}


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPair:
    """A pair as a model reads it; each prompt is a batch of one row."""

    pair: Pair
    base: ALMInput
    donor: ALMInput
    answers: tuple[int, int]
    """First tokens of the answers of base and donor."""

    def to(self, device: torch.device) -> "PreparedPair":
        """The pair with its prompts on another device."""
        return replace(self, base=self.base.to(device), donor=self.donor.to(device))


def read_pairs(file: str | Path) -> list[Pair]:
    """The pairs of a file, in its order.

    Raises:
        InputError: all that is wrong with it, by file, line and field.
    """
    return read_records("pairs", file, Pair)


def prepare_pairs(
    model: HookedALM, pairs: Sequence[Pair], *, truncate: bool = False
) -> list[PreparedPair]:
    """Both prompts and both answers of every pair; a clip is read, and later encoded, once.

    Raises:
        InputError: what a pair's fields make impossible on this model, by line and field.
    """
    if model.prompts is None:
        raise InputError(
            f"preparing pairs for {model.cfg.model_name!r}: it has no audio front-end, or its "
            "folder no processor files. Give an audio model with both."
        )
    clips = HeardClips(model, truncate)

    def prepared(pair: Pair) -> PreparedPair:
        base, donor = (prepare_side(model, getattr(pair, n), n, clips) for n in SIDES)
        tokens = [_first_token(model, pair, i) for i in range(2)]
        if tokens[0] == tokens[1]:
            raise InputError(
                f"answers: got {pair.answers[0]!r} and {pair.answers[1]!r}, which begin with the "
                f"same token {tokens[0]}, expected answers that differ in their first token"
            )
        return PreparedPair(pair=pair, base=base, donor=donor, answers=(tokens[0], tokens[1]))

    return collect("preparing pairs", prepared, pairs, lambda pair: pair.where or pair.id)


class HeardClips(dict[Path, AudioClip]):
    """Clips by path, each read when it is first asked for."""

    def __init__(self, model: HookedALM, truncate: bool) -> None:
        super().__init__()
        self._hearing = Hearing(partial(model.read_clip, truncate=truncate))

    def __missing__(self, path: Path) -> AudioClip:
        self[path] = self._hearing.clip(path)
        return self[path]


def prepare_side(model: HookedALM, side: Side, name: str, clips: HeardClips) -> ALMInput:
    """One prompt as the model reads it.

    Raises:
        InputError: what its fields make impossible on this model, after ``name``.
    """
    try:
        audio = [[clips[path] for path in side.audio]] if side.audio else None
    except InputError as error:
        raise InputError(f"{name}.audio: {error}") from error
    try:
        return model.prepare(audio, segments=list(side.parts) or None)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _first_token(model: HookedALM, pair: Pair, index: int) -> int:
    ids = model.tokenizer(pair.answers[index], add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"answers.{SIDES[index]}: got {pair.answers[index]!r}, which has no token")
    return int(ids[0])
