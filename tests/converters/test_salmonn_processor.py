"""SALMONN from features on: its prompt, models without BEATs, LoRA that does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cases import salmonn
from cases.salmonn import CASE, D_BEATS, N_CTX, N_TOKENS, SPEECH
from composed_lm import log_mel, noise, tokenizer_with
from hooked_alm import ConversionError, HookedALM, InputError
from tiny import MELS
from whisper_llama_parts import D_AUDIO, FRAMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the family's case, Vicuna's folder with a tokenizer."""
    root = tmp_path_factory.mktemp("salmonn") / "model"
    root.mkdir()
    CASE.save(root, torch.float32)
    tokenizer_with().save_pretrained(root / "text_model")
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> HookedALM:
    return HookedALM.from_pretrained(folder, components=CASE.components(folder))


def changed(folder: Path, out: Path, config: dict[str, Any], tensors: Any = None) -> Path:
    """A copy of the folder's own files."""
    out.mkdir()
    published = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(published | config))
    stored = torch.load(folder / "salmonn_v1.pth", weights_only=True)["model"]
    torch.save({"model": tensors(stored) if tensors else stored}, out / "salmonn_v1.pth")
    return out


def features(n_beats: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    spectrogram = torch.randn(MELS, FRAMES, generator=draw)
    return spectrogram, torch.randn(n_beats, D_BEATS, generator=draw)


@torch.no_grad()
def test_a_clip_of_features_goes_through_the_prompt(model: HookedALM) -> None:
    """Its two pieces are tokenised apart, as in the published code."""
    mel, beats = features()
    x = model.prepare(model.audio.clip_of(mel, beats), "What emotion?")
    before, after = (
        model.tokenizer(text, add_special_tokens=special)["input_ids"]
        for text, special in (
            ("USER: <Speech>", True),
            ("</Speech> What emotion?\nASSISTANT:", False),
        )
    )
    expected = model.encode(
        input_ids=torch.tensor([[*before, SPEECH, *after]]),
        spectrogram=mel[None],
        audio_embeds=beats[None],
    )
    assert torch.equal(x.tokens, expected.tokens)
    assert torch.equal(model(x), model(expected))
    ((start, stop),) = x.spans.clips[0][0]
    assert (start, stop - start) == (len(before), N_TOKENS)
    assert x.spans.seconds(0, 0.1, 0.2) == [(start + 1, start + 2)]  # a window begins every 0.1 s
    inside = model.tokenizer.decode(x.tokens[0, x.spans.positions("text", 0)])
    assert "What emotion?" in inside


@torch.no_grad()
def test_encode_and_its_inverse(model: HookedALM) -> None:
    inputs = CASE.inputs([[13], [31]], [9, 14])
    x = model.encode(**inputs)
    found = model.hf_arguments(x)
    for name in ("spectrogram", "audio_lens"):
        assert torch.equal(found[name], inputs[name])
    for clip, n in enumerate([13, 31]):
        embeds = (found["audio_embeds"][clip, :n], inputs["audio_embeds"][clip, :n])
        assert torch.equal(*embeds)
    assert torch.equal(model(model.encode(**found)), model(x))
    assert model(model.encode(**CASE.inputs([[], []], [5, 8]))).isfinite().all()


@torch.no_grad()
def test_without_beats_a_recording_is_enough(folder: Path, tmp_path: Path) -> None:
    """Its features are Whisper's; parts are where the file says."""

    def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        cross = ("crossattention.self.key.weight", "crossattention.self.value.weight")
        return {
            name: value[:, :D_AUDIO].clone() if name.endswith(cross) else value
            for name, value in tensors.items()
            if not name.startswith("ln_audio")
        }

    paths = {
        f"{a}_path": str(folder / b)
        for a, b in (("llama", "text_model"), ("whisper", "audio_model"))
    }
    plain = changed(folder, tmp_path / "model", {"beats_path": "", **paths}, narrow)
    model = HookedALM.from_pretrained(plain)
    recording = noise(0.7)
    x = model.prepare(recording, "What?")
    expected = log_mel(F.pad(torch.as_tensor(recording), (0, 160 * FRAMES - len(recording))), MELS)
    found = model.hf_arguments(x)
    assert torch.equal(found["spectrogram"][0], expected)
    assert torch.equal(model(model.encode(**found)), model(x))
    with pytest.raises(InputError, match="lasts 1.100 s, expected at most 1 s"):
        model.prepare(noise(1.1), "What?")
    assert model.prepare(noise(1.1), "What?", truncate=True).clips[0].n_tokens == N_TOKENS


def test_published_numbers() -> None:
    """What no tiny checkpoint shows: windows of a third of a second, side by side."""
    front_end = salmonn.published()
    assert (front_end.kernel, front_end.stride, front_end.d_beats) == (17, 17, 768)
    assert front_end.qformer.config.layer_norm_eps == 1e-12
    assert front_end.qformer.config.num_hidden_layers == 2
    assert front_end.tokens.seconds_per_token == pytest.approx(0.34)


def test_wrong_inputs_are_refused(folder: Path, model: HookedALM) -> None:
    mel, beats = features()
    with pytest.raises(InputError, match="this SALMONN also reads BEATs features"):
        model.prepare(noise(0.5), "What?")
    with pytest.raises(InputError, match="BEATs features none, expected"):
        model.audio.clip_of(mel)
    with pytest.raises(InputError, match=rf"BEATs features \[{N_CTX + 1}, {D_BEATS}\]"):
        model.audio.clip_of(mel, features(N_CTX + 1)[1])
    with pytest.raises(InputError, match=r"got a spectrogram \[8, 99\]"):
        model.audio.clip_of(mel[:, 1:], beats)
    ids = torch.tensor([[5, SPEECH, 7]])
    with pytest.raises(InputError, match="got 1 ids -200, 0 spectrograms"):
        model.encode(input_ids=ids)
    with pytest.raises(InputError, match="got 1 ids -200, 1 spectrograms and 2 BEATs"):
        model.encode(input_ids=ids, spectrogram=mel[None], audio_embeds=beats[None].repeat(2, 1, 1))
    with pytest.raises(InputError, match="holds no text_model and names none. Pass components"):
        HookedALM.from_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(Exception, match="SALMONN takes one turn of the user"):
        model.prepare(conversation=turns)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": 28}, "lora_alpha / lora_rank = 28 / 2, expected 4"),
        ({"lora": False}, "does not act on lora = False"),
        ({"window_level_Qformer": False}, "does not act on window_level_Qformer = False"),
        ({"soft_prompts": True}, "does not act on soft_prompts = True"),
        ({"speaker_path": "x"}, "does not act on speaker_path = 'x'"),
    ],
)
def test_configs_that_ask_for_more_are_refused(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    broken = changed(folder, tmp_path / "model", config)
    with pytest.raises(ConversionError, match=message):
        HookedALM.from_pretrained(broken, components=CASE.components(folder))


def test_lora_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = changed(folder, tmp_path / "a rank", {"lora_rank": 3, "lora_alpha": 12})
    with pytest.raises(ConversionError, match=r"has rank \[2\], its config says 3"):
        HookedALM.from_pretrained(broken, components=CASE.components(folder))

    def of_layer(layer: int) -> Any:
        stem = f"llama_model.base_model.model.model.layers.{layer}."
        return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(stem)}

    broken = changed(folder, tmp_path / "a layer", {}, of_layer(1))
    with pytest.raises(ConversionError, match="8 LoRA tensors, expected 12"):
        HookedALM.from_pretrained(broken, components=CASE.components(folder))

    def without_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v for k, v in tensors.items() if ".1.self_attn.q_proj.lora_B" not in k}

    broken = changed(folder, tmp_path / "a factor", {}, without_b)
    with pytest.raises(ConversionError, match="has no factor B"):
        HookedALM.from_pretrained(broken, components=CASE.components(folder))
