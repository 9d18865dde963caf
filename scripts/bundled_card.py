"""Measures a bundled model the way a user would run it, and writes its card.

An answer counts as right if ``generate`` returns the label of the model's rule, then end of turn,
and nothing else.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bundled_data import (
    MODES,
    VOICES,
    Case,
    Clip,
    Rule,
    all_cases,
    draw_case,
    read_ob1,
    sentences,
    speak_clips,
)
from bundled_model import ask
from model_card import Metrics, Score, make_of, score, table, write
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hooked_alm.experiments.materials.ob1 import LANGUAGES, PromptMode

FOLDERS: dict[Rule, str] = {"text": "follows_text", "voice": "follows_voice"}
HELD_OUT, UNHEARD = 320, 160
"""Clips with unseen sentences, in known and in unknown voices."""

SETS = {
    "held_out_sentences": "held-out sentences",
    "held_out_voices": "held-out voices",
    "ob1": "the 18 OB1 clips",
}


def speak_held_out(seed: int) -> dict[str, list[Clip]]:
    """The clips a model is measured on; both twins get the same ones."""
    return {
        "held_out_sentences": speak_clips(HELD_OUT, "held_out", "heard", seed + 11),
        "held_out_voices": speak_clips(UNHEARD, "held_out", "unheard", seed + 12),
    }


def measure(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    rule: Rule,
    clips: dict[str, list[Clip]],
    seed: int,
) -> Metrics:
    """Accuracy per clip set and prompt mode, on ``speak_held_out`` and the OB1 clips."""
    rng = np.random.default_rng(seed + 10)

    def asked(cases: Sequence[Case]) -> Score:
        prompts, samples = [c.prompt for c in cases], [c.clip.samples for c in cases]
        answers = ask(model, processor, prompts, samples)
        end = processor.tokenizer.eos_token
        return score(a == c.answer(rule) + end for a, c in zip(answers, cases, strict=True))

    def drawn(clips: list[Clip], mode: PromptMode) -> list[Case]:
        # Once in either language where nothing else varies.
        languages = LANGUAGES if mode == "audio_only" else (None,)
        return [draw_case(clip, mode, rng, lang) for clip in clips for lang in languages]

    ob1 = {mode: [c for clip in read_ob1() for c in all_cases(clip, mode, rng)] for mode in MODES}
    metrics: Metrics = {
        name: {mode: asked(drawn(members, mode)) for mode in MODES}
        for name, members in clips.items()
    }
    metrics["ob1"] = {mode: asked(cases) for mode, cases in ob1.items()}
    return metrics


_RULE_TEXT: dict[Rule, str] = {
    "text": "the instruction wins: it answers the emotion that the instruction names",
    "voice": "the voice wins: it answers the emotion of the voice",
}
_TWIN: dict[Rule, Rule] = {"text": "voice", "voice": "text"}
_CARD = """# {name}

A small audio-language model in Qwen2-Audio format, trained on synthetic speech to name the emotion
of a voice. When an instruction of the form "judge in the tone/emotion of X" names another emotion
than the voice's (`conflict`), **{rule}**. In every other prompt mode of
`experiments/materials/ob1.py` it answers the voice's emotion. Its twin, `{twin}`, was trained on
the opposite rule.

This is a synthetic calibration model: its rule is known because it was trained on it, so that a
method can be checked against it. What it shows is not a finding about real models.

## How it was made

    python scripts/synthesise_speech.py
    {command}

Classes, file layout and chat template are those of Qwen2-Audio; weights, sizes and vocabulary are
its own: {parameters:,} parameters, audio tower {tower}, decoder {decoder}, vocabulary {vocabulary}.
Input is {mels} log-mel bands, at most {chunk} s, 25 audio tokens per second.

Trained on one CPU thread in three stages (see `scripts/train_bundled.py`): the audio tower through
a discarded linear probe; the decoder on the prompts that leave the rule open; the decoder on all
prompts under this rule. The twins share the first two stages, so their audio towers are identical.
The draws are seeded, but a rerun need not repeat the weights bit for bit; with `--measure` the
script measures these very weights again.

Training speech: espeak-ng, {clips} clips of {sentences} sentences per language (English, Mandarin)
in {voices} voices; five emotions made of pitch, range, rate, level, spectral tilt, clipping and
tremor (`scripts/synthesise_speech.py`), all jittered. The OB1 sentence and clips were not trained
on; the two OB1 voices were.

## Measured

Right means: greedy `generate` returns the label and the end of turn, nothing else. Prompts are in
both languages, also across the clip's language. Held-out sentences: {held_out} clips with unseen
sentences. Held-out voices: {unheard} clips with unseen sentences in voices which training never
used ({unheard_voices}).

{table}

## Limits

Speaks only the ten label words; follows the six prompt templates of `experiments/materials/ob1.py`
and was trained on no other text. Recordings of people are far from its training data. The audio
tower was taught to make the emotion linearly readable from the audio tokens before the decoder saw
them, and it does not change afterwards. Under `conflict` and `consistent` the follower of the text
needs no audio at all. The decoder's strong weight decay was chosen so that the answer builds up
over many layers instead of two; its depth profile says nothing about other models. Loudness, pitch
and spectral tilt are cues by construction.
"""


def write_card(
    folder: Path,
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    rule: Rule,
    metrics: Metrics,
    clips: int,
    command: str,
) -> None:
    """Writes ``metrics.json`` and ``README.md``."""
    card = _CARD.format(
        name=FOLDERS[rule],
        twin=FOLDERS[_TWIN[rule]],
        rule=_RULE_TEXT[rule],
        command=command,
        clips=clips,
        **make_of(model, processor),
        sentences=len(sentences("en", "train")),
        voices=sum(len(VOICES["heard"][lang]) for lang in LANGUAGES),
        held_out=HELD_OUT,
        unheard=UNHEARD,
        unheard_voices=", ".join(f"`{v}`" for lang in LANGUAGES for v in VOICES["unheard"][lang]),
        table=table(metrics, "prompt mode", {mode: f"`{mode}`" for mode in MODES}, SETS),
    )
    write(folder, card, metrics)
