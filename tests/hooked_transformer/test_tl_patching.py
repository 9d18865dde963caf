"""TransformerLens' patching sweeps and direct paths, with audio, on every layout of heads."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache, patching

from hf_reference import hf_activations, with_positions
from hooked_alm import ALMInput, HookedALM
from tiny import TinyModels
from two_clips import CLOSE, metric, two_clips

SITES = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out", "z": "attn.hook_z", "q": "attn.hook_q", "k": "attn.hook_k",
    "v": "attn.hook_v", "pattern": "attn.hook_pattern",
}  # fmt: skip
CELLS = {"layer": (0, 1, 3), "pos": (3, 4, 7), "head": (0, 1, -1), "dest_pos": (4, 6, 7),
         "src_pos": (3, 3, 5)}  # fmt: skip
HEADS = ("out", "q", "k", "v", "pattern")
Sweep = Callable[..., Any]
Where = tuple[Any, ...]
EVERY = slice(None)


SHORT = [[4]], [1]
"""One audio position of four, where every cell is run."""


def sweeps() -> dict[str, tuple[Sweep, str, tuple[str, ...]]]:
    """The 15 sweeps over one kind of activation: function, site, axes of a cell."""
    found: dict[str, tuple[Sweep, str, tuple[str, ...]]] = {}
    for site in ("resid_pre", "resid_mid", "attn_out", "mlp_out"):
        found[site] = (getattr(patching, f"get_act_patch_{site}"), site, ("layer", "pos"))
    for kind in HEADS:
        site = "z" if kind == "out" else kind
        by_pos = ("layer", "pos", "head") if site != "pattern" else ("layer", "head", "dest_pos")
        for name, axes in (("all_pos", ("layer", "head")), ("by_pos", by_pos)):
            sweep = getattr(patching, f"get_act_patch_attn_head_{kind}_{name}")
            found[f"{kind}_{name}"] = (sweep, site, axes)
    sweep = patching.get_act_patch_attn_head_pattern_dest_src_pos
    found["pattern_dest_src_pos"] = (sweep, "pattern", ("layer", "head", "dest_pos", "src_pos"))
    return found


SWEEPS = sweeps()


def n_heads(model: HookedALM, site: str) -> int:
    """Heads that a site has on its axis."""
    return model.cfg.n_key_value_heads if site in ("k", "v") else model.cfg.n_heads


def some_cells(model: HookedALM, site: str, axes: tuple[str, ...]) -> list[list[int]]:
    """Three cells: at the audio and at the readout, first and last head, first and last layer."""
    last = n_heads(model, site) - 1
    cells = zip(*(CELLS[axis] for axis in axes), strict=True)
    return [[last if index == -1 else index for index in cell] for cell in cells]


def where(site: str, axes: tuple[str, ...], cell: list[int]) -> Where:
    """What a cell selects of its activation, batch first."""
    index = dict(zip(axes, cell, strict=True))
    if site == "pattern":
        return (EVERY, index["head"], index.get("dest_pos", EVERY), index.get("src_pos", EVERY))
    return (EVERY, index.get("pos", EVERY), index.get("head", EVERY))[: 2 + ("head" in index)]


def by_hand(
    model: HookedALM,
    base: ALMInput,
    cache: ActivationCache,
    name: str,
    part: Where,
    metric: Callable[[Tensor], Tensor] = metric,
) -> Tensor:
    """The metric of one run with one write."""

    def write(value: Tensor, hook: object) -> Tensor:
        edited = value.clone()
        edited[part] = cache[name][part]
        return edited

    return metric(model.run_with_hooks(base, fwd_hooks=[(name, write)]))


@torch.no_grad()
@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_equals_runs_written_out(any_model: HookedALM, name: str) -> None:
    """Cells at the clip and at the readout; each one moves the metric."""
    sweep, site, axes = SWEEPS[name]
    base, donor, *_ = two_clips(any_model)
    unpatched, (_, cache) = metric(any_model(base)), any_model.run_with_cache(donor)
    cells = some_cells(any_model, site, axes)
    grid = pd.DataFrame(cells, columns=list(axes))
    found = sweep(any_model, base, cache, metric, index_axis_names=None, index_df=grid)
    for value, cell in zip(found, cells, strict=True):
        point = f"blocks.{cell[0]}.{SITES[site]}"
        assert torch.equal(value, by_hand(any_model, base, cache, point, where(site, axes, cell)))
        assert value != unpatched, cell


@torch.no_grad()
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v"])
@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_sweeps_equal_hugging_face_under_pytorch_hooks(
    tiny_models: TinyModels, variant: str, site: str
) -> None:
    """The same writes into the published model, bit by bit."""
    model, hf = tiny_models.hooked(variant), tiny_models.hf(variant)
    base, donor, hf_base, hf_donor = two_clips(model)
    _, cache = model.run_with_cache(donor)
    expected = hf_activations(hf, with_positions(hf_donor))
    sweep, _, axes = SWEEPS["out_by_pos" if site == "z" else site if site in SWEEPS else
                            f"{site}_by_pos"]  # fmt: skip
    cells = some_cells(model, site, axes)
    grid = pd.DataFrame(cells, columns=list(axes))
    found = sweep(model, base, cache, metric, index_axis_names=None, index_df=grid)
    for value, cell in zip(found, cells, strict=True):
        part = where(site, axes, cell)
        new = expected[f"blocks.{cell[0]}.{SITES[site]}"][part]
        logits = hf_patched(hf, with_positions(hf_base), cell[0], site, part, new)
        assert torch.equal(value, metric(logits))


def hf_patched(
    hf: Any, inputs: dict[str, Tensor], layer: int, site: str, part: Where, new: Tensor
) -> Tensor:
    """Hugging Face's logits with one activation overwritten in part."""
    block = hf.model.language_model.layers[layer]
    d_head = block.self_attn.head_dim

    def written(value: Tensor) -> Tensor:
        edited = value.clone()
        view = edited.unflatten(-1, (-1, d_head)) if site in ("z", "q", "k", "v") else edited
        view[part] = new
        return edited

    def before(_: Any, args: Any) -> Any:
        return (written(args[0]), *args[1:])

    def after(_: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (written(output[0]), *output[1:])
        return written(output)

    attn = block.self_attn
    readers = {"resid_pre": block, "z": attn.o_proj}
    writers = {"attn_out": attn, "mlp_out": block.mlp, "q": attn.q_proj, "k": attn.k_proj,
               "v": attn.v_proj}  # fmt: skip
    if site in readers:
        handle = readers[site].register_forward_pre_hook(before)
    else:
        handle = writers[site].register_forward_hook(after)
    try:
        return hf(**inputs).logits
    finally:
        handle.remove()


@torch.no_grad()
def test_patterns_and_mid_streams_by_what_they_add_up_to(any_model: HookedALM) -> None:
    """A pattern mixes the values of the patched run; a stream is what the attention adds to it."""
    base, donor, *_ = two_clips(any_model)
    (_, clean), (_, corrupt) = any_model.run_with_cache(donor), any_model.run_with_cache(base)
    grid = pd.DataFrame([[2, 4]], columns=["layer", "head_index"])
    found = patching.get_act_patch_attn_head_pattern_all_pos(
        any_model, base, clean, metric, index_axis_names=None, index_df=grid
    )
    values = corrupt["blocks.2.attn.hook_v"]
    own = values[:, :, 4 // (any_model.cfg.n_heads // values.shape[2])]
    mixed = clean["blocks.2.attn.hook_z"].clone()
    mixed[:, :, 4] = clean["blocks.2.attn.hook_pattern"][:, 4] @ own
    z = ActivationCache({"blocks.2.attn.hook_z": mixed}, any_model)
    expected = by_hand(any_model, base, z, "blocks.2.attn.hook_z", (EVERY, EVERY, 4))
    torch.testing.assert_close(found[0], expected, **CLOSE)
    grid = pd.DataFrame([[1, 4]], columns=["layer", "pos"])
    found = patching.get_act_patch_resid_mid(
        any_model, base, clean, metric, index_axis_names=None, index_df=grid
    )
    added = clean["blocks.1.hook_resid_mid"] - corrupt["blocks.1.hook_resid_pre"]
    written = ActivationCache({"blocks.1.hook_attn_out": added}, any_model)
    expected = by_hand(any_model, base, written, "blocks.1.hook_attn_out", (EVERY, 4))
    torch.testing.assert_close(found[0], expected, **CLOSE)


@torch.no_grad()
def test_all_heads_at_once(any_model: HookedALM) -> None:
    """`get_act_patch_attn_head_all_pos_every`, every cell; rows past the last kv head are zero."""
    base, donor, *_ = two_clips(any_model, *SHORT)
    _, cache = any_model.run_with_cache(donor)
    found = patching.get_act_patch_attn_head_all_pos_every(any_model, base, cache, metric)
    axes = ("layer", "head")
    for row, kind in enumerate(HEADS):
        site = "z" if kind == "out" else kind
        for layer in range(any_model.cfg.n_layers):
            for head in range(any_model.cfg.n_heads):
                cell = found[row, layer, head]
                if head >= n_heads(any_model, site):
                    assert cell == 0
                    continue
                part = where(site, axes, [layer, head])
                point = f"blocks.{layer}.{SITES[site]}"
                assert torch.equal(cell, by_hand(any_model, base, cache, point, part))


@torch.no_grad()
def test_all_heads_by_position_at_once(any_model: HookedALM) -> None:
    """`get_act_patch_attn_head_by_pos_every`, one cell of each kind in each layer."""
    base, donor, *_ = two_clips(any_model, *SHORT)
    _, cache = any_model.run_with_cache(donor)
    found = patching.get_act_patch_attn_head_by_pos_every(any_model, base, cache, metric)
    cfg = any_model.cfg
    assert tuple(found.shape) == (5, cfg.n_layers, base.shape[1], cfg.n_heads)
    for row, kind in enumerate(HEADS):
        site = "z" if kind == "out" else kind
        axes = ("layer", "pos" if site != "pattern" else "dest_pos", "head")
        for layer in range(cfg.n_layers):
            pos, head = base.shape[1] - 1 - layer, layer % n_heads(any_model, site)
            part = where(site, axes, [layer, pos, head])
            expected = by_hand(any_model, base, cache, f"blocks.{layer}.{SITES[site]}", part)
            assert torch.equal(found[row, layer, pos, head], expected)


@torch.no_grad()
def test_all_of_a_block_at_once(any_model: HookedALM) -> None:
    """`get_act_patch_block_every`, every cell; the whole first stream is the donor's run."""
    base, donor, *_ = two_clips(any_model, *SHORT)
    clean, cache = any_model.run_with_cache(donor)
    found = patching.get_act_patch_block_every(any_model, base, cache, metric)
    for row, site in enumerate(("resid_pre", "attn_out", "mlp_out")):
        for layer in range(any_model.cfg.n_layers):
            for pos in range(base.shape[1]):
                point = f"blocks.{layer}.{SITES[site]}"
                expected = by_hand(any_model, base, cache, point, (EVERY, pos))
                assert torch.equal(found[row, layer, pos], expected)
    whole = by_hand(any_model, base, cache, "blocks.0.hook_resid_pre", (EVERY,))
    assert torch.equal(whole, metric(clean))
    assert not torch.equal(metric(clean), metric(any_model(base)))


METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "logit": lambda logits: logits[:, -1, 5],
    "margin": lambda logits: logits[:, -1, 5] - logits[:, -1, 6],
}
FRAMES, WORDS = [[10], [14], [10]], [5, 4, 5]


@torch.no_grad()
def test_results_per_example(any_model: HookedALM) -> None:
    """Two metrics, three rows of unequal length, and the statistics on top."""
    base, donor, *_ = two_clips(any_model, FRAMES, WORDS)
    clean, cache = any_model.run_with_cache(donor)
    found = patching.get_act_patch_attn_head_out_all_pos(
        any_model, base, cache, METRICS, reduce="none", baseline=True
    )
    assert found.axis_names == ["layer", "head"]
    for layer, head in ((0, 0), (1, 5), (3, 2)):
        point = f"blocks.{layer}.attn.hook_z"
        for row, one in enumerate(METRICS.values()):
            expected = by_hand(any_model, base, cache, point, (EVERY, EVERY, head), one)
            assert torch.equal(found.values[row, layer, head], expected)
    unpatched = torch.stack([one(any_model(base)) for one in METRICS.values()])
    assert torch.equal(found.baseline, unpatched)
    logit = found["logit"]
    effect = logit.values - unpatched[0]
    assert torch.equal(logit.effect(), effect)
    assert torch.equal(logit.mean(), logit.values.mean(-1))
    scale = METRICS["logit"](clean) - unpatched[0]
    assert torch.equal(logit.normalized(METRICS["logit"](clean)), effect / scale)
    torch.testing.assert_close(logit.stderr(), logit.values.std(-1) / 3**0.5)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    flipped = (effect[..., None, :] * signs).mean(-1).abs()
    at_least = flipped >= effect.mean(-1, keepdim=True).abs() - 1e-9
    torch.testing.assert_close(logit.permutation_pvalue(), at_least.float().mean(-1))
    low, high = logit.bootstrap_ci(of_effect=True)
    # One resample in 27 draws the smallest of three values three times: more than 2.5 %.
    torch.testing.assert_close(low, effect.amin(-1))
    torch.testing.assert_close(high, effect.amax(-1))
    assert len(found.to_dataframe()) == found.values.numel()


@torch.no_grad()
def test_results_of_every_kind_per_example(any_model: HookedALM) -> None:
    """The stacked sweeps keep their rows, and name their kinds."""
    base, donor, *_ = two_clips(any_model, FRAMES, WORDS)
    _, cache = any_model.run_with_cache(donor)
    found = patching.get_act_patch_attn_head_all_pos_every(
        any_model, base, cache, METRICS["margin"], reduce="none", baseline=True
    )
    assert found.patch_type_names == list(HEADS)
    assert torch.equal(found.baseline, METRICS["margin"](any_model(base)))
    for row, kind in enumerate(HEADS):
        site = "z" if kind == "out" else kind
        head = n_heads(any_model, site) - 1
        part = where(site, ("layer", "head"), [2, head])
        point = f"blocks.2.{SITES[site]}"
        expected = by_hand(any_model, base, cache, point, part, METRICS["margin"])
        assert torch.equal(found.values[row, 2, head], expected)
    averaged = patching.get_act_patch_resid_mid(
        any_model, base, cache, METRICS["margin"], reduce="mean"
    )
    expected = by_hand(
        any_model, base, cache, "blocks.1.hook_resid_mid", (EVERY, 8), METRICS["margin"]
    )
    torch.testing.assert_close(averaged[1, 8], expected.mean())


def edge_metric(
    model: HookedALM,
    base: ALMInput,
    caches: tuple[ActivationCache, ActivationCache],
    part: str,
    source: tuple[int, int],
    target: tuple[int, int],
) -> Tensor:
    """The metric after one head heard another's clean output, by the algebra of that edge."""
    clean, corrupt = caches
    name = f"blocks.{source[0]}.attn.hook_z"
    delta = (clean[name] - corrupt[name])[:, :, source[1]] @ model.W_O[source]
    layer, head = target
    resid = corrupt[f"blocks.{layer}.hook_resid_pre"] + delta
    rms = (resid.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    normed = resid / rms * model.blocks[layer].ln1.w
    weight, bias = getattr(model, f"W_{part.upper()}"), getattr(model, f"b_{part.upper()}")
    new = normed @ weight[target] + bias[target]

    def write(value: Tensor, hook: object) -> Tensor:
        return value.index_copy(2, torch.tensor([head]), new.unsqueeze(2))

    return metric(
        model.run_with_hooks(base, fwd_hooks=[(f"blocks.{layer}.attn.hook_{part}", write)])
    )


@torch.no_grad()
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_direct_paths(any_model: HookedALM, heads: str, part: str) -> None:
    """One source into every later head; into k and v of grouped heads it refuses."""
    base, donor, *_ = two_clips(any_model)
    caches = any_model.run_with_cache(donor)[1], any_model.run_with_cache(base)[1]
    arguments = (any_model, base, *caches, metric, 0, 1, part)
    if heads == "gqa" and part != "q":
        with pytest.raises(ValueError, match="GQA/MQA"):
            patching.get_act_patch_direct_path(*arguments)
        return
    found = patching.get_act_patch_direct_path(*arguments, verbose=False)
    for target in ((1, 1), (2, 4), (3, 3)):
        expected = edge_metric(any_model, base, caches, part, (0, 1), target)
        torch.testing.assert_close(found[target], expected, **CLOSE)
    assert (found[0] == 0).all()
    assert (found[1:] - metric(any_model(base))).abs().amax() > 1e-3
    assert not any_model.cfg.use_split_qkv_input


@torch.no_grad()
def test_direct_paths_from_every_source(any_model: HookedALM, heads: str) -> None:
    """All pairs of heads, into v where each query head has its own."""
    part = "q" if heads == "gqa" else "v"
    base, donor, *_ = two_clips(any_model, *SHORT)
    caches = any_model.run_with_cache(donor)[1], any_model.run_with_cache(base)[1]
    found = patching.get_act_patch_direct_path_all_sources(
        any_model, base, *caches, metric, part, verbose=False
    )
    for source, target in (((0, 2), (1, 4)), ((1, 0), (3, 5)), ((2, 3), (3, 0))):
        expected = edge_metric(any_model, base, caches, part, source, target)
        torch.testing.assert_close(found[(*source, *target)], expected, **CLOSE)
    upward = torch.ones(4, 4).triu(1).bool()[:, None, :, None].expand_as(found)
    assert (found[~upward] == 0).all()
    assert (found[upward] != 0).all()
