"""Localised twins: a base and a delta are one checkpoint, as if it had been written in full."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration

from hooked_alm import ConversionError, HookedALM, InputError, bundled, compare_with_hf
from hooked_alm.converters import model_table, parity
from hooked_alm.converters.deltas import write_checkpoint, write_delta
from hooked_alm.converters.loading import lay_out, load_weights, own_checkpoint
from hooked_alm.experiments.materials.subject import described
from hooked_alm.experiments.workbench.settings import ExperimentConfig
from hooked_alm.methods.patching.metrics import OnLogits
from hooked_alm.methods.patching.patch import patch
from tiny import TinyModels, hf_inputs

BLOCK, HEAD, D_HEAD = 2, 4, 10
UNITS = slice(HEAD * D_HEAD, (HEAD + 1) * D_HEAD)
NAMES = {
    f"language_model.model.layers.{BLOCK}.self_attn.{name}": at
    for name, at in {
        "q_proj.weight": (UNITS, slice(0, 54)),
        "q_proj.bias": (UNITS,),
        "o_proj.weight": (slice(0, 54), UNITS),
    }.items()
}
Q_BIAS = f"language_model.model.layers.{BLOCK}.self_attn.q_proj.bias"
INPUTS = hf_inputs([[63], [23]], [9, 14])
OTHERS = hf_inputs([[63], [23]], [9, 14], seed=2)


def new_values(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base's tensors with others in the place of one head."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for name, at in NAMES.items():
        tensors[name] = tensors[name].clone()
        tensors[name][at] = torch.randn(tensors[name][at].shape, generator=generator).to(dtype)
    return tensors


@pytest.fixture
def delta(tiny_models: TinyModels, tmp_path: Path) -> Path:
    base = tiny_models.folder()
    tensors = new_values(base, torch.float32)
    write_delta(tmp_path / "delta", base, tensors, NAMES, {"component": f"head:{BLOCK}.{HEAD}"})
    return tmp_path / "delta"


@pytest.fixture
def twin(tiny_models: TinyModels, delta: Path) -> str:
    return f"{tiny_models.folder()}+{delta}"


def whole_checkpoint(name: str, folder: Path) -> Path:
    folder.mkdir()
    write_checkpoint(own_checkpoint(lay_out(name)), folder)
    return folder


@torch.no_grad()
def logits(model: HookedALM, inputs: dict[str, Tensor] = INPUTS) -> Tensor:
    return model(model.encode(**inputs))


# --- What a twin is


def test_a_twin_is_its_base_but_for_the_slices(tiny_models: TinyModels, twin: str) -> None:
    base = tiny_models.folder()
    before, after = load_file(base / "model.safetensors"), own_checkpoint(lay_out(twin))
    wanted = new_values(base, torch.float32)
    assert before.keys() == after.keys()
    for name, value in before.items():
        found = after.read(name, torch.float32)
        assert torch.equal(found, wanted[name])
        assert torch.equal(found, value) == (name not in NAMES)
    model = HookedALM.from_pretrained(twin)
    assert model.cfg.model_name == twin
    assert torch.equal(model.blocks[BLOCK].attn.q_proj.bias, wanted[Q_BIAS])
    assert not torch.equal(logits(model), logits(tiny_models.hooked()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_twin_is_what_hugging_face_reads_in_one_file(
    tiny_models: TinyModels, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_models.folder("mha, sliding", dtype)
    write_delta(tmp_path / "delta", base, new_values(base, dtype), NAMES, {})
    name = f"{base}+{tmp_path / 'delta'}"
    folder = whole_checkpoint(name, tmp_path / "whole")
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    assert hf.dtype == dtype
    model = HookedALM.from_pretrained(name)
    assert compare_with_hf(model, hf, model.encode(**INPUTS)).is_equal


def test_shards_and_files_beside_them(tiny_models: TinyModels, twin: str, tmp_path: Path) -> None:
    """A base in several files; what is written is one, with the processor's beside it."""
    base, delta = map(Path, twin.split("+"))
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(base)
    shutil.copytree(base, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    hf.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    write_delta(tmp_path / "again", tmp_path / "shards", new_values(base, torch.float32), NAMES, {})
    folder = whole_checkpoint(f"{tmp_path / 'shards'}+{tmp_path / 'again'}", tmp_path / "whole")
    assert {path.name for path in folder.iterdir()} == {path.name for path in base.iterdir()}
    assert torch.equal(
        logits(HookedALM.from_pretrained(folder)), logits(HookedALM.from_pretrained(twin))
    )
    assert (delta / "delta.safetensors").read_bytes() == (
        tmp_path / "again" / "delta.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "device_map", ["disk", {"": "cpu", f"blocks.{BLOCK}": "disk"}, {"": "disk", "blocks": "cpu"}]
)
def test_a_twin_on_the_disk(twin: str, tmp_path: Path, device_map: Any) -> None:
    """Changed tensors are in no file as they are: they get copies, the others do not."""
    layout = lay_out(twin)
    model = load_weights(layout, device_map=device_map, offload_folder=tmp_path)
    copies = {path.stem for path in tmp_path.glob("hooked-alm-*/*.dat")}
    is_away = device_map == "disk" or device_map[""] == "cpu"
    attn = f"blocks.{BLOCK}.attn"
    expected = {f"{attn}.{leaf}" for leaf in ("q_proj.weight", "q_proj.bias", "o_proj.weight")}
    assert copies == (expected if is_away else set())
    assert torch.equal(logits(model), logits(HookedALM.from_pretrained(twin)))


def test_an_adapter_goes_on_top(tiny_models: TinyModels, twin: str, tmp_path: Path) -> None:
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(tiny_models.folder())
    config = peft.LoraConfig(r=2, target_modules=r".*language_model\..*\.(q|o)_proj")
    with warnings.catch_warnings():  # it asks transformers for a property under its old name
        warnings.simplefilter("ignore", FutureWarning)
        peft.get_peft_model(hf, config).save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    shapes = {name: value.shape for name, value in load_file(file).items()}
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, file)
    folder = whole_checkpoint(twin, tmp_path / "whole")
    expected, found = (
        HookedALM.from_pretrained(name, lora=tmp_path / "lora") for name in (folder, twin)
    )
    assert torch.equal(logits(found), logits(expected))
    assert not torch.equal(logits(found), logits(HookedALM.from_pretrained(twin)))


def test_the_component_carries_all_that_changed(tiny_models: TinyModels, twin: str) -> None:
    """The base's output of its block gives back the base; of a block below, nothing."""
    base, model = tiny_models.hooked(), HookedALM.from_pretrained(twin)
    x = model.encode(**INPUTS)
    found = patch(
        model, x, x, OnLogits(lambda found: found.flatten(1)), site="attn_out",
        places=["all"], layers=[BLOCK - 1, BLOCK], donor_model=base, engine="hooks",
    ).values  # fmt: skip
    real = x.attention_mask.bool()
    below, at = torch.from_numpy(found).float().reshape(2, *real.shape, -1)[:, real]
    assert torch.equal(at, logits(base)[real])
    assert torch.equal(below, logits(model)[real])
    assert not torch.equal(at, below)


@pytest.mark.parametrize(
    ("base_dtype", "dtype"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.float32),
     (torch.bfloat16, torch.float16)],
)  # fmt: skip
def test_a_delta_of_another_dtype_is_exact(
    tiny_models: TinyModels, tmp_path: Path, base_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """And so are the numbers beside it, in one file as well."""
    base = tiny_models.folder("mha, sliding", base_dtype)
    values = {name: one.to(dtype) for name, one in new_values(base, torch.float32).items()}
    write_delta(tmp_path / "delta", base, values, NAMES, {})
    written = load_file(tmp_path / "delta" / "delta.safetensors")
    assert {one.dtype for one in written.values()} == {dtype}
    own = load_file(base / "model.safetensors")
    found = own_checkpoint(lay_out(f"{base}+{tmp_path / 'delta'}"))
    (whole := tmp_path / "whole").mkdir()
    write_checkpoint(found, whole)
    together = load_file(whole / "model.safetensors")
    for name, at in NAMES.items():
        expected = own[name].float()
        expected[at] = values[name][at].float()
        assert torch.equal(found.read(name, torch.float32), expected)
        assert torch.equal(together[name].float(), expected)


# --- Everywhere that a model is named


def test_verify_compares_the_twin(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = parity._load_hugging_face
    base = Path(twin.split("+")[0])
    seen: list[bool] = []

    def load(folder: Path, *rest: Any) -> Any:
        hf = read(folder, *rest)
        own = hf.model.language_model.layers[BLOCK].self_attn.q_proj.bias
        seen.append(torch.equal(own, new_values(base, torch.float32)[Q_BIAS]))
        return hf

    monkeypatch.setattr(parity, "_load_hugging_face", load)
    found = parity.verify(twin)
    assert found.passed
    assert found.model == twin
    assert seen == [True]


def test_a_run_is_known_by_its_delta(twin: str) -> None:
    delta = Path(twin.split("+")[1])
    config = ExperimentConfig(model=twin)

    def record() -> dict[str, Any]:
        return described(lay_out(twin).model, config)

    before = record()
    assert before["name"] == twin
    plain = described(lay_out(twin.split("+")[0]).model, config)
    assert before["weights_sha256"] == plain["weights_sha256"]
    assert before["parts"].keys() == {"delta"}
    values = load_file(delta / "delta.safetensors")
    values[Q_BIAS] += 1
    save_file(values, delta / "delta.safetensors")
    after = record()
    assert after["parts"] != before["parts"]
    assert after["files"] == before["files"]
    written = json.loads((delta / "delta.json").read_text())
    (delta / "delta.json").write_text(json.dumps(written | {"rule": "another"}))
    assert {name for name, one in record()["files"].items() if one != after["files"][name]} == {
        "delta/delta.json"
    }


def test_a_layout_needs_no_weights(twin: str) -> None:
    layout = lay_out(twin)
    assert layout.model.embed.weight.is_meta
    assert layout.model.sources["delta"] == Path(twin.split("+")[1])
    assert torch.equal(logits(load_weights(layout)), logits(HookedALM.from_pretrained(twin)))


@pytest.fixture
def truth(delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A delta of a bundled model that the package carries."""
    monkeypatch.setattr(bundled, "TRUTHS", tmp_path / "truths")
    base = bundled.model_folder("bundled:follows_voice")
    tensors = load_file(base / "model.safetensors")
    name = "language_model.model.layers.3.self_attn.q_proj.bias"
    tensors[name][:16] += 1
    at = {name: (slice(0, 16),)}
    about = {"base": "follows_voice"}
    write_delta(tmp_path / "truths" / "louder", base, tensors, at, about)
    return tmp_path / "truths" / "louder"


def test_truths_by_name(truth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the same name does not take the place of what the package carries."""
    name = "bundled:follows_voice+louder"
    assert name in bundled.bundled_models()
    assert f"\n  {name}" in model_table.as_text()
    (tmp_path / "elsewhere" / "louder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lay_out(name).model.sources["delta"] == truth
    with pytest.raises(InputError, match=r"got 'loudr' .*\(nearest: louder\) .* carries louder"):
        lay_out("bundled:follows_voice+loudr")
    with pytest.raises(ConversionError, match="follows_text: got weights with the SHA-256"):
        lay_out("bundled:follows_text+louder")


class KnownConfig(ExperimentConfig):
    KNOWN_WITH = ("seed",)


def test_what_is_known_beforehand(truth: Path) -> None:
    """The package's twins, and no delta of one's own."""
    assert KnownConfig(model="bundled:follows_voice+louder").is_calibration
    assert KnownConfig(model="bundled:follows_voice").is_calibration
    assert not KnownConfig(model=f"bundled:follows_voice+{truth}").is_calibration
    assert not KnownConfig(model=str(truth)).is_calibration


def test_a_folder_may_have_a_plus_in_its_name(twin: str, tmp_path: Path) -> None:
    base = shutil.copytree(twin.split("+")[0], tmp_path / "c++")
    assert bundled.parts_of_twin(str(base)) == (str(base), None)
    assert bundled.parts_of_twin(base) == (base, None)
    assert "delta" not in lay_out(str(base)).model.sources


# --- What is refused


@pytest.mark.parametrize("behind", ["", "nothing", "./nothing", "a+b"])
def test_deltas_that_are_not_there(tiny_models: TinyModels, behind: str) -> None:
    with pytest.raises(InputError, match=r"behind the plus, expected a truth .* or a folder with"):
        HookedALM.from_pretrained(f"{tiny_models.folder()}+{behind}")


def damaged(delta: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    values = load_file(delta / "delta.safetensors")
    written = json.loads((delta / "delta.json").read_text())
    change(written, values)
    save_file(values, delta / "delta.safetensors")
    (delta / "delta.json").write_text(json.dumps(written))


def moved(written: dict[str, Any], start: Any, stop: Any) -> None:
    written["slices"][Q_BIAS] = [[start, stop]]


def renamed(written: dict[str, Any], values: dict[str, Tensor]) -> None:
    written["slices"]["nobody"] = written["slices"].pop(Q_BIAS)
    values["nobody"] = values.pop(Q_BIAS)


FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = {
    "another base": (lambda w, v: w.update(base_sha256="0" * 64), "SHA-256 .*, expected 000000"),
    "no base": (lambda w, v: w.pop("base_sha256"), "SHA-256 .*, expected None"),
    "no such tensor": (renamed, r"1 slices do not fit:\n  nobody .* where there is none"),
    "outside of it": (
        lambda w, v: moved(w, 55, 65), r"\[10\] in float32 at \[\[55, 65\]\], where .* \[60\]"
    ),
    "before it": (lambda w, v: moved(w, -10, 0), r"at \[\[-10, 0\]\], where"),
    "of another size": (lambda w, v: moved(w, 40, 51), r"\[10\] .* at \[\[40, 51\]\]"),
    "too few axes": (
        lambda w, v: w["slices"].update({Q_BIAS.replace("bias", "weight"): [[40, 50]]}),
        r"q_proj.weight \[10, 54\] in float32 at \[\[40, 50\]\], where .* \[60, 54\]",
    ),
    "another dtype": (
        lambda w, v: v.update({Q_BIAS: v[Q_BIAS].int()}), "in int32 at .* in float32"
    ),
    "no slices": (lambda w, v: w.pop("slices"), "its slices are not those of the tensors"),
    "one without values": (lambda w, v: v.pop(Q_BIAS), "its slices are not those of the tensors"),
    "one without a place": (lambda w, v: w["slices"].pop(Q_BIAS), "slices are not those"),
    "no range": (lambda w, v: moved(w, "4", 50), r"got \[\['4', 50\]\] as the slice of .*bias"),
    "no number": (lambda w, v: moved(w, True, 11), "as the slice of"),
    "no list": (lambda w, v: w["slices"].update({Q_BIAS: 3}), "got 3 as the slice of"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_deltas_that_do_not_fit(twin: str, name: str) -> None:
    """Before any weights are read."""
    change, message = FAULTS[name]
    damaged(Path(twin.split("+")[1]), change)
    with pytest.raises(ConversionError, match=message):
        lay_out(twin)


def test_damaged_files(twin: str) -> None:
    delta = Path(twin.split("+")[1])
    damaged(delta, lambda w, v: v[Q_BIAS].fill_(torch.nan))
    with pytest.raises(ConversionError, match=r"from .*delta.safetensors: it holds NaN"):
        HookedALM.from_pretrained(twin)
    file = delta / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ConversionError, match=r"delta.safetensors .* truncated or damaged"):
        lay_out(twin)
    file.unlink()
    with pytest.raises(ConversionError, match=r"found neither delta.safetensors"):
        lay_out(twin)
    (delta / "delta.json").write_text("[")
    with pytest.raises(ConversionError, match=r"delta.json: it is no JSON object"):
        lay_out(twin)
