"""OB1, the stimulus set of the emotion-conflict experiment: emotions, prompts, file names.

One sentence is spoken with five emotions, at two intensities (neutral has one level), in Chinese
and English: 2 x (4 x 2 + 1) = 18 clips named ``{language}_{emotion}_{intensity}.wav``. The prompts
ask for the voice's emotion, and may name a second one.

Source: seed 000; the controls ``mention_only``, ``list_all`` and ``irrelevant_adjective`` answer C9
(the instruction leaks the label).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

from hooked_alm.errors import InputError

Language = Literal["zh", "en"]
Emotion = Literal["neutral", "cheerful", "sad", "angry", "terrified"]
Intensity = Literal["normal", "strong"]
PromptMode = Literal[
    "audio_only", "conflict", "consistent", "mention_only", "list_all", "irrelevant_adjective"
]

LANGUAGES: tuple[Language, ...] = get_args(Language)
EMOTIONS: tuple[Emotion, ...] = get_args(Emotion)
INTENSITIES: tuple[Intensity, ...] = get_args(Intensity)

SENTENCES: dict[Language, str] = {
    "zh": "包裹预计在明天下午之前送达。",
    "en": "The package is scheduled to arrive by tomorrow afternoon.",
}

LABELS: dict[Language, dict[Emotion, str]] = {
    "zh": {
        "neutral": "中性",
        "cheerful": "高兴",
        "sad": "悲伤",
        "angry": "愤怒",
        "terrified": "恐惧",
    },
    "en": {emotion: emotion for emotion in EMOTIONS},
}

CONFLICT_MAP: dict[Emotion, Emotion] = {
    "cheerful": "sad",
    "sad": "cheerful",
    "angry": "neutral",
    "neutral": "angry",
    "terrified": "cheerful",
}
"""Voice emotion -> instructed emotion (M-000-3). Not an involution; terrified is never a target."""

# Each prompt is a list of (segment, text): the label word is a segment of its own, so that it can
# be patched apart from the rest of the instruction.
PromptSegments = list[tuple[str, str]]

_IRRELEVANT_ADJECTIVE: dict[Language, str] = {"zh": "木制", "en": "wooden"}
_ASK: dict[Language, str] = {
    "zh": "请判断这段音频的情绪。",
    "en": "Judge the emotion of this audio. ",
}
_LABEL_ONLY: dict[Language, str] = {"zh": "只输出标签。", "en": "Output the label only."}
_OBEY: dict[Language, tuple[str, str]] = {
    "zh": ("要求：请以「", "」的语气/情绪来判断并给出标签。"),
    "en": (
        'Requirement: please judge in the tone/emotion of "',
        '" and give the label.',
    ),
}
_MENTION: dict[Language, tuple[str, str]] = {
    "zh": ("备注：词语「", "」只是一个例子。只输出标签。"),
    "en": ('Note: the word "', '" is only an example. Output the label only.'),
}
_CHOOSE: dict[Language, tuple[str, str, str]] = {
    "zh": ("从这些标签中选择：「", "」「", "」。只输出标签。"),
    "en": ('Choose from these labels: "', '" "', '". Output the label only.'),
}


def prompt_segments(
    mode: PromptMode,
    language: Language,
    *,
    voice: Emotion,
    named: Emotion | None = None,
    order: tuple[Emotion, ...] = EMOTIONS,
    words: Mapping[Emotion, str] | None = None,
) -> PromptSegments:
    """The instruction of one run, cut into ``text`` and ``label`` segments.

    Args:
        mode: the condition. ``conflict`` and ``consistent`` share one template.
        language: of the instruction and of its label words.
        voice: emotion of the clip; only checked against ``named``.
        named: emotion named by the instruction (``conflict``, ``consistent``, ``mention_only``).
        order: order of the labels under ``list_all``, so that a run can counterbalance it.
        words: label word of each emotion; None is ``LABELS`` of the language.

    Raises:
        InputError: ``named`` is missing, superfluous, equal to ``voice`` under ``conflict`` or
            different from it under ``consistent``.
    """
    names_one = mode in ("conflict", "consistent", "mention_only")
    if names_one != (named is not None):
        raise InputError(
            f"prompt mode {mode!r}: got named={named!r}, expected "
            f"{'an emotion' if names_one else 'none'}."
        )
    if mode == "conflict" and named == voice:
        raise InputError(
            f"prompt mode 'conflict': the instruction names {named!r}, which is the voice's own "
            "emotion. Use mode 'consistent', or name another emotion."
        )
    if mode == "consistent" and named != voice:
        raise InputError(
            f"prompt mode 'consistent': the instruction names {named!r} but the voice is "
            f"{voice!r}. Use mode 'conflict', or name the voice's emotion."
        )
    ask, labels = _ASK[language], words or LABELS[language]
    if mode == "audio_only":
        return [("text", ask + _LABEL_ONLY[language])]
    if mode == "list_all":
        start, between, end = _CHOOSE[language]
        return [("text", ask + start + between.join(labels[e] for e in order) + end)]
    if mode == "irrelevant_adjective":
        before, after = _OBEY[language]
        return [("text", ask + before + _IRRELEVANT_ADJECTIVE[language] + after)]
    assert named is not None
    before, after = (_MENTION if mode == "mention_only" else _OBEY)[language]
    return [("text", ask + before), ("label", labels[named]), ("text", after)]


@dataclass(frozen=True, kw_only=True)
class ClipName:
    """What an OB1 file name says."""

    language: Language
    emotion: Emotion
    intensity: Intensity

    @property
    def stem(self) -> str:
        """``zh_cheerful_strong``."""
        return f"{self.language}_{self.emotion}_{self.intensity}"


def parse_clip_name(path: str | PurePath) -> ClipName:
    """``zh_cheerful_strong.wav`` -> language, emotion, intensity.

    Raises:
        InputError: the name does not follow ``{language}_{emotion}_{intensity}``.
    """
    stem = PurePath(path).stem
    parts = stem.split("_")
    known = (LANGUAGES, EMOTIONS, INTENSITIES)
    if len(parts) != 3 or any(
        part not in choices for part, choices in zip(parts, known, strict=True)
    ):
        raise InputError(
            f"reading the clip name {stem!r}: expected language_emotion_intensity with language "
            f"in {LANGUAGES}, emotion in {EMOTIONS}, intensity in {INTENSITIES}. Rename the file, "
            "or give a manifest that says which clip is which."
        )
    return ClipName(language=parts[0], emotion=parts[1], intensity=parts[2])  # type: ignore[arg-type]


def ob1_clip_names() -> list[ClipName]:
    """The 18 clips, in the order of languages, emotions and intensities above."""
    return [
        ClipName(language=language, emotion=emotion, intensity=intensity)
        for language in LANGUAGES
        for emotion in EMOTIONS
        for intensity in INTENSITIES
        if not (emotion == "neutral" and intensity == "strong")
    ]
