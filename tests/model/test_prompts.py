"""``prepare``: the ids and features of Hugging Face's processor, with spans; what is refused."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor, Qwen2AudioProcessor

from hooked_alm import ALMInput, HookedALM, InputError
from tiny import AUDIO_BOS, AUDIO_EOS, IM_END, PLACEHOLDER, RARE_TEXT, TinyModels

RATE = 16000
QUESTION = "What emotion does the speaker convey?"
CHINESE = "说话人的情绪是什么？请用一个词回答。"


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return samples.astype(np.float32)


ONE, TWO, THREE = noise(0.63), noise(0.3, 1), noise(1.0, 2)


@pytest.fixture(scope="module")
def processor(tiny_models: TinyModels) -> Qwen2AudioProcessor:
    return AutoProcessor.from_pretrained(tiny_models.folder())


def user(*content: Any) -> list[dict[str, Any]]:
    items = [
        {"type": "text", "text": item}
        if isinstance(item, str)
        else {"type": "audio", "audio": item}
        for item in content
    ]
    return [{"role": "user", "content": items}]


def by_processor(
    processor: Qwen2AudioProcessor, conversations: Sequence[Any], answer_prefix: str = ""
) -> Any:
    """The processor's own output, as its documentation says to make it."""
    texts = [
        processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        + answer_prefix
        for conversation in conversations
    ]
    audio = [
        item["audio"]
        for conversation in conversations
        for message in conversation
        if not isinstance(message["content"], str)
        for item in message["content"]
        if item["type"] == "audio"
    ]
    return processor(
        text=texts, audio=audio or None, sampling_rate=RATE, return_tensors="pt", padding=True
    )


def check_equal(x: ALMInput, expected: Any, model: HookedALM) -> None:
    assert torch.equal(x.tokens, expected["input_ids"])
    assert torch.equal(x.attention_mask, expected["attention_mask"])
    n_clips = len(expected["input_features"]) if "input_features" in expected else 0
    assert len(x.clips) == n_clips
    for i, clip in enumerate(x.clips):
        assert torch.equal(clip.features[0], expected["input_features"][i])
        assert clip.n_frames == (int(expected["feature_attention_mask"][i].sum()),)
    encoded = model.encode(**expected)
    assert torch.equal(x.position_ids, encoded.position_ids)
    assert x.clip_rows == encoded.clip_rows
    assert x.spans["audio"] == encoded.spans["audio"]
    assert x.spans["audio_struct"] == encoded.spans["audio_struct"]


def text_of(model: HookedALM, x: ALMInput, span: str, row: int = 0) -> str:
    return model.tokenizer.decode(x.tokens[row, x.spans.mask(span)[row]])


CONVERSATIONS = {
    "one clip": [user(ONE, QUESTION)],
    "two clips in one prompt": [user(ONE, TWO, QUESTION)],
    "text between clips": [user(ONE, "and then", TWO, QUESTION)],
    "batch": [user(ONE, QUESTION), user(TWO, "Who?"), user(THREE, ONE.copy(), CHINESE)],
    "audio only": [user(TWO)],
    "text only": [user(QUESTION), user("Why?")],
    "mixed": [user(QUESTION), user(ONE, "Why?")],
    "system and history": [
        [
            {"role": "system", "content": "Answer with one word."},
            *user(TWO, "Who speaks?"),
            {"role": "assistant", "content": "A woman."},
            *user(ONE, QUESTION),
        ]
    ],
    "text as a plain string": [[{"role": "user", "content": QUESTION}]],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equal_to_the_processor(gqa: HookedALM, processor: Qwen2AudioProcessor, name: str) -> None:
    conversations = CONVERSATIONS[name]
    expected = by_processor(processor, conversations)
    check_equal(gqa.prepare(conversation=conversations), expected, gqa)
    if len(conversations) == 1:
        check_equal(gqa.prepare(conversation=conversations[0]), expected, gqa)
    prefixed = gqa.prepare(conversation=conversations, answer_prefix="The answer is:")
    check_equal(prefixed, by_processor(processor, conversations, "The answer is:"), gqa)


def test_short_form_is_the_conversation(gqa: HookedALM) -> None:
    forms: list[tuple[dict[str, Any], list[Any]]] = [
        ({"audio": ONE, "text": QUESTION}, [user(ONE, QUESTION)]),
        ({"audio": [ONE, TWO], "text": ["a", "b"]}, [user(ONE, "a"), user(TWO, "b")]),
        ({"audio": [[ONE, TWO]], "text": "a"}, [user(ONE, TWO, "a")]),
        ({"audio": [[ONE, TWO], THREE], "text": "a"}, [user(ONE, TWO, "a"), user(THREE, "a")]),
        ({"audio": [[], TWO], "text": "a"}, [user("a"), user(TWO, "a")]),
        ({"audio": ONE}, [user(ONE)]),
        ({"text": ["a", "b"]}, [user("a"), user("b")]),
        ({"audio": (ONE, RATE), "text": "a"}, [user(ONE, "a")]),
    ]
    for short, conversations in forms:
        x, y = gqa.prepare(**short), gqa.prepare(conversation=conversations)
        assert torch.equal(x.tokens, y.tokens)
        assert torch.equal(x.attention_mask, y.attention_mask)
        assert x.clip_rows == y.clip_rows
        pairs = zip(x.clips, y.clips, strict=True)
        assert all(torch.equal(a.features, b.features) for a, b in pairs)
        assert x.spans == y.spans


@torch.no_grad()
def test_prepared_prompts_run_as_hugging_face_runs_them(
    gqa: HookedALM, tiny_models: TinyModels, processor: Qwen2AudioProcessor
) -> None:
    for conversations in CONVERSATIONS.values():
        expected = by_processor(processor, conversations)
        x = gqa.prepare(conversation=conversations)
        hf = tiny_models.hf()(**expected, position_ids=x.position_ids)
        assert torch.equal(gqa(x), hf.logits)


def test_spans_of_a_prompt(gqa: HookedALM) -> None:
    x = gqa.prepare(audio=[ONE, TWO], text=[QUESTION, "Why?"])
    assert set(x.spans) == {"audio", "audio_struct", "text", "struct", "readout", "sink"}
    count = sum(x.spans.mask(name).long() for name in x.spans)
    assert torch.equal(count, x.attention_mask)
    for row, question in enumerate((QUESTION, "Why?")):
        assert text_of(gqa, x, "text", row) == question
        ((start, stop),) = x.spans["audio"][row]
        assert stop - start == x.clips[row].n_tokens
        assert (x.tokens[row, start - 1], x.tokens[row, stop]) == (AUDIO_BOS, AUDIO_EOS)
        assert text_of(gqa, x, "audio_struct", row) == "<|audio_bos|><|audio_eos|>"
        assert text_of(gqa, x, "sink", row) == "<|im_start|>"
        # The newline after "assistant" predicts the first answer token.
        assert x.spans["readout"][row] == [(x.shape[1] - 1, x.shape[1])]
        assert text_of(gqa, x, "readout", row).endswith("\n")
        struct = text_of(gqa, x, "struct", row)
        assert "You are a helpful assistant." in struct
        assert "Audio 1:" in struct
        assert question not in struct


@pytest.mark.parametrize(
    "words", ["assistant", "user", "Audio 1: ", "You are a helpful assistant.", "a", "\n", "  b  "]
)
def test_text_that_also_occurs_in_the_template(gqa: HookedALM, words: str) -> None:
    x = gqa.prepare(audio=ONE, text=words)
    ranges = x.spans["text"][0]
    assert len(ranges) == 1
    # The instruction is what stands between the clip and the end of the user's turn.
    start, stop = ranges[0]
    assert x.tokens[0, stop] == IM_END
    assert start > x.spans["audio"][0][0][1]
    assert words in text_of(gqa, x, "text")


def test_named_segments(gqa: HookedALM) -> None:
    segments = [("text", "Is it "), ("label", "happy"), ("text", " or "), ("label", "sad")]
    segments.append(("end", "?"))
    x = gqa.prepare(audio=ONE, segments=segments)
    whole = gqa.prepare(audio=ONE, text="Is it happy or sad?")
    assert torch.equal(x.tokens, whole.tokens)
    assert x.spans["text"] == whole.spans["text"]
    assert set(x.spans) - set(whole.spans) == {"label", "end"}
    assert not (x.spans.mask("label") & ~x.spans.mask("text")).any()
    label = text_of(gqa, x, "label")
    assert "happy" in label
    assert "sad" in label
    assert "Is" not in label
    # Each token that holds a character of a segment belongs to it, neighbours' letters included.
    assert len(x.spans["label"][0]) == 2
    assert text_of(gqa, x, "end").endswith("?")


def test_segments_of_a_batch(gqa: HookedALM) -> None:
    rows = [[("a", "one "), ("b", "two")], [("b", "three")]]
    x = gqa.prepare(audio=[ONE, TWO], segments=rows)
    assert text_of(gqa, x, "text", 1) == "three"
    assert x.spans["b"][1] == x.spans["text"][1]
    assert x.spans["a"][1] == []  # a row that lacks a span has it empty
    shared = gqa.prepare(audio=[ONE, TWO], segments=rows[0])
    assert text_of(gqa, shared, "a", 1).startswith("one")
    conversations = [user(ONE, "one two"), user(TWO, "one two")]
    for given in (rows[0], [rows[0], rows[0]]):
        same = gqa.prepare(conversation=conversations, segments=given)
        assert same.spans == shared.spans
    for bad in ([rows[0]], [rows[0]] * 3):
        with pytest.raises(InputError, match="lists of segments for 2 rows"):
            gqa.prepare(conversation=conversations, segments=bad)


@pytest.mark.parametrize("name", ["audio", "audio_struct", "struct", "readout", "sink"])
def test_segments_cannot_take_the_names_of_spans(gqa: HookedALM, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} name spans of every input"):
        gqa.prepare(audio=ONE, segments=[(name, "now")])


def test_segments_have_to_be_the_text(gqa: HookedALM) -> None:
    for conversation in (user(ONE, "now then"), user("no", "w"), user(ONE)):
        with pytest.raises(InputError, match="must join to the one text"):
            gqa.prepare(conversation=conversation, segments=[("a", "now")])


@pytest.mark.parametrize("text", [CHINESE, RARE_TEXT, f"{RARE_TEXT} and {CHINESE}", "naïve — 😀?"])
def test_characters_of_several_tokens(gqa: HookedALM, text: str) -> None:
    x = gqa.prepare(audio=ONE, text=text)
    assert text_of(gqa, x, "text") == text
    half = len(text) // 2
    x = gqa.prepare(audio=ONE, segments=[("first", text[:half]), ("second", text[half:])])
    assert text_of(gqa, x, "text") == text
    union = x.spans.mask("first", "second")
    assert torch.equal(union, x.spans.mask("text"))
    assert x.spans.positions("first", 0)[0] == x.spans.positions("text", 0)[0]
    assert x.spans.positions("second", 0)[-1] == x.spans.positions("text", 0)[-1]


def test_answer_prefix_is_template(gqa: HookedALM) -> None:
    plain = gqa.prepare(audio=ONE, text=QUESTION)
    x = gqa.prepare(audio=ONE, text=QUESTION, answer_prefix="It is happy")
    assert x.spans["text"] == plain.spans["text"]
    assert gqa.tokenizer.decode(x.tokens[0]).endswith("<|im_start|>assistant\nIt is happy")
    assert x.shape[1] > plain.shape[1]
    assert x.spans["readout"][0] == [(x.shape[1] - 1, x.shape[1])]


def test_parts_of_the_answers_beginning_are_spans(gqa: HookedALM) -> None:
    parts = [("text", "The "), ("mention", "emotion"), ("text", " of it is")]
    x = gqa.prepare(audio=ONE, text=QUESTION, answer_prefix=parts)
    plain = gqa.prepare(audio=ONE, text=QUESTION, answer_prefix="The emotion of it is")
    assert torch.equal(x.tokens, plain.tokens)
    assert text_of(gqa, x, "mention") == "emotion"
    assert {*x.spans.positions("mention", 0)} < {*x.spans.positions("struct", 0)}
    assert {**x.spans.ranges} == {**plain.spans.ranges, "mention": x.spans["mention"]}
    # The last position is the readout, and nothing else.
    short = gqa.prepare(ONE, QUESTION, answer_prefix=parts[:2])
    assert text_of(gqa, short, "mention") + text_of(gqa, short, "readout") == "emotion"
    with pytest.raises(InputError, match="readout name spans of every input"):
        gqa.prepare(ONE, QUESTION, answer_prefix=[("readout", "It")])
    for wrong in (["It"], [("mention", 1)], [("mention",)]):
        with pytest.raises(InputError, match="got answer_prefix that is no text"):
            gqa.prepare(ONE, QUESTION, answer_prefix=wrong)


def test_text_items_without_a_type_are_text(gqa: HookedALM) -> None:
    bare = [{"role": "user", "content": [{"type": "audio", "audio": ONE}, {"text": QUESTION}]}]
    assert gqa.prepare(conversation=bare).spans == gqa.prepare(audio=ONE, text=QUESTION).spans


def test_only_the_users_words_are_text(gqa: HookedALM) -> None:
    x = gqa.prepare(conversation=CONVERSATIONS["system and history"])
    text = text_of(gqa, x, "text")
    assert text == f"Who speaks?{QUESTION}"
    assert "A woman." in text_of(gqa, x, "struct")
    assert [stop - start for start, stop in x.spans["audio"][0]] == [c.n_tokens for c in x.clips]


def test_a_source_that_occurs_twice_is_one_clip(gqa: HookedALM, tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, ONE, RATE)
    for source in (str(path), path, ONE, (ONE, RATE), gqa.read_clip(ONE)):
        x = gqa.prepare(audio=source, text=["a", "b", "c"])
        assert len(x.clips) == 3
        assert len({id(clip) for clip in x.clips}) == 1
        assert x.clip_rows == (0, 1, 2)
    x = gqa.prepare(audio=[str(path), path], text="a")
    assert x.clips[0] is x.clips[1]
    assert x.clips[0].name == "clip.wav"
    x = gqa.prepare(audio=[ONE, ONE.copy()], text="a")
    assert x.clips[0] is not x.clips[1]
    # Across calls, too, for those who read it themselves.
    clip = gqa.read_clip(path)
    prepared = [gqa.prepare(audio=clip, text=text) for text in ("a", "b")]
    assert prepared[0].clips == prepared[1].clips == (clip,)


def test_clips_say_what_was_done_to_them(gqa: HookedALM, tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.stack([ONE, ONE], 1), 2 * RATE)
    (clip,) = gqa.prepare(audio=path, text="a").clips
    assert clip.seconds == pytest.approx(0.315)
    assert any("downmixed" in note for note in clip.notes)
    assert any("resampled from 32000 Hz" in note for note in clip.notes)


@pytest.mark.parametrize("seconds", [0.03, 0.05, 0.27, 0.63, 0.999, 1.0])
def test_seconds_of_a_clip_of_any_length(
    gqa: HookedALM, processor: Qwen2AudioProcessor, seconds: float
) -> None:
    clip = noise(seconds)
    x = gqa.prepare(audio=clip, text="a")
    assert torch.equal(x.tokens, by_processor(processor, [user(clip, "a")])["input_ids"])
    ((start, stop),) = x.spans["audio"][0]
    assert x.spans.seconds(0, 0.0, seconds) == [(start, stop)]
    # A position for every 0.04 s, but for what the two halvings round.
    assert abs(stop - start - seconds / 0.04) < 1


# What is refused.


def test_audio_that_cannot_be_used(gqa: HookedALM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lasts 1.200 s, expected at most 1 s"):
        gqa.prepare(audio=noise(1.2), text="a")
    (cut,) = gqa.prepare(audio=noise(1.2), text="a", truncate=True).clips
    assert cut.n_frames == (100,)
    assert cut.seconds == 1.0
    assert cut.notes[-1] == "truncated from 1.200 s to 1 s"
    with pytest.raises(InputError, match="too short for one audio position"):
        gqa.prepare(audio=noise(0.01), text="a")
    for url in ("http://host/a.wav", "https://host/a.wav"):
        with pytest.raises(InputError, match="download the clip"):
            gqa.prepare(audio=url, text="a")
        item = {"type": "audio", "audio_url": url}
        with pytest.raises(InputError, match="download the clip"):
            gqa.prepare(conversation=[{"role": "user", "content": [item]}])
    with pytest.raises(InputError, match="no such file"):
        gqa.prepare(audio=tmp_path / "missing.wav", text="a")
    with pytest.raises(InputError, match="NaN"):
        gqa.prepare(audio=np.full(RATE // 2, np.nan, dtype=np.float32), text="a")
    assert gqa.audio is not None
    mel, frame = gqa.audio.feature_shape
    for value in (np.nan, np.inf):
        features = torch.zeros(1, mel, frame).index_fill(2, torch.tensor(3), value)
        with pytest.raises(InputError, match="hearing a clip: got features that are NaN or inf"):
            gqa.audio.clip(features, [frame])
    for item in ({"type": "audio"}, {"type": "audio", "audio": ONE, "path": "a.wav"}):
        with pytest.raises(InputError, match="expected one of 'audio', 'path' or 'url'"):
            gqa.prepare(conversation=[{"role": "user", "content": [item]}])


def test_arguments_that_do_not_fit_together(gqa: HookedALM) -> None:
    with pytest.raises(InputError, match="2 audio rows and 3 texts"):
        gqa.prepare(audio=[ONE, TWO], text=["a", "b", "c"])
    with pytest.raises(InputError, match="0 audio rows"):
        gqa.prepare(audio=[], text="a")
    with pytest.raises(InputError, match="give audio, text, or both"):
        gqa.prepare()
    with pytest.raises(InputError, match="text or segments, not both"):
        gqa.prepare(audio=ONE, text="a", segments=[("a", "a")])
    with pytest.raises(InputError, match="a conversation, or audio and text"):
        gqa.prepare(audio=ONE, conversation=user("a"))


def test_placeholders_in_the_text(gqa: HookedALM) -> None:
    with pytest.raises(InputError, match="has 2 audio placeholders for 1 clips"):
        gqa.prepare(audio=ONE, text="and <|AUDIO|> there")
    with pytest.raises(InputError, match="has 1 audio placeholders for 0 clips"):
        gqa.prepare(text="<|AUDIO|>")
    # A clip whose message makes no placeholder.
    gqa_template = gqa.prompts.chat_template
    try:
        gqa.prompts.chat_template = gqa_template.replace("<|AUDIO|>", "")
        with pytest.raises(InputError, match="has 0 audio placeholders for 1 clips"):
            gqa.prepare(audio=ONE, text="a")
    finally:
        gqa.prompts.chat_template = gqa_template


def test_templates_that_rewrite_the_text(gqa: HookedALM) -> None:
    template = gqa.prompts.chat_template
    try:
        gqa.prompts.chat_template = template.replace("content['text']", "content['text'] | trim")
        assert text_of(gqa, gqa.prepare(audio=ONE, text="a b"), "text") == "a b"
        with pytest.raises(InputError, match="it rewrites the text"):
            gqa.prepare(audio=ONE, text=" a b")
    finally:
        gqa.prompts.chat_template = template


def test_folders_without_processor_files(tiny_models: TinyModels, tmp_path: Path) -> None:
    bare = tiny_models.hooked("mha")
    assert bare.tokenizer is None
    for use in (lambda: bare.prepare(audio=ONE, text="a"), lambda: bare.read_clip(ONE)):
        with pytest.raises(InputError, match="no processor files .*or use `encode`"):
            use()
    # A tokenizer alone serves text, not prepare.
    folder = tmp_path / "m"
    shutil.copytree(tiny_models.folder(), folder)
    (folder / "processor_config.json").unlink()
    model = HookedALM.from_pretrained(folder)
    assert model("hello").shape[0] == 1
    with pytest.raises(InputError, match="no processor files"):
        model.prepare(audio=ONE, text="a")
    # The files of older versions.
    processor = AutoProcessor.from_pretrained(tiny_models.folder())
    processor.feature_extractor.save_pretrained(folder)
    assert (folder / "preprocessor_config.json").exists()
    x = HookedALM.from_pretrained(folder).prepare(audio=ONE, text="a")
    assert torch.equal(x.tokens, tiny_models.hooked().prepare(audio=ONE, text="a").tokens)
    assert (x.tokens == PLACEHOLDER).sum() == x.clips[0].n_tokens
