"""Prompts that a tuned lens is trained on: OB1's, or those of a file.

A file has one JSON object a line (see ``materials.records``)::

    {"prompt": {"audio": "sad.wav", "text": "Which emotion is it?"},
     "group": "speaker 3", "id": "s3-01"}

``prompt`` is a side of a pairs file (see ``pairs``): ``audio`` is a file, relative to this one, or
a list of files; the instruction is ``text``, or named ``segments`` of it. Prompts of one ``group``
share a source (a clip, a speaker): a group is trained on or held out as a whole; without it every
prompt stands alone. ``id`` names the prompt in results; without it, its line does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput

from ..materials.instructions import PromptMode
from ..materials.ob1 import EMOTIONS, ClipName, Emotion, parse_clip_name, prompt_segments
from ..materials.pairs import HeardClips, Side, prepare_side
from ..materials.recordings import Recording
from ..materials.records import LineRecord, collect, read_records


class LensPrompt(LineRecord):
    """One prompt, and what it shares with others."""

    prompt: Side

    def described(self) -> dict[str, Any]:
        """What identifies it, as JSON: names and hashes of clips, words."""
        return {"id": self.id, "group": self.group, **self.prompt.described()}


def read_prompts(file: str | Path) -> list[LensPrompt]:
    """The prompts of a file, in its order.

    Raises:
        InputError: all that is wrong with it, by file, line and field.
    """
    return read_records("prompts", file, LensPrompt)


def ob1_prompts(recordings: Sequence[Recording]) -> list[LensPrompt]:
    """Every clip under all of OB1's instructions, naming every emotion; a clip is a group.

    Raises:
        InputError: clips of other languages, or with other labels, than OB1's.
    """

    def known(clip: Recording) -> ClipName:
        return parse_clip_name("_".join((clip.language, clip.label, clip.intensity or "normal")))

    names = collect("making OB1's prompts", known, recordings, lambda clip: clip.where)
    prompts = []
    for number, (clip, name) in enumerate(zip(recordings, names, strict=True)):
        asked: list[tuple[PromptMode, Emotion | None]] = [
            ("audio_only", None), ("list_all", None), ("irrelevant_adjective", None),
        ]  # fmt: skip
        for emotion in EMOTIONS:
            is_own = emotion == name.emotion
            asked.append(("consistent" if is_own else "conflict", emotion))
            asked.append(("mention_only", emotion))
        for mode, named in asked:
            segments = prompt_segments(
                mode,
                name.language,
                voice=name.emotion,
                named=named,
                order=EMOTIONS[number % 5 :] + EMOTIONS[: number % 5],
            )
            prompts.append(
                LensPrompt(
                    id=f"{clip.name}__{mode}" + (f"_{named}" if named else ""),
                    group=clip.name,
                    prompt=Side(audio=(clip.path,), segments=tuple(segments)),
                )
            )
    return prompts


def prepare_prompts(
    model: HookedALM, prompts: Sequence[LensPrompt], *, truncate: bool = False
) -> dict[str, ALMInput]:
    """Id -> the prompt as a model reads it; a clip is read, and later encoded, once.

    Raises:
        InputError: what a prompt's fields make impossible on this model, by line and field.
    """
    clips = HeardClips(model, truncate)

    def prepared(one: LensPrompt) -> ALMInput:
        if model.audio is None and not one.prompt.audio:
            text = "".join(words for _, words in one.prompt.parts)
            return model.to_input(text)
        return prepare_side(model, one.prompt, "prompt", clips)

    inputs = collect("preparing prompts", prepared, prompts, lambda one: one.where or one.id)
    return {one.id: x for one, x in zip(prompts, inputs, strict=True)}
