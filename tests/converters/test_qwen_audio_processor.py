"""Qwen-Audio from recordings on: tags with embeddings, the length limit, remote tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cases.qwen_audio import CASE, LONGEST, N_CTX, after_convolutions
from composed_lm import log_mel, noise, tokenizer_with
from hooked_alm import ConversionError, HookedALM, InputError
from tiny import MELS, edit_config, edit_tensors

WORDS = ("[[[AUDIO:modality]]]", "<audio>", "</audio>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the family's case, with a tokenizer whose ids its config names."""
    root = tmp_path_factory.mktemp("qwen_audio") / "made"
    root.mkdir()
    CASE.save(root, torch.float32)
    tokenizer = tokenizer_with(*WORDS)
    pad, start, end = tokenizer.convert_tokens_to_ids(list(WORDS))
    assert end == start + 1

    def renumber(config: dict[str, Any]) -> None:
        config["audio_pad_id"], config["audio"]["audio_start_id"] = pad, start
        config["seq_length"] = 160

    out = edit_config(root, root.parent / "model", renumber)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder)


@pytest.fixture(scope="module")
def bare(folder: Path) -> HookedALM:
    """The checkpoint as the case wrote it, without a tokenizer."""
    return HookedALM.from_pretrained(folder.parent / "made")


def published(model: HookedALM, recordings: list[Any], text: str) -> dict[str, Any]:
    """What the published tokenizer makes of recordings and a question."""
    halves = [after_convolutions(len(one) // 160) for one in recordings]
    heard = "".join(
        f"Audio {i}:<audio>{WORDS[0] * (n // 2)}</audio>\n" for i, n in enumerate(halves, start=1)
    )
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{heard}{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    mels = [
        log_mel(F.pad(torch.as_tensor(one), (0, 320 * N_CTX - len(one))), MELS)
        for one in recordings
    ]
    info = {
        "input_audios": torch.stack(mels),
        "input_audio_lengths": torch.tensor([[n, n // 2] for n in halves]),
        "audio_span_tokens": [n // 2 + 2 for n in halves],
    }
    return {
        "input_ids": torch.tensor([model.tokenizer(prompt)["input_ids"]]),
        "audio_info": info if len(recordings) == 1 else [info],
    }


@torch.no_grad()
@pytest.mark.parametrize("seconds", [[0.5], [0.637], [0.645], [1.0], [0.3, 0.81]])
def test_a_recording_becomes_what_the_published_code_makes_of_it(
    model: HookedALM, seconds: list[float]
) -> None:
    recordings = [noise(one, seed) for seed, one in enumerate(seconds)]
    x = model.prepare([recordings], "What emotion?")
    expected = published(model, recordings, "What emotion?")
    assert torch.equal(x.tokens, expected["input_ids"])
    found, info = model.hf_arguments(x), expected["audio_info"]
    info = info[0] if isinstance(info, list) else info
    assert found["audio_info"]["audio_span_tokens"] == info["audio_span_tokens"]
    lengths = found["audio_info"]["input_audio_lengths"]
    assert torch.equal(lengths, info["input_audio_lengths"])
    mels = found["audio_info"]["input_audios"]
    assert torch.equal(mels, info["input_audios"])
    assert torch.equal(model(model.encode(**found)), model(x))
    (start, _), *_ = x.spans.clips[0][0]
    assert x.spans.seconds(0, 0.04, 0.12) == [(start + 1, start + 3)]
    y = model.encode(**expected)
    assert y.spans.clips == x.spans.clips


def test_over_long_recordings_are_refused_or_cut(model: HookedALM) -> None:
    """The tiny encoder hears one second."""
    with pytest.raises(InputError, match="lasts 1.010 s, expected at most 1 s"):
        model.prepare(noise(1.01), "What?")
    assert model.prepare(noise(1.01), "What?", truncate=True).clips[0].n_tokens == 25


@torch.no_grad()
def test_tags_are_embedded_by_the_encoder_around_clips_alone(model: HookedALM) -> None:
    """A tag that the model writes is a token like any other."""
    x = model.prepare(noise(0.4), "What?")
    start, end = model.audio.start, model.audio.end
    longer = x.extend(torch.tensor([[start, end]]))
    _, cache = model.run_with_cache(longer, names_filter=["hook_text_embed", "hook_embed"])
    opening, closing = x.spans.positions("audio_struct", 0)
    embed = cache["hook_embed"][0]
    assert torch.equal(embed[opening], model.audio.tags.weight[0])
    assert torch.equal(embed[closing], model.audio.tags.weight[1])
    assert torch.equal(cache["hook_text_embed"][0, opening], model.audio.tags.weight[0])
    assert torch.equal(embed[-2:], model.embed.weight[[start, end]])
    assert x.spans.clips[0] == [[(opening + 1, closing)]]


@torch.no_grad()
def test_prompts_beyond_the_trained_length_are_refused(bare: HookedALM) -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (1, LONGEST + 1), generator=draw)
    assert bare(ids[:, :LONGEST]).isfinite().all()
    with pytest.raises(InputError, match=f"on {LONGEST + 1} positions: beyond {LONGEST} its"):
        bare(ids)
    with pytest.raises(InputError, match="generate less"):
        bare.generate(ids[:, : LONGEST - 2], 5, return_type="tokens", eos_token_id=None)
    assert bare.cfg.n_ctx == LONGEST


def test_wrong_inputs_are_refused(bare: HookedALM) -> None:
    inputs = CASE.inputs([[57]], [9])
    ids = inputs["input_ids"]
    with pytest.raises(InputError, match=r"have \[16\] positions, the clips \[\] with"):
        bare.encode(input_ids=ids)
    with pytest.raises(InputError, match=r"have \[\] positions, the clips \[16\]"):
        bare.encode(**{**inputs, "input_ids": ids.clamp(max=300)})
    with pytest.raises(InputError, match="got inputs_embeds, expected only"):
        bare.encode(**inputs, inputs_embeds=torch.zeros(1))


@torch.no_grad()
def test_a_tokenizer_that_is_code_is_left_out(folder: Path, tmp_path: Path) -> None:
    """As in the published folder, which has no ``tokenizer.json``: nothing of it is run."""
    remote = edit_config(folder.parent / "made", tmp_path / "model", lambda config: None)
    settings = {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["t.Q", None]}}
    (remote / "tokenizer_config.json").write_text(json.dumps(settings))
    model = HookedALM.from_pretrained(remote)
    assert model.tokenizer is None
    with pytest.raises(InputError, match="no processor"):
        model.prepare(noise(0.4), "What?")
    assert model(model.encode(**CASE.inputs([[57]], [9]))).isfinite().all()


def test_constants_of_older_files_are_left_out(folder: Path, tmp_path: Path) -> None:
    frequencies = HookedALM.from_pretrained(folder.parent / "made").rotary.inv_freq
    name = "transformer.h.1.attn.rotary_emb.inv_freq"
    more = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4), name: frequencies}
    made = edit_tensors(folder.parent / "made", tmp_path / "model", lambda tensors: tensors | more)
    assert HookedALM.from_pretrained(made).cfg.n_layers == 3
    more[name] = torch.ones(5)
    made = edit_tensors(folder.parent / "made", tmp_path / "other", lambda tensors: tensors | more)
    with pytest.raises(ConversionError, match=f"{name} holds the rotary frequencies"):
        HookedALM.from_pretrained(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": None}, "audio.audio_start_id is missing.*Qwen-Audio and Qwen-Audio-Chat are"),
        ({"no_bias": False}, "does not act on no_bias = False"),
        ({"rotary_pct": 0.5}, "does not act on rotary_pct = 0.5"),
        ({"kv_channels": 12}, r"kv_channels \* num_attention_heads = 12 \* 6, expected"),
        ({"visual": {}}, "does not act on visual"),
    ],
)
def test_configs_that_ask_for_more_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    broken = edit_config(folder, tmp_path / "model", lambda config: config | change)
    with pytest.raises(ConversionError, match=message):
        HookedALM.from_pretrained(broken)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("avg_pool", False, "audio.avg_pool = False, expected True"),
        ("output_dim", 64, "audio.output_dim = 64, expected 60"),
        ("n_text_layer", 2, "audio.n_text_layer is unknown"),
    ],
)
def test_encoders_that_ask_for_more_are_refused(
    folder: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["audio"][field] = value

    with pytest.raises(ConversionError, match=message):
        HookedALM.from_pretrained(edit_config(folder, tmp_path / "model", change))


def test_a_fused_tensor_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = edit_config(folder, tmp_path / "model", lambda config: None)
    tensors = load_file(broken / "model.safetensors")
    name = "transformer.h.1.attn.c_attn.weight"
    tensors[name] = tensors[name][:-6].clone()
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ConversionError, match="c_attn.weight has shape"):
        HookedALM.from_pretrained(broken)
