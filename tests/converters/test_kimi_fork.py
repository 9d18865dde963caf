"""Kimi-Audio's two heads: what reaches which, and how each is asked."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor

from cases import kimi_audio as kimi
from hooked_alm import ConversionError, HookedALM, HookNameError, InputError
from hooked_alm.audio import Waveform
from hooked_alm.converters.families.kimi_audio import KimiAudioConfig, KimiAudioFrontEnd
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.attention_mass import attention_mass
from hooked_alm.methods.reading.lens import logit_lens
from tolerances import FAST_ENGINE, LENS

INPUTS = kimi.inputs([[11], [5]], [9, 14])
PAIR = kimi.inputs([[11], [11]], [9, 9])
SHARED, TEXT_ONLY = range(kimi.FORK + 1), range(kimi.FORK + 1, kimi.TRUNK)
DIFF = LogitDiff(answer=5, other=11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kimi") / "model"
    path.mkdir()
    kimi.save(path, torch.float32)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder)


@pytest.fixture
def model(loaded: HookedALM) -> Iterator[HookedALM]:
    yield loaded
    assert not list(loaded.list_hooks())


def both(model: HookedALM, x: Any, hooks: Any = ()) -> tuple[Tensor, Tensor]:
    """Logits of the text head and of the audio head at the readout, under hooks."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(x)[:, -1], model(x, head="audio")[:, -1]


def test_the_path_to_each_head(model: HookedALM) -> None:
    audio = model.towards("audio")
    assert model.path == ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4")
    assert audio.path == (*model.path[:3], "mimo_blocks.0", "mimo_blocks.1", "mimo_blocks.2")
    assert audio.block(3) is model.mimo_blocks[0]
    assert audio.towards("text").path == model.path


def test_other_models_have_one_head(gqa: HookedALM) -> None:
    with pytest.raises(InputError, match="it has 'text' alone"):
        gqa("hello", head="audio")
    assert not any(name.startswith("mimo") for name in gqa.hook_dict)


def test_what_a_patch_reaches(model: HookedALM) -> None:
    """Blocks up to the fork: both heads. Later ones: the text's. The branch: the audio's."""
    x = model.encode(**INPUTS)
    text, audio = both(model, x)
    double = lambda value, hook: 2 * value  # noqa: E731
    places = {
        **{f"blocks.{layer}": (True, True) for layer in SHARED},
        **{f"blocks.{layer}": (True, False) for layer in TEXT_ONLY},
        **{f"mimo_blocks.{layer}": (False, True) for layer in range(kimi.BRANCH)},
    }
    for block, (reaches_text, reaches_audio) in places.items():
        for point in ("attn.hook_z", "hook_mlp_out", "hook_resid_post"):
            now = both(model, x, [(f"{block}.{point}", double)])
            changes = [not torch.equal(a, b) for a, b in zip(now, (text, audio), strict=True)]
            assert changes == [reaches_text, reaches_audio], (block, point)


@torch.no_grad()
def test_sweeps_count_layers_along_the_path(model: HookedALM) -> None:
    """The same cells by hand: block names from the path, donor values from a cache."""
    base, donor = (model.encode(**PAIR)[row] for row in (0, 1))
    for view in (model, model.towards("audio")):
        found = patch(view, base, donor, DIFF, site="attn_out", places=["readout"])
        assert found.axes["layer"] == tuple(range(len(view.path)))
        for layer, block in enumerate(view.path):
            name = f"{block}.hook_attn_out"
            _, cache = view.run_with_cache(donor, names_filter=name)

            def write(value: Tensor, hook: Any, cache: Any = cache) -> Tensor:
                return torch.cat([value[:, :-1], cache[hook.name][:, -1:]], 1)

            logits = view.run_with_hooks(base, fwd_hooks=[(name, write)])[0, -1]
            by_hand = (logits[5] - logits[11]).item()
            assert abs(found.values[layer].item() - by_hand) < FAST_ENGINE[torch.float32], block


def test_methods_follow_the_head(model: HookedALM) -> None:
    """The lens ends in that head's logits; masses and attributions have its layers."""
    x = model.encode(**INPUTS)
    for view in (model, model.towards("audio")):
        tokens = [3, 77]
        lens = logit_lens(view, x, tokens)
        assert len(lens) == len(view.path) + 1
        assert (lens[-1, :, 0] - view(x)[:, -1, tokens]).abs().max() < LENS[torch.float32]
        assert len(attention_mass(view, x, ["audio", "text"])) == len(view.path)
        base, donor = (view.encode(**PAIR)[row] for row in (0, 1))
        scores = attribute_nodes(view, base, donor, DIFF, site="z", places=["readout"])
        assert scores.scores.values.shape[0] == len(view.path)
        assert scores.scores.values.any()


@pytest.mark.parametrize("site", ["q", "k"])
def test_the_softmax_of_a_branch_is_its_own(model: HookedALM, site: Any) -> None:
    """The QK fix at every block of a path: a small step by the exact engine is its score."""
    base, donor = (model.encode(**PAIR)[row] for row in (0, 1))
    for view in (model, model.towards("audio")):
        options: dict[str, Any] = {"site": site, "places": ["readout"], "mode": "interpolate"}
        options["coefficient"] = 1e-2
        exact = patch(view, base, donor, DIFF, **options).effect
        score = attribute_nodes(view, base, donor, DIFF, qk_fix=True, **options).effect
        assert (np.abs(exact)[-kimi.BRANCH :] > 1e-5).all()
        np.testing.assert_allclose(score, exact, rtol=0, atol=0.05 * np.abs(exact).max())


def test_hooks_on_the_other_branch_fire(model: HookedALM) -> None:
    """Whichever head is asked, and only where something is hooked does the other branch run."""
    x = model.encode(**INPUTS)
    logits, cache = model.run_with_cache(x, names_filter=lambda name: True)
    assert torch.equal(logits, model(x))
    assert torch.equal(cache["mimo_unembed.hook_out"], model(x, head="audio"))
    audio, cache = model.towards("audio").run_with_cache(x, names_filter=["unembed.hook_out"])
    assert torch.equal(audio, model(x, head="audio"))
    assert torch.equal(cache["unembed.hook_out"], logits)
    ran = []
    handle = model.mimo_blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    model(x)
    handle.remove()
    assert not ran


def test_resuming_counts_along_the_path(model: HookedALM) -> None:
    x = model.encode(**INPUTS)
    audio = model.towards("audio")
    for layer in range(len(audio.path) + 1):
        resid = audio(x, stop_at_layer=layer)
        assert torch.equal(audio(resid, start_at_layer=layer, inputs=x), audio(x)), layer


@torch.no_grad()
def test_a_run_that_starts_behind_the_fork_leaves_the_other_branch_out(model: HookedALM) -> None:
    x = model.encode(**INPUTS)
    (fork,) = (branch.from_layer for branch in model.cfg.branches)
    fired: list[str] = []

    def run_from(layer: int) -> None:
        hook = ("mimo_blocks.0.hook_resid_pre", lambda value, hook: fired.append(hook.name))
        resid = model(x, stop_at_layer=layer)
        model.run_with_hooks(resid, start_at_layer=layer, inputs=x, fwd_hooks=[hook])

    run_from(fork)
    assert fired == ["mimo_blocks.0.hook_resid_pre"]
    with pytest.raises(HookNameError, match=r"start_at_layer=\d, .* does not reach it"):
        run_from(fork + 1)


def test_two_streams_make_one_embedding(model: HookedALM) -> None:
    """Outside the audio: the sum of two rows. The readout is in no audio span."""
    x = model.encode(**INPUTS)
    names = ["hook_embed", "hook_text_embed", "hook_code_embed"]
    _, cache = model.run_with_cache(x, names_filter=names)
    heard = x.spans.heard
    assert torch.equal(cache["hook_code_embed"], model.embed(x.tokens))
    assert torch.equal(cache["hook_text_embed"], model.embed(x.text_tokens))
    silenced = model.run_with_hooks(
        x, fwd_hooks=[("hook_text_embed", lambda embed, hook: torch.zeros_like(embed))]
    )
    assert not torch.equal(silenced, model(x))
    expected = model.embed(x.tokens) + model.embed(x.text_tokens)
    assert torch.equal(cache["hook_embed"][~heard], expected[~heard])
    assert not torch.equal(cache["hook_embed"][heard], expected[heard])
    assert not heard[:, -1].any()
    assert (x.text_tokens[x.spans.mask("text")] != kimi.BLANK).all()
    markers = x.tokens[x.spans.mask("audio_struct")]
    assert set(markers.tolist()) == {kimi.BEGIN, kimi.END}
    again = model.encode(**model.hf_arguments(x))
    assert torch.equal(model(again), model(x))


def test_generating_with_the_branch_watched(model: HookedALM) -> None:
    """The other head's logits at every step, with a cache of keys and values."""
    x = model.encode(**INPUTS)
    tokens, cache = model.generate(
        x, 4, return_type="tokens", do_sample=False, eos_token_id=None,
        names_filter=["mimo_unembed.hook_out"],
    )  # fmt: skip
    with pytest.raises(InputError, match="only text is generated"):
        model.towards("audio").generate(x, 4)
    whole = model.towards("audio")(x.extend(tokens[:, :-1]))
    real = x.extend(tokens[:, :-1]).attention_mask.bool()
    assert (cache["mimo_unembed.hook_out"] - whole)[real].abs().max() < FAST_ENGINE[torch.float32]


def test_spans_of_a_whole_turn(model: HookedALM) -> None:
    """Roles, the wish for a written answer and the end of the turn are no text."""
    user, written, end, code = 312, 313, 314, kimi.OFFSET + 3
    audio = [user, kimi.BLANK, kimi.BLANK, kimi.BEGIN, code, code, code, kimi.END, written, end]
    text = [kimi.BLANK, 11, 12, *[kimi.BLANK] * 8]
    x = model.encode(
        input_ids=torch.tensor([[*audio, kimi.ASSISTANT]]),
        text_input_ids=torch.tensor([text]),
        is_continuous_mask=torch.tensor([[i == code for i in audio] + [False]]),
        whisper_input_feature=[INPUTS["whisper_input_feature"][0]],
    )
    assert {name: x.spans.positions(name, 0) for name in x.spans} == {
        "sink": [0], "text": [1, 2], "audio_struct": [3, 7], "audio": [4, 5, 6],
        "struct": [8, 9], "readout": [10],
    }  # fmt: skip
    assert x.spans.seconds(0, 0.08, 0.16) == [(5, 6)]


def test_a_text_stream_of_zeros_adds_nothing(model: HookedALM) -> None:
    """As the published code skips it; a zero among other ids is a token like any other."""
    given = {k: v for k, v in INPUTS.items() if k != "text_input_ids"}
    zeros = torch.zeros_like(INPUTS["text_input_ids"])
    bare = model.encode(**given)
    _, cache = model.run_with_cache(bare, names_filter="hook_embed")
    expected = model.embed(bare.tokens)
    assert torch.equal(cache["hook_embed"][~bare.spans.heard], expected[~bare.spans.heard])
    assert torch.equal(model(model.encode(**given, text_input_ids=zeros)), model(bare))
    some = INPUTS["text_input_ids"].clone()
    some[:, -2] = 0
    _, cache = model.run_with_cache(
        model.encode(**given, text_input_ids=some), names_filter="hook_embed"
    )
    expected = model.embed(bare.tokens) + model.embed(some)
    assert torch.equal(cache["hook_embed"][~bare.spans.heard], expected[~bare.spans.heard])


def test_answers_need_a_text_stream(model: HookedALM) -> None:
    """Without one they would be read as audio, silently."""
    bare = model.encode(input_ids=INPUTS["input_ids"].clamp(max=kimi.ASSISTANT))
    assert model(bare).isfinite().all()
    with pytest.raises(InputError, match="appended to a prompt without a text stream"):
        model.generate(bare, 2, return_type="tokens", eos_token_id=None)
    right_padded = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert model(model.encode(input_ids=right_padded, attention_mask=mask)).isfinite().all()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "mask without features": ({"whisper_input_feature": None}, "belong together"),
    "features without mask": ({"is_continuous_mask": None}, "belong together"),
    "one recording too few": (
        {"whisper_input_feature": INPUTS["whisper_input_feature"][:1]},
        "1 recordings for 2 runs",
    ),
    "too few rows": (
        {"whisper_input_feature": [f[:4] for f in INPUTS["whisper_input_feature"]]},
        r"features \[4, 26\], expected 11 rows or more of 26",
    ),
    "streams of two lengths": (
        {"text_input_ids": INPUTS["text_input_ids"][:, 1:]},
        "the two streams run side by side",
    ),
    "a text stream in one row alone": (
        {"text_input_ids": INPUTS["text_input_ids"] * torch.tensor([[1], [0]])},
        r"0 throughout in rows \[1\]",
    ),
    "labels": ({"labels": INPUTS["input_ids"]}, "got labels"),
}


@pytest.mark.parametrize("what", BAD)
def test_inputs_that_do_not_fit(model: HookedALM, what: str) -> None:
    change, message = BAD[what]
    with pytest.raises(InputError, match=message):
        model.encode(**{**INPUTS, **change})


def test_published_numbers() -> None:
    """What a config that leaves them out means."""
    config = KimiAudioConfig()
    ids = (config.kimia_media_begin, config.kimia_media_end, config.kimia_text_blank)
    assert ids == (151661, 151663, 151666)
    fork = (config.kimia_mimo_transformer_from_layer_index, config.kimia_mimo_layers)
    assert (*fork, config.kimia_adaptor_input_dim) == (21, 6, 5120)
    assert (config.vocab_size, config.rms_norm_eps) == (168448, 1e-6)


def test_over_long_recordings_are_refused(model: HookedALM) -> None:
    """The published text mode ends at 7500 positions."""
    n = 7501
    heard = torch.ones(1, n + 1).bool()
    heard[0, -1] = False
    given: dict[str, Any] = dict(
        input_ids=torch.full((1, n + 1), kimi.OFFSET), is_continuous_mask=heard,
        whisper_input_feature=[torch.zeros(n, kimi.D_IN)],
    )  # fmt: skip
    with pytest.raises(InputError, match="7501 positions, expected at most 7500"):
        model.encode(**given)
    given["is_continuous_mask"] = heard.clone()
    given["is_continuous_mask"][0, 0] = False
    assert model.encode(**given).clips[0].n_tokens == 7500


def test_a_wrong_rope_theta_is_found(folder: Path, tmp_path: Path) -> None:
    """The checkpoint stores its frequencies; a config without the field means another model."""
    copy = tmp_path / "m"
    copy.mkdir()
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"inv_freq holds .*expected .*'rope_theta': 10000"):
        HookedALM.from_pretrained(copy)


def test_a_recording_is_heard_in_chunks() -> None:
    """70 s: each chunk's spectrogram is its own, and the last has fewer positions."""
    whisper = WhisperConfig(
        d_model=6, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=7, num_mel_bins=4
    )
    front_end = KimiAudioFrontEnd(
        KimiAudioConfig(kimia_adaptor_input_dim=24, whisper=whisper.to_dict()), frozenset()
    )
    samples = torch.randn(70 * 16000 - 900, generator=torch.manual_seed(0)).numpy()
    waveform = Waveform(samples=samples, sampling_rate=16000, notes=(), name="")
    extractor = WhisperFeatureExtractor(feature_size=4)
    spectrograms, sizes = front_end.windows_of(waveform, extractor)
    # 375 + 375 positions, and (159100 - 1) // 1280 + 1 of the rest.
    assert sizes == [375, 375, 125]
    for chunk, found in zip(np.split(samples, [480000, 960000]), spectrograms, strict=True):
        alone = extractor(chunk, sampling_rate=16000, return_tensors="pt")["input_features"][0]
        assert torch.equal(found, alone)
    clip = front_end.clip(spectrograms, sizes)
    assert clip.n_tokens == 875


@torch.no_grad()
def test_whisper_runs_or_says_why_not(model: HookedALM, tmp_path: Path) -> None:
    """Spectrograms need its folder; hooks in it need spectrograms."""
    inputs = kimi.inputs_with_spectrograms([[11], [5]], [9, 14])
    with pytest.raises(InputError, match="the checkpoint's folder has no whisper-large-v3/"):
        model.encode(**inputs)
    folder = tmp_path / "model"
    folder.mkdir()
    kimi.save_with_whisper(folder, torch.float32)
    hears = HookedALM.from_pretrained(folder)
    assert hears.audio is not None
    x = hears.encode(**inputs)
    assert torch.equal(hears.encode(**hears.hf_arguments(x)).clips[0].features, x.clips[0].features)
    # What Whisper makes of them, given in their place, is heard alike.
    name, point = "audio.hook_encoder_out", "audio.encoder.blocks.0.attn.hook_z"
    logits, cache = hears.run_with_cache(x, names_filter=name)
    features = [one[:n] for one, n in zip(cache[name], (11, 5), strict=True)]
    given = {k: v for k, v in inputs.items() if k != "input_features"}
    same = hears.encode(**given, whisper_input_feature=features)
    assert torch.equal(hears(same), logits)
    with pytest.raises(InputError, match="does not run. Give `encode` the spectrograms"):
        hears.run_with_cache(same, names_filter=point)
    with pytest.raises(InputError, match="these clips do not run it"):
        hears.encoder_rows(same)
    inside, other = hears.towards("encoder"), hears.towards("audio").towards("encoder")
    with pytest.raises(InputError, match="head audio for text"):
        patch(inside, x, x, DIFF, donor_model=other)
    with pytest.raises(InputError, match="belong together"):
        hears.encode(**inputs, whisper_input_feature=features)
    with pytest.raises(InputError, match="recording 0 has spectrograms .* with 1 chunks or more"):
        hears.encode(**{**inputs, "input_features": [one[:0] for one in inputs["input_features"]]})


def test_the_page_lays_a_prompt_out_as_published() -> None:
    """Its function: one turn of text and audio, answered in text."""
    page = (Path(__file__).parents[2] / "docs" / "kimi_audio.md").read_text()
    (ids,) = re.findall(r"\n(USER, ASSISTANT, .*?)\n\n\n", page, re.DOTALL)
    (prompt,) = re.findall(r"\n(def prompt\(.*?)\n\n\n", page, re.DOTALL)
    hears = SimpleNamespace(windows_of=lambda heard, extractor: ("spectrograms", [3]))
    names: dict[str, Any] = {
        "torch": torch, "voice_tokens": lambda samples: [3, 0, 7],
        "text_tokens": lambda text: [11, 12], "extractor": None,
        "model": SimpleNamespace(encode=dict, audio=hears),
        "read_audio": lambda clip, **how: SimpleNamespace(samples=np.zeros(9, np.float32)),
    }  # fmt: skip
    exec(compile(f"{ids}\n{prompt}", "kimi_audio.md", "exec"), names)
    x, blank = names["prompt"]("clip", "What?"), 151666
    audio = [151670, blank, blank, 151661, 152067, 152064, 152071, 151663, 151675, 151645, 151671]
    assert x["input_ids"].tolist() == [audio]
    assert x["text_input_ids"].tolist() == [[blank, 11, 12, *[blank] * 8]]
    assert x["is_continuous_mask"].tolist() == [[i >= 152064 for i in audio]]
    assert x["input_features"] == ["spectrograms"]
