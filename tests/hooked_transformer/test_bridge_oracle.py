"""TransformerLens' own bridge, on the same checkpoint with the same audio, sees the same values.

The bridge wraps Hugging Face's modules and names what passes them; nothing of this library runs in
it. It always computes eagerly, so ours is loaded with eager attention.
"""

import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM
from tiny import PLACEHOLDER, TinyModels, build_processor, hf_inputs
from tolerances import BRIDGE_FORKS

CASES = {
    "one clip": ([[63]], [9]),
    "left-padded, audio of different lengths": ([[63], [23]], [9, 14]),
    "two clips, and none": ([[30, 17], []], [8, 25]),
}
FORKS = {
    "split_qkv_input": {f"{at}hook_{kind}_input" for at in ("", "attn.") for kind in "qkv"},
    "attn_in": {"hook_attn_in"},
    "attn_result": {"attn.hook_result"},
    "hook_mlp_in": {"hook_mlp_in"},
}
"""Flag of the bridge -> what it adds to a block, under the same names."""
SAME = {
    *("ln_final.hook_scale", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"),
    *(f"blocks.{{}}.hook_{at}" for at in ("resid_pre", "resid_mid", "resid_post")),
    *("blocks.{}.hook_attn_out", "blocks.{}.hook_mlp_out"),
    *(f"blocks.{{}}.ln{n}.hook_{point}" for n in (1, 2) for point in ("scale", "normalized")),
    *(f"blocks.{{}}.attn.hook_{point}" for point in ("q", "k", "v", "z", "rot_q", "rot_k")),
    *("blocks.{}.attn.hook_attn_scores", "blocks.{}.attn.hook_pattern"),
    *(f"blocks.{{}}.mlp.hook_{point}" for point in ("pre", "pre_linear", "post")),
    *(f"blocks.{{}}.{name}" for names in FORKS.values() for name in names),
}
"""Names that both have and mean the same by; ``{}`` is a layer."""
RENAMED = {
    "audio_encoder.hook_in": "audio.hook_encoder_in",
    "audio_encoder.hook_out": "audio.hook_encoder_out",
    "audio_projector.hook_in": "audio.hook_projector_in",
    "audio_projector.hook_out": "audio.hook_projector_out",
    "embed.hook_in": "hook_tokens",
    "embed.hook_out": "hook_text_embed",
    "hook_embed": "hook_text_embed",  # before the audio is merged in, unlike ours
    "rotary_emb.hook_cos": "cos",
    "rotary_emb.hook_sin": "sin",
    "ln_final.hook_in": "blocks.3.hook_resid_post",
    "ln_final.hook_out": "unembed.hook_in",
    "hook_unembed": "unembed.hook_out",
    "blocks.{}.hook_in": "blocks.{}.hook_resid_pre",
    "blocks.{}.hook_out": "blocks.{}.hook_resid_post",
    "blocks.{}.ln1.hook_in": "blocks.{}.hook_resid_pre",
    "blocks.{}.ln1.hook_out": "blocks.{}.ln1.out",
    "blocks.{}.ln2.hook_in": "blocks.{}.hook_resid_mid",
    "blocks.{}.ln2.hook_out": "blocks.{}.ln2.out",
    "blocks.{}.attn.hook_in": "blocks.{}.ln1.out",
    "blocks.{}.attn.hook_attn_in": "blocks.{}.hook_attn_in",
    "blocks.{}.attn.hook_cos": "cos",
    "blocks.{}.attn.hook_sin": "sin",
    **{f"blocks.{{}}.attn.{kind}.hook_in": "blocks.{}.ln1.out" for kind in "qkv"},
    **{f"blocks.{{}}.attn.{kind}.hook_out": f"blocks.{{}}.attn.hook_{kind}" for kind in "qkv"},
    "blocks.{}.attn.o.hook_in": "blocks.{}.attn.hook_z",
    "blocks.{}.attn.o.hook_out": "blocks.{}.hook_attn_out",
    "blocks.{}.attn.hook_out": "blocks.{}.hook_attn_out",
    "blocks.{}.mlp.hook_in": "blocks.{}.ln2.out",
    "blocks.{}.mlp.gate.hook_in": "blocks.{}.ln2.out",
    "blocks.{}.mlp.gate.hook_out": "blocks.{}.mlp.hook_pre",
    "blocks.{}.mlp.in.hook_in": "blocks.{}.ln2.out",
    "blocks.{}.mlp.in.hook_out": "blocks.{}.mlp.hook_pre_linear",
    "blocks.{}.mlp.out.hook_in": "blocks.{}.mlp.hook_post",
    "blocks.{}.mlp.out.hook_out": "blocks.{}.hook_mlp_out",
    "blocks.{}.mlp.hook_out": "blocks.{}.hook_mlp_out",
}
"""The bridge's name -> ours, where it has another; see ``ours_by_every_name``."""
NOT_COMPARED = {"rotary_emb.hook_in"}
"""Hidden states that the rotary table takes its dtype and device from."""
OURS_ALONE = {"hook_audio_embed", "hook_embed", "blocks.{}.mlp.hook_gate"}


@contextmanager
def no_new_process() -> Iterator[list[Any]]:
    """Refuse every subprocess: with a processor that fails to load, the bridge runs an installer.

    Yields what was tried: the bridge swallows the refusal.
    """
    tried: list[Any] = []

    def refuse(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        tried.append(args)
        raise OSError(f"a test must not start {args}")

    with mock.patch.object(subprocess.Popen, "__init__", refuse):
        yield tried


def test_the_guard_refuses_an_installer() -> None:
    with no_new_process() as tried, pytest.raises(OSError, match="must not start"):
        subprocess.check_call([sys.executable, "-c", ""])
    assert len(tried) == 1


@pytest.fixture(scope="module")
def bridges(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The bridge over the grouped and over the multi-head checkpoint."""
    transformers_logger = logging.getLogger("transformers")
    level = transformers_logger.level
    made: dict[str, Any] = {}
    try:
        with warnings.catch_warnings(), no_new_process() as tried:
            from transformer_lens.model_bridge import TransformerBridge

            for variant in ("gqa", "mha"):
                folder = tmp_path_factory.mktemp("bridge") / variant
                shutil.copytree(tiny_models.folder(variant), folder)
                build_processor().save_pretrained(folder)
                made[variant] = TransformerBridge.boot_transformers(
                    str(folder), device="cpu", dtype=torch.float32
                )
    finally:
        transformers_logger.setLevel(level)  # importing the bridge silences it for good
    assert not tried
    assert all(bridge.processor is not None for bridge in made.values())
    return made


@contextmanager
def flags(bridge: Any, *names: str) -> Iterator[None]:
    for name in names:
        getattr(bridge, f"set_use_{name}")(True)
    try:
        yield
    finally:
        for name in names:
            getattr(bridge, f"set_use_{name}")(False)


@torch.no_grad()
def seen_by_bridge(bridge: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    arguments = dict(inputs)
    _, cache = bridge.run_with_cache(arguments.pop("input_ids"), **arguments)
    return cache.cache_dict


@torch.no_grad()
def ours_by_every_name(model: HookedALM, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every point of ours, what the norms return, and the rotary tables."""
    x = model.encode(**inputs)
    _, cache = model.run_with_cache(x, names_filter=lambda name: True)
    found = dict(cache.cache_dict)
    for layer, block in enumerate(model.blocks):
        for norm in ("ln1", "ln2"):
            name = f"blocks.{layer}.{norm}"
            found[f"{name}.out"] = getattr(block, norm).w * found[f"{name}.hook_normalized"]
    found["cos"], found["sin"] = model.rotary(x.position_ids, torch.float32)
    return found


def without_layer(name: str) -> str:
    return ".".join("{}" if part.isdigit() else part for part in name.split("."))


def our_name(bridge_name: str) -> str:
    layer = next((part for part in bridge_name.split(".") if part.isdigit()), "")
    pattern = without_layer(bridge_name)
    return bridge_name if pattern in SAME else RENAMED[pattern].format(layer)


def compare(
    bridge: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    real: Tensor,
    is_same: Callable[[Tensor, Tensor], bool],
) -> None:
    """Check every tensor that the bridge has, real rows only."""
    for name, expected in bridge.items():
        if name in NOT_COMPARED:
            continue
        got = ours[our_name(name)]
        if not name.startswith("audio_"):
            if name.endswith(("hook_attn_scores", "hook_pattern")):
                got, expected = got.transpose(1, 2), expected.transpose(1, 2)
            got, expected = got[real], expected[real]
        assert got.numel() == expected.numel(), name
        got = got.reshape(expected.shape)
        assert is_same(got, expected), (name, (got - expected).abs().max())


def is_close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, atol=BRIDGE_FORKS, rtol=BRIDGE_FORKS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["gqa", "mha"])
def test_same_values(
    bridges: dict[str, Any], tiny_models: TinyModels, variant: str, case: str
) -> None:
    """Bit by bit without flags; those make the bridge compute another way, which rounds."""
    inputs = hf_inputs(*CASES[case])
    real = inputs["attention_mask"].bool()
    bridge = bridges[variant]
    ours = ours_by_every_name(tiny_models.hooked(variant, attention="eager"), inputs)
    compare(seen_by_bridge(bridge, inputs), ours, real, torch.equal)
    # Under grouped heads the bridge hands the fork of the wrong query heads to k and v.
    also = [("attn_in",)] if variant == "mha" else []
    for names in (("split_qkv_input",), ("attn_result", "hook_mlp_in"), *also):
        with flags(bridge, *names):
            seen = seen_by_bridge(bridge, inputs)
        for name in names:
            assert {f"blocks.2.{point}" for point in FORKS[name]} <= seen.keys()
        compare(seen, ours, real, is_close)


def test_no_name_is_left_out(bridges: dict[str, Any], tiny_models: TinyModels) -> None:
    """Everything that fires in the bridge is compared, and everything of ours but three points."""
    inputs = hf_inputs(*CASES["one clip"])
    bridge = bridges["mha"]
    seen = set(seen_by_bridge(bridge, inputs))
    for name in FORKS:
        with flags(bridge, name):
            seen |= set(seen_by_bridge(bridge, inputs))
    patterns = {without_layer(name) for name in seen}
    assert patterns == SAME | set(RENAMED) | NOT_COMPARED
    model = tiny_models.hooked("mha")
    # The bridge wraps the audio encoder as one module; ours is compared with Hugging Face's.
    inside = ("audio.encoder.", "encoder_")
    points = {without_layer(name) for name in model.hook_dict if not name.startswith(inside)}
    compared = {without_layer(our_name(name)) for name in seen - NOT_COMPARED}
    assert points - compared == OURS_ALONE
    assert len(patterns - NOT_COMPARED) == 72
    for name in patterns & points - SAME:
        assert name == "hook_embed"  # the one name that means something else there


def test_audio_is_in_our_embedding_and_not_in_the_bridges(
    bridges: dict[str, Any], tiny_models: TinyModels
) -> None:
    inputs = hf_inputs(*CASES["left-padded, audio of different lengths"])
    is_audio = inputs["input_ids"] == PLACEHOLDER
    seen = seen_by_bridge(bridges["gqa"], inputs)
    ours = ours_by_every_name(tiny_models.hooked("gqa", attention="eager"), inputs)
    real = inputs["attention_mask"].bool()
    assert torch.equal(ours["hook_embed"][real], seen["blocks.0.hook_resid_pre"][real])
    assert torch.equal(ours["hook_embed"][~is_audio], seen["hook_embed"][~is_audio])
    assert (ours["hook_embed"][is_audio] != seen["hook_embed"][is_audio]).any(-1).all()
