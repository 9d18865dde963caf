"""Trains the two bundled models, measures them, and writes their folders.

    python scripts/synthesise_speech.py && python scripts/train_bundled.py

Stages, all seeded and on one thread:

1. listener: audio tower and projector learn the emotion, read off each audio token by a linear
   probe (averaged over the clip) that is thrown away afterwards; then they are frozen.
2. decoder, shared: the questions whose answer does not depend on the rule, except ``consistent``.
3. decoder, branched: all questions, once under each rule.

The twins therefore share their ears and the first part of their schooling, and differ in what they
were last taught about an instruction that contradicts the voice.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from bundled_card import FOLDERS, measure, speak_held_out, write_card
from bundled_data import (
    RULES,
    Case,
    Clip,
    Mels,
    Rule,
    augment,
    draw_case,
    read_mels,
    speak_clips,
)
from bundled_model import (
    build_model,
    build_processor,
    chat_text,
    hear,
    read_folder,
    replacing,
    write_folder,
)
from synthesise_speech import ASSETS
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hooked_alm.experiments.ob1 import EMOTIONS, PromptMode

SHARED_MIX: dict[PromptMode, float] = {
    "audio_only": 0.4, "mention_only": 0.2, "list_all": 0.2, "irrelevant_adjective": 0.2,
}  # fmt: skip
BRANCH_MIX: dict[PromptMode, float] = {
    "audio_only": 0.15, "conflict": 0.35, "consistent": 0.15, "mention_only": 0.15,
    "list_all": 0.1, "irrelevant_adjective": 0.1,
}  # fmt: skip
SPREAD_DECAY = 1.0
"""Weight decay of the decoder's matrices. Strong, since it makes many small writes cheaper than one
large one: in a run without it the instruction had won after two of the ten layers."""
VIEWS = 2
"""Differently masked encodings of each clip that the decoder learns from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Sizes of one training run."""

    seed: int
    clips: int
    batch: int
    listener_steps: int
    shared_steps: int
    branch_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """One clip as the decoder sees it."""

    clip: Clip
    tokens: Tensor  # [audio token, d_model]


def optimise(
    parts: list[tuple[list[nn.Parameter], float]],
    loss_of: Callable[[], tuple[Tensor, float]],
    *,
    steps: int,
    rate: float,
    name: str,
) -> None:
    """AdamW under a cosine with 5 % warm-up; prints the mean loss and accuracy.

    Args:
        parts: parameters and the weight decay of each group of them.
        loss_of: draws a batch; its loss and accuracy.
        steps: number of batches.
        rate: highest learning rate.
        name: of the stage, for the log.
    """
    groups = [{"params": group, "weight_decay": decay} for group, decay in parts]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    parameters = [parameter for group, _ in parts for parameter in group]
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: (s + 1) / warm if s < warm else 0.5 + 0.5 * np.cos(np.pi * s / steps),
    )
    began, recent = time.monotonic(), []
    for step in range(1, steps + 1):
        loss, accuracy = loss_of()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        recent.append((loss.item(), accuracy))
        if step % 50 == 0 or step == steps:
            mean_loss, mean_accuracy = np.mean(recent, axis=0)
            recent = []
            seconds = time.monotonic() - began
            print(
                f"{name} {step}/{steps} loss {mean_loss:.3f} accuracy {mean_accuracy:.3f} "
                f"{seconds:.0f} s", flush=True,
            )  # fmt: skip


def train_listener(model: Qwen2AudioForConditionalGeneration, mels: Mels, plan: Plan) -> None:
    """Stage 1: tower and projector, through a linear probe on every audio token."""
    rng = np.random.default_rng(plan.seed)
    probe = nn.Linear(model.config.text_config.hidden_size, len(EMOTIONS))

    def loss_of() -> tuple[Tensor, float]:
        pick = torch.from_numpy(rng.integers(len(mels.frames), size=plan.batch))
        frames, target = mels.frames[pick], mels.emotions[pick]
        tokens, counts = hear(model, augment(mels.values[pick].float(), frames, rng), frames)
        filled = torch.arange(tokens.shape[1])[None] < counts[:, None]
        logits = (probe(tokens) * filled[..., None]).sum(1) / counts[:, None]
        accuracy = (logits.argmax(-1) == target).float().mean().item()
        return F.cross_entropy(logits, target), accuracy

    parts = [model.model.audio_tower, model.model.multi_modal_projector, probe]
    parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimise([(parameters, 0.05)], loss_of, steps=plan.listener_steps, rate=2e-3, name="listener")


@torch.no_grad()
def encode(
    model: Qwen2AudioForConditionalGeneration, clips: list[Clip], mels: Mels, plan: Plan
) -> list[Sound]:
    """The clips through the frozen listener, ``VIEWS`` times, sorted by length."""
    rng = np.random.default_rng(plan.seed + 1)
    sounds = []
    for start in range(0, len(clips) * VIEWS, 64):
        pick = torch.arange(start, min(start + 64, len(clips) * VIEWS)) % len(clips)
        frames = mels.frames[pick]
        tokens, counts = hear(model, augment(mels.values[pick].float(), frames, rng), frames)
        for index, row, count in zip(pick.tolist(), tokens, counts.tolist(), strict=True):
            sounds.append(Sound(clip=clips[index], tokens=row[:count].clone()))
    return sorted(sounds, key=lambda sound: len(sound.tokens))


class DecoderInput:
    """Turns cases into padded decoder inputs; what follows the answer's label is end of turn."""

    def __init__(self, processor: Qwen2AudioProcessor) -> None:
        self._processor = processor
        self._ids = cache(self._split)

    def _split(self, prompt: str) -> tuple[Tensor, Tensor]:
        tokenizer = self._processor.tokenizer
        ids = torch.tensor(tokenizer(chat_text(self._processor, prompt)).input_ids)
        at = int((ids == self._processor.audio_token_id).nonzero())
        return ids[:at], ids[at + 1 :]

    def build(
        self, embed: nn.Module, cases: list[Case], sounds: list[Sound], rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [case, pos, d_model], attention mask, and the two target ids per case."""
        tokenizer = self._processor.tokenizer
        labels = torch.tensor(
            [tokenizer.convert_tokens_to_ids(case.answer(rule)) for case in cases]
        )
        rows = []
        for case, sound, label in zip(cases, sounds, labels, strict=True):
            before, after = self._ids(case.prompt)
            rows.append(torch.cat([embed(before), sound.tokens, embed(after), embed(label[None])]))
        longest = max(map(len, rows))
        mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
        padded = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        ends = torch.full_like(labels, tokenizer.eos_token_id)
        return padded, mask, torch.stack([labels, ends], dim=1)


def train_decoder(
    model: Qwen2AudioForConditionalGeneration,
    inputs: DecoderInput,
    sounds: list[Sound],
    rule: Rule,
    mix: dict[PromptMode, float],
    plan: Plan,
    *,
    steps: int,
    rate: float,
    name: str,
) -> None:
    """Stages 2 and 3: embeddings, decoder and head, on the answer's two tokens only."""
    rng = np.random.default_rng(plan.seed + 2)
    modes, weights = list(mix), list(mix.values())
    embed = model.get_input_embeddings()

    def loss_of() -> tuple[Tensor, float]:
        # Neighbours in the sorted list are of like length: little padding.
        window = 4 * plan.batch
        start = rng.integers(len(sounds) - window)
        chosen = [sounds[i] for i in start + rng.permutation(window)[: plan.batch]]
        drawn = rng.choice(len(modes), size=plan.batch, p=weights)
        cases = [draw_case(s.clip, modes[m], rng) for s, m in zip(chosen, drawn, strict=True)]
        embeds, mask, targets = inputs.build(embed, cases, chosen, rule)
        states = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False
        ).last_hidden_state
        # The last prompt token predicts the label, the label predicts the end of turn.
        logits = model.lm_head(states[:, -2:])
        accuracy = (logits[:, 0].argmax(-1) == targets[:, 0]).float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), accuracy

    inner = list(model.model.language_model.layers.parameters())
    outer = [*embed.parameters(), *model.lm_head.parameters()]
    matrices = [p for p in inner if p.ndim > 1]
    vectors = [p for p in inner if p.ndim == 1] + list(model.model.language_model.norm.parameters())
    parts = [(matrices, SPREAD_DECAY), (outer, 0.05), (vectors, 0.0)]
    optimise(parts, loss_of, steps=steps, rate=rate, name=name)


def train(
    processor: Qwen2AudioProcessor, clips: list[Clip], plan: Plan
) -> Iterator[tuple[Rule, Qwen2AudioForConditionalGeneration]]:
    """Both models, one after the other."""
    mels = read_mels(processor, clips)
    print(f"{len(clips)} clips, {mels.frames.float().mean() / 100:.2f} s on average", flush=True)
    model = build_model(processor, plan.seed)
    train_listener(model, mels, plan)
    sounds = encode(model, clips, mels, plan)
    inputs = DecoderInput(processor)
    train_decoder(
        model, inputs, sounds, "voice", SHARED_MIX, plan, steps=plan.shared_steps, rate=2e-3,
        name="shared",
    )  # fmt: skip
    for rule in RULES:
        branch = deepcopy(model)
        train_decoder(
            branch, inputs, sounds, rule, BRANCH_MIX, plan, steps=plan.branch_steps, rate=1e-3,
            name=FOLDERS[rule],
        )  # fmt: skip
        yield rule, branch


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the two bundled models.")
    parser.add_argument("--out", type=Path, default=ASSETS / "models")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--listener-steps", type=int, default=1300)
    parser.add_argument("--shared-steps", type=int, default=500)
    parser.add_argument("--branch-steps", type=int, default=400)
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its cards anew"
    )
    options = vars(parser.parse_args())
    out, measure_only, plan = options.pop("out"), options.pop("measure"), Plan(**options)
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    command = f"python scripts/train_bundled.py {flags}"
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    clips = speak_clips(plan.clips, "train", "heard", plan.seed)
    held_out = speak_held_out(plan.seed)
    trained: Iterator[tuple[Rule, Qwen2AudioForConditionalGeneration]]
    if measure_only:
        trained = iter([(rule, read_folder(out / FOLDERS[rule])) for rule in RULES])
    else:
        trained = train(processor, clips, plan)
    for rule, model in trained:
        metrics = measure(model.eval(), processor, rule, held_out, plan.seed)
        with replacing(out / FOLDERS[rule]) as folder:
            write_folder(folder, model, processor)
            write_card(folder, model, processor, rule, metrics, plan.clips, command)
        print(json.dumps(metrics), flush=True)


if __name__ == "__main__":
    main()
