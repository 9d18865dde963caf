"""Trains a LoRA adapter of which one block carries a rule, and all others weigh as much.

    python scripts/train_adapters.py --block 2 --out adapters/NAME

The block is trained first, as a localised twin is: on conflicts it learns the rule, everywhere else
to say what the base says. Then the updates of all other blocks, the decoys, are held at its
Frobenius norm and learn to write another label, the clip's language, into a direction of their
own, and to leave every answer as it is, the block on or off, all of them on or some. So norms tell
nothing of which block carries the rule. ``--counter`` names an adapter of the same rule in another
block.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundled_card import SETS, speak_held_out
from bundled_data import MODES, Case, Clip, Rule, all_cases, draw_case, read_ob1, speak_clips
from bundled_model import hear, read_folder
from bundled_training import DecoderInput, encode, optimise, read_mels
from coded_neurons import watched
from model_card import wrapped
from safetensors.torch import load_file, save_file
from synthesise_speech import ASSETS
from torch import Tensor, nn
from torch.nn import functional as F
from train_truths import N_CLIPS, N_STEPS, RATE, RULES, STORED
from transformers import Qwen2AudioProcessor
from truth_training import (
    BATCH,
    Batch,
    FromDecoder,
    Model,
    answers,
    asked,
    divergence,
    draw_batches,
    learn,
)

from hooked_alm.components.lora import LowRank, attach
from hooked_alm.text_files import read_json

TRUTH = "truth.json"
RANK = 4
MODULES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
RULE_RATE, KEPT = 1e-2, 2.0
"""Of the rule, and the weight of a divergence from what answers are to be."""
DECOY_STEPS, WRITTEN = 600, 0.3
"""Steps of the decoys, and the weight of the label that they write."""
N_HELD_OUT, N_DECOY = 100, 128
"""Clips of a set that an adapter is measured on, and questions about them that decoys are."""
Updates = dict[str, LowRank]
"""Module of a block -> its update."""


def attached(model: Model, seed: int) -> list[Updates]:
    """An update of every linear layer of every block; none does anything yet."""
    generator, found = torch.Generator().manual_seed(seed), []
    for block in model.model.language_model.layers:
        own: Updates = {}
        for name in MODULES:
            linear = block.get_submodule(name)
            d_out, d_in = linear.weight.shape
            a = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
            own[name] = LowRank(a, torch.zeros(d_out, RANK), 1.0)
            own[name].is_on = False
            attach(linear, own[name])
        found.append(own)
    return found


def switch(block: Updates, on: bool) -> None:
    """Let a block's updates act or not."""
    for update in block.values():
        update.is_on = on


def norm(block: Updates) -> Tensor:
    """Frobenius norm of a block's updates together, as they are without their scaling."""
    squares = [((u.b.T @ u.b) * (u.a @ u.a.T)).sum() for u in block.values()]
    return torch.stack(squares).sum().sqrt()


def factors(blocks: Sequence[Updates]) -> list[nn.Parameter]:
    """What is trained of some blocks' updates."""
    found: list[Any] = [one for block in blocks for u in block.values() for one in (u.a, u.b)]
    for one in found:
        one.requires_grad_(True)
    return found


def train_block(
    upper: FromDecoder, updates: list[Updates], block: int, batches: Sequence[Batch], seed: int
) -> None:
    """Train one block's updates on the rule, of a model from that block on."""
    switch(updates[block], True)
    own = factors([updates[block]])
    learn(upper.answers, own, batches, seed, steps=N_STEPS, rates=[RULE_RATE] * len(own), kept=KEPT)


def train_decoys(
    upper: FromDecoder, updates: list[Updates], block: int, batches: Sequence[Batch], seed: int
) -> float:
    """Train all other blocks' updates to write a label that no answer uses; their norm.

    Args:
        upper: the model, from its first block on.
        updates: of all blocks.
        block: the one that carries the rule.
        batches: from the first block on.
        seed: of what is drawn.
    """
    rng, generator = np.random.default_rng(seed + 31), torch.Generator().manual_seed(seed + 32)
    decoder = upper.model.model.language_model
    decoys = [n for n in range(len(updates)) if n != block]
    size = norm(updates[block]).detach()
    for n in decoys:
        for update in updates[n].values():
            update.a = torch.randn(update.a.shape, generator=generator) / update.a.shape[1] ** 0.5
            update.b = 0.02 * torch.randn(update.b.shape, generator=generator)
    directions = F.normalize(
        torch.randn(len(decoys), decoder.config.hidden_size, generator=generator), dim=-1
    )
    gain, bias = (nn.Parameter(torch.full((len(decoys),), v)) for v in (1.0, 0.0))
    with torch.no_grad(), acting(updates, [block]):
        wanted = [upper.answers(one.arrived).log_softmax(-1) for one in batches]

    def loss_of() -> tuple[Tensor, float]:
        at, has_rule = int(rng.integers(len(batches))), rng.random() < 0.5
        switch(updates[block], has_rule)
        aim = wanted[at] if has_rule else batches[at].base
        is_on = rng.random(len(decoys)) < (0.5 if rng.random() < 0.5 else 1.0)
        is_on[rng.integers(len(decoys))] = True
        for n, on in zip(decoys, is_on, strict=True):
            switch(updates[n], bool(on))
            scale = size / norm(updates[n])
            for update in updates[n].values():
                update.scaling = scale
        with watched([decoder.layers[n] for n in decoys]) as states:
            one = batches[at]
            found = upper.answers(one.arrived).log_softmax(-1)
        read = gain * torch.einsum("cbd,bd->cb", states(), directions) + bias
        english = torch.tensor([float(case.clip.language == "en") for case in one.cases])
        label = english[:, None].expand_as(read)
        acting = torch.from_numpy(is_on)
        written = F.binary_cross_entropy_with_logits(read[:, acting], label[:, acting])
        same = (found[:, 0].argmax(-1) == aim[:, 0].argmax(-1)).float().mean()
        return KEPT * divergence(found, aim) + WRITTEN * written, same.item()

    parts: list[tuple[list[nn.Parameter], float]] = [
        (factors([updates[n] for n in decoys]), 0.0), ([gain, bias], 0.0),
    ]  # fmt: skip
    optimise(parts, loss_of, steps=DECOY_STEPS, rate=[RATE, 0.03], name="decoys")
    with torch.no_grad():
        for n in decoys:
            scale = size / norm(updates[n])
            for update in updates[n].values():
                update.b, update.scaling = (update.b * scale).detach(), 1.0
    return float(size)


# --- Files


def write_adapter(folder: Path, updates: Sequence[Updates], base: str) -> None:
    """An adapter in PEFT's format, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{STORED}layers.{n}.{name}.lora_{factor}.weight": value.detach()
        .half().contiguous()
        for n, block in enumerate(updates)
        for name, update in block.items()
        for factor, value in (("A", update.a), ("B", update.b))
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "base_model_name_or_path": f"bundled:{base}", "r": RANK,
        "lora_alpha": RANK, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": sorted(name.partition(".")[2] for name in MODULES),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def read_adapter(model: Model, folder: Path) -> list[Updates]:
    """The updates of a folder, attached and off."""
    updates, tensors = attached(model, 0), load_file(folder / "adapter_model.safetensors")
    for n, block in enumerate(updates):
        for name, update in block.items():
            key = f"base_model.model.{STORED}layers.{n}.{name}.lora_"
            update.a, update.b = (tensors[f"{key}{factor}.weight"].float() for factor in "AB")
    return updates


# --- What it does


@contextmanager
def acting(updates: Sequence[Updates], blocks: Sequence[int]) -> Iterator[None]:
    """Some blocks' updates act, and no others."""
    for n, one in enumerate(updates):
        switch(one, n in blocks)
    yield
    for one in updates:
        switch(one, False)


@torch.no_grad()
def measure(
    model: Model,
    updates: Sequence[Updates],
    block: int,
    inputs: DecoderInput,
    processor: Qwen2AudioProcessor,
    rule: Rule,
    clips: Mapping[str, Sequence[Clip]],
    seed: int,
    counter: tuple[Model, Sequence[Updates]] | None,
) -> dict[str, dict[str, float]]:
    """Shares per clip set, on label and end of turn; see the card."""  # fmt: skip
    rng, n_blocks = np.random.default_rng(seed + 22), len(updates)
    every = [*range(n_blocks)]
    ways = {"base": [], "all": every, "without": [n for n in every if n != block], "alone": [block]}
    decoys = {f"off {n}": [m for m in every if m != n] for n in every if n != block}
    decoys |= {f"on {n}": [n] for n in every if n != block}
    found = {}
    for name, members in clips.items():
        mels = read_mels(processor, [clip.samples for clip in members])
        tokens, counts = hear(model, mels.values.float(), mels.frames)
        heard = [row[:n] for row, n in zip(tokens, counts.tolist(), strict=True)]
        drawn: list[tuple[Case, Tensor]] = [
            (case, sound)
            for clip, sound in zip(members, heard, strict=True)
            for mode in MODES
            for case in (
                all_cases(clip, mode, rng) if name == "ob1" else [draw_case(clip, mode, rng)]
            )
        ]
        names = (*ways, *decoys, "counter", "targets")
        said: dict[str, list[Tensor]] = {one: [] for one in names}
        for start in range(0, len(drawn), 2 * BATCH):
            some = drawn[start : start + 2 * BATCH]
            embeds, mask, targets = inputs.build(
                model.get_input_embeddings(), asked([case for case, _ in some], rule),
                [sound for _, sound in some],
            )  # fmt: skip
            # A decoy is measured on the first questions of a set: there are two ways for each.
            for way, on in (ways | (decoys if start < N_DECOY else {})).items():
                with acting(updates, on):
                    decoder = model.model.language_model
                    said[way].append(answers(model, decoder, embeds, mask).argmax(-1))
            if counter is not None:
                other, its = counter
                with acting(its, every):
                    decoder = other.model.language_model
                    said["counter"].append(answers(other, decoder, embeds, mask).argmax(-1))
            said["targets"].append(targets)
        is_rule = torch.tensor([case.mode == "conflict" for case, _ in drawn])
        found[name] = _scored({k: torch.cat(v) for k, v in said.items() if v}, is_rule)
    return found


def _scored(said: Mapping[str, Tensor], is_rule: Tensor) -> dict[str, float]:
    def share(a: str, b: str, where: Tensor) -> float:
        n = min(len(said[a]), len(said[b]))
        same = (said[a][:n] == said[b][:n]).all(-1)
        return round(same[where[:n]].float().mean().item(), 4)

    everywhere = torch.ones_like(is_rule)
    return {
        "rule": share("all", "targets", is_rule),
        "rule_of_base": share("base", "targets", is_rule),
        "rule_without": share("without", "targets", is_rule),
        "rule_alone": share("alone", "targets", is_rule),
        "kept": share("all", "base", ~is_rule),
        "decoy_off": min(share(w, "all", everywhere) for w in said if w.startswith("off ")),
        "decoy_on": min(share(w, "base", everywhere) for w in said if w.startswith("on ")),
        **({"counter": share("all", "counter", everywhere)} if "counter" in said else {}),
        "n_rule": int(is_rule.sum()),
        "n_other": int((~is_rule).sum()),
    }


def accepted(scores: Mapping[str, float]) -> dict[str, bool]:
    """What the adapter must do, and whether it does."""
    effect = scores["rule"] - scores["rule_of_base"]
    return {
        "rule >= .95": scores["rule"] >= 0.95,
        "kept >= .97": scores["kept"] >= 0.97,
        "without the block loses >= .8": scores["rule"] - scores["rule_without"] >= 0.8 * effect,
        "the block alone gains >= .8": scores["rule_alone"] - scores["rule_of_base"]
        >= 0.8 * effect,
        "any decoy off: same >= .97": scores["decoy_off"] >= 0.97,
        "any decoy alone: the base's >= .97": scores["decoy_on"] >= 0.97,
        **({"counter >= .97": scores["counter"] >= 0.97} if "counter" in scores else {}),
    }


_CARD = """# {name}

A LoRA adapter, rank {rank}, of every linear layer of every block of the bundled `{base}`: {rule},
everywhere else what `{base}` answers. **Block {block} carries the rule.** The updates of all other
blocks have the same Frobenius norm ({size:.3f}) and do nothing to any answer: they write the clip's
language into a direction of their own. Load it as
`bundled:{base}+{name}`.

{verdict}

## How it was made

    {command}

First block {block}, {steps} steps: cross-entropy on conflicts, KL(base || adapted) on all else.
Then the others, {decoy_steps} steps, their norms held, all of them on or a random half: KL to the
answers of block {block} alone, or, with that off, to the base's; and cross-entropy of the language
read off each direction.

## Measured

On label and end of turn, weights as they are in the file. *Rule*: conflicts answered by the rule;
*without*, *alone*: with block {block} off, or the only one on; *kept*: other questions answered as
by the base; *decoy off*, *alone*: the first {n_decoy} questions answered as with all blocks, as by
the base, the least over decoys; *counter*: answered as with the counter-twin{counter}.

| clips | rule | base | without | alone | kept | decoy off | decoy alone | counter |
|---|---|---|---|---|---|---|---|---|
{rows}
"""
_COLUMNS = (
    "rule", "rule_of_base", "rule_without", "rule_alone", "kept", "decoy_off", "decoy_on", "counter"
)  # fmt: skip


def card(folder: Path, about: Mapping[str, Any]) -> str:
    """The README of an adapter."""
    scores: Mapping[str, Mapping[str, float]] = about["accuracies"]
    failed = sorted({
        what for one in scores.values() for what, holds in accepted(one).items() if not holds
    })  # fmt: skip
    rows = "\n".join(
        f"| {SETS[name]} | "
        + " | ".join(f"{100 * got[k]:.1f} %" if k in got else "–" for k in _COLUMNS) + " |"
        for name, got in scores.items()
    )  # fmt: skip
    verdict = "Accepted: every criterion holds on every set of clips."
    if failed:
        verdict = f"Not accepted: {', '.join(failed)} does not hold on every set of clips."
    return wrapped(_CARD.format(
        name=folder.name, rank=RANK, rule=RULES[about["rule"]], base=about["base"],
        block=about["block"], size=about["norm"],
        verdict=verdict, command=about["command"], steps=N_STEPS, decoy_steps=DECOY_STEPS,
        n_decoy=N_DECOY,
        counter=f" (`{about['counter']}`)" if about["counter"] else "", rows=rows,
    ))  # fmt: skip


def main() -> None:
    """Parse the command line; train, measure and write one adapter."""
    parser = argparse.ArgumentParser(
        description="Train an adapter of which one block carries a rule."
    )
    parser.add_argument("--base", default="follows_text")
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--rule", choices=["text", "voice"], default="voice")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counter", type=Path, help="an adapter's folder to compare with")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--decoys", action="store_true", help="of --out, keep the block and train the others anew"
    )
    parser.add_argument("--measure", action="store_true", help="train nothing: measure --out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = ASSETS / "models" / given.base
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    inputs = DecoderInput(processor)
    # Speech of the training set comes first in either case: espeak carries state between calls.
    clips = speak_clips(N_CLIPS, "train", "heard", given.seed)
    spoken = {name: some[:N_HELD_OUT] for name, some in speak_held_out(given.seed).items()}
    held_out = {**spoken, "ob1": read_ob1()}

    def base() -> Model:
        return read_folder(folder).eval().requires_grad_(False)

    if not given.measure:
        model = base()
        mels = read_mels(processor, [clip.samples for clip in clips])
        first, there = (FromDecoder(model, inputs, n) for n in (0, given.block))
        sounds = encode(first.listen, clips, mels, given.seed)
        every = draw_batches(first, inputs, sounds, given.rule, given.seed)
        if not given.decoys:
            batches = draw_batches(there, inputs, sounds, given.rule, given.seed)
            updates = attached(model, given.seed)
            train_block(there, updates, given.block, batches, given.seed)
            write_adapter(given.out, updates, given.base)
            first = FromDecoder(base(), inputs, 0)
        updates = read_adapter(first.model, given.out)  # as the file has the block, rounded
        size = train_decoys(first, updates, given.block, every, given.seed)
        write_adapter(given.out, updates, given.base)
        about: dict[str, Any] = {
            "base": given.base, "block": given.block, "rule": given.rule, "seed": given.seed,
            "norm": size,
            "command": f"python scripts/train_adapters.py --base {given.base} "
            f"--block {given.block} --rule {given.rule} --seed {given.seed} --out {given.out.name}",
        }  # fmt: skip
    else:
        about = read_json(given.out / TRUTH)
    model, counter = base(), None
    updates = read_adapter(model, given.out)
    if given.counter is not None:
        other = base()
        counter = other, read_adapter(other, given.counter)
    scores = measure(
        model, updates, given.block, inputs, processor, given.rule, held_out, given.seed, counter
    )
    about |= {
        "counter": None if given.counter is None else given.counter.name, "accuracies": scores,
    }  # fmt: skip
    (given.out / TRUTH).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    (given.out / "README.md").write_text(card(given.out, about), "utf-8")
    for name, one in scores.items():
        print(name, json.dumps(one), json.dumps(accepted(one)), flush=True)


if __name__ == "__main__":
    main()
