"""Selection of neurons by class against numbers by hand, and a simulation of both codings."""

from typing import get_args

import numpy as np
import pytest
import torch

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.class_neurons import (
    ClassActivity,
    Selector,
    aape,
    best_neurons,
    class_activity,
    class_scores,
    entropies,
    official_lape,
    select,
)


def pair() -> ClassActivity:
    """One block of two neurons: A is strong for class 0, B fires for class 1."""
    return ClassActivity(
        lap=np.array([[[0.5, 0.0]], [[0.5, 0.9]], [[0.5, 0.0]]]),
        mean=np.array([[[1.5, 0.0]], [[0.5, 0.18]], [[0.5, 0.0]]]),
    )


def test_entropy_by_hand() -> None:
    """Shares (.6, .2, .2); one class alone; all alike; a neuron that never fires."""
    lap = np.array([[0.3, 0.0, 0.5, 0.0], [0.1, 0.9, 0.5, 0.0], [0.1, 0.0, 0.5, 0.0]])
    found = entropies(lap[:, None])[0]
    np.testing.assert_allclose(found[:3], [0.9503, 0, np.log(3)], atol=5e-5)
    assert np.isnan(found[3])


def test_scores_of_the_pair() -> None:
    # The six values of LAP are 0, 0, .5, .5, .5, .9; half of them are .5 at most in rank 3.
    found = {one: class_scores(one, pair(), filter=0.5)[:, 0] for one in get_args(Selector)}
    np.testing.assert_allclose(found["mad"], [[1.0, -0.09], [-0.5, 0.18], [-0.5, -0.09]])
    np.testing.assert_allclose(found["cas"], [[1.0, -0.18], [-1.0, 0.18], [-1.0, -0.18]])
    np.testing.assert_array_equal(found["lap"], pair().lap[:, 0])
    nothing = -np.inf
    assert found["lape"].tolist() == [[nothing, nothing], [nothing, 0.0], [nothing, nothing]]


def test_each_selector_takes_its_own_of_the_pair() -> None:
    best = {one: best_neurons(one, pair(), 1, filter=0.5) for one in get_args(Selector)}
    assert best == {"lap": [(0, 1)], "lape": [(0, 1)], "mad": [(0, 0)], "cas": [(0, 0)]}


@pytest.mark.parametrize(("filter", "passing"), [(0.3, [0, 1]), (0.5, [1]), (0.8, [1]), (1.0, [])])
def test_what_fires_as_often_as_the_bar_is_left_out(filter: float, passing: list[int]) -> None:
    """The bars are 0, .5, .5 and .9: of six values the 2nd, 3rd, 5th and 6th."""
    found = class_scores("lape", pair(), filter=filter).max(axis=0)[0]
    assert np.flatnonzero(found > -np.inf).tolist() == passing


def test_as_many_for_every_class() -> None:
    """A fourth of eight neurons; LAPE has fewer where no more pass; of equals, the earlier."""
    rng = np.random.default_rng(0)
    activity = ClassActivity(lap=rng.random((3, 2, 4)), mean=rng.normal(size=(3, 2, 4)))
    for selector in ("lap", "mad", "cas"):
        found = select(selector, activity, 0.25)
        assert [*found] == [0, 1, 2]
        for one, neurons in found.items():
            scores = class_scores(selector, activity)[one]
            assert len(neurons) == 2
            assert [scores[at] for at in neurons] == sorted(scores.ravel())[:-3:-1]
    assert select("lape", pair(), 1.0, filter=0.5) == {0: [], 1: [(0, 1)], 2: []}
    equal = ClassActivity(lap=np.ones((2, 2, 2)), mean=np.ones((2, 2, 2)))
    assert select("mad", equal, 0.5)[1] == [(0, 0), (0, 1)]


def test_activity_by_class() -> None:
    """A gate of 0 does not fire; a class's mean is over its own rows."""
    gates = np.array([[[1.0, -0.2]], [[0.0, 0.4]], [[3.0, 0.2]]], dtype=np.float32)
    found = class_activity(gates, np.array([1, 1, 0]), 2)
    assert found.lap[:, 0].tolist() == [[1.0, 1.0], [0.5, 0.5]]
    np.testing.assert_allclose(found.mean[:, 0], [[3.0, 0.2], [0.5, 0.1]], rtol=1e-6)


@pytest.mark.parametrize("coding", ["rate", "magnitude"])
def test_the_codings_reverse_what_is_found(coding: str) -> None:
    """16 planted among 4000 neurons of 5 classes, as in M-ESN-2."""
    rng = np.random.default_rng(1)
    classes = np.arange(1000) % 5
    gates = rng.normal(0, 1, (1000, 2, 2008)) + rng.normal(0, 0.3, (2, 2008))
    own = classes[:, None] == np.arange(16) % 5
    rate, magnitude = np.where(own, 0.1, -0.1), np.where(own, 3.0, 0.5)
    gates[:, 1, 100:116] = rate if coding == "rate" else magnitude
    activity = class_activity(gates, classes, 5)
    planted = {(1, neuron) for neuron in range(100, 116)}
    found = {
        one: len(planted & {*best_neurons(one, activity, 16)}) for one in ("lape", "mad", "cas")
    }
    assert found["lape"] == (16 if coding == "rate" else 0)
    assert found["mad"] == (0 if coding == "rate" else 16)
    if coding == "magnitude":
        assert found["cas"] == 16


def published_lape(
    probs: torch.Tensor, top_rate: float, filter_rate: float
) -> list[list[tuple[int, int]]]:
    """The selection of LAPE's ``identify.py``, step by step; probs are [block, neuron, class]."""
    normed = probs / probs.sum(dim=-1, keepdim=True)
    normed[torch.isnan(normed)] = 0
    log_probs = torch.where(normed > 0, normed.log(), 0)
    entropy = -torch.sum(normed * log_probs, dim=-1)
    flattened = probs.flatten()
    bar = flattened.kthvalue(round(len(flattened) * filter_rate)).values.item()
    entropy[(probs > bar).sum(dim=-1) == 0] = torch.inf
    flat = entropy.flatten()
    _, index = flat.topk(round(len(flat) * top_rate), largest=False)
    row, column = index // entropy.size(1), index % entropy.size(1)
    selected = probs[row, column].transpose(0, 1)
    lang, indice = torch.where(selected > bar)
    merged = torch.stack((row, column), dim=-1)
    found = []
    for one in indice.split(torch.bincount(lang).tolist()):
        found.append(sorted(tuple(at.tolist()) for at in merged[one]))
    return found


@pytest.mark.parametrize("has_last", [True, False])
def test_the_official_selection_with_and_without_c54(has_last: bool) -> None:
    """60 of 2 x 300 neurons fire for one of four classes; without the last, its list vanishes."""
    rng = np.random.default_rng(3)
    lap = rng.uniform(0.2, 0.3, (4, 2, 300))
    for number, neuron in enumerate(range(0, 300, 10)):
        for block in (0, 1):
            lap[:, block, neuron] = 0.01
            lap[(number + block) % (4 if has_last else 3), block, neuron] = rng.uniform(0.8, 0.95)
    # One that belongs to two classes.
    lap[:, 1, 5] = (0.9, 0.9, 0.001, 0.001)
    activity = ClassActivity(lap=lap, mean=lap)
    published = published_lape(torch.from_numpy(np.moveaxis(lap, 0, -1)), 0.05, 0.95)
    assert official_lape(activity, 0.05, keeps_empty=False) == published
    ours = official_lape(activity, 0.05)
    assert len(ours) == 4
    assert len(published) == (4 if has_last else 3)
    assert ours == (published if has_last else [*published, []])
    assert sum(map(len, ours)) == 30


def five() -> ClassActivity:
    """Five neurons of a block and two classes: silent, rare, shared, and one for either class."""
    lap = np.array([[[0.0, 0.01, 0.6, 0.9, 0.1]], [[0.0, 0.0, 0.6, 0.1, 0.8]]])
    return ClassActivity(lap=lap, mean=lap)


def test_aape_by_hand() -> None:
    """Entropies of the last three: .693, .325, .349; the rare one has 0, unless it is dropped.

    Of the LAP of these, (.6, .9, .1, .6, .1, .8), a third is .8 or more.
    """
    assert aape(five(), least=0.4, rate=0.67, top=0.35) == [[(0, 3)], [(0, 4)]]
    assert aape(five(), least=0.4, rate=0.34, top=0.35) == [[(0, 3)], []]
    assert aape(five(), least=0.4, rate=1.0, top=0.67) == [[(0, 2), (0, 3)], [(0, 2), (0, 4)]]
    # The rare one is of the lowest entropy, but of no class's highest LAP.
    assert aape(five(), least=0.0, rate=0.25, top=0.35) == [[], []]
    assert aape(five(), least=0.0, rate=0.25, top=1.0) == [[(0, 1)], [(0, 1)]]


def test_aape_depends_on_where_a_gelu_is_called_off() -> None:
    """A neuron between its least value and 0 fires nowhere above 0, and for one class above -.1."""
    gates = np.array([[[-0.05, 0.5]], [[-0.05, -0.1]], [[-0.17, 0.5]], [[-0.17, -0.1]]])
    classes = np.array([0, 0, 1, 1])
    by_bar = {bar: class_activity(gates, classes, 2, above=bar) for bar in (0.0, -0.1)}
    assert by_bar[0.0].lap[:, 0].tolist() == [[0.0, 0.5], [0.0, 0.5]]
    assert by_bar[-0.1].lap[:, 0].tolist() == [[1.0, 0.5], [0.0, 0.5]]
    chosen = {bar: aape(one, least=0, rate=0.5, top=0.25) for bar, one in by_bar.items()}
    assert chosen == {0.0: [[(0, 1)], [(0, 1)]], -0.1: [[(0, 0)], []]}


@pytest.mark.parametrize("shares", [{"least": -0.1}, {"rate": 1.5}, {"top": 2}])
def test_aape_refuses(shares: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected shares, 0 to 1"):
        aape(five(), **shares)
    silent = ClassActivity(lap=np.zeros((2, 1, 3)), mean=np.zeros((2, 1, 3)))
    with pytest.raises(InputError, match="got none that fires"):
        aape(silent)


def test_the_later_form_of_the_mean_deviation_selects_alike() -> None:
    """Minus the mean of all classes, as in the ACL paper, is MAD times 1 - 1/classes."""
    rng = np.random.default_rng(0)
    activity = ClassActivity(lap=rng.random((5, 2, 40)), mean=rng.normal(size=(5, 2, 40)))
    later = activity.mean - activity.mean.mean(axis=0)
    np.testing.assert_allclose(later, 0.8 * class_scores("mad", activity), atol=1e-12)


def test_errors() -> None:
    gates = np.ones((3, 1, 2))
    for classes, n in (([0, 0, 2], 3), ([0, 0, 0], 1), ([0, 1, 2], 2)):
        with pytest.raises(InputError, match="rows of each"):
            class_activity(gates, np.array(classes), n)
    for rate in (0.2, 1.3):
        with pytest.raises(InputError, match="got [03] of 2, expected one to all of them"):
            select("mad", pair(), rate)
    with pytest.raises(InputError, match="got 3 of 2"):
        best_neurons("mad", pair(), 3)
    for share in (0.0, 1.2):
        with pytest.raises(InputError, match="expected a share above 0, up to 1"):
            class_scores("lape", pair(), filter=share)
