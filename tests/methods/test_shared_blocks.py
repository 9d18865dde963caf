"""The checks of the shared building blocks S-1 to S-13 that have no other home, and where the
others are: every number that ``docs/methods.md`` gives with a block is asserted somewhere."""

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from hooked_alm import HookedALM
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.metrics import LogitDiff, Logits, LogProb, Metric, Prob, Reference
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.statistics.bootstrap import handoff_index
from hooked_alm.methods.statistics.similarity import linear_cka
from tolerances import GATES

TESTS_FOLDER = Path(__file__).parents[1]
TESTS: dict[str, dict[str, tuple[str, ...]]] = {
    "S-1": {
        "methods/reading/test_lens": ("test_card_s1",),
        "model/test_invariants": (
            "test_i2_lens_of_the_last_depth_is_the_output",
            "test_i15_lens_by_patching_the_last_block",
        ),
    },
    "S-2": {
        "methods/reading/test_tuned_lens": (
            "test_untrained_is_the_logit_lens",
            "test_training_helps_on_held_out_prompts_at_every_depth",
            "test_one_layer_converges",
        ),
    },
    "S-3": {
        "model/test_invariants": (
            "test_i3_self_patch_changes_nothing",
            "test_i4_patching_every_position_gives_the_donor",
        ),
        "methods/patching/test_patch": ("test_ends_of_the_coefficient",),
    },
    "S-4": {"methods/patching/test_alignment": ("test_card_s4",)},
    "S-5": {
        "methods/reading/test_labels": ("test_card_s5", "test_colliding_first_tokens_are_refused")
    },
    "S-6": {
        "methods/reading/test_attention_mass": (
            "test_card_s6",
            "test_mass_is_the_sum_of_the_pattern",
        ),
        "model/test_invariants": ("test_i9_attention_sums_to_one",),
    },
    "S-7": {
        "methods/statistics/test_bootstrap": (
            "test_constant_has_a_zero_width_interval",
            "test_two_values",
        ),
    },
    "S-8": {"methods/statistics/test_bootstrap": ("test_strata_constant",)},
    "S-9": {
        "methods/statistics/test_bootstrap": (
            "test_moments_by_hand",
            "test_moments_equal_numpy_for_any_batching",
        ),
    },
    "S-10": {
        "methods/test_shared_blocks": (
            "test_cka_of_a_rotated_and_scaled_copy_is_one",
            "test_cka_of_unrelated_representations",
        ),
    },
    "S-11": {"methods/test_shared_blocks": ("test_hand_off_depth",)},
    "S-12": {"methods/test_shared_blocks": ("test_noising_and_denoising_of_gates",)},
    "S-13": {"methods/test_shared_blocks": ("test_metrics_of_a_moved_logit",)},
}
"""Block -> test module, by its path -> the functions that assert its numbers."""


def test_every_block_has_its_tests() -> None:
    missing = []
    for block, modules in TESTS.items():
        for module, names in modules.items():
            tree = ast.parse((TESTS_FOLDER / f"{module}.py").read_text("utf-8"))
            found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            missing += [f"{block}: {module}.{name}" for name in names if name not in found]
    assert missing == []
    assert list(TESTS) == [f"S-{number}" for number in range(1, 14)]


# --- S-10: CKA


def representations(n: int, p: int, q: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unrelated Gaussian ones of the same samples."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, p, generator=generator), torch.randn(n, q, generator=generator)


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_of_a_rotated_and_scaled_copy_is_one(debiased: bool) -> None:
    x, noise = representations(30, 7, 7, 0)
    x = x + 5
    assert linear_cka(x, x, debiased=debiased) == pytest.approx(1, abs=1e-12)
    rotation = torch.linalg.qr(noise.T @ noise).Q
    copy = -3.5 * (x @ rotation) + 11
    # The rotation is made in fp32.
    assert linear_cka(x, copy, debiased=debiased) == pytest.approx(1, abs=1e-6)
    y = (x - 5).square() + noise
    plain = linear_cka(x, y, debiased=debiased)
    assert 0 < plain < 0.9
    assert linear_cka(copy, y, debiased=debiased) == pytest.approx(plain, abs=1e-6)
    assert linear_cka(y, x, debiased=debiased) == pytest.approx(plain, abs=1e-12)
    # Another scale of one feature alone is another representation.
    stretched = x * torch.tensor([9.0, *[1.0] * 6])
    assert abs(linear_cka(stretched, y, debiased=debiased) - plain) > 0.01


@pytest.mark.parametrize(("n", "p", "biased"), [(40, 48_000, 0.999), (1500, 512, 0.25)])
def test_cka_of_unrelated_representations(n: int, p: int, biased: float) -> None:
    """The plain estimator finds them alike (C22). Debiased, draws scatter about 0.

    Off the diagonal the two kernels are unrelated: their correlation over n(n−3)/2 pairs has a
    standard deviation of about √(2/n(n−3)), 0.037 for n = 40; ±0.06 is one draw of that.
    """
    x, y = representations(n, p, p, 0)
    assert linear_cka(x, y, debiased=False) == pytest.approx(biased, abs=0.01)
    spread = (2 / (n * (n - 3))) ** 0.5
    n_draws = 12 if n < 100 else 3
    few = p if n > 100 else 4_000
    draws = [linear_cka(*representations(n, few, few, seed)) for seed in range(n_draws)]
    assert abs(linear_cka(x, y)) < 4 * spread
    assert max(map(abs, draws)) < 4 * spread
    assert abs(np.mean(draws)) < 4 * spread / n_draws**0.5


def test_cka_by_definition() -> None:
    """The plain one in feature space, the debiased one as a mean over four different samples."""
    x, y = (one.double() for one in representations(7, 3, 4, 1))
    y = y + x @ torch.ones(3, 4, dtype=torch.float64)

    def features(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a - a.mean(0)).T @ (b - b.mean(0))).square().sum()

    expected = features(x, y) / (features(x, x) * features(y, y)).sqrt()
    assert linear_cka(x, y, debiased=False) == pytest.approx(float(expected), rel=1e-12)

    def unbiased(a: torch.Tensor, b: torch.Tensor) -> float:
        k, m = (a @ a.T).numpy(), (b @ b.T).numpy()
        return float(
            np.mean(
                [
                    k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
                    for i, j, q, r in itertools.permutations(range(7), 4)
                ]
            )
        )

    hsic = unbiased(x, y) / (unbiased(x, x) * unbiased(y, y)) ** 0.5
    assert linear_cka(x, y) == pytest.approx(hsic, rel=1e-9)


def test_cka_refuses_and_says_when_it_is_undefined() -> None:
    x, y = representations(6, 3, 3, 0)
    with pytest.raises(InputError, match="got 6 and 5 samples"):
        linear_cka(x, y[:5])
    with pytest.raises(InputError, match="at least 4"):
        linear_cka(x[:3], y[:3])
    spoilt = y.clone()
    spoilt[2, 1] = torch.nan
    with pytest.raises(InputError, match="0 and 1 of them with NaN"):
        linear_cka(x, spoilt)
    for debiased in (True, False):
        assert np.isnan(linear_cka(x, torch.full((6, 3), 0.1), debiased=debiased))


# --- S-11: hand-off depth


def test_hand_off_depth() -> None:
    for recovery, depth in (
        ([1, 1, 0.9, 0.6, 0.4, 0.1, 0], 4),
        ([1, 0.4, 0.7, 0.3], 3),
        ([0.4, 0.3], 0),
        ([1, 0.2, 0.9], 3),
        ([1, 0.5, 0.5], 3),
    ):
        assert handoff_index(np.array([recovery], dtype=float)).tolist() == [depth], recovery
    both = np.array([[1.0, 0.5, 0.2], [0.2, 0.1, 0.0]])
    assert handoff_index(both).tolist() == [2, 0]
    assert handoff_index(both, includes_half=True).tolist() == [1, 0]


# --- S-12: noising and denoising, of a model that is a gate

CONSTANT, STEEP, WIDTH = 1000.0, 80.0, 6
IN_A, IN_B, A, B, OUT = range(1, WIDTH)
"""The residual stream: a constant that keeps the norm the same, the inputs as the embedding has
them, as block 0 passes them on, and the gate's answer."""


def gate_model(gate: str) -> HookedALM:
    """Two blocks of MLPs: neurons 0 and 1 of block 0 carry a and b, one of block 1 is the gate.

    Token t stands for a = t // 2 and b = t % 2; token 4 for nothing.
    """
    model = HookedALM(
        HookedALMConfig(
            n_layers=2, d_model=WIDTH, n_heads=1, n_key_value_heads=1, d_head=4, d_mlp=2, d_vocab=5,
            n_ctx=8, eps=0.0, act_fn="silu", attn_bias="qkv", qk_norm=False,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            layer_types=("full_attention",) * 2, sliding_window=None,
            original_architecture=gate, model_name=gate,
        )
    )  # fmt: skip
    one, unit = 1 / WIDTH**0.5, CONSTANT / WIDTH**0.5  # what the norm makes of 1 and of CONSTANT
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln" in name else 0.0)
        model.embed.weight[:, 0] = CONSTANT
        model.embed.weight[:4, IN_A] = torch.tensor([0.0, 0.0, 1.0, 1.0])
        model.embed.weight[:4, IN_B] = torch.tensor([0.0, 1.0, 0.0, 1.0])
        first, second = model.blocks[0].mlp, model.blocks[1].mlp
        for neuron, (source, target) in enumerate(((IN_A, A), (IN_B, B))):
            first.gate_proj.weight[neuron, 0] = STEEP * one
            first.up_proj.weight[neuron, source] = unit
            first.down_proj.weight[target, neuron] = 1 / STEEP
        # silu(STEEP · x) is STEEP · max(x, 0), to the last bit but near 0.
        sign, threshold = (1, 1.5) if gate == "and" else (-1, 0.5)
        second.gate_proj.weight[0, [A, B]] = sign * STEEP * unit
        second.gate_proj.weight[0, 0] = -sign * STEEP * threshold * one
        second.up_proj.weight[0, 0] = one
        second.down_proj.weight[OUT, 0] = sign * 2 / STEEP
        model.unembed.weight[0, OUT] = unit
    return model


def gate_input(model: HookedALM, a: int, b: int) -> ALMInput:
    return model.encode(input_ids=torch.tensor([[4, 2 * a + b]]))


@torch.no_grad()
@pytest.mark.parametrize("gate", ["and", "or"])
def test_gates_are_gates(gate: str) -> None:
    model = gate_model(gate)
    for a, b in itertools.product((0, 1), repeat=2):
        logits = model(gate_input(model, a, b))[0, -1]
        is_on = (a and b) if gate == "and" else (a or b)
        # The OR is 0 where it is on, and −1 where it is not.
        expected = float(is_on) - (gate == "or")
        assert float(logits[0] - logits[1]) == pytest.approx(expected, abs=GATES)


@pytest.mark.parametrize("engine", ["hooks", "fast"])
@pytest.mark.parametrize(
    ("gate", "restored", "broken"), [("and", 0, 1), ("or", 1, 0)], ids=["and", "or"]
)
def test_noising_and_denoising_of_gates(
    gate: str, restored: int, broken: int, engine: Engine
) -> None:
    """Clean is (1, 1), corrupt (0, 0); one input is exchanged, or both.

    Denoising patches the corrupt run with the clean one: is a enough? Noising patches the clean run
    with the corrupt one: is a needed? ``recovery`` is the share restored in the one, the damage in
    the other.
    """
    model = gate_model(gate)
    clean, corrupt = (gate_input(model, value, value) for value in (1, 0))

    def recovery(base: ALMInput, donor: ALMInput) -> list[float]:
        result = patch(
            model, base, donor, LogitDiff(0, 1), site="post", layers=[0],
            neurons=[0, 1, (0, 1)], places=["readout"], engine=engine,
        )  # fmt: skip
        return result.recovery.flatten().tolist()

    assert recovery(corrupt, clean) == pytest.approx([restored, restored, 1], abs=GATES)
    assert recovery(clean, corrupt) == pytest.approx([broken, broken, 1], abs=GATES)


# --- S-13: metrics


class NoReference(Reference):
    """Metrics of one run alone look at no other."""

    base = donor = torch.zeros(2)


@pytest.mark.parametrize(("p", "gained"), [(0.01, 0.0167), (0.5, 0.2311)])
def test_metrics_of_a_moved_logit(p: float, gained: float) -> None:
    """+1 is +1 in logits wherever it starts; in probability it depends on it."""
    before = torch.tensor([[np.log(p), np.log(1 - p)]], dtype=torch.float32)
    after = before + torch.tensor([1.0, 0.0])

    def moved(metric: Metric) -> float:
        tokens = metric.tokens(0)
        old, new = (
            metric(logits if tokens is None else logits[:, list(tokens)], 0, NoReference())
            for logits in (before, after)
        )
        return float((new - old).squeeze())

    assert moved(Prob(0)) == pytest.approx(gained, abs=5e-5)
    assert moved(Logits([0])) == pytest.approx(1, abs=1e-6)
    assert moved(LogitDiff(0, 1)) == pytest.approx(1, abs=1e-6)
    # Log-probability lies between: nearly the logit's where the token is unlikely.
    odds = p / (1 - p)
    share = (1 + odds) / (1 + np.e * odds)
    assert moved(LogProb(0)) == pytest.approx(1 + np.log(share), abs=1e-6)
