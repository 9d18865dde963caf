"""The encoder lens against Hugging Face's own parts, and against states put in by hooks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_alm import ALMInput, HookedALM, InputError
from hooked_alm.methods.reading.encoder_lens import (
    encoder_lens,
    heard_by_depth,
    transcripts_by_depth,
)
from hooked_alm.methods.reading.transcripts import end_tokens
from tiny import TinyModels, hf_inputs
from tolerances import OTHER_KERNEL
from whisper_toy import END, LAYERS, Whispers, noise

N_NEW = 12
CLOSE = {"atol": OTHER_KERNEL[torch.float32], "rtol": 0}
LAST = f"audio.encoder.blocks.{LAYERS['encoder'] - 1}.hook_resid_post"


@pytest.fixture(scope="module")
def whisper(whispers: Whispers) -> HookedALM:
    return whispers.hooked()


@pytest.fixture(scope="module")
def x(whisper: HookedALM) -> ALMInput:
    return whisper.prepare(noise(0.8, seed=1), language="en")


@pytest.fixture(scope="module")
def memories(whisper: HookedALM, x: ALMInput, whispers: Whispers) -> list[Tensor]:
    """Hugging Face's states of every depth, normed once; its last are normed already."""
    encoder = whispers.hf().model.encoder
    with torch.no_grad():
        states = encoder(x.clips[0].features, output_hidden_states=True).hidden_states
        return [*(encoder.layer_norm(state) for state in states[:-1]), states[-1]]


def greedy(hf: Any, prompt: Tensor, memory: Tensor) -> list[int]:
    """One whole pass for every token; nothing is suppressed."""
    ids = prompt
    for _ in range(N_NEW):
        logits = hf(decoder_input_ids=ids, encoder_outputs=(memory,)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    said: list[int] = ids[0, prompt.shape[1] :].tolist()
    return said[: said.index(END)] if END in said else said


@torch.no_grad()
def test_whisper_writes_down_every_depth(
    whisper: HookedALM, x: ALMInput, memories: list[Tensor], whispers: Whispers
) -> None:
    heard = heard_by_depth(whisper, x)
    torch.testing.assert_close(heard, torch.stack(memories), **CLOSE)
    assert torch.equal(heard[-1], whisper.audio.heard(x))
    expected = [greedy(whispers.hf(), x.tokens, memory) for memory in memories]
    assert transcripts_by_depth(whisper, x, heard, N_NEW) == expected
    assert len({*map(tuple, expected)}) > 1
    # The checkpoint forbids some of these.
    forbidden = {*whisper.generation_config.suppress_tokens}
    muted = transcripts_by_depth(whisper, x, heard, N_NEW, suppress=True)
    assert {token for row in expected for token in row} & forbidden
    assert not {token for row in muted for token in row} & forbidden
    own = whisper.generate(x, N_NEW, return_type="tokens")
    assert muted[-1] == [token for token in own[0].tolist() if token not in end_tokens(whisper)]


@torch.no_grad()
def test_the_norm_is_passed_once(whisper: HookedALM, x: ALMInput, whispers: Whispers) -> None:
    """Twice, or not at all, is another memory: the weights of the toy's norm are random (C56)."""
    heard = heard_by_depth(whisper, x)
    norm = whispers.hf().model.encoder.layer_norm
    _, cache = whisper.run_with_cache(x, names_filter=LAST)
    assert (norm(heard[-1]) - heard[-1]).abs().max() > 0.1
    assert (cache[LAST] - heard[-1]).abs().max() > 0.1


@torch.no_grad()
def test_log_probabilities_are_hugging_faces(
    whisper: HookedALM, x: ALMInput, memories: list[Tensor], whispers: Whispers
) -> None:
    said = torch.tensor([[20, 31, 4, END]])
    found = encoder_lens(whisper, x.extend(said))[:, 0, -4:]
    for depth, memory in enumerate(memories):
        ids = torch.cat([x.tokens, said], dim=1)
        logits = whispers.hf()(decoder_input_ids=ids, encoder_outputs=(memory,)).logits
        log_p = logits[0, -5:-1].log_softmax(-1).gather(-1, said[0][:, None])[:, 0]
        torch.testing.assert_close(found[depth], log_p, **CLOSE)


@torch.no_grad()
def test_a_model_that_hears_in_its_prompt(tiny_models: TinyModels) -> None:
    """Depth k is what a run gives in which the last block's output is that of block k."""
    model = tiny_models.hooked()
    x = model.encode(**hf_inputs([[63, 40], [23]], [9, 14]))
    found = encoder_lens(model, x)
    names = model.towards("encoder").depth_names()
    _, cache = model.run_with_cache(x, names_filter=names)
    for depth, name in enumerate(names):
        logits = model.run_with_hooks(
            x, fwd_hooks=[(names[-1], lambda value, hook, name=name: cache[name])]
        )
        log_p = logits[:, :-1].log_softmax(-1).gather(-1, x.tokens[:, 1:, None])[..., 0]
        real = (x.attention_mask[:, 1:] * x.attention_mask[:, :-1]).bool()
        torch.testing.assert_close(found[depth][real], log_p[real], **CLOSE)
    assert (found[0] - found[-1]).abs().max() > 1e-3


def test_several_clips_are_not_written_down_at_once(
    whisper: HookedALM, tiny_models: TinyModels
) -> None:
    x = whisper.prepare([noise(0.5), noise(0.8)], language="en")
    with pytest.raises(InputError, match="got 2 prompts with 2 clips"):
        transcripts_by_depth(whisper, x, heard_by_depth(whisper, x), N_NEW)
    with pytest.raises(InputError, match="a memory instead of"):
        heard_by_depth(whisper, replace(x, memory=torch.zeros(2, 50, 48)))
    text = tiny_models.hooked()
    with pytest.raises(InputError, match="no clips|clip"):
        heard_by_depth(text, text.encode(input_ids=[[3, 4, 5]]))
