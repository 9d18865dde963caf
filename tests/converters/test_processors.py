"""Damaged text files of a checkpoint: one error that names the file, and no code is run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hooked_alm import HookedALM
from hooked_alm.converters.loading import lay_out
from hooked_alm.errors import ConversionError, HookedALMError, InputError
from tiny import VOCAB, TinyModels

SOUND = (np.sin(np.arange(8000) / 7).astype(np.float32) / 10, 16000)


@pytest.fixture
def folder(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    copy = tmp_path / "m"
    copy.mkdir()
    for file in tiny_models.folder().iterdir():
        os.link(file, copy / file.name)
    return copy


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).unlink(missing_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(data)


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    content = json.loads((folder / name).read_text("utf-8"))
    change(content)
    write(folder, name, content)


JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "generation_config.json",
)
RAW = {
    "empty": (b"", "no JSON object"),
    "cut": (b'{"version": "1.0", "mod', "no JSON object"),
    "no JSON": (b"<html>", "no JSON object"),
    "list": (b"[]", "no JSON object, but list"),
    "null": (b"null", "no JSON object, but NoneType"),
    "deep": (b'{"a":' * 10**5, "no JSON object"),
    "no UTF-8": (b'{"a": "\xff"}', "no UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("damage", RAW)
def test_a_damaged_file_is_named(folder: Path, name: str, damage: str) -> None:
    content, message = RAW[damage]
    write(folder, name, content)
    with pytest.raises(HookedALMError, match=rf"reading \S+{name}: it (is|begins).*{message}"):
        lay_out(folder)


def first(vocabulary: dict[str, int]) -> str:
    return next(iter(vocabulary))


TOKENIZERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no model": (lambda t: t.pop("model"), "Model missing"),
    "unknown model": (lambda t: t["model"].update(type="Foo"), "ModelUntagged"),
    "no added tokens": (lambda t: t.pop("added_tokens"), "KeyError: 'added_tokens'"),
    "vocabulary of strings": (lambda t: t["model"].update(vocab={"a": "b"}), "expected u32"),
    "merge of unknown tokens": (lambda t: t["model"]["merges"].append(["龘", "z"]), "vocabulary"),
    "no merges": (lambda t: t["model"].pop("merges"), "Missing vocab/merges"),
    "two tokens, one id": (
        lambda t: t["model"]["vocab"].update({first(t["model"]["vocab"]): 5}),
        "are both 5",
    ),
    "an added token takes an id": (
        lambda t: t["added_tokens"][1].update(id=5),
        r"'.' and '<\|im_start\|>' are both 5",
    ),
    "an added id with a gap": (
        lambda t: t["added_tokens"][-1].update(id=9999),
        r"'<\|audio_eos\|>' is 9999, and would become",
    ),
    "a version to come": (lambda t: t.update(version="9.0"), "Unknown tokenizer version"),
    "a pattern that is none": (
        lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}}),
        "cannot be used",
    ),
    "it panics when it runs": (
        lambda t: t.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "PanicException",
    ),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_damaged_tokenizers(folder: Path, damage: str) -> None:
    change, message = TOKENIZERS[damage]
    edit(folder, "tokenizer.json", change)
    with pytest.raises(HookedALMError, match=rf"loading the tokenizer of \S+: .*{message}"):
        lay_out(folder)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "an end token that is none": ({"eos_token": 3}, "eos_token has to be"),
    "a class that is none": ({"tokenizer_class": []}, "cannot be used"),
    "a side that is none": ({"padding_side": "up"}, "Padding side"),
    "added tokens in a list": ({"added_tokens_decoder": []}, "cannot be used"),
}


@pytest.mark.parametrize("damage", SETTINGS)
def test_damaged_settings_of_a_tokenizer(folder: Path, damage: str) -> None:
    change, message = SETTINGS[damage]
    edit(folder, "tokenizer_config.json", lambda settings: settings.update(change))
    with pytest.raises(HookedALMError, match=f"tokenizer.json, tokenizer_config.json.*{message}"):
        lay_out(folder)


def test_what_belongs_together(folder: Path) -> None:
    """transformers would guess the special tokens, or begin with an empty vocabulary."""
    settings = (folder / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(HookedALMError, match=r"no tokenizer_config.json.* would be guessed"):
        lay_out(folder)
    write(
        folder,
        "tokenizer_config.json",
        {**json.loads(settings), "tokenizer_class": "Qwen2Tokenizer"},
    )
    (folder / "tokenizer.json").unlink()
    with pytest.raises(HookedALMError, match="nor merges.txt, vocab.json, so that its vocab"):
        lay_out(folder)


SIZES: dict[str, tuple[str, Any]] = {
    **{f"{name} {value}": (name, value)
       for name in ("sampling_rate", "n_fft", "hop_length", "feature_size", "chunk_length")
       for value in (0, -1, "16000", None, float("nan"), 10**9)},
    "padding inf": ("padding_value", float("inf")),
    "dither": ("dither", 0.1),
}  # fmt: skip


@pytest.mark.parametrize("damage", SIZES)
def test_sizes_of_a_feature_extractor(folder: Path, damage: str) -> None:
    name, value = SIZES[damage]
    edit(folder, "processor_config.json", lambda p: p["feature_extractor"].update({name: value}))
    with pytest.raises(HookedALMError, match=rf"processor_config.json: got {name} = .*expected"):
        lay_out(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("feature_size", 9, r"windows \[9, 100\].* takes mel bins and frames \[8, 100\]"),
        ("chunk_length", 2, r"windows \[8, 200\]"),
        ("sampling_rate", 8000, r"windows \[8, 50\]"),
        ("n_fft", 3, r"windows \[8, 99\]"),
        ("feature_extractor_type", "ClapFeatureExtractor", "loading the feature extractor of"),
        ("feature_extractor_type", "Foo", "loading the feature extractor of"),
    ],
)
@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_features_that_the_encoder_does_not_take(
    folder: Path, name: str, value: Any, message: str
) -> None:
    edit(folder, "processor_config.json", lambda p: p["feature_extractor"].update({name: value}))
    with pytest.raises(HookedALMError, match=message):
        HookedALM.from_pretrained(folder)


@pytest.mark.parametrize(
    "damage",
    [{"top_k": "x"}, {"eos_token_id": "x"}, {"num_beams": 0}, {"repetition_penalty": -1}],
)
def test_damaged_generation_configs(folder: Path, damage: dict[str, Any]) -> None:
    edit(folder, "generation_config.json", lambda g: g.update(damage))
    model = HookedALM.from_pretrained(folder)
    with pytest.raises(InputError, match=r"generating: .* generation_config.json"):
        model.generate(model.prepare(SOUND, "Who?"), max_new_tokens=2)


@pytest.mark.parametrize(
    "damage",
    [
        {"forced_eos_token_id": True},
        {"forced_eos_token_id": 10**9},
        {"forced_bos_token_id": -1},
        {"forced_eos_token_id": [1, "x"]},
        {"no_repeat_ngram_size": True},
    ],
)
def test_what_would_fail_amid_a_generation(folder: Path, damage: dict[str, Any]) -> None:
    edit(folder, "generation_config.json", lambda g: g.update(damage))
    (name,) = damage
    with pytest.raises(ConversionError, match=rf"generation_config.json: got {name} = "):
        lay_out(folder)


@pytest.mark.parametrize("file", ["chat_template.json", "tokenizer_config.json"])
@pytest.mark.parametrize("template", [3, ["x"], {"default": 3}])
def test_templates_that_are_no_text(folder: Path, file: str, template: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    content = json.loads((folder / file).read_text("utf-8")) if (folder / file).exists() else {}
    write(folder, file, {**content, "chat_template": template})
    with pytest.raises(HookedALMError, match=f"({file}|tokenizer).*"):
        lay_out(folder)


AUTO_MAP = {
    "AutoConfig": "planted.Planted",
    "AutoTokenizer": ["planted.Planted", "planted.Planted"],
    "AutoFeatureExtractor": "planted.Planted",
    "AutoProcessor": "planted.Planted",
}


def test_code_of_a_folder_is_neither_run_nor_offered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "ran"
    code = f"open({str(planted)!r}, 'w').close()\nclass Planted: pass\n"
    (folder / "planted.py").write_text(code, "utf-8")
    for name in ("tokenizer_config.json", "processor_config.json", "generation_config.json"):
        edit(folder, name, lambda content: content.update(auto_map=AUTO_MAP))
    extractor = json.loads((folder / "processor_config.json").read_text("utf-8"))
    settings = {**extractor["feature_extractor"], "auto_map": AUTO_MAP}
    write(folder, "preprocessor_config.json", settings)
    edit(folder, "config.json", lambda content: content.update(auto_map=AUTO_MAP))
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks whether to run code"))
    model = HookedALM.from_pretrained(folder)
    assert model.prepare(SOUND, "Who?").tokens.shape[0] == 1
    (folder / "processor_config.json").unlink()
    del settings["feature_extractor_type"]  # then its code is the only way
    write(folder, "preprocessor_config.json", settings)
    with pytest.raises(HookedALMError, match="want code of their own, which is never run"):
        HookedALM.from_pretrained(folder)
    assert not planted.exists()


def test_the_tokens_around_a_clip_are_there(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda t: t["added_tokens"][-1].update(content="<|x|>"))
    edit(folder, "tokenizer_config.json", lambda t: t["extra_special_tokens"].pop())
    with pytest.raises(HookedALMError, match=r"tokens around a clip, .*'<\|audio_eos\|>' as None"):
        lay_out(folder)


def test_tokens_without_an_embedding_are_named(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{i}>" for i in range(VOCAB - len(tokenizer) + 1)])
    (folder / "tokenizer.json").unlink(), (folder / "tokenizer_config.json").unlink()
    tokenizer.save_pretrained(folder)
    model = HookedALM.from_pretrained(folder)
    assert torch.isfinite(model(model.prepare(SOUND, "Who? <new0>"))).all()
    last = f"<new{len(tokenizer) - 1 - tokenizer.get_vocab()['<new0>']}>"
    with pytest.raises(InputError, match=rf"no embedding for '{last}' \({VOCAB}\); it has {VOCAB}"):
        model.prepare(SOUND, f"Who? {last}")
    with pytest.raises(InputError, match=f"no embedding for '{last}'"):
        model.to_tokens(last)
