"""TransformerLens' attribution patching and faithfulness, with audio, against Hugging Face."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.tools.analysis import (
    EdgeAttributionConfig,
    FaithfulnessConfig,
    attribution_patch,
    faithfulness,
)

from hf_reference import with_positions
from hooked_alm import HookedALM
from tiny import TinyModels
from tolerances import ATTRIBUTION, RECOVERED
from two_clips import CLOSE, TOKEN, metric, two_clips

EDGES = EdgeAttributionConfig(granularity="edge")
READERS = {"q_input": "q_proj", "k_input": "k_proj", "v_input": "v_proj"}
Recorded = dict[str, Tensor]


def at_clip(logits: Tensor) -> Tensor:
    """The metric at the last audio position, where the embedding itself is read."""
    return logits[0, 4, TOKEN]


def hf_run(hf: Any, inputs: dict[str, Any]) -> tuple[Tensor, Recorded]:
    """Logits and activations of Hugging Face's model, still in the graph.

    Names are those of attribution's nodes and readers, ``{layer}.{module}`` inside the blocks.
    """
    found: Recorded = {}

    def keep_input(name: str) -> Callable[..., None]:
        return lambda _, args: found.__setitem__(name, args[0])

    def keep_output(name: str) -> Callable[..., None]:
        return lambda _, args, out: found.__setitem__(name, out)

    decoder = hf.model.language_model
    handles = [
        decoder.layers[0].register_forward_pre_hook(keep_input("embed")),
        decoder.norm.register_forward_pre_hook(keep_input("final")),
    ]
    for layer, block in enumerate(decoder.layers):
        inputs_of = {
            "pre": block,
            "z": block.self_attn.o_proj,
            "mid": block.post_attention_layernorm,
        }
        outputs_of = {"mlp": block.mlp} | {
            name: getattr(block.self_attn, name) for name in READERS.values()
        }
        for name, module in inputs_of.items():
            handles.append(module.register_forward_pre_hook(keep_input(f"{layer}.{name}")))
        for name, module in outputs_of.items():
            handles.append(module.register_forward_hook(keep_output(f"{layer}.{name}")))
    logits = hf(**with_positions(inputs)).logits
    for handle in handles:
        handle.remove()
    return logits, found


def gradients(logits: Tensor, found: Recorded) -> Recorded:
    """Of the metric, at every activation."""
    return dict(zip(found, torch.autograd.grad(metric(logits), list(found.values())), strict=True))


def head_columns(hf: Any, head: int) -> slice:
    """Where a head stands on the flat axis of its projection."""
    d_head = hf.model.language_model.layers[0].self_attn.head_dim
    return slice(head * d_head, (head + 1) * d_head)


@pytest.fixture
def runs(any_model: HookedALM, heads: str, tiny_models: TinyModels) -> dict[str, Any]:
    """Both inputs, Hugging Face's model, what changed between the runs, and base gradients."""
    hf = tiny_models.hf("mha" if heads == "mha" else "gqa")
    base, donor, hf_base, hf_donor = two_clips(any_model)
    base_logits, corrupt = hf_run(hf, hf_base)
    clean_logits, clean = hf_run(hf, hf_donor)
    return dict(
        hf=hf, base=base, donor=donor, corrupt=corrupt, clean=clean, base_logits=base_logits,
        clean_logits=clean_logits, gradients=gradients(base_logits, corrupt),
        change={name: (clean[name] - corrupt[name]).detach() for name in corrupt},
    )  # fmt: skip


def test_node_scores_are_change_times_gradient(any_model: HookedALM, runs: dict[str, Any]) -> None:
    """Every node, against autograd through the published model; the clip's embedding is heard."""
    scores = attribution_patch(any_model, runs["donor"], runs["base"], metric).node_scores
    size = max(map(abs, scores.values()))
    assert len(scores) == 8 * (1 + 4 * (6 + 1))
    for node, score in scores.items():
        columns = slice(None)
        name = {"embed": "embed", "mlp_out": f"{node.layer}.mlp"}.get(node.kind, f"{node.layer}.z")
        if node.kind == "attn_head_out":
            columns = head_columns(runs["hf"], node.head)
        part = (0, node.position, columns)
        expected = (runs["change"][name][part] * runs["gradients"][name][part]).sum()
        assert score == pytest.approx(float(expected), abs=ATTRIBUTION * size)
    heard = [node.position for node, s in scores.items() if node.kind == "embed" and s != 0]
    assert heard == runs["base"].spans.positions("audio", 0)


def written(runs: dict[str, Any], layer: int, kind: str, head: int = 0) -> Tensor:
    """How a writer's contribution to the stream changed, ``[pos, d_model]``."""
    if kind == "embed":
        return runs["change"]["embed"][0]
    if kind == "mlp_out":
        return runs["change"][f"{layer}.mlp"][0]
    columns = head_columns(runs["hf"], head)
    weight = runs["hf"].model.language_model.layers[layer].self_attn.o_proj.weight[:, columns]
    return (runs["change"][f"{layer}.z"][0, :, columns] @ weight.T).detach()


def read(runs: dict[str, Any], layer: int, kind: str, head: int = 0) -> Tensor:
    """Gradient of the metric at what one reader reads, ``[pos, d_model]``.

    For k and v the reader is the kv head: all query heads of its group together.
    """
    decoder = runs["hf"].model.language_model
    block = decoder.layers[layer]
    if kind == "logits":
        stream = runs["corrupt"]["final"].detach().requires_grad_()
        logits = runs["hf"].lm_head(decoder.norm(stream))
        return torch.autograd.grad(metric(logits), stream)[0][0]
    steps: list[nn.Module]
    if kind == "mlp_in":
        stream, steps = runs["corrupt"][f"{layer}.mid"], [block.post_attention_layernorm, block.mlp]
        upstream = runs["gradients"][f"{layer}.mlp"]
    else:
        projection = READERS[kind]
        stream = runs["corrupt"][f"{layer}.pre"]
        steps = [block.input_layernorm, getattr(block.self_attn, projection)]
        upstream = torch.zeros_like(runs["gradients"][f"{layer}.{projection}"])
        columns = (..., head_columns(runs["hf"], head))
        upstream[columns] = runs["gradients"][f"{layer}.{projection}"][columns]
    stream = stream.detach().requires_grad_()
    return torch.autograd.grad(nn.Sequential(*steps)(stream), stream, upstream)[0][0]


def test_edge_scores_are_change_times_the_readers_gradient(
    any_model: HookedALM, heads: str, runs: dict[str, Any]
) -> None:
    """Edges of every kind; grouped heads, which have no edge of their own, are refused."""
    if heads == "gqa":
        with pytest.raises(ValueError, match="GQA/MQA"):
            attribution_patch(any_model, runs["donor"], runs["base"], metric, EDGES)
        return
    found = attribution_patch(any_model, runs["donor"], runs["base"], metric, EDGES)
    by_ends: dict[tuple[Any, ...], Tensor] = {}
    for (writer, reader), score in found.edge_scores.items():
        ends = (writer.kind, writer.layer, writer.head, reader.kind, reader.layer, reader.head)
        by_ends.setdefault(ends, torch.zeros(8))[reader.position] = score
    size = max(map(abs, found.edge_scores.values()))
    n_groups = 1 if heads == "mha" else 3

    def score_of(writer: tuple[Any, ...], reader: tuple[Any, ...]) -> Tensor:
        kind, layer, head = reader
        if kind not in ("k_input", "v_input"):
            return by_ends[(*writer, *reader)]
        group = range(head * n_groups, (head + 1) * n_groups)
        return torch.stack([by_ends[(*writer, kind, layer, one)] for one in group]).sum(0)

    for layer in (1, 3):
        writers = [("embed", None, None), ("attn_head_out", 0, 4), ("mlp_out", 0, None)]
        readers = [("q_input", layer, 5), ("k_input", layer, 1), ("v_input", layer, 0),
                   ("mlp_in", layer, None), ("logits", 3, None)]  # fmt: skip
        for writer in writers:
            for reader in readers:
                change = written(runs, writer[1] or 0, writer[0], writer[2] or 0)
                gradient = read(runs, reader[1], reader[0], reader[2] or 0)
                expected = (change * gradient).sum(-1)
                torch.testing.assert_close(
                    score_of(writer, reader), expected, atol=ATTRIBUTION * size, rtol=0
                )
    nodes = attribution_patch(any_model, runs["donor"], runs["base"], metric).node_scores
    for node, score in nodes.items():
        assert found.node_scores[node] == pytest.approx(score, abs=10 * ATTRIBUTION * size)
    assert not any_model.cfg.use_attn_result
    assert not any_model.cfg.use_split_qkv_input


def test_faithfulness(any_model: HookedALM, heads: str, runs: dict[str, Any]) -> None:
    """All edges restore the clean run, none leave the other; one edge is one sum of streams."""
    clean, corrupt = runs["donor"], runs["base"]
    if heads == "gqa":
        with pytest.raises(ValueError, match="GQA/MQA"):
            faithfulness(any_model, clean, corrupt, at_clip, [])
        return
    scores = attribution_patch(any_model, clean, corrupt, at_clip, EDGES)
    everything = faithfulness(any_model, clean, corrupt, at_clip, list(scores.edge_scores))
    assert everything.recovered == pytest.approx(1.0, abs=RECOVERED)
    full, bottom = (float(at_clip(runs[key]).detach()) for key in ("clean_logits", "base_logits"))
    assert everything.full_metric == pytest.approx(full, abs=CLOSE["atol"])
    assert everything.corrupt_metric == pytest.approx(bottom, abs=CLOSE["atol"])
    nothing = faithfulness(any_model, clean, corrupt, at_clip, [])
    assert nothing.recovered == pytest.approx(0.0, abs=RECOVERED)
    # The embedding heard by the logits alone: its change, added to the other run's last stream.
    direct = [
        (writer, reader)
        for writer, reader in scores.edge_scores
        if (writer.kind, reader.kind) == ("embed", "logits")
    ]
    hf = runs["hf"]
    stream = runs["corrupt"]["final"] + runs["change"]["embed"]
    by_hand = float(at_clip(hf.lm_head(hf.model.language_model.norm(stream))).detach())
    found = faithfulness(any_model, clean, corrupt, at_clip, direct)
    assert found.circuit_size == len(direct) == 8
    assert abs(by_hand - bottom) > 1e-2
    assert found.recovered == pytest.approx((by_hand - bottom) / (full - bottom), abs=RECOVERED)
    assert found.edge_class_recovered["into_logits"] == pytest.approx(0.0, abs=RECOVERED)


def test_mean_ablation_takes_token_ids_alone(any_model: HookedALM) -> None:
    """TransformerLens compares calibration prompts by their ids: with audio it stops, loudly."""
    clean, corrupt, *_ = two_clips(any_model)
    config = FaithfulnessConfig(ablation="mean")
    with pytest.raises(AttributeError, match="dtype"):
        faithfulness(any_model, clean, corrupt, metric, [], config, mean_tokens=clean)
