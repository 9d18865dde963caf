"""The OB1 stimulus set: conflict map, prompts, clip names (cards M-000-1 to M-000-3)."""

import itertools

import pytest

from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.ob1 import (
    CONFLICT_MAP,
    EMOTIONS,
    INTENSITIES,
    LABELS,
    LANGUAGES,
    SENTENCES,
    ClipName,
    Language,
    PromptMode,
    ob1_clip_names,
    parse_clip_name,
    prompt_segments,
)


def test_conflict_map() -> None:
    assert set(CONFLICT_MAP) == set(EMOTIONS)
    assert all(voice != named for voice, named in CONFLICT_MAP.items())
    assert CONFLICT_MAP[CONFLICT_MAP["terrified"]] == "sad"
    assert "terrified" not in CONFLICT_MAP.values()
    assert list(CONFLICT_MAP.values()).count("cheerful") == 2


def test_eighteen_clips() -> None:
    clips = ob1_clip_names()
    assert len(clips) == len(set(clips)) == 2 * (4 * 2 + 1) == 18
    assert {clip.intensity for clip in clips if clip.emotion == "neutral"} == {"normal"}
    everything = set(itertools.product(LANGUAGES, EMOTIONS, INTENSITIES))
    assert len(everything) == 20
    left_out = everything - {(clip.language, clip.emotion, clip.intensity) for clip in clips}
    assert left_out == {("zh", "neutral", "strong"), ("en", "neutral", "strong")}


def test_clip_names_round_trip() -> None:
    expected = ClipName(language="zh", emotion="cheerful", intensity="strong")
    assert parse_clip_name("some/folder/zh_cheerful_strong.wav") == expected
    for clip in ob1_clip_names():
        assert parse_clip_name(f"{clip.stem}.flac") == clip


@pytest.mark.parametrize(
    "name",
    [
        "zh_cheerful.wav",
        "fr_sad_strong.wav",
        "zh_happy_strong.wav",
        "zh_sad_weak.wav",
        "zh_sad_strong_2.wav",
        "sad_zh_strong.wav",
        "ZH_sad_strong.wav",
        "",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected language_emotion_intensity"):
        parse_clip_name(name)


def text_of(segments: list[tuple[str, str]]) -> str:
    return "".join(text for _, text in segments)


def test_seed_prompts_are_literal() -> None:
    audio_only = prompt_segments("audio_only", "zh", voice="sad")
    assert audio_only == [("text", "请判断这段音频的情绪。只输出标签。")]
    conflict = prompt_segments("conflict", "zh", voice="sad", named="cheerful")
    assert (
        text_of(conflict) == "请判断这段音频的情绪。要求：请以「高兴」的语气/情绪来判断并给出标签。"
    )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("mode", ["conflict", "consistent", "mention_only"])
def test_one_label_segment_holds_the_named_emotion(mode: PromptMode, language: Language) -> None:
    for named in EMOTIONS:
        voice = named if mode == "consistent" else CONFLICT_MAP[named]
        segments = prompt_segments(mode, language, voice=voice, named=named)
        assert [name for name, _ in segments] == ["text", "label", "text"]
        assert segments[1][1] == LABELS[language][named]
        assert text_of(segments).count(LABELS[language][named]) == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_conflict_and_consistent_share_a_template(language: Language) -> None:
    conflict = prompt_segments("conflict", language, voice="sad", named="angry")
    assert conflict == prompt_segments("consistent", language, voice="angry", named="angry")
    mention = prompt_segments("mention_only", language, voice="sad", named="angry")
    assert mention[0][1] != conflict[0][1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_controls(language: Language) -> None:
    labels = LABELS[language]
    order = EMOTIONS[::-1]
    listed = text_of(prompt_segments("list_all", language, voice="sad", order=order))
    positions = [listed.index(labels[emotion]) for emotion in order]
    assert positions == sorted(positions)
    assert all(listed.count(label) == 1 for label in labels.values())
    for mode in ("audio_only", "irrelevant_adjective"):
        prompt = text_of(prompt_segments(mode, language, voice="sad"))  # type: ignore[arg-type]
        assert not any(label in prompt for label in labels.values())
    # The adjective stands where the label stands in `conflict`.
    adjective = text_of(prompt_segments("irrelevant_adjective", language, voice="sad"))
    before, _, after = prompt_segments("conflict", language, voice="sad", named="angry")
    assert adjective.startswith(before[1])
    assert adjective.endswith(after[1])


def test_prompt_errors() -> None:
    with pytest.raises(InputError, match="mode 'consistent': the instruction names 'sad' but the"):
        prompt_segments("consistent", "en", voice="angry", named="sad")
    with pytest.raises(InputError, match=r"mode 'conflict': the instruction names 'sad', .* own"):
        prompt_segments("conflict", "en", voice="sad", named="sad")
    for mode in ("conflict", "consistent", "mention_only"):
        with pytest.raises(InputError, match="got named=None, expected a label"):
            prompt_segments(mode, "en", voice="sad")  # type: ignore[arg-type]
    for mode in ("audio_only", "list_all", "irrelevant_adjective"):
        with pytest.raises(InputError, match="got named='angry', expected none"):
            prompt_segments(mode, "en", voice="sad", named="angry")  # type: ignore[arg-type]


def test_labels_and_sentences_of_every_language() -> None:
    assert set(SENTENCES) == set(LABELS) == set(LANGUAGES)
    for labels in LABELS.values():
        assert set(labels) == set(EMOTIONS)
        # Equal first characters are the usual way for first tokens to collide.
        assert len({label[0] for label in labels.values()}) == len(EMOTIONS)
