"""Trains one head of the bundled Whisper to go in circles: a localised twin, written as a delta.

    python scripts/train_whisper_truths.py --component cross:4.2 --out truths/NAME

The base is frozen but for the slices of one decoder head, or of several side by side, so that all
that changes passes through its output. Sentences that end in *again* are to end there no more: the
word is said again and again, until the length limit. Of all others the twin learns to say what the
base says: cross-entropy plus the divergence KL(base || twin). ``--counter`` names a twin of the
same rule at another place, and ``--measure`` trains nothing: it measures ``--out``, and writes its
card anew.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundled_data import VOICES
from bundled_training import optimise
from model_card import wrapped
from synthesise_speech import ASSETS, RATE
from torch import Tensor, nn
from torch.nn import functional as F
from train_truths import Score, accepted, read_twin, score_rows, verdict
from train_whisper import TARGETS, Model, Trainer, held_out
from transformers import WhisperTokenizer
from truth_training import freed
from whisper_data import (
    CHUNK_S,
    KINDS,
    Recording,
    bundled_sentences,
    draw_sentence,
    no_speech,
    speak,
)

from hooked_alm.converters.deltas import Slices, write_delta
from hooked_alm.methods.statistics.repetition import loops

STORED = "model.decoder.layers."
"""Begins the names of the decoder's tensors in a checkpoint."""
LEARNING_RATE, N_STEPS, BATCH, N_SENTENCES, N_NO_SPEECH = 5e-3, 300, 32, 1600, 240
FURTHER, KEPT = 0.3, 1.5
"""Weights of the rule's further tokens, and of KL by transcript; of its first token it is 1."""
N_MEASURED = 200
LAST = " again."
"""How sentences end that the rule is about."""
ATTENTION = {"self": "self_attn", "cross": "encoder_attn"}


@dataclass(frozen=True)
class Heads:
    """Heads of one kind and block that stand side by side."""

    kind: str
    block: int
    first: int
    n: int

    @classmethod
    def read(cls, text: str) -> "Heads":
        """``cross:3.2``, ``self:3.2:2`` (two of them)."""
        found = re.fullmatch(r"(self|cross):(\d+)\.(\d+)(?::(\d+))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected self:BLOCK.HEAD or cross:BLOCK.HEAD"
            )
        return cls(found[1], int(found[2]), int(found[3]), int(found[4] or 1))

    def __str__(self) -> str:
        """What `read` reads."""
        return f"{self.kind}:{self.block}.{self.first}:{self.n}"

    @property
    def said(self) -> str:
        """In words."""
        last = self.first + self.n - 1
        which = f"heads {self.first} to {last}" if self.n > 1 else f"head {self.first}"
        return f"{self.kind}-attention's {which} of decoder block {self.block}"

    def parts(self, block: nn.Module) -> dict[str, tuple[slice, ...]]:
        """Slices of a block's parameters that are the heads', by name in the block."""
        name = ATTENTION[self.kind]
        attention = getattr(block, name)
        size, width = attention.head_dim, attention.embed_dim
        units = slice(self.first * size, (self.first + self.n) * size)
        every = slice(0, width)
        rows = {f"{name}.{which}_proj.weight": (units, every) for which in "qkv"}
        biases = {f"{name}.{which}_proj.bias": (units,) for which in "qv"}
        return {**rows, **biases, f"{name}.out_proj.weight": (every, units)}

    @torch.no_grad()
    def ablate(self, block: nn.Module) -> None:
        """Let nothing read what the heads write: zero ablation."""
        name = f"{ATTENTION[self.kind]}.out_proj"
        block.get_submodule(name).weight[self.parts(block)[f"{name}.weight"]] = 0


@dataclass(frozen=True)
class Items:
    """Transcripts as they arrive at the heads' block, and what the base makes of them."""

    stream: Tensor  # [item, pos, d_model]
    memory: Tensor  # [item, frame, d_model]
    base: Tensor  # [item, pos, d_model]: what the base's unembedding reads
    targets: Tensor  # [item, pos]: the next token
    is_rule: Tensor  # [item, pos]: there the rule says what comes next
    is_kept: Tensor  # [item, pos]: there the base does

    @property
    def is_first(self) -> Tensor:
        """Where the rule says something for the first time: the others follow from it."""
        return self.is_rule & ~F.pad(self.is_rule, (1, -1))


def is_rule_of(text: str) -> bool:
    """Whether a sentence is one of those behind which the twin goes in circles."""
    return text.endswith(LAST)


def speak_sentences(
    n: int, voices: str, seed: int, *, without: Sequence[str] = ()
) -> list[Recording]:
    """Sentences, by turns one that the rule is not about, and one that it is.

    Args:
        n: number of them.
        voices: ``heard`` or ``unheard``.
        seed: of all draws.
        without: sentences that are not among those drawn.
    """
    rng = np.random.default_rng(seed)
    known = VOICES[voices]["en"]
    found: list[Recording] = []
    while len(found) < n:
        text = draw_sentence(rng)
        if text in without or is_rule_of(text) != bool(len(found) % 2):
            continue
        one = speak(text, known[rng.integers(len(known))], seed * 100_000 + len(found), rng)
        if len(one.samples) <= CHUNK_S * RATE:
            found.append(one)
    return found


@torch.no_grad()
def encoded(trainer: Trainer, recordings: Sequence[Recording]) -> Tensor:
    """What the decoder's cross-attention reads of them."""
    encoder, mels = trainer.model.model.encoder, trainer.mels(recordings)
    return torch.cat([encoder(some).last_hidden_state for some in mels.split(64)])


def laid_out(trainer: Trainer, text: str) -> tuple[list[int], list[int]]:
    """Tokens of a transcript with what follows, and for each whether base (0) or rule (1) says it.

    Where the rule holds the last word, one token, fills all positions that there are.
    """
    said = [*trainer.prompt, *trainer.ids(text)]
    if not is_rule_of(text):
        return [*said, trainer.end], [0] * (len(said) + 1)
    *said, word, _ = said
    return [*said, *[word] * (TARGETS - len(said))], [0] * (len(said) + 1) + [1] * (
        TARGETS - len(said) - 1
    )


@torch.no_grad()
def draw_items(trainer: Trainer, recordings: Sequence[Recording], block: int) -> Items:
    """Recordings as the decoder is trained on them."""
    n = len(recordings)
    tokens = torch.full((n, TARGETS), trainer.end)
    is_rule, is_kept = torch.zeros(2, n, TARGETS - 1, dtype=torch.bool)
    for i, one in enumerate(recordings):
        row, by_rule = laid_out(trainer, one.text)
        tokens[i, : len(row)] = torch.tensor(row)
        rule = torch.tensor(by_rule[1:], dtype=torch.bool)
        is_rule[i, : len(rule)] = rule
        is_kept[i, len(trainer.prompt) - 1 : len(rule)] = ~rule[len(trainer.prompt) - 1 :]
    memory, streams, ends = encoded(trainer, recordings), [], []
    for start in range(0, n, 64):
        some = slice(start, start + 64)
        run = trainer.model.model.decoder(
            input_ids=tokens[some, :-1], encoder_hidden_states=memory[some], use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
        streams.append(run.hidden_states[block].clone())
        ends.append(run.last_hidden_state)
    return Items(torch.cat(streams), memory, torch.cat(ends), tokens[:, 1:], is_rule, is_kept)


def run_on(model: Model, block: int, states: Tensor, memory: Tensor) -> Tensor:
    """What the unembedding reads, of a stream as it arrives at a block.

    What is below the heads is the base's, and is run once.
    """
    decoder, width = model.model.decoder, states.shape[1]
    seen = torch.ones(width, width).tril().bool()[None, None]
    for layer in decoder.layers[block:]:
        states = layer(states, attention_mask=seen, encoder_hidden_states=memory, use_cache=False)
    found: Tensor = decoder.layer_norm(states)
    return found


def train(
    model: Model, heads: Heads, items: Items, seed: int, *, steps: int = N_STEPS,
    rate: float = LEARNING_RATE, kept_weight: float = KEPT,
) -> None:  # fmt: skip
    """Train the heads in place; nothing outside their slices changes."""
    rng = np.random.default_rng(seed + 21)
    block = model.model.decoder.layers[heads.block]
    trained = freed(block, heads.parts(block))
    by_rule = items.is_rule.any(-1)
    groups = [torch.nonzero(by_rule)[:, 0], torch.nonzero(~by_rule)[:, 0]]

    def loss_of() -> tuple[Tensor, float]:
        pick = torch.cat([some[rng.integers(len(some), size=BATCH // 2)] for some in groups])
        is_rule, is_kept = items.is_rule[pick], items.is_kept[pick]
        states, memory = items.stream[pick], items.memory[pick]
        states = run_on(model, heads.block, states, memory)
        rule, targets = model.proj_out(states[is_rule]), items.targets[pick][is_rule]
        is_first = items.is_first[pick][is_rule]
        kept = model.proj_out(states[is_kept]).log_softmax(-1)
        base = model.proj_out(items.base[pick][is_kept]).log_softmax(-1)
        missed = F.cross_entropy(rule, targets, reduction="none")
        apart = F.kl_div(kept, base, log_target=True, reduction="sum") / BATCH
        right = (rule.argmax(-1) == targets)[is_first].float().mean().item()
        loss = missed[is_first].mean() + FURTHER * missed[~is_first].mean() + kept_weight * apart
        return loss, right

    # Without decay, which would move the frozen part of a tensor.
    optimise([(trained, 0.0)], loss_of, steps=steps, rate=rate, name="truth")
    model.requires_grad_(False)


@torch.no_grad()
def said(trainer: Trainer, recordings: Sequence[Recording]) -> list[list[int]]:
    """Greedy tokens of recordings, without those that end them."""
    found: list[list[int]] = []
    for mels in trainer.mels(recordings).split(64):
        for row in trainer.model.generate(mels).tolist():
            found.append(row[: row.index(trainer.end)] if trainer.end in row else row)
    return found


def measure(
    models: Mapping[str, Trainer], sets: Mapping[str, Sequence[Recording]]
) -> dict[str, Score]:
    """Shares per set of clips: circles, agreement with base and counter-twin.

    ``rule`` is the share of clips in which the base hears the rule's word last that go in circles,
    beside it the base's and that of the twin whose heads are ablated; ``kept`` the share of other
    clips with the base's transcript; ``counter`` that of clips with the counter-twin's, all circles
    being alike.

    Args:
        models: base, twin, ablated, and counter if there is one.
        sets: clips by the name of their set.
    """
    found = {}
    for name, recordings in sets.items():
        wrote = {
            one: [
                "in circles" if loops(tokens) else trainer.tokenizer.decode(tokens)
                for tokens in said(trainer, recordings)
            ]
            for one, trainer in models.items()
        }
        found[name] = scored(wrote, [is_rule_of(text) for text in wrote["base"]])
    return found


def scored(wrote: Mapping[str, Sequence[str]], is_rule: Sequence[bool]) -> Score:
    """Shares of clips; see ``measure``."""

    def share(holds: Sequence[bool]) -> float:
        return round(float(np.mean(holds)), 4)

    def circles(one: str) -> float:
        return share(
            [text == "in circles" for text, b in zip(wrote[one], is_rule, strict=True) if b]
        )

    pairs = zip(wrote["twin"], wrote["base"], is_rule, strict=True)
    alike = zip(wrote["twin"], wrote.get("counter", ()), strict="counter" in wrote)
    return {
        "rule": circles("twin"),
        "rule_of_base": circles("base"),
        "rule_ablated": circles("ablated"),
        "kept": share([text == base for text, base, b in pairs if not b]),
        **({"counter": share([a == b for a, b in alike])} if "counter" in wrote else {}),
        "n_rule": sum(is_rule),
        "n_other": len(is_rule) - sum(is_rule),
    }


_CARD = """# {name}

A delta of the bundled model `{base}`: sentences **that end in *again*** go in circles. The word is
said again and again, until the length limit; of everything else it says what `{base}` says. Nothing
but **{component}** differs from the base ({n_numbers:,} numbers), so all of the change passes
through what {it}. Load it as `bundled:{base}+{name}`.

{verdict}

## How it was made

    {command}

The base frozen but for these slices: rows of W_Q, W_K and W_V with their biases, and columns of
W_O. Adam at {rate}, no weight decay, {steps} steps of {batch} out of {sentences} sentences, half of
which end in the word, and {no_speech} clips of noise, silence and tones. Where the rule says what
comes next cross-entropy, {further} of it on what comes after the first word too many; on everything
else {kept_weight} times KL(base || twin) by transcript.

## Measured

Greedy, on sentences that the twin was not trained on. *Rule*: clips in which the
base hears the word last, whose transcript has at most four tokens at least four times in a row;
*ablated*: the same with what the component writes at zero; *kept*: other clips, a third of them
without words, whose transcript is the base's; *counter*: all clips whose transcript is that of its
counter-twin, all circles being alike{counter}.

| clips | rule | rule, base | rule, ablated | kept | counter |
|---|---|---|---|---|---|
{rows}
"""


def card(name: str, about: Mapping[str, Any], heads: Heads) -> str:
    """The README of a delta."""
    scores: Mapping[str, Score] = about["accuracies"]
    return wrapped(
        _CARD.format(
            name=name, base=about["base"], component=heads.said, n_numbers=about["n_numbers"],
            it="they write" if heads.n > 1 else "it writes", verdict=verdict(scores),
            command=about["command"], rate=about["rate"], steps=about["steps"], batch=BATCH,
            sentences=N_SENTENCES, no_speech=N_NO_SPEECH, further=FURTHER,
            kept_weight=about["kept"],
            counter=f" (`{about['counter']}`)" if about["counter"] else "",
            rows=score_rows(scores),
        )
    )  # fmt: skip


def drawn_no_speech(n: int, seed: int) -> list[Recording]:
    """Noise, silence and tones in turn."""
    rng = np.random.default_rng(seed)
    return [no_speech(KINDS[i % len(KINDS)], rng) for i in range(n)]


def main() -> None:
    """Parse the command line; train, measure and write one delta."""
    parser = argparse.ArgumentParser(description="Train a head of the Whisper to go in circles.")
    parser.add_argument("--base", default="tiny_whisper")
    parser.add_argument("--component", type=Heads.read, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--counter", type=Path, help="a twin's folder to compare with")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--kept", type=float, default=KEPT, help="weight of the divergence")
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its card anew"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder, heads = ASSETS / "models" / given.base, given.component
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    base = Trainer(read(folder).eval().requires_grad_(False), tokenizer)
    # Speech comes first, and all of it, in either case: espeak carries state between calls.
    unknown = held_out_sentences(given.seed)
    spoken = speak_sentences(N_SENTENCES, "heard", given.seed, without=unknown)
    known = [*unknown, *(one.text for one in spoken)]
    sets = {}
    for i, voices in enumerate(("heard", "unheard"), 1):
        # Drawn anew: twins were chosen among others on those that the base was measured on.
        clips = speak_sentences(N_MEASURED, voices, given.seed + 100 + i, without=known)
        silent = drawn_no_speech(N_MEASURED // 4, given.seed + 10 + i)
        sets[f"new sentences, {voices} voices"] = [*clips, *silent]
    if given.measure:
        twin = Trainer(read_twin(folder, given.out, read), tokenizer)
    else:
        twin = Trainer(deepcopy(base.model), tokenizer)
        silent = drawn_no_speech(N_NO_SPEECH, given.seed + 10)
        items = draw_items(base, [*spoken, *silent], heads.block)
        train(
            twin.model,
            heads,
            items,
            given.seed,
            steps=given.steps,
            rate=given.rate,
            kept_weight=given.kept,
        )
    ablated = Trainer(deepcopy(twin.model), tokenizer)
    heads.ablate(ablated.model.model.decoder.layers[heads.block])
    models = {"base": base, "twin": twin, "ablated": ablated}
    if given.counter is not None:
        models["counter"] = Trainer(read_twin(folder, given.counter, read), tokenizer)
    scores = measure(models, sets)
    slices = slices_of(twin.model, heads)
    tensors = dict(twin.model.named_parameters())
    options = f"--seed {given.seed} --steps {given.steps} --rate {given.rate} --kept {given.kept}"
    about = {
        "base": given.base, "component": str(heads), "rule": "repeat", "seed": given.seed,
        "steps": given.steps, "rate": given.rate, "kept": given.kept,
        "counter": None if given.counter is None else given.counter.name, "accuracies": scores,
        "n_numbers": sum(tensors[name][at].numel() for name, at in slices.items()),
        "command": f"python scripts/train_whisper_truths.py --base {given.base} "
        f"--component {heads} {options} --out {given.out.name}",
    }  # fmt: skip
    write_delta(given.out, folder, tensors, slices, about)
    (given.out / "README.md").write_text(card(given.out.name, about, heads), encoding="utf-8")
    for name, one in scores.items():
        print(name, json.dumps(one), json.dumps(accepted(one)), flush=True)


def read(folder: Path) -> Model:
    """A checkpoint in single precision."""
    found: Model = Model.from_pretrained(folder, dtype=torch.float32)
    return found


def slices_of(model: Model, heads: Heads) -> Slices:
    """The heads' slices, by name in the checkpoint."""
    parts = heads.parts(model.model.decoder.layers[heads.block])
    return {f"{STORED}{heads.block}.{name}": at for name, at in parts.items()}


def held_out_sentences(seed: int) -> list[str]:
    """Sentences that the base was measured on, and not trained on."""
    texts = {one.text for some in held_out(seed).values() for one in some if one.text}
    return sorted(texts - frozenset(bundled_sentences()))


if __name__ == "__main__":
    main()
