"""What a model is asked, tool by tool: a model in pieces must answer as the whole one does."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_alm import ALMInput, HookedALM
from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.patching.donors import Mean
from hooked_alm.methods.patching.metrics import KL, LogitDiff, OnLogits
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import patch_chains, patch_edges, path_patch
from hooked_alm.methods.reading.attention_mass import attention_mass
from hooked_alm.methods.reading.divergence import compare_depths, lockstep
from hooked_alm.methods.reading.encoder_lens import encoder_lens
from hooked_alm.methods.reading.head_norms import HeadMeter
from hooked_alm.methods.reading.lens import logit_lens
from hooked_alm.methods.reading.segment_mass import MassMeter
from hooked_alm.methods.reading.stream_norms import stream_norms
from hooked_alm.methods.reading.tuned_lens import TunedLens
from pretended import bare

Prompts = tuple[ALMInput, ALMInput]
Tool = Callable[[HookedALM, Prompts], Any]
METRIC = LogitDiff(answer=5, other=11)
TAIL = OnLogits(lambda logits: logits[:, -3:].flatten(1))


def run(model: HookedALM, prompts: Prompts) -> Any:
    return model(prompts[0]), model(prompts[0], "loss")


def every_point(model: HookedALM, prompts: Prompts) -> Any:
    names = model.matching(lambda name: True)
    return dict(model.run_with_cache(prompts[0], names_filter=names)[1].items())


def edited(model: HookedALM, prompts: Prompts) -> Any:
    hooks = [
        (name, lambda value, hook: value * 1.5)
        for name in ("blocks.0.attn.hook_pattern", "blocks.1.hook_resid_mid", "hook_embed")
    ]
    return model.run_with_hooks(prompts[0], fwd_hooks=hooks)


def some_blocks(model: HookedALM, prompts: Prompts) -> Any:
    resid = model(prompts[0], stop_at_layer=1)
    return resid, model(resid, start_at_layer=1, inputs=prompts[0])


def generated(model: HookedALM, prompts: Prompts) -> Any:
    kinds = (True, False)
    return [
        model.generate(prompts[0], max_new_tokens=3, use_past_kv_cache=kind, return_type="tokens")
        for kind in kinds
    ]


def views(model: HookedALM, prompts: Prompts) -> Any:
    names = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_E", "W_U", "b_Q", "b_O", "b_U")
    found = {name: getattr(model, name) for name in names}
    return {**found, "residual": model.tokens_to_residual_directions(torch.tensor([3, 4]))}


def exported(model: HookedALM, prompts: Prompts) -> Any:
    return model.to_hooked_transformer_state_dict()


def decomposed(model: HookedALM, prompts: Prompts) -> Any:
    _, cache = model.run_with_cache(prompts[0])
    stream = cache.decompose_resid(layer=-1, mode="attn")
    return stream, cache.stack_head_results(layer=-1), cache.logit_attrs(stream, tokens=5)


def lenses(model: HookedALM, prompts: Prompts) -> Any:
    lens = TunedLens.untrained(model)
    lens.check(model)
    return [logit_lens(model, prompts[0], [3, 7]), logit_lens(model, prompts[0], [1], lens=lens)]


def compared(model: HookedALM, prompts: Prompts) -> Any:
    runs = [one[[0]] for one in prompts]
    positions = torch.tensor([[len_ - 2, len_ - 1] for len_ in (one.shape[1] for one in runs)])
    depths = lockstep(model, runs, positions)
    return compare_depths(model, depths, torch.tensor([[3, 4], [5, 6]]), [(0, 1)])


def attended(model: HookedALM, prompts: Prompts) -> Any:
    return attention_mass(model, prompts[0], ["text"])


def segments(model: HookedALM, prompts: Prompts) -> Any:
    """Of one row without pads, whose first half is an instruction."""
    x = prompts[0][[int(prompts[0].attention_mask.sum(1).argmax())]]
    n = x.shape[1]
    ranges = {"sink": [[(0, 1)]], "text": [[(1, n // 2)]], "prior_output": [[(n // 2, n)]]}
    x = replace(x, spans=replace(x.spans, ranges=ranges))
    meter = MassMeter(model, x, torch.arange(n // 2, n))
    with model.hooks(fwd_hooks=meter.hooks()):
        model(x, None)
    return meter.result()


def head_norms(model: HookedALM, prompts: Prompts) -> Any:
    return HeadMeter(model)(prompts[0]), HeadMeter(model, token_agg="all")(prompts[0])


def swept(model: HookedALM, prompts: Prompts) -> Any:
    """Rows that change, keys that a cell has of its own, and the pattern."""
    options: dict[str, Any] = {"layers": [0, 1], "places": ["readout"], "policy": "truncate"}
    return [
        patch(model, *prompts, METRIC, site="resid_pre", **options),
        patch(model, *prompts, TAIL, site="v", heads=[1], **{**options, "places": ["text"]}),
        patch(model, *prompts, METRIC, site="pattern", heads=[0], **options),
    ]


def swept_otherwise(model: HookedALM, prompts: Prompts) -> Any:
    """By other metrics, donors and engines."""
    options: dict[str, Any] = {"site": "z", "places": ["readout"], "layers": [1]}
    base, donor = prompts
    return [
        patch(model, base, donor, KL(), **options),
        patch(model, base, Mean(donor), METRIC, **options),
        patch(model, base, donor, METRIC, engine="hooks", **options),
    ]


def paths(model: HookedALM, prompts: Prompts) -> Any:
    senders, receivers = ["blocks.0.attn.hook_z[1]"], ["blocks.1.attn.hook_q[0]", "logits"]
    return [
        path_patch(model, *prompts, METRIC, senders, receivers, mode=mode, places=["readout"],
                   policy="truncate")
        for mode in ("edge", "ioi")
    ]  # fmt: skip


def edges_and_chains(model: HookedALM, prompts: Prompts) -> Any:
    some = [("blocks.0.attn.hook_z[0]", "blocks.1.attn.hook_v[1]"), ("hook_embed", "logits")]
    chain = ("blocks.0.attn.hook_z[0]", "blocks.1.attn.hook_q[1]", "logits")
    return [
        patch_edges(model, *prompts, METRIC, {"some": some}, places=["readout"], policy="truncate"),
        patch_chains(model, *prompts, METRIC, [chain], place="readout", policy="truncate"),
    ]


def attributed(model: HookedALM, prompts: Prompts) -> Any:
    options: dict[str, Any] = {"places": ["readout"], "policy": "truncate"}
    senders = ["blocks.0.attn.hook_z[*]", "blocks.0.hook_mlp_out"]
    receivers = ["blocks.1.attn.hook_q[*]", "blocks.1.hook_mlp_in", "logits"]
    return [
        attribute_nodes(model, *prompts, METRIC, site="z", heads="each", **options),
        attribute_edges(model, *prompts, METRIC, senders, receivers, **options),
    ]


def norms(model: HookedALM, prompts: Prompts) -> Any:
    return stream_norms(model, prompts[0])


def encoder_swept(model: HookedALM, prompts: Prompts) -> Any:
    encoder = model.towards("encoder")
    return [
        patch(encoder, *prompts, METRIC, site=site, places=[(2, 9)], layers=[0, 1])
        for site in ("resid_pre", "v")
    ]


def memory_swept(model: HookedALM, prompts: Prompts) -> Any:
    return [
        patch(model, *prompts, METRIC, site=site, places=places, heads=[1], policy="truncate")
        for site, places in (("cross_attn.z", ["readout"]), ("cross_attn.v", [7]))
    ]


def paths_out_of_the_encoder(model: HookedALM, prompts: Prompts) -> Any:
    senders = ["audio.encoder.blocks.1.attn.hook_z[*]", "audio.encoder.hook_embed"]
    receivers = ["blocks.0.cross_attn.hook_k[1]", "blocks.1.cross_attn.hook_v[0]"]
    return path_patch(model, *prompts, METRIC, senders, receivers, places=["audio"])


def encoder_read(model: HookedALM, prompts: Prompts) -> Any:
    return encoder_lens(model, prompts[0])


TEXT: dict[str, Tool] = {
    tool.__name__: tool
    for tool in (
        run, every_point, edited, some_blocks, generated, views, exported, decomposed, lenses,
        compared, attended, segments, head_norms, swept, swept_otherwise, paths, edges_and_chains,
        attributed, norms,
    )
}  # fmt: skip
HEARING = {**TEXT, "encoder_swept": encoder_swept}
WHISPER = {
    tool.__name__: tool
    for tool in (
        run, every_point, edited, some_blocks, generated, views, norms, swept_otherwise,
        encoder_swept, memory_swept, paths_out_of_the_encoder, encoder_read,
    )
}  # fmt: skip
ENDS = ("run", "views", "lenses", "compared")
"""Tools that read the embedding, the final norm or the unembedding by themselves."""
EARS = ("run", "encoder_swept", "paths_out_of_the_encoder")
"""Tools that reach into the encoder."""
ALONG = (
    "run", "decomposed", "attended", "segments", "head_norms", "swept", "edges_and_chains",
    "attributed",
)  # fmt: skip
"""Tools that add up what several blocks have made."""


def numbers(value: Any, name: str = "") -> dict[str, Any]:
    """Every array and number of a result by the way to it; tensors from wherever they are."""
    if isinstance(value, Tensor):
        return {name: bare(value).detach().float().cpu().numpy()}
    if isinstance(value, np.ndarray) or value is None:
        return {name: value}
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif hasattr(value, "__dataclass_fields__"):
        parts = [(field, getattr(value, field)) for field in value.__dataclass_fields__]
    else:
        return {name: value} if isinstance(value, int | float | str) else {}
    found: dict[str, Any] = {}
    for key, part in parts:
        found |= numbers(part, f"{name}.{key}")
    return found


def same(found: Any, expected: Any, rounding: float = 0.0) -> list[str]:
    """Names of what differs between two results: bit by bit, or numbers by more than rounding."""
    ours, theirs = numbers(found), numbers(expected)
    assert ours.keys() == theirs.keys()
    return [
        name
        for name in ours
        if not _is_same(np.asarray(ours[name]), np.asarray(theirs[name]), rounding)
    ]


def _is_same(ours: np.ndarray, theirs: np.ndarray, rounding: float) -> bool:
    if rounding and ours.dtype.kind == theirs.dtype.kind == "f" and ours.shape == theirs.shape:
        return np.allclose(ours, theirs, rtol=0, atol=rounding, equal_nan=True)
    return np.array_equal(ours, theirs, equal_nan=_is_number(ours))


def _is_number(value: Any) -> bool:
    return np.asarray(value).dtype.kind == "f"
