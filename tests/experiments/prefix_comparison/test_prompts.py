"""Prefixes, their check against what was saved, and the runs made of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from hooked_alm import HookedALM
from hooked_alm.bundled import ASSETS, CLIPS
from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.ob1 import (
    CONFLICT_MAP,
    LABELS,
    SENTENCES,
    ob1_clip_names,
    prompt_segments,
)
from hooked_alm.experiments.prefix_comparison.items import read_items
from hooked_alm.experiments.prefix_comparison.plan import (
    Contents,
    PrefixRun,
    joined_as_text,
    matched,
    position_runs,
    teacher_forced,
)
from hooked_alm.experiments.prefix_comparison.prompts import (
    PreparedItem,
    prefix_check,
    prepare_items,
)
from hooked_alm.experiments.prefix_comparison.settings import PrefixComparisonConfig
from hooked_alm.methods.reading.segment_mass import partition
from prefix_comparison_toy import item, load_hf, text_checkpoint, write_items
from tiny import AUDIO_BOS, IM_END, PLACEHOLDER
from tolerances import PADDED_ROW, SHIFTED_POSITIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedALM:
    return HookedALM.from_pretrained(text_checkpoint(tmp_path_factory.mktemp("text")))


def prepared(model: HookedALM, folder: Path, *items: dict[str, Any]) -> list[PreparedItem]:
    return prepare_items(model, read_items(write_items(folder / "items.jsonl", items)))


# --- Three forms of a prefix


def test_raw_segments_are_the_text_and_nothing_else(model: HookedALM, tmp_path: Path) -> None:
    one = prepared(model, tmp_path, item(3))[0]
    given = item(3)["conditions"]["agentic"]["prefix"]
    prefix = one.prefixes["agentic"]
    assert model.tokenizer.decode(prefix.ids) == "".join(text for _, text in given)
    spans = prefix.x.spans
    tool = "".join(
        model.tokenizer.decode([prefix.ids[i]]) for i in spans.positions("tool_response", 0)
    )
    assert tool == dict(given)["tool_response"]
    assert spans["sink"] == [[(0, 1)]]
    assert spans["readout"] == [[(len(prefix.ids) - 1, len(prefix.ids))]]
    covered = sorted(i for name in spans for i in spans.positions(name, 0))
    assert covered == list(range(len(prefix.ids)))


def test_messages_are_rendered_by_the_template(model: HookedALM, tmp_path: Path) -> None:
    one = item(0)
    # The text of one message occurs in the template and in the other message.
    messages = [
        {"role": "user", "content": "assistant", "segment": "spec"},
        {"role": "tool", "content": "the assistant said", "segment": "tool_response"},
    ]
    one["conditions"]["agentic"] = {"messages": messages, "tools": [{"name": "read_file"}]}
    prefix = prepared(model, tmp_path, one)[0].prefixes["agentic"]
    assert prefix.text == (
        "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>tool\nthe assistant said<|im_end|>\n"
        "tools read_file<|im_start|>assistant\n"
    )
    shown = {
        name: "".join(
            model.tokenizer.decode([prefix.ids[i]]) for i in prefix.x.spans.positions(name, 0)
        )
        for name in ("spec", "tool_response")
    }
    assert shown == {"spec": "assistant", "tool_response": "the assistant said"}


def write_tone(path: Path, pitch: float, seconds: float = 0.4) -> None:
    time = np.arange(int(16_000 * seconds)) / 16_000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * time), 16_000)


def audio_item(folder: Path, number: int, seconds: float = 0.4) -> dict[str, Any]:
    write_tone(folder / f"t{number}.wav", 150 + 100 * number, seconds)
    ask = [["text", "What is "], ["word", "it?"]]
    return {
        "id": f"tone{number}",
        "continuation": "abc"[number % 3] + "<|im_end|>",
        "conditions": {
            "real": {"audio": f"t{number}.wav", "segments": ask},
            "silent": {"audio": f"t{number}.wav", "silent": True, "segments": ask},
            "transcript": {"text": "It is a tone. What is it?"},
        },
    }


def test_audio_and_silence_of_its_length(gqa: HookedALM, tmp_path: Path) -> None:
    one = prepared(gqa, tmp_path, audio_item(tmp_path, 0), audio_item(tmp_path, 1))[0]
    real, silent = one.prefixes["real"], one.prefixes["silent"]
    assert real.ids == silent.ids
    assert real.x.clips[0].n_frames == silent.x.clips[0].n_frames
    assert not torch.equal(real.x.clips[0].features, silent.x.clips[0].features)
    assert silent.x.clips[0].name == "silence like t0.wav"
    spans = real.x.spans
    assert [real.ids[i] for i in spans.positions("audio", 0)].count(PLACEHOLDER) == real.ids.count(
        PLACEHOLDER
    )
    assert AUDIO_BOS in [real.ids[i] for i in spans.positions("audio_struct", 0)]
    assert not set(spans.positions("word", 0)) & set(spans.positions("text", 0))
    assert not one.prefixes["transcript"].x.clips


def test_what_cannot_be_prepared(model: HookedALM, gqa: HookedALM, tmp_path: Path) -> None:
    long = item(0)
    long["conditions"]["agentic"]["prefix"].append(["text", "word " * 200])
    with pytest.raises(InputError, match=r"items.jsonl line 1: conditions.agentic: got \d+ tokens"):
        prepared(model, tmp_path, long)
    with pytest.raises(InputError, match="line 1: conditions.real: .*text model"):
        prepared(model, tmp_path, audio_item(tmp_path, 0))
    broken = audio_item(tmp_path, 0)
    (tmp_path / "t0.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"line 1: conditions.real: .*t0.wav"):
        prepared(gqa, tmp_path, broken)
    bare = HookedALM(model.cfg)
    with pytest.raises(InputError, match="no tokenizer"):
        prepared(bare, tmp_path, item(0))


# --- Card M-002-1: is it what the real run read?


def saved_of(model: HookedALM, folder: Path) -> dict[str, Any]:
    prefix = prepared(model, folder, item(0))[0].prefixes["agentic"]
    assert prefix.offsets is not None
    return {
        "token_ids": prefix.ids,
        "token_texts": [model.tokenizer.decode([i]) for i in prefix.ids],
        "prompt_offsets": prefix.offsets,
        "token_spans": {"tool_response": prefix.x.spans["tool_response"][0]},
    }


def with_saved(saved: dict[str, Any], text: str | None = None) -> dict[str, Any]:
    one = item(0)
    one["conditions"]["agentic"]["saved"] = saved
    if text is not None:
        one["conditions"]["agentic"]["prefix"][1][1] = text
    return one


def test_the_same_prefix_passes_and_is_recorded(model: HookedALM, tmp_path: Path) -> None:
    saved = saved_of(model, tmp_path)
    items = prepared(model, tmp_path, with_saved(saved))
    row = prefix_check(items)[0]
    assert row["compared"] == ["prompt_offsets", "token_ids", "token_spans", "token_texts"]
    assert row["first_differing_token"] is None
    pieces = model.tokenizer.convert_ids_to_tokens(saved["token_ids"])
    prepared(model, tmp_path, with_saved({"token_texts": pieces}))


@pytest.mark.parametrize("field", ["token_ids", "token_texts", "prompt_offsets", "token_spans"])
def test_one_changed_character_is_found_at_its_token(
    model: HookedALM, tmp_path: Path, field: str
) -> None:
    """The spec says "f0 adda. " instead of "f0 adds. "; for offsets and spans, one letter more."""
    saved = saved_of(model, tmp_path)
    text = "f0 adda. " if field in ("token_ids", "token_texts") else "f0 addds. "
    new = prepared(model, tmp_path, with_saved({}, text))[0].prefixes["agentic"].ids
    pairs = enumerate(zip(saved["token_ids"], new, strict=False))
    at = next(i for i, (one, other) in pairs if one != other)
    where = {"token_spans": "token_spans.tool_response", "prompt_offsets": "prompt_offsets: .* is"}
    message = where.get(field, f"{field}: the first token that differs is {at}: the real run has")
    with pytest.raises(InputError, match=f"line 1: conditions.agentic.saved.{message}"):
        prepared(model, tmp_path, with_saved({field: saved[field]}, text))


def test_a_prefix_that_ends_early_differs_at_its_end(model: HookedALM, tmp_path: Path) -> None:
    ids = saved_of(model, tmp_path)["token_ids"]
    with pytest.raises(InputError, match=rf"differs is {len(ids) - 2}: the real run has nothing"):
        prepared(model, tmp_path, with_saved({"token_ids": ids[:-2]}))


# --- Card M-002-2: teacher forcing


@torch.no_grad()
def test_the_index_map(model: HookedALM) -> None:
    x = model.encode(
        input_ids=torch.arange(3, 10)[None], attention_mask=torch.ones(1, 7, dtype=torch.long)
    )
    run = teacher_forced("a", x, [20, 21, 22, 23])
    assert run.queries[0] == 6
    assert run.queries[-1] == 5 + 4
    log_p = model(run.x)[0, run.queries].log_softmax(-1)
    by_hand = -log_p.gather(-1, run.targets[:, None]).sum()
    losses = model(run.x, return_type="loss", loss_per_token=True)[0, -4:].sum()
    torch.testing.assert_close(by_hand, losses, atol=2e-5, rtol=0)


@torch.no_grad()
def test_what_the_model_says_itself_is_the_likeliest(model: HookedALM, tmp_path: Path) -> None:
    x = prepared(model, tmp_path, item(0))[0].prefixes["agentic"].x
    new = model.generate(x, max_new_tokens=6, return_type="tokens", do_sample=False)
    new = new[0, x.shape[1] :] if new.shape[1] > 6 else new[0]
    run = teacher_forced("a", x, new.tolist())
    assert torch.equal(model(run.x)[0, run.queries].argmax(-1), run.targets)


def test_c39_ids_are_joined_and_not_text(model: HookedALM, tmp_path: Path) -> None:
    """A word cut in two is one token as text, and two as ids."""
    one = item(0, continuation="sistant went home.")
    for name in ("agentic", "assisted"):
        one["conditions"][name]["prefix"][-1][1] = " as" if name == "agentic" else "\nX"
    ready = prepared(model, tmp_path, one)[0]
    ids = [teacher_forced(n, p.x, ready.continuation) for n, p in ready.prefixes.items()]
    assert ids[0].targets.tolist() == ids[1].targets.tolist() == ready.continuation
    for run, prefix in zip(ids, ready.prefixes.values(), strict=True):
        assert run.x.tokens[0, : run.start].tolist() == prefix.ids
    text = [joined_as_text(model, ready, name) for name in ready.prefixes]
    whole = model.tokenizer(
        ready.prefixes["agentic"].text + "sistant went home.", add_special_tokens=False
    )
    assert text[0].x.tokens[0].tolist() == whole["input_ids"]
    assert text[0].x.tokens[0].tolist() != ids[0].x.tokens[0].tolist()
    assert text[0].targets.tolist() != text[1].targets.tolist()


def test_text_joined_for_audio_too(gqa: HookedALM, tmp_path: Path) -> None:
    ready = prepared(gqa, tmp_path, audio_item(tmp_path, 0), audio_item(tmp_path, 1))[0]
    real = ready.prefixes["real"]
    run = joined_as_text(gqa, ready, "real")
    assert run.x.tokens[0, : run.start].tolist() == real.ids
    assert run.targets.tolist()[-1] == IM_END
    assert run.x.clips == real.x.clips


# --- Card M-002-14: position modes


@torch.no_grad()
def test_c5_left_padding_is_no_control_and_a_gap_is(model: HookedALM, tmp_path: Path) -> None:
    ready = prepared(model, tmp_path, item(1))[0]
    a, b = (teacher_forced(n, p.x, ready.continuation) for n, p in ready.prefixes.items())
    n = a.start - b.start
    assert n > 5
    plain = model(b.x)[0, b.queries]
    target = a.x.position_ids[0, a.start].item()
    change = {}
    for mode in ("left_pad", "gap", "filler"):
        moved = matched(b, n, mode, model, "\n")  # type: ignore[arg-type]
        assert moved.x.position_ids[0, moved.start].item() == target
        assert moved.targets.tolist() == b.targets.tolist()
        change[mode] = (model(moved.x)[0, moved.queries] - plain).abs().max().item()
    assert change["left_pad"] < SHIFTED_POSITIONS[torch.float32]
    assert change["gap"] > 0.1
    assert change["filler"] > 0.1
    # Invariant I12, and without explicit positions (C33): transformers' cumulative sum is the same.
    shifted = model.encode(
        input_ids=b.x.tokens,
        attention_mask=b.x.attention_mask,
        position_ids=b.x.position_ids + 1000,
    )
    moved_far = (model(shifted)[0, b.queries] - plain).abs().max().item()
    assert 0 < moved_far < SHIFTED_POSITIONS[torch.float32]


@torch.no_grad()
def test_c33_plain_forward_counts_the_pads_and_ours_says_its_positions(
    model: HookedALM, tmp_path: Path
) -> None:
    ready = prepared(model, tmp_path, item(1))[0]
    b = teacher_forced("assisted", ready.prefixes["assisted"].x, ready.continuation)
    moved = matched(b, 9, "left_pad", model, "\n")
    assert moved.x.position_ids[0].tolist() == list(range(moved.x.shape[1]))
    assert position_runs(moved.x) == [[0, moved.x.shape[1]]]
    assert position_runs(matched(b, 9, "gap", model, "\n").x) == [
        [0, b.start - 1], [b.start + 8, b.x.shape[1] + 9],
    ]  # fmt: skip
    hf = load_hf(model.cfg.model_name)
    by_default = hf(input_ids=moved.x.tokens, attention_mask=moved.x.attention_mask).logits
    explicit = hf(
        input_ids=moved.x.tokens,
        attention_mask=moved.x.attention_mask,
        position_ids=moved.x.position_ids,
    ).logits
    assert torch.equal(by_default[0, 9:], explicit[0, 9:])
    atol = PADDED_ROW[torch.float32]
    torch.testing.assert_close(model(moved.x)[0, 9:], explicit[0, 9:], atol=atol, rtol=0)


def test_filler_is_seen_and_pads_are_not(model: HookedALM, tmp_path: Path) -> None:
    ready = prepared(model, tmp_path, item(1))[0]
    b = teacher_forced("assisted", ready.prefixes["assisted"].x, ready.continuation)
    filled, padded = (matched(b, 4, mode, model, "ab") for mode in ("filler", "left_pad"))  # type: ignore[arg-type]
    assert filled.x.attention_mask.all()
    assert filled.x.spans["filler"] == [[(1, 5)]]
    assert model.tokenizer.decode(filled.x.tokens[0, 1:5]) == "abab"
    assert padded.x.attention_mask[0].tolist() == [0] * 4 + [1] * b.x.shape[1]
    for moved in (filled, padded):
        seen = [i for name in partition(moved.x) for i in moved.x.spans.positions(name, 0)]
        assert sorted(seen) == moved.x.attention_mask[0].nonzero().flatten().tolist()
        where = moved.x.spans.positions("spec", 0)
        old = b.x.spans.positions("spec", 0)
        assert moved.x.tokens[0, where].tolist() == b.x.tokens[0, old].tolist()


# --- Card M-002-13: content


def changed(
    model: HookedALM, items: list[PreparedItem], run: PrefixRun, segment: str, **settings: Any
) -> tuple[list[PrefixRun], dict[str, str]]:
    config = PrefixComparisonConfig(**settings)
    contents = Contents(model=model, items=items, index=0, run=run, segment=segment, config=config)
    return contents.interventions()


def test_interventions_on_tokens_keep_their_number(model: HookedALM, tmp_path: Path) -> None:
    items = prepared(model, tmp_path, item(0), item(1), item(2))
    run = teacher_forced("agentic", items[0].prefixes["agentic"].x, items[0].continuation)
    made, left_out = changed(model, items, run, "tool_response")
    assert not left_out
    names = [f"{kind} tool_response" for kind in PrefixComparisonConfig().interventions]
    assert [one.name for one in made] == names
    where = run.x.spans.positions("tool_response", 0)
    others = [i for i in range(run.x.shape[1]) if i not in where]
    for one in made:
        assert torch.equal(one.x.tokens[0, others], run.x.tokens[0, others])
    tokens = {one.name.split()[0]: one.x.tokens[0, where].tolist() for one in made}
    assert tokens["original"] == run.x.tokens[0, where].tolist()
    newline = model.tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert tokens["neutral"] == (newline * len(where))[: len(where)]
    spec = run.x.tokens[0, run.x.spans.positions("spec", 0)].tolist()
    assert tokens["repeat_spec"] == (spec * len(where))[: len(where)]
    next_x = items[1].prefixes["agentic"].x
    theirs = next_x.tokens[0, next_x.spans.positions("tool_response", 0)].tolist()
    assert tokens["wrong_task"] == (theirs * 2)[: len(where)]


def test_interventions_that_cannot_be_made_say_why(model: HookedALM, tmp_path: Path) -> None:
    items = prepared(model, tmp_path, item(0))
    run = teacher_forced("agentic", items[0].prefixes["agentic"].x, items[0].continuation)
    made, left_out = changed(model, items, run, "tool_response", spec="docstring")
    assert [one.name for one in made] == ["original tool_response", "neutral tool_response"]
    assert left_out == {
        "repeat_spec": "there is no segment 'docstring' to repeat",
        "wrong_task": "there is no other content to borrow",
    }


def test_interventions_on_audio_borrow_clips_of_the_same_length(
    gqa: HookedALM, tmp_path: Path
) -> None:
    given = [audio_item(tmp_path, 0), audio_item(tmp_path, 1, 0.6), audio_item(tmp_path, 2)]
    items = prepared(gqa, tmp_path, *given)
    run = teacher_forced("real", items[0].prefixes["real"].x, items[0].continuation)
    made, left_out = changed(gqa, items, run, "audio")
    assert left_out == {"repeat_spec": "audio has no text to repeat"}
    by_name = {one.name: one.x.clips[0] for one in made}
    assert by_name["original audio"] is run.x.clips[0]
    assert by_name["wrong_task audio"] is items[2].prefixes["real"].x.clips[0]
    silent = items[0].prefixes["silent"].x.clips[0]
    assert torch.equal(by_name["neutral audio"].features, silent.features)


def test_the_bundled_items_are_what_they_say() -> None:
    """Made from the OB1 prompts: voice's label, another label named, one sentence."""
    items = read_items(ASSETS / "prefix_comparison.jsonl")
    for one, clip in zip(items, ob1_clip_names(), strict=True):
        named = CONFLICT_MAP[clip.emotion]
        segments = prompt_segments("conflict", clip.language, voice=clip.emotion, named=named)
        label = LABELS[clip.language][clip.emotion]
        assert (one.id, one.continuation) == (clip.stem, f"{label}<|im_end|>")
        for name in ("real", "silent"):
            condition = one.conditions[name]
            assert condition.segments == segments
            assert condition.audio == (CLIPS / f"{clip.stem}.wav",)
            assert condition.silent == (name == "silent")
        spoken = one.conditions["transcript"].segments
        assert spoken is not None
        assert SENTENCES[clip.language] in spoken[0][1]
        assert spoken[1:] == segments
