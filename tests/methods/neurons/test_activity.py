"""Logs of neurons against plain transformers under PyTorch hooks, in batches and in parts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_reference import with_positions
from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.methods.neurons import activity
from hooked_alm.methods.neurons.activity import ActivityLog, ItemActivity, item_activity
from hooked_alm.methods.statistics.class_neurons import class_activity
from hooked_alm.methods.statistics.moments import Moments
from operations import most_alive
from tiny import TinyModels, hf_inputs
from tolerances import PADDED_ROW

CLIPS, TEXTS = [[31], [60], [31], [45]], [6, 4, 9, 5]


@pytest.fixture(scope="module")
def gates(tiny_models: TinyModels) -> list[Tensor]:
    """Gates of every prompt by itself [pos, block, neuron], from hooks on the published model."""
    hf, found = tiny_models.hf("gqa"), []
    for clips, n in zip(CLIPS, TEXTS, strict=True):
        kept: list[Tensor] = []
        handles = [
            layer.mlp.act_fn.register_forward_hook(
                lambda _, given, out, kept=kept: kept.append(out[0])
            )
            for layer in hf.model.language_model.layers
        ]
        with torch.no_grad():
            hf(**with_positions(hf_inputs([clips], [n])))
        for handle in handles:
            handle.remove()
        found.append(torch.stack(kept, dim=1))
    return found


def logged(model: HookedALM, batches: list[list[int]], **options: str) -> list[ItemActivity]:
    found = []
    for some in batches:
        x = model.encode(**hf_inputs([CLIPS[i] for i in some], [TEXTS[i] for i in some]))
        found.append(item_activity(model, x, **options)[1])  # type: ignore[arg-type]
    return found


def log_of(parts: list[ItemActivity], classes: list[list[int | None]]) -> ActivityLog:
    log = ActivityLog.empty(2, *parts[0].fired.shape[1:])
    for one, whose in zip(parts, classes, strict=True):
        log.add(one, whose)
    return log


def test_it_is_what_hooks_on_the_published_model_see(
    tiny_models: TinyModels, gates: list[Tensor]
) -> None:
    single = logged(tiny_models.hooked("gqa"), [[0], [1], [2], [3]])
    log = log_of(single, [[1], [0], [1], [None]])
    rows = torch.cat([gates[0], gates[1], gates[2]])
    classes = torch.tensor([1] * len(gates[0]) + [0] * len(gates[1]) + [1] * len(gates[2]))
    expected = class_activity(rows.numpy(), classes.numpy(), 2)
    assert log.items.tolist() == [1, 2]
    assert log.rows.tolist() == [len(gates[1]), len(gates[0]) + len(gates[2])]
    np.testing.assert_array_equal(log.activity.lap, expected.lap)
    np.testing.assert_allclose(log.activity.mean, expected.mean, rtol=0, atol=1e-6)
    for one in (0, 1):  # I19: the moments of S-9
        moments = Moments()
        moments.update(rows[classes == one].numpy())
        np.testing.assert_allclose(log.std[one], moments.std(ddof=1), rtol=1e-4, atol=1e-6)
    every = rows.double()
    np.testing.assert_allclose(log.magnitude, every.square().mean(0).sqrt(), rtol=1e-6)


def test_batches_and_parts_are_the_whole(tiny_models: TinyModels) -> None:
    """A row of a batch is rounded elsewhere than by itself; but equal values give equal logs."""
    model, classes = tiny_models.hooked("gqa"), [0, 1, 0, 1]
    x = model.encode(**hf_inputs(CLIPS, TEXTS))
    single = [item_activity(model, x[row])[1] for row in range(4)]
    apart = log_of(single, [[0], [1], [0], [1]])
    every = item_activity(model, x)[1]
    log = log_of([every], [classes])
    assert log.rows.tolist() == apart.rows.tolist()
    for name in ("total", "squares"):
        ours, theirs = getattr(log, name), getattr(apart, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=200 * PADDED_ROW[torch.float32])
    split = [ItemActivity(*(one[part] for one in every)) for part in (slice(0, 1), slice(1, 4))]
    halves = [log_of([one], [whose]) for one, whose in zip(split, ([0], [1, 0, 1]), strict=True)]
    halves[0].merge(halves[1])
    in_turn = log_of(split, [[0], [1, 0, 1]])
    for name in ("items", "rows", "fired", "total", "squares"):
        assert torch.equal(getattr(in_turn, name), getattr(log, name))
        torch.testing.assert_close(
            getattr(halves[0], name), getattr(log, name), rtol=1e-12, atol=1e-12
        )


def test_a_span_is_read_alone(tiny_models: TinyModels, gates: list[Tensor]) -> None:
    model = tiny_models.hooked("gqa")
    for span in ("readout", "audio", "text"):
        x = model.encode(**hf_inputs([CLIPS[0]], [TEXTS[0]]))
        at = x.spans.positions(span, 0)
        (found,) = logged(model, [[0]], span=span)
        assert at
        assert found.rows.tolist() == [len(at)]
        torch.testing.assert_close(found.total[0], gates[0][at].sum(0), rtol=0, atol=1e-5)
        assert torch.equal(found.fired[0], (gates[0][at] > 0).float().sum(0))


def test_a_log_holds_sums_and_a_block_whatever_the_positions(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of longer prompts not a byte more: no value of a point is kept, nor any copy of one."""
    model = tiny_models.hooked("gqa")
    monkeypatch.setattr(activity, "BLOCK_BYTES", {True: (block := 4 * 4 * 34)})
    beyond = []
    for n in (20, 80):
        x = model.encode(**hf_inputs([[31], [31]], [n, n]))
        with torch.no_grad():
            alone = most_alive(lambda x=x: model(x))
        beyond.append(most_alive(lambda x=x: item_activity(model, x)) - alone)
        sums = sum(one.nbytes for one in item_activity(model, x)[1])
    of_a_point, ones = 2 * 2 * 3 * 34 * 4, 2 * 4 * 4
    assert max(beyond) <= sums + block + of_a_point + ones + 200
    assert block < 4 * 34 * 2 * x.shape[1] / 8
    values = torch.randn(80, 34)  # what is made of them hides behind what a forward holds
    beyond_values = most_alive(lambda: activity.summed(values)) - values.nbytes
    assert beyond_values <= 3 * 34 * 4 + block + 4 * 4


def test_blocks_of_positions_are_the_whole(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = logged(tiny_models.hooked("gqa"), [[0, 1]])
    monkeypatch.setattr(activity, "BLOCK_BYTES", {True: 7 * 4 * 34})
    (parts,) = logged(tiny_models.hooked("gqa"), [[0, 1]])
    assert torch.equal(parts.fired, whole.fired)
    torch.testing.assert_close(parts.total, whole.total, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts.squares, whole.squares, rtol=0, atol=1e-5)


def test_errors(tiny_models: TinyModels) -> None:
    model = tiny_models.hooked("gqa")
    with pytest.raises(InputError, match="looking up span 'label'"):
        logged(model, [[0]], span="label")
    log = ActivityLog.empty(2, 4, 34)
    with pytest.raises(InputError, match=r"got \[0, 0\] items"):
        _ = log.activity
    with pytest.raises(InputError, match="Merge logs of one model"):
        log.merge(ActivityLog.empty(3, 4, 34))
    (found,) = logged(model, [[0]])
    found.squares[0, 0, 0] = torch.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        log.add(found, [0])
