"""MiMo-Audio from codes on: ids in three axes, prompts around clips of codes, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cases.mimo_audio import CASE, D_LOCAL, EMPTY, GROUP, SIZES, published, with_tokenizer
from composed_lm import noise
from hooked_alm import ConversionError, HookedALM, InputError
from hooked_alm.converters.parity import verify
from tiny import AUDIO_BOS, AUDIO_EOS, PLACEHOLDER, edit_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the family's case, with a tokenizer whose ids its config names."""
    root = tmp_path_factory.mktemp("mimo_audio") / "made"
    root.mkdir()
    CASE.save(root, torch.float32)
    return with_tokenizer(root, root.parent / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder)


@pytest.fixture(scope="module")
def bare(folder: Path) -> HookedALM:
    """The checkpoint as the case wrote it, without a tokenizer."""
    return HookedALM.from_pretrained(folder.parent / "made")


def codes_of(n_frames: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(n_frames)
    return torch.stack([torch.randint(size, (n_frames,), generator=draw) for size in SIZES])


@torch.no_grad()
def test_clips_of_codes_go_through_the_chat_template(model: HookedALM) -> None:
    """Equal to what the published code joins segment by segment."""
    codes = codes_of(20)
    clip = model.audio.clip(codes[None], [20], name="codes")
    x = model.prepare(clip, "What emotion?", answer_prefix="<think>\n\n</think>\n")
    prompt = (
        f"<|im_start|>user\n<|sosp|>{'<|empty|>' * 5}<|eosp|>What emotion?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n"
    )
    text = torch.tensor(model.tokenizer(prompt)["input_ids"])
    ids = torch.full((1, 1 + len(SIZES), GROUP * len(text)), -100)
    ids[0, 0, ::GROUP] = text
    ids[0, 1:] = torch.tensor(EMPTY)[:, None]
    (start, stop), *_ = x.spans.clips[0][0]
    ids[0, 1:, GROUP * start : GROUP * stop] = codes
    assert torch.equal(x.tokens[0], text)
    assert torch.equal(model.hf_arguments(x)["input_ids"], ids)
    assert torch.equal(model(model.encode(input_ids=ids)), model(x))
    assert x.spans.positions("audio_struct", 0) == [start - 1, stop]
    assert x.spans.seconds(0, 0.0, 0.16) == [(start, start + 1)]


def test_published_numbers() -> None:
    """What no tiny checkpoint shows."""
    front_end = published()
    assert front_end.tokens.placeholder == 151667
    assert front_end.tokens.markers == {151665, 151666}
    assert front_end.sizes == [1025, 1025, *[129] * 6]
    assert front_end.empty_codes == [1024, 1024, *[128] * 6]
    local = front_end.patch_encoder.config
    sizes = (local.num_hidden_layers, local.hidden_size, local.num_attention_heads, local.head_dim)
    assert (*sizes, local.intermediate_size) == (6, 1024, 64, 16, 4096)
    assert front_end.projector.weight.shape == (4096, 4096)


@torch.no_grad()
@pytest.mark.parametrize("both_ways", [True, False])
def test_frames_of_a_group_see_each_other_as_the_config_says(
    folder: Path, tmp_path: Path, both_ways: bool
) -> None:
    """The last frame's codes reach the first frame, or do not."""
    fields = {"input_full_attention": both_ways}
    made = edit_config(folder, tmp_path / "model", lambda config: config | fields)
    model = HookedALM.from_pretrained(made)
    codes = codes_of(GROUP)
    changed = codes.clone()
    changed[:, -1] = (codes[:, -1] + 1) % 10  # an empty code of no channel
    first = []
    for one in (codes, changed):
        x = model.prepare(model.audio.clip(one[None], [GROUP], name="codes"), "What?")
        _, cache = model.run_with_cache(x, names_filter="audio.hook_encoder_out")
        first.append(cache["audio.hook_encoder_out"][0, 0, :D_LOCAL])
    assert torch.equal(*first) != both_ways


def test_sound_is_refused(model: HookedALM) -> None:
    with pytest.raises(InputError, match="MiMo-Audio reads codes, not sound"):
        model.prepare(noise(0.5), "What?")


@torch.no_grad()
def test_encode_and_its_inverse(bare: HookedALM) -> None:
    for inputs in (CASE.inputs([[12], [28, 16]], [9, 12]), CASE.inputs([[], []], [5, 8])):
        x = bare.encode(**inputs)
        marks = (x.tokens == AUDIO_BOS) | (x.tokens == AUDIO_EOS)
        assert torch.equal(x.spans.mask("audio_struct"), marks)  # also without a tokenizer
        found = bare.hf_arguments(x)
        assert all(torch.equal(found[name], value) for name, value in inputs.items())
    flat = inputs["input_ids"][:, 0, ::GROUP]
    mask = inputs["attention_mask"]
    assert torch.equal(bare(bare.encode(input_ids=flat, attention_mask=mask)), bare(x))


@torch.no_grad()
def test_wrong_inputs_are_refused(bare: HookedALM) -> None:
    ids = CASE.inputs([[12]], [9])["input_ids"]
    with pytest.raises(InputError, match=r"expected \[batch, 5, frames\], frames in groups of 4"):
        bare.encode(input_ids=ids[:, :4])
    with pytest.raises(InputError, match="frames in groups of 4"):
        bare.encode(input_ids=ids[..., :-1])
    with pytest.raises(InputError, match="negative ids where the first of a group"):
        bare.encode(input_ids=ids.roll(1, 2))
    wrong = ids.clone()
    wrong[0, 2][ids[0, 0].eq(PLACEHOLDER)] = SIZES[1]
    with pytest.raises(InputError, match=f"row 0 has codes from .* to {SIZES[1]} in channel 1"):
        bare.encode(input_ids=wrong)
    with pytest.raises(InputError, match="3 audio placeholders .* have no codes"):
        bare(ids[:, 0, ::GROUP])


@torch.no_grad()
def test_an_answer_that_goes_on_in_speech_is_refused(bare: HookedALM) -> None:
    """The head is made to prefer the id of a group; forbidden, the answer stays text."""
    x = bare.encode(**CASE.inputs([[12]], [9]))

    def prefer(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits[..., PLACEHOLDER] += 1000
        return logits

    options: dict[str, Any] = dict(
        return_type="tokens", fwd_hooks=[("unembed.hook_out", prefer)], eos_token_id=None
    )
    with pytest.raises(InputError, match="Where the model itself begins to speak"):
        bare.generate(x, 4, **options)
    tokens = bare.generate(x, 4, suppress_tokens=[PLACEHOLDER], **options)
    assert not (tokens == PLACEHOLDER).any()


def test_gradients_reach_the_encoder_although_codes_have_none(bare: HookedALM) -> None:
    seen = []
    x = bare.encode(**CASE.inputs([[12]], [9]))
    with bare.hooks(bwd_hooks=[("audio.hook_encoder_out", lambda g, hook: seen.append(g))]):
        bare(x)[0, -1, 5].backward()
    bare.zero_grad()
    assert [bool(g.abs().sum() > 0) for g in seen] == [True]


def test_speech_generation_is_left_out_and_said(folder: Path) -> None:
    table = verify(str(folder)).table()
    assert "5 x speech generation" in table
    assert "no HF class" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": False}, "attention_bias = False, expected True"),
        ({"audio_channels": 8}, "speech_vocab_size names 4 channels, audio_channels = 8"),
        ({"partial_rotary_factor": 0.5}, "does not act on partial_rotary_factor = 0.5"),
    ],
)
def test_configs_that_ask_for_more_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    broken = edit_config(folder, tmp_path / "model", lambda config: config | change)
    with pytest.raises(ConversionError, match=message):
        HookedALM.from_pretrained(broken)
