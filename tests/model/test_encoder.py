"""The hooked audio encoder: edits, norms, weights, and what it refuses. Its values are compared
with Hugging Face's in ``tests/converters``."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_reference import with_positions
from hooked_alm import ConversionError, InputError
from hooked_alm.components.block import Block
from hooked_alm.components.norm import LayerNorm
from hooked_alm.config import EncoderConfig
from hooked_alm.encoder import AudioEncoder
from tiny import TinyModels, hf_inputs
from tolerances import OTHER_KERNEL

INPUTS = with_positions(hf_inputs([[63], [23]], [9, 14]))
CLOSE = {"atol": OTHER_KERNEL[torch.float32], "rtol": 0}


def config(**changes: Any) -> EncoderConfig:
    sizes = dict(n_layers=2, d_model=24, n_heads=3, n_key_value_heads=3, d_head=8, d_mlp=38,
                 n_ctx=11, n_mels=5, act_fn="gelu")  # fmt: skip
    return EncoderConfig(**{**sizes, **changes})


@pytest.fixture
def encoder() -> AudioEncoder:
    torch.manual_seed(0)
    made = AudioEncoder(config())
    for parameter in made.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return made


def zeroed(value: Tensor, hook: Any) -> Tensor:
    value = value.clone()
    value[:, 3:20, 1] = 0
    return value


@torch.no_grad()
def test_an_edit_acts_as_in_hugging_face(tiny_models: TinyModels) -> None:
    """A head at some rows, by a PyTorch hook before its output projection."""
    model, hf = tiny_models.hooked(), tiny_models.hf()
    attn = hf.model.audio_tower.layers[0].self_attn

    def zero(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].unflatten(-1, (-1, attn.head_dim))
        return (zeroed(z, None).flatten(2),)

    handle = attn.out_proj.register_forward_pre_hook(zero)
    expected = hf(**INPUTS).logits
    handle.remove()
    x = model.encode(**INPUTS)
    hook = ("audio.encoder.blocks.0.attn.hook_z", zeroed)
    assert torch.equal(model.run_with_hooks(x, fwd_hooks=[hook]), expected)
    theirs = ("encoder_blocks.0.attn.hook_z", zeroed)
    assert torch.equal(model.run_with_hooks(x, fwd_hooks=[theirs]), expected)
    assert not torch.equal(model(x), expected)


@torch.no_grad()
def test_norms_take_over_when_a_point_is_edited(encoder: AudioEncoder) -> None:
    norm, x = encoder.blocks[0].ln1, 2 + torch.randn(2, 7, 24)
    assert isinstance(norm, LayerNorm)
    plain, seen = norm(x), {}
    for point in (norm.hook_scale, norm.hook_normalized):
        point.add_hook(lambda value, hook, point=point: seen.update({id(point): value.clone()}))
    assert torch.equal(norm(x), plain)
    variance = x.double().var(-1, unbiased=False, keepdim=True)
    scale = (variance + 1e-5).sqrt()
    normalized = (x - x.double().mean(-1, keepdim=True)) / scale
    for point, expected in ((norm.hook_scale, scale), (norm.hook_normalized, normalized)):
        assert (seen[id(point)] - expected).abs().max() < 1e-5
        point.remove_hooks()
    norm.hook_scale.add_hook(lambda value, hook: 2 * value)
    halved = norm.w * (normalized / 2) + norm.b
    torch.testing.assert_close(norm(x), halved.float(), **CLOSE)
    norm.hook_normalized.add_hook(lambda value, hook: -value)
    torch.testing.assert_close(norm(x), (norm.b - norm.w * normalized / 2).float(), **CLOSE)
    for point in (norm.hook_scale, norm.hook_normalized):
        point.remove_hooks()
    assert torch.equal(norm(x), plain)
    with pytest.raises(TypeError):
        norm("x")


@torch.no_grad()
def test_weights_by_their_names(encoder: AudioEncoder) -> None:
    """Stacked over the blocks; what heads write and ``b_O`` is what the attention writes."""
    assert encoder.W_Q.shape == encoder.W_K.shape == (2, 3, 24, 8)
    assert encoder.W_O.shape == (2, 3, 8, 24)
    assert (encoder.W_in.shape, encoder.b_in.shape) == ((2, 24, 38), (2, 38))
    assert not encoder.b_K.any()
    assert encoder.b_Q.any()
    mel = torch.randn(2, 5, 22)
    *_, (z, out) = watched(encoder, mel, "hook_z")
    written = torch.einsum("bphe,hed->bpd", z, encoder.W_O[1]) + encoder.b_O[1]
    torch.testing.assert_close(out, written, **CLOSE)
    *_, (post, out) = watched(encoder, mel, "hook_post")
    torch.testing.assert_close(out, post @ encoder.W_out[1] + encoder.b_out[1], **CLOSE)


def watched(encoder: AudioEncoder, mel: Tensor, point: str) -> list[tuple[Tensor, Tensor]]:
    """What a point shows in every block, and what its part writes."""
    seen: list[list[Tensor]] = []
    for block in encoder.blocks:
        part, out = (
            (block.attn, block.hook_attn_out)
            if point == "hook_z"
            else (block.mlp, block.hook_mlp_out)
        )
        pair: list[Tensor] = []
        seen.append(pair)
        for at in (getattr(part, point), out):
            at.add_hook(lambda value, hook, pair=pair: pair.append(value.clone()))
    encoder(mel)
    for block in encoder.blocks:
        for at in block.modules():
            if hasattr(at, "remove_hooks"):
                at.remove_hooks()
    return [(pair[0], pair[1]) for pair in seen]


@torch.no_grad()
def test_streams_can_be_viewed(encoder: AudioEncoder) -> None:
    """In memory position by position, unlike Hugging Face's."""
    for state in encoder.states(torch.randn(2, 5, 22)):
        assert state.is_contiguous()


@torch.no_grad()
def test_earlier_states_are_let_go(encoder: AudioEncoder) -> None:
    """A run holds no more than the stream it is at."""
    outputs: list[weakref.ref[Tensor]] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    alive: list[bool] = []
    encoder.ln_final.register_forward_pre_hook(
        lambda module, args: alive.extend(one() is not None for one in outputs)
    )
    encoder(torch.randn(1, 5, 22))
    assert alive == [False, True]


@torch.no_grad()
def test_masked_positions_are_not_heard(encoder: AudioEncoder) -> None:
    mel, is_real = torch.randn(2, 5, 22), torch.arange(11) < torch.tensor([[7], [11]])
    *_, whole = encoder.states(mel, is_real)
    mel[0, :, 16:] = 9.0  # read by convolutions from position 7 on
    *_, again = encoder.states(mel, is_real)
    assert torch.equal(again[0, :7], whole[0, :7])
    assert torch.equal(again[1], whole[1])
    *_, unmasked = encoder.states(mel)
    assert not torch.equal(unmasked[0, :7], whole[0, :7])


@pytest.mark.parametrize("shape", [(1, 5, 20), (1, 5, 24), (1, 4, 22)])
def test_spectrograms_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    encoder = AudioEncoder(config())
    with pytest.raises(InputError, match=r"expected \[mel 5, frame 22\]. Pad it"):
        encoder(torch.randn(shape))
    shorter = AudioEncoder(config(takes_shorter=True))
    if shape == (1, 5, 20):
        assert shorter(torch.randn(shape)).shape == (1, 10, 24)
        return
    with pytest.raises(InputError, match=r"expected \[mel 5, frame 22 or fewer\]\."):
        shorter(torch.randn(shape))


@torch.no_grad()
def test_fp16_stays_finite(encoder: AudioEncoder) -> None:
    """Only in fp16, and behind the whole block."""
    for block, is_clamped in (
        (encoder.blocks[0], True),
        (Block(config(clamps_fp16=False), 0, "full_attention"), False),
    ):
        half = block.half()
        for parameter in half.parameters():
            parameter.zero_()
        big = torch.full((1, 3, 24), 65_000.0, dtype=torch.float16)
        context = encoder._context(big, None)
        found = half(big, context)
        assert (found == (64_512 if is_clamped else 65_000)).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [({"d_head": 7}, "d_model = 24 is not a multiple of n_heads = 3"),
     ({"n_mels": 0}, "n_mels = 0, expected a whole number"),
     ({"eps": -1.0}, "eps = -1.0")],
)  # fmt: skip
def test_configs_that_no_encoder_has(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConversionError, match=f"audio encoder: .*{told}"):
        config(**change)
