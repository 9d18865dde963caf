"""Losses and divergences along depth: by hand, against whole-vocabulary formulas, and HF."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reference import hf_activations, with_positions
from hooked_alm import HookedALM, InputError
from hooked_alm.config import HookedALMConfig
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading import divergence
from hooked_alm.methods.reading.divergence import Divergence, compare_depths, lockstep, rows_at_once
from hooked_alm.methods.reading.lens import LogitLens, residual_rows, unembed_rows
from tiny import N_LAYERS, VOCAB, TinyModels, hf_inputs
from tolerances import DIVERGENCE

LN2 = math.log(2)


def decoder(vocab: int) -> HookedALM:
    """A model whose lens gives the rows themselves, without the norm."""
    cfg = HookedALMConfig(
        n_layers=1, d_model=vocab, n_heads=1, n_key_value_heads=1, d_head=2, d_mlp=1, d_vocab=vocab,
        n_ctx=8, eps=1e-6, act_fn="silu", attn_bias="", qk_norm=False, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, sliding_window=None,
        layer_types=("full_attention",), original_architecture="none", model_name="by hand",
    )  # fmt: skip
    model = HookedALM(cfg)
    model.unembed.weight.data = torch.eye(vocab)
    return model


def compare(*logits: Sequence[float] | Tensor, targets: Sequence[int] | None = None) -> Divergence:
    """One position of two or more runs with these logits; run 0 against each other one."""
    rows = torch.stack([torch.as_tensor(one, dtype=torch.float32) for one in logits])
    aims = torch.tensor(targets or [0] * len(rows))[:, None]
    pairs = [(0, run) for run in range(1, len(rows))]
    return compare_depths(
        decoder(len(rows[0])), rows[None, :, None], aims, pairs, lens=LogitLens("none")
    )


# --- By hand: cards M-002-3 and M-002-4


def test_a_likelier_target_has_a_smaller_loss() -> None:
    half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    nll = compare(half, quarter).nll[0, :, 0]
    assert (nll[0] - nll[1]).item() == pytest.approx(-0.6931, abs=5e-5)
    swapped = compare(quarter, half).nll[0, :, 0]
    assert (swapped[0] - swapped[1]).item() == pytest.approx(0.6931, abs=5e-5)


def test_js_by_hand() -> None:
    even, odd = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert compare(even, odd).js.item() == pytest.approx(0.10175, abs=5e-6)
    assert compare([80.0, 0.0], [0.0, 80.0]).js.item() == pytest.approx(0.6931, abs=5e-5)
    # KL(even || odd) = ln 5 - ln 3, KL(odd || even) = 0.9 ln 1.8 + 0.1 ln 0.2.
    assert compare(even, odd).kl.item() == pytest.approx(math.log(5 / 3), abs=1e-6)
    back = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert compare(even, odd).kl_back.item() == pytest.approx(back, abs=1e-6)


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_invariant_i13(scale: float) -> None:
    """0 <= JS <= ln 2, symmetric and 0 for equal runs, to the bit; ΔNLL changes its sign."""
    a, b = (scale * torch.randn(5000) for _ in range(2))
    there, back = compare(a, b), compare(b, a)
    assert 0 < there.js.item() <= LN2 + 1e-6
    assert torch.equal(there.js, back.js)
    assert torch.equal(there.kl, back.kl_back)
    assert torch.equal(there.nll[:, 0] - there.nll[:, 1], -(back.nll[:, 0] - back.nll[:, 1]))
    same = compare(a, a)
    assert not same.js.any()
    assert not same.kl.any()
    assert torch.equal(same.nll[:, 0], same.nll[:, 1])


def test_js_falls_with_the_square_of_a_small_difference() -> None:
    """Where a formula with cancelling terms would give rounding noise."""
    base, step = torch.randn(3000), torch.randn(3000)
    js = [compare(base, base + eps * step).js.item() for eps in (1e-1, 1e-2)]
    assert js[0] / js[1] == pytest.approx(100, rel=0.02)


def test_a_hit_is_a_target_that_nothing_beats() -> None:
    hit = compare([1.0, 2.0, 0.0], [3.0, 2.0, 2.5], [1.0, 2.0, 2.0], targets=[1, 1, 2]).hit
    assert hit[0, :, 0].tolist() == [True, False, True]


# --- Against formulas over the whole vocabulary


def naive(logits: Tensor, targets: Tensor, pairs: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Cards M-002-3 and M-002-4 as written, in float64; ``[depth, run, pos, vocab]``."""
    log_p = logits.double().log_softmax(-1)
    found: dict[str, list[Tensor]] = {"js": [], "kl": [], "kl_back": []}
    for first, second in pairs:
        a, b = log_p[:, first], log_p[:, second]
        m = torch.stack([a, b]).logsumexp(0) - LN2
        found["js"].append(((a.exp() * (a - m)).sum(-1) + (b.exp() * (b - m)).sum(-1)) / 2)
        found["kl"].append((a.exp() * (a - b)).sum(-1))
        found["kl_back"].append((b.exp() * (b - a)).sum(-1))
    chosen = log_p.gather(-1, targets.expand(len(log_p), -1, -1)[..., None])[..., 0]
    top = logits.argmax(-1) == targets
    return {"nll": -chosen, "hit": top, **{k: torch.stack(v, 1) for k, v in found.items()}}


def largest_difference(ours: Divergence, expected: dict[str, Tensor]) -> float:
    assert torch.equal(ours.hit, expected["hit"])
    return max(
        (getattr(ours, name).double() - expected[name]).abs().max().item()
        for name in ("nll", "js", "kl", "kl_back")
    )


def two_runs(model: HookedALM, n: int = 9) -> tuple[list[ALMInput], Tensor, Tensor]:
    """Prompts of unequal length with one continuation: inputs, positions, targets."""
    prefixes = [model.encode(**hf_inputs([[40]], [8])), model.encode(**hf_inputs([[]], [13], 2))]
    continuation = torch.randint(3, 300, (1, n))
    inputs = [x.extend(continuation) for x in prefixes]
    positions = torch.stack([torch.arange(n) + x.shape[1] - 1 for x in prefixes])
    return inputs, positions, continuation.expand(2, -1)


@pytest.mark.parametrize("norm", ["final", "none"])
@pytest.mark.parametrize("tile", [(128, 1024), (4, 50), (1, 337)])
def test_streamed_is_what_the_whole_tensor_gives(
    gqa: HookedALM, monkeypatch: pytest.MonkeyPatch, norm: Any, tile: tuple[int, int]
) -> None:
    monkeypatch.setattr(divergence, "TILE", tile)
    inputs, positions, targets = two_runs(gqa)
    cache = torch.stack(list(lockstep(gqa, inputs, positions)))
    pairs = [(0, 1), (1, 0), (1, 1)]
    ours = compare_depths(gqa, cache, targets, pairs, lens=LogitLens(norm))
    expected = naive(unembed_rows(gqa, cache, norm=norm), targets, pairs)
    assert largest_difference(ours, expected) < DIVERGENCE
    streamed = compare_depths(
        gqa, lockstep(gqa, inputs, positions), targets, pairs, lens=LogitLens(norm)
    )
    assert torch.equal(streamed.js, ours.js)
    assert ours.nll.shape == (N_LAYERS + 1, 2, 9)
    assert ours.js.shape == (N_LAYERS + 1, 3, 9)


@pytest.mark.parametrize("variant", ["gqa", "mqa, sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_is_one_forward(
    tiny_models: TinyModels, variant: str, dtype: torch.dtype
) -> None:
    model = tiny_models.hooked(variant, dtype)
    inputs, positions, _ = two_runs(model)
    depths = list(lockstep(model, inputs, positions))
    for run, x in enumerate(inputs):
        whole = residual_rows(model, x, positions[run : run + 1])[:, 0]
        assert torch.equal(torch.stack(depths)[:, run], whole)


@torch.no_grad()
def test_against_hugging_face(tiny_models: TinyModels) -> None:
    """Every cell, from plain forwards whose residuals PyTorch hooks caught."""
    model, hf = tiny_models.hooked("gqa"), tiny_models.hf("gqa")
    arguments = [hf_inputs([[40]], [8]), hf_inputs([[]], [13], 2)]
    n = 9
    y = torch.randint(3, 300, (1, n))
    states, positions = [], []
    for one in arguments:
        start = one["input_ids"].shape[1]
        joined = {
            **one,
            "input_ids": torch.cat([one["input_ids"], y], 1),
            "attention_mask": torch.cat([one["attention_mask"], torch.ones_like(y)], 1),
        }
        found = hf_activations(hf, with_positions(joined))
        names = [f"blocks.{b}.hook_resid_pre" for b in range(N_LAYERS)]
        names.append(f"blocks.{N_LAYERS - 1}.hook_resid_post")
        states.append(torch.stack([found[name][0, start - 1 : start - 1 + n] for name in names]))
        positions.append(torch.arange(n) + start - 1)
    norm = hf.model.language_model.norm
    logits = hf.lm_head(norm(torch.stack(states, 1)))
    inputs = [model.encode(**one).extend(y) for one in arguments]
    ours = compare_depths(
        model, lockstep(model, inputs, torch.stack(positions)), y.expand(2, -1), [(0, 1)]
    )
    assert largest_difference(ours, naive(logits, y.expand(2, -1), [(0, 1)])) < DIVERGENCE


# --- Hooks, memory, errors


@torch.no_grad()
def test_hooks_see_their_own_run_and_edits_act(gqa: HookedALM) -> None:
    inputs, positions, targets = two_runs(gqa)
    lengths: list[int] = []
    plain = compare_depths(gqa, lockstep(gqa, inputs, positions), targets, [(0, 1)])
    watch = [("blocks.2.hook_mlp_out", lambda value, hook: lengths.append(value.shape[1]))]
    mute = [("blocks.1.hook_attn_out", lambda value, hook: torch.zeros_like(value))]
    hooked = compare_depths(gqa, lockstep(gqa, inputs, positions, [watch, mute]), targets, [(0, 1)])
    assert lengths == [inputs[0].shape[1]]
    assert torch.equal(hooked.nll[:, 0], plain.nll[:, 0])
    assert torch.equal(hooked.nll[:2, 1], plain.nll[:2, 1])
    assert not torch.isclose(hooked.nll[2:, 1], plain.nll[2:, 1]).any()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.n = max(self.n, out.numel())
        return out


@torch.no_grad()
def test_no_tensor_holds_more_than_the_budget(gqa: HookedALM) -> None:
    inputs, positions, targets = two_runs(gqa, n=60)
    cache = torch.stack(list(lockstep(gqa, inputs, positions)))
    budget = 100 * VOCAB * 4 * 2
    with Largest() as largest:
        compare_depths(gqa, cache, targets, [(0, 1)], max_bytes=budget)
    rows = rows_at_once(gqa, 2, budget)
    assert 1 < rows < 60
    assert largest.n <= 2 * rows * VOCAB + 54 * VOCAB
    with Largest() as whole:
        compare_depths(gqa, cache, targets, [(0, 1)])
    assert whole.n == 2 * 60 * VOCAB


def test_a_budget_below_one_position_is_refused(gqa: HookedALM) -> None:
    with pytest.raises(InputError, match=rf"vocabulary of {VOCAB}: got max_bytes=1000, expected"):
        rows_at_once(gqa, 2, 1000)
