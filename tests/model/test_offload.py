"""A model in pieces, on the disk or over devices, answers every tool as the whole one does.

Equal bit by bit: what is moved is not rounded. The accelerators are pretended (``pretended``), to
rounding, with two real ones where there are any.
"""

import copy
import gc
import pickle
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from all_cases import CASES
from hooked_alm import HookedALM, InputError
from placed_tools import ALONG, EARS, ENDS, HEARING, TEXT, WHISPER, Prompts, Tool, same
from pretended import bare, pretended
from tiny import TinyModels, hf_inputs
from tiny_text import TextModels, text_batch
from tolerances import PRETENDED
from whisper_toy import Whispers
from whisper_toy import prompts as whisper_prompts

FIRST, SECOND = "privateuseone:0", "privateuseone:1"
DISK: dict[str, Any] = {"": "cpu", "blocks.1": "disk", "blocks.3": "disk"}
MAPS: Mapping[str, Mapping[str, Any]] = {
    "half on the disk": {"": "cpu", "blocks.1": "disk"},
    "ends on the disk": dict.fromkeys(("embed", "unembed", "ln_final", "audio"), "disk"),
    "two": {"": FIRST, "blocks.1": SECOND},
    "mixed": {"": FIRST, "blocks.0": "cpu", "blocks.1": SECOND, "unembed": SECOND},
    "ears apart": {"": FIRST, "audio": SECOND, "audio.encoder.blocks.1": FIRST},
}
REAL = [torch.device("cuda", i) for i in range(2)]


class Whole(NamedTuple):
    """A model in one piece, where it came from, and what it is asked."""

    model: HookedALM
    folder: Path
    tools: Mapping[str, Tool]
    inputs: tuple[dict[str, Any], dict[str, Any]]

    def prompts(self, model: HookedALM) -> Prompts:
        base, donor = (model.encode(**some) for some in self.inputs)
        return base, donor


@pytest.fixture(scope="module")
def wholes(
    tiny_models: TinyModels, whispers: Whispers, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Whole]:
    text = TextModels(tmp_path_factory.mktemp("text"))
    ours, theirs = (hf_inputs([[23]], [6], seed=seed) for seed in (1, 2))
    words = text_batch()
    other = {**words, "input_ids": words["input_ids"].flip(0)}
    heard, also = whisper_prompts(), whisper_prompts(seed=5)
    also["input_features"] = also["input_features"].flip(0)
    return {
        "audio": Whole(tiny_models.hooked(), tiny_models.folder(), HEARING, (ours, theirs)),
        "tied": Whole(text.hooked("llama"), text.folder("llama"), TEXT, (words, other)),
        "whisper": Whole(whispers.hooked(), whispers.folder(), WHISPER, (heard, also)),
    }


@pytest.mark.filterwarnings("ignore:patching resid")
@pytest.mark.parametrize(
    ("name", "where", "tools"),
    [("audio", "half on the disk", ()), ("audio", "two", ALONG),
     ("tied", "ends on the disk", ENDS), ("tied", "mixed", ENDS),
     ("whisper", "half on the disk", ("run", "generated", "memory_swept", "encoder_read")),
     ("whisper", "ears apart", EARS)],
)  # fmt: skip
def test_every_tool(wholes: dict[str, Whole], name: str, where: str, tools: Sequence[str]) -> None:
    one = wholes[name]
    parts = [part for part in MAPS[where] if part != "audio" or name != "tied"]
    devices = {"": "cpu", **{part: MAPS[where][part] for part in parts}}
    chosen = {tool: one.tools[tool] for tool in tools or one.tools}
    expected = {tool: ask(one.model, one.prompts(one.model)) for tool, ask in chosen.items()}
    is_real = "disk" in devices.values()
    rounding = 0.0 if is_real else PRETENDED
    with nullcontext() if is_real else pretended():
        model = HookedALM.from_pretrained(one.folder, device_map=devices)
        for tool, ask in chosen.items():
            assert same(ask(model, one.prompts(model)), expected[tool], rounding) == [], tool


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.filterwarnings("ignore:patching resid")
def test_two_accelerators(wholes: dict[str, Whole]) -> None:
    """Against one of them, whose kernels are the same."""
    for one in wholes.values():
        plain = HookedALM.from_pretrained(one.folder, device=REAL[0])
        devices = {"": REAL[0], "blocks.1": REAL[1], "blocks.0": "cpu"}
        spread = HookedALM.from_pretrained(one.folder, device_map=devices)
        for tool, ask in one.tools.items():
            found, expected = (ask(model, one.prompts(model)) for model in (spread, plain))
            assert same(found, expected) == [], tool


@pytest.mark.parametrize("name", ["Qwen-Audio", "SALMONN", "Kimi-Audio"])
@torch.no_grad()
def test_families_on_the_disk(tmp_path: Path, name: str) -> None:
    """With fused weights, updates added on loading, pickled parts, a Q-Former and a branch.

    Read by a copy, whose files are those of a model that is gone.
    """
    case, folder = CASES[name], tmp_path / "model"
    folder.mkdir()
    case.save(folder, torch.float32)
    parts = case.components(folder)
    inputs = case.inputs([[case.clips[0]], [case.clips[1]]], [5, 4])
    plain = HookedALM.from_pretrained(folder, components=parts)
    placed = copy.deepcopy(HookedALM.from_pretrained(folder, components=parts, device_map="disk"))
    gc.collect()
    assert all(one.is_meta for one in placed.parameters())
    logits = [model(model.encode(**inputs)) for model in (plain, placed)]
    assert torch.equal(*logits)
    heads = [plain.towards(head) for head in plain.stacks]
    others = [placed.towards(head) for head in placed.stacks]
    for ours, theirs in zip(others, heads, strict=True):
        assert torch.equal(ours(ours.encode(**inputs)), theirs(theirs.encode(**inputs)))


def test_half_precision_in_float32(tiny_models: TinyModels) -> None:
    """Weights that are cast for the time of a run are read so, and as they are behind it."""
    from hooked_alm.precision import in_float32

    plain = tiny_models.hooked(dtype=torch.bfloat16)
    placed = HookedALM.from_pretrained(tiny_models.folder(), dtype="bfloat16", device_map=DISK)
    x = plain.encode(**hf_inputs([[63]], [9]))
    for _ in range(2):
        assert torch.equal(placed(x), plain(x))
        with in_float32(plain):
            expected = plain(x)
        with in_float32(placed):
            assert torch.equal(placed(x), expected)
    assert placed.blocks[1].mlp.down_proj.weight.dtype == torch.bfloat16


def test_gradients_reach_the_input(tiny_models: TinyModels) -> None:
    found: list[torch.Tensor] = []

    def keep(grad: torch.Tensor, hook: Any) -> None:
        found.append(grad.clone())

    for device_map in (None, DISK):
        model = HookedALM.from_pretrained(tiny_models.folder(), device_map=device_map)
        x = model.encode(**hf_inputs([[63]], [9]))
        with model.hooks(bwd_hooks=[("hook_embed", keep)]):
            model(x, "loss").backward()
    assert torch.equal(*found)


def test_what_would_be_lost_is_refused(tiny_models: TinyModels) -> None:
    model = HookedALM.from_pretrained(tiny_models.folder(), device_map=DISK)
    for change in (model.fold_layer_norm, model.center_unembed, model.fold_value_biases):
        with pytest.raises(InputError, match="processing the weights: got weights that"):
            change()
    for move in (model.cpu, model.bfloat16, lambda: model.to("cpu")):
        with pytest.raises(InputError, match="moving or casting a model whose device_map"):
            move()
    assert torch.equal(bare(model.W_U), tiny_models.hooked().W_U)


@pytest.mark.parametrize("device_map", [DISK, {"": FIRST, "blocks.1": SECOND}])
def test_it_is_not_pickled(tiny_models: TinyModels, device_map: dict[str, Any]) -> None:
    with pretended():
        model = HookedALM.from_pretrained(tiny_models.folder(), device_map=device_map)
        for one in (model, model.towards(model.head)):
            with pytest.raises(InputError, match=r"pickling a model: .* Send the name of its"):
                pickle.dumps(one)
