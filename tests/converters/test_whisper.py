"""Whisper against Hugging Face: both stacks, steps, prompts, and everything that it refuses."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from encoder_reference import CLOSE, encoder_recorded, layers_that_run
from hooked_alm import ConversionError, HookedALM, HookNameError, InputError
from hooked_alm.converters.parity import Verification, compare_with_hf, verify
from hooked_alm.inputs import ALMInput
from tolerances import OTHER_KERNEL
from whisper_toy import IDS, LANGUAGES, NO_TIMESTAMPS, POSITIONS, TARGETS, Whispers, mel, noise
from whisper_toy import prompts as prompts_of
from whisper_toy import save as save_toy

DTYPES, KERNELS = [torch.float32, torch.bfloat16], ["sdpa", "eager"]
COMBINED = [(dtype, attention) for dtype in DTYPES for attention in KERNELS]


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize(("dtype", "attention"), COMBINED)
@torch.no_grad()
def test_it_is_hugging_faces(whispers: Whispers, dtype: torch.dtype, attention: str) -> None:
    """Logits, every point of the decoder that a module shows, padded; and all points observed."""
    model, hf = whispers.hooked(dtype, attention), whispers.hf(dtype, attention)
    for n_text in ((9, 6), (7,)):
        inputs = cast(prompts_of(n_text), dtype)
        x = model.encode(**inputs)
        found = compare_with_hf(model, hf, x)
        assert found.is_equal, found.first
        names = [row.where for row in found.rows]
        assert len(names) == 1 + 2 * 17
        assert "blocks.1.cross_attn.hook_k" in names
        every = [name for name in model.hook_dict if model.unfireable(name) is None]
        observed, cache = model.run_with_cache(x, names_filter=every)
        assert torch.equal(observed, model(x))
        assert {*cache.keys()} == {*every}


@pytest.mark.parametrize(("dtype", "attention"), COMBINED)
@torch.no_grad()
def test_every_point_of_the_encoder(whispers: Whispers, dtype: torch.dtype, attention: str) -> None:
    model, hf = whispers.hooked(dtype, attention), whispers.hf(dtype, attention)
    inputs = cast(prompts_of(), dtype)
    with encoder_recorded(layers_that_run(partial(hf, **inputs))) as expected:
        memory = hf(**inputs).encoder_last_hidden_state
    names = [n for n in model.hook_dict if n.startswith("audio.encoder.blocks.")]
    x = model.encode(**inputs)
    _, cache = model.run_with_cache(x, names_filter=[*names, "hook_audio_embed"])
    assert torch.equal(cache["hook_audio_embed"], memory)
    for point, theirs in expected.items():
        if point in names and not point.endswith(CLOSE):
            assert torch.equal(cache[point], theirs), point
        elif point in names:
            close = OTHER_KERNEL[dtype]
            torch.testing.assert_close(cache[point], theirs, atol=close, rtol=close)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_patterns_are_the_eager_ones(whispers: Whispers, dtype: torch.dtype) -> None:
    model, hf = whispers.hooked(dtype, "eager"), whispers.hf(dtype, "eager")
    inputs = cast(prompts_of((7,)), dtype)
    theirs = hf(**inputs, output_attentions=True)
    names = [f"blocks.{i}.{part}.hook_pattern" for i in (0, 1) for part in ("attn", "cross_attn")]
    _, cache = model.run_with_cache(model.encode(**inputs), names_filter=names)
    for layer in (0, 1):
        of_self, of_memory = (cache[name] for name in names[2 * layer : 2 * layer + 2])
        assert torch.equal(of_self, theirs.decoder_attentions[layer])
        assert torch.equal(of_memory, theirs.cross_attentions[layer])


@pytest.mark.parametrize(("dtype", "attention"), COMBINED)
@torch.no_grad()
def test_steps_with_a_cache(whispers: Whispers, dtype: torch.dtype, attention: str) -> None:
    """The same steps give the same bits, and the encoder runs once."""
    model, hf = whispers.hooked(dtype, attention), whispers.hf(dtype, attention)
    inputs = cast(prompts_of((8,)), dtype)
    ids, features = inputs["decoder_input_ids"], inputs["input_features"]
    ours, theirs = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2))
    heard: list[int] = []
    for stop in (5, 6, 8):
        n_past = theirs.get_seq_length()
        expected = hf(
            input_features=features, decoder_input_ids=ids[:, n_past:stop], past_key_values=theirs
        ).logits
        x = model.encode(input_features=features, decoder_input_ids=ids[:, :stop])
        hook = ("audio.hook_encoder_out", lambda value, hook: heard.append(1))
        found = model.run_with_hooks(x, past_key_values=ours, fwd_hooks=[hook])
        assert torch.equal(found, expected)
    assert len(heard) == 1


@torch.no_grad()
def test_a_memory_is_taken_in_the_place_of_audio(whispers: Whispers) -> None:
    model, hf = whispers.hooked(), whispers.hf()
    inputs = prompts_of()
    x = model.encode(**inputs)
    draw = torch.Generator().manual_seed(4)
    memory = torch.randn(2, 31, model.cfg.d_model, generator=draw)  # as long as it likes
    text = {k: v for k, v in inputs.items() if k != "input_features"}
    expected = hf(**text, encoder_outputs=(memory,)).logits
    for found in (
        model(x, memory=memory),
        model(model.encode(**text), memory=memory),
        model(model.encode(**text, encoder_outputs=(memory,))),
        model.run_with_hooks(x, fwd_hooks=[]) * 0 + model(model.encode(**text), memory=memory),
    ):
        assert torch.equal(found, expected)
    given = model.encode(**text, encoder_outputs=memory)
    assert torch.equal(model.hf_arguments(given)["encoder_outputs"][0], memory)
    assert torch.equal(model(given[1]), hf(**{k: v[[1]] for k, v in text.items()},
                                           encoder_outputs=(memory[[1]],)).logits)  # fmt: skip
    # A hook that writes in place has a copy.
    kept = memory.clone()
    muted = model.run_with_hooks(
        x, memory=memory, fwd_hooks=[("hook_audio_embed", lambda value, hook: value.zero_())]
    )
    assert torch.equal(memory, kept)
    assert not torch.equal(muted, expected)
    # The encoder's own states, normed, are what is read.
    _, cache = model.run_with_cache(x, names_filter="audio.encoder.blocks.2.hook_resid_post")
    normed = model.audio.encoder.ln_final(cache["audio.encoder.blocks.2.hook_resid_post"])
    assert torch.equal(model(x, memory=normed), model(x))


@torch.no_grad()
def test_blocks_that_run_alone_read_the_memory(whispers: Whispers) -> None:
    model = whispers.hooked()
    x = model.encode(**prompts_of())
    resid = model(x, stop_at_layer=1)
    assert torch.equal(model(resid, start_at_layer=1, inputs=x), model(x))
    fired: list[str] = []
    model.run_with_hooks(
        resid, start_at_layer=1, inputs=x,
        fwd_hooks=[("hook_audio_embed", lambda value, hook: fired.append(hook.name))],
    )  # fmt: skip
    assert fired == ["hook_audio_embed"]
    for name in ("hook_pos_embed", "hook_embed"):
        with pytest.raises(HookNameError, match="does not reach it"):
            model.run_with_hooks(
                resid, start_at_layer=1, inputs=x, fwd_hooks=[(name, lambda value, hook: None)]
            )


@torch.no_grad()
def test_embeddings_add_up(whispers: Whispers) -> None:
    model = whispers.hooked()
    names = ["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre"]
    x = model.encode(**prompts_of())
    _, cache = model.run_with_cache(x, names_filter=names)
    assert torch.equal(cache[names[0]] + cache[names[1]], cache[names[2]])
    assert torch.equal(cache["hook_pos_embed"], model.pos_embed.W_pos[x.position_ids])


def test_verify_and_other_layouts(whispers: Whispers, tmp_path: Path) -> None:
    """Names without ``model.``, another number of layers and heads, weights that are not tied."""
    folders = {"plain": whispers.folder()}
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in whispers.folder().iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bare / "model.safetensors")
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    expected = whispers.hooked()(whispers.hooked().encode(**prompts_of()))
    model = HookedALM.from_pretrained(bare)
    assert torch.equal(model(model.encode(**prompts_of())), expected)
    folders["turbo"] = save_toy(tmp_path / "turbo", encoder_layers=4, decoder_layers=1)
    folders["distil"] = save_toy(tmp_path / "distil", decoder_attention_heads=8)
    folders["bf16"] = whispers.folder(torch.bfloat16)
    folders["untied"] = save_toy(tmp_path / "untied", tie_word_embeddings=False)
    for name, folder in folders.items():
        found = verify(str(folder))
        assert isinstance(found, Verification)
        assert found.is_equal, name
        assert {row.prompt for row in found.rows} == {"one clip", "padded"}
    bf16 = HookedALM.from_pretrained(whispers.folder())
    bf16(bf16.encode(**prompts_of()))
    found_bf16 = bf16.to(torch.bfloat16)(bf16.encode(**prompts_of()))
    ours = whispers.hooked(torch.bfloat16)
    assert torch.equal(found_bf16, ours(ours.encode(**prompts_of())))


@torch.no_grad()
def test_the_comparison_notices_faults(whispers: Whispers) -> None:
    inputs = prompts_of()
    expected = whispers.hf()(**inputs).logits

    def swapped(model: HookedALM) -> None:
        block = model.blocks[1]
        block.ln2, block.ln3 = block.ln3, block.ln2

    def own_keys(model: HookedALM) -> None:
        attn = model.blocks[0].cross_attn
        attn.k_proj, attn.v_proj = attn.v_proj, attn.k_proj

    def shifted(model: HookedALM) -> None:
        model.pos_embed.weight.data = model.pos_embed.weight.data.roll(1, 0)

    def unbiased(model: HookedALM) -> None:
        model.blocks[1].cross_attn.o_proj.bias.data.zero_()

    def unnormed(model: HookedALM) -> None:
        model.audio.encoder.ln_final.bias.data.zero_()

    def rescaled(model: HookedALM) -> None:
        attn = model.blocks[0].cross_attn
        attn.scaling, attn.query_scale = attn.query_scale, attn.scaling

    for fault in (swapped, own_keys, shifted, unbiased, unnormed, rescaled):
        model = HookedALM.from_pretrained(whispers.folder())
        assert torch.equal(model(model.encode(**inputs)), expected)
        fault(model)
        assert not torch.equal(model(model.encode(**inputs)), expected), fault.__name__


def broken(folder: Path, out: Path, change: Any, config: Any = None) -> Path:
    """A copy of a checkpoint with other tensors, or another config."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        written = json.loads((out / "config.json").read_text()) | config
        (out / "config.json").write_text(json.dumps(written))
    return out


def test_checkpoints_that_do_not_fit_are_refused(whispers: Whispers, tmp_path: Path) -> None:
    folder, names = whispers.folder(), "model.decoder.layers.0.encoder_attn"

    def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {f"{names}.k_proj.bias": torch.ones(48)}

    def less(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in tensors.items() if k != name}

    faults: dict[str, tuple[Any, Any]] = {
        "a bias of keys": (more, None),
        "no bias": (partial(less, f"{names}.q_proj.bias"), None),
        "no positions": (partial(less, "model.decoder.embed_positions.weight"), None),
        "no head": (lambda tensors: tensors, {"tie_word_embeddings": False}),
        "the encoder's layers": (lambda tensors: tensors, {"decoder_layers": 3}),
    }
    for name, (change, config) in faults.items():
        with pytest.raises(ConversionError, match="tensors do not fit the model"):
            HookedALM.from_pretrained(broken(folder, tmp_path / name, change, config))
    with pytest.raises(ConversionError, match="does not act on num_experts"):
        HookedALM.from_pretrained(
            broken(folder, tmp_path / "field", lambda tensors: tensors, {"num_experts": 4})
        )


def test_prompts_are_the_processors(whispers: Whispers) -> None:
    """Control tokens, what was said before, and the transcript so far."""
    model = whispers.hooked()
    clip = noise(0.4)
    x = model.prepare(clip, language="chinese", task="translate")
    start = [IDS[f"<|{name}|>"] for name in ("startoftranscript", "zh", "translate")]
    assert x.tokens.tolist() == [[*start, NO_TIMESTAMPS]]
    assert (
        model.prepare(clip, language="<|zh|>", task="translate", timestamps=True).tokens[0].tolist()
        == start
    )
    said = "What emotion"
    x = model.prepare(clip, said, language="ZH", task="translate", answer_prefix=" happy sad")
    prompt_ids = WhisperTokenizer.get_prompt_ids(model.tokenizer, said).tolist()
    words = model.tokenizer(" happy sad", add_special_tokens=False)["input_ids"]
    assert x.tokens.tolist() == [[*prompt_ids, *start, NO_TIMESTAMPS, *words]]
    n, m = len(prompt_ids), len(words)
    assert x.spans["previous"] == [[(1, n)]]
    assert x.spans["transcript"] == [[(n + 4, n + 3 + m)]]  # the last is the readout
    assert x.spans["readout"] == [[(n + 3 + m, n + 4 + m)]]
    assert x.spans["audio"] == [[]]
    # Rows of different length, and a language each.
    pair = model.prepare([clip, noise(0.7)], ["What", said], language=["en", "zh"])
    assert pair.attention_mask.sum(-1).tolist()[0] < pair.shape[1]
    assert pair.clip_rows == (0, 1)
    same = model.prepare([clip, noise(0.7)], ("What", said), language=("en", "zh"))
    assert torch.equal(same.tokens, pair.tokens)
    assert {*pair.tokens[0].tolist()} & {*LANGUAGES.values()} == {LANGUAGES["<|en|>"]}
    rows = model.encoder_rows(pair).prompts
    assert rows.spans["audio"] == [[(0, 20)], [(0, 35)]]
    assert rows.spans["padding"] == [[(20, POSITIONS)], [(35, POSITIONS)]]
    english = whispers.hooked(is_multilingual=False)
    assert english.prepare(clip).tokens.tolist() == [[start[0], NO_TIMESTAMPS]]


@torch.no_grad()
def test_the_language_is_heard(whispers: Whispers) -> None:
    """Where none is given: what Hugging Face detects, in a batch as it has it."""
    model = HookedALM.from_pretrained(whispers.folder())
    hf = WhisperForConditionalGeneration.from_pretrained(whispers.folder()).eval()
    clips = [noise(0.3 + 0.1 * i, seed=i) for i in range(6)]
    features = torch.cat([clip.features for clip in model.prepare(clips, language="en").clips])
    heard = model.encode(
        input_features=features, decoder_input_ids=torch.full((6, 1), IDS["<|startoftranscript|>"])
    )
    # So that half of them are of another language: told apart by what differs between them.
    _, cache = model.run_with_cache(heard, names_filter="unembed.hook_in")
    states = cache["unembed.hook_in"][:, 0]
    mean = states.mean(0)
    apart = states[0] - mean * (states[0] @ mean) / (mean @ mean)
    for weight in (model.embed.weight, hf.proj_out.weight):
        weight[LANGUAGES["<|zh|>"]] = weight[LANGUAGES["<|en|>"]] + apart
    x = model.prepare(clips)
    expected = hf.detect_language(features)
    assert torch.equal(x.tokens[:, 1], expected)
    assert len({*expected.tolist()}) == 2
    assert [*map(int, model.prepare(clips, language="en").tokens[:, 1])] == [
        LANGUAGES["<|en|>"]
    ] * 6


def test_defaults_of_the_generation_config(whispers: Whispers, tmp_path: Path) -> None:
    folder = broken(whispers.folder(), tmp_path / "tuned", lambda tensors: tensors)
    file = folder / "generation_config.json"
    written = json.loads(file.read_text()) | {"language": "zh", "task": "translate"}
    file.write_text(json.dumps(written))
    model = HookedALM.from_pretrained(folder)
    expected = [IDS[f"<|{n}|>"] for n in ("startoftranscript", "zh", "translate", "notimestamps")]
    assert model.prepare(noise(0.4)).tokens[0].tolist() == expected


def test_long_recordings(whispers: Whispers) -> None:
    model = whispers.hooked()
    with pytest.raises(InputError, match="1 s"):
        model.prepare(noise(2.5), language="en")
    cut = model.prepare(noise(2.5), language="en", truncate=True)
    assert cut.clips[0].features.shape[-1] == 2 * POSITIONS
    x = model.prepare(noise(2.5), language="en", long_form=True)
    assert x.clips[0].features.shape[-1] == 250
    assert NO_TIMESTAMPS not in x.tokens
    with pytest.raises(InputError, match="long_form=True are for `generate`"):
        model(x)
    short = model.prepare(noise(0.5), language="en", long_form=True)
    assert torch.equal(model(short), model(model.prepare(noise(0.5), language="en",
                                                         timestamps=True)))  # fmt: skip
    assert model.prepare(noise(2.5), long_form=True).shape == (1, 3)  # heard in its first second


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown language": ({"language": "klingon"}, "expected one of the 2 that the checkpoint"),
    "a language it lacks": ({"language": "de"}, "expected one of the 2"),
    "unknown task": ({"language": "en", "task": "summarise"}, "expected one of transcribe"),
    "languages of other rows": ({"language": ["en", "zh"]}, "got 2 languages"),
    "unknown option": ({"langauge": "en"}, "nearest: language"),
    "segments": ({"segments": [("a", "b")]}, "takes no instruction"),
    "a language that is none": ({"language": 3}, "expected a code, an English name, or a list"),
    "a list of timestamps": ({"timestamps": [True]}, "expected True or False for all"),
    "long form of a list": ({"long_form": [False]}, "expected True or False for all"),
    "control tokens": ({"text": "<|startoftranscript|> hi", "language": "en"}, "Give words"),
    "an end": ({"answer_prefix": "<|endoftext|>", "language": "en"}, "Give words"),
    "no words": ({"text": 5, "language": "en"}, "got text that is no text"),
    "no prefix": ({"answer_prefix": ["a"], "language": "en"}, "got answer_prefix that is no text"),
    "both": ({"long_form": True, "truncate": True}, "not both"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_prompts_that_are_refused(whispers: Whispers, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        whispers.hooked().prepare(noise(0.3), **options)


def test_more_that_is_refused(whispers: Whispers, tmp_path: Path) -> None:
    model, english = whispers.hooked(), whispers.hooked(is_multilingual=False)
    for options in ({"language": "en"}, {"task": "transcribe"}):
        with pytest.raises(InputError, match="knows English alone"):
            english.prepare(noise(0.3), **options)
    with pytest.raises(InputError, match="row 0 has 2 clips, expected one"):
        model.prepare([[noise(0.3), noise(0.4)]], language="en")
    with pytest.raises(InputError, match="row 0 has 0 clips"):
        model.prepare(text="hello", language="en")
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InputError, match="has 0 clips"):
        model.prepare(conversation=chat, language="en")
    with pytest.raises(InputError, match=r"expected \[batch, mel 10, frame 100\]"):
        model.encode(input_features=torch.randn(1, 8, 100), decoder_input_ids=[[1, 2]])
    with pytest.raises(InputError, match=r"expected \[batch, mel 10, frame 100\]"):
        model.encode(input_features=torch.randn(1, 10, 90), decoder_input_ids=[[1, 2]])
    with pytest.raises(InputError, match="2 spectrograms for 1 prompts"):
        model.encode(input_features=mel(2), decoder_input_ids=[[1, 2]])
    with pytest.raises(InputError, match="decoder_input_ids are missing"):
        model.encode(input_features=mel(2))
    with pytest.raises(InputError, match="got labels"):
        model.encode(input_features=mel(1), decoder_input_ids=[[1]], labels=torch.ones(1, 1))
    too_long = torch.ones(1, TARGETS + 1, dtype=torch.long)
    with pytest.raises(InputError, match=f"the model has {TARGETS} of them"):
        model.encode(input_features=mel(1), decoder_input_ids=too_long)
    with pytest.raises(InputError, match=f"the model has {TARGETS} of them"):
        model.prepare(noise(0.3), "a" * 200, language="en")
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(InputError, match=r"they have \[0\] clips, expected one each"):
        model(ids)
    x = model.encode(**prompts_of())
    with pytest.raises(InputError, match=r"reading a memory \[1, 50, 48\]: expected \[2, "):
        model(x, memory=torch.zeros(1, 50, 48))
    with pytest.raises(InputError, match="EncoderDecoderCache"):
        model(x, past_key_values=DynamicCache())
    with pytest.raises(InputError, match=r"reading a memory \[1, 50, 48\]"):
        ALMInput(**{**vars(x), "memory": torch.zeros(1, 50, 48)})
    for memory, told in (
        (np.zeros((2, 50, 48)), "of ndarray"), (torch.zeros(2, 0, 48), "[2, 0, 48]"),
        (torch.ones(2, 50, 48).long(), "of torch.int64"), (torch.zeros(48), "[48]"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=re.escape(f"reading a memory {told}")):
            model.encode(decoder_input_ids=ids.repeat(2, 1), encoder_outputs=(memory,))
    for outputs in ((), "states", [[1.0]]):
        with pytest.raises(InputError, match="reading a memory of"):
            model.encode(decoder_input_ids=ids, encoder_outputs=outputs)
    with pytest.raises(InputError, match="Ask the processor"):
        model.encode(input_features=mel(1).numpy(), decoder_input_ids=ids)
    with pytest.raises(InputError, match=r"expected \[batch, frame\], \[1, 100\]"):
        model.encode(
            input_features=mel(1), decoder_input_ids=ids, attention_mask=torch.ones(1, 3).long()
        )
    with pytest.raises(HookNameError, match="read as they are"):
        model.run_with_cache(x, names_filter="audio.hook_projector_in")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((whispers.folder() / name).read_bytes())
    with pytest.raises(InputError, match="has no processor files"):
        HookedALM.from_pretrained(bare).prepare(noise(0.3))


def test_a_waveform_has_a_gradient(whispers: Whispers) -> None:
    """From the logits to the samples, through spectrogram, encoder and cross-attention."""
    model = whispers.hooked()
    samples = torch.from_numpy(noise(0.4)).requires_grad_()
    x = model.prepare(samples, language="en")
    model(x)[0, -1].logsumexp(-1).backward()
    assert samples.grad is not None
    assert torch.isfinite(samples.grad).all()
    assert float(samples.grad.abs().sum()) > 0


def test_other_models_take_no_memory(gqa: HookedALM) -> None:
    with pytest.raises(InputError, match="has no cross-attention"):
        gqa(torch.tensor([[3, 4]]), memory=torch.zeros(1, 5, gqa.cfg.d_model))
    with pytest.raises(InputError, match="got language"):
        gqa.prepare(np.zeros(8000, np.float32) + 0.1, "What?", language="en")


def test_hugging_face_reads_our_arguments(whispers: Whispers) -> None:
    model, hf = whispers.hooked(), whispers.hf()
    x = model.prepare([noise(0.3), noise(0.6)], ["", "What emotion"], language="en")
    arguments = model.hf_arguments(x)
    with torch.no_grad():
        assert isinstance(hf, WhisperForConditionalGeneration)
        theirs, ours = hf(**arguments).logits, model(x)
    real = x.attention_mask.bool()
    assert torch.equal(ours[real], theirs[real])
    again = model.encode(**arguments)
    assert torch.equal(model(again), ours)
