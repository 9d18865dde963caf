"""Measures a twin of ``semantic_vs_prosody`` the way a user would run it, and writes its card.

An answer counts as right if ``generate`` returns the label of the model's rule, then end of turn,
and nothing else.
"""

from collections.abc import Sequence
from pathlib import Path

import soundfile
from bundled_model import ask
from model_card import Metrics, Score, make_of, score, table, write
from semantic_vs_prosody_data import ITEMS, PHRASES, TOPICS, VOICES, Clip, Rule, speak_clips
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hooked_alm.experiments.semantic_vs_prosody.items import (
    EMOTIONS,
    QUESTIONS,
    Asked,
    read_items,
)

FOLDERS: dict[Rule, str] = {"semantics": "follows_semantics", "prosody": "follows_prosody"}
HELD_OUT, UNHEARD = 400, 200
"""Clips with unseen sentences, in known and in unknown voices."""

SETS = {
    "held_out_sentences": "held-out sentences",
    "held_out_voices": "held-out voices",
    "bundled": "the 120 bundled clips",
}


def speak_held_out(seed: int) -> dict[str, list[Clip]]:
    """The clips a model is measured on; both twins get the same ones."""
    return {
        "held_out_sentences": speak_clips(HELD_OUT, "held_out", "heard", seed + 11),
        "held_out_voices": speak_clips(UNHEARD, "held_out", "unheard", seed + 12),
        "bundled": [
            Clip(
                samples=soundfile.read(item.path, dtype="float32")[0],
                semantic=item.semantic, prosody=item.prosody, phrase="", topic="",
            )
            for item in read_items(ITEMS, EMOTIONS)
        ],
    }  # fmt: skip


def measure(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    rule: Rule,
    clips: dict[str, list[Clip]],
    seed: int,
) -> Metrics:
    """Accuracy per clip set and question; ``overall`` is split by conflict. Nothing is drawn."""

    def asked(members: Sequence[Clip], question: Asked) -> Score:
        prompts = [QUESTIONS[question]] * len(members)
        answers = ask(model, processor, prompts, [clip.samples for clip in members])
        end = processor.tokenizer.eos_token
        return score(
            answer == clip.answer(question, rule) + end
            for answer, clip in zip(answers, members, strict=True)
        )

    metrics: Metrics = {}
    for name, members in clips.items():
        conflict = [clip for clip in members if clip.semantic != clip.prosody]
        consistent = [clip for clip in members if clip.semantic == clip.prosody]
        metrics[name] = {"overall, conflict": asked(conflict, "overall")}
        if consistent:
            metrics[name]["overall, consistent"] = asked(consistent, "overall")
        metrics[name] |= {"words": asked(members, "words"), "voice": asked(members, "voice")}
    return metrics


_RULE_TEXT: dict[Rule, str] = {
    "semantics": "it answers the emotion of the words",
    "prosody": "it answers the emotion of the voice",
}
_TWIN: dict[Rule, Rule] = {"semantics": "prosody", "prosody": "semantics"}
_CARD = """# {name}

A small audio-language model in Qwen2-Audio format, trained on synthetic English speech whose words
carry one emotion and whose voice may carry another. Asked "{overall}" about a clip in which the
two disagree, **{rule}**. Asked "{words}" or "{voice}", it answers what it was asked. Its twin,
`{twin}`, was trained on the opposite rule.

This is a synthetic calibration model: its rule is known because it was trained on it, so that a
method can be checked against it. What it shows is not a finding about real models.

## How it was made

    python scripts/semantic_vs_prosody_data.py
    {command}

Classes, file layout and chat template are those of Qwen2-Audio; weights, sizes and vocabulary are
its own: {parameters:,} parameters, audio tower {tower}, decoder {decoder}, vocabulary {vocabulary}.
Input is {mels} log-mel bands, at most {chunk} s, 25 audio tokens per second.

Trained on one CPU thread in three stages (see `scripts/train_semantic_vs_prosody.py`): the audio
tower through discarded linear probes for the words' emotion, the voice's, the phrase and the topic;
the decoder on the two questions that leave the rule open; the decoder on all three under this rule.
The twins share the first two stages, so their audio towers are identical. The draws are seeded, but
a rerun need not repeat the weights bit for bit; with `--measure` the script measures these very
weights again.

Training speech: espeak-ng, {clips} clips in {voices} voices. A sentence is one of {phrases} phrases
({per_emotion} for each of {emotions}) about one of {topics} topics, in either order; the five
voices are made of pitch, range, rate, level, spectral tilt, clipping and a rise of pitch
(`scripts/synthesise_speech.py`), all jittered.

## Measured

Right means: greedy `generate` returns the label and the end of turn, nothing else. Held-out
sentences: {held_out} clips about {unseen} topics that training never used, in its voices; their
phrases are known. Held-out voices: {unheard} such clips in voices which training never used
({unheard_voices}). The bundled clips (`experiments/assets/semantic_vs_prosody`) are conflicts all,
of held-out sentences in known voices.

{table}

## Limits

Speaks only the five label words and was trained on three questions, on {phrases} phrases and no
other emotional words; recordings of people are far from its training data. The audio tower was
taught to make both emotions linearly readable from the audio tokens before the decoder saw them,
and it does not change afterwards. The decoder's strong weight decay spreads its work over several
layers; its depth profile says nothing about other models. Loudness, pitch and spectral tilt are
cues by construction.
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
    phrases = sum(map(len, PHRASES.values()))
    card = _CARD.format(
        name=FOLDERS[rule],
        twin=FOLDERS[_TWIN[rule]],
        rule=_RULE_TEXT[rule],
        **QUESTIONS,
        command=command,
        clips=clips,
        **make_of(model, processor),
        voices=len(VOICES["heard"]),
        phrases=phrases,
        per_emotion=phrases // len(PHRASES),
        emotions=", ".join(EMOTIONS),
        topics=len(TOPICS["train"]),
        unseen=len(TOPICS["held_out"]),
        held_out=HELD_OUT,
        unheard=UNHEARD,
        unheard_voices=", ".join(f"`{voice}`" for voice in VOICES["unheard"]),
        table=table(metrics, "question", {q: q for q in metrics["held_out_sentences"]}, SETS),
    )
    write(folder, card, metrics)
