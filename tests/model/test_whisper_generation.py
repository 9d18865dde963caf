"""Whisper's generation: the tokens, segments and times that Hugging Face's gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from hooked_alm import HookedALM, InputError
from hooked_alm.inputs import ALMInput
from whisper_toy import IDS, START, TIMES, Whispers, noise

pytestmark = pytest.mark.filterwarnings("ignore")
NEW = 10


def features_of(x: ALMInput) -> Tensor:
    return torch.cat([clip.features for clip in x.clips])


@pytest.fixture
def pair(whispers: Whispers) -> tuple[HookedALM, ALMInput, dict[str, Any]]:
    """The model, two prompts, and what tells Hugging Face the same."""
    model = whispers.hooked()
    x = model.prepare([noise(0.4), noise(0.8, seed=1)], language="en")
    return model, x, {"input_features": features_of(x), "language": "en", "task": "transcribe"}


ALIKE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "repetition": {"repetition_penalty": 1.7},
    "cold": {"temperature": 0.0},
    "a threshold": {
        "temperature": 0.0,
        "logprob_threshold": -1.0,
        "compression_ratio_threshold": 1.1,
    },
    "nobody speaks": {
        "temperature": (0.0, 0.3),
        "no_speech_threshold": 0.001,
        "logprob_threshold": 0.0,
    },
    "sampled": {"temperature": 0.7},
    "sampled several times": {"temperature": 0.7, "do_sample": True, "num_return_sequences": 2},
    "fallen back": {"temperature": (0.0, 0.4, 1.0), "logprob_threshold": -0.5},
}


@pytest.mark.parametrize("name", ALIKE)
def test_tokens_are_hugging_faces(
    whispers: Whispers, pair: tuple[HookedALM, ALMInput, dict[str, Any]], name: str
) -> None:
    """With one seed where it samples, with and without a cache."""
    model, x, asked = pair
    options = {"max_new_tokens": NEW, **ALIKE[name]}
    torch.manual_seed(5)
    expected = whispers.hf().generate(**asked, **options)
    for use_cache in (True, False):
        torch.manual_seed(5)
        found = model.generate(
            x, return_type="tokens", use_past_kv_cache=use_cache, **options
        )  # fmt: skip
        assert torch.equal(found, expected), use_cache


def test_prompts_of_every_kind(whispers: Whispers) -> None:
    """What was said before, the beginning of a transcript, English alone, timestamps, bf16."""
    model, hf = whispers.hooked(), whispers.hf()
    clip, said = noise(0.4), "What emotion"
    x = model.prepare(clip, said, language="zh", task="translate")
    asked: dict[str, Any] = {"input_features": features_of(x), "max_new_tokens": NEW}
    prompt_ids = x.tokens[0, : int((x.tokens[0] == START).int().argmax())]
    expected = hf.generate(**asked, language="zh", task="translate", prompt_ids=prompt_ids)
    assert torch.equal(model.generate(x, NEW, return_type="tokens"), expected)
    x = model.prepare(clip, language="en", answer_prefix=" happy sad")
    expected = hf.generate(**asked, language="en", decoder_input_ids=x.tokens)
    assert torch.equal(model.generate(x, NEW, return_type="tokens"), expected)
    timed = model.prepare(clip, language="en", timestamps=True)
    expected = hf.generate(**asked, language="en", return_timestamps=True)
    found = model.generate(timed, NEW, return_type="tokens")
    assert torch.equal(found, expected)
    assert (found >= TIMES).any()
    english = whispers.hooked(is_multilingual=False)
    expected = whispers.hf(is_multilingual=False).generate(**asked)
    found = english.generate(english.prepare(clip), NEW, return_type="tokens")
    assert torch.equal(found, expected)
    low = whispers.hooked(torch.bfloat16)
    expected = whispers.hf(torch.bfloat16).generate(
        asked["input_features"].bfloat16(), max_new_tokens=NEW, language="en"
    )
    found = low.generate(low.prepare(clip, language="en"), NEW, return_type="tokens")
    assert torch.equal(found, expected)


def test_prompts_of_different_length(whispers: Whispers) -> None:
    """Pads are not attended to, whatever they are, and count no position."""
    model, hf = whispers.hooked(), whispers.hf()
    said = ["", "What emotion", "Answer with one word. system user", "happy"]
    x = model.prepare([noise(0.2 + 0.2 * i, seed=i) for i in range(4)], said, language="en")
    asked: dict[str, Any] = {"decoder_input_ids": x.tokens, "language": "en", "max_new_tokens": 20}
    expected = hf.generate(
        features_of(x), decoder_attention_mask=x.attention_mask, num_beams=2, **asked
    )
    assert not torch.equal(hf.generate(features_of(x), num_beams=2, **asked), expected)
    assert torch.equal(model.generate(x, 20, return_type="tokens", num_beams=2), expected)
    other = replace(x, tokens=x.tokens.masked_fill(x.attention_mask == 0, 5))
    assert torch.equal(model.generate(other, 20, return_type="tokens", num_beams=2), expected)
    first = replace(x, tokens=x.tokens.masked_fill(x.tokens == START, IDS["<|endoftext|>"]))
    with pytest.raises(InputError, match="begin with the id that pads them"):
        model.generate(first, NEW, return_type="tokens")


def test_a_transcript_that_has_begun_is_the_first_windows(whispers: Whispers) -> None:
    """Later windows have the control tokens alone."""
    model, hf = whispers.hooked(), whispers.hf()
    for clip, options in ((noise(0.8), {}), (noise(2.7, seed=3), {"long_form": True})):
        x = model.prepare(
            clip, language="en", timestamps=True, answer_prefix=" happy", **options
        )  # fmt: skip
        expected = hf.generate(
            model.audio.features_and_mask(x.clips)[0], decoder_input_ids=x.tokens, language="en",
            max_new_tokens=8, return_timestamps=True,
        )  # fmt: skip
        seen: list[int] = []

        def note(ids: Tensor, hook: Any, seen: list[int] = seen) -> None:
            seen.append(ids.shape[1])

        found = model.generate(x, 8, return_type="tokens", fwd_hooks=[("hook_tokens", note)])
        assert torch.equal(found, expected)
        prompts = [n for n in seen if n > 1]
        assert prompts == [x.shape[1], *[3] * (len(prompts) - 1)]
        assert len(prompts) > 1
    several = model.generate(
        model.prepare(noise(0.4), language="en", answer_prefix=" happy"), 8, return_type="tokens",
        num_beams=3, num_return_sequences=2,
    )  # fmt: skip
    assert len(several) == 2


def test_a_cache_holds_one_pass(whispers: Whispers) -> None:
    """Also where a time is predicted that nobody asked for."""
    model = whispers.hooked()
    x = model.prepare(noise(0.6, seed=9), language="en")

    def want(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[..., TIMES + 5] += 1e4  # twice in a row ends a segment
        return scores

    tokens, cache = model.generate(
        x, 8, return_type="tokens", fwd_hooks=[("unembed.hook_out", want)],
        names_filter="blocks.1.hook_resid_post",
    )  # fmt: skip
    assert tokens.tolist() == [[TIMES + 5] * 8]
    assert cache["blocks.1.hook_resid_post"].shape[1] == x.shape[1] + 7


def test_long_form_after_what_was_said(whispers: Whispers) -> None:
    """It goes before the first window, and before the tokens of earlier ones."""
    model, hf = whispers.hooked(), whispers.hf()
    x = model.prepare(noise(3.3, seed=3), "What emotion", language="en", long_form=True)
    said = x.tokens[0, : int((x.tokens[0] == START).int().argmax())]
    features = model.audio.features_and_mask(x.clips)[0]
    for kind in ("first-segment", "all-segments"):
        options: dict[str, Any] = {
            "condition_on_prev_tokens": True, "prompt_condition_type": kind, "max_new_tokens": 8,
        }  # fmt: skip
        expected = hf.generate(
            features, language="en", return_timestamps=True, prompt_ids=said, **options
        )
        assert torch.equal(model.generate(x, return_type="tokens", **options), expected)


LONG: dict[str, dict[str, Any]] = {
    "plain": {},
    "beams": {"num_beams": 2},
    "conditioned": {"condition_on_prev_tokens": True},
    "all that the paper does": {
        "condition_on_prev_tokens": True, "temperature": (0.0, 0.5), "logprob_threshold": -3.0,
        "compression_ratio_threshold": 1.35, "no_speech_threshold": 0.6,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_long_form(whispers: Whispers, name: str) -> None:
    """One recording, and two of different length, in windows that end where a segment does."""
    model, hf = whispers.hooked(), whispers.hf()
    options = {"max_new_tokens": 8, **LONG[name]}
    recordings = [noise(3.3, seed=3), noise(2.1, seed=4)]
    for some in (recordings[:1], recordings):
        x = model.prepare(some, language="en", long_form=True)
        features, mask = model.audio.features_and_mask(x.clips)
        theirs = {"attention_mask": mask} if len(some) > 1 else {}
        torch.manual_seed(2)
        expected = hf.generate(
            features, **theirs, language="en", return_timestamps=True, return_segments=True,
            **options,
        )  # fmt: skip
        torch.manual_seed(2)
        found = model.generate(x, return_type="tokens", return_segments=True, **options)
        assert torch.equal(found["sequences"], expected["sequences"])
        for ours, others in zip(found["segments"], expected["segments"], strict=True):
            assert len(ours) == len(others) > 2
            for one, other in zip(ours, others, strict=True):
                assert (one["start"], one["end"]) == (other["start"], other["end"])
                assert torch.equal(one["tokens"], other["tokens"])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_times_of_tokens(whispers: Whispers, options: dict[str, Any]) -> None:
    """Hugging Face's, which exchanges its kernel for them; ours stays, and so does its config."""
    for attention in ("eager", "sdpa"):
        model = whispers.hooked(attention=attention)
        x = model.prepare([noise(0.5), noise(0.9, seed=1)], language="en")
        hf = type(whispers.hf()).from_pretrained(whispers.folder(), attn_implementation="eager")
        mask = model.audio.features_and_mask(x.clips)[1]
        expected = hf.eval().generate(
            features_of(x), attention_mask=mask, language="en", return_token_timestamps=True,
            max_new_tokens=NEW, **options,
        )  # fmt: skip
        found = model.generate(
            x, NEW, return_type="tokens", return_token_timestamps=True, **options
        )
        assert torch.equal(found["sequences"], expected["sequences"])
        assert torch.equal(found["token_timestamps"], expected["token_timestamps"]), attention
        assert (found["token_timestamps"] > 0).any()
        assert model.cfg.attn_implementation == attention


def test_hooks_act_once_per_step(whispers: Whispers) -> None:
    """In every step, on the positions that run; what is heard is heard once."""
    model = whispers.hooked()
    x = model.prepare(noise(0.4), language="en")
    seen: list[tuple[str, int]] = []

    def mute(z: Tensor, hook: Any) -> Tensor:
        seen.append((hook.name, z.shape[1]))
        return z.index_fill(2, torch.tensor([1]), 0.0)

    def count(value: Tensor, hook: Any) -> None:
        seen.append((hook.name, 0))

    point, heard = "blocks.1.cross_attn.hook_z", "audio.encoder.blocks.0.hook_mlp_out"
    keys = "blocks.1.cross_attn.hook_k"
    hooks = [(point, mute), (heard, count), (keys, count)]
    found = model.generate(x, NEW, return_type="tokens", fwd_hooks=hooks)
    n_steps = found.shape[1]
    assert [n for name, n in seen if name == point] == [x.shape[1], *[1] * (n_steps - 1)]
    assert [name for name, _ in seen].count(heard) == 1
    assert [name for name, _ in seen].count(keys) == n_steps
    # As if every step had been a run of its own.
    tokens = x
    for step in range(n_steps):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(point, mute)])[:, -1]
        logits[:, [*model.generation_config.suppress_tokens]] = -torch.inf
        if step == 0:
            logits[:, [*model.generation_config.begin_suppress_tokens]] = -torch.inf
        assert int(logits.argmax()) == int(found[0, step])
        tokens = tokens.extend(found[:, step : step + 1])
    assert not torch.equal(found, model.generate(x, NEW, return_type="tokens"))


def test_a_memory_is_transcribed(whispers: Whispers) -> None:
    model, hf = whispers.hooked(), whispers.hf()
    x = model.prepare([noise(0.4), noise(0.8)], language="en")
    draw = torch.Generator().manual_seed(4)
    memory = torch.randn(2, 50, model.cfg.d_model, generator=draw)
    for row in (0, 1):  # one by one: Hugging Face's cannot do two that end at different steps
        expected = hf.generate(
            encoder_outputs=BaseModelOutput(memory[[row]]), language="en", task="transcribe",
            max_new_tokens=NEW,
        )  # fmt: skip
        found = model.generate(replace(x, memory=memory)[row], NEW, return_type="tokens")
        assert torch.equal(found, expected)
    # One pass, whatever times are predicted: behind a memory there is nothing to hear.
    timed = model.prepare(noise(0.4), language="en", timestamps=True)
    expected = hf.generate(
        encoder_outputs=BaseModelOutput(memory[[0]]), language="en", task="transcribe",
        max_new_tokens=NEW, return_timestamps=True, force_unique_generate_call=True,
    )  # fmt: skip
    found = model.generate(timed, NEW, memory=memory[[0]], return_type="tokens")
    assert torch.equal(found, expected[:, timed.shape[1] :])
    assert (found >= TIMES).sum() > 2
    alone = [
        model.generate(replace(x, memory=memory)[row], NEW, return_type="tokens")[0]
        for row in (0, 1)
    ]
    both = model.generate(replace(x, memory=memory), NEW, return_type="tokens")
    assert not torch.equal(*alone)
    assert all(torch.equal(both[row], one) for row, one in enumerate(alone))
    given = model.generate(x, NEW, memory=memory, return_type="tokens")
    plain = model.generate(replace(x, memory=memory), NEW, return_type="tokens")
    assert torch.equal(given, plain)


def test_activations_of_all_steps(whispers: Whispers) -> None:
    model = whispers.hooked()
    x = model.prepare(noise(0.4), language="en")
    names = ["blocks.1.hook_resid_post", "blocks.0.cross_attn.hook_pattern",
             "blocks.0.cross_attn.hook_k", "blocks.1.attn.hook_pattern"]  # fmt: skip
    tokens, cache = model.generate(x, NEW, return_type="tokens", names_filter=names)
    whole = x.extend(tokens)
    n = x.shape[1] + tokens.shape[1] - 1
    _, expected = model.run_with_cache(whole, names_filter=names)
    for name in names:
        theirs = expected[name]
        if name.startswith("blocks.1.attn"):
            theirs = theirs[:, :, :n, :n]
        elif "hook_k" not in name:
            theirs = theirs[:, :, :n] if "pattern" in name else theirs[:, :n]
        torch.testing.assert_close(cache[name], theirs, atol=1e-5, rtol=0)


def test_text(whispers: Whispers) -> None:
    model = whispers.hooked()
    x = model.prepare([noise(0.4), noise(0.8)], language="en")
    tokens = model.generate(x, NEW, return_type="tokens")
    expected = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert model.generate(x, NEW) == expected
    timed = model.generate(x, NEW, return_token_timestamps=True)
    assert timed["sequences"] == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "language": ({"language": "en"}, "Give language= to `prepare`"),
    "timestamps": ({"return_timestamps": True}, "Give timestamps= to `prepare`"),
    "previous text": ({"prompt_ids": torch.tensor([1])}, "Give text= to `prepare`"),
    "do_sample": ({"do_sample": True}, "Give temperature"),
    "times of several": (
        {"return_token_timestamps": True, "num_beams": 2, "num_return_sequences": 2},
        "Ask for one",
    ),
    "no temperature": ({"logprob_threshold": -1.0}, "from 0.0 on"),
    "unknown": ({"num_beam": 2}, "nearest: num_beams"),
    "several passes": (
        {"names_filter": "hook_embed", "temperature": (0.0, 0.2)}, "heard more than once",
    ),
    "beams in a cache": ({"names_filter": "hook_embed", "num_beams": 2}, "got beam search"),
    "longer than there are positions": ({"max_new_tokens": 80}, "max_target_positions"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_refused(whispers: Whispers, name: str) -> None:
    model = whispers.hooked()
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        model.generate(model.prepare(noise(0.4), language="en"), return_type="tokens", **options)


def test_prompts_that_are_refused(whispers: Whispers) -> None:
    model = whispers.hooked()
    clips = [noise(0.4), noise(0.8)]
    plain, timed = (model.prepare(c, language="en", timestamps=t)
                    for c, t in zip(clips, (False, True), strict=True))  # fmt: skip
    long = model.prepare(noise(2.5), language="en", long_form=True)
    wrong = replace(long, tokens=torch.cat([plain.tokens[:, :2], plain.tokens[:, 3:]], 1))
    with pytest.raises(InputError, match="Prepare them with long_form=True"):
        model.generate(wrong, return_type="tokens")
    ids = torch.cat([plain.tokens[:, :3], timed.tokens])
    both = model.encode(input_features=features_of(plain).repeat(2, 1, 1), decoder_input_ids=ids)
    mixed = replace(both, tokens=torch.stack([plain.tokens[0, 1:], timed.tokens[0]]))
    with pytest.raises(InputError, match="some prompts want timestamps"):
        model.generate(mixed, return_type="tokens")
    with pytest.raises(InputError, match="they have 0 clips"):
        model.generate(torch.tensor([[START]]), return_type="tokens")
    with pytest.raises(InputError, match="heard more than once"):
        model.generate(timed, return_type="tokens", names_filter="hook_embed")
    model.generation_config, kept = None, model.generation_config
    try:
        with pytest.raises(InputError, match=r"no generation_config\.json"):
            model.generate(plain, return_type="tokens")
    finally:
        model.generation_config = kept
