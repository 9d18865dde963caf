"""Enrichment against hooks by hand, by either engine; the card's numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_alm import HookedALM, InputError
from hooked_alm.methods.patching.enrich import Enriched, EnrichMode, enrich, enriching_states
from hooked_alm.methods.patching.metrics import Logits
from hooked_alm.methods.reading.lens import residual_rows
from tiny import N_LAYERS, hf_inputs
from tolerances import ENGINE

INPUTS = hf_inputs([[63], [23]], [9, 14])
TOKENS = (3, 77, 301)


def by_hand(
    model: HookedALM, block: int, states: Tensor, mode: EnrichMode, c: float, at: Tensor
) -> Tensor:
    """Logits at the readout; ``states`` are ``[batch, d_model]``."""
    x, entering, rows = model.encode(**INPUTS), list[Tensor](), torch.arange(2)

    def look(value: Tensor, hook: Any) -> None:
        entering.append(value[rows, at].clone())

    def write(value: Tensor, hook: Any) -> Tensor:
        value, own = value.clone(), value[rows, at]
        value[rows, at] = {
            "add": own + c * states,
            "average": (own + states) / 2,
            "average_input": (entering[0] + states) / 2,
        }[mode]
        return value

    name = f"blocks.{block}.hook_resid_"
    hooks = [(f"{name}pre", look), (f"{name}post", write)]
    return model.run_with_hooks(x, fwd_hooks=hooks)[:, -1, list(TOKENS)]


@pytest.mark.parametrize("mode", ["add", "average", "average_input"])
@pytest.mark.parametrize("engine", ["fast", "hooks"])
@torch.no_grad()
def test_every_cell_is_the_run_by_hand(gqa: HookedALM, mode: EnrichMode, engine: Any) -> None:
    x = gqa.encode(**INPUTS)
    for at in (None, torch.tensor([[22], [20]])):
        states = residual_rows(gqa, x, at)[[0, 1, 3], :, 0]
        found = enrich(
            gqa, x, states, Logits(TOKENS), layers=[1, 3], mode=mode, coefficient=0.7,
            positions=at, engine=engine,
        )  # fmt: skip
        assert found.axes["source"] == (0, 1, 2)
        assert found.axes["layer"] == (1, 3)
        where = torch.tensor([26, 26]) if at is None else at[:, 0]
        for source in range(3):
            for place, block in enumerate((1, 3)):
                theirs = by_hand(gqa, block, states[source], mode, 0.7, where)
                np.testing.assert_allclose(
                    found.values[source, place], theirs, rtol=0,
                    atol=ENGINE[torch.float32] * np.abs(found.base).max(),
                )  # fmt: skip


def test_the_block_is_kept_by_one_average_and_skipped_by_the_other() -> None:
    """Input 2, output 5, donor 3: 4, and 2.5 by the published code."""
    one = np.zeros(1, int)
    found = [
        Enriched(mode, 1.0, torch.tensor([[3.0]]), entering, one, one)(
            torch.tensor([[5.0]]), one
        ).item()
        for mode, entering in {"average": None, "average_input": torch.tensor([[2.0]])}.items()
    ]
    assert found == [4.0, 2.5]


@torch.no_grad()
def test_nothing_is_added_by_0_and_scale_is_normed_away(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    states = residual_rows(gqa, x)[:, :, 0]
    limit = ENGINE[torch.float32] * 10
    nothing = enrich(gqa, x, states, Logits(TOKENS), coefficient=0.0)
    np.testing.assert_allclose(nothing.effect, 0, atol=limit)
    # A multiple of the last state is the last state to the final norm, its eps aside.
    last = enrich(gqa, x, states[-1:], Logits(TOKENS), layers=[N_LAYERS - 1], coefficient=0.5)
    np.testing.assert_allclose(last.effect, 0, atol=1e-3)
    assert np.abs(enrich(gqa, x, states, Logits(TOKENS)).effect).max() > 0.1


def test_controls_are_another_depth_another_clip_and_noise_as_long() -> None:
    rows = torch.arange(4 * 2 * 3.0).reshape(4, 2, 3)
    other = rows + 100
    draws = [np.random.default_rng(seed) for seed in (0, 1)]
    found = enriching_states(rows, 1, ("other_depth", "other_clip", "noise"), draws, other)
    assert [*found] == ["self", "other_depth", "other_clip", "noise"]
    assert torch.equal(found["self"], rows[1])
    assert torch.equal(found["other_clip"], other[1])
    for row, state in enumerate(found["other_depth"]):
        # Never the source, nor the last depth, which no block reads.
        assert any(torch.equal(state, rows[depth, row]) for depth in (0, 2))
    torch.testing.assert_close(found["noise"].norm(dim=-1), rows[1].norm(dim=-1))
    assert (found["noise"] - rows[1]).abs().max() > 1
    alone = enriching_states(rows[:2], 0, ("other_depth", "other_clip"), draws)
    assert [*alone] == ["self"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [-1, 4]}, r"got \[-1, 4\] in layers, expected 0 to 3"),
        ({"states": torch.zeros(1, 3, 54)}, r"got states of \(1, 3, 54\)"),
    ],
)
def test_what_cannot_be_is_refused(gqa: HookedALM, options: dict[str, Any], message: str) -> None:
    given = {"states": torch.zeros(1, 2, 54), **options}
    with pytest.raises(InputError, match=message):
        enrich(gqa, gqa.encode(**INPUTS), metric=Logits(TOKENS), **given)
