"""ALMInput and its spans: indexing, clips and their embeddings, seconds, what is refused."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.frontend import Windows, checksum
from hooked_alm.inputs import positions_from_mask
from hooked_alm.spans import SPAN_NAMES, SpanMap
from tiny import AUDIO_BOS, AUDIO_EOS, PAD, PLACEHOLDER, TinyModels, hf_inputs, n_audio_tokens
from tolerances import ENCODER_BATCH, OTHER_KERNEL

# Rows with two clips, none, one and one; left-padded.
INPUTS = hf_inputs([[30, 17], [], [97], [63]], [8, 6, 5, 9])


@pytest.fixture
def x(gqa: HookedALM) -> ALMInput:
    return gqa.encode(**INPUTS)


def same_rows(got: ALMInput, x: ALMInput, rows: list[int]) -> None:
    for name in ("tokens", "attention_mask", "position_ids"):
        assert torch.equal(getattr(got, name), getattr(x, name)[rows])
    for name in x.spans:
        assert got.spans[name] == [x.spans[name][row] for row in rows]
        assert torch.equal(got.spans.mask(name), x.spans.mask(name)[rows])
    clips_of = [[c for c, r in zip(x.clips, x.clip_rows, strict=True) if r == row] for row in rows]
    # Identity, not equality: the embeddings live in the clip.
    assert [id(clip) for clip in got.clips] == [id(clip) for row in clips_of for clip in row]
    assert got.clip_rows == tuple(new for new, row in enumerate(clips_of) for _ in row)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (0, [0]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [3, 1]),
        (slice(2, 2), []),
        ([3, 0], [3, 0]),
        ([2, 2, -2], [2, 2, 2]),
        ([], []),
        (range(1, 4), [1, 2, 3]),
        (torch.tensor([3, -4]), [3, 0]),
        (torch.tensor(2), [2]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (torch.zeros(4, dtype=torch.bool), []),
    ],
)
def test_rows_are_picked_with_their_clips(x: ALMInput, index: Any, rows: list[int]) -> None:
    same_rows(x[index], x, rows)


@pytest.mark.parametrize(
    "index",
    [
        (0, 1),
        4,
        -5,
        [0, 4],
        True,
        [True, False, False, True],
        torch.tensor([0.0, 1.0]),
        torch.tensor([[0, 1]]),
        torch.tensor([True, False]),
        torch.tensor(True),
        (slice(None), slice(0, 3)),
    ],
)
def test_any_other_index_raises(x: ALMInput, index: Any) -> None:
    with pytest.raises(InputError, match="indexing an ALMInput"):
        # Past the annotation, which says the same.
        x._rows(index) if isinstance(index, tuple) else x[index]


def test_looks_like_token_ids(x: ALMInput) -> None:
    assert x.shape == INPUTS["input_ids"].shape
    assert x.ndim == 2
    assert len(x) == 4
    assert x.device == torch.device("cpu")
    assert [row.clip_rows for row in x] == [(0, 0), (), (0,), (0,)]


@torch.no_grad()
def test_rows_run_alone_as_in_the_batch(gqa: HookedALM, x: ALMInput) -> None:
    logits = gqa(x)
    assert torch.equal(gqa(x[:]), logits)
    for row in range(len(x)):
        alone = gqa(x[row])[0] - logits[row]
        assert alone[x.attention_mask[row].bool()].abs().max() < ENCODER_BATCH[torch.float32]
    swapped = gqa(x[[2, 0, 1, 3]])
    error = (swapped - logits[[2, 0, 1, 3]])[x.attention_mask[[2, 0, 1, 3]].bool()]
    assert error.abs().max() < ENCODER_BATCH[torch.float32]


def test_position_ids_are_the_cumulative_mask(x: ALMInput) -> None:
    mask = INPUTS["attention_mask"]
    assert (mask == 0).any()
    for row in range(len(mask)):
        real = mask[row].bool()
        assert x.position_ids[row, real].tolist() == list(range(int(real.sum())))
        assert not x.position_ids[row, ~real].any()


def test_contradicting_fields_raise(x: ALMInput) -> None:
    for rows in ((0, 0, 2), (0, 2, 0, 3), (0, 0, 2, 4)):
        with pytest.raises(InputError, match="4 clips for the rows"):
            replace(x, clip_rows=rows)


@contextmanager
def counted_calls(model: HookedALM) -> Iterator[list[int]]:
    """How many clips each call of the encoder gets. Not by a hook, which would change that."""
    sizes: list[int] = []
    encode = model.audio.encode

    def counting(windows: Windows) -> Tensor:
        sizes.append(len(windows.features))
        return encode(windows)

    with mock.patch.object(model.audio, "encode", counting):
        yield sizes


@pytest.fixture
def calls(gqa: HookedALM) -> Iterator[list[int]]:
    with counted_calls(gqa) as sizes:
        yield sizes


@torch.no_grad()
def test_every_clip_is_encoded_once(gqa: HookedALM, x: ALMInput, calls: list[int]) -> None:
    logits = gqa(x)
    assert calls == [4]
    for _ in range(3):
        assert torch.equal(gqa(x), logits)
    gqa.run_with_cache(x)
    gqa.run_with_hooks(x, fwd_hooks=[("hook_audio_embed", lambda value, hook: value * 2)])
    gqa.generate(x, 2, return_type="tokens")
    assert calls == [4]
    # A clip in several rows is one clip.
    fresh = gqa.encode(**INPUTS)[[2, 2, 2]]
    assert len({id(clip) for clip in fresh.clips}) == 1
    gqa(fresh)
    gqa(fresh[0])
    assert calls == [4, 1]
    for clip in x.clips:
        clip.forget()
    assert torch.equal(gqa(x), logits)
    assert calls == [4, 1, 4]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["encoder.blocks.1.mlp.down_proj.weight", "projector.linear.weight", "gain"]
)
def test_weights_written_through_data_are_heard(gqa: HookedALM, name: str) -> None:
    """One element of the last block, of the projector, or of a buffer."""
    encode, gain = gqa.audio.encode, torch.ones(3)
    gqa.audio.register_buffer("gain", gain)
    clip = hf_inputs([[63]], [9])
    with mock.patch.object(gqa.audio, "encode", lambda windows: encode(windows) * gain[-1]):
        x = gqa.encode(**clip)
        logits, weight = gqa(x), gqa.audio.state_dict(keep_vars=True)[name].view(-1)
        before = weight[-1].clone()
        weight.data[-1] += 1e-2
        found, afresh = gqa(x), gqa(gqa.encode(**clip))
        weight.data[-1] = before
        assert torch.equal(gqa(x), logits)
    del gqa.audio.gain
    assert torch.equal(found, afresh)
    assert not torch.equal(found, logits)


def exchanged(value: Tensor) -> Iterator[Tensor]:
    """The same elements in other places, of which no sum over all of them tells."""
    ends = value.clone()
    ends[0, 0], ends[-1, -1] = value[-1, -1], value[0, 0]
    yield ends
    yield value[:, torch.arange(value.shape[1]).roll(1)]
    yield value[torch.arange(len(value)).roll(1)]
    # Within a row of the table of words, which has 2048 bytes, and within one of its columns.
    for apart in (64, 3 * 2048 // value.element_size()):
        two = value.clone()
        flat, at = two.view(-1), torch.tensor([0, apart % value.numel()])
        flat[at] = flat[at.flip(0)]
        yield two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (37, 131), (1037, 64)])
def test_a_checksum_reads_every_element_and_its_place(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Wherever an element is: words of 8 bytes, the last few bytes, and the table's last row."""
    is_bool, beside = dtype == torch.bool, torch.ones(3)
    value = torch.randn(shape).gt(0) if is_bool else (torch.randn(shape) * 99).to(dtype)
    before, flat = checksum([value, beside]), value.view(-1)
    assert checksum([value.clone(), beside]) == before
    for at in {0, len(flat) // 2, len(flat) - 1}:
        kept = flat[at].clone()
        flat[at] = ~kept if is_bool else kept + kept.abs() + 1
        assert checksum([value, beside]) != before
        flat[at] = kept
    assert checksum([beside, value]) != before
    if value.ndim == 2:
        others = [other for other in exchanged(value) if not torch.equal(other, value)]
        assert others
        assert all(checksum([other, beside]) != before for other in others)
        # Stored the other way round, and beginning where no word does.
        assert checksum([value.T]) == checksum([value.T.contiguous()]) != checksum([value])
        assert checksum([flat[1:]]) == checksum([flat[1:].clone()])


@torch.no_grad()
def test_an_encoding_does_not_depend_on_what_ran_before(
    gqa: HookedALM, x: ALMInput, calls: list[int]
) -> None:
    """Kernels round by batch shape: a part of a batch is encoded as it would be by itself."""
    gqa(x)
    after = gqa(x[2])
    assert torch.equal(after, gqa(gqa.encode(**INPUTS)[2]))
    gqa(x[2])
    gqa(x)
    assert calls == [4, 1, 1]


@torch.no_grad()
def test_shared_clips_are_heard_in_every_row(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)[[2, 3, 2]]
    _, cache = gqa.run_with_cache(x, names_filter="hook_audio_embed")
    clips = cache["hook_audio_embed"]
    assert torch.equal(clips[0], clips[2])
    assert not torch.equal(clips[0, :16], clips[1, :16])
    logits = gqa(x)
    twice = {name: value[[-2, -1, -2]] for name, value in INPUTS.items()}
    apart = gqa(gqa.encode(**twice))
    error = (logits - apart)[x.attention_mask.bool()].abs().max()
    assert error < ENCODER_BATCH[torch.float32]


def test_embeddings_are_not_pickled(gqa: HookedALM, x: ALMInput, calls: list[int]) -> None:
    with torch.no_grad():
        logits = gqa(x)
    copy = pickle.loads(pickle.dumps(x))
    same = [(a.name, a.n_frames, a.n_tokens) for a in copy.clips]
    assert same == [(b.name, b.n_frames, b.n_tokens) for b in x.clips]
    assert all(not clip._encoded for clip in copy.clips)
    assert all(clip._encoded for clip in x.clips)
    # The pickle holds features and ids, and nothing of the model.
    assert len(pickle.dumps(x)) < 2 * sum(clip.features.nbytes for clip in x.clips)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(gqa(copy), logits)
    assert calls == [4]


@torch.no_grad()
def test_embeddings_belong_to_the_weights(tiny_models: TinyModels) -> None:
    model = HookedALM.from_pretrained(tiny_models.folder())
    x = model.encode(**INPUTS)
    before = model(x)
    projector = model.audio.projector.linear
    projector.bias.add_(0.5)
    after = model(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, model(model.encode(**INPUTS)))
    kept = projector.bias
    projector.bias = torch.nn.Parameter(kept + 0.5)
    assert not torch.equal(model(x), after)
    projector.bias = kept
    with counted_calls(model) as calls:
        assert torch.equal(model(x), after)
        model(x)
        assert calls == [4]
        model.audio.load_state_dict(model.audio.state_dict())
        model(x)
        assert calls == [4, 4]
    model.to(torch.float64)
    assert model(x).dtype == torch.float64
    # Another model's embeddings are its own.
    other = tiny_models.hooked("mha")
    assert torch.equal(other(x), other(other.encode(**INPUTS)))
    model.to(torch.float32)
    assert torch.equal(model(x), after)


@torch.no_grad()
def test_weights_loaded_in_inference_mode(tiny_models: TinyModels) -> None:
    with torch.inference_mode():
        model = HookedALM.from_pretrained(tiny_models.folder())
        x = model.encode(**INPUTS)
        before = model(x)
    assert torch.equal(before, tiny_models.hooked()(x))
    model.audio.projector.linear.bias.add_(0.5)
    assert not torch.equal(model(x), before)


@torch.no_grad()
def test_pytorch_hooks_in_the_encoder_are_heard_and_leave_nothing(
    gqa: HookedALM, x: ALMInput
) -> None:
    before = gqa(x)
    fresh = gqa.encode(**INPUTS)
    layer = gqa.audio.encoder.blocks[0]
    handle = layer.register_forward_hook(lambda module, args, out: out * 0)
    edited = gqa(x)
    assert not torch.equal(edited, before)
    assert torch.equal(gqa(fresh), edited)
    handle.remove()
    assert torch.equal(gqa(x), before)
    assert torch.equal(gqa(fresh), before)


@torch.no_grad()
def test_hooks_on_the_audio_encode_afresh_and_store_nothing(
    gqa: HookedALM, x: ALMInput, calls: list[int]
) -> None:
    before = gqa(x)
    calls.clear()
    names = [
        f"audio.hook_{part}_{end}" for part in ("encoder", "projector") for end in ("in", "out")
    ]
    names += ["audio.encoder.hook_embed", "audio.encoder.blocks.1.attn.hook_pattern"]
    for name in names:
        edited = gqa.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: value * 0.5)])
        assert not torch.equal(edited, before)
        assert torch.equal(gqa(x), before)
    assert calls == [4] * 6
    fresh = gqa.encode(**INPUTS)
    gqa.run_with_cache(fresh, names_filter="audio.hook_encoder_out")
    assert all(not clip._encoded for clip in fresh.clips)
    # The embeddings have one shape, whether or not the encoder is watched.
    shapes = [
        gqa.run_with_cache(x, names_filter=[*more, "hook_audio_embed"])[1]["hook_audio_embed"]
        for more in ([], ["audio.hook_encoder_out"])
    ]
    assert torch.equal(*shapes)


def test_encoding_carries_a_gradient_only_under_audio_hooks(gqa: HookedALM, x: ALMInput) -> None:
    bias = gqa.audio.projector.linear.bias
    gqa(x).sum().backward()
    assert bias.grad is None
    with gqa.hooks(fwd_hooks=[("audio.hook_projector_out", lambda value, hook: None)]):
        gqa(x).sum().backward()
    assert bias.grad is not None
    assert bias.grad.abs().max() > 0
    gqa.zero_grad()


def test_embeddings_made_in_inference_mode_serve_training(gqa: HookedALM, x: ALMInput) -> None:
    with torch.inference_mode():
        expected = gqa(x)
    logits = gqa(x)
    assert torch.equal(logits, expected)
    logits.sum().backward()
    gqa.zero_grad()


PARTITION = ("audio", "audio_struct", "text", "struct", "readout", "sink")


def check_partition(x: ALMInput) -> None:
    count = sum(x.spans.mask(name).long() for name in PARTITION)
    assert torch.equal(count, x.attention_mask)


def test_spans_partition_the_real_positions(x: ALMInput, mha: HookedALM) -> None:
    check_partition(x)
    check_partition(mha.encode(**INPUTS))  # without a tokenizer
    assert set(x.spans) == set(PARTITION)
    width = x.shape[1]
    for row, n_clips in enumerate([2, 0, 1, 1]):
        assert len(x.spans["audio"][row]) == n_clips
        for start, stop in x.spans["audio"][row]:
            assert x.tokens[row, start - 1] == AUDIO_BOS
            assert (x.tokens[row, start:stop] == PLACEHOLDER).all()
            assert x.tokens[row, stop] == AUDIO_EOS
            assert x.spans.mask("audio_struct")[row, [start - 1, stop]].all()
        assert x.spans["readout"][row] == [(width - 1, width)]
        first = int((x.attention_mask[row] == 0).sum())
        assert x.spans["sink"][row] == [(first, first + 1)]
    assert x.spans["audio"][1] == []
    assert not x.spans.mask("audio")[1].any()
    assert x.spans.positions("sink", 1) == [int((INPUTS["attention_mask"][1] == 0).sum())]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_spans_of_any_prompt_partition_it(data: Any, tiny_models: TinyModels) -> None:
    n_rows = data.draw(st.integers(1, 3))
    clips = [data.draw(st.lists(st.integers(3, 100), max_size=2)) for _ in range(n_rows)]
    n_text = [data.draw(st.integers(2, 9)) for _ in range(n_rows)]
    model = tiny_models.hooked()
    inputs = hf_inputs(clips, n_text)
    x = model.encode(**inputs)
    check_partition(x)
    for row, frames in enumerate(clips):
        lengths = [stop - start for start, stop in x.spans["audio"][row]]
        assert lengths == [n_audio_tokens(n) for n in frames]


def test_unions_unknown_spans_and_json(x: ALMInput) -> None:
    both = x.spans.mask("audio", "text")
    assert torch.equal(both, x.spans.mask("audio") | x.spans.mask("text"))
    with pytest.raises(InputError, match="looking up span 'label': this input has audio, audio_st"):
        x.spans["label"]
    with pytest.raises(InputError, match="'speech'"):
        x.spans.mask("audio", "speech")
    assert x.spans.to_json()["audio"][0] == [list(pair) for pair in x.spans["audio"][0]]


def spans_of_clips(*ranges: tuple[int, int]) -> SpanMap:
    clips = [[[clip] for clip in ranges]]
    return SpanMap({"audio": [list(ranges)]}, n_pos=200, seconds_per_token=0.04, clips=clips)


@pytest.mark.parametrize(
    ("window", "positions"),
    [
        ((0.0, 1.0), (10, 35)),
        ((1.2, 1.8), (40, 55)),  # 1.2 / 0.04 = 30.000000000000004
        ((0.0, 0.04), (10, 11)),
        ((0.03, 0.05), (10, 12)),
        ((0.0401, 0.0402), (11, 12)),
        ((1.99, 9.0), (59, 60)),
        ((0.28, 0.36), (17, 19)),
    ],
)
def test_seconds_to_positions(window: tuple[float, float], positions: tuple[int, int]) -> None:
    assert spans_of_clips((10, 60)).seconds(0, *window) == [positions]


@given(first=st.integers(0, 60), n=st.integers(1, 49))
@settings(deadline=None)
def test_whole_slots_are_found_exactly(first: int, n: int) -> None:
    """A window of whole slots gives those, however 0.04 rounds."""
    spans = spans_of_clips((5, 130))
    assert spans.seconds(0, first * 0.04, (first + n) * 0.04) == [(5 + first, 5 + first + n)]


def test_seconds_of_other_clips_and_what_is_refused(x: ALMInput) -> None:
    start = x.spans["audio"][0][1][0]
    assert x.spans.seconds(0, 0.04, 0.12, clip=1) == [(start + 1, start + 3)]
    for arguments, options in (
        ((0, 0.1, 0.2), {"clip": 2}),
        ((0, 0.1, 0.2), {"clip": -1}),
        ((1, 0.1, 0.2), {}),
        ((0, 0.2, 0.2), {}),
        ((0, 0.3, 0.2), {}),
        ((0, 5.0, 6.0), {}),
        ((0, -2.0, -1.0), {}),
    ):
        with pytest.raises(InputError, match="s of clip"):
            x.spans.seconds(*arguments, **options)
    timeless = replace(x.spans, seconds_per_token=None)
    with pytest.raises(InputError, match="no time axis"):
        timeless.seconds(0, 0.1, 0.2)


def test_extend(gqa: HookedALM, x: ALMInput) -> None:
    new = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])
    longer = x.extend(new)
    assert torch.equal(longer.tokens, torch.cat([x.tokens, new], 1))
    assert torch.equal(longer.position_ids, positions_from_mask(longer.attention_mask))
    assert longer.clips is x.clips
    assert longer.spans["audio"] == x.spans["audio"]
    assert longer.spans.mask("audio").shape == longer.shape
    with torch.no_grad():
        alike = {**INPUTS, "input_ids": longer.tokens, "attention_mask": longer.attention_mask}
        assert torch.equal(gqa(longer), gqa(gqa.encode(**alike)))


def test_answered(gqa: HookedALM, x: ALMInput) -> None:
    """The run of `extend`, read behind the new tokens; spans still are all real positions."""
    new = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])
    begun, longer = x.answered(new), x.extend(new)
    assert torch.equal(begun.tokens, longer.tokens)
    n = longer.shape[1]
    assert begun.spans["readout"] == [[(n - 1, n)]] * 4
    for row in range(4):
        before = x.spans.positions("struct", row)
        assert begun.spans.positions("struct", row) == [*before, n - 3, n - 2]
    known = [name for name in begun.spans if name in SPAN_NAMES]
    assert torch.equal(begun.spans.mask(*known), begun.attention_mask.bool())
    assert x.answered(new[:, :0]) is x


# What `encode` refuses.


@pytest.mark.parametrize(
    "name", ["labels", "past_key_values", "inputs_embeds", "use_cache", "input_values"]
)
def test_arguments_that_are_no_input_are_refused_by_name(gqa: HookedALM, name: str) -> None:
    with pytest.raises(InputError, match=f"got {name}, expected only input_ids"):
        gqa.encode(**INPUTS, **{name: torch.zeros(1)})
    gqa.encode(**INPUTS, **{name: None})


def edited(**changes: Any) -> dict[str, Any]:
    return {**INPUTS, **{name: value.clone() for name, value in changes.items()}}


def test_placeholders_have_to_fit_the_clips(gqa: HookedALM) -> None:
    ids = INPUTS["input_ids"]
    features, masks = INPUTS["input_features"], INPUTS["feature_attention_mask"]
    one_less = edited(input_ids=ids)
    one_less["input_ids"][3, torch.where(ids[3] == PLACEHOLDER)[0][0]] = 5
    with pytest.raises(InputError, match=r"row 3: it has 15 audio placeholders.*\[16\]"):
        gqa.encode(**one_less)
    one_more = edited(input_ids=ids)
    one_more["input_ids"][0, -1] = PLACEHOLDER
    with pytest.raises(InputError, match="row 0: it has 12 audio placeholders"):
        gqa.encode(**one_more)
    # The same total, in other rows.
    moved = edited(input_ids=ids)
    moved["input_ids"][3, torch.where(ids[3] == PLACEHOLDER)[0][0]] = 5
    moved["input_ids"][1, -1] = PLACEHOLDER
    with pytest.raises(InputError, match="row 1: it has 1 audio placeholders"):
        gqa.encode(**moved)
    with pytest.raises(InputError, match="row 3"):
        gqa.encode(
            **{**INPUTS, "input_features": features[:3], "feature_attention_mask": masks[:3]}
        )
    extra = {
        "input_features": features[[0, 1, 2, 3, 3]],
        "feature_attention_mask": masks[[0, 1, 2, 3, 3]],
    }
    with pytest.raises(InputError, match="5 clips were given, the prompts have room for 4"):
        gqa.encode(**{**INPUTS, **extra})
    # As processors before the expanding one made them.
    collapsed = {"input_ids": torch.tensor([[3, AUDIO_BOS, PLACEHOLDER, AUDIO_EOS, 4]])}
    with pytest.raises(InputError, match="Expand one placeholder per audio position"):
        gqa.encode(**collapsed, input_features=features[:1], feature_attention_mask=masks[:1])


def test_placeholders_without_audio(gqa: HookedALM) -> None:
    ids = INPUTS["input_ids"]
    for use in (
        lambda: gqa(ids),
        lambda: gqa.encode(input_ids=ids, attention_mask=INPUTS["attention_mask"]),
        lambda: gqa.run_with_cache(ids),
        lambda: gqa.run_with_hooks(ids, fwd_hooks=[]),
        lambda: gqa.generate(ids, 2, return_type="tokens"),
        lambda: gqa("one clip: <|audio_bos|><|AUDIO|><|audio_eos|>"),
    ):
        with pytest.raises(InputError, match="audio placeholders"):
            use()
    stripped = replace(gqa.encode(**INPUTS), clips=(), clip_rows=())
    with pytest.raises(InputError, match="audio placeholders but no audio"):
        gqa(stripped)


def test_half_of_the_audio_is_refused(gqa: HookedALM) -> None:
    for name in ("input_features", "feature_attention_mask"):
        part = {key: value for key, value in INPUTS.items() if key != name}
        with pytest.raises(InputError, match="belong together"):
            gqa.encode(**part)
    with pytest.raises(InputError, match="input_ids are missing"):
        gqa.encode(attention_mask=INPUTS["attention_mask"])


def test_inputs_of_other_kinds(gqa: HookedALM, mha: HookedALM) -> None:
    for value in (["a", "b"], "a"):
        with pytest.raises(InputError, match="its folder has no tokenizer"):
            mha(value)
    with torch.no_grad():
        texts = ["hello", "a longer text"]
        batch = gqa.tokenizer(texts, return_tensors="pt", padding=True)
        assert (batch["attention_mask"][0, 0], batch["input_ids"][0, 0]) == (0, PAD)
        assert torch.equal(gqa(texts), gqa(gqa.encode(**batch)))
        assert torch.equal(
            gqa("hello"), gqa(batch["input_ids"][:1, batch["attention_mask"][0].bool()])
        )


@torch.no_grad()
def test_a_cached_prefix_keeps_the_right_clips(gqa: HookedALM, x: ALMInput) -> None:
    """The rest of a prompt hears its own clips, not the first ones again."""
    row = x[0]
    cache = DynamicCache()
    logits = gqa(row, past_key_values=cache)
    assert cache.get_seq_length() == row.shape[1]
    assert torch.equal(logits, gqa(row))
    (first_start, first_end), (second_start, second_end) = row.spans["audio"][0]
    for n_past in (second_end + 1, second_end - 1, second_start, first_end + 1, first_start + 2, 1):
        cache.crop(n_past - cache.get_seq_length())
        rest = gqa(row, past_key_values=cache)
        assert gqa.pos_offset == n_past
        error = (rest - logits[:, n_past:]).abs().max()
        assert error < OTHER_KERNEL[torch.float32], n_past


@pytest.mark.parametrize("bad", [-1, 337, 2**40])
def test_ids_without_a_row(gqa: HookedALM, bad: int) -> None:
    """However they come in: encoded, in an input made by hand, appended, or put in by a hook."""
    message = "the vocabulary has 0 to 336"
    good, ids = torch.tensor([[5, 6]]), torch.tensor([[5, bad]])
    x = gqa.encode(input_ids=good)
    for run in (
        lambda: gqa.encode(input_ids=ids),
        lambda: gqa(replace(x, tokens=ids)),
        lambda: gqa(x.extend(ids)),
        lambda: gqa.run_with_hooks(x, fwd_hooks=[("hook_tokens", lambda value, hook: ids)]),
    ):
        with pytest.raises(InputError, match=message):
            run()
