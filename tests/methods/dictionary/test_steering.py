"""Latents that tell rows apart, and edits by them beside edits of the same size."""

import pytest
import torch
from torch import Tensor

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.steering import (
    Activity,
    as_active,
    differing,
    exchange,
    most_frequent,
    shift,
    suppress,
)
from peer_dictionaries import peer_dictionary, peer_numbers

GIVEN = peer_numbers("saelens", "topk")
SAE = peer_dictionary("topk", GIVEN)
ROWS = GIVEN["rows"]


def test_activity_whatever_the_batches() -> None:
    whole, parts = Activity.of(SAE, [ROWS]), Activity.of(SAE, ROWS.split(4))
    features = SAE.encode(ROWS)
    torch.testing.assert_close(whole.mean, features.mean(0))
    torch.testing.assert_close(whole.frequency, (features > 0).float().mean(0))
    torch.testing.assert_close(whole.rows, ROWS.mean(0))
    torch.testing.assert_close(parts.mean, whole.mean)
    pooled = Activity.pooled([Activity.of(SAE, [some]) for some in (ROWS[:3], ROWS[3:])])
    for name in ("mean", "frequency", "rows"):
        torch.testing.assert_close(getattr(pooled, name), getattr(whole, name))
    assert pooled.n == whole.n == len(ROWS)
    with pytest.raises(InputError, match="pooling activations: got none"):
        Activity.pooled([])
    with pytest.raises(InputError, match="got no rows"):
        Activity.of(SAE, [])


def test_latents_that_differ() -> None:
    """Rows that were pushed along one latent's direction have that latent first."""
    pushed = ROWS + 9 * SAE.W_dec[17]
    found = differing(Activity.of(SAE, [pushed]), Activity.of(SAE, [ROWS]), 3)
    assert int(found[0]) == 17
    assert len(found) == 3
    frequent = most_frequent(Activity.of(SAE, [pushed]), 1)
    assert int(frequent[0]) == 17
    with pytest.raises(InputError, match="choosing 41 latents"):
        differing(Activity.of(SAE, [ROWS]), Activity.of(SAE, [ROWS]), 41)


def test_others_that_are_as_active() -> None:
    activity = Activity(
        torch.tensor([5.0, 1.0, 4.9, 1.2, 9.0, 0.0]), torch.ones(6), torch.ones(2), 3
    )
    assert sorted(as_active(torch.tensor([0, 1]), activity, seed=0).tolist()) == [2, 3]
    with pytest.raises(InputError, match="has 2 others"):
        as_active(torch.tensor([0, 1, 2, 3]), activity, seed=0)


def test_suppressing() -> None:
    chosen = differing(Activity.of(SAE, [ROWS[:10]]), Activity.of(SAE, [ROWS[10:]]), 6)
    assert torch.equal(suppress(SAE, chosen, 0.0)(ROWS), ROWS)
    features = SAE.encode(ROWS)
    error = ROWS - SAE.decode(features)
    without = features.index_fill(1, chosen, 0.0)
    torch.testing.assert_close(suppress(SAE, chosen, 1.0)(ROWS), SAE.decode(without) + error)
    part = (features[:, chosen] @ SAE.W_dec[chosen]).detach()
    assert part.abs().max() > 0.5
    for alpha in (0.5, 3.0):
        torch.testing.assert_close(suppress(SAE, chosen, alpha)(ROWS), ROWS - alpha * part)


def test_a_shift_moves_rows_as_far() -> None:
    chosen = torch.tensor([1, 2, 3])
    like, direction = suppress(SAE, chosen, 1.0), torch.arange(1.0, 13.0)

    def moved(edit: object) -> Tensor:
        found: Tensor = edit(ROWS) - ROWS  # type: ignore[operator]
        return found

    ours, theirs = moved(shift(direction, like)), moved(like)
    torch.testing.assert_close(ours.norm(dim=-1), theirs.norm(dim=-1))
    along = ours[theirs.norm(dim=-1) > 0] @ torch.nn.functional.normalize(direction, dim=0)
    torch.testing.assert_close(along, theirs.norm(dim=-1)[theirs.norm(dim=-1) > 0])


def test_exchanging() -> None:
    chosen, donor = torch.tensor([1, 4, 17]), ROWS.flip(0)
    theirs, none = SAE.encode(donor), torch.tensor([], dtype=torch.int64)
    assert torch.equal(exchange(SAE, none, theirs)(ROWS), ROWS)
    assert torch.equal(exchange(SAE, chosen, theirs, 0.0)(ROWS), ROWS)
    features = SAE.encode(ROWS)
    error = ROWS - SAE.decode(features)
    # All features exchanged, what is left of x is its error.
    every = exchange(SAE, torch.arange(SAE.cfg.d_sae), theirs)(ROWS)
    torch.testing.assert_close(every, SAE.decode(theirs) + error)
    moved = exchange(SAE, chosen, theirs)(ROWS) - ROWS
    expected = sum((theirs[:, i] - features[:, i])[:, None] * SAE.W_dec[i] for i in chosen.tolist())
    torch.testing.assert_close(moved, expected)
    mean = theirs.mean(0)
    features[:, chosen] = mean[chosen]
    found = exchange(SAE, chosen, mean, 0.5)(ROWS)
    torch.testing.assert_close(found, 0.5 * ROWS + 0.5 * (SAE.decode(features) + error))
