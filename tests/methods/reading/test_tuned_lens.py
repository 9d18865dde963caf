"""Translators against the logit lens, plain formulas in float64, and training written out."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_alm import HookedALM
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import InputError
from hooked_alm.methods.reading.divergence import compare_depths
from hooked_alm.methods.reading.lens import (
    LOGIT_LENS,
    Lens,
    lens_fidelity,
    logit_lens,
    residual_rows,
    translated,
    unembed_rows,
)
from hooked_alm.methods.reading.tuned_lens import (
    LensOptimizer,
    LensTrainer,
    LensTraining,
    TunedLens,
    unembed_hash,
)
from tiny import N_LAYERS, VOCAB, TinyModels, hf_inputs
from tolerances import LENS, LENS_SUMS, TUNED_LENS_STEPS

INPUTS = hf_inputs([[63], [23]], [9, 14])
POSITIONS = torch.tensor([[26, 0, 7], [26, 5, 19]])
LARGEST_NORM = 0.9


def random_lens(model: HookedALM, seed: int = 0) -> TunedLens:
    lens = TunedLens.untrained(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lens.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lens


def token_rows(model: HookedALM, seed: int, n_text: int = 20) -> Tensor:
    """Every position of a prompt with audio ``[depth, token, d_model]``."""
    x = model.encode(**hf_inputs([[31]], [n_text], seed))
    return residual_rows(model, x, torch.arange(x.shape[1])[None])[:, 0]


def full_lens(model: HookedALM, lens: TunedLens, rows: Tensor) -> Tensor:
    """The formula of block S-2, written out, in float64 ``[depth, ..., vocab]``."""
    logits = []
    for depth, r in enumerate(rows.double()):
        if depth < N_LAYERS:
            translator = lens.translators[depth]
            r = r + r @ translator.weight.double().T + translator.bias.double()
        rms = (r.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
        logits.append(r / rms * model.ln_final.w.double() @ model.W_U.double())
    return torch.stack(logits)


# --- A lens that is there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_is_the_logit_lens(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    model = tiny_models.hooked("gqa", dtype)
    x, lens = model.encode(**INPUTS), TunedLens.untrained(model)
    for tokens in (range(VOCAB), [301, 3, 77]):
        plain = logit_lens(model, x, tokens, positions=POSITIONS)
        assert torch.equal(logit_lens(model, x, tokens, positions=POSITIONS, lens=lens), plain)
    rows = residual_rows(model, x, POSITIONS)
    plain, tuned = lens_fidelity(model, rows), lens_fidelity(model, rows, lens=lens)
    for name in ("kl", "agrees", "entropy", "residual_norm"):
        assert torch.equal(getattr(tuned, name), getattr(plain, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lens_is_the_formula(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    model = tiny_models.hooked("gqa", dtype)
    x, lens = model.encode(**INPUTS), random_lens(model)
    rows = residual_rows(model, x, POSITIONS)
    got = logit_lens(model, x, range(VOCAB), positions=POSITIONS, lens=lens)
    expected = full_lens(model, lens, rows)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), expected, atol=LENS[torch.float32], rtol=0)
    # Not the model's own output.
    assert torch.equal(got[-1], unembed_rows(model, rows[-1]))
    assert (got[:-1] - unembed_rows(model, rows[:-1])).abs().amax((1, 2, 3)).min() > 0.1
    assert torch.equal(unembed_rows(model, translated(lens, rows)), got)

    fidelity = lens_fidelity(model, rows, lens=lens)
    log_p = expected.log_softmax(-1)
    kl = (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1)
    torch.testing.assert_close(fidelity.kl.double(), kl, atol=LENS_SUMS, rtol=0)
    assert torch.equal(fidelity.kl[-1], torch.zeros(2, 3))
    assert torch.equal(fidelity.residual_norm, rows.float().norm(dim=-1))


# --- Training


def by_hand(
    model: HookedALM, batches: list[list[Tensor]], optimizer: LensOptimizer, n_steps: int
) -> tuple[list[Tensor], list[list[float]]]:
    """Parameters and losses of some steps, in float64, from the definitions alone."""
    d, decay = model.cfg.d_model, 0.01
    values = [torch.zeros(d, d, dtype=torch.float64) for _ in range(N_LAYERS)]
    values += [torch.zeros(d, dtype=torch.float64) for _ in range(N_LAYERS)]
    memory = [torch.zeros(3, *v.shape, dtype=torch.float64) for v in values]
    losses = []
    for step, batch in enumerate(batches):
        leaves = [v.clone().requires_grad_() for v in values]
        rows = torch.cat(batch, dim=1).double()
        kls = []
        for depth in range(N_LAYERS):
            r = rows[depth] + rows[depth] @ leaves[depth].T + leaves[N_LAYERS + depth]
            log_p, log_q = (
                (
                    x
                    / (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
                    * model.ln_final.w.double()
                    @ model.W_U.double()
                ).log_softmax(-1)
                for x in (rows[-1], r)
            )
            kls.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        losses.append([float(kl.detach()) for kl in kls])
        gradients = torch.autograd.grad(sum(kls), leaves)
        norm = torch.stack([g.pow(2).sum() for g in gradients]).sum().sqrt()
        for v, g, m in zip(values, gradients, memory, strict=True):
            g = g * min(1.0, LARGEST_NORM / (float(norm) + 1e-6)) + decay * v
            if optimizer == "sgd":
                m[0] = g if step == 0 else 0.9 * m[0] + g
                v -= 0.1 * (n_steps - step) / n_steps * (g + 0.9 * m[0])
            else:
                m[0] = 0.9 * m[0] + 0.1 * g
                m[1] = 0.999 * m[1] + 0.001 * g * g
                m[2] = torch.maximum(m[2], m[1])
                warmup = n_steps // 5
                rate = min((step + 1) / (warmup + 1), (n_steps - step) / (n_steps - warmup))
                scale = (m[2] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                v -= 1e-3 * rate * m[0] / (1 - 0.9 ** (step + 1)) / scale
    return values, losses


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_is_the_definition(gqa: HookedALM, optimizer: LensOptimizer) -> None:
    """Batches of unequal length count by their tokens; chunks change nothing but rounding."""
    batches = [
        [token_rows(gqa, 10 * step + i, n_text=9 + 4 * i) for i in range(2)] for step in range(6)
    ]
    expected, losses = by_hand(gqa, batches, optimizer, n_steps=10)
    options = LensTraining(
        n_steps=10, optimizer=optimizer, weight_decay=0.01, max_grad_norm=LARGEST_NORM
    )
    for chunk in (7, 1000):
        lens = TunedLens.untrained(gqa)
        trainer = LensTrainer(gqa, lens, options, chunk=chunk)
        steps = [trainer.step(iter(batch)) for batch in batches]
        assert [one.n_tokens for one in steps] == [sum(b.shape[1] for b in bs) for bs in batches]
        norms = [one.grad_norm for one in steps]
        assert min(norms) < LARGEST_NORM < max(norms), "some gradients are clipped"
        got = torch.stack([one.kl for one in steps])
        torch.testing.assert_close(
            got, torch.tensor(losses, dtype=torch.float64), atol=TUNED_LENS_STEPS, rtol=0
        )
        for depth, translator in enumerate(lens.translators):
            for ours, theirs in (
                (translator.weight, expected[depth]),
                (translator.bias, expected[N_LAYERS + depth]),
            ):
                moved = float(theirs.abs().max())
                assert moved > 1e-4
                torch.testing.assert_close(
                    ours.detach().double() / moved, theirs / moved, atol=TUNED_LENS_STEPS, rtol=0
                )


def test_schedules() -> None:
    sgd = LensTraining(n_steps=250)
    assert [sgd.rate(step) for step in (0, 125, 249)] == pytest.approx([0.1, 0.05, 0.1 / 250])
    adam = LensTraining(n_steps=250, optimizer="adam")
    # A fifth of the steps rise.
    assert [adam.rate(s) for s in (0, 49, 50, 249)] == pytest.approx(
        [1e-3 / 51, 50e-3 / 51, 1e-3, 1e-3 / 200]
    )
    long = LensTraining(n_steps=20_000, optimizer="adam", learning_rate=0.5)
    assert [long.rate(s) for s in (999, 1000)] == pytest.approx([0.5 * 1000 / 1001, 0.5])


class WithVocabulary(TorchDispatchMode):
    """Numbers of elements of everything that is computed and as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and VOCAB in tensor.shape:
                self.rows.add(tensor.numel() // VOCAB)
        return out


def test_no_depths_times_tokens_times_vocabulary(gqa: HookedALM) -> None:
    trainer = LensTrainer(gqa, TunedLens.untrained(gqa), LensTraining(n_steps=2), chunk=7)
    rows = token_rows(gqa, 0, n_text=30)
    with WithVocabulary() as seen:
        trainer.step([rows])
    assert seen.rows == {7, rows.shape[1] % 7, gqa.cfg.d_model}


def test_the_model_is_left_alone(gqa: HookedALM) -> None:
    before = {name: value.clone() for name, value in gqa.state_dict().items()}
    trainer = LensTrainer(gqa, TunedLens.untrained(gqa), LensTraining(n_steps=2))
    trainer.step([token_rows(gqa, 0)])
    assert all(torch.equal(value, before[name]) for name, value in gqa.state_dict().items())
    assert all(parameter.grad is None for parameter in gqa.parameters())


def held_out_kl(model: HookedALM, lens: Lens, rows: list[Tensor]) -> Tensor:
    joined = torch.cat(rows, dim=1)[:, None]
    return lens_fidelity(model, joined, lens=lens).kl.mean((1, 2))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_helps_on_held_out_prompts_at_every_depth(
    gqa: HookedALM, optimizer: LensOptimizer
) -> None:
    """On a random model, whose depths have as little in common as any model's."""
    train, held_out = (
        [token_rows(gqa, seed) for seed in seeds] for seeds in (range(100, 140), range(200, 210))
    )
    lens = TunedLens.untrained(gqa)
    logit = held_out_kl(gqa, lens, held_out)
    assert torch.equal(logit, held_out_kl(gqa, LOGIT_LENS, held_out))
    n = 40 if optimizer == "sgd" else 120
    trainer = LensTrainer(gqa, lens, LensTraining(n_steps=n, optimizer=optimizer))
    for step in range(n):
        trainer.step(train[(4 * step + i) % 40] for i in range(4))
    tuned = held_out_kl(gqa, lens, held_out)
    assert (tuned[:-1] < 0.9 * logit[:-1]).all(), (tuned, logit)
    assert tuned[-1] == logit[-1] == 0


def one_block() -> HookedALM:
    """A block that adds one vector everywhere: what a translator's bias can undo."""
    cfg = HookedALMConfig(
        n_layers=1, d_model=6, n_heads=1, n_key_value_heads=1, d_head=4, d_mlp=3, d_vocab=13,
        n_ctx=50, eps=1e-5, act_fn="silu", attn_bias="qkv", qk_norm=False,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        layer_types=("full_attention",), sliding_window=None, original_architecture="one block",
        model_name="one block",
    )  # fmt: skip
    model = HookedALM(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if "v_proj.weight" in name or "mlp" in name:
                parameter.zero_()
    return model


def test_one_layer_converges() -> None:
    model = one_block()
    rows = residual_rows(
        model, model.encode(input_ids=torch.arange(13)[None]), torch.arange(13)[None]
    )
    rows = rows[:, 0]
    shift = rows[1] - rows[0]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift))
    assert shift.norm(dim=-1).min() > 0.5
    lens = TunedLens.untrained(model)
    first = held_out_kl(model, lens, [rows])[0]
    trainer = LensTrainer(model, lens, LensTraining(n_steps=400, weight_decay=0.0))
    for _ in range(400):
        trainer.step([rows])
    last = held_out_kl(model, lens, [rows])[0]
    assert first > 0.3
    assert last < 0.01 * first, (first, last)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_restored_training_goes_on_bit_by_bit(gqa: HookedALM, optimizer: LensOptimizer) -> None:
    options = LensTraining(n_steps=6, optimizer=optimizer)
    batches = [[token_rows(gqa, seed)] for seed in range(6)]

    def trainer() -> LensTrainer:
        return LensTrainer(gqa, TunedLens.untrained(gqa), options)

    whole, first, second = trainer(), trainer(), trainer()
    steps = [whole.step(batch) for batch in batches]
    for batch in batches[:3]:
        first.step(batch)
    state = {name: value.clone() for name, value in first.state().items()}
    first.step(batches[3])  # what is restored must not follow the trainer that it came from
    second.restore(state)
    assert second.n_done == 3
    given = {name: value.clone() for name, value in state.items()}
    again = [second.step(batch) for batch in batches[3:]]
    assert all(torch.equal(value, given[name]) for name, value in state.items()), "left as it was"
    for ours, theirs in zip(again, steps[3:], strict=True):
        assert torch.equal(ours.kl, theirs.kl)
        assert (ours.grad_norm, ours.learning_rate) == (theirs.grad_norm, theirs.learning_rate)
    for ours, theirs in zip(second.lens.parameters(), whole.lens.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert {k: v.shape for k, v in second.state().items()} == {k: v.shape for k, v in state.items()}

    for spoilt in (
        {name: value for name, value in state.items() if not name.endswith("bias")},
        {**state, "translators.0.bias": torch.zeros(3)},
        {**state, "more": torch.zeros(1)},
    ):
        with pytest.raises(InputError, match="got other tensors than this training has"):
            trainer().restore(spoilt)


# --- Refusals


def test_another_model_is_refused(tiny_models: TinyModels, gqa: HookedALM) -> None:
    lens = TunedLens.untrained(gqa)
    lens.check(gqa)
    other = tiny_models.hooked("mha")
    assert unembed_hash(other) != unembed_hash(gqa)
    with pytest.raises(InputError, match="was trained on another model"):
        lens.check(other)
    with pytest.raises(InputError, match="was trained on another model"):
        LensTrainer(other, lens, LensTraining())
    with pytest.raises(
        InputError, match=r"for 4 blocks of width 54, expected one for 1 of width 6"
    ):
        lens.check(one_block())


def test_hash_is_of_norm_epsilon_and_unembedding(gqa: HookedALM) -> None:
    before = unembed_hash(gqa)
    for parameter in (gqa.ln_final.weight, gqa.unembed.weight):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.5
        assert unembed_hash(gqa) != before
        parameter.data.copy_(kept)
    eps, gqa.ln_final.eps = gqa.ln_final.eps, 1e-3
    assert unembed_hash(gqa) != before
    gqa.ln_final.eps = eps
    assert unembed_hash(gqa) == before


def test_hash_does_not_depend_on_the_dtype_that_bf16_weights_are_loaded_in() -> None:
    model = one_block().bfloat16()
    found = unembed_hash(model)
    assert found == unembed_hash(model.float())
    assert found != unembed_hash(one_block())


def test_wrong_uses(gqa: HookedALM) -> None:
    lens, x = TunedLens.untrained(gqa), gqa.encode(**INPUTS)
    rows = residual_rows(gqa, x)
    short = TunedLens(3, 54, unembed_sha256=lens.unembed_sha256)
    with pytest.raises(InputError, match="got 4 depths, expected the 5"):
        lens_fidelity(gqa, rows[:-1], lens=lens)
    with pytest.raises(InputError, match="got 5 depths, expected the 4"):
        logit_lens(gqa, x, [3], lens=short)
    with pytest.raises(InputError, match="got 5 depths, expected the 4"):
        compare_depths(gqa, rows, torch.zeros(len(x), 1, dtype=torch.long), [], lens=short)
    for wrong in (
        {"n_steps": 0},
        {"learning_rate": 0.0},
        {"max_grad_norm": -1.0},
        {"weight_decay": float("nan")},
    ):
        with pytest.raises(InputError, match="training a tuned lens: got"):
            LensTraining(**wrong)  # type: ignore[arg-type]
    trainer = LensTrainer(gqa, lens, LensTraining(n_steps=3))
    with pytest.raises(InputError, match="step 1 of training a tuned lens: got 0 tokens"):
        trainer.step([])
    spoilt = token_rows(gqa, 0)
    spoilt[1, 2, 3] = float("nan")
    with pytest.raises(InputError, match="Lower the learning rate"):
        trainer.step([spoilt])
    assert trainer.n_done == 0
    assert not any(parameter.any() for parameter in lens.parameters())
