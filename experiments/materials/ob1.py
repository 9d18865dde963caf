"""OB1, the stimulus set of the emotion-conflict experiment: emotions, prompts, file names.

One sentence is spoken with five emotions, at two intensities (neutral has one level), in Chinese
and English: 2 x (4 x 2 + 1) = 18 clips named ``{language}_{emotion}_{intensity}.wav``. The prompts
ask for the voice's emotion, and may name a second one.

Source: seed 000.
"""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

from hooked_alm.errors import InputError

from .instructions import Instructions, PromptMode, PromptSegments

Language = Literal["zh", "en"]
Emotion = Literal["neutral", "cheerful", "sad", "angry", "terrified"]
Intensity = Literal["normal", "strong"]
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

INSTRUCTIONS: dict[Language, Instructions] = {
    "zh": Instructions(
        ask="请判断这段音频的情绪。",
        label_only="只输出标签。",
        obey="要求：请以「{label}」的语气/情绪来判断并给出标签。",
        mention="备注：词语「{label}」只是一个例子。只输出标签。",
        choose="从这些标签中选择：{labels}。只输出标签。",
        quoted="「{label}」",
        between="",
        unrelated="木制",
    ),
    "en": Instructions(
        ask="Judge the emotion of this audio. ",
        label_only="Output the label only.",
        obey='Requirement: please judge in the tone/emotion of "{label}" and give the label.',
        mention='Note: the word "{label}" is only an example. Output the label only.',
        choose="Choose from these labels: {labels}. Output the label only.",
        unrelated="wooden",
    ),
}


def prompt_segments(
    mode: PromptMode,
    language: Language,
    *,
    voice: Emotion,
    named: Emotion | None = None,
    order: tuple[Emotion, ...] = EMOTIONS,
) -> PromptSegments:
    """OB1's instruction of one run, in one language; see `Instructions.segments`."""
    words = {str(emotion): word for emotion, word in LABELS[language].items()}
    return INSTRUCTIONS[language].segments(mode, words, voice=voice, named=named, order=order)


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
