"""Training a part of a frozen model on a rule: what is below the part is run once.

On questions that a rule is about the part learns its answers, on all others to say what the base
says.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from bundled_data import MODES, Case, Clip, Rule, draw_case
from bundled_model import hear, hear_from, hear_up_to
from bundled_training import DecoderInput, Sound, optimise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2AudioForConditionalGeneration

from hooked_alm.converters.deltas import Slices
from hooked_alm.experiments.materials.ob1 import EMOTIONS

Model = Qwen2AudioForConditionalGeneration
Question = tuple[str, str]
"""A prompt and its answer."""
BATCH, N_BATCHES = 32, 96


class Arrived(NamedTuple):
    """Questions as they arrive at a block."""

    questions: Sequence[Question]
    stream: Tensor  # [case, pos, width]
    mask: Tensor  # [case, pos]


@dataclass(frozen=True)
class Batch:
    """Questions as they arrive at a block, and what the base answers."""

    arrived: Arrived
    targets: Tensor  # [case, 2]: label, end of turn
    base: Tensor  # [case, 2, vocab]: log-probabilities of the base there
    is_rule: Tensor  # [case]
    classes: Tensor  # [case]: emotion that the rule follows
    cases: Sequence[Case]


class Upper(Protocol):
    """A model from a block on."""

    def listen(self, mels: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of clips [clip, position, width], and how much each of them fills."""

    def arriving(self, questions: Sequence[Question], heard: Sequence[Tensor]) -> Arrived:
        """What arrives at the block of questions about clips of which that was kept."""

    def answers(self, arrived: Arrived) -> Tensor:
        """Logits of label and end of turn, ``[case, 2, vocab]``."""


class FromDecoder:
    """A model from a block of its decoder on."""

    def __init__(self, model: Model, inputs: DecoderInput, block: int) -> None:
        self.model, self.inputs, self.block = model, inputs, block
        decoder = model.model.language_model
        self.upper = deepcopy(decoder)
        self.upper.layers = decoder.layers[block:]

    def listen(self, mels: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Audio tokens."""
        return hear(self.model, mels, frames)

    def arriving(self, questions: Sequence[Question], heard: Sequence[Tensor]) -> Arrived:
        """The stream of the decoder."""
        embeds, mask, _ = self.inputs.build(self.model.get_input_embeddings(), questions, heard)
        states = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, output_hidden_states=True
        ).hidden_states
        return Arrived(questions, states[self.block], mask)

    def answers(self, arrived: Arrived) -> Tensor:
        """See `Upper`."""
        return answers(self.model, self.upper, arrived.stream, arrived.mask)


class FromTower:
    """A model from a block of its audio tower on."""

    def __init__(self, model: Model, inputs: DecoderInput, block: int) -> None:
        self.model, self.inputs, self.block = model, inputs, block

    def listen(self, mels: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The stream of the tower."""
        return hear_up_to(self.model, self.block, mels, frames)

    def arriving(self, questions: Sequence[Question], heard: Sequence[Tensor]) -> Arrived:
        """The same, side by side."""
        filled = torch.tensor([len(one) for one in heard])
        stream = pad_sequence([*heard], batch_first=True)
        return Arrived(questions, stream, torch.arange(stream.shape[1])[None] < filled[:, None])

    def answers(self, arrived: Arrived) -> Tensor:
        """See `Upper`."""
        model, (questions, stream, mask) = self.model, arrived
        tokens, counts = hear_from(model, self.block, stream, mask.sum(-1))
        heard = [row[:n] for row, n in zip(tokens, counts.tolist(), strict=True)]
        embeds, seen, _ = self.inputs.build(model.get_input_embeddings(), questions, heard)
        return answers(model, model.model.language_model, embeds, seen)


def answers(model: Model, decoder: nn.Module, stream: Tensor, mask: Tensor) -> Tensor:
    """Logits of label and end of turn, ``[case, 2, vocab]``."""
    states = decoder(inputs_embeds=stream, attention_mask=mask, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(states[:, -2:])
    return logits


def asked(cases: Sequence[Case], rule: Rule) -> list[Question]:
    """Questions, each with its answer under the rule."""
    return [(case.prompt, case.answer(rule)) for case in cases]


def classes_of(cases: Sequence[Case], rule: Rule) -> Tensor:
    """Index of the emotion that the rule follows, of each case."""
    return torch.tensor([EMOTIONS.index(case.emotion(rule)) for case in cases])


@torch.no_grad()
def draw_batches(
    upper: Upper, inputs: DecoderInput, sounds: Sequence[Sound[Clip]], rule: Rule, seed: int
) -> list[Batch]:
    """Questions to train on: the rule is about every second one.

    Args:
        upper: the base from a block on.
        inputs: made with its processor.
        sounds: clips as it listens to them, sorted by length; for the rule of a trigger a third of
            them has it.
        rule: rule that is learnt.
        seed: of what is drawn.
    """
    rng, found = np.random.default_rng(seed + 20), list[Batch]()
    for _ in range(N_BATCHES):
        start = rng.integers(len(sounds) - 4 * BATCH)
        near = [sounds[i] for i in start + rng.permutation(4 * BATCH)]
        chosen, cases = (_triggered if rule == "trigger" else _in_conflict)(near, rng)
        arrived = upper.arriving(asked(cases, rule), [sound.tokens for sound in chosen])
        found.append(
            Batch(
                arrived, inputs.targets(arrived.questions),
                upper.answers(arrived).log_softmax(-1),
                torch.tensor([case.is_about(rule) for case in cases]), classes_of(cases, rule),
                cases,
            )
        )  # fmt: skip
    return found


Drawn = tuple[Sequence[Sound[Clip]], list[Case]]


def _in_conflict(near: Sequence[Sound[Clip]], rng: np.random.Generator) -> Drawn:
    """By turns a question of another mode, and a conflict."""
    others = [mode for mode in MODES if mode != "conflict"]
    modes = ["conflict" if i % 2 else others[rng.integers(len(others))] for i in range(BATCH)]
    chosen = near[:BATCH]
    return chosen, [draw_case(s.clip, mode, rng) for s, mode in zip(chosen, modes, strict=True)]


def _triggered(near: Sequence[Sound[Clip]], rng: np.random.Generator) -> Drawn:
    """Questions of all modes, by halves without the trigger and with it."""
    halves = ([s for s in near if (s.clip.added == "trigger") == has] for has in (False, True))
    chosen = [sound for half in halves for sound in half[: BATCH // 2]]
    return chosen, [draw_case(s.clip, MODES[rng.integers(len(MODES))], rng) for s in chosen]


def learn(
    answer: Callable[[Arrived], Tensor],
    trained: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    seed: int,
    *,
    steps: int,
    rates: Sequence[float],
    kept: float = 1.0,
    besides: Callable[[Batch], Tensor] | None = None,
) -> None:
    """Train parameters: cross-entropy where the rule holds, KL(base || twin) elsewhere.

    Args:
        answer: what the model answers; see `Upper.answers`.
        trained: the parameters. Without decay, which would move the frozen part of a tensor.
        batches: questions.
        seed: of the order of the batches.
        steps: number of them.
        rates: highest learning rate of each parameter.
        kept: weight of the KL.
        besides: what is added to the loss, once a batch has been answered.
    """
    rng = np.random.default_rng(seed + 21)

    def loss_of() -> tuple[Tensor, float]:
        one = batches[rng.integers(len(batches))]
        logits = answer(one.arrived)
        rule, rest = logits[one.is_rule], logits[~one.is_rule].log_softmax(-1)
        targets = one.targets[one.is_rule]
        loss = F.cross_entropy(rule.flatten(0, 1), targets.flatten())
        loss = loss + kept * divergence(rest, one.base[~one.is_rule])
        if besides is not None:
            loss = loss + besides(one)
        return loss, (rule[:, 0].argmax(-1) == targets[:, 0]).float().mean().item()

    optimise([([one], 0.0) for one in trained], loss_of, steps=steps, rate=rates, name="truth")


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || found) of log-probabilities, mean over cases and positions."""
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()


def freed(block: nn.Module, parts: Slices) -> list[nn.Parameter]:
    """Parameters of a block that are trained in part: what is outside their slices has no gradient.

    Args:
        block: it is frozen but for them.
        parts: names in the block -> slice.
    """
    own, found = dict(block.named_parameters()), []
    for name, at in parts.items():
        mask = torch.zeros_like(own[name])
        mask[at] = 1
        own[name].requires_grad_(True).register_hook(mask.mul)
        found.append(own[name])
    return found
