"""How an attribute is asked for: labels, questions, and how the answer begins.

Square brackets mark the words that name the attribute (``What is the [emotion] of the speaker?``):
their last token is the ``mention``, where a model may collect what it hears. If the beginning of
the answer marks some, those count, else the question's.

Source: AudioLens, ``run_logit_lens.py``, whose prompts are here word for word; M-AL-1.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .ob1 import INSTRUCTIONS
from .records import Words

PromptFormat = Literal["prefix", "question", "options"]
"""What is said beside the clip: nothing but how the answer begins (P1), a question (P2), or a
question that lists the labels (P3)."""
NamedParts = list[tuple[str, str]]
MENTION = "mention"
"""Span of the words that name the attribute."""
_MARKED = re.compile(r"\[([^\[\]]+)\]")


def _once(text: str) -> str:
    if len(_MARKED.findall(text)) > 1 or text.count("[") != text.count("]"):
        raise ValueError("text with one pair of square brackets at most, around words")
    return text


def _lists(text: str) -> str:
    if text and text.count("{labels}") != 1:
        raise ValueError("text that has {labels} once")
    return text


Marked = Annotated[str, AfterValidator(_once)]


class Wording(BaseModel):
    """One attribute; a format whose text is empty is not asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: Mapping[str, str | tuple[str, ...]] | None = Field(
        default=None,
        description="label -> how answers spell it; None is each label of the table, as it stands",
    )
    prefix: Marked = Field(default="", description="how the answer begins")
    reversed_prefix: Marked = Field(default="", description="the same, the attribute first")
    question: Marked = Field(default="", description="asked with the clip")
    options: Annotated[Marked, AfterValidator(_lists)] = Field(
        default="", description="the question that lists all {labels}"
    )
    quoted: Words = Field(default="{label}", description="one label in that list")
    between: str = Field(default=", ", description="what stands between two labels in that list")

    def beginning(self, *, is_reversed: bool, use_is: bool) -> NamedParts:
        """How the answer begins, its mention apart."""
        text = self.reversed_prefix if is_reversed else self.prefix
        return _parts(f"{text} is" if text and use_is else text)

    def asked(
        self,
        prompt: PromptFormat,
        words: Mapping[str, str],
        order: Sequence[str],
        prefix: NamedParts,
    ) -> NamedParts | None:
        """What is said with the clip; None where this format has no words.

        Args:
            prompt: the format.
            words: label -> how the prompt spells it.
            order: labels in the order of the list.
            prefix: how the answer begins.
        """
        if prompt == "prefix":
            return [] if prefix else None
        text = self.question if prompt == "question" else self.options
        if not text:
            return None
        listed = self.between.join(self.quoted.replace("{label}", words[one]) for one in order)
        parts = _parts(text.replace("{labels}", listed))
        if any(name == MENTION for name, _ in prefix):
            parts = [("text", part) for _, part in parts]
        return parts


def _parts(text: str) -> NamedParts:
    """A text cut at its brackets."""
    pieces = _MARKED.split(text)
    return [
        (MENTION if index % 2 else "text", piece) for index, piece in enumerate(pieces) if piece
    ]


def _of_audio_lens(subject: str, name: str, thing: str, question: str, labels: str) -> Wording:
    words = labels.split(", ")
    return Wording(
        labels={one: one for one in words},
        prefix=f"The {subject} [{name}]",
        reversed_prefix=f"The {thing}",
        question=question,
        options=f"{question} Possible options: {{labels}}.",
    )


AUDIO_LENS = {
    "emotion": _of_audio_lens(
        "speaker's", "emotion", "[emotion] of the speaker",
        "What is the emotion of the speaker in the speech?", "angry, disgust, fear, happy, sad",
    ),
    "language": _of_audio_lens(
        "speech's spoken", "language", "spoken [language] of the speech",
        "What is the language spoken in the speech?",
        "English, German, Spanish, French, Italian, Chinese, Japanese, Korean",
    ),
    "gender": _of_audio_lens(
        "speaker's", "gender", "[gender] of the speaker",
        "What is the gender of the speaker in the speech?", "male, female",
    ),
    "animal": _of_audio_lens(
        "sound file's", "animal", "[animal] in the sound file", "What animal makes the sound?",
        "dog, cat, pig, cow, frog, hen, rooster, sheep, crow",
    ),
}  # fmt: skip
"""AudioLens' four attributes, by the column of a table that has them."""

_ENGLISH = INSTRUCTIONS["en"]
OB1_EMOTION = Wording(
    question=_ENGLISH.ask.replace("emotion", "[emotion]") + _ENGLISH.label_only,
    options=_ENGLISH.ask.replace("emotion", "[emotion]") + _ENGLISH.choose,
    quoted=_ENGLISH.quoted,
    between=_ENGLISH.between,
)
"""What the bundled models were trained to be asked, in English."""
