"""What a sweep ran is gone when it returns, without waiting for a collector of cycles."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_runs import BASE, OTHER, TAIL
from hooked_alm import ALMInput, HookedALM
from hooked_alm.engine import runs
from hooked_alm.methods.attribution.edges import attribute_edges
from hooked_alm.methods.attribution.nodes import attribute_nodes
from hooked_alm.methods.neurons.gain import gain_neurons
from hooked_alm.methods.patching import measurement
from hooked_alm.methods.patching.metrics import LogitDiff
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.patching.paths import patch_chains, patch_edges, path_patch
from hooked_alm.methods.patching.pruning import prune_edges
from hooked_alm.methods.patching.row_edits import patch_rows

HEAD, QUERY, MLP = (
    "blocks.0.attn.hook_z[1]",
    "blocks.2.attn.hook_q_input[3]",
    "blocks.1.hook_mlp_in",
)
VALUE = "blocks.1.attn.hook_v_input[1]"
DIFF = LogitDiff(3, 11)
Call = Callable[[HookedALM, ALMInput, ALMInput], Any]
CALLS: dict[str, Call] = {
    "patch": lambda m, x, y: patch(m, x, y, TAIL, site="z", heads="each", places=["audio"]),
    "patch, hooks": lambda m, x, y: patch(m, x, y, TAIL, engine="hooks", layers=[1]),
    "patch_rows": lambda m, x, y: patch_rows(
        m, x, DIFF, {"zero": [torch.zeros_like] * len(x)}, "blocks.1.hook_resid_post"
    ),
    "path_patch": lambda m, x, y: path_patch(m, x, y, TAIL, [HEAD, "hook_embed"], [QUERY, MLP]),
    "path_patch, online": lambda m, x, y: path_patch(
        m, x, y, TAIL, [(HEAD, "blocks.1.hook_mlp_out")], [(MLP, QUERY)]
    ),
    "path_patch, ioi": lambda m, x, y: path_patch(m, x, y, TAIL, HEAD, [QUERY], mode="ioi"),
    "patch_edges": lambda m, x, y: patch_edges(m, x, y, TAIL, {"one": [(HEAD, QUERY)]}),
    "patch_chains": lambda m, x, y: patch_chains(m, x, y, TAIL, [(HEAD, VALUE, "logits")]),
    "prune_edges": lambda m, x, y: prune_edges(m, x, y, 0.1, candidates=[(HEAD, QUERY)]),
    "attribute_nodes": lambda m, x, y: attribute_nodes(m, x, y, DIFF, site="z", check=2),
    "attribute_nodes, qk_fix": lambda m, x, y: attribute_nodes(
        m, x, y, DIFF, site="k", qk_fix=True, check=2
    ),
    "gain_neurons": lambda m, x, y: gain_neurons(m, x, TAIL, [[(0, 1), (2, 3)]], [-1.0, 1.0]),
    "attribute_edges": lambda m, x, y: attribute_edges(m, x, y, DIFF, HEAD, [QUERY], check=1),
    "attribute_edges, ig": lambda m, x, y: attribute_edges(
        m, x, y, DIFF, HEAD, [QUERY], method="eap-ig", steps=2
    ),
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tensors() -> dict[int, Tensor]:
    """Every tensor that Python holds."""
    return {id(one): one for one in gc.get_objects() if issubclass(type(one), Tensor)}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", CALLS)
def test_no_activation_outlives_its_sweep(
    gqa: HookedALM, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    x, other = gqa.encode(**BASE), gqa.encode(**OTHER)
    CALLS[name](gqa, x, other)  # clips are encoded once, and kept on purpose
    held: list[weakref.ref[Tensor]] = []

    def record(*arguments: Any, **options: Any) -> Any:
        made = runs.record_runs(*arguments, **options)
        held.extend(weakref.ref(one) for record in made.records for one in record.resid)
        held.extend(weakref.ref(one) for one in made.kept.values())
        return made

    monkeypatch.setattr(measurement, "record_runs", record)
    before = tensors()
    CALLS[name](gqa, x, other)  # whose arrays are tensors of their own
    new = [one for key, one in tensors().items() if key not in before]
    assert held or "hooks" in name
    assert not [ref for ref in held if ref() is not None]
    assert [tuple(one.shape) for one in new if one.numel() > 1] == []


@pytest.mark.usefixtures("no_collector")
def test_the_check_can_fail() -> None:
    before = tensors()
    circle: list[Any] = [torch.zeros(7)]
    circle.append(circle)
    del circle
    assert [tuple(v.shape) for k, v in tensors().items() if k not in before] == [(7,)]
