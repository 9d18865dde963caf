"""Training: what is learnt of planted directions, who is revived, and going on after a stop."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary import training as training_module
from hooked_alm.methods.dictionary.autoencoder import (
    Architecture,
    DictionaryConfig,
    geometric_median,
)
from hooked_alm.methods.dictionary.losses import dead_latent_loss
from hooked_alm.methods.dictionary.training import (
    DictionaryStep,
    DictionaryTrainer,
    DictionaryTraining,
)
from planted import D_IN, planted_rows

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


def shape(
    architecture: Architecture = "topk", k: int | None = 3, d_sae: int = 64
) -> DictionaryConfig:
    k = None if architecture == "standard" else k
    prefixes = (16, d_sae) if architecture == "matryoshka" else ()
    return DictionaryConfig(
        d_in=D_IN, d_sae=d_sae, architecture=architecture, k=k, prefixes=prefixes
    )


LEARNT = ("encoder", "b_enc", "W_dec", "b_dec")


def rows(n: int = 128, seed: int = 5) -> Tensor:
    return planted_rows(n, torch.Generator().manual_seed(seed))


def begun(cfg: DictionaryConfig, n_steps: int = 40, **settings: float) -> DictionaryTrainer:
    training = DictionaryTraining(n_steps=n_steps, batch_size=128, **settings)  # type: ignore[arg-type]
    return DictionaryTrainer(cfg, training, rows(), seed=11)


def run(trainer: DictionaryTrainer, n_steps: int, n_rows: int = 128) -> DictionaryStep:
    """The last of some steps, each with rows of its own number."""
    for _ in range(n_steps):
        step = trainer.step(rows(n_rows, seed=1000 + trainer.n_done))
    return step


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stopped_training_goes_on_with_the_same_numbers(architecture: Architecture) -> None:
    cfg = shape(architecture)
    settings = {"dead_after": 256, "resample_every": 6}
    whole, first = begun(cfg, **settings), begun(cfg, **settings)
    run(whole, 14)
    run(first, 7)
    state = {name: value.clone() for name, value in first.state().items()}
    again = DictionaryTrainer(cfg, first.training, rows(seed=8), seed=99)
    again.restore(state)
    run(again, 7)
    for name, value in whole.state().items():
        assert torch.equal(value, again.state()[name]) or bool(value.isnan().all()), name


def test_a_state_of_another_shape_is_refused() -> None:
    wide = begun(shape(d_sae=80))
    run(wide, 1)
    with pytest.raises(InputError, match="other tensors than this training has"):
        begun(shape()).restore(wide.state())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_directions_keep_their_length(architecture: Architecture) -> None:
    trainer = begun(shape(architecture))
    step = run(trainer, 5)
    lengths = trainer.sae.W_dec.detach().norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(64), rtol=0, atol=1e-6)
    if architecture != "standard":
        assert float(step.l0) == pytest.approx(3.0, abs=0.6 if architecture == "jumprelu" else 0)


def test_a_penalty_keeps_activations_few() -> None:
    """Loss and gradients of standard: a plain ReLU's, densely, with the sum of its activations."""
    trainer = begun(shape("standard"), l1_weight=0.7, aux_weight=0.0, learning_rate=1e-3)
    sae, x = trainer.sae, rows() * trainer.scale
    dense = {name: getattr(sae, name).detach().clone().requires_grad_() for name in LEARNT}
    features = ((x - dense["b_dec"]) @ dense["encoder"].T + dense["b_enc"]).relu()
    made = features @ dense["W_dec"] + dense["b_dec"]
    fvu = (x - made).square().sum() / (x - x.mean(0)).square().sum()
    (fvu + 0.7 * features.sum(-1).mean()).backward()
    step = trainer.step(rows())
    torch.testing.assert_close(step.fvu, fvu.detach())
    torch.testing.assert_close(step.l0, (features > 0).sum(-1).float().mean())
    for name in ("encoder", "b_enc", "b_dec"):
        torch.testing.assert_close(getattr(sae, name).grad, dense[name].grad)
    sparse, plain = (
        run(begun(shape("standard"), 60, l1_weight=weight), 60).l0 for weight in (1.0, 0.0)
    )
    assert sparse < plain / 2


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_a_tied_encoder_stays_the_directions(architecture: Architecture) -> None:
    """As one tensor in both places would be trained; no centre is learnt, and norms are free."""
    settings = {"is_tied": True, "is_centred": False, "keeps_norms": False}
    cfg = shape(architecture)
    trainer = begun(cfg, learning_rate=1e-3, aux_weight=0.0, resample_every=3, **settings)
    sae, x = trainer.sae, rows() * trainer.scale
    one, bias = sae.W_dec.detach().clone().requires_grad_(), sae.b_enc.detach()
    pre = x @ one.T + bias
    if architecture == "topk":
        kept = pre.topk(3, dim=-1).indices
        features = torch.zeros_like(pre).scatter(-1, kept, pre.gather(-1, kept)).relu()
    else:
        features = pre.relu()
    loss = (x - features @ one).square().sum() / (x - x.mean(0)).square().sum()
    if architecture == "standard":
        loss = loss + 0.2 * (features * one.norm(dim=-1)).sum(-1).mean()
    loss.backward()
    trainer.step(rows())
    torch.testing.assert_close(sae.W_dec.grad, one.grad)
    run(trainer, 8)
    assert torch.equal(sae.encoder, sae.W_dec)
    assert not sae.b_dec.any()
    assert (sae.W_dec.norm(dim=-1) - 1).abs().max() > 1e-3
    again = DictionaryTrainer(cfg, trainer.training, rows(seed=8), seed=99)
    again.restore({name: value.clone() for name, value in trainer.state().items()})
    run(trainer, 3)
    run(again, 3)
    assert torch.equal(again.sae.W_dec, trainer.sae.W_dec)
    assert torch.equal(again.sae.encoder, again.sae.W_dec)


def test_a_number_of_active_latents_is_none_of_standard() -> None:
    with pytest.raises(InputError, match="k=3 of standard, which sets no number"):
        DictionaryConfig(d_in=D_IN, d_sae=8, architecture="standard", k=3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_use_it_takes_rows_in_their_own_units(architecture: Architecture) -> None:
    """The trained copy of scaled rows is the trainer's own dictionary, features grown with them."""
    trainer = begun(shape(architecture))
    run(trainer, 5)
    x, inner, outer = rows(seed=77), trainer.sae, trainer.trained()
    scale = trainer.scale
    assert abs(scale - 1) > 0.2
    with torch.no_grad():
        torch.testing.assert_close(outer(x), inner(x * scale) / scale)
        torch.testing.assert_close(outer.encode(x), inner.encode(x * scale) / scale)


def test_the_threshold_begins_at_the_first_value() -> None:
    """A running mean from 0 would have 1 - 0.99^n of it (SAELens: 0.634 after 100 steps, C52)."""
    trainer = begun(shape("batchtopk"), n_steps=200, learning_rate=1e-30)
    same = rows(seed=3)
    for n in range(100):
        trainer.step(same)
        if n == 0:
            first = trainer.sae.threshold.clone()
    torch.testing.assert_close(trainer.sae.threshold.detach(), first.detach())
    assert float(first[0]) > 0


def test_a_moving_threshold_is_a_running_mean() -> None:
    trainer = begun(shape("batchtopk"), learning_rate=1e-30)
    smallest = []
    for n in range(4):
        x = rows(seed=20 + n)
        pre = trainer.sae.pre(x * trainer.scale).detach()
        smallest.append(float(pre.flatten().sort().values[-3 * len(x)]))
        trainer.step(x)
    mean = smallest[0]
    for value in smallest[1:]:
        mean += 0.01 * (value - mean)
    assert float(trainer.sae.threshold[0]) == pytest.approx(mean, rel=1e-6)


def test_rate() -> None:
    plan = DictionaryTraining(n_steps=100, batch_size=1)
    rates = [plan.rate(step, d_sae=4096) for step in range(100)]
    assert max(rates) == pytest.approx(4e-4)  # 2e-4 / sqrt(1/4)
    assert rates[0] == pytest.approx(4e-4 / 11)
    assert rates[:11] == sorted(rates[:11])
    assert rates[11:80] == [max(rates)] * 69
    assert rates[90] == pytest.approx(max(rates) / 2)
    assert rates[99] == pytest.approx(max(rates) / 20)


def test_latents_die_by_rows_without_activity() -> None:
    trainer = begun(shape(), dead_after=3 * 128)
    with torch.no_grad():
        trainer.sae.b_enc[:9] = -30.0  # never positive
        trainer.sae.b_enc[9:12] = -0.45  # positive at times, never of the largest
    counts = [(int(s.dead), int(s.never_positive)) for s in (run(trainer, 1) for _ in range(5))]
    assert counts[:3] == [(0, 0)] * 3
    assert counts[3][0] >= 12
    assert counts[3][1] == 9


def test_resampling_revives_what_is_never_positive() -> None:
    trainer = begun(shape(), dead_after=2 * 128, resample_every=4)
    with torch.no_grad():
        trainer.sae.b_enc[:9] = -30.0
    run(trainer, 3)
    before = trainer.sae.W_dec.detach().clone()
    run(trainer, 1)
    moved = (trainer.sae.W_dec.detach() - before).norm(dim=-1) > 0.5
    assert moved[:9].all()
    assert not moved[9:].any()
    assert (trainer.sae.b_enc[:9] == 0).all()
    run(trainer, 3)
    assert int(run(trainer, 1).never_positive) == 0


@pytest.mark.parametrize("bias", [-0.6, -3.0])
def test_who_is_revived(bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the latents begin rarely in the top k, or never positive (methods_003 8.5.2).

    At -0.6 the loss of dead latents beats none, which beats the negative residual (C43); at -3 no
    gradient reaches them at all.
    """

    def flipped(sae: object, x: Tensor, residual: Tensor, *others: object) -> Tensor:
        found: Tensor = dead_latent_loss(sae, x, -residual, *others)  # type: ignore[arg-type]
        return found

    n_steps = 400 if bias == -0.6 else 60

    def trained(aux_weight: float) -> tuple[float, int]:
        trainer = begun(shape(), n_steps=n_steps, aux_weight=aux_weight, learning_rate=3e-3)
        with torch.no_grad():
            trainer.sae.b_enc[:32] = bias * trainer.scale
        step = run(trainer, n_steps, n_rows=256)
        return float(step.fvu), int((~trainer.dead[:32]).sum())

    with_aux, without = trained(1 / 32), trained(0.0)
    monkeypatch.setattr(training_module, "dead_latent_loss", flipped)
    negative = trained(1 / 32)
    if bias == -3.0:
        assert with_aux[1] == without[1] == negative[1] == 0
    else:
        assert with_aux[0] < without[0] < negative[0]
        assert with_aux[1] > without[1] >= negative[1]


def test_centre_of_the_first_rows() -> None:
    """The geometric median, which one row far away does not move as it moves the mean."""
    x = rows(200)
    x[0] += 1e4
    centre, near = geometric_median(x), x[1:].mean(0)
    assert (centre - near).norm() < 0.2
    assert (x.mean(0) - near).norm() > 50
    # Optimality: unit vectors towards the rows sum to nothing.
    pull = ((x - centre) / (x - centre).norm(dim=-1, keepdim=True)).sum(0)
    assert float(pull.norm()) < 1e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shape(k=65), "k=65, expected 1 to d_sae=64"),
        (lambda: shape(k=0), "k=0"),
        (lambda: DictionaryConfig(d_in=4, d_sae=8, architecture="matryoshka", k=2),
         r"prefixes \[\], expected them to ascend to 8"),
        (lambda: DictionaryConfig(d_in=4, d_sae=8, architecture="topk", k=2, prefixes=(4, 8)),
         "of topk, which has none"),
        (lambda: DictionaryTraining(n_steps=0, batch_size=4), "n_steps=0"),
        (lambda: DictionaryTraining(n_steps=1, batch_size=4, bandwidth=0.0), "bandwidth=0.0"),
        (lambda: begun(shape()).step(torch.zeros(0, D_IN)), r"rows \[0, 32\]"),
        (lambda: begun(shape()).step(torch.full((4, D_IN), torch.nan)), "not finite"),
        (lambda: begun(shape()).step(torch.zeros(4, D_IN + 1)), r"rows \[4, 33\]"),
        (lambda: DictionaryTrainer(shape(), DictionaryTraining(n_steps=1, batch_size=4),
                                   torch.ones(4, D_IN), 0), "all the same"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("architecture", ["batchtopk", "jumprelu", "matryoshka"])
def test_without_a_threshold_it_is_of_no_use(architecture: Architecture) -> None:
    untrained = training_module.SparseAutoencoder.initialised(shape(architecture), rows(), 0)
    with pytest.raises(InputError, match="negative or was never found"):
        untrained(rows())
