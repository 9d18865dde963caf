"""Two models that learn the same but for one rule: trained, measured, and written to folders.

Stages, all seeded and on one thread; see ``bundled_training``:

1. listener: audio tower and projector learn what is to be heard, then they are frozen.
2. decoder, shared: the questions whose answer does not depend on the rule.
3. decoder, branched: all questions, once under each rule.

Twins therefore share their ears and the first part of their schooling.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from bundled_model import (
    Design,
    build_model,
    build_processor,
    hear,
    read_folder,
    replacing,
    write_folder,
)
from bundled_training import (
    DecoderInput,
    Plan,
    Spoken,
    encode,
    read_mels,
    train_decoder,
    train_listener,
)
from model_card import Metrics
from synthesise_speech import ASSETS
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

ClipT = TypeVar("ClipT", bound=Spoken)
RuleT = TypeVar("RuleT", bound=str)
Questions = Callable[[Sequence[ClipT], np.random.Generator], list[tuple[str, str]]]
"""Draws a prompt and its right answer for each clip."""


class WriteCard(Protocol):
    """Writes ``metrics.json`` and ``README.md``."""

    def __call__(
        self,
        folder: Path,
        model: Qwen2AudioForConditionalGeneration,
        processor: Qwen2AudioProcessor,
        rule: str,
        metrics: Metrics,
        clips: int,
        command: str,
    ) -> None:
        """Write the card of the model of one rule, made of so many clips by the command."""


@dataclass(frozen=True, kw_only=True)
class Twins(Generic[ClipT, RuleT]):
    """Description of a pair of models."""

    script: str
    """Name of the script, for the command line."""
    plan: Plan
    """Sizes with which the bundled pair was trained."""
    design: Design
    folders: Mapping[RuleT, str]
    """Rule -> name of the model."""
    speak: Callable[[int, int], list[ClipT]]
    """Function ``(number of clips, seed)`` -> clips to train on."""
    speak_held_out: Callable[[int], dict[str, list[ClipT]]]
    """Function ``seed`` -> clips that a model is measured on; both get the same ones."""
    heard: Callable[[Sequence[ClipT]], list[torch.Tensor]]
    """Function of clips: the class of each that the listener learns, for each of its probes."""
    shared: Questions[ClipT]
    branched: Callable[[RuleT], Questions[ClipT]]
    measure: Callable[..., Metrics]
    """Function ``(model, processor, rule, held-out clips, seed)`` -> scores."""
    write_card: WriteCard


def train(
    twins: Twins[ClipT, RuleT], processor: Qwen2AudioProcessor, clips: list[ClipT], plan: Plan
) -> Iterator[tuple[RuleT, Qwen2AudioForConditionalGeneration]]:
    """Train both models, and give them one after the other."""
    mels = read_mels(processor, [clip.samples for clip in clips])
    print(f"{len(clips)} clips, {mels.frames.float().mean() / 100:.2f} s on average", flush=True)
    model = build_model(twins.design, processor, plan.seed)
    train_listener(model, mels, twins.heard(clips), plan)
    sounds = encode(partial(hear, model), clips, mels, plan.seed)
    inputs = DecoderInput(processor)
    train_decoder(
        model, inputs, sounds, twins.shared, plan, steps=plan.shared_steps, rate=2e-3, name="shared"
    )
    for rule, name in twins.folders.items():
        branch = deepcopy(model)
        train_decoder(
            branch, inputs, sounds, twins.branched(rule), plan, steps=plan.branch_steps, rate=1e-3,
            name=name,
        )  # fmt: skip
        yield rule, branch


def main(twins: Twins[ClipT, RuleT]) -> None:
    """Parse the command line, and train, measure and write a pair."""
    parser = argparse.ArgumentParser(description=f"Train {' and '.join(twins.folders.values())}.")
    parser.add_argument("--out", type=Path, default=ASSETS / "models")
    for name, default in asdict(twins.plan).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its cards anew"
    )
    options = vars(parser.parse_args())
    out, measure_only, plan = options.pop("out"), options.pop("measure"), Plan(**options)
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    command = f"python scripts/{twins.script} {flags}"
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    processor = build_processor(twins.design)
    # Speech of the training set comes first in either case: espeak carries state between calls.
    clips = twins.speak(plan.clips, plan.seed)
    held_out = twins.speak_held_out(plan.seed)
    trained: Iterator[tuple[RuleT, Qwen2AudioForConditionalGeneration]]
    if measure_only:
        trained = ((rule, read_folder(out / name)) for rule, name in twins.folders.items())
    else:
        trained = train(twins, processor, clips, plan)
    for rule, model in trained:
        metrics = twins.measure(model.eval(), processor, rule, held_out, plan.seed)
        with replacing(out / twins.folders[rule]) as folder:
            write_folder(folder, model, processor)
            twins.write_card(folder, model, processor, rule, metrics, plan.clips, command)
        print(json.dumps(metrics), flush=True)
