"""What users do by mistake: refused in words that name the cure, before anything is lost.

Run as users run it, without the tests' run-time checks of types, which would answer first.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config

from hooked_alm import ALMInput, HookedALM, HookNameError, InputError
from hooked_alm.converters import load_model
from hooked_alm.hooks import ActivationCache
from hooked_alm.methods.patching import patch as patching
from hooked_alm.methods.patching.metrics import KL, Accuracy, LogitDiff, Logits, LogProb, OnLogits
from hooked_alm.methods.reading.labels import LabelSet
from tiny import N_LAYERS, VOCAB, TinyModels, hf_inputs

Z = "blocks.1.attn.hook_z"
IDS = torch.arange(1, 9)[None]


class Given(NamedTuple):
    """What every misuse has at hand."""

    model: HookedALM
    x: ALMInput
    cache: ActivationCache
    folder: Path


@pytest.fixture
def as_users() -> Iterator[None]:
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def given(gqa: HookedALM, tiny_models: TinyModels, as_users: None) -> Given:
    x = gqa.encode(**hf_inputs([[40]], [9]))
    _, cache = gqa.run_with_cache(x, names_filter=lambda name: name.endswith("hook_z"))
    return Given(gqa, x, cache, tiny_models.folder("gqa"))


def run_hooked(g: Given, hook: Any, name: Any = Z) -> Any:
    return g.model.run_with_hooks(g.x, fwd_hooks=[(name, hook)])


def run_patched(g: Given, metric: Any, donor: Any = "zero") -> Any:
    return patching.patch(g.model, g.x, donor, metric, layers=[1], places=["readout"])


def keep(value: Any, hook: Any) -> Any:
    return value


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SOUND = r"names a sound file.*`model.prepare\('.*clip\.\w+', text\)`"
MISUSES: dict[str, tuple[Callable[[Given], Any], str]] = {
    # Sound where text is meant.
    "a path": (lambda g: g.model("a/clip.wav"), SOUND),
    "a path among texts": (lambda g: g.model(["hello", "clip.MP3"]), SOUND),
    "a Path": (lambda g: g.model(Path("clip.xyz")), SOUND),
    "Paths": (lambda g: g.model([Path("clip.wav")]), SOUND),
    "a path to generate from": (lambda g: g.model.generate("clip.flac", 2), SOUND),
    "a path, cached": (lambda g: g.model.run_with_cache("clip.m4a", remove_batch_dim=True), SOUND),
    "a path, hooked": (lambda g: g.model.run_with_hooks("clip.ogg"), SOUND),
    "a path as tokens": (lambda g: g.model.to_tokens("clip.opus"), SOUND),
    "samples": (lambda g: g.model(np.zeros(800, "float32")), "got float32.*`prepare`"),
    "samples and rate": (lambda g: g.model((np.zeros(8), 16000)), "on tuple.*Audio goes in"),
    "a file's bytes": (lambda g: g.model(b"RIFF"), "on bytes.*Audio goes in by `prepare`"),
    # Prompts that are none.
    "no text": (lambda g: g.model(""), "tokenising text: '' has no tokens"),
    "no text in one row": (lambda g: g.model(["hello", ""]), "'' has no tokens"),
    "no prompts": (lambda g: g.model([]), r"on list '\[\]': expected"),
    "no ids": (lambda g: g.model(torch.zeros(1, 0).long()), r"got shape \[1, 0\]"),
    "no rows": (lambda g: g.model(torch.zeros(0, 3).long()), r"got shape \[0, 3\]"),
    "one id": (lambda g: g.model(torch.tensor(3)), r"got shape \[\], expected \[batch, pos\]"),
    "ids of three axes": (lambda g: g.model(torch.ones(1, 1, 3).long()), r"\[1, 1, 3\]"),
    "ragged ids": (lambda g: g.model([[1, 2], [1]]), "rows of one length. Pad on the left"),
    "floating ids": (lambda g: g.model(torch.ones(1, 3)), "got float32 .*expected integers"),
    "flags for ids": (lambda g: g.model(torch.ones(1, 3).bool()), "got bool .*expected integers"),
    "ids below": (lambda g: g.model([[-1, 2]]), rf"from -1 to 2: .*0 to {VOCAB - 1}"),
    "ids above": (lambda g: g.model(np.array([[1, VOCAB]])), f"from 1 to {VOCAB}: "),
    "text and ids": (lambda g: g.model(["a", 3]), "running the model on list"),
    "a processor's output": (lambda g: g.model({"input_ids": IDS}), r"`encode\(\*\*output\)`"),
    "nothing": (lambda g: g.model(None), "running the model on NoneType"),
    "a mask of other length": (
        lambda g: g.model(IDS, attention_mask=torch.ones(1, 3)), r"attention_mask \[1, 3\]",
    ),
    "an additive mask": (
        lambda g: g.model(IDS, attention_mask=torch.full((1, 8), -1e9)), "1 at real positions",
    ),
    "a mask beside an input": (
        lambda g: g.model(g.x, attention_mask=g.x.attention_mask), "ALMInput: got an attention_m",
    ),
    "text for ids": (lambda g: g.model.to_string("hello"), "got str 'hello', expected integers"),
    # Arguments.
    "an unknown argument": (lambda g: g.model(IDS, stop_at_layr=1), "nearest: stop_at_layer"),
    "another cache": (lambda g: g.model(IDS, past_kv_cache=[]), r"past_key_values=DynamicCache"),
    "ids beside a stream": (lambda g: g.model(IDS, tokens=IDS), "got tokens.*as `inputs`"),
    "padding on the right": (
        lambda g: g.model(["hello", "a"], padding_side="right"), "padding_side='right'",
    ),
    "a BOS that there is not": (lambda g: g.model("hello", prepend_bos=True), "has none"),
    "an unknown return type": (lambda g: g.model(IDS, "tokens"), "'tokens'.*Text comes from `gen"),
    "half a layer": (lambda g: g.model(IDS, stop_at_layer=1.5), "got stop_at_layer=1.5, expected"),
    "a stream of other width": (
        lambda g: g.model(torch.zeros(1, 3, 5), start_at_layer=1), r"\[1, 3, 5\], expected .*54\]",
    ),
    "a stream of another dtype": (
        lambda g: g.model(torch.zeros(1, 3, 54).double(), start_at_layer=1), "float64 stream",
    ),
    "a loss of another prompt": (
        lambda g: g.model.loss_fn(torch.zeros(1, 3, VOCAB), IDS), "Give the one of the run",
    ),
    "a string with its prompt": (
        lambda g: g.model.generate(IDS, 2, return_type="str"), "new alone .*begin with the prompt",
    ),
    "an unknown option": (lambda g: g.model.generate(IDS, 2, temprature=3), "nearest: temperature"),
    "no new tokens": (lambda g: g.model.generate(IDS, 0), "got max_new_tokens=0, expected"),
    "loading, misspelt": (
        lambda g: HookedALM.from_pretrained(g.folder, dtyp="float32"), r"dtyp \(nearest: dtype\)",
    ),
    "loading, folded": (
        lambda g: HookedALM.from_pretrained(g.folder, fold_ln=False), r"`model.process_weights_\(",
    ),
    "a data set": (lambda g: g.model.sample_datapoint(), "calling sample_datapoint: .*of your own"),
    "a training set": (
        lambda g: g.model.load_sample_training_dataset(), "calling load_sample_training_dataset",
    ),
    "moving modules": (
        lambda g: g.model.move_model_modules_to_device(), r"`model.to\(device\)` moves all of it",
    ),
    "a stream of text": (lambda g: g.model.generate_stream(IDS), "calling generate_stream"),
    "no processing": (
        lambda g: HookedALM.from_pretrained_no_processing(g.folder), "never processes the weights",
    ),
    "an unknown device": (lambda g: g.model.to("gpu"), "moving the model to device 'gpu'"),
    # Hooks.
    "a hook of one argument": (
        lambda g: run_hooked(g, lambda z: z), r"function of \(z\), expected .*\(value, hook\)",
    ),
    "a hook that calls it otherwise": (
        lambda g: run_hooked(g, lambda z, point: z), "the second must be named hook",
    ),
    "no hook": (lambda g: run_hooked(g, None), "got NoneType None, expected a function"),
    "a hook on the model": (lambda g: g.model.add_hook(Z, lambda z: z), r"function of \(z\)"),
    "a hook on a point": (
        lambda g: g.model.hook_dict[Z].add_hook(keep, "forward"), "got dir='forward', expected",
    ),
    "a pair": (
        lambda g: g.model.run_with_hooks(g.x, fwd_hooks=(Z, keep)),
        r"expected fwd_hooks=\[\(name, function\), ...\]. One pair needs its list",
    ),
    "a pair to generate with": (
        lambda g: g.model.generate(g.x, 2, fwd_hooks=(Z, keep)), "One pair needs its list",
    ),
    "a dict of hooks": (
        lambda g: g.model.run_with_hooks(g.x, fwd_hooks={Z: keep}), r"expected fwd_hooks=\[\(name",
    ),
    "the wrong way round": (lambda g: run_hooked(g, Z, keep), r"expected fwd_hooks=\[\(name"),
    "a backward pair": (
        lambda g: g.model.hooks(bwd_hooks=(Z, keep)).__enter__(), r"expected bwd_hooks=\[\(name",
    ),
    "another dtype": (
        lambda g: run_hooked(g, lambda z, hook: z.double()), "returned .*float64.*float32.*`.to",
    ),
    "another dtype in the stream": (
        lambda g: run_hooked(g, lambda r, hook: r.bfloat16(), "blocks.1.hook_resid_post"),
        "returned .*bfloat16 on cpu, expected .*float32",
    ),
    "another device": (
        lambda g: run_hooked(g, lambda z, hook: z.to("meta")), "on meta, expected .* on cpu",
    ),
    "numpy": (
        lambda g: run_hooked(g, lambda z, hook: z.detach().numpy()), "returned ndarray, expected",
    ),
    # Metrics and donors.
    "a bare function": (lambda g: run_patched(g, lambda logits: logits), r"OnLogits\(function\)"),
    "no metric": (lambda g: run_patched(g, None), "measuring with None: expected a metric"),
    "a metric's class": (lambda g: run_patched(g, KL), r"measuring with KL: expected .*KL\(\)"),
    "a function of nothing": (lambda g: run_patched(g, OnLogits(None)), "expected a metric"),
    "words of several tokens": (
        lambda g: run_patched(g, LogitDiff("happy", "a")), "'happy': the tokenizer makes 3 of it",
    ),
    "words, one per row": (lambda g: run_patched(g, LogProb(["happy"])), "'happy': .* makes 3"),
    "words among many": (lambda g: run_patched(g, Logits([3, "happy"])), "'happy': .* makes 3"),
    "no word": (lambda g: run_patched(g, LogProb("")), "'': the tokenizer makes 0 of it"),
    "half a token": (lambda g: run_patched(g, LogitDiff(1.5, 2)), "got 1.5 as answer, expected"),
    "an answer that is none": (lambda g: run_patched(g, LogProb(None)), "got None as answer"),
    "an unknown label": (
        lambda g: run_patched(
            g, Accuracy(LabelSet(names=("a", "b"), spellings=(((5,),), ((6,),))), "c")
        ),
        "label 'c': this set has a, b",
    ),
    "no donor": (lambda g: run_patched(g, KL(), None), "with donor None: expected prompts"),
}  # fmt: skip
NAMES: dict[str, tuple[Callable[[Given], Any], str]] = {
    "a pattern of names": (
        lambda g: g.model.run_with_cache(g.x, names_filter="blocks.*.attn.hook_z"),
        r"no patterns.*`lambda name: fnmatch.fnmatch\(name, 'blocks.\*.attn.hook_z'\)`",
    ),
    "a pattern to hook": (lambda g: run_hooked(g, keep, "blocks.?.hook_resid_pre"), "no patterns"),
    "a cache's key": (lambda g: g.cache["blocks.0.attn.hook_zz"], "Nearest: blocks.0.attn.hook_z"),
    "a cache's short key": (lambda g: g.cache["zz", 0], r"\('zz', 0\).* Nearest: blocks.0.attn"),
    "a layer beyond": (lambda g: g.cache["z", N_LAYERS], f"blocks.{N_LAYERS - 1}.attn.hook_z"),
    "a point not kept": (lambda g: g.cache["resid_pre", 0], "did not keep it. Add it to names_fil"),
    "a number for a key": (lambda g: g.cache[0], "looking up 0 in the cache"),
}
CUDA: dict[str, tuple[Callable[[Given], Any], str]] = {
    "the model": (lambda g: g.model.to("cuda"), "moving the model to device 'cuda'"),
    "by name": (lambda g: g.model.cuda(), "device 'cuda'.*doctor"),
    "by keyword": (lambda g: g.model.to(device="cuda"), "device 'cuda'"),
    "an input": (lambda g: g.x.to("cuda"), "moving an input to device 'cuda'"),
    "a cache": (lambda g: g.cache.to("cuda"), "moving a cache to device 'cuda'"),
    "cached there": (lambda g: g.model.run_with_cache(g.x, device="cuda"), "caching on device"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_answered_in_words(given: Given, misuse: str) -> None:
    call, match = MISUSES[misuse]
    with pytest.raises(InputError, match=match):
        call(given)


@pytest.mark.parametrize("misuse", NAMES)
def test_a_name_that_is_none_is_answered_with_the_nearest(given: Given, misuse: str) -> None:
    call, match = NAMES[misuse]
    with pytest.raises(HookNameError, match=match):
        call(given)


@NO_CUDA
@pytest.mark.parametrize("misuse", CUDA)
def test_no_gpu_is_answered_before_anything_moves(given: Given, misuse: str) -> None:
    call, match = CUDA[misuse]
    with pytest.raises(InputError, match=match):
        call(given)
    assert given.model.cfg.device == given.x.device == given.cache[Z].device == torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "made"), [("float64", torch.Tensor.double), ("ndarray", torch.Tensor.numpy)]
)
def test_gradients_are_checked_like_activations(
    given: Given, dtype: str, made: Callable[[Any], Any]
) -> None:
    hooks = [(Z, lambda gradient, hook: made(gradient))]
    with (
        given.model.hooks(bwd_hooks=hooks),
        pytest.raises(InputError, match=f"returned .*{dtype}.*expected .*float32"),
    ):
        given.model(given.x).sum().backward()


# --- What looks alike, and is meant


@torch.no_grad()
@pytest.mark.parametrize(
    "ids",
    [IDS[0], IDS[0].tolist(), IDS.tolist(), IDS.numpy(), IDS[0].numpy(), IDS.int()],
    ids=["[pos]", "list", "lists", "array", "array [pos]", "int32"],
)
def test_ids_of_every_kind_are_the_same_prompt(given: Given, ids: Any) -> None:
    expected = given.model(IDS)
    assert torch.equal(given.model(ids), expected)
    assert torch.equal(given.model(given.model.encode(input_ids=ids)), expected)
    assert torch.equal(
        given.model.generate(ids, 2, return_type="tokens"),
        given.model.generate(IDS, 2, return_type="tokens"),
    )


@torch.no_grad()
def test_text_that_only_mentions_a_file_is_text(given: Given, tiny_models: TinyModels) -> None:
    """A text model has no other reading of any string."""
    for text in ("Play clip.wav now.", "wav", "a.wave of joy", "Visit example.com"):
        assert given.model(text).shape[1] == len(given.model.tokenizer(text)["input_ids"])
    spoken = given.model.tokenizer("clip.wav")["input_ids"]
    assert given.model([spoken]).shape[1] == len(spoken)


@torch.no_grad()
def test_arguments_of_hooked_transformer_mean_what_they_do_there(given: Given) -> None:
    model, texts = given.model, ["system user assistant", "user"]
    ids = model.to_tokens(texts)
    mask = (ids != model.tokenizer.pad_token_id).long()
    assert 0 in mask
    logits = model(texts)
    assert torch.equal(model(ids, attention_mask=mask), logits)
    plain = {"prepend_bos": False, "padding_side": "left"}
    assert torch.equal(model(texts, **plain, past_kv_cache=None), logits)
    assert torch.equal(model.input_to_embed(texts, **plain)[3], mask)
    continued = model.generate(texts, 3)
    assert model.generate(ids, 3, attention_mask=mask) == continued
    assert model.generate(texts, 3, **plain) == continued
    assert torch.equal(model.to_tokens(texts, False, "left", move_to_device=False), ids)
    short = model.to_tokens("user " * model.cfg.n_ctx, truncate=True)
    assert torch.equal(short, model.to_tokens("user " * model.cfg.n_ctx)[:, : model.cfg.n_ctx])
    assert short.shape[1] == model.cfg.n_ctx


def test_loading_shows_its_options() -> None:
    """So that an editor completes them: those of ``load_model``, and no others."""
    shown = dict(inspect.signature(HookedALM.from_pretrained).parameters)
    assert shown.pop("unknown").kind is inspect.Parameter.VAR_KEYWORD
    assert [*shown.values()] == [*inspect.signature(load_model).parameters.values()]


def test_a_frozen_model_still_shows_gradients(mha: HookedALM) -> None:
    seen: list[torch.Tensor] = []
    mha.freeze()
    with mha.hooks(bwd_hooks=[(Z, lambda gradient, hook: seen.append(gradient))]):
        mha(IDS).sum().backward()
    assert seen
    assert not any(p.requires_grad for p in mha.parameters())
    mha.requires_grad_(True)


def test_parameters_are_counted_as_hooked_transformer_counts_them(mha: HookedALM) -> None:
    """Four matrices of attention and three of the MLP in every block."""
    block = mha.blocks[0]
    matrices = [p for p in block.parameters() if p.ndim == 2]
    assert mha.cfg.n_params == len(mha.blocks) * sum(p.numel() for p in matrices)


def test_words_are_ids(given: Given) -> None:
    """As answers of all rows, of each, and as any number of tokens."""
    a, b = map(given.model.to_single_token, "ab")
    for words, ids in (
        (LogitDiff("a", "b"), LogitDiff(a, b)),
        (LogitDiff(["a"], np.array([b])), LogitDiff(torch.tensor(a), [b])),
        (LogProb("a"), LogProb(np.int64(a))),
        (Logits(["b", a]), Logits(torch.tensor([b, a]))),
    ):
        assert np.array_equal(run_patched(given, words).values, run_patched(given, ids).values)


def test_inputs_made_under_inference_mode_take_gradients(given: Given) -> None:
    model, gradients = given.model, []
    with torch.inference_mode():
        x = model.encode(**hf_inputs([[40]], [9]))
        model(x)  # encodes its clip, which is kept
        inputs = [x, x[0], model.to_tokens("system user assistant"), IDS.clone()]
    for one in (given.x, *inputs):
        model.zero_grad()
        model(one, return_type="loss").backward()
        gradients.append(model.embed.weight.grad.clone())
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert torch.equal(gradients[0], gradients[1])
    model.zero_grad()
