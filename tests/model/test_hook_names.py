"""Names of hook points: the golden list, names that match nothing, filters, slices."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM, HookNameError, InputError
from tiny import N_LAYERS, TinyModels, hf_inputs
from tiny_text import TextModels, text_batch
from tolerances import OTHER_KERNEL

GOLDEN = Path(__file__).parent / "golden_hooks.json"
"""Every point of three models in firing order, with axes and sizes: grouped-query Qwen2-Audio,
LLaMA, and Qwen3 for its q/k norms. A difference is a change of the public interface, and belongs
into CHANGELOG.md. To write the file anew: ``.venv/bin/python tests/model/test_hook_names.py``."""

INPUTS = hf_inputs([[], [63, 23], [], [41], []], [9, 5, 4, 8, 6])
AXES = {
    5: "batch", 31: "pos", 3: "clip", 16: "audio_pos", 25: "max_audio_pos", 8: "mel", 100: "frame",
    24: "d_audio", 54: "d_model", 34: "d_mlp", 337: "vocab", 6: "head", 2: "kv_head", 10: "d_head",
    1: "1",
}  # fmt: skip
"""Sizes of the model and the inputs above, all different."""
ENCODER_AXES = {
    50: "encoder_pos",
    25: "pooled_pos",
    24: "d_audio",
    38: "d_mlp",
    3: "head",
    8: "d_head",
    1: "1",
}
"""Sizes inside the encoder, but for its windows, of which there are as many as heads."""
TEXT_AXES = {
    3: "batch", 13: "pos", 34: "d_mlp", 97: "vocab", 6: "head", 2: "kv_head", 10: "d_head", 1: "1",
}  # fmt: skip
RESID_PRE = "blocks.{layer}.hook_resid_pre"
LLAMA_AXES, QWEN3_AXES = TEXT_AXES | {60: "d_model"}, TEXT_AXES | {56: "d_model"}


@pytest.fixture(scope="module")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> TextModels:
    return TextModels(tmp_path_factory.mktemp("text"))


def symbols(name: str, shape: torch.Size, axes: dict[int, str]) -> str:
    inside = name.startswith("audio.encoder.")
    named = (
        ["window", *(ENCODER_AXES[size] for size in shape[1:])]
        if inside
        else [axes[size] for size in shape]
    )
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        named[2:] = ["query_pos", "key_pos"]
        named[2:] = [f"encoder_{axis}" if inside else axis for axis in named[2:]]
    sized = zip(named, shape, strict=True)
    return " ".join(axis if axis == "1" else f"{axis}={size}" for axis, size in sized)


def recorded(model: HookedALM, names: Any, inputs: dict[str, Tensor] = INPUTS) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.run_with_cache(model.encode(**inputs), names_filter=names)[1].cache_dict


def listing(model: HookedALM, inputs: dict[str, Tensor], axes: dict[int, str]) -> dict[str, str]:
    """Points with shapes, the blocks' once, after checking that every block has the same."""
    found = recorded(model, lambda name: True, inputs)
    points = {name: symbols(name, value.shape, axes) for name, value in found.items()}
    blocks: dict[str, list[dict[str, str]]] = {"": [], "audio.encoder.": []}
    listed: dict[str, str] = {}
    for name, shape in points.items():
        if match := re.fullmatch(r"(|audio\.encoder\.)blocks\.(\d+)\.(.+)", name):
            stack = blocks[match[1]]
            if int(match[2]) == len(stack):
                stack.append({})
            stack[int(match[2])][f"{match[1]}blocks.{{layer}}.{match[3]}"] = shape
            listed |= stack[0]
        else:
            listed[name] = shape
    assert len(blocks[""]) == model.cfg.n_layers
    for stack in blocks.values():
        assert all(list(block.items()) == list(stack[0].items()) for block in stack)
    return listed


def listings(audio: HookedALM, text: TextModels) -> dict[str, dict[str, str]]:
    return {
        "qwen2_audio": listing(audio, INPUTS, AXES),
        "llama": listing(text.hooked("llama"), text_batch(), LLAMA_AXES),
        "qwen3": listing(text.hooked("qwen3"), text_batch(), QWEN3_AXES),
    }


def test_golden_list(gqa: HookedALM, mha: HookedALM, text_models: TextModels) -> None:
    found, golden = listings(gqa, text_models), json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, points in found.items():
        expected = golden[name]
        assert list(points.items()) == list(expected.items()), json.dumps(points, indent=1)
    # Without grouped heads there is one point more, and as many kv heads as heads.
    extra = {"blocks.{layer}.hook_attn_in": "batch=5 pos=31 head=6 d_model=54"}
    points = golden["qwen2_audio"]
    grown = {name: shape.replace("kv_head=2", "head=6") for name, shape in points.items()} | extra
    shown = listing(mha, INPUTS, AXES)
    assert shown == grown
    assert list(shown).index(next(iter(extra))) == list(shown).index(RESID_PRE) + 1


def test_the_kernel_does_not_change_the_order(tiny_models: TinyModels) -> None:
    """What fires on the side fires where the eager computation has it."""
    found = recorded(tiny_models.hooked("gqa", attention="eager"), lambda name: True)
    assert list(found) == list(recorded(tiny_models.hooked("gqa"), lambda name: True))


def test_every_point_is_listed_and_only_one_cannot_fire(gqa: HookedALM) -> None:
    by_stack = {n: own for n, own in gqa.aliases.items() if n.startswith("encoder_")}
    points = {
        re.sub(r"blocks\.\d+", "blocks.{layer}", n) for n in gqa.hook_dict if n not in by_stack
    }
    aliases = {
        re.sub(r"blocks\.\d+", "blocks.{layer}", n) for n in gqa.aliases if n not in by_stack
    }
    golden = set(json.loads(GOLDEN.read_text())["qwen2_audio"])
    assert golden == (points | aliases) - {"blocks.{layer}.hook_attn_in"}
    assert all(p.name == gqa.aliases.get(name, name) for name, p in gqa.hook_dict.items())
    assert aliases == {
        f"{stack}blocks.{{layer}}.attn.hook_{letter}_input"
        for stack in ("", "audio.encoder.")
        for letter in "qkv"
    }
    inside = {n for n in gqa.hook_dict if n.startswith(("audio.encoder.b", "audio.encoder.l"))}
    theirs = {n.replace("encoder_blocks.", "audio.encoder.blocks.").replace(
        "encoder_ln_final.", "audio.encoder.ln_final.") for n in by_stack}  # fmt: skip
    assert theirs == inside
    name = "encoder_blocks.1.attn.hook_z"
    assert recorded(gqa, name)[name].shape == (3, 50, 3, 8)
    with pytest.raises(HookNameError, match="true for none"):  # a predicate sees our names
        recorded(gqa, lambda name: name.startswith("encoder_"))


def test_shapes_are_known_without_a_run(gqa: HookedALM, mha: HookedALM) -> None:
    for model in (gqa, mha):
        cache = recorded(model, lambda name: True)
        shapes = model.hook_shapes()
        assert set(shapes) == set(cache) - set(model.aliases)
        for name, shape in shapes.items():
            for axis, size in zip(shape.split(), cache[name].shape, strict=True):
                axis, _, fixed = axis.partition("=")
                axis = {"window": "clip"}.get(axis, axis)  # this family hears a clip in one
                assert int(fixed or size) == size, name
                if name.startswith("audio.encoder."):
                    continue  # whose axes the golden list has
                # Where heads are not grouped, their number does not tell which they are.
                known = {AXES[size], AXES[size].removeprefix("max_"), "query_pos", "key_pos"}
                assert axis in known | ({"kv_head"} if model is mha else set()), name


def ways_to_name(model: HookedALM) -> list[Callable[[Any], Any]]:
    """Everything that takes a name of a hook point."""
    x = model.encode(**INPUTS)

    def hook(value: Tensor, hook: Any) -> None:
        raise AssertionError("must not run")

    return [
        lambda name: model.run_with_hooks(x, fwd_hooks=[(name, hook)]),
        lambda name: model.run_with_hooks(x, bwd_hooks=[(name, hook)], reset_hooks_end=False),
        lambda name: model.hooks(fwd_hooks=[(name, hook)]).__enter__(),
        lambda name: model.add_hook(name, hook),
        lambda name: model.add_perma_hook(name, hook),
        lambda name: model.run_with_cache(x, names_filter=name),
        lambda name: model.run_with_cache(x, names_filter=name, return_cache_object=False),
        lambda name: model.get_caching_hooks(name),
        lambda name: model.add_caching_hooks(name),
        lambda name: model.generate(x, 1, return_type="tokens", fwd_hooks=[(name, hook)]),
    ]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("blocks.0.hook_resid_pe", "blocks.0.hook_resid_pre"),
        ("blocks.0.attn.hook_qq", "blocks.0.attn.hook_q"),
        ("blocks.4.hook_resid_pre", "blocks.3.hook_resid_pre"),
        ("hook_pos_embed", "hook_embed"),
        ("blocks.1.mlp.hook_gat", "blocks.1.mlp.hook_gate"),
        ("blocks.0.attn.hook_q_inputs", "blocks.0.attn.hook_q_input"),
    ],
)
def test_unknown_names_raise_with_a_suggestion(gqa: HookedALM, name: str, nearest: str) -> None:
    for use in ways_to_name(gqa):
        with pytest.raises(HookNameError, match=f"none of that name.*{re.escape(nearest)}"):
            use(name)
    assert not gqa.list_hooks()
    for filter in ([name], ("hook_embed", name), {name, "hook_embed"}):
        with pytest.raises(HookNameError, match=re.escape(repr(name))):
            recorded(gqa, filter)


def test_predicates_that_match_nothing_raise(gqa: HookedALM) -> None:
    for use in ways_to_name(gqa):
        with pytest.raises(HookNameError, match="it is true for none of the 165 points"):
            use(lambda name: "reisd" in name)
        # They may match a point, but none that can fire.
        with pytest.raises(HookNameError, match="true for none"):
            use(lambda name: name.startswith("blocks") and name.endswith("hook_attn_in"))
    assert not gqa.list_hooks()


def test_points_that_cannot_fire_raise_and_say_why(gqa: HookedALM, mha: HookedALM) -> None:
    for use in ways_to_name(gqa):
        with pytest.raises(HookNameError, match="differ in number .6 and 2.; use hook_q_input"):
            use("blocks.0.hook_attn_in")
    assert "blocks.0.hook_attn_in" in recorded(mha, "blocks.0.hook_attn_in")


def test_errors_are_what_their_callers_catch(gqa: HookedALM) -> None:
    with pytest.raises(KeyError) as error:
        gqa.resolve("nothing")
    assert isinstance(error.value, ValueError)
    assert str(error.value).startswith("looking up hook point 'nothing'")


def test_filters_select_the_same_points_in_every_form(gqa: HookedALM) -> None:
    names = ["blocks.2.attn.hook_z", "hook_embed", "blocks.0.hook_q_input"]
    expected = {*names, "blocks.0.attn.hook_q_input"}
    forms: list[Any] = [names, tuple(names), set(names), iter(names), dict.fromkeys(names)]
    forms += [names[::-1], names * 2, lambda name: name in names]
    for form in forms:
        assert set(recorded(gqa, form)) == expected
    # In the order of the model, whatever the order of the names.
    assert gqa.matching(["hook_embed", "ln_final.hook_scale"]) == [
        "ln_final.hook_scale",
        "hook_embed",
    ]
    assert set(recorded(gqa, "hook_embed")) == {"hook_embed"}
    assert recorded(gqa, []) == {}
    # Both names of a split input select it, and both are in the cache.
    for form in (
        "blocks.0.attn.hook_q_input",
        ["blocks.0.attn.hook_q_input"],
        lambda name: name == "blocks.0.attn.hook_q_input",
    ):
        found = recorded(gqa, form)
        assert set(found) == {"blocks.0.hook_q_input", "blocks.0.attn.hook_q_input"}
        assert len({value.data_ptr() for value in found.values()}) == 1


def test_what_is_cached_by_default(gqa: HookedALM) -> None:
    """What HookedTransformer caches with its default flags, and ours that are free."""
    per_block = {
        *(
            f"hook_{point}"
            for point in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        ),
        *(f"ln{n}.hook_{point}" for n in (1, 2) for point in ("scale", "normalized")),
        *(f"attn.hook_{point}" for point in ("q", "k", "v", "rot_q", "rot_k", "attn_scores")),
        *("attn.hook_pattern", "attn.hook_z"),
        *(f"mlp.hook_{point}" for point in ("pre", "gate", "pre_linear", "post")),
    }
    expected = {f"blocks.{layer}.{point}" for layer in range(N_LAYERS) for point in per_block}
    expected |= {"hook_embed", "hook_text_embed", "hook_audio_embed"}
    expected |= {"ln_final.hook_scale", "ln_final.hook_normalized"}
    expected |= {"unembed.hook_in", "unembed.hook_out"}
    assert set(recorded(gqa, None)) == expected


def position_axis(name: str) -> int | None:
    if name.startswith("audio.") or name == "hook_audio_embed":
        return None
    return 2 if name.endswith(("hook_attn_scores", "hook_pattern")) else 1


@pytest.mark.parametrize("pos_slice", [-1, 3, (2, 9), (None, -4), (1, 20, 3), [0, 5, 28]])
def test_positions_are_sliced_on_their_own_axis(mha: HookedALM, pos_slice: Any) -> None:
    x = mha.encode(**INPUTS)
    with torch.no_grad():
        _, whole = mha.run_with_cache(x, names_filter=lambda name: True)
        _, part = mha.run_with_cache(x, names_filter=lambda name: True, pos_slice=pos_slice)
    index: Any = slice(*pos_slice) if isinstance(pos_slice, tuple) else pos_slice
    index = [index] if isinstance(index, int) else index
    assert part.keys() == whole.keys()
    for name, value in whole.items():
        axis = position_axis(name)
        expected = value if axis is None else value[(slice(None),) * axis + (index,)]
        assert torch.equal(part[name], expected), name


def test_gradients_are_sliced_like_activations(gqa: HookedALM) -> None:
    names = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_rot_k", "blocks.1.hook_resid_pre"]
    whole, part = ({}, {})
    for store, pos_slice in ((whole, None), (part, (2, 9))):
        _, forward, backward = gqa.get_caching_hooks(
            names, incl_bwd=True, cache=store, pos_slice=pos_slice
        )
        with gqa.hooks(forward, backward):
            gqa(gqa.encode(**INPUTS))[:, -1, 5].sum().backward()
    gqa.zero_grad()
    assert set(whole) == {*names, *(f"{name}_grad" for name in names)}
    for name, value in whole.items():
        axis = position_axis(name.removesuffix("_grad"))
        assert torch.equal(part[name], value.narrow(axis, 2, 7)), name


def test_remove_batch_dim(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    with torch.no_grad():
        _, whole = gqa.run_with_cache(x[3], names_filter=lambda name: True)
        _, bare = gqa.run_with_cache(x[3], names_filter=lambda name: True, remove_batch_dim=True)
    assert not bare.has_batch_dim
    for name, value in whole.items():
        assert torch.equal(bare[name], value[0]), name
    with pytest.raises(InputError, match="the input has 5 rows"):
        gqa.run_with_cache(x, remove_batch_dim=True)


def test_cache_understands_short_names(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    with torch.no_grad():
        logits, cache = gqa.run_with_cache(x)
        plain_logits, plain = gqa.run_with_cache(x, return_cache_object=False)
    assert torch.equal(plain_logits, logits)
    assert type(plain) is dict
    assert torch.equal(cache["resid_post", 3], plain["blocks.3.hook_resid_post"])
    assert torch.equal(cache["gate", 1, "mlp"], plain["blocks.1.mlp.hook_gate"])
    # The stream is the sum of what was written to it, audio included.
    parts = cache.decompose_resid(apply_ln=False)
    assert (parts.sum(0) - cache["resid_post", 3]).abs().max() < OTHER_KERNEL[torch.float32]


def test_cache_on_another_device(gqa: HookedALM) -> None:
    _, cache = gqa.run_with_cache(gqa.encode(**INPUTS), names_filter="hook_embed", device="meta")
    assert cache["hook_embed"].is_meta


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        audio, text = TinyModels(Path(folder) / "audio"), TextModels(Path(folder) / "text")
        GOLDEN.write_text(json.dumps(listings(audio.hooked(), text), indent=1) + "\n")
