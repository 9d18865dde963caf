"""A block that reads a memory, against the published layer: values, kept keys, points, refusals."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoderLayer

from hooked_alm import InputError
from hooked_alm.components.attention import AttentionContext
from hooked_alm.components.block import Block
from hooked_alm.config import StackConfig
from hooked_alm.hooks import HookPoint
from hooked_alm.points import BLOCK
from tiny import randomise

D, HEADS, MLP, MEMORY = 48, 4, 72, 25
NAMES = {
    "self_attn": "attn", "encoder_attn": "cross_attn", "self_attn_layer_norm": "ln1",
    "encoder_attn_layer_norm": "ln2", "final_layer_norm": "ln3", "out_proj": "o_proj",
    "fc1": "mlp.up_proj", "fc2": "mlp.down_proj",
}  # fmt: skip
DTYPES, KERNELS = [torch.float32, torch.bfloat16], ["sdpa", "eager"]


def pair(dtype: torch.dtype, attention: str) -> tuple[Block, WhisperDecoderLayer]:
    """Ours and theirs with the same weights; heads 12 wide, so that a misplaced scale shows."""
    config = WhisperConfig(
        d_model=D, decoder_attention_heads=HEADS, decoder_ffn_dim=MLP, encoder_attention_heads=2
    )
    config._attn_implementation = attention
    theirs = WhisperDecoderLayer(config, layer_idx=0).eval()
    randomise(theirs)
    cfg = StackConfig(
        n_layers=1, d_model=D, n_heads=HEADS, n_key_value_heads=HEADS, d_head=D // HEADS, d_mlp=MLP,
        n_ctx=40, eps=1e-5, act_fn="gelu", attn_bias="qvo", mlp_bias=True, gated_mlp=False,
        normalization_type="LN", positional_embedding_type="standard", scales_queries=True,
        softmax_in_float32=False, cross_attention=True, attn_implementation=attention,
    )  # fmt: skip
    ours = Block(cfg, 0, "full_attention").eval()
    renamed = {
        ".".join(NAMES.get(part, part) for part in key.split(".")): value
        for key, value in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)
    return ours.to(dtype), theirs.to(dtype)


def inputs(dtype: torch.dtype, n_pos: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """A stream of two rows, a memory of each, and a causal mask; the first row is padded."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, n_pos, D, generator=draw).to(dtype)
    memory = torch.randn(2, MEMORY, D, generator=draw).to(dtype)
    hidden = torch.full((n_pos, n_pos), torch.finfo(dtype).min).triu(1).repeat(2, 1, 1, 1)
    hidden[0, 0, 2:, :2] = torch.finfo(dtype).min
    return x, memory, hidden.to(dtype)


def context(memory: Tensor | None, mask: Tensor | None, cache: Any = None) -> AttentionContext:
    masks = {"full_attention": mask}
    return AttentionContext(
        rotary=None, kernel_masks=masks, additive_masks=masks, memory=memory, memory_cache=cache,
        cache=None if cache is None else cache.self_attention_cache,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", KERNELS)
@torch.no_grad()
def test_a_block_is_the_published_layer(dtype: torch.dtype, attention: str) -> None:
    """In one run, and with every point observed."""
    ours, theirs = pair(dtype, attention)
    x, memory, mask = inputs(dtype)
    expected = theirs(x, attention_mask=mask, encoder_hidden_states=memory)
    assert torch.equal(ours(x, context(memory, mask)), expected)
    seen = []
    for point in ours.modules():
        if isinstance(point, HookPoint):
            point.add_hook(lambda value, hook: seen.append(value.shape))
    assert torch.equal(ours(x, context(memory, mask)), expected)
    assert len(seen) > 25


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_points_show_the_published_modules_values(dtype: torch.dtype) -> None:
    ours, theirs = pair(dtype, "sdpa")
    x, memory, mask = inputs(dtype)
    expected: dict[str, Tensor] = {}
    attn = theirs.encoder_attn

    def keep(name: str, module: nn.Module, args: Any, value: Any) -> None:
        expected[name] = value[0] if isinstance(value, tuple) else value

    def keep_input(name: str, module: nn.Module, args: Any) -> None:
        expected[name] = args[0]

    attn.register_forward_hook(partial(keep, "hook_cross_attn_out"))
    theirs.encoder_attn_layer_norm.register_forward_pre_hook(partial(keep_input, "hook_resid_mid"))
    theirs.final_layer_norm.register_forward_pre_hook(partial(keep_input, "hook_resid_mid_cross"))
    attn.out_proj.register_forward_pre_hook(partial(keep_input, "cross_attn.hook_z"))
    for part in "qkv":
        projection = getattr(attn, f"{part}_proj")
        projection.register_forward_hook(partial(keep, f"cross_attn.hook_{part}"))
    theirs.fc1.register_forward_hook(partial(keep, "mlp.hook_pre"))
    theirs(x, attention_mask=mask, encoder_hidden_states=memory)
    found: dict[str, Tensor] = {}
    for name in expected:
        point = ours.get_submodule(name)
        assert isinstance(point, HookPoint)
        point.add_hook(lambda value, hook, name=name: found.update({name: value.clone()}))
    ours(x, context(memory, mask))
    for name, value in expected.items():
        assert torch.equal(found[name].flatten(2), value), name
    every = {name for name, one in ours.named_modules() if isinstance(one, HookPoint)}
    assert every <= {point.name for point in BLOCK}


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_steps_with_a_cache(dtype: torch.dtype) -> None:
    """The memory is read once; an edit of its keys acts at every step, and is not kept."""
    ours, theirs = pair(dtype, "sdpa")
    x, memory, _ = inputs(dtype)
    mine, other = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2))
    n_projected = []
    ours.cross_attn.k_proj.register_forward_hook(lambda *_: n_projected.append(1))
    for step in range(3):
        part = x[:, step : step + 1]
        expected = theirs(part, encoder_hidden_states=memory, past_key_values=other)
        given = memory if step == 0 else None
        assert torch.equal(ours(part, context(given, None, mine)), expected)
    assert len(n_projected) == 1
    kept = mine.cross_attention_cache.layers[0].keys.clone()
    plain = ours(x[:, 3:4], context(None, None, mine))
    ours.cross_attn.hook_k.add_hook(lambda k, hook: k.mul_(2.0))
    part = x[:, 3:4]
    mine.self_attention_cache.crop(-1)
    once = ours(part, context(None, None, mine))
    mine.self_attention_cache.crop(-1)
    twice = ours(part, context(None, None, mine))
    assert not torch.equal(once, plain)
    assert torch.equal(once, twice)
    assert torch.equal(mine.cross_attention_cache.layers[0].keys, kept)


@torch.no_grad()
def test_edits_act() -> None:
    """A head of the cross-attention muted, a pattern changed, and the stream between."""
    ours, theirs = pair(torch.float32, "sdpa")
    x, memory, mask = inputs(torch.float32)
    attn = theirs.encoder_attn

    def mute(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].unflatten(-1, (HEADS, -1)).clone()
        z[:, :, 2] = 0
        return (z.flatten(2),)

    attn.out_proj.register_forward_pre_hook(mute)
    expected = theirs(x, attention_mask=mask, encoder_hidden_states=memory)
    ours.cross_attn.hook_z.add_hook(lambda z, hook: z.index_fill(2, torch.tensor(2), 0.0))
    assert torch.equal(ours(x, context(memory, mask)), expected)
    ours.cross_attn.hook_z.remove_hooks()
    plain = ours(x, context(memory, mask))
    ours.cross_attn.hook_pattern.add_hook(lambda p, hook: torch.full_like(p, 1 / MEMORY))
    even = ours(x, context(memory.mean(1, keepdim=True).expand_as(memory), mask))
    torch.testing.assert_close(ours(x, context(memory, mask)), even, atol=1e-5, rtol=0)
    ours.cross_attn.hook_pattern.remove_hooks()
    ours.hook_cross_attn_in.add_hook(lambda value, hook: 2 * value)
    assert not torch.equal(ours(x, context(memory, mask)), plain)


@torch.no_grad()
def test_memories_that_are_refused() -> None:
    ours, _ = pair(torch.float32, "sdpa")
    x, memory, mask = inputs(torch.float32)
    for wrong in (memory[:1], memory.repeat(2, 1, 1)):
        with pytest.raises(InputError, match=f"of {len(wrong)} rows, the prompts are 2"):
            ours(x, context(wrong, mask))
    with pytest.raises(InputError, match="reads a memory: there is none"):
        ours(x, context(None, mask))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ours(x[:, :1], context(memory, None, cache))
    with pytest.raises(InputError, match="of 2 rows, the prompts are 1"):
        ours.cross_attn(x[:1, 1:2], context(None, None, cache))
