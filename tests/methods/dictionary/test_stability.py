"""Partners of directions, with both nulls: no structure in the rows, and no training at all."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig
from hooked_alm.methods.dictionary.stability import (
    ActivationCorrelation,
    Match,
    activation_correlation,
    match_dictionaries,
    random_directions,
)
from hooked_alm.methods.dictionary.training import DictionaryTrainer, DictionaryTraining
from planted import D_IN, N_ACTIVE, N_DIRECTIONS, directions, gaussian_rows, planted_rows


def test_a_permuted_and_stretched_copy_is_the_same() -> None:
    first = random_directions(12, 7, seed=0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = match_dictionaries(first, 3.5 * first[order])
    assert found.mean == pytest.approx(1.0, abs=1e-6)
    assert found.share() == 1.0
    assert torch.equal(order[found.partner], torch.arange(12))


def test_orthogonal_and_opposite_directions_are_no_partners() -> None:
    axes = torch.eye(8)
    assert match_dictionaries(axes[:4], axes[4:]).share() == 0.0
    assert match_dictionaries(axes[:4], axes[4:]).mean == 0.0
    opposite = match_dictionaries(axes[:4], -axes[:4])
    assert opposite.share() == 0.0  # SAELens' MCC takes the absolute cosine
    assert float(opposite.cosine.max()) == 0.0


def test_greedy_matches_share_a_partner() -> None:
    first = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]])
    second = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    greedy, matched = (match_dictionaries(first, second, how) for how in ("greedy", "matched"))
    assert greedy.partner.tolist() == [0, 0, 2]
    assert greedy.share() == 1.0
    assert matched.share() == pytest.approx(2 / 3)


def test_dead_latents_are_counted_apart() -> None:
    axes = torch.eye(5)
    dead = torch.tensor([True, False, False, False, False])
    found = match_dictionaries(axes, axes, dead=(dead, None))
    assert found.n_dead == (1, 0)
    assert found.share() == 1.0
    assert torch.isnan(found.cosine[0])
    assert found.partner.tolist() == [-1, 1, 2, 3, 4]
    gone = match_dictionaries(axes, axes, dead=(None, torch.ones(5, dtype=torch.bool)))
    assert gone.share() == 0.0
    with pytest.raises(InputError, match="directions of length 0"):
        match_dictionaries(axes, 0 * axes)
    with pytest.raises(InputError, match="width 5 and 4"):
        match_dictionaries(axes, axes[:, :4])


def test_correlation_of_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, 3, generator=generator)
    second = torch.stack([2 * first[:, 0] + 1, -first[:, 1], torch.ones(50)], 1)
    found = activation_correlation(first, second)
    assert found[:2].tolist() == pytest.approx([1, -1])
    assert torch.isnan(found[2])


def test_correlation_batch_by_batch_is_that_of_all_rows() -> None:
    """NumPy's, of activations far from 0 and of one that stays where it is."""
    rng = np.random.default_rng(0)
    first, second = 1e3 + rng.normal(size=(2, 90, 4))
    second[:, 1] += first[:, 1]
    first[:, 3] = 0.1
    counts = ActivationCorrelation()
    assert len(counts.correlation()) == 0
    for at in (slice(0, 7), slice(7, 60), slice(60, 90)):
        counts.add(torch.from_numpy(first[at]), torch.from_numpy(second[at]))
    found = counts.correlation()
    expected = [np.corrcoef(first[:, j], second[:, j])[0, 1] for j in range(3)]
    assert found[:3].tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.isnan(found[3])


def trained(rows: object, seed: int) -> Tensor:
    cfg = DictionaryConfig(d_in=D_IN, d_sae=N_DIRECTIONS, architecture="topk", k=N_ACTIVE)
    training = DictionaryTraining(n_steps=900, batch_size=512, learning_rate=6e-3)
    generator, trainer = torch.Generator().manual_seed(5), None
    for _ in range(training.n_steps):
        x = rows(512, generator)  # type: ignore[operator]
        trainer = trainer or DictionaryTrainer(cfg, training, x, seed)
        trainer.step(x)
    assert trainer is not None
    return trainer.trained().W_dec


def pair(rows: object) -> tuple[Tensor, Match]:
    first, second = (trained(rows, seed) for seed in (11, 12))
    return first, match_dictionaries(first, second)


def test_planted_directions_are_found_again_and_noise_is_not() -> None:
    """GT-dict, at a third of the steps of methods_003 8.5.2 (there .938 and .000)."""
    first, planted = pair(planted_rows)
    assert planted.share() >= 0.8
    assert match_dictionaries(first, directions()).share() >= 0.8
    _, noise = pair(gaussian_rows)
    assert noise.share() <= 0.05
    untrained = match_dictionaries(*(random_directions(64, D_IN, seed) for seed in (1, 2)))
    assert untrained.share() == 0.0
    # Dictionaries of noise are less alike than dictionaries of no training.
    assert noise.mean < untrained.mean < planted.mean
