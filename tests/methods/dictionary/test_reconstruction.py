"""The forward pass of training, its losses and gradients: what SAELens and dictionary_learning say.

Their numbers stand in files; see ``scripts/dictionary_peers.py``.
"""

import pytest
import torch
from torch import Tensor

from hooked_alm.methods.dictionary.autoencoder import Architecture
from hooked_alm.methods.dictionary.losses import (
    dead_latent_loss,
    jumped,
    stepped,
    unexplained,
)
from hooked_alm.methods.dictionary.reconstruction import reconstructed
from peer_dictionaries import BANDWIDTH, K, peer_dictionary, peer_numbers
from tolerances import PEER_DICTIONARY

SAELENS: tuple[Architecture, ...] = ("topk", "batchtopk", "matryoshka", "jumprelu")
LEARNING: tuple[Architecture, ...] = ("topk", "batchtopk", "matryoshka")


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=PEER_DICTIONARY, atol=PEER_DICTIONARY)


def squared(x: Tensor, made: Tensor) -> Tensor:
    return (x - made).square().sum(-1).mean()


def assert_gradients(sae: torch.nn.Module, given: dict[str, Tensor]) -> None:
    for name, expected in given.items():
        if name.startswith("grad_"):
            key = name.removeprefix("grad_")
            found = sae.encoder.grad.T if key == "W_enc" else getattr(sae, key).grad
            assert_close(found, expected)


@pytest.mark.parametrize("architecture", SAELENS)
def test_saelens(architecture: Architecture) -> None:
    given = peer_numbers("saelens", architecture)
    sae, x = peer_dictionary(architecture, given).requires_grad_(True), given["rows"]
    made = reconstructed(sae, x, bandwidth=BANDWIDTH)
    assert_close(made.rows[-1], given["reconstruction"])
    loss = squared(x, made.rows[-1])
    assert_close(loss, given["squared_error"])
    loss = loss + sum(squared(x, rows) for rows in made.rows[:-1])
    loss = loss + (made.l0 if architecture == "jumprelu" else 0)
    assert_close(loss, given["loss"])
    loss.backward()
    assert_gradients(sae, given)


@pytest.mark.parametrize("architecture", LEARNING)
def test_dictionary_learning(architecture: Architecture) -> None:
    given = peer_numbers("dictionary_learning", architecture)
    given["threshold"] = torch.full((len(given["b_enc"]),), 1.25)
    sae, x = peer_dictionary(architecture, given).requires_grad_(True), given["rows"]
    made = reconstructed(sae, x)
    assert_close(made.rows[-1], given["reconstruction"])
    errors = torch.stack([squared(x, rows) for rows in made.rows]).mean()
    assert_close(errors, given["squared_error"])
    # Latents that fire in the batch are not dead any more there.
    fired = torch.zeros_like(given["dead"]).index_put(
        (made.active.latent[made.value > 0],), torch.tensor(True)
    )
    dead = given["dead"] & ~fired
    assert 0 < dead.sum() <= x.shape[1]
    aux = dead_latent_loss(sae, x, (x - made.rows[-1]).detach(), dead, x.shape[1] // 2)
    assert_close(aux, given["aux"])
    loss = errors + aux / 32
    assert_close(loss, given["loss"])
    loss.backward()
    assert_gradients(sae, given)


def test_in_use_as_dictionary_learning() -> None:
    given = peer_numbers("dictionary_learning", "batchtopk")
    given["threshold"] = torch.full((len(given["b_enc"]),), 1.25)
    sae = peer_dictionary("batchtopk", given)
    assert_close(sae(given["rows"]), given["in_use"])


def test_fraction_of_variance_unexplained() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 3.0]])  # varies by 8 + 6
    made = torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 3.0]])  # errs by 1 + 4
    assert float(unexplained(x, made)) == pytest.approx(5 / 14)
    assert float(unexplained(x, x)) == 0.0
    assert float(unexplained(x, x.mean(0).expand(3, -1))) == pytest.approx(1.0)


def test_pseudo_derivatives_of_a_threshold() -> None:
    """Eq. 11 and 12 by hand: theta = 1, bandwidth .5, values inside and outside of the window."""
    value = torch.tensor([0.5, 0.8, 1.2, 1.6, 3.0], requires_grad=True)
    threshold = torch.ones(5, requires_grad=True)
    made = jumped(value, threshold, 0.5)
    assert made.tolist() == pytest.approx([0, 0, 1.2, 1.6, 3.0])
    made.sum().backward()
    assert value.grad is not None
    assert threshold.grad is not None
    assert value.grad.tolist() == [0, 0, 1, 1, 1]
    assert threshold.grad.tolist() == [0, -2, -2, 0, 0]
    doubled = torch.full((5,), 2.0, requires_grad=True)
    jumped(2 * value.detach(), doubled, 0.5).sum().backward()
    assert doubled.grad is not None
    assert doubled.grad.tolist() == [0, 0, 0, 0, 0]
    jumped(value.detach() + 1, doubled, 0.5).sum().backward()
    assert doubled.grad.tolist() == [0, -4, -4, 0, 0]  # as high as the threshold
    threshold.grad = None
    stepped(value.detach(), threshold, 0.5).sum().backward()
    assert threshold.grad.tolist() == [0, -2, -2, 0, 0]


def test_k_beyond_the_positive_is_a_plain_relu() -> None:
    given = peer_numbers("saelens", "topk")
    sae = peer_dictionary("topk", given)
    wide = peer_dictionary("topk", given)
    wide.cfg = type(sae.cfg)(d_in=12, d_sae=40, architecture="topk", k=40)
    x = given["rows"]
    assert torch.equal(wide.encode(x), wide.pre(x).relu())
    assert int((sae.encode(x) > 0).sum(1).max()) <= K
    assert_close(reconstructed(wide, x).rows[-1], wide(x))


class TestDeadLatents:
    """AuxK: who is revived, and towards what."""

    def revived(self, sign: float) -> tuple[float, float]:
        """Length of a dead latent's part along the residual, before and after a step."""
        generator = torch.Generator().manual_seed(3)
        given = peer_numbers("saelens", "topk")
        sae = peer_dictionary("topk", given).requires_grad_(True)
        x = given["rows"]
        residual = 0.1 * torch.randn(1, 12, generator=generator) + torch.zeros_like(x)
        direction = residual[0] / residual[0].norm()
        dead = torch.zeros(40, dtype=torch.bool)
        dead[7] = True
        with torch.no_grad():
            sae.encoder[7], sae.W_dec[7], sae.b_enc[7] = direction * 0, direction, 0.02
        loss = dead_latent_loss(sae, x, sign * residual + 1e-3 * x, dead, 6)
        loss.backward()
        assert sae.b_enc.grad is not None
        before = float(sae.b_enc[7].detach())
        return before, before - float(sae.b_enc.grad[7])

    def test_a_latent_along_the_residual_grows(self) -> None:
        before, after = self.revived(1.0)
        assert after > before

    def test_the_negative_residual_would_shrink_it(self) -> None:
        before, after = self.revived(-1.0)
        assert after < before

    def test_gradients_reach_dead_latents_alone(self) -> None:
        given = peer_numbers("saelens", "topk")
        sae, x, dead = peer_dictionary("topk", given), given["rows"], given["dead"]
        sae.requires_grad_(True)
        made = reconstructed(sae, x).rows[-1]
        dead_latent_loss(sae, x, (x - made).detach(), dead, 6).backward()
        for parameter in (sae.encoder, sae.W_dec):
            assert parameter.grad is not None
            norms = parameter.grad.norm(dim=-1)
            assert (norms[~dead] == 0).all()
            assert (norms[dead] > 0).any()

    def test_without_dead_ones_there_is_no_loss(self) -> None:
        given = peer_numbers("saelens", "topk")
        sae, x = peer_dictionary("topk", given), given["rows"]
        assert float(dead_latent_loss(sae, x, x, torch.zeros(40, dtype=torch.bool), 6)) == 0.0
