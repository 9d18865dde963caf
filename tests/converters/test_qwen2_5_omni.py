"""Qwen2.5-Omni beyond ``test_families.py``: three rotary axes, published configs, waveforms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5OmniProcessor, WhisperFeatureExtractor

from cases import qwen2_5_omni as omni
from cases.qwen2_5_omni import CASES
from hooked_alm import ALMInput, ConversionError, HookedALM, InputError
from hooked_alm.converters import load_model
from hooked_alm.converters.families.qwen2_5_omni import FAMILY
from hooked_alm.converters.parity import run_ours
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import path_patch
from hooked_alm.points import Site
from tiny import MELS, build_tokenizer
from tolerances import FAST_ENGINE

RATE = 16000
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'audio' %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model, with the files that its processor reads."""
    folder = tmp_path_factory.mktemp("omni")
    omni.save_whole(folder, torch.float32)
    build_tokenizer().save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    extractor().save_pretrained(folder)
    return folder


def extractor(chunk_length: int = 300) -> WhisperFeatureExtractor:
    """The published one but for its number of mels."""
    return WhisperFeatureExtractor(
        feature_size=MELS, chunk_length=chunk_length, return_attention_mask=True
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder)


# ------------------------------------------------------------------------------ three axes


def three_axes(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same prompts with positions that differ by axis, as a picture among them makes them."""
    time = inputs["position_ids"]
    height = (time * 2 + 1) % 17
    width = torch.arange(time.shape[1]).expand_as(time).flip(-1) + 3
    return {**inputs, "position_ids": torch.stack([time, height, width])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_three_different_axes(folder: Path, dtype: torch.dtype, attention: str) -> None:
    """Equal to Hugging Face at every depth; and not what one axis gives."""
    case = CASES[0]
    plain = case.inputs([[29], [11]], [9, 14])
    inputs = three_axes(plain)
    expected = omni.reference(folder, dtype, attention).run(inputs)
    model = HookedALM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    x = model.encode(**inputs)
    found, real = run_ours(model, x), x.attention_mask.bool()
    for where, theirs in expected.items():
        assert torch.equal(found[where][real], theirs[real]), where
    assert not torch.equal(model(model.encode(**plain))[real], found["logits"][real])
    same = {**plain, "position_ids": plain["position_ids"].expand(3, -1, -1)}
    assert torch.equal(model(model.encode(**same)), model(model.encode(**plain)))


SWEPT: tuple[tuple[Site, Any], ...] = (
    ("resid_pre", ["audio", "readout"]), ("q", ["readout"]), ("k", ["audio"]), ("z", ["text"]),
    ("pattern", ["readout"]),
)  # fmt: skip


@torch.no_grad()
def test_sweeps_under_three_axes(model: HookedALM) -> None:
    """The engine against whole runs under hooks; the donor has the same positions."""
    inputs = three_axes(CASES[0].inputs([[29]], [9]))
    base = model.encode(**inputs)
    generator = torch.Generator().manual_seed(5)
    other = torch.randn(inputs["input_features"].shape, generator=generator)
    donor = model.encode(**{**inputs, "input_features": other})
    metric = LogitDiff(answer=5, other=11)
    for site, places in SWEPT:
        heads = None if site == "resid_pre" else "each"
        fast, plain = (
            patch(model, base, donor, metric, site=site, places=places, heads=heads, engine=e)
            for e in ("fast", "hooks")
        )
        assert abs(plain.values - plain.base).max() > 1e-3, site
        assert abs(fast.values - plain.values).max() < FAST_ENGINE[torch.float32], site
        np.testing.assert_allclose(fast.base, metric_of(model, base), atol=1e-5)
    fast, plain = (
        path_patch(
            model, base, donor, metric, "blocks.0.attn.hook_z[*]", "blocks.3.attn.hook_k_input[*]",
            engine=e,
        )
        for e in ("fast", "hooks")
    )  # fmt: skip
    assert abs(plain.values - plain.base).max() > 1e-4
    assert abs(fast.values - plain.values).max() < FAST_ENGINE[torch.float32]


def metric_of(model: HookedALM, x: ALMInput) -> np.ndarray:
    logits = model(x)[:, -1]
    return (logits[:, 5] - logits[:, 11]).numpy()


@torch.no_grad()
def test_generation_goes_on_from_the_farthest_axis(model: HookedALM) -> None:
    """With and without a cache; every new token is one further on all axes."""
    inputs = three_axes(CASES[0].inputs([[29], [11]], [9, 14]))
    x = model.encode(**inputs)
    first, second = (
        model.generate(
            x, 5, return_type="tokens", do_sample=False, eos_token_id=None, use_past_kv_cache=cache
        )
        for cache in (True, False)
    )
    assert torch.equal(first, second)
    after = inputs["position_ids"].amax((0, 2))[:, None] + torch.arange(1, 6)
    positions = torch.cat([inputs["position_ids"], after.expand(3, -1, -1)], dim=-1)
    ids = torch.cat([inputs["input_ids"], first], dim=-1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(first)], dim=-1)
    longer = {**inputs, "input_ids": ids, "attention_mask": mask, "position_ids": positions}
    n = inputs["input_ids"].shape[1]
    assert torch.equal(model(model.encode(**longer))[:, n - 1 : -1].argmax(-1), first)


# --------------------------------------------------------------------------- published configs


def published(**sizes: Any) -> dict[str, Any]:
    """``config.json`` in the form of the first release: sparse, and named after an older class."""
    text: dict[str, Any] = {
        "model_type": "qwen2_5_omni_text", "hidden_act": "silu", "init_std": 0.02,
        "max_position_embeddings": 32768, "max_window_layers": 28, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False, **sizes,
    }  # fmt: skip
    thinker = {
        "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder", "d_model": 1280, "encoder_layers": 32,
            "encoder_layerdrop": 0.0, "init_std": 0.02, "n_window": 100,
            "output_dim": text["hidden_size"],
        },
        "audio_start_token_id": 151647, "audio_end_token_id": 151648, "audio_token_index": 151646,
        "bos_token_id": 151644, "ignore_index": -100, "image_token_index": 151655,
        "init_std": 0.02, "model_type": "qwen2_5_omni_thinker", "position_id_per_seconds": 25,
        "seconds_per_chunk": 2, "text_config": text, "user_token_id": 872,
        "video_token_index": 151656, "vision_config": {"model_type": "qwen2_5_omni_vision_encoder"},
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    }  # fmt: skip
    return {
        "architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni",
        "enable_audio_output": True, "enable_talker": True, "thinker_config": thinker,
        "talker_config": {"model_type": "qwen2_5_omni_talker"}, "torch_dtype": "bfloat16",
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    }  # fmt: skip


def decoder(config: dict[str, Any]) -> Any:
    return FAMILY.decoder_config(
        FAMILY.config_class.from_dict(config), config,
        original_architecture="Qwen2_5OmniModel", model_name="published",
    )  # fmt: skip


SIZES = {
    "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, intermediate_size=18944, vocab_size=152064),
    "3B": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, intermediate_size=11008, vocab_size=151936),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_published_configs(name: str) -> None:
    sizes = SIZES[name]
    cfg = decoder(published(**sizes))
    assert (cfg.n_layers, cfg.d_model) == (sizes["num_hidden_layers"], sizes["hidden_size"])
    assert (cfg.n_heads, cfg.n_key_value_heads, cfg.d_head) == (
        sizes["num_attention_heads"], sizes["num_key_value_heads"], 128
    )  # fmt: skip
    assert (cfg.d_mlp, cfg.d_vocab) == (sizes["intermediate_size"], sizes["vocab_size"])
    assert cfg.rope_parameters["mrope_section"] == [16, 24, 24]
    assert (cfg.rope_parameters["rope_theta"], cfg.eps, cfg.attn_bias) == (1e6, 1e-6, "qkv")
    assert not cfg.tie_word_embeddings
    assert set(cfg.layer_types) == {"full_attention"}


def test_sections_that_no_config_names() -> None:
    """Hugging Face's own, which fit heads of 128 alone."""
    config = published(**SIZES["3B"])
    text = config["thinker_config"]["text_config"]
    text["rope_scaling"] = None
    assert decoder(config).rope_parameters["mrope_section"] == [16, 24, 24]
    text["num_attention_heads"] = 32
    with pytest.raises(ConversionError, match=r"expected three numbers that add up to the 64 / 2"):
        decoder(config)


@pytest.mark.parametrize(
    "part", [(), ("thinker_config",), ("thinker_config", "text_config"),
             ("thinker_config", "audio_config")]
)  # fmt: skip
def test_unknown_fields_are_refused(part: tuple[str, ...]) -> None:
    config = published(**SIZES["3B"])
    inner = config
    for name in part:
        inner = inner[name]
    inner["warp_factor"] = 9
    with pytest.raises(ConversionError, match="does not act on warp_factor = 9"):
        decoder(config)


@pytest.mark.parametrize(
    ("architecture", "name", "why"),
    [
        ("Qwen3OmniMoeForConditionalGeneration", "Qwen3-Omni", "mixtures of experts"),
        ("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3-Omni", "mixtures of experts"),
        ("Phi4MultimodalForCausalLM", "Phi-4-multimodal", "speech adapter"),
        ("Phi4MMForCausalLM", "Phi-4-multimodal", "speech adapter"),
    ],
)
def test_relatives_that_are_not_supported(
    tmp_path: Path, architecture: str, name: str, why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    with pytest.raises(ConversionError, match=f"{name} is not supported, because .*{why}"):
        load_model(tmp_path)


# ----------------------------------------------------------------------------- from the waveform


def wave(seconds: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    return (0.1 * generator.standard_normal(round(seconds * RATE))).astype(np.float32)


def processed(samples: np.ndarray) -> tuple[dict[str, Tensor], str]:
    """What Hugging Face's processor makes of a clip: features, and what stands for it.

    Its constructor wants processors of pictures and films, for which packages are missing here;
    what it does with a clip is its own.
    """
    processor = object.__new__(Qwen2_5OmniProcessor)
    processor.feature_extractor, processor.audio_token = extractor(), "<|AUDIO|>"
    options = {**Qwen2_5OmniProcessor.audio_kwargs, "return_tensors": "pt"}
    features, (placeholders,) = processor._process_audio([samples], **options)
    return features, placeholders


@pytest.mark.parametrize("seconds", [0.05, 0.315, 2.0, 2.005])
def test_prepare_is_the_processors(model: HookedALM, seconds: float) -> None:
    samples, tokenizer = wave(seconds), model.tokenizer
    features, placeholders = processed(samples)
    x = model.prepare(samples, "What emotion?")
    mask = features["feature_attention_mask"].bool()
    (clip,) = x.clips
    assert torch.equal(clip.features, features["input_features"][..., mask[0]])
    content = f"<|audio_bos|>{placeholders}<|audio_eos|>What emotion?"
    rendered = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert x.tokens.tolist() == [tokenizer(rendered)["input_ids"]]
    assert x.spans.positions("audio_struct", 0) == [
        i for i, t in enumerate(x.tokens[0].tolist()) if t in model.audio.tokens.markers
    ]
    with torch.no_grad():
        theirs = model.encode(
            input_ids=x.tokens,
            input_features=features["input_features"],
            feature_attention_mask=features["feature_attention_mask"],
        )
        assert torch.equal(model(x), model(theirs))


def test_clips_too_short_or_too_long(model: HookedALM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too short for one audio position"):
        model.prepare(wave(0.01), "What emotion?")
    with pytest.raises(InputError, match="300"):
        model.prepare(wave(300.5), "What emotion?")
    (clip,) = model.prepare(wave(300.5), "What emotion?", truncate=True).clips
    assert (clip.n_tokens, clip.seconds) == (7500, 300)
    assert any("300" in note for note in clip.notes)
    model.prompts.feature_extractor, kept = extractor(1), model.prompts.feature_extractor
    try:
        with pytest.raises(InputError, match=r"lasts 1.5 s, and .* keeps 1 s"):
            model.prepare(wave(1.5), "What emotion?")
    finally:
        model.prompts.feature_extractor = kept


def test_pictures_are_refused(model: HookedALM) -> None:
    inputs = CASES[0].inputs([[29]], [9])
    with pytest.raises(InputError, match="got image_grid_thw, pixel_values"):
        model.encode(
            **inputs, pixel_values=torch.zeros(4, 8), image_grid_thw=torch.ones(1, 3).long()
        )
    with pytest.raises(InputError, match="without the mask"):
        model.encode(**{**inputs, "feature_attention_mask": None})
