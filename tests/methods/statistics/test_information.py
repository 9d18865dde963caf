"""Information and weighted depths against numbers by hand."""

import numpy as np
import pytest
import torch

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.information import (
    drops_from_peak,
    information_depths,
    information_scores,
    weighted_depths,
)

CURVE = [0.2, 0.25, 0.5, 0.8, 0.6]


def test_weighted_depth_of_the_card() -> None:
    """Weights 0, .01, .26, .56, .36; a plateau adds one of .36 at depth 5."""
    found = weighted_depths(np.array([CURVE]), 5)
    assert found.tolist() == pytest.approx([3.0672], abs=5e-5)
    assert weighted_depths(np.array([[*CURVE, 0.6]]), 5).tolist() == pytest.approx(
        [3.5161], abs=5e-5
    )


def test_no_depth_where_nothing_is_above_chance() -> None:
    found = weighted_depths(np.array([[0.2, 0.24, 0.1], [0.2, 0.2, 0.9]]), 5)
    assert np.isnan(found[0])
    assert found[1] == 2
    # The margin is a share of chance: 0.25 is more than 1.2 times 1/5, and less than 1.3 times.
    little = np.array([[0.2, 0.25, 0.2]])
    assert weighted_depths(little, 5).tolist() == [1.0]
    assert np.isnan(weighted_depths(little, 5, margin=0.3)).all()
    with pytest.raises(InputError, match="got 1 labels"):
        weighted_depths(np.array([CURVE]), 1)


def test_scores_by_hand() -> None:
    """One item at two depths, three labels with logits among a vocabulary of five."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 5.0, 0.0], [4.0, 4.0, 1.0, -2.0, 0.5]])
    scores, p = logits[:, None, :3], logits.double().softmax(-1)
    found = information_scores(scores, torch.tensor([1]), logits.logsumexp(-1)[:, None])
    assert found.hit[:, 0].tolist() == [1.0, 0.5]
    expected = p[:, 1] / p[:, :3].sum(-1)
    np.testing.assert_allclose(found.soft[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(found.mass[:, 0], p[:, :3].sum(-1), atol=1e-6)
    assert (found.mass <= 1).all()


def test_every_item_has_its_own_label() -> None:
    scores = torch.tensor([[[2.0, 1.0], [2.0, 1.0]]])
    found = information_scores(scores, torch.tensor([0, 1]), torch.zeros(1, 2))
    assert found.hit.tolist() == [[1.0, 0.0]]
    with pytest.raises(InputError, match="got one label"):
        information_scores(scores[..., :1], torch.tensor([0, 0]), torch.zeros(1, 2))


def test_three_depths_of_one_curve() -> None:
    """Above 0.24 at depths 1, 3 and 4, so for good from 3 on; the second ends at chance."""
    curves = np.array([[0.2, 0.25, 0.2, 0.8, 0.6], [0.2, 0.9, 0.2, 0.2, 0.2]])
    found = {
        name: information_depths(curves, name, 5) for name in ("weighted", "first_above", "resolve")
    }
    assert found["weighted"].tolist() == weighted_depths(curves, 5).tolist()
    assert found["first_above"].tolist() == [1, 1]
    assert found["resolve"][0] == 3
    assert np.isnan(found["resolve"][1])
    assert np.isnan(information_depths(curves[:, :1], "first_above", 5)).all()


def test_a_peak_is_that_of_the_other_items() -> None:
    """Two items peak at depth 1, the third, at depth 0, is looked at where the others do."""
    hits = np.array([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    assert drops_from_peak(hits).tolist() == [0.0, -1.0, 0.0]
    assert drops_from_peak(np.array([[0.0, 1.0, 0.0]] * 3)).tolist() == [1.0, 1.0, 1.0]
