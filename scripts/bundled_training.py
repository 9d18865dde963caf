"""The stages that every bundled model is trained in; what they learn is the caller's.

1. listener: audio tower and projector learn what is to be heard, read off each audio token by
   linear probes (averaged over the clip) that are thrown away afterwards; then they are frozen.
2. decoder: embeddings, blocks and head learn to answer, in as many stages as there are mixes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from bundled_model import chat_text, hear
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor


class Spoken(Protocol):
    """Anything with the samples of a clip."""

    @property
    def samples(self) -> NDArray[np.float32]:
        """Samples of the clip, at 16 kHz."""


ClipT = TypeVar("ClipT")

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
class Mels:
    """Log-mel spectrograms of a set of clips."""

    values: Tensor  # [clip, mel, frame], half precision to fit in memory
    frames: Tensor  # [clip], those that hold signal


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound(Generic[ClipT]):
    """A clip as the decoder sees it, or a block of the tower."""

    clip: ClipT
    tokens: Tensor  # [audio token, d_model], or [position, width of the tower]


def read_mels(processor: Qwen2AudioProcessor, clips: Sequence[NDArray[np.float32]]) -> Mels:
    """The feature extractor's output for every clip's samples."""
    extractor = processor.feature_extractor
    values, frames = [], []
    for start in range(0, len(clips), 64):
        out = extractor(
            list(clips[start : start + 64]), return_tensors="pt",
            sampling_rate=extractor.sampling_rate, return_attention_mask=True,
            padding="max_length",
        )  # fmt: skip
        values.append(out["input_features"].half())
        frames.append(out["attention_mask"].sum(-1))
    return Mels(values=torch.cat(values), frames=torch.cat(frames))


def augment(mels: Tensor, frames: Tensor, rng: np.random.Generator) -> Tensor:
    """A copy with masked bands and spans (SpecAugment), a level shift of 1 dB rms, and noise."""
    # The extractor maps 10 dB to 0.25 units.
    noise = torch.from_numpy(rng.standard_normal(mels.shape, dtype=np.float32))
    out = mels + 0.05 * noise
    for i, length in enumerate(frames.tolist()):
        clip = out[i, :, :length]
        clip += 0.025 * rng.standard_normal()
        fill = clip.mean().item()
        for _ in range(2):
            band, span = rng.integers(0, 9), rng.integers(0, 30)
            low, start = rng.integers(0, 80 - band), rng.integers(0, max(1, length - span))
            clip[low : low + band] = fill
            clip[:, start : start + span] = fill
    return out


def optimise(
    parts: list[tuple[list[nn.Parameter], float]],
    loss_of: Callable[[], tuple[Tensor, float]],
    *,
    steps: int,
    rate: float | Sequence[float],
    name: str,
) -> None:
    """AdamW under a cosine with 5 % warm-up; prints the mean loss and accuracy.

    Args:
        parts: parameters and the weight decay of each group of them.
        loss_of: draws a batch, and returns its loss and accuracy.
        steps: number of batches.
        rate: highest learning rate, of all groups or of each.
        name: name of the stage, for the log.
    """
    rates = [rate] * len(parts) if isinstance(rate, float) else rate
    groups = [
        {"params": group, "weight_decay": decay, "lr": own}
        for (group, decay), own in zip(parts, rates, strict=True)
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98))
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


def train_listener(
    model: Qwen2AudioForConditionalGeneration,
    mels: Mels,
    targets: Sequence[Tensor],
    plan: Plan,
) -> None:
    """Train tower and projector, through linear probes on every audio token.

    Args:
        model: its tower and projector are trained.
        mels: spectrograms of the clips.
        targets: what each probe learns: a class per clip, counted from 0.
        plan: seed, batch and steps.
    """
    rng = np.random.default_rng(plan.seed)
    width = model.config.text_config.hidden_size
    probes = nn.ModuleList(nn.Linear(width, int(target.max()) + 1) for target in targets)

    def loss_of() -> tuple[Tensor, float]:
        pick = torch.from_numpy(rng.integers(len(mels.frames), size=plan.batch))
        frames = mels.frames[pick]
        tokens, counts = hear(model, augment(mels.values[pick].float(), frames, rng), frames)
        filled = torch.arange(tokens.shape[1])[None] < counts[:, None]
        losses, right = [], []
        for probe, target in zip(probes, targets, strict=True):
            logits = (probe(tokens) * filled[..., None]).sum(1) / counts[:, None]
            losses.append(F.cross_entropy(logits, target[pick]))
            right.append((logits.argmax(-1) == target[pick]).float().mean().item())
        return torch.stack(losses).sum(), float(np.mean(right))

    parts = [model.model.audio_tower, model.model.multi_modal_projector, probes]
    parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimise([(parameters, 0.05)], loss_of, steps=plan.listener_steps, rate=2e-3, name="listener")


@torch.no_grad()
def encode(
    listener: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    clips: Sequence[ClipT],
    mels: Mels,
    seed: int,
) -> list[Sound[ClipT]]:
    """The clips through a frozen listener, ``VIEWS`` times, sorted by length.

    Args:
        listener: function of mels and their frames, as `hear` is of a model's.
        clips: clips that are heard.
        mels: their spectrograms.
        seed: of the masks and noise.
    """
    rng = np.random.default_rng(seed + 1)
    sounds = []
    for start in range(0, len(clips) * VIEWS, 64):
        pick = torch.arange(start, min(start + 64, len(clips) * VIEWS)) % len(clips)
        frames = mels.frames[pick]
        tokens, counts = listener(augment(mels.values[pick].float(), frames, rng), frames)
        for index, row, count in zip(pick.tolist(), tokens, counts.tolist(), strict=True):
            sounds.append(Sound(clip=clips[index], tokens=row[:count].clone()))
    return sorted(sounds, key=lambda sound: len(sound.tokens))


class DecoderInput:
    """Turns questions into padded decoder inputs; after the answer's label comes end of turn."""

    def __init__(self, processor: Qwen2AudioProcessor) -> None:
        self._processor = processor
        self._ids = cache(self._split)

    def _split(self, prompt: str) -> tuple[Tensor, Tensor]:
        tokenizer = self._processor.tokenizer
        ids = torch.tensor(tokenizer(chat_text(self._processor, prompt)).input_ids)
        at = int((ids == self._processor.audio_token_id).nonzero())
        return ids[:at], ids[at + 1 :]

    def build(
        self, embed: nn.Module, questions: Sequence[tuple[str, str]], heard: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [case, pos, d_model], attention mask, and the two target ids per case.

        Args:
            embed: the decoder's embedding.
            questions: prompt and right answer of each case.
            heard: audio tokens of each case.
        """
        rows, targets = [], self.targets(questions)
        for (prompt, _), tokens, label in zip(questions, heard, targets[:, 0], strict=True):
            before, after = self._ids(prompt)
            rows.append(torch.cat([embed(before), tokens, embed(after), embed(label[None])]))
        longest = max(map(len, rows))
        mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
        padded = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        return padded, mask, targets

    def targets(self, questions: Sequence[tuple[str, str]]) -> Tensor:
        """The two target ids per case: its label, then end of turn."""
        tokenizer = self._processor.tokenizer
        labels = torch.tensor([tokenizer.convert_tokens_to_ids(answer) for _, answer in questions])
        return torch.stack([labels, torch.full_like(labels, tokenizer.eos_token_id)], dim=1)


def train_decoder(
    model: Qwen2AudioForConditionalGeneration,
    inputs: DecoderInput,
    sounds: Sequence[Sound[ClipT]],
    draw: Callable[[Sequence[ClipT], np.random.Generator], list[tuple[str, str]]],
    plan: Plan,
    *,
    steps: int,
    rate: float,
    name: str,
) -> None:
    """Train embeddings, decoder and head, on the answer's two tokens only.

    Args:
        model: its decoder is trained.
        inputs: made with the model's processor.
        sounds: the clips as the listener hears them, sorted by length.
        draw: a question and its right answer for each clip of a batch.
        plan: seed and batch.
        steps: number of batches.
        rate: highest learning rate.
        name: name of the stage, for the log.
    """
    rng = np.random.default_rng(plan.seed + 2)
    embed = model.get_input_embeddings()

    def loss_of() -> tuple[Tensor, float]:
        # Neighbours in the sorted list are of like length: little padding.
        window = 4 * plan.batch
        start = rng.integers(len(sounds) - window)
        chosen = [sounds[i] for i in start + rng.permutation(window)[: plan.batch]]
        questions = draw([sound.clip for sound in chosen], rng)
        embeds, mask, targets = inputs.build(embed, questions, [s.tokens for s in chosen])
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
