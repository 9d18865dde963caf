"""Every cell of the sweeps against plain Hugging Face with PyTorch hooks, for three families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from cases import kimi_audio, ultravox
from family_case import HuggingFace
from hooked_alm import HookedALM
from hooked_alm.experiments.materials.exchange import PLACES, PairExchange
from hooked_alm.experiments.minimal_pairs.measure import PairSweep, places_of
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.metrics import LogitDiff
from tiny import TinyModels, hf_inputs
from tolerances import FAST_ENGINE

CLOSE = FAST_ENGINE[torch.float32]
ANSWERS = (7, 30)
FEATURES = ("input_features", "audio_values", "whisper_input_feature")
FAMILIES = ("Qwen2-Audio", "Ultravox", "Kimi-Audio")


class Both(NamedTuple):
    """Ours and the reference, and the arguments of both prompts of a pair."""

    model: HookedALM
    reference: Any
    stack: Any
    """The reference's blocks and final norm."""
    sides: tuple[dict[str, Any], dict[str, Any]]


def turned(inputs: dict[str, Any]) -> dict[str, Any]:
    """Another clip: the same frames backwards, of the other sign."""

    def other(value: Any) -> Any:
        return [-one for one in value] if isinstance(value, list) else -value

    return {name: other(v) if name in FEATURES else v for name, v in inputs.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def both(
    request: pytest.FixtureRequest,
    tiny_models: TinyModels,
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    if request.param == "Qwen2-Audio":
        hf, inputs = tiny_models.hf("gqa"), hf_inputs([[40]], [9])
        reference = HuggingFace(hf, hf.model.language_model)
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        given = {name: v for name, v in inputs.items() if name != "position_ids"}
        model = tiny_models.hooked("gqa")
        assert model.encode(**given).shape == inputs["input_ids"].shape
        return Both(model, reference, hf.model.language_model, (inputs, turned(inputs)))
    module: Any = {"Ultravox": ultravox, "Kimi-Audio": kimi_audio}[request.param]
    case = module.CASES[0]
    folder: Path = tmp_path_factory.mktemp(case.name.split()[0]) / "model"
    folder.mkdir()
    case.save(folder, torch.float32)
    parts = case.components(folder)
    model = HookedALM.from_pretrained(folder, dtype=torch.float32, components=parts)
    reference = case.reference(folder, torch.float32, "sdpa")
    inputs = case.inputs([[case.clips[1]]], [9])
    stack = reference.trunk if request.param == "Kimi-Audio" else reference.lm.model
    return Both(model, reference, stack, (inputs, turned(inputs)))


Write = Callable[[Tensor], Tensor]


def answer(both: Both, side: int, writes: dict[nn.Module, Write]) -> float:
    """The metric of a prompt whose modules read something else than was given to them."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (writes[module](args[0].clone()), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": writes[module](kwargs["hidden_states"].clone())}

    handles = [one.register_forward_pre_hook(hook, with_kwargs=True) for one in writes]
    logits = both.reference.run(both.sides[side])["logits"][0, -1]
    for handle in handles:
        handle.remove()
    return float(logits[ANSWERS[0]] - logits[ANSWERS[1]])


def read(both: Both, side: int, module: nn.Module) -> Tensor:
    """What a module reads in the unpatched run of a prompt."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value)
        return value

    answer(both, side, {module: keep})
    return found[0]


def inputs_of(both: Both, side: int) -> ALMInput:
    given = dict(both.sides[side])
    if "input_features" in given:
        given.pop("position_ids")
    return both.model.encode(**given)


def sweep_of(both: Both, reference: ALMInput | None) -> PairSweep:
    x, y = (inputs_of(both, side) for side in (0, 1))
    exchange = PairExchange(both.model, x, y, LogitDiff(*ANSWERS), "error", "fast", 2**28)
    return PairSweep(exchange, places_of(x), reference)


def positions(x: ALMInput, place: Any) -> list[int]:
    return [i for span in PLACES[place] for i in x.spans.positions(span, 0)]


def assert_close(cells: pd.DataFrame, column: str, expected: list[float]) -> None:
    off = (cells[column] - pd.Series(expected, index=cells.index)).abs().max()
    assert off < CLOSE, off


def test_every_depth_and_place_both_ways(both: Both) -> None:
    cells = sweep_of(both, None).depths().reset_index(drop=True)
    x = inputs_of(both, 0)
    assert {"audio", "readout"} <= {*cells.place}
    assert cells.depth.max() == len(both.model.path)
    modules = [*both.stack.layers, both.stack.norm]
    streams = {(side, k): read(both, side, m) for side in (0, 1) for k, m in enumerate(modules)}
    ends = [answer(both, side, {}) for side in (0, 1)]
    assert abs(ends[0] - ends[1]) > 0.01
    found, toward, recovery = [], [], []
    for cell in cells.itertuples():
        side = int(cell.direction == "denoising")
        donor, at = streams[1 - side, cell.depth], positions(x, cell.place)

        def write(own: Tensor, donor: Tensor = donor, at: list[int] = at) -> Tensor:
            own[0, at] = donor[0, at]
            return own

        found.append(answer(both, side, {modules[cell.depth]: write}))
        toward.append((1 if side else -1) * (found[-1] - ends[side]))
        recovery.append((found[-1] - ends[side]) / (ends[1 - side] - ends[side]))
    assert_close(cells, "value", found)
    assert_close(cells, "toward", toward)
    scaled = [share * abs(ends[0] - ends[1]) for share in recovery]
    assert_close(cells.assign(scaled=cells.recovery * abs(ends[0] - ends[1])), "scaled", scaled)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_every_head_patched_and_removed(both: Both, ablation: str) -> None:
    """The mean is over the places of both prompts, which stand for recordings here."""
    x, y = inputs_of(both, 0), inputs_of(both, 1)
    reference = ALMInput.joined([x, y]) if ablation == "mean" else None
    cells = sweep_of(both, reference).heads().reset_index(drop=True)
    outputs = [layer.self_attn.o_proj for layer in both.stack.layers]
    z = {(side, k): read(both, side, m) for side in (0, 1) for k, m in enumerate(outputs)}
    base, width = answer(both, 0, {}), both.model.cfg.d_head
    columns: dict[str, list[float]] = {"patched": [], "ablated": []}
    for cell in cells.itertuples():
        at, own_head = positions(x, cell.place), slice(cell.head * width, (cell.head + 1) * width)
        new = {"patched": z[1, cell.layer][0, at, own_head]}
        both_z = torch.cat([z[side, cell.layer][0, at, own_head] for side in (0, 1)])
        new["ablated"] = both_z.mean(0) if ablation == "mean" else torch.zeros(())
        for name, values in new.items():

            def write(own: Tensor, values: Tensor = values, at: Any = at, h: Any = own_head) -> Any:
                own[0, at, h] = values
                return own

            columns[name].append(base - answer(both, 0, {outputs[cell.layer]: write}))
    for name, expected in columns.items():
        assert max(map(abs, expected)) > 1e-3
        off = (cells[name] - pd.Series(expected)).abs()
        assert off.max() < max(CLOSE, 1e-4)  # effects below 1e-4 are given as none
