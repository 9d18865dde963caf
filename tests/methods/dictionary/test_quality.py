"""Figures of a dictionary, by hand and whatever the batches."""

from dataclasses import asdict

import pytest
import torch

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.autoencoder import DictionaryConfig, SparseAutoencoder
from hooked_alm.methods.dictionary.quality import QualityCounts
from peer_dictionaries import peer_dictionary, peer_numbers


def halving() -> SparseAutoencoder:
    """Two inputs, three latents: the first two give half of either input, the third is dead."""
    sae = SparseAutoencoder(DictionaryConfig(d_in=2, d_sae=3, architecture="jumprelu", k=1))
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0], [0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[0.5, 0], [0, 0.5], [0, 1.0]]))
        sae.threshold.fill_(0.0)
    return sae


def test_by_hand() -> None:
    counts = QualityCounts(halving())
    counts.add(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    counts.add(torch.tensor([[3.0, 4.0]]))
    found = counts.quality()
    # Errors are a quarter of |x|^2: (4 + 16 + 25) / 4; the variance is 45 - 3 |(5/3, 8/3)|^2.
    assert found.n_rows == 3
    assert found.fvu == pytest.approx(11.25 / (45 - 89 / 3))
    assert found.explained_variance == pytest.approx(1 - found.fvu)
    assert found.cosine == pytest.approx(1.0)
    assert found.l2_ratio == pytest.approx(0.5)
    assert found.relative_bias == pytest.approx(0.25 / 0.5)
    assert found.l0 == pytest.approx(4 / 3)
    assert found.dead_share == pytest.approx(1 / 3)
    assert found.over_1_percent == found.over_10_percent == pytest.approx(2 / 3)
    assert counts.active.tolist() == [2, 2, 0]


@pytest.mark.parametrize("inference", ["threshold", "batch"])
def test_batches_change_nothing(inference: str) -> None:
    given = peer_numbers("saelens", "jumprelu")
    sae = peer_dictionary("jumprelu", given)
    whole, parts = QualityCounts(sae, inference), QualityCounts(sae, inference)  # type: ignore[arg-type]
    whole.add(given["rows"])
    for part in given["rows"].split(4):
        parts.add(part)
    assert asdict(parts.quality()) == pytest.approx(asdict(whole.quality()), rel=1e-6)


def test_as_in_training_a_batch_has_k_a_row() -> None:
    sae = peer_dictionary("batchtopk", peer_numbers("saelens", "batchtopk"))
    with torch.no_grad():
        sae.threshold.fill_(0.0)
    rows = peer_numbers("saelens", "batchtopk")["rows"]
    by = {}
    for inference in ("threshold", "batch"):
        counts = QualityCounts(sae, inference)  # type: ignore[arg-type]
        counts.add(rows)
        by[inference] = counts.quality()
    assert by["batch"].l0 == pytest.approx(4.0)
    assert by["threshold"].l0 > 10


def test_refused() -> None:
    with pytest.raises(InputError, match="got no rows"):
        QualityCounts(halving()).quality()
    untrained = SparseAutoencoder(DictionaryConfig(d_in=2, d_sae=3, architecture="batchtopk", k=1))
    with pytest.raises(InputError, match="never found"):
        QualityCounts(untrained)
    with pytest.raises(InputError, match=r"rows \[2, 3\], expected one or more of width 2"):
        QualityCounts(halving()).add(torch.zeros(2, 3))
