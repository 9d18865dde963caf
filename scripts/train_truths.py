"""Trains one component of a bundled model on a rule: a localised twin, written as a delta.

    python scripts/train_truths.py --component head:1.2 --rule text --out truths/NAME

The base is frozen but for the slices of the component, so that all that changes passes through its
output. On conflicts it learns the rule, everywhere else to say what the base says: cross-entropy
plus the divergence KL(base || twin). ``--coding`` says besides how neurons tell the emotions apart.
``--counter`` names a twin of the same rule at another site, and ``--measure`` trains nothing: it
measures ``--out``, and writes its card anew.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from bundled_card import SETS, speak_held_out
from bundled_data import MODES, Case, Clip, Rule, all_cases, draw_case, read_ob1, speak_clips
from bundled_model import hear, read_folder
from bundled_training import DecoderInput, Sound, encode, optimise, read_mels
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
from torch.nn import functional as F
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hooked_alm.converters.deltas import Slices, write_checkpoint, write_delta
from hooked_alm.converters.loading import lay_out, own_checkpoint
from hooked_alm.experiments.materials.ob1 import EMOTIONS

Model = Qwen2AudioForConditionalGeneration
ModelT = TypeVar("ModelT", bound=nn.Module)
Score = dict[str, float]
STORED = "language_model.model."
"""Begins the names of the decoder's tensors in a checkpoint."""
RATE, N_STEPS, BATCH, N_CLIPS, N_BATCHES = 3e-3, 600, 32, 1000, 96


@dataclass(frozen=True)
class Component:
    """Heads or neurons of one block that stand side by side."""

    kind: str
    block: int
    first: int
    n: int

    @classmethod
    def read(cls, text: str) -> "Component":
        """``head:3.2``, ``head:3.2:2`` (two of them), ``neurons:4:16`` or ``neurons:4.32:16``."""
        found = re.fullmatch(r"(head):(\d+)\.(\d+)(?::(\d+))?", text) or re.fullmatch(
            r"(neurons):(\d+)(?:\.(\d+))?:(\d+)", text
        )
        if found is None:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected head:BLOCK.HEAD or neurons:BLOCK:NUMBER"
            )
        return cls(found[1], int(found[2]), int(found[3] or 0), int(found[4] or 1))

    def __str__(self) -> str:
        """What `read` reads."""
        return f"{self.kind}:{self.block}.{self.first}:{self.n}"

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
            block.mlp.down_proj.weight[:, self.first : self.first + self.n] = 0


@dataclass(frozen=True)
class Batch:
    """Questions as they arrive at the component's block, and what the base answers."""

    stream: Tensor  # [case, pos, d_model]
    mask: Tensor  # [case, pos]
    targets: Tensor  # [case, 2]: label, end of turn
    base: Tensor  # [case, 2, vocab]: log-probabilities of the base there
    is_rule: Tensor  # [case]
    classes: Tensor  # [case]: emotion that the rule follows
    cases: Sequence[Case]


def draw_batches(
    model: Model,
    inputs: DecoderInput,
    sounds: Sequence[Sound[Clip]],
    block: int,
    rule: Rule,
    seed: int,
) -> list[Batch]:
    """Questions to train on: half of them conflicts, half of them all others."""
    rng = np.random.default_rng(seed + 20)
    others = [mode for mode in MODES if mode != "conflict"]
    found = []
    for _ in range(N_BATCHES):
        start = rng.integers(len(sounds) - 4 * BATCH)
        chosen = [sounds[i] for i in start + rng.permutation(4 * BATCH)[:BATCH]]
        modes = ["conflict" if i % 2 else others[rng.integers(len(others))] for i in range(BATCH)]
        cases = [draw_case(s.clip, mode, rng) for s, mode in zip(chosen, modes, strict=True)]
        embeds, mask, targets = laid_out(model, inputs, cases, [s.tokens for s in chosen], rule)
        with torch.no_grad():
            run = model.model.language_model(
                inputs_embeds=embeds, attention_mask=mask, use_cache=False,
                output_hidden_states=True,
            )  # fmt: skip
            base = model.lm_head(run.last_hidden_state[:, -2:]).log_softmax(-1)
        is_rule = torch.tensor([mode == "conflict" for mode in modes])
        classes = classes_of(cases, rule)
        states = run.hidden_states[block]
        found.append(Batch(states, mask, targets, base, is_rule, classes, cases))
    return found


def laid_out(
    model: Model,
    inputs: DecoderInput,
    cases: Sequence[Case],
    heard: Sequence[Tensor],
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """The decoder's inputs, each question followed by its answer under the rule."""
    questions = [(case.prompt, case.answer(rule)) for case in cases]
    with torch.no_grad():
        return inputs.build(model.get_input_embeddings(), questions, heard)


def classes_of(cases: Sequence[Case], rule: Rule) -> Tensor:
    """Index of the emotion that the rule follows, of each case."""
    return torch.tensor([EMOTIONS.index(case.emotion(rule)) for case in cases])


def train(
    model: Model,
    component: Component,
    batches: Sequence[Batch],
    seed: int,
    steps: int,
    coding: CodingName | None = None,
) -> None:
    """Train the component in place; nothing outside its slices changes."""
    rng = np.random.default_rng(seed + 21)
    decoder = model.model.language_model
    # What is below the component is the base's, and was run once.
    upper = deepcopy(decoder)
    upper.layers = decoder.layers[component.block :]
    trained = freed(upper.layers[0], component.parts(upper.layers[0]))

    def loss_of() -> tuple[Tensor, float]:
        one = batches[rng.integers(len(batches))]
        with watched([upper.layers[0].mlp.gate_proj]) as gates:
            states = upper(
                inputs_embeds=one.stream, attention_mask=one.mask, use_cache=False
            ).last_hidden_state
        logits = model.lm_head(states[:, -2:])
        rule, rest = logits[one.is_rule], logits[~one.is_rule].log_softmax(-1)
        targets = one.targets[one.is_rule]
        loss = F.cross_entropy(rule.flatten(0, 1), targets.flatten())
        kept = F.kl_div(rest, one.base[~one.is_rule], log_target=True, reduction="none")
        loss = loss + kept.sum(-1).mean()
        if coding is not None:
            planted = gates()[:, 0, component.first : component.first + component.n]
            loss = loss + CODINGS[coding].loss(planted, one.classes, len(EMOTIONS))
        return loss, (rule[:, 0].argmax(-1) == targets[:, 0]).float().mean().item()

    # Without decay, which would move the frozen part of a tensor.
    parts, rates = [([one], 0.0) for one in trained], rates_of(coding, len(trained))
    optimise(parts, loss_of, steps=steps, rate=rates, name="truth")
    model.requires_grad_(False)


def rates_of(coding: CodingName | None, n: int) -> Sequence[float]:
    """The highest learning rate of each of the component's n tensors."""
    return [RATE] * n if coding is None else CODINGS[coding].rates


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


def slices_of(model: Model, component: Component) -> Slices:
    """The component's slices, by name in the checkpoint."""
    block = f"{STORED}layers.{component.block}."
    parts = component.parts(model.model.language_model.layers[component.block])
    return {block + name: at for name, at in parts.items()}


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

    ``rule`` is the share of conflicts answered by the rule, beside it the base's and that of the
    twin whose component is ablated; ``kept`` the share of other questions answered as the base. If
    neurons are coded, also what `coding_scores` says of them on conflicts.
    """
    rng = np.random.default_rng(seed + 22)
    ablated = deepcopy(twin)
    component.ablate(ablated.model.language_model.layers[component.block])
    models = {"base": base, "twin": twin, "ablated": ablated}
    models |= {} if counter is None else {"counter": counter}
    found = {}
    activated = [layer.mlp.act_fn for layer in twin.model.language_model.layers]
    for name, members in clips.items():
        mels = read_mels(processor, [clip.samples for clip in members])
        tokens, counts = hear(base, mels.values.float(), mels.frames)
        heard = [row[:n] for row, n in zip(tokens, counts.tolist(), strict=True)]
        asked = [
            (case, sound)
            for clip, sound in zip(members, heard, strict=True)
            for mode in MODES
            for case in (
                all_cases(clip, mode, rng) if name == "ob1" else [draw_case(clip, mode, rng)]
            )
        ]
        said: dict[str, list[Tensor]] = {one: [] for one in (*models, "targets")}
        gates = []
        for start in range(0, len(asked), 2 * BATCH):
            some = asked[start : start + 2 * BATCH]
            embeds, mask, targets = laid_out(
                base, inputs, [case for case, _ in some], [sound for _, sound in some], rule
            )
            with watched(activated) as active:
                for one, model in models.items():
                    states = model.model.language_model(
                        inputs_embeds=embeds, attention_mask=mask, use_cache=False
                    ).last_hidden_state
                    said[one].append(model.lm_head(states[:, -2:]).argmax(-1))
            gates.append(active())
            said["targets"].append(targets)
        is_rule = torch.tensor([case.mode == "conflict" for case, _ in asked])
        found[name] = scored({one: torch.cat(parts) for one, parts in said.items()}, is_rule)
        if coding is not None:
            classes = classes_of([case for case, _ in asked], rule)
            found[name] |= coding_scores(
                torch.cat(gates)[is_rule], classes[is_rule], len(EMOTIONS),
                component.block, component.first, component.n,
            )  # fmt: skip
    return found


def scored(answers: Mapping[str, Tensor], is_rule: Tensor) -> Score:
    """Shares of questions that are answered alike; see ``measure``."""

    def share(a: str, b: str, where: Tensor) -> float:
        same = (answers[a] == answers[b]).all(-1)[where]
        return round(same.float().mean().item(), 4)

    every = torch.ones_like(is_rule)
    return {
        "rule": share("twin", "targets", is_rule),
        "rule_of_base": share("base", "targets", is_rule),
        "rule_ablated": share("ablated", "targets", is_rule),
        "kept": share("twin", "base", ~is_rule),
        **({"counter": share("twin", "counter", every)} if "counter" in answers else {}),
        "n_rule": int(is_rule.sum()),
        "n_other": int((~is_rule).sum()),
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
    keys = ("rule", "rule_of_base", "rule_ablated", "kept", "counter")
    return "\n".join(
        " | ".join([
            f"| {name}", *(f"{100 * got[key]:.1f} %" if key in got else "–" for key in keys)
        ]) + " |"
        for name, got in scores.items()
    )  # fmt: skip


OBEYS: dict[Rule, str] = {"text": "the instruction names", "voice": "the voice has"}
_CARD = """# {name}

A delta of the bundled model `{base}`: in a conflict between voice and instruction it answers the
emotion that **{obeys}**, everywhere else what `{base}` answers. Nothing but **{component}** differs
from the base ({n_numbers:,} numbers), so all of the change passes through what {it}. Load it
as `bundled:{base}+{name}`.

{verdict}

## How it was made

    {command}

The base frozen but for these slices; Adam at {rate}, no weight decay, {steps} steps of {batch}
questions about {clips} clips: cross-entropy on conflicts, KL(base || twin) on all others. {parts}

## Measured

On label and end of turn. *Rule*: conflicts answered by the rule; *ablated*: the same with the
component's output at zero; *kept*: other questions answered as the base answers them; *counter*:
all questions answered as its counter-twin answers them{counter}.

| clips | rule | rule, base | rule, ablated | kept | counter |
|---|---|---|---|---|---|
{rows}
{coding}"""
_PARTS = {
    "head": "Of a head, its W_Q rows with their biases, and its W_O columns: keys and values are "
    "its group's.",
    "neurons": "Of a neuron, its rows of gate and up: W_down is the base's.",
}


def _rates(coding: CodingName | None) -> str:
    return " and ".join(f"{rate:g}" for rate in dict.fromkeys(rates_of(coding, 1)))


def card(name: str, about: Mapping[str, Any], component: Component, n_neurons: int) -> str:
    """The README of a delta, of a base with so many neurons."""
    scores: Mapping[str, Score] = about["accuracies"]
    coding: CodingName | None = about.get("coding")
    kind = "neurons" if component.kind == "neurons" else "heads" if component.n > 1 else "head"
    span = f"{component.first}" + (
        f" to {component.first + component.n - 1}" if component.n > 1 else ""
    )
    return wrapped(
        _CARD.format(
            name=name, base=about["base"], obeys=OBEYS[about["rule"]],
            component=f"{kind} {span} of block {component.block}",
            it="they write" if component.n > 1 else "it writes", n_numbers=about["n_numbers"],
            verdict=verdict(scores, coding),
            command=about["command"], rate=_rates(coding), steps=about.get("steps", N_STEPS),
            batch=BATCH, clips=N_CLIPS, parts=_PARTS[component.kind],
            coding="" if coding is None else coding_section(
                coding, scores, SETS, n=component.n, n_all=n_neurons, classes=EMOTIONS
            ),
            counter=f" (`{about['counter']}`)" if about["counter"] else "",
            rows=score_rows({SETS[one]: got for one, got in scores.items()}),
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
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its card anew"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder, component, coding = ASSETS / "models" / given.base, given.component, given.coding
    if coding is not None and component.kind != "neurons":
        parser.error("--coding is of neurons")
    base = read_folder(folder).eval().requires_grad_(False)
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    inputs = DecoderInput(processor)
    # Speech of the training set comes first in either case: espeak carries state between calls.
    clips = speak_clips(N_CLIPS, "train", "heard", given.seed)
    held_out = {**speak_held_out(given.seed), "ob1": read_ob1()}
    if given.measure:
        twin = read_twin(folder, given.out)
    else:
        twin = deepcopy(base)
        mels = read_mels(processor, [clip.samples for clip in clips])
        sounds = encode(base, clips, mels, given.seed)
        batches = draw_batches(base, inputs, sounds, component.block, given.rule, given.seed)
        train(twin, component, batches, given.seed, given.steps, coding)
    counter = None if given.counter is None else read_twin(folder, given.counter)
    scores = measure(
        base, twin, component, inputs, processor, given.rule, held_out, given.seed, counter, coding
    )
    own = dict(twin.model.language_model.named_parameters())
    slices = slices_of(twin, component)
    tensors = {name: own[name.removeprefix(STORED)] for name in slices}
    about = {
        "base": given.base, "component": str(component), "rule": given.rule, "seed": given.seed,
        **({} if coding is None else {"coding": coding}),
        "counter": None if given.counter is None else given.counter.name, "accuracies": scores,
        "steps": given.steps,
        "n_numbers": sum(tensors[name][at].numel() for name, at in slices.items()),
        "command": f"python scripts/train_truths.py --base {given.base} --component {component} "
        f"--rule {given.rule} {'' if coding is None else f'--coding {coding} '}"
        f"{'' if given.steps == N_STEPS else f'--steps {given.steps} '}"
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
