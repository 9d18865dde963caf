"""``generate`` gives Hugging Face's tokens, and hooks fire at every step."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from hooked_alm import HookedALM, InputError
from tiny import PAD, TinyModels, edit_config, hf_inputs

INPUTS = hf_inputs([[63], [23]], [9, 14])
WIDTH = INPUTS["input_ids"].shape[1]
TWO_CLIPS = hf_inputs([[30, 17], [97]], [8, 5])


def ours(
    model: HookedALM, inputs: dict[str, Any], use_cache: bool = True, **options: Any
) -> Tensor:
    torch.manual_seed(0)
    x = model.encode(**inputs)
    return model.generate(x, return_type="tokens", use_past_kv_cache=use_cache, **options)


def theirs(hf: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    torch.manual_seed(0)
    return hf.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.7},
    "suppressed": {"do_sample": False, "suppress_tokens": [112, 307, 205, 113]},
    "beams": {"do_sample": False, "num_beams": 2},
    "beams, all returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("variant", ["gqa", "mqa, sliding"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_equal(tiny_models: TinyModels, variant: str, use_cache: bool) -> None:
    hf, model = tiny_models.hf(variant), tiny_models.hooked(variant)
    for name, options in OPTIONS.items():
        options = {"max_new_tokens": 9, **options}
        expected = theirs(hf, INPUTS, use_cache=use_cache, **options)
        assert expected.unique().numel() > 2, name
        assert torch.equal(ours(model, INPUTS, use_cache, **options), expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_tokens_equal_for_every_kernel(
    tiny_models: TinyModels, dtype: torch.dtype, attention: str
) -> None:
    hf = tiny_models.hf("mha, sliding", dtype, attention)
    model = tiny_models.hooked("mha, sliding", dtype, attention)
    for inputs in (INPUTS, TWO_CLIPS, hf_inputs([[], []], [6, 11])):
        for use_cache in (True, False):
            expected = theirs(hf, inputs, use_cache=use_cache, max_new_tokens=7, do_sample=False)
            got = ours(model, inputs, use_cache, max_new_tokens=7, do_sample=False)
            assert torch.equal(got, expected)


def test_copies_of_a_prompt_keep_their_clips(tiny_models: TinyModels) -> None:
    """Hugging Face repeats clips one by one, and so mixes up prompts with more than one."""
    hf, model = tiny_models.hf(), tiny_models.hooked()
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": 2}
    expand = hf._expand_inputs_for_generation
    clips = [0, 1, 0, 1, 2, 2]

    def expand_by_prompt(**arguments: Any) -> Any:
        ids, expanded = expand(**arguments)
        for name in ("input_features", "feature_attention_mask"):
            expanded[name] = TWO_CLIPS[name][clips]
        return ids, expanded

    with mock.patch.object(hf, "_expand_inputs_for_generation", expand_by_prompt):
        expected = theirs(hf, TWO_CLIPS, **options)
    assert torch.equal(ours(model, TWO_CLIPS, **options), expected)
    assert not torch.equal(theirs(hf, TWO_CLIPS, **options), expected)


GENERATION_CONFIGS: list[dict[str, Any]] = [
    {"max_new_tokens": 8, "repetition_penalty": 1.4, "suppress_tokens": [112, 134]},
    {"max_new_tokens": 6, "do_sample": True, "temperature": 0.5, "top_k": 7},
    {"max_length": WIDTH + 5, "num_beams": 2},
]


@pytest.mark.parametrize("config", GENERATION_CONFIGS)
def test_the_checkpoints_generation_config_is_honoured(
    tiny_models: TinyModels, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = edit_config(tiny_models.folder("mha"), tmp_path / "m", lambda config: None)
    (folder / "generation_config.json").write_text(json.dumps(config))
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    model = HookedALM.from_pretrained(folder)
    expected = theirs(hf, INPUTS)
    for _ in range(2):  # the second call finds the config as the first did
        assert torch.equal(ours(model, INPUTS), expected)
    # Arguments go before it.
    options = {"max_new_tokens": 3, "repetition_penalty": 1.0, "suppress_tokens": None}
    options |= {"do_sample": False, "num_beams": 1}
    plain = theirs(tiny_models.hf("mha"), INPUTS, **options)
    assert torch.equal(ours(model, INPUTS, **options), plain)
    assert not torch.equal(plain, expected[:, :3])


def test_stopping_and_padding(tiny_models: TinyModels, tmp_path: Path) -> None:
    hf, model = tiny_models.hf(), tiny_models.hooked()
    free = theirs(hf, INPUTS, max_new_tokens=9, do_sample=False)
    stop = int(free[0, 2])
    assert stop not in free[1, :4]
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": stop, "pad_token_id": PAD}
    expected = theirs(hf, INPUTS, **options)
    assert (expected[0] == PAD).any()
    assert torch.equal(ours(model, INPUTS, **options), expected)
    options["min_new_tokens"] = 6
    expected = theirs(hf, INPUTS, **options)
    assert torch.equal(ours(model, INPUTS, **options), expected)
    assert not (expected[:, :6] == stop).any()


class Steps:
    """What a hook sees: absolute position of its first row, and the shape."""

    def __init__(self, model: HookedALM) -> None:
        self.model, self.seen = model, []

    def __call__(self, value: Tensor, hook: Any) -> None:
        self.seen.append((self.model.pos_offset, tuple(value.shape[1:3])))


def test_hooks_fire_at_every_step(gqa: HookedALM) -> None:
    plain = ours(gqa, INPUTS, max_new_tokens=4)
    resid, pattern = Steps(gqa), Steps(gqa)
    hooks = [("blocks.1.hook_resid_pre", resid), ("blocks.1.attn.hook_pattern", pattern)]
    assert torch.equal(ours(gqa, INPUTS, max_new_tokens=4, fwd_hooks=hooks), plain)
    cached = [(0, WIDTH), *((WIDTH + step, 1) for step in range(3))]
    assert resid.seen == [(offset, (n, 54)) for offset, n in cached]
    assert pattern.seen == [(offset, (6, n)) for offset, n in cached]
    resid.seen, pattern.seen = [], []
    got = ours(gqa, INPUTS, use_cache=False, max_new_tokens=4, fwd_hooks=hooks)
    assert torch.equal(got, ours(gqa, INPUTS, use_cache=False, max_new_tokens=4))
    assert resid.seen == [(0, (WIDTH + step, 54)) for step in range(4)]
    # An ordinary run starts at 0 again.
    gqa(gqa.encode(**INPUTS))
    assert gqa.pos_offset == 0


@pytest.mark.parametrize("variant", ["gqa", "mqa, sliding"])
def test_edits_reach_the_tokens_with_and_without_cache(
    tiny_models: TinyModels, variant: str
) -> None:
    model = tiny_models.hooked(variant)

    def without_head(value: Tensor, hook: Any) -> None:
        value[:, :, 2] = 0

    def without_pattern(value: Tensor, hook: Any) -> None:
        value[:, 1] = 0

    def from_position(value: Tensor, hook: Any) -> None:
        """Only at absolute positions from the second new token on."""
        start = max(WIDTH + 1 - model.pos_offset, 0)
        value[:, start:] *= -3

    plain = ours(model, INPUTS, max_new_tokens=6)
    for name, hook in (
        ("blocks.0.attn.hook_z", without_head),
        ("blocks.3.attn.hook_pattern", without_pattern),
        ("blocks.1.hook_resid_post", from_position),
    ):
        edited = [
            ours(model, INPUTS, use_cache, max_new_tokens=6, fwd_hooks=[(name, hook)])
            for use_cache in (True, False)
        ]
        assert torch.equal(*edited), name
        assert not torch.equal(edited[0], plain), name
    # The first two tokens come from positions that the last hook left alone.
    assert torch.equal(edited[0][:, :2], plain[:, :2])
    assert not model.list_hooks()
    assert torch.equal(ours(model, INPUTS, max_new_tokens=6), plain)


def test_hooks_leave_when_generation_fails(gqa: HookedALM) -> None:
    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        ours(gqa, INPUTS, max_new_tokens=2, fwd_hooks=[("hook_embed", fail)])
    assert not gqa.list_hooks()


def test_audio_is_heard_without_a_cache_and_encoded_once(gqa: HookedALM) -> None:
    silent = {**INPUTS, "input_features": torch.zeros_like(INPUTS["input_features"])}
    with mock.patch.object(gqa.audio, "encode", wraps=gqa.audio.encode) as encode:
        got = ours(gqa, INPUTS, use_cache=False, max_new_tokens=6)
    assert encode.call_count == 1
    assert not torch.equal(got, ours(gqa, silent, use_cache=False, max_new_tokens=6))


def test_text(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    tokens = ours(gqa, INPUTS, max_new_tokens=6)
    expected = gqa.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert gqa.generate(x, 6) == expected
    assert len(gqa.generate("hello", 3)) == 1


def test_what_cannot_be_generated_is_refused(gqa: HookedALM, mha: HookedALM) -> None:
    right = {**INPUTS, "attention_mask": INPUTS["attention_mask"].flip(1)}
    with pytest.raises(InputError, match="padded on the right"):
        gqa.generate(gqa.encode(**right), 2)
    with pytest.raises(InputError, match="its folder has no tokenizer"):
        mha.generate(mha.encode(**INPUTS), 2)
    with pytest.raises(InputError, match="return_dict_in_generate"):
        gqa.generate(gqa.encode(**INPUTS), 2, return_dict_in_generate=True)
