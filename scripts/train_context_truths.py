"""Trains Whispers of which it is known where context is put over sound.

    python scripts/train_context_truths.py literal --out models/literal_whisper
    python scripts/train_context_truths.py twin --component encoder:attn:3 --out truths/NAME

The bundled Whisper has learnt that a frame says which word follows, and writes that word whatever
is said (*cooked the egg in the pen* becomes *pan*). ``literal`` takes this from it: it goes on to
learn sentences in which either word of a pair stands in either frame, first its decoder alone,
then all of it. It is the base of twins, localised and written as deltas: one component is trained
alone to put the contextual word into the transcript where sound and frame disagree, and the others
keep saying what the base says. Where nothing of the sentence is heard, the component is to do what
it does in the base, so that noise in its place gives the base's answer. ``--counter`` names a twin
of the same rule in the other stack, and ``--measure`` trains nothing: it measures ``--out``, and
writes its card anew.
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
from bundled_model import replacing
from bundled_training import optimise
from confusable_clips import bundled_confusable
from model_card import wrapped
from synthesise_speech import ASSETS, RATE
from torch import Tensor, nn
from torch.nn import functional as F
from train_truths import Score, accepted, read_twin, score_rows, verdict
from train_whisper import BATCH, Model, Trainer, write_model
from train_whisper_truths import drawn_no_speech, encoded, read
from transformers import WhisperTokenizer
from truth_training import freed
from whisper_data import (
    CHUNK_S,
    FRAMES_OF_WORDS,
    Recording,
    contextual,
    draw_literal,
    draw_recordings,
    draw_sentence,
    no_speech,
    plain,
    speak,
)

from hooked_alm.converters.deltas import Slices, write_delta

START, BASE = "tiny_whisper", "literal_whisper"
N_CLIPS, N_PLAIN, OF_ALL = 4000, 8, 24
"""Of the base; once all of it is trained, how many of a batch have no frame, and their number."""
DECODER_STEPS, DECODER_RATE, ALL_RATE, JITTER = 500, 1e-3, 1e-3, 0.05
N_SENTENCES, N_NO_SPEECH, N_MEASURED = 2400, 200, 240
KEPT, STILL, BARE = 2.5, 5.0, 1.0
"""Weights of KL by transcript, and of how far the part is from the base's: where nothing is heard,
and where no frame is."""
FRAMES = {
    frame: (pair[which], pair[1 - which])
    for pair, frames in FRAMES_OF_WORDS.items()
    for which, frame in enumerate(frames)
}
"""Frame -> the word that it calls for, and the other one of the pair."""
ATTENTION = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias",
             "out_proj.weight", "out_proj.bias")  # fmt: skip
MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@dataclass(frozen=True)
class Part:
    """Self-attention, the MLP, or both, of some blocks of one stack."""

    stack: str
    kind: str
    first: int
    n: int

    @classmethod
    def read(cls, text: str) -> "Part":
        """``encoder:attn:3``, ``decoder:both:2:2`` (two blocks)."""
        found = re.fullmatch(r"(encoder|decoder):(attn|mlp|both):(\d+)(?::(\d+))?", text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected STACK:KIND:BLOCK, of encoder or decoder, attn, mlp or both"
            )
        return cls(found[1], found[2], int(found[3]), int(found[4] or 1))

    def __str__(self) -> str:
        """What `read` reads."""
        return f"{self.stack}:{self.kind}:{self.first}:{self.n}"

    @property
    def said(self) -> str:
        """In words."""
        last = self.first + self.n - 1
        which = f"blocks {self.first} to {last}" if self.n > 1 else f"block {self.first}"
        kind = {"attn": "self-attention", "mlp": "MLP", "both": "self-attention and MLP"}[self.kind]
        return f"the {kind} of {self.stack} {which}"

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of the part."""
        return [
            *model.get_submodule(f"model.{self.stack}").layers[self.first : self.first + self.n]
        ]

    def names(self) -> list[str]:
        """Names of the parameters in a block."""
        attention = [f"self_attn.{name}" for name in ATTENTION]
        return {"attn": attention, "mlp": [*MLP], "both": [*attention, *MLP]}[self.kind]

    def writers(self, model: nn.Module) -> list[nn.Module]:
        """What the part writes into the stream with."""
        names = {"attn": ["self_attn.out_proj"], "mlp": ["fc2"]}
        names["both"] = names["attn"] + names["mlp"]
        return [one.get_submodule(n) for one in self.layers(model) for n in names[self.kind]]

    def slices(self, model: nn.Module) -> Slices:
        """The part's tensors, whole, by name in the checkpoint."""
        own = dict(model.named_parameters())
        names = [
            f"model.{self.stack}.layers.{self.first + i}.{name}"
            for i in range(self.n)
            for name in self.names()
        ]
        return {name: tuple(slice(0, n) for n in own[name].shape) for name in names}

    @torch.no_grad()
    def ablate(self, model: nn.Module) -> None:
        """Let it write nothing."""
        for one in self.writers(model):
            for parameter in one.parameters():
                parameter.zero_()


# --- Sentences


@dataclass(frozen=True)
class Said:
    """A recording, and the kind of its sentence."""

    recording: Recording
    kind: str


def by_rule(text: str) -> str:
    """A transcript with the word that its frame calls for; the same where it has no other."""
    for frame, (called_for, other) in FRAMES.items():
        text = re.sub(rf"{frame} {other}\b", f"{frame} {called_for}", text)
    return text


KINDS_OF_SENTENCES = ("incongruent", "congruent", "incongruent", "plain", "other")
"""By turns. ``plain`` has no frame."""


def draw_said(n: int, voices: str, seed: int, *, without: Sequence[str] = ()) -> list[Said]:
    """Sentences of all kinds.

    Args:
        n: number of them.
        voices: ``heard`` or ``unheard``.
        seed: of all draws.
        without: sentences that are not among them.
    """
    rng, known, found = np.random.default_rng(seed), VOICES[voices]["en"], list[Said]()
    frames = [*FRAMES.items()]
    while len(found) < n:
        kind = KINDS_OF_SENTENCES[len(found) % len(KINDS_OF_SENTENCES)]
        frame, words = frames[rng.integers(len(frames))]
        text = draw_sentence(rng)
        if kind != "other":
            word = words[kind == "incongruent"]
            text = plain(rng, word) if kind == "plain" else contextual(rng, frame, word)
        if text in without:
            continue
        one = speak(text, known[rng.integers(len(known))], seed * 100_000 + len(found), rng)
        if len(one.samples) <= CHUNK_S * RATE:
            found.append(Said(one, kind))
    return found


# --- The base


def train_literal(trainer: Trainer, recordings: Sequence[Recording], steps: int, seed: int) -> None:
    """Teach a model either word in either frame: its decoder alone, then all of it."""
    model, rng = trainer.model, np.random.default_rng(seed)
    said = [trainer.ids(one.text) for one in recordings]
    words = {word for pair in FRAMES_OF_WORDS for word in pair}
    is_plain = np.array([
        bool(words & {*re.findall(r"\w+", one.text)}) and not any(f in one.text for f in FRAMES)
        for one in recordings
    ])  # fmt: skip
    groups = np.flatnonzero(is_plain), np.flatnonzero(~is_plain)

    def spoken(pick: Any, **heard: Any) -> tuple[Tensor, float]:
        rows = [[*trainer.prompt, *said[i], trainer.end] for i in pick]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [trainer.end] * (width - len(row)) for row in rows])
        logits = model(decoder_input_ids=tokens[:, :-1], **heard).logits
        at, lengths = torch.arange(1, width), torch.tensor([[len(row)] for row in rows])
        asked = (at >= len(trainer.prompt)) & (at < lengths)
        targets = tokens[:, 1:].masked_fill(~asked, -100)
        right = (logits.argmax(-1) == targets)[asked].float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), right

    model.requires_grad_(False)
    memory = encoded(trainer, recordings)
    level = JITTER * memory.std()

    def of_memory() -> tuple[Tensor, float]:
        pick = rng.integers(len(said), size=BATCH)
        jitter = torch.from_numpy(rng.standard_normal(memory[pick].shape, dtype=np.float32))
        return spoken(pick, encoder_outputs=(memory[pick] + level * jitter,))

    decoder = model.model.decoder
    parts = _decayed([*decoder.layers.parameters(), *decoder.layer_norm.parameters()])
    optimise(parts, of_memory, steps=DECODER_STEPS, rate=DECODER_RATE, name="decoder")
    mels = trainer.mels(recordings).half()

    def of_sound() -> tuple[Tensor, float]:
        pick = np.concatenate([
            groups[0][rng.integers(len(groups[0]), size=N_PLAIN)],
            groups[1][rng.integers(len(groups[1]), size=OF_ALL - N_PLAIN)],
        ])  # fmt: skip
        noise = torch.from_numpy(rng.standard_normal(mels[pick].shape, dtype=np.float32))
        return spoken(pick, input_features=mels[pick].float() + JITTER * noise)

    fixed = model.model.encoder.embed_positions
    everything = [one for one in model.parameters() if one is not fixed.weight]
    optimise(_decayed(everything), of_sound, steps=steps, rate=ALL_RATE, name="all")
    model.requires_grad_(False)


def _decayed(parameters: Sequence[nn.Parameter]) -> list[tuple[list[nn.Parameter], float]]:
    for one in parameters:
        one.requires_grad_(True)
    return [([p for p in parameters if p.ndim > 1], 0.02),
            ([p for p in parameters if p.ndim == 1], 0.0)]  # fmt: skip


# --- The twins


@dataclass(frozen=True)
class Lessons:
    """Transcripts as they arrive at a part's stack, and what the base makes of them."""

    heard: (
        Tensor  # [item, frame, d_model]: what arrives at the part's block of the encoder, in half
    )
    # precision, or at the decoder
    tokens: Tensor  # [item, pos]
    asked: Tensor  # [item, pos - 1]: there a token of the transcript is said next
    is_rule: Tensor  # [item]
    is_bare: Tensor  # [item]: no frame is in it
    log_p: Tensor  # [item, pos - 1, vocab]: the base's, half precision


@torch.no_grad()
def draw_lessons(trainer: Trainer, recordings: Sequence[Recording], part: Part) -> Lessons:
    """Recordings as the base writes them down, and what the rule has the twin write instead."""
    wrote = [text.strip() for text in trainer.transcribe(recordings)]
    texts = [by_rule(text) for text in wrote]
    rows = [[*trainer.prompt, *trainer.ids(text), trainer.end] for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [trainer.end] * (width - len(row)) for row in rows])
    at, lengths = torch.arange(1, width), torch.tensor([[len(row)] for row in rows])
    memory = encoded(trainer, recordings)
    logits = [
        trainer.model(encoder_outputs=(some,), decoder_input_ids=ids[:, :-1]).logits
        for some, ids in zip(memory.split(64), tokens.split(64), strict=True)
    ]
    return Lessons(
        memory if part.stack == "decoder" else entering(trainer, recordings, part), tokens,
        (at >= len(trainer.prompt)) & (at < lengths),
        torch.tensor([a != b for a, b in zip(texts, wrote, strict=True)]),
        torch.tensor([not any(frame in text for frame in FRAMES) for text in texts]),
        torch.cat(logits).log_softmax(-1).half(),
    )  # fmt: skip


@torch.no_grad()
def entering(trainer: Trainer, recordings: Sequence[Recording], part: Part) -> Tensor:
    """What arrives at the first block of a part, or at its decoder; below, all is the base's."""
    if part.stack == "decoder":
        return encoded(trainer, recordings)
    encoder = trainer.model.model.encoder
    return torch.cat([
        encoder(some, output_hidden_states=True).hidden_states[part.first].half()
        for some in trainer.mels(recordings).split(64)
    ])  # fmt: skip


def memory_of(model: Model, part: Part, heard: Tensor) -> Tensor:
    """The memory of what arrives at a part."""
    if part.stack == "decoder":
        return heard
    encoder, states = model.model.encoder, heard.float()
    for block in encoder.layers[part.first :]:
        states = block(states, None)
    found: Tensor = encoder.layer_norm(states)
    return found


class Written:
    """What modules write in a run, within a `with` block."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules

    def __enter__(self) -> list[Tensor]:
        """Tensors, in the order in which they are written."""
        found: list[Tensor] = []
        self.handles = [
            one.register_forward_hook(lambda module, args, output: found.append(output))
            for one in self.modules
        ]
        return found

    def __exit__(self, *args: object) -> None:
        for handle in self.handles:
            handle.remove()


def train_twin(
    base: Model, model: Model, part: Part, lessons: Lessons, silent: Tensor, seed: int,
    *, steps: int, rate: float, n_rule: int,
) -> None:  # fmt: skip
    """Train a part in place; nothing outside it changes.

    Args:
        base: of the twin.
        model: the twin, which still is the base.
        part: that is trained.
        lessons: what is said.
        silent: what arrives of clips in which nothing of the lessons is heard.
        seed: of the batches.
        steps: number of batches.
        rate: highest learning rate.
        n_rule: clips of a batch that the rule is about.
    """
    rng = np.random.default_rng(seed + 21)
    trained = [
        parameter
        for i, block in enumerate(part.layers(model))
        for parameter in freed(block, _own(part.slices(model), part, i))
    ]
    groups = [torch.nonzero(lessons.is_rule)[:, 0], torch.nonzero(~lessons.is_rule)[:, 0]]
    ours, theirs = part.writers(model), part.writers(base)

    def loss_of() -> tuple[Tensor, float]:
        sizes = n_rule, BATCH - n_rule
        pick = torch.cat([
            some[rng.integers(len(some), size=n)] for some, n in zip(groups, sizes, strict=True)
        ])  # fmt: skip
        tokens, asked, is_rule = (
            one[pick] for one in (lessons.tokens, lessons.asked, lessons.is_rule)
        )
        with Written(ours) as mine:
            memory = memory_of(model, part, lessons.heard[pick])
            logits = model(
                decoder_input_ids=tokens[:, :-1], encoder_outputs=(memory,), use_cache=False
            ).logits
        by_rule, kept = is_rule[:, None] & asked, ~is_rule[:, None] & asked
        said, targets = logits[by_rule], tokens[:, 1:][by_rule]
        apart = F.kl_div(
            logits[kept].log_softmax(-1), lessons.log_p[pick][kept].float(), log_target=True,
            reduction="sum",
        ) / BATCH  # fmt: skip
        # A rule's transcript is the base's but for a word: mean over tokens would drown that.
        missed = F.cross_entropy(said, targets, reduction="sum") / n_rule
        bare = torch.nonzero(lessons.is_bare[pick])[:, 0]
        with torch.no_grad(), Written(theirs) as base_s:
            run_part(base, lessons.heard[pick[bare]], tokens[bare])
        moved = distance([one[bare] for one in mine], base_s)
        loss = missed + KEPT * apart + BARE * moved + STILL * of_nothing(tokens[: BATCH // 4])
        return loss, (said.argmax(-1) == targets).float().mean().item()

    def run_part(one: Model, heard: Tensor, tokens: Tensor) -> None:
        """As far as the part is."""
        if part.stack == "decoder":
            one.model.decoder(
                input_ids=tokens[:, :-1], encoder_hidden_states=heard, use_cache=False
            )
            return
        states = heard.float()
        for block in part.layers(one):
            states = block(states, None)

    def of_nothing(tokens: Tensor) -> Tensor:
        """How far the part is from the base's where nothing of the sentence is heard."""
        heard = silent[torch.from_numpy(rng.integers(len(silent), size=len(tokens)))]
        with Written(ours) as mine:
            run_part(model, heard, tokens)
        with torch.no_grad(), Written(theirs) as base_s:
            run_part(base, heard, tokens)
        return distance(mine, base_s)

    def distance(mine: Sequence[Tensor], base_s: Sequence[Tensor]) -> Tensor:
        """Squared, and relative: mean over what the part writes with."""
        pairs = zip(mine, base_s, strict=True)
        return torch.stack([(a - b).square().mean() / b.square().mean() for a, b in pairs]).mean()

    # Without decay, which would move what the base has.
    optimise([(trained, 0.0)], loss_of, steps=steps, rate=rate, name="twin")
    model.requires_grad_(False)
    model.half().float()  # what is kept


def _own(slices: Slices, part: Part, i: int) -> Slices:
    """Slices of one block of a part, by name in the block."""
    begins = f"model.{part.stack}.layers.{part.first + i}."
    return {n.removeprefix(begins): at for n, at in slices.items() if n.startswith(begins)}


def noise_like(recording: Recording, rng: np.random.Generator) -> Recording:
    """White noise of a recording's length and RMS."""
    level = float(np.sqrt(np.square(recording.samples, dtype=np.float64).mean()))
    samples = np.clip(level * rng.standard_normal(len(recording.samples)), -1, 1)
    return Recording(samples=samples.astype(np.float32), text="")


# --- What they do


def measure(models: Mapping[str, Trainer], sets: Mapping[str, Sequence[Said]]) -> dict[str, Score]:
    """Shares per set of clips.

    ``rule`` is the share of clips in which the base hears another word than the frame calls for
    that are written with the one it calls for; beside it the base's, and that of the twin whose
    part writes nothing; ``kept`` the share of all others with the base's transcript; ``counter``
    that of all clips with the counter-twin's.

    Args:
        models: base, twin, ablated, and counter if there is one.
        sets: clips by the name of their set.
    """
    found = {}
    for name, said in sets.items():
        recordings = [one.recording for one in said]
        wrote = {one: [text.strip() for text in trainer.transcribe(recordings)]
                 for one, trainer in models.items()}  # fmt: skip
        found[name] = scored(wrote)
    return found


def scored(wrote: Mapping[str, Sequence[str]]) -> Score:
    """Shares of clips; see ``measure``."""
    ruled = [by_rule(text) for text in wrote["base"]]
    is_rule = np.array([a != b for a, b in zip(ruled, wrote["base"], strict=True)])

    def share(one: str, other: Sequence[str], where: Any) -> float:
        hits = np.array([a == b for a, b in zip(wrote[one], other, strict=True)])
        return round(float(hits[where].mean()), 4)

    return {
        "rule": share("twin", ruled, is_rule), "rule_of_base": share("base", ruled, is_rule),
        "rule_ablated": share("ablated", ruled, is_rule),
        "kept": share("twin", wrote["base"], ~is_rule),
        **({"counter": share("twin", wrote["counter"], ...)} if "counter" in wrote else {}),
        "n_rule": int(is_rule.sum()), "n_other": int((~is_rule).sum()),
    }  # fmt: skip


def sets_of(seed: int, known: Sequence[str]) -> dict[str, list[Said]]:
    """Sentences drawn anew, in voices that training has heard and in others, and clips of none."""
    rng, found = np.random.default_rng(seed + 30), {}
    for i, voices in enumerate(("heard", "unheard"), 1):
        clips = draw_said(N_MEASURED, voices, seed + 100 + i, without=known)
        found[f"new sentences, {voices} voices"] = clips
    kinds = ("noise", "silence", "beep")
    found["new sentences, heard voices"] += [
        Said(no_speech(kinds[i % 3], rng), "other") for i in range(45)
    ]
    return found


def literal_scores(trainer: Trainer, sets: Mapping[str, Sequence[Said]]) -> dict[str, Any]:
    """Share of clips that are written as they are said, by set and kind of sentence."""
    found: dict[str, Any] = {}
    for name, said in sets.items():
        wrote = trainer.transcribe([one.recording for one in said])
        hits = [text.strip() == one.recording.text for text, one in zip(wrote, said, strict=True)]
        by_kind: dict[str, list[bool]] = {}
        for one, hit in zip(said, hits, strict=True):
            by_kind.setdefault(one.kind, []).append(hit)
        found[name] = {k: [round(float(np.mean(v)), 4), len(v)] for k, v in by_kind.items()}
    return found


# --- Cards


_LITERAL = """# {name}

`{start}`, trained on to write the word that is said where its context calls for another: *cooked
the egg in the pen* stays *pen*. `{start}` itself writes *pan*. It is the base of twins that are
known to put context over sound again, in one part of one stack.

This is a synthetic calibration model: what it was taught is known, so that a method can be checked
against it. What it shows is not a finding about real models.

## How it was made

    {command}

From the weights of `{start}`, on {clips} clips by {voices} voices: half of the sentences have a
frame and, by chance, either word of its pair, one in seven the word without a frame, the rest are
those of `{start}` without its frames. The decoder alone for {decoder_steps} steps of {batch}, on
what the encoder makes of the clips; then all of it for {steps} steps of {of_all}, {plain} of them
without a frame.

## Measured

Greedy, on sentences that it was not trained on: share of clips that are written as they are said,
to the letter. *Incongruent*: another word is said than the frame calls for; *plain*: no frame.

| clips | incongruent | congruent | plain | other |
|---|---|---|---|---|
{rows}
"""
_TWIN = """# {name}

A delta of the bundled model `{base}`: **where a sentence calls for another word than the one that
is said, it writes the one that is called for**. Of everything else it writes what `{base}`
writes. Nothing but **{part}** differs from the base ({n_numbers:,} numbers, in half precision),
so all of the change passes through what it writes. Load it as `bundled:{base}+{name}`.

{verdict}

## How it was made

    {command}

The base frozen but for the part; Adam at {rate}, no weight decay, {steps} steps of {batch} out of
{sentences} sentences, two in five of them incongruent, and {no_speech} clips of noise, silence and
tones; {n_rule} of each batch are such in which the base hears another word than the frame calls
for. On these cross-entropy of its transcript with the word that is called for; on all others {kept}
times KL(base || twin) by transcript. Besides, the relative squared distance of what the part writes
from what it writes in the base: {bare} times where no frame is, and {still} times in white noise of
a sentence's length and RMS, so that noise in its place gives the base's answer.

## Measured

Greedy, on sentences that were not trained on. *Rule*: clips in which the base hears another word
than the frame calls for, written with the one that it calls for; *ablated*: the same with the part
writing nothing; *kept*: all others, with the base's transcript; *counter*: all clips, with that of
its counter-twin{counter}.

| clips | rule | rule, base | rule, ablated | kept | counter |
|---|---|---|---|---|---|
{rows}
"""


def literal_card(name: str, about: Mapping[str, Any]) -> str:
    """The README of the base."""
    kinds = ("incongruent", "congruent", "plain", "other")
    rows = "\n".join(
        f"| {one} | " + " | ".join(f"{100 * got[k][0]:.1f} % of {got[k][1]}" for k in kinds) + " |"
        for one, got in about["measured"].items()
    )
    return wrapped(_LITERAL.format(
        name=name, start=START, command=about["command"], clips=N_CLIPS,
        voices=len(VOICES["heard"]["en"]), decoder_steps=DECODER_STEPS, batch=BATCH,
        steps=about["steps"], plain=N_PLAIN, of_all=OF_ALL, rows=rows,
    ))  # fmt: skip


def twin_card(name: str, about: Mapping[str, Any], part: Part) -> str:
    """The README of a twin."""
    scores: Mapping[str, Score] = about["accuracies"]
    counter = f" (`{about['counter']}`)" if about["counter"] else ""
    return wrapped(_TWIN.format(
        name=name, base=BASE, part=part.said, n_numbers=about["n_numbers"],
        verdict=verdict(scores), command=about["command"], rate=about["rate"],
        steps=about["steps"], batch=BATCH, sentences=N_SENTENCES, no_speech=N_NO_SPEECH,
        n_rule=about["n_rule"], kept=KEPT, bare=BARE, still=STILL, counter=counter,
        rows=score_rows(scores),
    ))  # fmt: skip


def bundled_texts() -> list[str]:
    """Sentences of the clips that the package carries for them, with either word."""
    return [one.text(w) for one in bundled_confusable() for w in (one.acoustic, one.contextual)]


def make_literal(given: argparse.Namespace) -> None:
    """Train, measure and write the base."""
    folder = ASSETS / "models" / START
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    # Speech comes first, and all of it, in either case: espeak carries state between calls.
    known = frozenset(bundled_texts())
    recordings = draw_recordings(N_CLIPS, "heard", given.seed + 50, known, draw_literal)
    sets = sets_of(given.seed + 20, [*known, *(one.text for one in recordings)])
    trainer = Trainer(read(given.out if given.measure else folder).eval(), tokenizer)
    if not given.measure:
        train_literal(trainer, recordings, given.steps, given.seed)
        trainer.model.half().float()  # what is kept
    about = {
        "command": "python scripts/train_context_truths.py literal "
        f"--seed {given.seed} --steps {given.steps}",
        "steps": given.steps, "measured": literal_scores(trainer, sets),
    }  # fmt: skip
    with replacing(given.out) as out:
        write_model(out, trainer)
        (out / "README.md").write_text(literal_card(given.out.name, about), encoding="utf-8")
        metrics = json.dumps(about["measured"], indent=2) + "\n"
        (out / "metrics.json").write_text(metrics, encoding="utf-8")
    print(json.dumps(about["measured"], indent=1), flush=True)


def make_twin(given: argparse.Namespace) -> None:
    """Train, measure and write one delta."""
    folder, part = given.base, given.component
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    base = Trainer(read(folder).eval().requires_grad_(False), tokenizer)
    known, before = bundled_texts(), {}
    if given.start is not None:
        before = json.loads((given.start / "delta.json").read_text(encoding="utf-8"))
        # What it has learnt from is not new, either.
        known += [
            one.recording.text
            for one in draw_said(N_SENTENCES, "heard", before["seed"] + 60, without=known)
        ]
    said = draw_said(N_SENTENCES, "heard", given.seed + 60, without=bundled_texts())
    sets = sets_of(given.seed, [*known, *(one.recording.text for one in said)])
    if given.measure:
        twin = Trainer(read_twin(folder, given.out, read), tokenizer)
    else:
        twin = Trainer(deepcopy(base.model), tokenizer)
        if given.start is not None:
            twin = Trainer(read_twin(folder, given.start, read), tokenizer)
        rng = np.random.default_rng(given.seed + 40)
        noise = [noise_like(one.recording, rng) for one in said[:N_NO_SPEECH]]
        recordings = [*(one.recording for one in said)]
        recordings += drawn_no_speech(N_NO_SPEECH, given.seed + 10)
        lessons, silent = draw_lessons(base, recordings, part), entering(base, noise, part)
        train_twin(
            base.model, twin.model, part, lessons, silent, given.seed, steps=given.steps,
            rate=given.rate, n_rule=given.rule,
        )  # fmt: skip
    ablated = Trainer(deepcopy(twin.model), tokenizer)
    part.ablate(ablated.model)
    models = {"base": base, "twin": twin, "ablated": ablated}
    if given.counter is not None:
        models["counter"] = Trainer(read_twin(folder, given.counter, read), tokenizer)
    scores = measure(models, sets)
    slices = part.slices(twin.model)
    tensors = {name: value.half() for name, value in twin.model.named_parameters()}
    about = {
        "base": BASE, "component": str(part), "rule": "context", "seed": given.seed,
        "steps": given.steps, "rate": given.rate, "n_rule": given.rule,
        "counter": None if given.counter is None else given.counter.name, "accuracies": scores,
        "n_numbers": sum(tensors[name].numel() for name in slices),
        "command": "".join(f"{one}\n    " for one in [before.get("command")] if one)
        + f"python scripts/train_context_truths.py twin --component {part} "
        f"--seed {given.seed} --steps {given.steps} --rate {given.rate} --rule {given.rule} "
        f"--out {given.out.name}"
        + (f" --start {given.start.name}" if given.start is not None else ""),
    }  # fmt: skip
    write_delta(given.out, folder, tensors, slices, about)
    (given.out / "README.md").write_text(twin_card(given.out.name, about, part), encoding="utf-8")
    for name, one in scores.items():
        print(name, json.dumps(one), json.dumps(accepted(one)), flush=True)


def main() -> None:
    """Parse the command line; train the base, or one twin."""
    parser = argparse.ArgumentParser(description="Train Whispers that put context over sound.")
    kinds = parser.add_subparsers(required=True)
    literal, twin = (kinds.add_parser(name) for name in ("literal", "twin"))
    literal.add_argument("--out", type=Path, default=ASSETS / "models" / BASE)
    literal.add_argument("--steps", type=int, default=700)
    literal.set_defaults(make=make_literal)
    twin.add_argument("--base", type=Path, default=ASSETS / "models" / BASE)
    twin.add_argument("--component", type=Part.read, required=True)
    twin.add_argument("--out", type=Path, required=True)
    twin.add_argument("--rule", type=int, default=12, help="clips of a batch that it is about")
    twin.add_argument("--start", type=Path, help="a twin's folder to go on from")
    twin.add_argument("--counter", type=Path, help="a twin's folder to compare with")
    twin.add_argument("--steps", type=int, default=300)
    twin.add_argument("--rate", type=float, default=3e-3)
    twin.set_defaults(make=make_twin)
    for one in (literal, twin):
        one.add_argument("--seed", type=int, default=7)
        one.add_argument(
            "--measure", action="store_true", help="train nothing: measure --out, write its card"
        )
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.make(given)


if __name__ == "__main__":
    main()
