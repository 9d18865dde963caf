"""The table of hook points: what it says is what the points do."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from engine_runs import BASE, PLAIN_SITES, Cases
from hooked_alm import HookedALM, HookNameError
from hooked_alm.config import HookedALMConfig
from hooked_alm.hooks import HookPoint
from hooked_alm.points import (
    BLOCK,
    OUTSIDE,
    RECEIVERS,
    SENDERS,
    SITES,
    Point,
    Site,
    hook_name,
    point_of,
    sites_of,
)
from tiny import TinyModels
from tiny_text import TextModels


@pytest.fixture(scope="module", params=["gqa", "qwen3"])
def model(
    request: pytest.FixtureRequest,
    tiny_models: TinyModels,
    tmp_path_factory: pytest.TempPathFactory,
) -> HookedALM:
    """One that hears, and one with q/k norm."""
    cases = Cases(tiny_models, TextModels(tmp_path_factory.mktemp("text")))
    return cases(request.param).model


def fired(model: HookedALM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the points that fire in one run, in order."""
    names: list[str] = []
    call = HookPoint.__call__

    def note(point: HookPoint, value: Any) -> Any:
        names.append(str(point.name))
        return call(point, value)

    monkeypatch.setattr(HookPoint, "__call__", note)
    x = model.encode(**BASE) if model.audio is not None else torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        model(x)
    return names


def below(name: str) -> str:
    """The part of a name below its block."""
    return name.split(".", 2)[2]


def test_sites_are_those_that_say_how_far_an_edit_reaches() -> None:
    assert get_args(Site) == tuple(SITES)
    assert len({point.name for point in (*BLOCK, *OUTSIDE)}) == len((*BLOCK, *OUTSIDE))
    assert len({point.short for point in BLOCK}) == len(BLOCK)


def test_what_is_not_on_demand_always_fires(
    model: HookedALM, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = fired(model, monkeypatch)
    inline = {n for n in model.hook_dict if n not in model.aliases and not point_of(n).on_demand}
    if model.audio is None:
        inline -= {"hook_audio_embed"}
    assert {*names} == inline
    assert len(names) == len(inline)


def test_rows_are_in_the_order_in_which_they_fire(
    model: HookedALM, monkeypatch: pytest.MonkeyPatch
) -> None:
    possible = [name for name in model.matching(lambda name: name.startswith("blocks.1."))]
    hooks = [(name, lambda value, hook: None) for name in possible]
    with model.hooks(fwd_hooks=hooks):
        names = fired(model, monkeypatch)
    order = [below(name) for name in names if name.startswith("blocks.1.")]
    table = [point.name for point in BLOCK]
    assert {*order} == {below(name) for name in possible}
    assert order == sorted(order, key=table.index)


def test_units_are_the_axis_that_an_index_names(model: HookedALM) -> None:
    sizes = {
        "head": model.cfg.n_heads, "kv_head": model.cfg.n_key_value_heads,
        "neuron": model.cfg.d_mlp,
    }  # fmt: skip
    sites = sites_of(model.cfg)
    names = [hook_name(site, "blocks.0") for site in sites]
    _, cache = model.run_with_cache(torch.tensor([[3, 1, 4, 1, 5]]), names_filter=names)
    for site, name in zip(sites, names, strict=True):
        point = SITES[site]
        axis = {"pattern": 1}.get(site, 2)
        assert cache[name].shape[axis] == sizes.get(str(point.unit), model.cfg.d_model)
        assert cache[name].shape[point.position_axis] == 5
        assert len(point.axes.split()) == cache[name].ndim


@pytest.mark.parametrize("site", PLAIN_SITES)
def test_an_edit_reaches_what_the_row_says(model: HookedALM, site: Site) -> None:
    """Within its block: the edited row, or those after it too."""
    ids, at = torch.tensor([[3, 1, 4, 1, 5, 9]]), 2
    last = hook_name("resid_post", "blocks.1")

    def write(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        if site == "pattern":
            value[:, :, at] = value[:, :, at].flip(-1).tril(0) + 0.3
        else:
            value[:, at] = value[:, at] * 1.5 + 0.3
        return value

    with torch.no_grad():
        clean = model.run_with_cache(ids, names_filter=[last])[1][last]
        seen: list[Tensor] = []
        model.run_with_hooks(
            ids,
            fwd_hooks=[
                (hook_name(site, "blocks.1"), write),
                (last, lambda value, hook: seen.append(value)),
            ],
        )
    # An edited pattern takes over from the kernel, which rounds otherwise.
    moved = (seen[0] - clean).abs().amax((0, 2)) > 1e-3
    changed = moved.nonzero().flatten().tolist()
    reading = SITES[site].reach == "reading rows"
    assert changed == ([at] if not reading else [2, 3, 4, 5])


def test_senders_write_and_receivers_read(model: HookedALM) -> None:
    """Points that write add up to the stream; points that read are made of it."""
    assert {point.writes for point in SENDERS.values()} == {"embed", "attn", "cross_attn", "mlp"}
    whole = [name for name, point in SENDERS.items() if point.unit is None and "." not in name]
    names = ["hook_embed"]
    for block in model.path:
        names += [f"{block}.{name}" for name in whole if f"{block}.{name}" in model.hook_dict]
    end = model.depth_names()[-1]
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([[3, 1, 4, 1, 5]]), names_filter=[*names, end])
    total = sum(cache[name].double() for name in names)
    torch.testing.assert_close(total, cache[end].double(), atol=1e-4, rtol=0)
    for name, point in RECEIVERS.items():
        assert name in (point.name, point.alias)
        assert (point.unit is not None) == (
            str(point.reads).removeprefix("cross_") in ("q", "k", "v")
        )


def test_flags_are_fields_of_the_config() -> None:
    flags = {point.flag for point in (*BLOCK, *OUTSIDE) if point.flag}
    assert flags == {
        name for name in HookedALMConfig.__dataclass_fields__ if name.startswith("use_")
    }
    assert all(point.on_demand for point in (*BLOCK, *OUTSIDE) if point.flag)


def test_names_are_built_and_taken_apart(model: HookedALM) -> None:
    for block in ("blocks.0", "mimo_blocks.12", "audio.encoder.blocks.3"):
        for point in BLOCK:
            name = hook_name(point.short, block)
            assert name == f"{block}.{point.name}"
            found = point_of(name)
            if "encoder" in block:  # the same but for its axes, which are no prompt's
                assert not {"batch", "pos", "query_pos", "key_pos", "d_model"} & {
                    *found.axes.split()
                }
                assert len(found.axes.split()) == len(point.axes.split())
                assert found.position_axis is None
                found = found._replace(axes=point.axes, on_demand=point.on_demand)
            assert found == point
            if point.alias:
                alias = hook_name(point.alias.replace("hook_", ""), block)
                assert alias == f"{block}.{point.alias}"
                assert point_of(alias) == point_of(name)
    for point in OUTSIDE:
        assert hook_name(point.name) == point.name
    for name in model.hook_dict:
        assert isinstance(point_of(name), Point)


@pytest.mark.parametrize(
    ("point", "block", "told"),
    [
        ("zz", "blocks.0", "naming point 'zz' of blocks.0: expected one of resid_pre, "),
        ("z", "", "naming point 'z' of the model: expected one of hook_encoder_in"),
        ("hook_embed", "blocks.0", "naming point 'hook_embed' of blocks.0"),
    ],
)
def test_points_that_are_none(point: str, block: str, told: str) -> None:
    with pytest.raises(HookNameError, match=told):
        hook_name(point, block)
    for name in ("blocks.0.hook_zz", "hook_zz", "blocks.0.attn.hook_resid_pre"):
        with pytest.raises(HookNameError, match="the table of points has none such"):
            point_of(name)
