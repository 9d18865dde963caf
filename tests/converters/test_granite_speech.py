"""Granite-Speech beyond ``test_families.py``: its multipliers in every tool, its waveforms."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AddedToken,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteSpeechForConditionalGeneration,
)
from transformers.models.granite_speech import feature_extraction_granite_speech as hf_features

from cases import granite_speech as granite
from cases.granite_speech import CASE, CONFIG, VOCAB
from hooked_alm import ALMInput, ConversionError, HookedALM, InputError
from hooked_alm.converters.blocks.log_mel import LogMel
from hooked_alm.converters.families.granite_speech import FAMILY
from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.reading.divergence import compare_depths
from hooked_alm.methods.reading.lens import logit_lens, residual_rows
from tiny import MELS, PLACEHOLDER, build_tokenizer, edit_config
from tolerances import DIVERGENCE, EDGE_SCORES, LENS, LOG_MEL, OTHER_KERNEL, SUM_OVER_HEADS

TEXT = CONFIG["text_config"]
EXACT = {"rtol": 0.0, "atol": LENS[torch.float32]}
RATE = 16000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of messages of plain text, as the published one: it adds strings, and a list would fail."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with processor files, in the published form."""
    folder = tmp_path_factory.mktemp("granite")
    granite.save(folder, torch.float32)
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|audio|>", special=True)]}
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    extractor = {
        "feature_extractor_type": "GraniteSpeechFeatureExtractor", "sampling_rate": RATE,
        "n_mels": MELS, "melspec_kwargs": {"n_mels": MELS}, "projector_window_size": 6,
        "projector_downsample_rate": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    config = json.loads((folder / "config.json").read_text())
    config["audio_token_index"] = tokenizer.convert_tokens_to_ids("<|audio|>")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder)


def prompts(model: HookedALM, seed: int = 0) -> ALMInput:
    """Two rows with a clip each; another seed gives another clip of the same length."""
    inputs = CASE.inputs([[29], [29]], [9, 12])
    generator = torch.Generator().manual_seed(seed)
    inputs["input_features"] = torch.randn(inputs["input_features"].shape, generator=generator)
    placeholder = model.audio.tokens.placeholder
    inputs["input_ids"][inputs["input_ids"] == PLACEHOLDER] = placeholder
    return model.encode(**inputs)


@torch.no_grad()
def test_logits_are_those_of_the_text_model(model: HookedALM) -> None:
    """``GraniteForCausalLM`` divides by ``logits_scaling``; the class with audio does not."""
    text = GraniteForCausalLM(GraniteConfig(**TEXT)).eval()
    blocks = {
        name: value.clone()
        for name, value in GraniteSpeechForConditionalGeneration.from_pretrained(
            model.cfg.tokenizer_name
        ).state_dict().items()
        if "language_model" in name or name.startswith("lm_head")
    }  # fmt: skip
    text.load_state_dict({k.replace("model.language_model", "model"): v for k, v in blocks.items()})
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(4))
    assert torch.equal(model(ids), text(ids).logits)


@torch.no_grad()
def test_parts_add_up_to_the_stream(model: HookedALM) -> None:
    """Embedding, heads, neurons and MLPs are what was really added, multipliers included."""
    x = prompts(model)
    _, cache = model.run_with_cache(x)
    real = x.attention_mask.bool()
    total = cache.decompose_resid().sum(0)[real]
    torch.testing.assert_close(total, cache["resid_post", -1][real], **EXACT)
    stream = cache["blocks.0.hook_resid_pre"]
    assert torch.equal(stream, cache["hook_embed"])
    text = model.embed.W_E[x.tokens]
    is_text = real & ~x.spans.heard
    assert torch.equal(cache["hook_embed"][is_text], text[is_text])
    block = model.blocks[2]
    results = torch.einsum("bphe,hed->bpd", cache["z", 2], block.attn.W_O)
    torch.testing.assert_close(
        results, cache["attn_out", 2], rtol=0, atol=SUM_OVER_HEADS[torch.float32]
    )
    neurons = cache["post", 2, "mlp"] @ block.mlp.W_out
    torch.testing.assert_close(neurons, cache["mlp_out", 2], **EXACT)


@torch.no_grad()
def test_direct_effects_add_up_to_the_logits(model: HookedALM) -> None:
    """Logits as published, not as the class with audio gives them."""
    x = prompts(model)
    logits, cache = model.run_with_cache(x)
    parts = cache.decompose_resid(apply_ln=False)
    found = cache.logit_attrs(parts, tokens=5, incorrect_tokens=11).sum(0)
    expected = logits[..., 5] - logits[..., 11]
    real = x.attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], **EXACT)
    lens = logit_lens(model, x, [5, 11])
    torch.testing.assert_close(lens[-1, :, 0], logits[:, -1, [5, 11]], **EXACT)


@torch.no_grad()
def test_losses_over_the_vocabulary(model: HookedALM) -> None:
    x = prompts(model)
    positions = torch.arange(4, 9).expand(2, -1)
    rows = residual_rows(model, x, positions)
    targets = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(4))
    found = compare_depths(model, rows[-1:], targets, [(0, 1)]).nll[0]
    log_probs = model(x).log_softmax(-1).gather(1, positions[..., None].expand(-1, -1, VOCAB))
    expected = -log_probs.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=DIVERGENCE)


@torch.no_grad()
def test_heads_whose_results_are_edited(model: HookedALM) -> None:
    """A hook on ``hook_result`` takes over from the projection, and takes its multiplier along."""
    x = prompts(model)
    expected = model.run_with_hooks(
        x, fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: zero_head(z))]
    )
    found = model.run_with_hooks(
        x, fwd_hooks=[("blocks.1.attn.hook_result", lambda r, hook: zero_head(r))]
    )
    real = x.attention_mask.bool()
    assert (expected - model(x))[real].abs().max() > 1e-3
    torch.testing.assert_close(
        found[real], expected[real], rtol=0, atol=OTHER_KERNEL[torch.float32]
    )


def zero_head(heads: Tensor) -> Tensor:
    heads = heads.clone()
    heads[:, :, 4] = 0
    return heads


def test_edges_of_a_head_add_up_to_it(model: HookedALM) -> None:
    """Messages are made by ``W_O``, the node's score by autograd through the projection."""
    base, donor = prompts(model), prompts(model, seed=1)
    metric = LogitDiff(5, 11)
    readers = [*(f"blocks.*.attn.hook_{p}_input[*]" for p in "qkv"), "blocks.*.hook_mlp_in",
               "logits"]  # fmt: skip
    senders = ["blocks.1.attn.hook_z[*]", "blocks.2.mlp.hook_post[7]"]
    edges = attribute_edges(model, base, donor, metric, senders, readers, places=["audio"]).effect
    found = np.nansum(edges, axis=1)
    node = partial(attribute_nodes, model, base, donor, metric, places=["audio"])
    expected = [
        *node(site="z", layers=[1], heads="each").effect[0][:, None],
        node(site="post", layers=[2], neurons=[7]).effect[0],
    ]
    expected = np.concatenate([np.reshape(one, found[:1].shape) for one in expected])
    assert abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=EDGE_SCORES * abs(expected).max())


def test_the_published_config() -> None:
    """Of 4.0-1b, in the form that older transformers wrote."""
    published = {
        "architectures": ["GraniteSpeechForConditionalGeneration"], "audio_token_index": 100352,
        "downsample_rate": 5, "has_lora_adapter": False, "initializer_range": 0.02,
        "model_type": "granite_speech", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "window_size": 15,
        "encoder_config": {
            "model_type": "granite_speech_encoder", "num_layers": 16, "output_dim": 348,
            "dim_head": 128, "torch_dtype": "bfloat16",
        },
        "projector_config": {
            "model_type": "blip_2_qformer", "hidden_size": 1024, "num_hidden_layers": 2,
            "num_attention_heads": 16, "intermediate_size": 4096, "encoder_hidden_size": 1024,
            "cross_attention_frequency": 1, "position_embedding_type": "absolute",
            "use_qformer_text_input": False,
        },
        "text_config": {
            "model_type": "granite", "hidden_size": 2048, "num_hidden_layers": 40,
            "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 4096,
            "vocab_size": 100353, "embedding_multiplier": 12, "residual_multiplier": 0.22,
            "attention_multiplier": 0.0078125, "logits_scaling": 8, "rope_theta": 10000,
            "rope_scaling": None, "rms_norm_eps": 1e-05, "attention_bias": False,
            "mlp_bias": False, "max_position_embeddings": 4096,
        },
    }  # fmt: skip
    config = FAMILY.config_class.from_dict(published)
    cfg = FAMILY.decoder_config(
        config, published, original_architecture=FAMILY.architectures[0], model_name="4.0-1b"
    )
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head) == (
        40, 2048, 16, 4, 128
    )  # fmt: skip
    assert (cfg.embedding_multiplier, cfg.residual_multiplier) == (12, 0.22)
    assert (cfg.attention_multiplier, cfg.logits_scaling, cfg.d_vocab) == (0.0078125, 8, 100353)
    assert (cfg.eps, cfg.rope_parameters["rope_theta"], cfg.tie_word_embeddings) == (
        1e-5, 10000, False
    )  # fmt: skip
    with torch.device("meta"):
        tokens = FAMILY.front_end(config, frozenset()).tokens
    assert (tokens.seconds_per_token, tokens.max_seconds) == pytest.approx((0.1, 409.6))
    published["projector_config"]["position_embedding_type"] = "relative_key"
    with pytest.raises(ConversionError, match="position_embedding_type = 'relative_key'"):
        FAMILY.decoder_config(config, published, original_architecture="", model_name="4.0-1b")


def refused(folder: Path, out: Path, **changes: Any) -> str:
    """Message of the error that a config with other values raises."""

    def change(config: dict[str, Any]) -> None:
        for name, value in changes.items():
            part, _, field = name.rpartition("__")
            (config[part] if part else config)[field] = value

    with pytest.raises(ConversionError) as error:
        HookedALM.from_pretrained(edit_config(folder, out, change))
    return str(error.value)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "LoRA adapter on for prompts with audio" in refused(
        folder, tmp_path / "lora", has_lora_adapter=True
    )
    assert "'llama', expected 'granite'" in refused(
        folder, tmp_path / "decoder", text_config__model_type="llama"
    )
    assert "audio_token_index = 999 has no embedding" in refused(
        folder, tmp_path / "placeholder", audio_token_index=999
    )
    assert "attention_bias = True" in refused(
        folder, tmp_path / "bias", text_config__attention_bias=True
    )
    assert "cat_hidden_layers" in refused(
        folder, tmp_path / "plus", encoder_config__cat_hidden_layers=[1]
    )


def test_inputs_that_do_not_fit(model: HookedALM) -> None:
    inputs = CASE.inputs([[29], [11]], [9, 12])
    inputs["input_ids"][inputs["input_ids"] == PLACEHOLDER] = model.audio.tokens.placeholder
    holes = inputs["input_features_mask"].clone()
    holes[0, 3] = False
    for mask in (holes, holes[:, :-1]):
        with pytest.raises(InputError, match="for whole windows"):
            model.encode(**{**inputs, "input_features_mask": mask})
    with pytest.raises(InputError, match="without\\s+input_features"):
        model.encode(**{**inputs, "input_features": None})
    with pytest.raises(InputError, match="got labels"):
        model.encode(**inputs, labels=inputs["input_ids"])


@torch.no_grad()
def test_without_a_mask_every_position_is_heard(model: HookedALM) -> None:
    inputs = CASE.inputs([[29], [29]], [9, 12])
    inputs["input_ids"][inputs["input_ids"] == PLACEHOLDER] = model.audio.tokens.placeholder
    expected = model(model.encode(**inputs))
    del inputs["input_features_mask"]
    assert torch.equal(model(model.encode(**inputs)), expected)


# ----------------------------------------------------------------------------- from the waveform


class NaiveMel(nn.Module):
    """``torchaudio.transforms.MelSpectrogram`` by its definition, in float64, frame by frame."""

    def __init__(
        self, sample_rate: int, n_fft: int, win_length: int, hop_length: int, n_mels: int
    ) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop_length
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win_length) / win_length)
        before = (n_fft - win_length) // 2
        self.window = np.zeros(n_fft)
        self.window[before : before + win_length] = hann
        top = 2595 * np.log10(1 + sample_rate / 2 / 700)
        edges = 700 * (10 ** (np.linspace(0, top, n_mels + 2) / 2595) - 1)
        frequency = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
        self.filters = np.array(
            [
                [
                    max(0.0, min((f - low) / (mid - low), (high - f) / (high - mid)))
                    for f in frequency
                ]
                for low, mid, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
            ]
        )

    def forward(self, audio: Tensor) -> Tensor:
        return torch.stack([self._one(row.double().numpy()) for row in audio])

    def _one(self, row: np.ndarray) -> Tensor:
        padded = np.pad(row, self.n_fft // 2, mode="reflect")
        frames = [
            padded[start : start + self.n_fft]
            for start in range(0, len(padded) - self.n_fft + 1, self.hop)
        ]
        power = np.abs(np.fft.rfft(np.array(frames) * self.window)) ** 2
        return torch.from_numpy(self.filters @ power.T)


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hugging Face's, its one function of torchaudio by our own definition."""
    transforms = SimpleNamespace(MelSpectrogram=NaiveMel)
    monkeypatch.setattr(
        hf_features, "torchaudio", SimpleNamespace(transforms=transforms), raising=False
    )
    monkeypatch.setattr(hf_features, "requires_backends", lambda *_: None)
    return hf_features.GraniteSpeechFeatureExtractor(
        n_mels=MELS, projector_window_size=6, projector_downsample_rate=3
    )


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal(round(seconds * RATE))).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.0165, 0.31, 0.995, 1.0, 1.0101])
def test_features_are_the_extractors(model: HookedALM, extractor: Any, seconds: float) -> None:
    """Even and odd numbers of frames, and positions that the processor would count."""
    samples = wave(seconds)
    expected = extractor([samples])
    clip = model.read_clip(samples)
    torch.testing.assert_close(
        clip.features.mT, expected["input_features"].float(), rtol=0, atol=LOG_MEL
    )
    assert [clip.n_tokens] == expected["audio_embed_sizes"]


def test_prepare_is_the_processors(model: HookedALM, extractor: Any) -> None:
    """Ids of a template of plain text, a clip's placeholders in front of the words."""
    samples, tokenizer = wave(0.7), model.tokenizer
    x = model.prepare(samples, "What emotion?")
    content = "<|audio|>" * extractor([samples])["audio_embed_sizes"][0] + "What emotion?"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert x.tokens.tolist() == [tokenizer(rendered)["input_ids"]]
    assert tokenizer.decode(x.tokens[0, x.spans.positions("text", 0)]) == "What emotion?"
    plain = model.prepare(text="What emotion?")
    assert "<|audio|>" not in tokenizer.decode(plain.tokens[0])


@torch.no_grad()
def test_a_clip_is_heard_alone(model: HookedALM) -> None:
    """Not with the padding that the longer one beside it would bring, as in Hugging Face."""
    clips = [wave(0.31), wave(0.7, seed=1)]
    x = model.prepare([*clips], "What emotion?")
    _, cache = model.run_with_cache(x, names_filter=["hook_audio_embed", "audio.hook_encoder_in"])
    assert len(cache["audio.hook_encoder_in"]) == 2
    hf = GraniteSpeechForConditionalGeneration.from_pretrained(model.cfg.tokenizer_name).eval()
    for row, clip in enumerate(x.clips):
        alone = hf.get_audio_features(clip.features.mT).pooler_output[0]
        assert torch.equal(cache["hook_audio_embed"][row, : clip.n_tokens], alone)
    beside = hf.get_audio_features(
        torch.cat([torch.nn.functional.pad(clip.features, (0, 40)) for clip in x.clips[:1]]).mT
    ).pooler_output[0]
    n = x.clips[0].n_tokens
    assert not torch.equal(beside[:n], cache["hook_audio_embed"][0, :n])
    with pytest.raises(InputError, match="clips of different lengths"):
        model.hf_arguments(x)


def test_clips_too_short_or_too_long(model: HookedALM) -> None:
    """The longest fills the decoder's context: 211 positions of 0.06 s."""
    with pytest.raises(InputError, match="256 samples: expected more than 256"):
        model.prepare(wave(256 / RATE), "What emotion?")
    assert model.audio.tokens.max_seconds == pytest.approx(211 * 0.06)
    with pytest.raises(InputError, match="12.66"):
        model.prepare(wave(13), "What emotion?")
    (clip,) = model.prepare(wave(13), "What emotion?", truncate=True).clips
    assert clip.n_tokens == 212  # the last window is padded


def test_the_extractors_settings_are_read(tmp_path: Path) -> None:
    """From either of the files that transformers writes; nothing read is not silently dropped."""
    settings = {"sampling_rate": 8000, "n_mels": 5, "hop_length": 80}
    (tmp_path / "processor_config.json").write_text(json.dumps({"audio_processor": settings}))
    assert LogMel.from_folder(tmp_path) == LogMel(sampling_rate=8000, n_mels=5, hop_length=80)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"n_mels": 7}))
    assert LogMel.from_folder(tmp_path).n_mels == 5  # as in transformers, where both are there
    (tmp_path / "processor_config.json").unlink()
    assert LogMel.from_folder(tmp_path).n_mels == 7
