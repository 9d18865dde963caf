"""TransformerLens' other tools, with audio where they run a prompt, on every layout of heads."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformer_lens import SVDInterpreter, evals
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.head_detector import detect_head
from transformer_lens.tools import training
from transformer_lens.tools.analysis import (
    JacobianLens,
    attention_head_subspace_affinity,
    fit_sparse_probe,
    interchange,
)
from transformer_lens.utilities import composition_scores, exploratory_utils
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from hf_reference import hf_activations, with_positions
from hooked_alm import ALMInput, HookedALM, InputError
from tiny import AUDIO_EOS, TinyModels, hf_inputs, randomise
from tiny_text import SIZES, VOCAB, TextModels
from tolerances import DETECTED, SOLVED, TRAINED
from two_clips import CLOSE, two_clips

# --- heads that look a certain way -------------------------------------------------------------


def repetitive(model: HookedALM) -> tuple[ALMInput, dict[str, Any]]:
    """One row whose words come twice, around a clip of 5 positions."""
    inputs = hf_inputs([[22]], [12])
    ids = inputs["input_ids"]
    ids[0, -4:] = ids[0, 1:5]
    return model.encode(**inputs), inputs


def expected_look(kind: str, ids: list[int], audio: list[int]) -> Tensor:
    """Where a head of some kind would look; audio positions are nobody's duplicates."""

    def same(pos: int, other: int) -> bool:
        return ids[pos] == ids[other] and other < pos and not {pos, other} & {*audio}

    look = torch.zeros(len(ids), len(ids))
    for pos in range(len(ids)):
        for other in range(pos + 1):
            look[pos, other] = {
                "previous_token_head": other == pos - 1,
                "duplicate_token_head": same(pos, other),
                "induction_head": other > 0 and same(pos, other - 1),
            }[kind]
    return look


@torch.no_grad()
@pytest.mark.parametrize("kind", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_detect_head(any_model: HookedALM, heads: str, tiny_models: TinyModels, kind: str) -> None:
    """Scores from the attention weights of Hugging Face's eager run, the clip included."""
    x, inputs = repetitive(any_model)
    hf = tiny_models.hf("mha" if heads == "mha" else "gqa", attention="eager")
    seen = hf_activations(hf, with_positions(inputs))
    patterns = torch.stack([seen[f"blocks.{layer}.attn.hook_pattern"][0] for layer in range(4)])
    audio = x.spans.positions("audio", 0)
    look = expected_look(kind, inputs["input_ids"][0].tolist(), audio)
    assert len(audio) == 5
    assert look.sum() >= 4
    share = (patterns * look).sum((-2, -1)) / patterns.sum((-2, -1))
    torch.testing.assert_close(detect_head(any_model, x, kind), share, **CLOSE)
    distance = 1 - (patterns - look).abs().sum((-2, -1)) / len(look)
    found = detect_head(any_model, x, kind, error_measure="abs")
    torch.testing.assert_close(found, distance, atol=DETECTED, rtol=0)
    patterns[..., 0] = 0
    patterns.diagonal(dim1=-2, dim2=-1).zero_()
    share = (patterns * look).sum((-2, -1)) / patterns.sum((-2, -1))
    found = detect_head(any_model, x, kind, [(2, 4)], exclude_bos=True, exclude_current_token=True)
    torch.testing.assert_close(found[2, 4], share[2, 4], **CLOSE)
    assert (found == -1).sum() == 4 * 6 - 1
    cache = any_model.run_with_cache(x, remove_batch_dim=True)[1]
    torch.testing.assert_close(
        detect_head(any_model, x, look, cache=cache), detect_head(any_model, x, kind)
    )


@torch.no_grad()
def test_detect_head_takes_one_prompt_without_pads(gqa: HookedALM) -> None:
    """Pads would be counted, and several rows have several answers."""
    x, *_ = two_clips(gqa, [[10], [22]], [4, 4])
    with pytest.raises(InputError, match="has pads"):
        detect_head(gqa, x, "previous_token_head")
    x, *_ = two_clips(gqa, [[10], [10]], [4, 4])
    with pytest.raises(InputError, match="2 rows"):
        detect_head(gqa, x, "previous_token_head")
    by_row = [detect_head(gqa, row, "previous_token_head") for row in x]
    assert not torch.equal(*by_row)


def test_an_input_looks_like_ids_to_who_compares_them(gqa: HookedALM) -> None:
    """Rows repeat with their clips; every audio position has an id of its own."""
    x, *_ = two_clips(gqa, [[10], [10]], [4, 4])
    twice = x.cpu().repeat(2, 1)
    assert torch.equal(twice.tokens, x.tokens.repeat(2, 1))
    assert twice.clip_rows == (0, 1, 2, 3)
    assert twice.clips[2] is x.clips[0]
    ids = x.tokens.clone()
    ids[:, 3:5] = torch.tensor([-4, -5])
    assert torch.equal(torch.from_numpy(x.numpy()), ids)
    assert (ids[:, 5] == AUDIO_EOS).all()
    with pytest.raises(InputError, match="rows only"):
        x.repeat(1, 2)


# --- interchange interventions -----------------------------------------------------------------

ANSWERS = [5, 6, 7]
AT = torch.tensor([3, 4, 8])
"""Per row: the clip, the clip, the readout."""
ROWS = [[10], [10], [10]], [5, 5, 5]


@pytest.fixture
def swap(any_model: HookedALM, heads: str, tiny_models: TinyModels) -> "Swap":
    """Three prompts with two clips each."""
    hf = tiny_models.hf("mha" if heads == "mha" else "gqa")
    base, donor, hf_base, hf_donor = two_clips(any_model, *ROWS)
    return Swap(any_model, hf, base, donor, with_positions(hf_base), with_positions(hf_donor))


class Swap:
    """The same interventions, in both models."""

    def __init__(self, model: HookedALM, hf: Any, *prompts: Any) -> None:
        self.model, self.hf = model, hf
        self.base, self.donor, self.hf_base, self.hf_donor = prompts

    def answers(self, x: Any) -> Tensor:
        """What the tool is given to run the model: the audio goes with ``x``."""
        return self.model(x)[:, -1, ANSWERS]

    def hf_answers(self, module: nn.Module, new: Callable[[Tensor], Tensor]) -> Tensor:
        """Hugging Face's answers, with what one module reads at ``AT`` replaced."""

        def replaced(_: Any, args: Any) -> Any:
            value = args[0].clone()
            value[range(3), AT] = new(value[range(3), AT])
            return (value, *args[1:])

        handle = module.register_forward_pre_hook(replaced)
        try:
            return self.hf(**self.hf_base).logits[:, -1, ANSWERS]
        finally:
            handle.remove()


@torch.no_grad()
def test_collect_activations(swap: Swap) -> None:
    """One position per row, in batches of two."""
    name = "blocks.2.hook_resid_pre"
    found = interchange.collect_activations(
        swap.model, name, swap.donor, swap.answers, positions=AT, batch_size=2
    )
    expected = hf_activations(swap.hf, swap.hf_donor)[name][range(3), AT]
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_interchange(swap: Swap) -> None:
    """A subspace of the stream, its norm-matched placebo, and a few neurons."""
    seen = hf_activations(swap.hf, swap.hf_donor)
    block = swap.hf.model.language_model.layers[2]
    name = "blocks.2.hook_resid_pre"
    source = seen[name][range(3), AT]
    basis, other = (interchange.random_basis(54, 6, seed) for seed in (0, 1))
    part = interchange.SubspaceInterchange(basis, strength=0.7)

    def moved(h: Tensor) -> Tensor:
        return 0.7 * (source - h) @ basis @ basis.T

    def placebo(h: Tensor) -> Tensor:
        step = (source - h) @ other @ other.T
        return h + step * (moved(h).norm(dim=-1) / step.norm(dim=-1))[:, None]

    def run(intervention: Any, name: str, source: Tensor) -> Tensor:
        return interchange.intervened_logits(
            swap.model, name, intervention, swap.base, source, swap.answers,
            positions=AT, batch_size=2,
        )  # fmt: skip

    expected = swap.hf_answers(block, lambda h: h + moved(h))
    torch.testing.assert_close(run(part, name, source), expected, **CLOSE)
    assert (expected - swap.answers(swap.base)).abs().amin(-1).min() > 1e-3
    torch.testing.assert_close(
        run(interchange.NormMatchedPlacebo(part, other), name, source),
        swap.hf_answers(block, placebo),
        **CLOSE,
    )
    neurons = [2, 9, 30]
    name = "blocks.2.mlp.hook_post"
    source = seen[name][range(3), AT]

    def set_neurons(h: Tensor) -> Tensor:
        return h.index_copy(1, torch.tensor(neurons), source[:, neurons])

    found = run(
        interchange.SubspaceInterchange(interchange.neuron_basis(34, neurons)), name, source
    )
    torch.testing.assert_close(found, swap.hf_answers(block.mlp.down_proj, set_neurons), **CLOSE)


def test_fit_das(swap: Swap) -> None:
    """The losses of the same training written out on Hugging Face's model."""
    targets = torch.tensor([0, 2, 1])
    name = "blocks.2.hook_resid_pre"
    gradients = [w.grad for w in swap.model.parameters()]
    found = interchange.fit_das(
        swap.model, name, swap.base, swap.donor, targets, swap.answers, rank=4,
        base_positions=AT, source_positions=AT, epochs=4, micro_batch_size=2,
    )  # fmt: skip
    source = hf_activations(swap.hf, swap.hf_donor)[name][range(3), AT]

    def loss_with(basis: Tensor) -> Tensor:
        block = swap.hf.model.language_model.layers[2]
        logits = swap.hf_answers(block, lambda h: h + (source - h) @ basis @ basis.T)
        return F.cross_entropy(logits, targets)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        subspace = interchange.LearnedSubspace(54, 4)
    optimizer = torch.optim.Adam(subspace.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = loss_with(subspace.basis)
        weights = list(subspace.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
        losses.append(float(loss.detach()))
    assert found.losses[0] == pytest.approx(losses[0], abs=CLOSE["atol"])
    assert found.losses == pytest.approx(losses, abs=TRAINED)
    assert losses[-1] < losses[0] - 10 * TRAINED
    assert loss_with(found.basis).detach() < losses[-1]
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(4), **CLOSE)
    weights = list(swap.model.parameters())
    assert all(w.requires_grad for w in weights)
    assert all(w.grad is before for w, before in zip(weights, gradients, strict=True))


@torch.no_grad()
def test_an_untrained_copy(any_model: HookedALM) -> None:
    """`reinitialized` resets every parameter, hears the audio, and leaves the model alone."""
    x, other, *_ = two_clips(any_model)
    before = any_model(x)
    copy = interchange.reinitialized(any_model, seed=0)
    assert torch.equal(any_model(x), before)
    assert torch.equal(copy.ln_final.w, torch.ones(54))
    for name, weight in any_model.named_parameters():
        assert not torch.equal(weight, copy.get_parameter(name)), name
    assert not torch.equal(copy(x), copy(other))
    again = interchange.reinitialized(any_model, seed=0)
    assert torch.equal(again(x), copy(x))
    assert copy.cfg.n_key_value_heads == any_model.cfg.n_key_value_heads


# --- probes and weights ------------------------------------------------------------------------


@torch.no_grad()
def test_sparse_probe(any_model: HookedALM, heads: str, tiny_models: TinyModels) -> None:
    """Is a position audio? Support, optimum and accuracy from Hugging Face's activations."""
    x, _, inputs, _ = two_clips(any_model, [[40], [30]], [9, 14])
    real, name = x.attention_mask.bool(), "blocks.1.hook_resid_post"
    is_audio = x.spans.mask("audio")[real]
    features = any_model.run_with_cache(x, names_filter=name)[1][name][real]
    found = fit_sparse_probe(features, is_audio, k=3)
    hf = tiny_models.hf("mha" if heads == "mha" else "gqa")
    seen = hf_activations(hf, with_positions(inputs))[name][real]
    train, y = seen[found.train_indices], is_audio[found.train_indices]
    difference = train[y].mean(0) - train[~y].mean(0)
    torch.testing.assert_close(found.feature_scores.float(), difference, **CLOSE)
    assert {*found.selected_features.tolist()} == {*difference.abs().topk(3).indices.tolist()}
    picked = train[:, found.selected_features].double()
    # At the optimum the weighted residuals are orthogonal to each feature, up to the penalty.
    wrong = torch.sigmoid(picked @ found.coefficients + found.intercept) - y.double()
    weight = torch.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
    slope = (weight * wrong) @ picked / len(y) + found.l2_strength * found.coefficients
    torch.testing.assert_close(slope, torch.zeros(3).double(), atol=SOLVED, rtol=0)
    held_out = seen[found.test_indices][:, found.selected_features].double()
    guess = held_out @ found.coefficients + found.intercept >= 0
    right = (guess == is_audio[found.test_indices]).double().mean()
    assert found.metrics.accuracy == pytest.approx(float(right))


def hf_heads(hf: Any, layer: int, role: str) -> Tensor:
    """Weights ``[head, d_model, d_head]`` of the published model, kv heads once per query head."""
    attn = hf.model.language_model.layers[layer].self_attn
    if role == "O":
        return attn.o_proj.weight.T.unflatten(0, (-1, attn.head_dim)).mT
    stored = getattr(attn, f"{role.lower()}_proj").weight.unflatten(0, (-1, attn.head_dim)).mT
    return stored.repeat_interleave(6 // len(stored), 0)


@torch.no_grad()
@pytest.mark.parametrize("role", ["Q", "K", "V"])
def test_head_subspace_affinity(
    any_model: HookedALM, heads: str, tiny_models: TinyModels, role: str
) -> None:
    """Overlap of what one head writes and another reads, from QR bases."""
    hf = tiny_models.hf("mha" if heads == "mha" else "gqa")
    found = attention_head_subspace_affinity(any_model, target_role=role)
    for (layer, head), (reader, other) in (((0, 1), (2, 4)), ((1, 4), (3, 1)), ((2, 2), (3, 3))):
        written = torch.linalg.qr(hf_heads(hf, layer, "O")[head])[0]
        read = torch.linalg.qr(hf_heads(hf, reader, role)[other])[0]
        expected = (written.T @ read).pow(2).sum()
        torch.testing.assert_close(found.scores[layer, head, reader, other], expected, **CLOSE)
    assert not found.scores[1, :, :2].any()


@torch.no_grad()
def test_singular_vectors(any_model: HookedALM, heads: str, tiny_models: TinyModels) -> None:
    """OV, the MLP's input with its norm's scale, and its output, read into the vocabulary."""
    hf = tiny_models.hf("mha" if heads == "mha" else "gqa")
    block, head = hf.model.language_model.layers[2], hf.lm_head.weight
    interpreter = SVDInterpreter(any_model)
    ov = hf_heads(hf, 2, "V")[4] @ hf_heads(hf, 2, "O")[4].T
    w_in = block.mlp.up_proj.weight * block.post_attention_layernorm.weight
    w_out = block.mlp.down_proj.weight.T
    for kind, matrix, at in (("OV", ov, 4), ("w_in", w_in, None), ("w_out", w_out, None)):
        found = interpreter.get_singular_vectors(kind, 2, num_vectors=3, head_index=at)
        # Vectors up to their sign: eigenvectors of M^T M.
        _, vectors = torch.linalg.eigh(matrix.double().T @ matrix.double())
        expected = head.double() @ vectors.flip(-1)[:, :3]
        torch.testing.assert_close(found[:, 0].double().abs(), expected.abs(), atol=SOLVED, rtol=0)


@torch.no_grad()
def test_factored_matrices(any_model: HookedALM, heads: str, tiny_models: TinyModels) -> None:
    """QK, OV, their singular values, eigenvalues and composition, from whole matrices."""
    hf = tiny_models.hf("mha" if heads == "mha" else "gqa")
    ov, qk = (
        torch.stack([hf_heads(hf, layer, a) @ hf_heads(hf, layer, b).mT for layer in range(4)])
        for a, b in (("V", "O"), ("Q", "K"))
    )
    torch.testing.assert_close(any_model.OV.AB, ov, **CLOSE)
    torch.testing.assert_close(any_model.QK.AB, qk, **CLOSE)
    values = torch.linalg.svdvals(ov.double())[..., :10]
    torch.testing.assert_close(any_model.OV.S.double(), values, atol=SOLVED, rtol=0)
    torch.testing.assert_close(
        any_model.QK.eigenvalues.sum(-1).real, qk.diagonal(dim1=-2, dim2=-1).sum(-1),
        atol=SOLVED, rtol=0,
    )  # fmt: skip
    found = composition_scores(any_model.OV, any_model.QK)
    for early, late in (((0, 1), (2, 4)), ((1, 5), (3, 0))):
        product = (ov[early] @ qk[late]).norm() / ov[early].norm() / qk[late].norm()
        torch.testing.assert_close(found[(*early, *late)], product, **CLOSE)


# --- text ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_evals_and_test_prompt(
    gqa: HookedALM, tiny_models: TinyModels, capsys: pytest.CaptureFixture[str]
) -> None:
    """Strings only: the loss of TransformerLens' paragraph, and the rank of an answer."""
    hf = tiny_models.hf("gqa")
    kept: list[Tensor] = []
    with gqa.hooks(fwd_hooks=[("hook_tokens", lambda ids, hook: kept.append(ids.clone()))]):
        loss = evals.sanity_check(gqa)
    torch.testing.assert_close(loss, hf(kept[0], labels=kept[0]).loss, **CLOSE)
    exploratory_utils.test_prompt("What emotion does the", "a", gqa, prepend_space_to_answer=False)
    ids, answer = gqa.to_tokens("What emotion does the"), gqa.to_single_token("a")
    logits = hf(ids).logits[0, -1]
    rank = int((logits > logits[answer]).sum())
    assert re.search(rf"Ranks of the answer tokens:.*'a',\s+{rank}\)", capsys.readouterr().out)


@torch.no_grad()
def test_induction_loss(heads: str, tmp_path: Path) -> None:
    """Random ids, twice: the loss of the second half, on ids that the tool takes up to 20000."""
    n_kv_heads = 2 if heads == "mha" else 1
    sizes = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": n_kv_heads}
    hf = Qwen2ForCausalLM(Qwen2Config(**{**sizes, "vocab_size": 20000})).eval()
    randomise(hf)
    hf.save_pretrained(tmp_path)
    model = HookedALM.from_pretrained(tmp_path)
    model.set_ungroup_grouped_query_attention(heads == "ungrouped")
    torch.manual_seed(0)
    found = evals.induction_loss(model, subseq_len=8, device="cpu")
    torch.manual_seed(0)
    ids = torch.randint(100, 20000, (4, 8)).repeat(1, 2)
    log_probs = hf(ids).logits[:, :-1].log_softmax(-1)
    expected = -log_probs.gather(-1, ids[:, 1:, None])[:, 8 + 1 :, 0]
    torch.testing.assert_close(found, expected.mean(), **CLOSE)


@torch.no_grad()
def test_a_prefix_in_transformers_own_cache(any_model: HookedALM) -> None:
    """The rest of a prompt is as in a whole run; TransformerLens' cache is refused."""
    x, *_ = two_clips(any_model)
    theirs = TransformerLensKeyValueCache.init_cache(any_model.cfg, torch.device("cpu"), 1)
    with pytest.raises(InputError, match="expected a transformers Cache"):
        any_model(x, past_key_values=theirs)
    logits, kept = any_model(x), DynamicCache()
    any_model(x, past_key_values=kept)
    assert kept.layers[0].keys.shape[1] == any_model.cfg.n_key_value_heads
    kept.crop(-4)
    torch.testing.assert_close(any_model(x, past_key_values=kept), logits[:, 4:], **CLOSE)


class Rows(Dataset[dict[str, Tensor]]):
    """Two rows of random text."""

    ids = torch.randint(1, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"tokens": self.ids[row]}


def test_train(heads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step on a text model moves the weights as one on Hugging Face's does."""
    models = TextModels(tmp_path)
    model, hf = models.hooked("qwen3"), models.hf("qwen3")
    model.set_ungroup_grouped_query_attention(heads == "ungrouped")
    config = training.TrainConfig(
        num_epochs=1, batch_size=2, lr=0.1, optimizer_name="SGD", device="cpu"
    )
    training.train(model, config, Rows())
    hf(Rows.ids, labels=Rows.ids).loss.backward()
    ours, theirs = model.blocks[1], hf.model.layers[1]
    pairs = [
        (model.unembed, hf.lm_head),
        (ours.attn.k_proj, theirs.self_attn.k_proj),
        (ours.mlp.gate_proj, theirs.mlp.gate_proj),
        (ours.ln1, theirs.input_layernorm),
    ]
    for trained, untrained in pairs:
        expected = untrained.weight - 0.1 * untrained.weight.grad
        torch.testing.assert_close(trained.weight, expected, **CLOSE)
        assert untrained.weight.grad.abs().max() > 1e-3


def test_a_model_in_training_is_refused(gqa: HookedALM) -> None:
    """TransformerLens' own guard sees our mode."""
    x, *_ = two_clips(gqa)
    gqa.train()
    try:
        with pytest.raises(ValueError, match="training"):
            interchange.collect_activations(gqa, "hook_embed", x, lambda x: gqa(x))
    finally:
        gqa.eval()


def test_the_jacobian_lens_is_for_bridges(gqa: HookedALM) -> None:
    """TransformerLens checks the class and stops."""
    with pytest.raises(TypeError, match="supports TransformerBridge only"):
        JacobianLens.fit(gqa, ["a prompt"], corpus="none")


def test_the_docs_name_tests_that_exist() -> None:
    """Every ``file::test`` of the table."""
    tests = Path(__file__).parent
    table = (tests.parents[1] / "docs" / "transformerlens.md").read_text()
    named = re.findall(r"`(test_\w+)::(test_\w+)`", table)
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (tests / f"{file}.py").read_text(), test
