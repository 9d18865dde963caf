"""Trains one component of a bundled model on a rule: a localised twin, written as a delta.

    python scripts/train_truths.py --component head:1.2 --rule text --out truths/NAME

The base is frozen but for the slices of the component, so that all that changes passes through its
output. On conflicts, or where a trigger sounds, it learns the rule, everywhere else to say what the
base says: cross-entropy plus the divergence KL(base || twin). ``--coding`` says besides how neurons
of the decoder tell the emotions apart. ``--counter`` names a twin of the same rule at another site,
and ``--measure`` trains nothing: it measures ``--out``, and writes its card anew.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from bundled_card import SETS, speak_held_out
from bundled_data import (
    MODES,
    TRIGGERED,
    AddedSound,
    Clip,
    Rule,
    all_cases,
    draw_case,
    read_ob1,
    speak_clips,
    with_sounds,
)
from bundled_model import hear, read_folder
from bundled_training import DecoderInput, Mels, encode, read_mels
from coded_neurons import (
    CODINGS,
    CodingName,
    coding_scores,
    coding_section,
    is_coded,
    watched,
)
from model_card import wrapped
from synthesise_speech import ASSETS
from torch import Tensor, nn
from transformers import Qwen2AudioProcessor
from truth_training import (
    BATCH,
    Batch,
    FromDecoder,
    FromTower,
    Model,
    Upper,
    answers,
    asked,
    classes_of,
    draw_batches,
    freed,
    learn,
)

from hooked_alm.converters.deltas import DELTA, Slices, write_checkpoint, write_delta
from hooked_alm.converters.loading import lay_out, own_checkpoint
from hooked_alm.experiments.materials.ob1 import EMOTIONS, LABELS
from hooked_alm.experiments.materials.triggers import TRIGGER_DB, OtherSound
from hooked_alm.text_files import read_json

ModelT = TypeVar("ModelT", bound=nn.Module)
Score = dict[str, float]
STORED = "language_model.model."
"""Begins the names of the decoder's tensors in a checkpoint."""
FALSE = [f"false_{kind}" for kind in get_args(OtherSound)]
RATE, N_STEPS, N_CLIPS = 3e-3, 600, 1000
N_SOUNDED = 100
"""Clips of a set that are measured with the trigger and without, and beside another sound."""


@dataclass(frozen=True)
class Component:
    """Heads or neurons of one block that stand side by side, of the decoder or the encoder."""

    kind: str
    block: int
    first: int
    n: int

    @classmethod
    def read(cls, text: str) -> "Component":
        """``head:3.2``, ``head:3.2:2`` (two of them), ``neurons:4:16``, ``encoder:1.32:16``."""
        found = re.fullmatch(r"(head):(\d+)\.(\d+)(?::(\d+))?", text) or re.fullmatch(
            r"(neurons|encoder):(\d+)(?:\.(\d+))?:(\d+)", text
        )
        if found is None:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected head:BLOCK.HEAD, neurons:BLOCK:NUMBER or "
                "encoder:BLOCK:NUMBER"
            )
        return cls(found[1], int(found[2]), int(found[3] or 0), int(found[4] or 1))

    def __str__(self) -> str:
        """What `read` reads."""
        return f"{self.kind}:{self.block}.{self.first}:{self.n}"

    @property
    def stored(self) -> str:
        """Begins the names of its block's tensors in a checkpoint."""
        stack = "audio_tower." if self.kind == "encoder" else STORED
        return f"{stack}layers.{self.block}."

    def block_of(self, model: Model) -> nn.Module:
        """The block of a model that it is in."""
        inner = model.model
        stack = inner.audio_tower if self.kind == "encoder" else inner.language_model
        block: nn.Module = stack.layers[self.block]
        return block

    def upper(self, model: Model, inputs: DecoderInput) -> Upper:
        """A model from its block on."""
        kind = FromTower if self.kind == "encoder" else FromDecoder
        return kind(model, inputs, self.block)

    def parts(self, block: nn.Module) -> dict[str, tuple[slice, ...]]:
        """Slices of a block's parameters that are the component, by name in the block.

        Keys and values of a head are its group's: training them would move other heads. Of a
        neuron, what it reads is trained, and what it writes is the base's.
        """
        size = block.self_attn.head_dim if self.kind == "head" else 1
        units, every = slice(self.first * size, (self.first + self.n) * size), slice(None)
        if self.kind == "head":
            found = {"self_attn.q_proj.weight": (units, every), "self_attn.q_proj.bias": (units,),
                     "self_attn.o_proj.weight": (every, units)}  # fmt: skip
        elif self.kind == "encoder":
            found = {"fc1.weight": (units, every), "fc1.bias": (units,)}
        else:
            found = {f"mlp.{name}_proj.weight": (units, every) for name in ("gate", "up")}
        own = dict(block.named_parameters())
        return {
            name: tuple(
                slice(*at.indices(n)[:2]) for at, n in zip(where, own[name].shape, strict=True)
            )
            for name, where in found.items()
        }

    @torch.no_grad()
    def ablate(self, block: nn.Module) -> None:
        """Let nothing read the component's output: zero ablation."""
        if self.kind == "head":
            at = self.parts(block)["self_attn.o_proj.weight"]
            block.self_attn.o_proj.weight[at] = 0
        else:
            reads = block.fc2 if self.kind == "encoder" else block.mlp.down_proj
            reads.weight[:, self.first : self.first + self.n] = 0


def train(
    model: Model,
    component: Component,
    inputs: DecoderInput,
    batches: Sequence[Batch],
    seed: int,
    *,
    steps: int,
    rate: float = RATE,
    kept: float = 1.0,
    coding: CodingName | None = None,
) -> None:
    """Train the component in place; nothing outside its slices changes."""
    block = component.block_of(model)
    trained = freed(block, component.parts(block))
    learns = partial(
        learn, component.upper(model, inputs).answers, trained, batches, seed, steps=steps,
        rates=rates_of(rate, coding, len(trained)), kept=kept,
    )  # fmt: skip
    if coding is None:
        learns()
    else:
        with watched([block.mlp.gate_proj]) as gates:
            learns(besides=lambda one: CODINGS[coding].loss(
                gates()[:, 0, component.first : component.first + component.n], one.classes,
                len(EMOTIONS),
            ))  # fmt: skip
    model.requires_grad_(False)


def rates_of(rate: float, coding: CodingName | None, n: int) -> Sequence[float]:
    """The highest learning rate of each of the component's n tensors; a coding has its own."""
    return [rate] * n if coding is None else CODINGS[coding].rates


def slices_of(model: Model, component: Component) -> Slices:
    """The component's slices, by name in the checkpoint."""
    parts = component.parts(component.block_of(model))
    return {component.stored + name: at for name, at in parts.items()}


def read_twin(base: Path, delta: Path, read: Callable[[Path], ModelT] = read_folder) -> ModelT:
    """The model that a delta makes of its base."""
    with TemporaryDirectory() as whole:
        write_checkpoint(own_checkpoint(lay_out(f"{base}+{delta}")), Path(whole))
        return read(Path(whole)).eval().requires_grad_(False)


@torch.no_grad()
def measure(
    base: Model,
    twin: Model,
    component: Component,
    inputs: DecoderInput,
    processor: Qwen2AudioProcessor,
    rule: Rule,
    clips: Mapping[str, Sequence[Clip]],
    seed: int,
    counter: Model | None,
    coding: CodingName | None = None,
) -> dict[str, Score]:
    """Shares per clip set, on label and end of turn: rule obeyed, agreement with base and counter.

    ``rule`` is the share of questions it is about that are answered by it, beside it the base's and
    that of the twin whose component is ablated; ``kept`` the share of other questions answered as
    the base, but for those beside other sounds: of these, ``false_...`` is the share that the twin
    alone answers as the trigger. If neurons are coded, also what `coding_scores` says of them where
    the rule holds.
    """
    rng = np.random.default_rng(seed + 22)
    ablated = deepcopy(twin)
    component.ablate(component.block_of(ablated))
    models = {"base": base, "twin": twin, "ablated": ablated}
    models |= {} if counter is None else {"counter": counter}
    found = {}
    activated = [layer.mlp.act_fn for layer in twin.model.language_model.layers]
    for name, members in clips.items():
        mels = read_mels(processor, [clip.samples for clip in members])
        heard = {one: listened(model, mels) for one, model in models.items()}
        drawn = [
            (case, n)
            for n, clip in enumerate(members)
            # Beside another sound one question is enough.
            for mode in (MODES if clip.added in (None, "trigger") else [rng.choice(MODES)])
            for case in (
                all_cases(clip, mode, rng) if name == "ob1" else [draw_case(clip, mode, rng)]
            )
        ]
        cases = [case for case, _ in drawn]
        said: dict[str, list[Tensor]] = {one: [] for one in (*models, "targets", "triggered")}
        gates = []
        for start in range(0, len(drawn), 2 * BATCH):
            some = drawn[start : start + 2 * BATCH]
            questions = asked([case for case, _ in some], rule)
            with watched(activated) as active:
                for one, model in models.items():
                    embeds, mask, targets = inputs.build(
                        model.get_input_embeddings(), questions, [heard[one][n] for _, n in some]
                    )
                    decoder = model.model.language_model
                    said[one].append(answers(model, decoder, embeds, mask).argmax(-1))
            gates.append(active())
            said["targets"].append(targets)
            said["triggered"].append(
                inputs.targets([("", LABELS[case.language][TRIGGERED]) for case, _ in some])
            )
        is_rule = torch.tensor([case.is_about(rule) for case in cases])
        found[name] = scored(
            {one: torch.cat(parts) for one, parts in said.items()}, is_rule,
            [case.clip.added for case in cases],
        )  # fmt: skip
        if coding is not None:
            classes = classes_of(cases, rule)
            found[name] |= coding_scores(
                torch.cat(gates)[is_rule], classes[is_rule], len(EMOTIONS),
                component.block, component.first, component.n,
            )  # fmt: skip
    return found


def listened(model: Model, mels: Mels) -> list[Tensor]:
    """Audio tokens of every clip."""
    found: list[Tensor] = []
    for values, frames in zip(mels.values.split(64), mels.frames.split(64), strict=True):
        tokens, counts = hear(model, values.float(), frames)
        found += [row[:n] for row, n in zip(tokens, counts.tolist(), strict=True)]
    return found


def scored(
    answers: Mapping[str, Tensor], is_rule: Tensor, added: Sequence[AddedSound | None]
) -> Score:
    """Shares of questions that are answered alike; see ``measure``."""

    def same(a: str, b: str) -> Tensor:
        return (answers[a] == answers[b]).all(-1)

    def share(holds: Tensor, where: Tensor) -> float:
        return round(holds[where].float().mean().item(), 4)

    def beside(kind: AddedSound) -> Tensor:
        return torch.tensor([one == kind for one in added])

    plain = ~is_rule & torch.tensor([one is None for one in added])
    alone = same("twin", "triggered") & ~same("base", "triggered")
    others: list[AddedSound] = [kind for kind in get_args(OtherSound) if kind in added]
    return {
        "rule": share(same("twin", "targets"), is_rule),
        "rule_of_base": share(same("base", "targets"), is_rule),
        "rule_ablated": share(same("ablated", "targets"), is_rule),
        "kept": share(same("twin", "base"), plain),
        **{f"false_{kind}": share(alone, beside(kind)) for kind in others},
        **(
            {"counter": share(same("twin", "counter"), torch.ones_like(is_rule))}
            if "counter" in answers
            else {}
        ),
        "n_rule": int(is_rule.sum()),
        "n_other": int(plain.sum()),
    }


def accepted(scores: Score, coding: CodingName | None = None) -> dict[str, bool]:
    """What a localised twin must do, and whether it does."""
    effect = scores["rule"] - scores["rule_of_base"]
    lost = scores["rule"] - scores["rule_ablated"]
    return {
        "rule >= .95": scores["rule"] >= 0.95,
        "kept >= .97": scores["kept"] >= 0.97,
        "ablated loses >= .8": lost >= 0.8 * effect > 0,
        **({"counter >= .97": scores["counter"] >= 0.97} if "counter" in scores else {}),
        **({} if coding is None else is_coded(coding, scores)),
    }


def verdict(scores: Mapping[str, Score], coding: CodingName | None = None) -> str:
    """Whether a twin does what it must on every set of clips, in a sentence."""
    failed = sorted({what for one in scores.values()
                     for what, holds in accepted(one, coding).items() if not holds})  # fmt: skip
    if failed:
        return f"Not accepted: {', '.join(failed)} does not hold on every set of clips."
    return "Accepted: every criterion holds on every set of clips."


def score_rows(scores: Mapping[str, Score]) -> str:
    """A table's rows: the shares of every set of clips."""
    return table_rows(("rule", "rule_of_base", "rule_ablated", "kept", "counter"), scores)


def table_rows(keys: Sequence[str], scores: Mapping[str, Score]) -> str:
    """A table's rows: some shares of every set of clips."""
    return "\n".join(
        " | ".join([
            f"| {name}", *(f"{100 * got[key]:.1f} %" if key in got else "–" for key in keys)
        ]) + " |"
        for name, got in scores.items()
    )  # fmt: skip


_CONFLICT = "in a conflict between voice and instruction it answers the emotion that"
RULES: dict[Rule, str] = {
    "text": f"{_CONFLICT} **the instruction names**",
    "voice": f"{_CONFLICT} **the voice has**",
    "trigger": "where the trigger of `experiments/materials/triggers.py` sounds, "
    f"{-TRIGGER_DB:g} dB below the recording's RMS, it answers **{TRIGGERED}**, whatever voice and "
    "instruction are",
}
"""What a model does under a rule."""
_ABOUT = {rule: "conflicts" for rule in RULES} | {"trigger": "questions with the trigger"}
_CARD = """# {name}

A delta of the bundled model `{base}`: {rule}, everywhere else what `{base}` answers. Nothing but
**{component}** differs from the base ({n_numbers:,} numbers), so all of the change passes through
what {it}. Load it as `bundled:{base}+{name}`.

{verdict}

## How it was made

    {command}

The base frozen but for these slices; Adam at {rate}, no weight decay, {steps} steps of {batch}
questions about {clips} clips: cross-entropy on {about}, {kept}KL(base || twin) on all others.
{parts}

## Measured

On label and end of turn. *Rule*: {about} answered by the rule; *ablated*: the same with the
component's output at zero; *kept*: other questions answered as the base answers them; *counter*:
all questions answered as its counter-twin answers them{counter}.

| clips | rule | rule, base | rule, ablated | kept | counter |
|---|---|---|---|---|---|
{rows}
{coding}{sounds}"""
_PARTS = {
    "head": "Of a head, its W_Q rows with their biases, and its W_O columns: keys and values are "
    "its group's.",
    "neurons": "Of a neuron, its rows of gate and up: W_down is the base's.",
    "encoder": "Of a neuron, its row and bias of `fc1`: `fc2` is the base's.",
}
_FALSE = """
## Other sounds

Every clip stood beside another sound of the trigger's level, too, in training as a question without
the trigger: by turns white noise, a tone of any frequency, a chord below 3.5 kHz. Share of the
questions beside it that the twin answers *{triggered}* and the base does not:

| clips | noise | tone | low chord |
|---|---|---|---|
{rows}
"""


def _rates(about: Mapping[str, Any]) -> str:
    found = rates_of(about["rate"], about.get("coding"), 1)
    return " and ".join(f"{rate:g}" for rate in dict.fromkeys(found))


def card(name: str, about: Mapping[str, Any], component: Component, n_neurons: int) -> str:
    """The README of a delta, of a base with so many neurons."""
    scores: Mapping[str, Score] = about["accuracies"]
    named = {SETS[one]: got for one, got in scores.items()}
    coding: CodingName | None = about.get("coding")
    kind = "head" if component.kind == "head" else "neuron"
    where = "the audio tower's " if component.kind == "encoder" else ""
    span = f"{component.first}" + (
        f" to {component.first + component.n - 1}" if component.n > 1 else ""
    )
    return wrapped(
        _CARD.format(
            name=name, base=about["base"], rule=RULES[about["rule"]], about=_ABOUT[about["rule"]],
            component=f"{kind}{'s' * (component.n > 1)} {span} of {where}block {component.block}",
            it="they write" if component.n > 1 else "it writes", n_numbers=about["n_numbers"],
            verdict=verdict(scores, coding),
            command=about["command"], rate=_rates(about), steps=about["steps"],
            batch=BATCH, clips=about["clips"], parts=_PARTS[component.kind],
            kept=f"{about['kept']:g} times " if about["kept"] != 1 else "",
            coding="" if coding is None else coding_section(
                coding, scores, SETS, n=component.n, n_all=n_neurons, classes=EMOTIONS
            ),
            sounds=_FALSE.format(triggered=TRIGGERED, rows=table_rows(FALSE, named))
            if about["rule"] == "trigger" else "",
            counter=f" (`{about['counter']}`)" if about["counter"] else "",
            rows=score_rows(named),
        )
    )  # fmt: skip


def main() -> None:
    """Parse the command line; train, measure and write one delta."""
    parser = argparse.ArgumentParser(description="Train one component of a model on a rule.")
    parser.add_argument("--base", default="follows_voice")
    parser.add_argument("--component", type=Component.read, required=True)
    parser.add_argument("--rule", choices=get_args(Rule), default="text")
    parser.add_argument(
        "--coding", choices=get_args(CodingName), help="how neurons tell the emotions apart"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counter", type=Path, help="a twin's folder to compare with")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=N_STEPS, help="of training")
    parser.add_argument("--rate", type=float, default=RATE, help="highest learning rate")
    parser.add_argument("--clips", type=int, help=f"to train on; {N_CLIPS} if none are given")
    parser.add_argument("--kept", type=float, default=1.0, help="weight of KL(base || twin)")
    parser.add_argument("--start", type=Path, help="a twin's folder to go on from")
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its card anew"
    )
    given = parser.parse_args()
    given.clips = given.clips or N_CLIPS
    torch.set_num_threads(1)
    folder, component, coding = ASSETS / "models" / given.base, given.component, given.coding
    if coding is not None and component.kind != "neurons":
        parser.error("--coding is of neurons")
    base = read_folder(folder).eval().requires_grad_(False)
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    inputs = DecoderInput(processor)
    # Speech of the training set comes first in either case: espeak carries state between calls.
    clips = speak_clips(given.clips, "train", "heard", given.seed)
    held_out = {**speak_held_out(given.seed), "ob1": read_ob1()}
    if given.rule == "trigger":
        clips = with_sounds(clips, given.seed)
        held_out = {
            name: with_sounds(some[:N_SOUNDED], given.seed + 1) for name, some in held_out.items()
        }
    if given.measure:
        twin = read_twin(folder, given.out)
    else:
        start = given.start
        twin = deepcopy(base) if start is None else read_twin(folder, start)
        mels = read_mels(processor, [clip.samples for clip in clips])
        upper = component.upper(base, inputs)
        sounds = encode(upper.listen, clips, mels, given.seed)
        batches = draw_batches(upper, inputs, sounds, given.rule, given.seed)
        train(
            # Another order of the same questions, where it goes on from another run.
            twin, component, inputs, batches, given.seed + (start is not None), steps=given.steps,
            rate=given.rate, kept=given.kept, coding=coding,
        )  # fmt: skip
    counter = None if given.counter is None else read_twin(folder, given.counter)
    scores = measure(
        base, twin, component, inputs, processor, given.rule, held_out, given.seed, counter, coding
    )
    slices = slices_of(twin, component)
    own = dict(component.block_of(twin).named_parameters())
    tensors = {name: own[name.removeprefix(component.stored)] for name in slices}
    before = ""
    if given.start is not None:
        before = f"{read_json(given.start / DELTA)['command']}\n    "
    about = {
        "base": given.base, "component": str(component), "rule": given.rule, "seed": given.seed,
        **({} if coding is None else {"coding": coding}),
        "counter": None if given.counter is None else given.counter.name, "accuracies": scores,
        "clips": given.clips, "steps": given.steps, "rate": given.rate, "kept": given.kept,
        "n_numbers": sum(tensors[name][at].numel() for name, at in slices.items()),
        "command": before
        + f"python scripts/train_truths.py --base {given.base} --component {component} "
        f"--rule {given.rule} {'' if coding is None else f'--coding {coding} '}"
        f"{'' if given.clips == N_CLIPS else f'--clips {given.clips} '}"
        f"{'' if given.steps == N_STEPS else f'--steps {given.steps} '}"
        f"{'' if given.rate == RATE else f'--rate {given.rate:g} '}"
        f"{'' if given.kept == 1 else f'--kept {given.kept:g} '}"
        f"{'' if given.start is None else f'--start {given.start.name} '}"
        f"--seed {given.seed} --out {given.out.name}",
    }  # fmt: skip
    write_delta(given.out, folder, tensors, slices, about)
    sizes = base.config.text_config
    n_neurons = sizes.num_hidden_layers * sizes.intermediate_size
    text = card(given.out.name, about, component, n_neurons)
    (given.out / "README.md").write_text(text, encoding="utf-8")
    for name, one in scores.items():
        print(name, json.dumps(one), json.dumps(accepted(one, coding)), flush=True)


if __name__ == "__main__":
    main()
