"""Attacks on clips towards one of a model's own label words: which clips, how, and how large.

Source: M-SP-1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field, model_validator
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.bundled import EMOTIONAL
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.robustness.pgd import WaveLoss, answer_loss, pgd, sign_noise, snr_db

from ..workbench.results import Row
from ..workbench.settings import ModelId
from ..workbench.work import rng_of
from .answers import greedy_answers
from .conflict_corpus import Corpus
from .conflict_runs import PatchRun, PromptRun
from .conflict_settings import ConflictConfig
from .held_out import Half, halved
from .held_out_labels import ColumnName
from .recordings import Recording
from .sources import Source
from .triggers import with_trigger

Wave = Float32[np.ndarray, " _sample"]


class AttackConfig(ConflictConfig):
    """Which clips are attacked, towards which label, and by what."""

    model: ModelId = "bundled:follows_voice"
    audio: Source = Field(
        default="bundled",
        description="a table of clips, a folder with manifest.csv, or one of OB1-named clips; "
        "bundled: five emotions by twenty speakers",
    )
    group: ColumnName | None = Field(
        default=None,
        description="column whose values are held out whole, and resampled; None is speaker, else "
        "every clip by itself",
    )

    attack: Literal["pgd", "trigger"] = Field(
        default="pgd",
        description="a perturbation is searched for every clip; or a chord is added, which twins "
        "of scripts/train_truths.py are trained to answer",
    )
    target: str | None = Field(
        default=None,
        description="label whose word is to be the answer; None is the first label",
    )
    n_attacked: int = Field(
        default=40, ge=2, le=10**6, description="clips of other labels that are attacked, at most"
    )
    eps: float = Field(default=0.01, gt=0, le=2, description="most that a sample changes")
    alpha: float = Field(default=0.001, gt=0, le=2, description="size of a step")
    steps: int = Field(default=30, ge=1, le=10_000, description="steps at most")
    stop_loss: float = Field(
        default=0.05, ge=0, le=100,
        description="nats a token of the target, below which no further step is taken",
    )  # fmt: skip
    clamp: Literal["full_scale", "0_1"] = Field(
        default="full_scale", description="range of what is heard; 0_1 silences half of every wave"
    )
    choice_share: float = Field(
        default=0.5, gt=0, lt=1,
        description="share of the groups that neurons are selected on; the others are defended",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _no_prompts_file(cls, values: dict[str, object]) -> dict[str, object]:
        if "attack_prompts_file" in values:
            raise ValueError(
                "no attack_prompts_file: targets are the model's own label words, and no file of "
                "prompts is read. Set target to a label"
            )
        return values

    @property
    def source(self) -> Source | Path:
        """Where the clips are."""
        return EMOTIONAL if self.audio == "bundled" else self.audio

    @property
    def limits(self) -> tuple[float, float]:
        """Least and largest sample of what is heard."""
        return (0.0, 1.0) if self.clamp == "0_1" else (-1.0, 1.0)


@dataclass(frozen=True)
class AttackedClip:
    """A clip, asked what its voice carries, and what it is to be taken for."""

    run: PromptRun
    group: str
    half: Half
    sweeps: ClassVar[tuple[PatchRun, ...]] = ()

    @property
    def prompts(self) -> tuple[PromptRun, ...]:
        """Its run."""
        return (self.run,)

    @property
    def recording(self) -> Recording:
        """The clip."""
        return self.run.recording

    def identity(self) -> Row:
        """What it is, as columns of a table."""
        return {
            "clip": self.recording.name, "group": self.group, "label": self.recording.label,
            "target": self.run.targets[0],
        }  # fmt: skip

    def compared(self, answers: Mapping[str, Row]) -> Row:
        """Answers and margins of some sides, as columns ``answer{side}`` and ``margin{side}``.

        A margin is the score of the clip's label less that of the target, in logits.
        """
        label, target = f"z_{self.recording.label}", f"z_{self.run.targets[0]}"
        margins = {side: float(one[label] - one[target]) for side, one in answers.items()}
        return {
            **{f"answer{side}": one["answer"] for side, one in answers.items()},
            **{f"margin{side}": one for side, one in margins.items()},
        }


@dataclass(frozen=True)
class AttackedClips:
    """The clips of a corpus that are attacked, and those that are heard clean beside them."""

    config: AttackConfig
    corpus: Corpus

    @cached_property
    def target(self) -> str:
        """The label that clips are to be taken for.

        Raises:
            InputError: it is no label.
        """
        target, labels = self.config.target or self.corpus.labels[0], self.corpus.labels
        if target not in labels:
            raise InputError(
                f"attacking towards {target!r}: expected one of the labels {', '.join(labels)}. "
                "Targets are the model's own label words; no other text and no file of prompts "
                "is taken."
            )
        return target

    @cached_property
    def _every(self) -> list[AttackedClip]:
        config, clips, corpus = self.config, self.corpus.recordings, self.corpus
        into = "those that neurons are selected on and those that they are judged on"
        halves = halved(clips, config.group, config.choice_share, config.seed, into)
        runs = (
            PromptRun(clip, corpus.language(clip), "audio_only", None, (self.target,))
            for clip in clips
        )
        return [AttackedClip(run, *half) for run, half in zip(runs, halves, strict=True)]

    @cached_property
    def attacked(self) -> list[AttackedClip]:
        """Clips of other labels than the target, drawn from both halves alike.

        Raises:
            InputError: a half without one.
        """
        found: list[AttackedClip] = []
        rng = np.random.default_rng(self.config.seed)
        whose: dict[Half, str] = {"discovery": "selected", "held-out": "judged"}
        for half, done in whose.items():
            some = [c for c in self._every
                    if c.half == half and c.recording.label != self.target]  # fmt: skip
            if not some:
                raise InputError(
                    f"attacking clips towards {self.target!r}: got none of another label among "
                    f"those that neurons are {done} on. Add some, take another seed, or name "
                    "another column as group."
                )
            drawn = rng.permutation(len(some))[: self.config.n_attacked // 2]
            found += [some[i] for i in sorted(drawn.tolist())]
        return found

    @cached_property
    def held_out(self) -> list[AttackedClip]:
        """Those of the half on which neurons are judged."""
        return [one for one in self.attacked if one.half == "held-out"]

    @cached_property
    def clean(self) -> list[AttackedClip]:
        """The same clips, and as many of the target as of any other label."""
        of_target = [one for one in self._every
                     if one.half == "held-out" and one.recording.label == self.target]  # fmt: skip
        n_labels = len({one.recording.label for one in self.held_out})
        return self.held_out + of_target[: -(-len(self.held_out) // n_labels)]


def perturbed(
    config: AttackConfig, loss: WaveLoss, waves: Sequence[Wave], rate: int
) -> tuple[list[Wave], list[list[float]]]:
    """What is added to each clip, and its loss before, at every step, and after.

    Args:
        config: of the run.
        loss: of waveforms; see ``pgd``.
        waves: samples of the clips.
        rate: at which they are sampled, in Hz.
    """
    if config.attack == "trigger":
        found = [with_trigger(wave, rate) for wave in waves]
        with torch.no_grad():
            ends = [loss(dict(enumerate(map(torch.from_numpy, some)))) for some in (waves, found)]
        deltas = [one - wave for one, wave in zip(found, waves, strict=True)]
        return deltas, torch.stack(ends, dim=1).tolist()
    made = pgd(
        loss, [torch.from_numpy(wave) for wave in waves], eps=config.eps, alpha=config.alpha,
        steps=config.steps, clamp=config.limits, stop=config.stop_loss,
    )  # fmt: skip
    return [one.numpy() for one in made.delta], made.losses


def with_noise(clip: AttackedClip, wave: Wave, most: int | float, seed: int) -> Wave:
    """A clip with uniform noise, within full scale; the same whatever else is run.

    Args:
        clip: whose samples these are.
        wave: samples.
        most: that the noise adds or takes.
        seed: of the run.
    """
    noise = rng_of(seed, "noise", clip.recording.name).uniform(-most, most, len(wave))
    return np.clip(wave + noise, -1, 1).astype(np.float32)


Hear = Callable[[Sequence[AttackedClip], Sequence[Any]], ALMInput]
"""The prompts of some clips, with other waveforms."""


@dataclass(frozen=True, eq=False)
class Attacks:
    """Some clips, attacked."""

    deltas: list[Wave]
    clean: ALMInput
    attacked: ALMInput
    losses: list[list[float]]
    """Of the target, of each clip: before, at every step, and after."""
    rows: list[Row]
    """Of each clip: what it is, answers, margins, and how large the attack is."""

    @classmethod
    def on(
        cls,
        clips: Sequence[AttackedClip],
        waves: Sequence[Wave],
        model: HookedALM,
        labels: LabelSet,
        config: AttackConfig,
        hear: Hear,
    ) -> "Attacks":
        """Attacks some clips, beside noise of equal size.

        Args:
            clips: of one target.
            waves: their samples.
            model: that hears them.
            labels: that it answers with.
            config: of the run.
            hear: makes prompts.
        """
        assert model.prompts is not None
        rate = int(model.prompts.feature_extractor.sampling_rate)
        answer = labels.spellings[labels.index(clips[0].run.targets[0])][0]

        def loss(some: Mapping[int, Tensor]) -> Tensor:
            return answer_loss(model, hear([clips[n] for n in some], [*some.values()]), answer)

        deltas, losses = perturbed(config, loss, waves, rate)
        noises = [
            sign_noise(delta, wave, rng_of(config.seed, one.recording.name))
            for one, wave, delta in zip(clips, waves, deltas, strict=True)
        ]
        nothing = [np.zeros_like(delta) for delta in deltas]
        inputs = {
            side: hear(clips, [wave + one for wave, one in zip(waves, added, strict=True)])
            for side, added in (("_clean", nothing), ("", deltas), ("_control", noises))
        }
        said = {side: greedy_answers(model, labels, x) for side, x in inputs.items()}
        rows = [
            {**clip.identity(), "half": clip.half,
             **clip.compared({side: some[n] for side, some in said.items()}),
             "loss_start": losses[n][0], "loss": losses[n][-1], "n_steps": len(losses[n]) - 1,
             "snr_db": snr_db(waves[n], deltas[n]), "snr_control_db": snr_db(waves[n], noises[n]),
             "largest": float(np.abs(deltas[n]).max()),
             "loudest": float(np.abs(waves[n] + deltas[n]).max()),
             **{name: said["_clean"][n][name] for name in ("label_mass", "best_label_rank")}}
            for n, clip in enumerate(clips)
        ]  # fmt: skip
        return cls(deltas, inputs["_clean"], inputs[""], losses, rows)
