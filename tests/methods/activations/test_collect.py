"""Rows of runs: the cache's own, bit by bit, each with what it is."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertModel

import whisper_toy
from activation_rows import rows
from hooked_alm import ALMInput, HookedALM
from hooked_alm.errors import HookedALMError, HookNameError, InputError
from hooked_alm.methods.activations.collect import n_rows_of, rows_of, rows_of_module
from hooked_alm.methods.activations.rows import ActivationRows
from hooked_alm.methods.activations.selection import kept_points, select_names, split_patterns
from tiny import hf_inputs, randomise
from whisper_toy import Whispers

RESID, Z = "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"
ENCODED = "audio.encoder.blocks.1.hook_resid_post"


@pytest.fixture
def x(gqa: HookedALM) -> ALMInput:
    """Two clips in the first prompt, one in the second, which is padded on its left."""
    return gqa.encode(**hf_inputs([[40, 20], [30]], [9, 6]))


def cached(model: HookedALM, x: ALMInput, name: str) -> Tensor:
    return model.run_with_cache(x, names_filter=name)[1][name]


def test_rows_are_the_cache_of_a_whole_run(gqa: HookedALM, x: ALMInput) -> None:
    """Of the decoder, padded, with two clips in a prompt; heads lie side by side."""
    spans = ["audio", "readout"]
    rows = rows_of(gqa, x, [RESID, Z, "ln_final.hook_normalized"], spans)["prompt"]
    mask = x.spans.mask("audio", "readout")
    for name in (RESID, Z, "ln_final.hook_normalized"):
        assert torch.equal(rows.values[name], cached(gqa, x, name)[mask].flatten(1))
    assert rows.shapes[Z] == (6, 10)
    assert len(rows) == int(mask.sum()) == n_of(gqa, x, RESID, spans)


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.hook_resid_pre", "blocks.3.mlp.hook_post", "unembed.hook_out"]
)
def test_a_run_goes_as_far_as_it_has_to(gqa: HookedALM, x: ALMInput, name: str) -> None:
    """And the rows are those of one that goes to the end."""
    rows = rows_of(gqa, x, name, "all")["prompt"]
    assert torch.equal(rows.values[name], cached(gqa, x, name)[x.attention_mask.bool()])


def test_blocks_behind_the_last_point_do_not_run(
    gqa: HookedALM, x: ALMInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(gqa.blocks[2], "forward", fail)
    monkeypatch.setattr(gqa.unembed, "forward", fail)
    assert len(rows_of(gqa, x, "blocks.1.hook_resid_post")["prompt"])
    with pytest.raises(AssertionError, match="it ran"):
        rows_of(gqa, x, "blocks.2.hook_resid_pre")


def n_of(model: HookedALM, x: ALMInput, points: Any, spans: Any) -> int:
    return sum(n_rows_of(model, x, kept_points(model, points), spans)["prompt"].values())


def test_the_index_by_hand(gqa: HookedALM, x: ALMInput) -> None:
    """Every column of every row, and the seconds that a time window of the spans has."""
    labels = {"speaker": ["anna", "ben"]}
    rows = rows_of(gqa, x, RESID, ["readout", "audio"], labels=labels, first_prompt=5)["prompt"]
    # Clips of 10, 5 and 8 positions; the first row is 19 + 2 + 2 ... wide, the second padded.
    n_pad = int((x.attention_mask[1] == 0).sum())
    assert n_pad > 0
    expected = []
    for prompt, (clips, speaker) in enumerate(zip(([10, 5], [7]), ("anna", "ben"), strict=True)):
        first = (0, n_pad)[prompt]
        named = [f"clip {i}" for i in ((0, 1), (2,))[prompt]]
        for name, ranges, n in zip(named, x.spans.clips[prompt], clips, strict=True):
            (bounds,) = ranges
            assert bounds[1] - bounds[0] == n
            for k, pos in enumerate(range(*bounds)):
                at = k * 0.04
                assert x.spans.seconds(prompt, at, at + 0.04, clip=named.index(name)) == [
                    (pos, pos + 1)
                ]
                expected.append((name, prompt + 5, pos - first, at, "audio", speaker))
        alone = named[0] if len(named) == 1 else ""
        last = x.shape[1] - 1 - first
        expected.append((alone, prompt + 5, last, None, "readout", speaker))
    found = [
        (clip, prompt, position, None if np.isnan(s) else s, span, speaker)
        for clip, prompt, position, s, span, speaker in zip(*rows.index.values(), strict=True)
    ]
    assert [*rows.index] == ["clip", "prompt", "position", "seconds", "span", "speaker"]
    assert found == expected


def test_a_position_is_kept_once_under_the_first_span(gqa: HookedALM) -> None:
    noise = whisper_toy.noise(0.5)
    x = gqa.prepare(noise, segments=[("text", "Say "), ("word", "sad"), ("text", " now")])
    n_word, n_text = (int(x.spans.mask(name).sum()) for name in ("word", "text"))
    assert 0 < n_word < n_text
    for spans, expected in (
        (["word", "text"], {"word": n_word, "text": n_text - n_word}),
        (["text", "word"], {"text": n_text}),
    ):
        found = rows_of(gqa, x, RESID, spans)["prompt"].index["span"]
        assert dict(zip(*np.unique(found.astype(str), return_counts=True), strict=True)) == expected
    every = rows_of(gqa, x, RESID, "all")["prompt"]
    assert len(every) == x.shape[1]
    assert {*every.index["span"]} == {"sink", "struct", "audio_struct", "audio", "text", "readout"}


def test_rows_of_the_encoder(gqa: HookedALM, x: ALMInput) -> None:
    """Frames that hear a clip, in one run with rows of the decoder; two clips one after another."""
    found = rows_of(gqa, x, [RESID, ENCODED], ["audio", "readout"])
    rows = found["encoder"]
    n_frames = [20, 10, 15]
    value = cached(gqa, x, ENCODED)
    heard = [value[i, :n] for i, n in enumerate(n_frames)]
    assert torch.equal(rows.values[ENCODED], torch.cat(heard))
    seconds = np.concatenate([np.arange(n) * 0.02 for n in n_frames])
    assert rows.index["seconds"].tolist() == seconds.tolist()
    assert (
        rows.index["clip"].tolist() == np.repeat(["clip 0", "clip 1", "clip 2"], n_frames).tolist()
    )
    assert rows.index["prompt"].tolist() == [0] * 30 + [1] * 15
    # The second clip's chunk begins behind the first's 50 positions.
    assert rows.index["position"].tolist() == [*range(20), *range(50, 60), *range(15)]
    counted = n_rows_of(gqa, x, kept_points(gqa, [RESID, ENCODED]), ["audio", "readout"])
    assert counted == {"prompt": {"audio": 22, "readout": 2}, "encoder": {"audio": 45}}
    alone = rows_of(gqa, x, ENCODED, "all")
    assert alone.keys() == {"encoder"}
    assert torch.equal(alone["encoder"].values[ENCODED], rows.values[ENCODED])


def test_whisper(whispers: Whispers) -> None:
    """Its clip is no span of the prompt, but frames of the encoder."""
    model = whispers.hooked()
    clips = [whisper_toy.noise(0.4), whisper_toy.noise(0.7, seed=1)]
    x = model.prepare(clips, language="en")
    cross = "blocks.1.cross_attn.hook_z"
    found = rows_of(model, x, [ENCODED, cross], ["audio", "readout"])
    value = cached(model, x, ENCODED)
    expected = torch.cat([value[0, :20], value[1, :35]])
    assert torch.equal(found["encoder"].values[ENCODED], expected)
    assert torch.equal(found["prompt"].values[cross], cached(model, x, cross)[:, -1].flatten(1))
    assert found["prompt"].index["clip"].tolist() == [clip.name for clip in x.clips]
    padding = rows_of(model, x, ENCODED, "padding")["encoder"]
    assert torch.equal(padding.values[ENCODED], torch.cat([value[0, 20:], value[1, 35:]]))
    assert np.isnan(padding.index["seconds"]).all()
    assert len(rows_of(model, x, ENCODED, "all")["encoder"]) == 55
    with pytest.raises(HookNameError, match=r"cross_attn.hook_k \(its axes are batch memory_pos"):
        rows_of(model, x, "blocks.0.cross_attn.hook_k")


def test_patterns() -> None:
    names = [f"blocks.{i}.{p}" for i in range(12) for p in ("hook_resid_post", "attn.hook_z")]
    for pattern, layers in (
        ("blocks.*.hook_resid_post", [*range(12)]),
        ("blocks.{0,4}.hook_resid_post", [0, 4]),
        ("blocks.{2..4,11}.hook_resid_post", [2, 3, 4, 11]),
        ("blocks.1*.hook_resid_post", [1, 10, 11]),
        ("blocks.7.hook_resid_post", [7]),
    ):
        assert select_names(pattern, names) == [f"blocks.{i}.hook_resid_post" for i in layers]
    both = select_names(["blocks.3.attn.*", "blocks.1.attn.hook_z", "blocks.3.attn.hook_z"], names)
    assert both == ["blocks.1.attn.hook_z", "blocks.3.attn.hook_z"], "once, in the model's order"
    assert split_patterns("a.{0,4}.z, b.*,c") == ["a.{0,4}.z", "b.*", "c"]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("blocks.0.hook_resid_pots", "Nearest: blocks.0.hook_resid_post"),
        ("blocks.{7..9}.hook_resid_post", "matches none of .* Nearest: .*hook_resid_post"),
        ("blocks.{3..1}.hook_z", r"got the range 3\.\.1, expected numbers from the smaller"),
        ("blocks.{0.hook_z", "a brace without its other"),
        ("blocks.*.attn.hook_pattern", r"hook_pattern \(it has two axes .* leave them out"),
        ("blocks.0.attn.*", r"blocks.0.attn.hook_attn_scores \(it has two axes of positions"),
        ("hook_audio_embed", r"\(its axes are clip audio_pos d_model"),
        ("hook_tokens", r"\(it holds no activation\)"),
        ("audio.encoder.ln_final.hook_normalized", "comes behind a pooling"),
        ([], "got no names"),
    ],
)
def test_points_that_have_no_rows_are_refused(
    gqa: HookedALM, x: ALMInput, points: Any, message: str
) -> None:
    with pytest.raises(HookNameError, match=f"(?i){message}"):
        rows_of(gqa, x, points)


@pytest.mark.parametrize(
    ("points", "spans", "labels", "message"),
    [
        (RESID, "word", None, "choosing spans: got word, expected some of all, audio, audio_str"),
        (RESID, [], None, "choosing spans: got none"),
        (RESID, "padding", None, "choosing spans: got padding"),
        ([RESID, ENCODED], "readout", None, "spans of encoder points: got readout"),
        (RESID, "audio", {"span": ["a", "b"]}, "'span' is a column of every index"),
        (RESID, "audio", {"who": ["a"]}, "'who' has 1 values, expected one for each of 2"),
        (RESID, "audio", {"who": "ab"}, "'who' has one text"),
    ],
)
def test_spans_and_labels_that_do_not_fit_are_refused(
    gqa: HookedALM, x: ALMInput, points: Any, spans: Any, labels: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        rows_of(gqa, x, points, spans, labels=labels)


def test_prompts_without_audio_have_no_rows_in_the_encoder(gqa: HookedALM) -> None:
    with pytest.raises(InputError, match="the prompts have no audio"):
        rows_of(gqa, gqa.to_input("no clip"), ENCODED)


# --- Of any module


@pytest.fixture(scope="module")
def hubert() -> HubertModel:
    """Random weights; 3 layers, 320 samples a frame."""
    config = HubertConfig(
        hidden_size=28, num_hidden_layers=3, num_attention_heads=4, intermediate_size=44,
        conv_dim=(18,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer", do_stable_layer_norm=True, apply_spec_augment=False,
    )  # fmt: skip
    model = HubertModel(config).eval()
    randomise(model)
    return model


def heard(hubert: HubertModel) -> tuple[dict[str, Tensor], Tensor]:
    """Two clips, the second shorter, and which frames are theirs."""
    lengths = torch.tensor([8000, 5000])
    waves = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8000) < lengths[:, None]).long()
    inputs = {"input_values": waves * mask, "attention_mask": mask}
    n = int(hubert._get_feat_extract_output_lengths(torch.tensor(8000)))
    return inputs, hubert._get_feature_vector_attention_mask(n, mask).bool()


def test_rows_of_hubert(hubert: HubertModel) -> None:
    inputs, is_real = heard(hubert)
    points = ["encoder.layers.{0,2}", "encoder.layers.1.attention.q_proj"]
    rows = rows_of_module(
        hubert, lambda: hubert(**inputs), points, is_real,
        clips=["a", "b"], seconds_per_frame=0.02, labels={"speaker": ["x", "y"]},
    )  # fmt: skip
    with torch.no_grad():
        states = hubert(**inputs, output_hidden_states=True).hidden_states
    n = is_real.sum(1).tolist()
    assert n == [24, 15]
    assert torch.equal(rows.values["encoder.layers.0"], states[1][is_real])
    assert rows.shapes == {
        "encoder.layers.0": (28,), "encoder.layers.1.attention.q_proj": (28,),
        "encoder.layers.2": (28,),
    }  # fmt: skip
    assert rows.index["clip"].tolist() == ["a"] * 24 + ["b"] * 15
    assert rows.index["speaker"].tolist() == ["x"] * 24 + ["y"] * 15
    assert rows.index["position"].tolist() == [*range(24), *range(15)]
    np.testing.assert_allclose(rows.index["seconds"][24:], np.arange(15) * 0.02, rtol=1e-15)


def n_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in module.modules())


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("encoder.layer.0", "matches none of .* Nearest: encoder.layers.0"),
        ("feature_extractor.conv_layers.0", r"got \[2, 18, 1599\], expected real numbers \[2, 24"),
        ("encoder.layers", "it ran 0 times, expected once"),
    ],
)
def test_parts_without_rows_are_refused(hubert: HubertModel, points: str, message: str) -> None:
    (inputs, is_real), before = heard(hubert), n_hooks(hubert)
    with pytest.raises(HookedALMError, match=message):
        rows_of_module(hubert, lambda: hubert(**inputs), points, is_real, clips=["a", "b"])
    assert n_hooks(hubert) == before, "a hook was left"


def test_a_part_that_runs_twice_and_one_without_a_tensor() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.none = nn.Identity(), nn.Identity()

        def forward(self, value: Tensor) -> None:
            self.one(self.one(value))
            self.none("text")

    odd, is_real = Odd(), torch.ones(1, 2, dtype=torch.bool)
    for point, message in (("one", "ran 2 times"), ("none", "got no tensor of real numbers")):
        with pytest.raises(InputError, match=message):
            rows_of_module(odd, lambda: odd(torch.zeros(1, 2, 3)), point, is_real, clips=["a"])


# --- Rows


def test_what_a_dtype_does_not_hold_is_refused() -> None:
    large = rows()
    large.values["p"][2, 1] = 70_000.0
    with pytest.raises(
        InputError, match=r"keeping p in float16: got values up to 70000, .* 65504\."
    ):
        large.cast("float16")
    for dtype in ("bfloat16", "float32"):
        assert torch.equal(
            large.cast(dtype).values["p"], large.values["p"].to(getattr(torch, dtype))
        )
    for bad in (float("nan"), float("inf"), -float("inf")):
        large.values["p"][2, 1] = bad
        with pytest.raises(InputError, match="got 1 values that are NaN or infinite"):
            large.cast("float32")


def test_rows_that_contradict_themselves_are_refused() -> None:
    one = rows()
    q = one.values["q"]
    for change, message in (
        ({"values": {"p": torch.zeros(5, 4), "q": q}}, r"got float32 \[5, 4\] for p.*\[5, 3\]"),
        ({"values": {"p": torch.zeros(5, 3).long(), "q": q}}, r"got int64 \[5, 3\]"),
        ({"values": {}}, "values of no point"),
        ({"index": {k: v for k, v in one.index.items() if k != "span"}}, "no column span"),
        ({"index": {**one.index, "who": np.array(["a"])}}, "columns who of another length"),
    ):
        with pytest.raises(InputError, match=message):
            ActivationRows(**{**vars(one), **change})
    with pytest.raises(InputError, match="got parts of other points"):
        ActivationRows.joined([one, ActivationRows(**{**vars(one), "kind": "prompt"})])
    with pytest.raises(InputError, match="got no parts"):
        ActivationRows.joined([])
    both = ActivationRows.joined([one, one])
    assert torch.equal(both.values["p"], one.values["p"].repeat(2, 1))
    assert both.index["position"].tolist() == [0, 1, 2, 3, 0] * 2
