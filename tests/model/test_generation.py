"""``generate`` gives Hugging Face's tokens, and hooks fire at every step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, Qwen2AudioForConditionalGeneration

from hf_reference import hf_activations, with_positions
from hooked_alm import HookedALM, HookNameError, InputError
from hooked_alm.hooks import ActivationCache
from tiny import PAD, TinyModels, edit_config, hf_inputs
from tolerances import GENERATION_STEPS

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


# --- Caching


def everything(name: str) -> bool:
    return True


def generated(
    model: HookedALM, inputs: dict[str, Any] = INPUTS, n_new: int = 5, **options: Any
) -> tuple[Tensor, ActivationCache]:
    """New tokens, and every point of every step."""
    options = {"names_filter": everything, "do_sample": False, **options}
    return model.generate(model.encode(**inputs), n_new, return_type="tokens", **options)


def has_positions(name: str) -> bool:
    return not name.startswith("audio.") and name != "hook_audio_embed"


def over_keys(name: str) -> bool:
    return name.endswith(("hook_pattern", "hook_attn_scores"))


def real_rows(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """Rows of real positions; of a pattern, its queries. Pads may attend to anything."""
    if not has_positions(name):
        return value
    return (value.transpose(1, 2) if over_keys(name) else value)[mask.bool()]


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Masked scores are the dtype's minimum, which no rounding touches."""
    far = expected.float() < -1e30
    assert torch.equal(got[far], expected[far]), what
    tolerance = GENERATION_STEPS[dtype]
    torch.testing.assert_close(
        got[~far].float(), expected[~far].float(), atol=tolerance, rtol=0, msg=what
    )


@pytest.mark.parametrize(
    ("variant", "dtype", "attention"),
    [
        ("gqa", torch.float32, "sdpa"),
        ("mha", torch.float32, "eager"),
        ("mqa, sliding", torch.float32, "sdpa"),
        ("mqa, sliding", torch.bfloat16, "sdpa"),
    ],
)
@torch.no_grad()
def test_joined_steps_are_one_run_over_prompt_and_answer(
    tiny_models: TinyModels, variant: str, dtype: torch.dtype, attention: str
) -> None:
    """Position by position: with and without the KV cache, and by Hugging Face's own forward."""
    model = tiny_models.hooked(variant, dtype, attention)
    new, steps = generated(model)
    x = model.encode(**INPUTS).extend(new[:, :-1])
    _, whole = model.run_with_cache(x, names_filter=everything)
    tokens, reruns = generated(model, use_past_kv_cache=False)
    assert torch.equal(tokens, new)
    assert set(steps) == set(reruns) == set(whole)
    n_pos = WIDTH + 5 - 1
    for name, expected in whole.items():
        for cache in (steps, reruns):
            assert cache[name].shape == expected.shape, name
            got = real_rows(name, cache[name], x.attention_mask)
            assert_close(got, real_rows(name, expected, x.attention_mask), dtype, name)
        if name.endswith("_embed") or name.startswith("audio.") or name == "hook_tokens":
            assert torch.equal(steps[name], expected), name
    assert steps["resid_post", 3].shape == (2, n_pos, model.cfg.d_model)
    assert steps["pattern", 3].shape == (2, model.cfg.n_heads, n_pos, n_pos)
    assert torch.equal(steps["hook_tokens"], x.tokens)

    inputs = {**INPUTS, "input_ids": x.tokens, "attention_mask": x.attention_mask}
    reference = hf_activations(tiny_models.hf(variant, dtype, attention), with_positions(inputs))
    compared = [name for name in reference if name in steps]
    assert len(compared) > 60
    for name in compared:
        got = real_rows(name, steps[name], x.attention_mask)
        assert_close(got, real_rows(name, reference[name], x.attention_mask), dtype, name)


@pytest.mark.parametrize("variant", ["gqa", "mqa, sliding"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_every_row_is_that_of_its_step(
    tiny_models: TinyModels, variant: str, use_cache: bool
) -> None:
    """Bit by bit: the prompt's rows are a plain run's, later ones those of a loop by hand."""
    model = tiny_models.hooked(variant)
    new, joined = generated(model, use_past_kv_cache=use_cache)
    x = model.encode(**INPUTS)
    cfg = model.cfg
    config = PreTrainedConfig(
        num_hidden_layers=cfg.n_layers,
        layer_types=list(cfg.layer_types),
        sliding_window=cfg.sliding_window,
    )
    kv = DynamicCache(config=config) if use_cache else None
    for step in range(5):
        stop = WIDTH + step
        start = stop - 1 if step else 0
        _, cache = model.run_with_cache(
            x.extend(new[:, :step]), names_filter=everything, past_key_values=kv
        )
        for name, value in cache.items():
            if not has_positions(name):
                assert step == 0 or not use_cache
                assert torch.equal(joined[name], value), name
                continue
            axis = 2 if over_keys(name) else 1
            value = value.narrow(axis, value.shape[axis] - (stop - start), stop - start)
            row = joined[name].narrow(axis, start, stop - start)
            if over_keys(name):
                # Keys end at the last query; a window drops the first ones.
                hidden = torch.finfo(row.dtype).min if name.endswith("scores") else 0.0
                keys = slice(stop - value.shape[3], stop)
                assert (row[..., stop:] == hidden).all(), name
                assert (row[..., : keys.start] == hidden).all(), name
                row = row[..., keys]
            assert torch.equal(row, value), (name, step)


def test_caching_changes_no_token_and_is_only_done_on_request(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    plain = gqa.generate(x, 4)
    assert all(isinstance(text, str) for text in plain)
    text, cache = gqa.generate(x, 4, names_filter=everything)
    assert text == plain
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 9}
    torch.manual_seed(3)
    tokens = gqa.generate(x, 6, return_type="tokens", **sampled)
    torch.manual_seed(3)
    again, cache = generated(gqa, n_new=6, **sampled)
    assert torch.equal(tokens, again)
    assert torch.equal(cache["hook_tokens"][:, WIDTH:], tokens[:, :-1])
    assert not gqa.list_hooks()


def test_what_is_cached(gqa: HookedALM) -> None:
    """Filters mean what they mean to ``run_with_cache``, but None, which asks for nothing."""
    x = gqa.encode(**INPUTS)
    z, both = "blocks.1.attn.hook_z", {"blocks.0.hook_q_input", "blocks.0.attn.hook_q_input"}
    for names, expected in (
        (z, {z}),
        ([z, "hook_embed"], {z, "hook_embed"}),
        ((z,), {z}),
        ({z}, {z}),
        ([], set()),
        (lambda name: name == z, {z}),
        ("blocks.0.attn.hook_q_input", both),
        ("blocks.0.hook_q_input", both),
        (gqa.matching(None), set(gqa.run_with_cache(x)[1])),
    ):
        _, cache = generated(gqa, n_new=2, names_filter=names)
        assert set(cache) == expected
    for names in ("blocks.9.hook_z", [z, "hook_embd"], lambda name: False, "blocks.0.hook_attn_in"):
        with pytest.raises(HookNameError):
            gqa.generate(x, 2, names_filter=names)
    assert not gqa.list_hooks()
    # A prompt of one token more than it has: nothing to join.
    one, cache = generated(gqa, n_new=1, names_filter="hook_embed")
    assert one.shape[1] == 1
    assert cache["hook_embed"].shape == (2, WIDTH, 54)
    # The methods of a cache work on the joined one, generated positions included.
    _, cache = generated(gqa)
    parts = cache.decompose_resid()
    assert_close(parts.sum(0), cache["resid_post", 3], torch.float32, "decomposition")


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_the_cache_sees_the_edits_of_hooks(gqa: HookedALM, use_cache: bool) -> None:
    """As ``run_with_cache`` would under the same hooks, returned or in place, at every step."""

    def double_head(value: Tensor, hook: Any) -> None:
        value[:, :, 2] *= 2

    def fade(value: Tensor, hook: Any) -> Tensor:
        return 0.5 * value

    hooks = [("blocks.1.attn.hook_z", double_head), ("blocks.2.hook_mlp_out", fade)]
    new, cache = generated(gqa, use_past_kv_cache=use_cache, fwd_hooks=hooks)
    x = gqa.encode(**INPUTS).extend(new[:, :-1])
    with gqa.hooks(fwd_hooks=hooks):
        _, expected = gqa.run_with_cache(x, names_filter=everything)
    for name, value in expected.items():
        got = real_rows(name, cache[name], x.attention_mask)
        assert_close(got, real_rows(name, value, x.attention_mask), torch.float32, name)
    _, plain = generated(gqa, use_past_kv_cache=use_cache)
    assert not torch.equal(plain["resid_post", 1][:, :WIDTH], cache["resid_post", 1][:, :WIDTH])
    assert torch.equal(plain["resid_post", 0][:, :WIDTH], cache["resid_post", 0][:, :WIDTH])


def test_in_place_edits_do_not_reach_what_was_cached_before_them(gqa: HookedALM) -> None:
    """Block 0's output and block 1's input are one tensor, in every step."""

    def clear(value: Tensor, hook: Any) -> None:
        value.zero_()

    _, cache = generated(gqa, fwd_hooks=[("blocks.1.hook_resid_pre", clear)])
    assert not cache["resid_pre", 1].any()
    assert cache["resid_post", 0].abs().amax((0, 2)).all()


@torch.no_grad()
def test_several_samples_of_a_prompt_are_cached_row_by_row(gqa: HookedALM) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}
    new, cache = generated(gqa, TWO_CLIPS, **options)
    assert len(new.unique(dim=0)) > 2
    prompts = gqa.encode(**TWO_CLIPS)[torch.tensor([0, 0, 0, 1, 1, 1])]
    x = prompts.extend(new[:, :-1])
    _, expected = gqa.run_with_cache(x, names_filter=["hook_embed", "blocks.3.hook_resid_post"])
    assert torch.equal(cache["hook_embed"], expected["hook_embed"])
    name = "blocks.3.hook_resid_post"
    got = real_rows(name, cache[name], x.attention_mask)
    assert_close(got, real_rows(name, expected[name], x.attention_mask), torch.float32, name)
    assert cache["hook_audio_embed"].shape[0] == 9


def test_a_row_that_has_ended_goes_on_with_pads(gqa: HookedALM) -> None:
    free = ours(gqa, INPUTS, max_new_tokens=9, do_sample=False)
    stop = {"eos_token_id": int(free[0, 2]), "pad_token_id": PAD}
    new, cache = generated(gqa, n_new=9, **stop)
    assert (new[0, 3:] == PAD).all()
    assert cache["hook_tokens"].shape == (2, WIDTH + new.shape[1] - 1)
    assert torch.equal(cache["hook_tokens"][:, WIDTH:], new[:, :-1])
    assert cache["resid_post", 3].shape[1] == WIDTH + new.shape[1] - 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_steps_keep_only_their_own_rows(gqa: HookedALM, use_cache: bool) -> None:
    """Between steps a cache holds as many numbers as positions have run, and no more memory."""
    from hooked_alm.generation import _Steps

    held: list[int] = []
    take = _Steps.take

    def watched(steps: _Steps, n_pos: int) -> None:
        take(steps, n_pos)
        parts = [part for parts in steps.parts.values() for part in parts]
        owned = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in parts}
        held.append(sum(storage.nbytes() for storage in owned.values()))

    with mock.patch.object(_Steps, "take", watched):
        generated(gqa, names_filter="blocks.2.hook_resid_mid", use_past_kv_cache=use_cache)
    assert held == [2 * (WIDTH + step) * 54 * 4 for step in range(5)]


def test_what_cannot_be_cached_is_refused(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    for options in (
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 2},
    ):
        with pytest.raises(InputError, match=r"expected greedy search or sampling.*x\.extend"):
            gqa.generate(x, 3, names_filter="hook_embed", **options)
    for options, match in (
        ({"cache_implementation": "static"}, "got cache_implementation='static'"),
        ({"past_key_values": DynamicCache()}, "past_key_values holds already"),
    ):
        with pytest.raises(InputError, match=match):
            gqa.generate(x, 3, names_filter="hook_embed", **options)
    assert not gqa.list_hooks()


# --- HookedTransformer's arguments


def test_arguments_of_hooked_transformer(gqa: HookedALM) -> None:
    """What has an equal in transformers gives what that gives."""
    free = ours(gqa, INPUTS, max_new_tokens=6, do_sample=False)
    stop = int(free[0, 2])
    stopped = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": stop, "pad_token_id": PAD}
    expected = ours(gqa, INPUTS, **stopped)
    assert not torch.equal(expected, free)
    assert torch.equal(ours(gqa, INPUTS, stop_at_eos=True, **stopped), expected)
    assert torch.equal(ours(gqa, INPUTS, stop_at_eos=False, **stopped), free)
    assert torch.equal(
        ours(gqa, INPUTS, max_new_tokens=6, do_sample=True, temperature=0.0, top_k=5), free
    )
    quiet = {"verbose": False, "freq_penalty": 0.0, "padding_side": "left", "prepend_bos": None}
    assert torch.equal(ours(gqa, INPUTS, max_new_tokens=6, do_sample=False, **quiet), free)
    # About strings only; this tokenizer has no BOS.
    assert torch.equal(ours(gqa, INPUTS, max_new_tokens=6, prepend_bos=True, do_sample=False), free)
    assert gqa.generate("hello", 3, prepend_bos=False) == gqa.generate("hello", 3)


def test_stopping_where_only_the_tokenizer_names_an_end(gqa: HookedALM) -> None:
    """As HookedTransformer does; transformers alone would not stop."""
    free = ours(gqa, INPUTS, max_new_tokens=6, do_sample=False)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    assert gqa.generation_config.eos_token_id is None
    tokenizer = SimpleNamespace(eos_token_id=int(free[0, 2]))
    with mock.patch.object(gqa, "tokenizer", tokenizer):
        assert torch.equal(ours(gqa, INPUTS, **options), free)
        got = ours(gqa, INPUTS, stop_at_eos=True, **options)
        again = ours(gqa, INPUTS, stop_at_eos=True, eos_token_id=None, **options)
    expected = ours(gqa, INPUTS, eos_token_id=int(free[0, 2]), **options)
    assert torch.equal(got, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"freq_penalty": 0.5}, "got freq_penalty=0.5, which transformers does not have"),
        ({"padding_side": "right"}, "got padding_side='right'"),
        ({"return_type": "input"}, "got return_type='input', expected 'text' or 'tokens'"),
        ({"return_type": "str"}, "got return_type='str'"),
        ({"prepend_bos": True}, "prepending a BOS token"),
        ({"prefill_chunk_size": 4}, "got prefill_chunk_size=4"),
        ({"temprature": 0.5}, "nearest: temperature"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(
    gqa: HookedALM, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        gqa.generate("hello", 2, **options)
    assert not gqa.list_hooks()


def test_stopping_without_any_end_is_refused(mha: HookedALM) -> None:
    with pytest.raises(InputError, match="names no end token"):
        mha.generate(mha.encode(**INPUTS), 2, return_type="tokens", stop_at_eos=True)
