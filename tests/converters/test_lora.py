"""LoRA adapters: PEFT's own arithmetic, switched off bit by bit, refused where they do more."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import adapted, under_adapter
from cases import (
    audio_flamingo_3,
    glm_asr,
    granite_speech,
    music_flamingo,
    qwen2_5_omni,
    qwen3_asr,
    voxtral,
)
from family_case import Case
from hf_reference import with_positions
from hooked_alm import ConversionError, HookedALM, InputError
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch
from tiny import TinyModels, hf_inputs
from tolerances import FAST_ENGINE, UNMERGED

INPUTS = hf_inputs([[63], [23]], [9, 14])
FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "ranks by pattern": {
        "rank_pattern": {"o_proj": 5, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"q_proj": 11},
    },
}


@pytest.fixture(scope="module")
def adapter(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted(tiny_models.folder(), torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_equal_to_peft(
    tiny_models: TinyModels, tmp_path: Path, flavour: str, dtype: torch.dtype
) -> None:
    """Merged, and kept apart: PEFT's merged model, bit by bit. Its unmerged one: rounding."""
    theirs = adapted(tiny_models.folder(), dtype, **FLAVOURS[flavour])
    theirs.save_pretrained(tmp_path)
    inputs = with_positions(INPUTS)
    unmerged = theirs(**inputs).logits
    merged = theirs.merge_and_unload()(**inputs).logits
    base = tiny_models.hooked(dtype=dtype)
    assert (merged - base(base.encode(**INPUTS))).abs().max() > 0.1
    for merge in (True, False):
        model = HookedALM.from_pretrained(
            tiny_models.folder(), dtype=dtype, lora=tmp_path, merge_lora=merge
        )
        assert model.cfg.adapter == str(tmp_path)
        found = model(model.encode(**INPUTS))
        assert torch.equal(found, merged), merge
        if dtype == torch.float32:  # in bf16 the two roundings differ as much as two models
            assert (found - unmerged).abs().max() < UNMERGED


CASES = (
    audio_flamingo_3.CASE, music_flamingo.CASE, voxtral.CASE, glm_asr.CASE,
    qwen3_asr.CASE, *qwen2_5_omni.CASES, granite_speech.CASE,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_every_linear_layer_of_a_family(case: Case, tmp_path: Path) -> None:
    """The encoder's too; updates of what the family leaves out (pictures) are left out as well."""
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    folder.mkdir()
    case.save(folder, torch.float32)
    reference: Any = case.reference(folder, torch.float32, "sdpa")
    theirs = under_adapter(reference.model, "all-linear")
    theirs.save_pretrained(adapter)
    _, middling, _ = case.clips
    inputs = case.inputs([[middling], [middling]], [9, 14])
    real = inputs["attention_mask"].bool()
    with theirs.disable_adapter():
        plain = theirs(**inputs).logits
    adapted = theirs.merge_and_unload()(**inputs).logits
    assert (adapted - plain)[real].abs().max() > 0.1
    model = HookedALM.from_pretrained(folder, lora=adapter, merge_lora=False)
    merged = HookedALM.from_pretrained(folder, lora=adapter)
    x = model.encode(**inputs)
    plain, adapted = (case.logits(logits, model)[real] for logits in (plain, adapted))
    assert torch.equal(model(x)[real], adapted)
    assert torch.equal(merged(x)[real], adapted)
    model.switch_lora(False)
    assert torch.equal(model(x)[real], plain)
    encoder = model.audio and model.audio.hooked_encoder
    if encoder is not None:
        one, *others = [f"audio.encoder.blocks.{layer}" for layer in range(encoder.cfg.n_layers)]
        names = [f"{block}.hook_resid_post" for block in (one, *others)]

        def states() -> list[torch.Tensor]:
            _, cache = model.run_with_cache(x, names_filter=names)
            return [cache[name] for name in names]

        off = states()
        model.switch_lora(True, layers=[one])
        first = states()
        model.switch_lora(True)
        on = states()
        assert torch.equal(first[0], on[0])
        assert not torch.equal(first[0], off[0])
        assert not torch.equal(first[1], on[1])


@torch.no_grad()
def test_switching(tiny_models: TinyModels, adapter: Path) -> None:
    """Off is the base model; off in a layer is that layer's base weights, others' adapted."""
    base = tiny_models.hooked()
    x = base.encode(**INPUTS)
    model = HookedALM.from_pretrained(tiny_models.folder(), lora=adapter, merge_lora=False)
    merged = HookedALM.from_pretrained(tiny_models.folder(), lora=adapter)
    assert merged.sources == {"model": tiny_models.folder(), "lora": adapter}
    on = model(x)
    model.switch_lora(False)
    assert torch.equal(model(x), base(x))
    assert torch.equal(model.W_O, base.W_O)
    model.switch_lora(True)
    assert torch.equal(model(x), on)
    assert torch.equal(model.W_O, merged.W_O)
    model.switch_lora(False, layers=[2, 3])
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
    _, cache = model.run_with_cache(x, names_filter=names)
    _, expected = merged.run_with_cache(x, names_filter=names)
    for name in names[:2]:
        assert torch.equal(cache[name], expected[name])
    resid = base(cache[names[1]], start_at_layer=2, inputs=x)
    assert torch.equal(model(x), resid)


@torch.no_grad()
def test_sweeps_see_the_adapter(tiny_models: TinyModels, adapter: Path) -> None:
    model = HookedALM.from_pretrained(tiny_models.folder(), lora=adapter, merge_lora=False)
    base, donor = (model.encode(**hf_inputs([[63]], [9], seed=seed)) for seed in (1, 2))
    metric = LogitDiff(answer=5, other=11)
    fast, plain = (
        patch(model, base, donor, metric, site="z", heads="each", places=["readout"], engine=e)
        for e in ("fast", "hooks")
    )
    assert abs(fast.values - plain.values).max() < FAST_ENGINE[torch.float32]
    with pytest.raises(InputError, match="kept apart from the weights"):
        model.process_weights_()


def edited_config(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return edit


def edited_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "another method": (edited_config({"peft_type": "IA3"}), ConversionError, "peft_type = 'IA3'"),
    "DoRA": (edited_config({"use_dora": True}), ConversionError, "use_dora = True"),
    "biases": (edited_config({"bias": "all"}), ConversionError, "bias = 'all'"),
    "whole modules": (
        edited_config({"modules_to_save": ["lm_head"]}), ConversionError, "modules_to_save",
    ),
    "changed base weights": (
        edited_config({"init_lora_weights": "pissa"}), ConversionError, "'pissa'",
    ),
    "a field from the future": (
        edited_config({"use_magic": 3}), ConversionError, "use_magic = 3",
    ),
    **{f"{name} = {value}": (edited_config({name: value}), ConversionError, f"got {name} = ")
       for name, values in (
           ("r", (None, 0, "3", 3.0)), ("lora_alpha", (None, float("nan"), True, [])),
           ("rank_pattern", ([1], {"q_proj": 0}, {"(": 3})), ("alpha_pattern", ({"a": "x"},)),
           ("use_rslora", ("yes",)),
       ) for value in values},
    "vectors": (
        edited_tensors(lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3)}),
        ConversionError, "does not fit",
    ),
    "whole numbers": (
        edited_tensors(lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].char()}),
        ConversionError, "is stored as int8, expected float64",
    ),
    "another rank": (edited_config({"r": 4}), ConversionError, "rank 3, its config says 4"),
    "half an update": (
        edited_tensors(lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}),
        ConversionError, r"with \['A'\]: no linear layer",
    ),
    "another model's": (
        edited_tensors(lambda t: {k.replace("layers.0", "layers.9"): v for k, v in t.items()}),
        ConversionError, "layers.9.*no linear layer",
    ),
    "another width": (
        edited_tensors(lambda t: t | {f"{Q}.lora_A.weight": torch.ones(3, 5)}),
        ConversionError, "does not fit",
    ),
    "an embedding": (
        edited_tensors(lambda t: t | {f"{Q}.lora_embedding_A": torch.ones(3, 5)}),
        ConversionError, "unexpected tensor",
    ),
    **{
        f"{name} {value}": (edited_config({name: value}), ConversionError, f"got {name} = ")
        for name, value in [
            ("r", 0), ("r", -1), ("r", "8"), ("r", None), ("r", 1.5), ("r", True), ("r", []),
            ("lora_alpha", "x"), ("lora_alpha", float("nan")), ("lora_alpha", None),
            ("use_rslora", "yes"), ("rank_pattern", []), ("rank_pattern", {"q": 0}),
            ("alpha_pattern", {"((": 1}), ("alpha_pattern", {"q": "x"}), ("alpha_pattern", 3),
        ]
    },
    "a tensor without axes": (
        edited_tensors(lambda t: t | {f"{Q}.lora_A.weight": torch.ones(())}),
        ConversionError, "does not fit",
    ),
    "no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("[1", "utf-8"),
        ConversionError, "reading .*adapter_config.json: it is no JSON object",
    ),
    "a list": (
        lambda folder: (folder / "adapter_config.json").write_text("[]", "utf-8"),
        ConversionError, "no JSON object, but list",
    ),
    "no UTF-8": (
        lambda folder: (folder / "adapter_config.json").write_bytes(b'{"r": "\xff"}'),
        ConversionError, "no UTF-8",
    ),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(), InputError,
        "has no adapter_config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_adapters_that_do_not_fit(
    tiny_models: TinyModels, adapter: Path, tmp_path: Path, what: str
) -> None:
    change, kind, message = BAD[what]
    for file in adapter.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    change(tmp_path)
    with pytest.raises(kind, match=message):
        HookedALM.from_pretrained(tiny_models.folder(), lora=tmp_path)


def test_nothing_to_switch(gqa: HookedALM) -> None:
    with pytest.raises(InputError, match="none to switch in the model"):
        gqa.switch_lora(False)
