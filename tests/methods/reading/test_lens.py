"""The logit lens against numbers by hand, the model's own logits and plain formulas."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_alm import ALMInput, HookedALM
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import InputError
from hooked_alm.methods.reading.lens import (
    LensNorm,
    LogitLens,
    lens_fidelity,
    logit_lens,
    readout_positions,
    residual_rows,
    unembed_rows,
)
from tiny import N_LAYERS, VOCAB, TinyModels, hf_inputs
from tolerances import LENS, LENS_SUMS

INPUTS = hf_inputs([[63], [23]], [9, 14])
POSITIONS = torch.tensor([[26, 0, 7], [26, 5, 19]])
"""Out of order, and no pads: the second row is padded by 5."""
TOKENS = [301, 3, 77, 3]
"""Out of order, one twice."""
DTYPES = [torch.float32, torch.bfloat16]


class Shapes(TorchDispatchMode):
    """Shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, tuple | list) else (out,)
        self.seen += [tuple(t.shape) for t in outputs if isinstance(t, Tensor)]
        return out


def states(model: HookedALM, x: ALMInput) -> Tensor:
    """Every depth from a cache ``[depth, batch, pos, d_model]``."""
    _, cache = model.run_with_cache(x)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(N_LAYERS)]
    return torch.stack([cache[name] for name in (*names, f"blocks.{N_LAYERS - 1}.hook_resid_post")])


def full_lens(model: HookedALM, resid: Tensor, *, norm: bool = True) -> Tensor:
    """The formula of block S-1, written out, in float64."""
    r = resid.double()
    if norm:
        rms = (r.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt()
        r = r / rms * model.ln_final.w.double()
    return r @ model.W_U.double()


def test_card_s1() -> None:
    cfg = HookedALMConfig(
        n_layers=1, d_model=2, n_heads=1, n_key_value_heads=1, d_head=2, d_mlp=3, d_vocab=2,
        n_ctx=5, eps=0.0, act_fn="silu", attn_bias="qkv", qk_norm=False,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        layer_types=("full_attention",), sliding_window=None, original_architecture="S-1",
        model_name="S-1",
    )  # fmt: skip
    model = HookedALM(cfg)
    with torch.no_grad():
        model.unembed.weight.copy_(torch.eye(2))
        model.ln_final.weight.copy_(torch.tensor([2.0, 1.0]))
    r = torch.tensor([1.0, 1.5])

    def difference(**options: object) -> float:
        z = unembed_rows(model, r, **options)  # type: ignore[arg-type]
        return float(z[0] - z[1])

    assert difference(norm="none") == -0.5
    assert difference() == pytest.approx(0.3922, abs=5e-5)
    assert -float(unembed_rows(model, r, [1, 0]).diff()) == pytest.approx(-0.3922, abs=5e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_cache(tiny_models: TinyModels, dtype: torch.dtype) -> None:
    model = tiny_models.hooked("gqa", dtype)
    x = model.encode(**INPUTS)
    expected = states(model, x)
    assert readout_positions(x).tolist() == [[26], [26]]
    assert torch.equal(residual_rows(model, x), expected[:, :, -1:])
    rows = residual_rows(model, x, POSITIONS)
    assert rows.dtype == dtype
    for row, positions in enumerate(POSITIONS.tolist()):
        for i, position in enumerate(positions):
            assert torch.equal(rows[:, row, i], expected[:, row, position])


def test_readout_is_the_last_real_position_also_under_right_padding(gqa: HookedALM) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
    x = gqa.encode(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert readout_positions(x).tolist() == [[3], [2]]


@pytest.mark.parametrize("norm", ["final", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lens_is_the_formula(tiny_models: TinyModels, dtype: torch.dtype, norm: LensNorm) -> None:
    model = tiny_models.hooked("gqa", dtype)
    x = model.encode(**INPUTS)
    lens = logit_lens(model, x, range(VOCAB), positions=POSITIONS, lens=LogitLens(norm))
    assert lens.shape == (N_LAYERS + 1, 2, 3, VOCAB)
    assert lens.dtype == torch.float32
    assert not lens.requires_grad
    expected = full_lens(model, residual_rows(model, x, POSITIONS), norm=norm == "final")
    # The lens is fp32 whatever the model's dtype.
    torch.testing.assert_close(lens.double(), expected, atol=LENS[torch.float32], rtol=0)


def test_restricted_lens_is_the_columns_of_the_full_one(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    rows = residual_rows(gqa, x, POSITIONS)
    full = unembed_rows(gqa, rows)
    restricted = logit_lens(gqa, x, TOKENS, positions=POSITIONS)
    torch.testing.assert_close(restricted, full[..., TOKENS], atol=LENS[torch.float32], rtol=0)
    assert torch.equal(restricted[..., 1], restricted[..., 3])


def test_final_depth_is_the_output(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    with torch.no_grad():
        logits = gqa(x)
    lens = logit_lens(gqa, x, TOKENS)[-1, :, 0]
    torch.testing.assert_close(lens, logits[:, -1, TOKENS], atol=LENS[torch.float32], rtol=0)


def test_restricted_lens_makes_nothing_of_the_size_of_the_vocabulary(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    with Shapes() as shapes:
        logit_lens(gqa, x, TOKENS, positions=POSITIONS)
    # The table itself, [VOCAB, d], is only read.
    assert shapes.seen
    assert not [shape for shape in shapes.seen if shape and shape[-1] == VOCAB]
    with Shapes() as shapes:
        gqa(x)
    assert (2, 27, VOCAB) in shapes.seen, "the recorder sees logits where there are some"


def direct_fidelity(rows: Tensor, model: HookedALM, *, norm: bool) -> dict[str, Tensor]:
    """All quantities at once, over the full softmax, in float64."""
    final = torch.distributions.Categorical(logits=full_lens(model, rows[-1]))
    lens = torch.distributions.Categorical(logits=full_lens(model, rows, norm=norm))
    return {
        "kl": torch.distributions.kl_divergence(final.expand(lens.batch_shape), lens),
        "agrees": (lens.mode == final.mode).double(),
        "entropy": lens.entropy(),
        "residual_norm": rows.double().pow(2).sum(-1).sqrt(),
    }


@pytest.mark.parametrize("norm", ["final", "none"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fidelity_is_the_full_softmax(
    tiny_models: TinyModels, dtype: torch.dtype, chunk: int, norm: LensNorm
) -> None:
    model = tiny_models.hooked("gqa", dtype)
    rows = residual_rows(model, model.encode(**INPUTS), POSITIONS)
    fidelity = lens_fidelity(model, rows, lens=LogitLens(norm), chunk=chunk)
    for name, expected in direct_fidelity(rows, model, norm=norm == "final").items():
        got = getattr(fidelity, name)
        assert got.shape == (N_LAYERS + 1, 2, 3), name
        torch.testing.assert_close(got.double(), expected, atol=LENS_SUMS, rtol=0)


def test_fidelity_of_the_output_is_perfect(gqa: HookedALM) -> None:
    rows = residual_rows(gqa, gqa.encode(**INPUTS), POSITIONS)
    fidelity = lens_fidelity(gqa, rows)
    assert torch.equal(fidelity.kl[-1], torch.zeros(2, 3))
    assert torch.equal(fidelity.agrees[-1], torch.ones(2, 3))
    assert (fidelity.kl[:-1] > 0.05).all(), "a random model's early depths do not know its output"
    # Against the model's own output, which is always normed (defect C6).
    assert (lens_fidelity(gqa, rows, lens=LogitLens("none")).kl[-1] > 0.05).all()


def test_fidelity_holds_a_chunk_of_the_vocabulary_at_once(gqa: HookedALM) -> None:
    rows = residual_rows(gqa, gqa.encode(**INPUTS), torch.arange(5, 27).expand(2, -1))
    with Shapes() as shapes:
        lens_fidelity(gqa, rows, chunk=7)
    # All but a view of the table.
    with_vocabulary = {shape[:-1] for shape in shapes.seen if shape and shape[-1] == VOCAB}
    assert with_vocabulary == {(7,), (44 % 7,), (gqa.cfg.d_model,)}


def test_unknown_span_or_position_is_refused(gqa: HookedALM) -> None:
    x = gqa.encode(**INPUTS)
    with pytest.raises(IndexError):
        residual_rows(gqa, x, torch.tensor([[27], [27]]))
    with pytest.raises(InputError, match="this input has audio"):
        x.spans.positions("speech", 0)
    # A negative id would be counted from the end of the vocabulary.
    last = gqa.cfg.d_vocab - 1
    with pytest.raises(InputError, match=rf"tokens \[-1, {last + 1}\]: .* has ids 0 to {last}\."):
        logit_lens(gqa, x, [-1, 0, last, last + 1])
