"""Rotary frequencies in a checkpoint are compared with the config's, and left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from all_cases import CASES
from hooked_alm import ConversionError, HookedALM
from hooked_alm.converters.registry import FAMILIES, load_family
from hooked_alm.converters.rules import Frequencies, rule_for, target_of
from tiny import edit_tensors
from tiny_text import LLAMA3_ROPE, N_LAYERS, TextModels, text_batch

NAMES = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(N_LAYERS)]
IDS = text_batch()["input_ids"]


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> TextModels:
    return TextModels(tmp_path_factory.mktemp("text"))


def put(folder: Path, out: Path, names: list[str], value: Tensor) -> Path:
    return edit_tensors(folder, out, lambda tensors: tensors | {n: value.clone() for n in names})


@pytest.mark.parametrize("module", sorted({*FAMILIES.values()} - {"whisper"}))  # not rotary
def test_every_decoder_has_the_rule(module: str) -> None:
    """Where a family keeps the decoder's q projections, older files keep frequencies."""
    rules = load_family(module).rules
    prefixes = ("", "model.", "language_model.model.", "model.language_model.", "thinker.model.",
                "text_model/model.", "llm.model.", "model.language_model.model.",
                "language_model.", "transformer.")  # fmt: skip
    homes = [
        f"{prefix}{home}"
        for prefix in prefixes
        for home in ("layers.1.self_attn.{}", "h.1.attn.{}")
        if target_of(rules, f"{prefix}{home}".format("q_proj.weight"))
        == "blocks.1.attn.q_proj.weight"
        or rule_for(rules, f"{prefix}{home}".format("c_attn.weight")) is not None
    ]
    assert homes
    for home in homes:
        assert isinstance(rule_for(rules, home.format("rotary_emb.inv_freq")), Frequencies), home


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_same_frequencies(
    text_models: TextModels, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Also rounded to what the model was kept in; the logits are those without them."""
    model = text_models.hooked(family)
    folder = put(text_models.folder(family), tmp_path / "m", NAMES, model.rotary.inv_freq.to(dtype))
    assert torch.equal(HookedALM.from_pretrained(folder)(IDS), model(IDS))


@torch.no_grad()
def test_frequencies_before_scaling(text_models: TextModels, tmp_path: Path) -> None:
    """LLaMA-2-era code scaled the positions instead."""
    plain = 1 / LLAMA3_ROPE["rope_theta"] ** (torch.arange(0, 10, 2) / 10)
    folder = put(text_models.folder("llama"), tmp_path / "m", NAMES, plain)
    assert torch.equal(HookedALM.from_pretrained(folder)(IDS), text_models.hooked("llama")(IDS))


@pytest.mark.parametrize(
    "change",
    [lambda f: f * 1.02, lambda f: f[:-1], lambda f: f * 0, lambda f: f.flip(0), lambda f: f[:0],
     lambda f: f.sqrt(), lambda f: f[None]],
)  # fmt: skip
@pytest.mark.parametrize("name", ["model.layers.2.self_attn.rotary_emb.inv_freq",
                                  "model.rotary_emb.inv_freq"])  # fmt: skip
def test_other_frequencies(text_models: TextModels, tmp_path: Path, change: Any, name: str) -> None:
    ours = text_models.hooked("qwen3").rotary.inv_freq
    folder = put(text_models.folder("qwen3"), tmp_path / "m", [name], change(ours).contiguous())
    with pytest.raises(ConversionError, match=f"{name} holds the rotary frequencies .*rope_theta"):
        HookedALM.from_pretrained(folder)


def test_frequencies_that_are_none(text_models: TextModels, tmp_path: Path) -> None:
    for n, (value, message) in enumerate(
        (
            (torch.full((5,), float("nan")), "holds NaN or infinity"),
            (torch.ones(5, dtype=torch.int8), "is stored as int8, expected"),
        )
    ):
        folder = put(text_models.folder("qwen3"), tmp_path / f"{n}", NAMES[:1], value)
        with pytest.raises(ConversionError, match=message):
            HookedALM.from_pretrained(folder)


def test_frequencies_of_a_patch_encoder(tmp_path: Path) -> None:
    """MiMo-Audio has rotary positions inside its groups, too."""
    case = CASES["MiMo-Audio"]
    (tmp_path / "model").mkdir()
    case.save(tmp_path / "model", torch.float32)
    ours: Any = HookedALM.from_pretrained(tmp_path / "model").audio
    frequencies = ours.patch_encoder.rotary_emb.inv_freq
    name = "input_local_transformer.layers.0.self_attn.rotary_emb.inv_freq"
    HookedALM.from_pretrained(put(tmp_path / "model", tmp_path / "same", [name], frequencies))
    other = put(tmp_path / "model", tmp_path / "other", [name], frequencies * 2)
    with pytest.raises(ConversionError, match=f"{name} holds the rotary frequencies"):
        HookedALM.from_pretrained(other)
