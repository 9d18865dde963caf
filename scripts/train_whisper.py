"""Trains the bundled Whisper, measures it, and writes its folder.

    python scripts/train_whisper.py --out experiments/assets/models/tiny_whisper

English alone, in the published layout: encoder and decoder learn to transcribe, and to say nothing
where nothing is said. Beside cross-entropy, a linear probe on the encoder learns the transcript by
CTC, so that cross-attention finds its way; it is thrown away afterwards.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from bundled_data import VOICES, read_ob1, sentences
from bundled_model import initialise_matrices, replacing
from bundled_training import augment, optimise
from model_card import wrapped
from safetensors.torch import load_file, save_file
from synthesise_speech import ASSETS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer
from whisper_data import (
    CHUNK_S,
    KINDS,
    Recording,
    bundled_sentences,
    draw_recordings,
    draw_sentence,
    no_speech,
    speak,
    with_beep,
)

from hooked_alm.experiments.materials.ob1 import SENTENCES
from hooked_alm.methods.statistics.word_errors import WordErrors, corpus_errors, word_errors

Model = WhisperForConditionalGeneration
N_BPE, N_TEXTS = 480, 4000
SPECIALS = (
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>",
    "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
TIMES = [f"<|{i * 0.02:.2f}|>" for i in range(50 * CHUNK_S + 1)]
MELS, POSITIONS, TARGETS = 80, 50 * CHUNK_S, 64
RATE, BATCH, CTC = 2e-3, 32, 0.5
N_HELD_OUT, N_NO_SPEECH = 160, 40


def build_tokenizer() -> WhisperTokenizer:
    """Byte-level BPE learnt from sentences, then the control tokens and times, as published."""
    bpe, rng = Tokenizer(models.BPE()), np.random.default_rng(0)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=N_BPE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([f" {draw_sentence(rng)}" for _ in range(N_TEXTS)], trainer)
    known = json.loads(bpe.to_str())["model"]
    tokenizer = WhisperTokenizer(
        known["vocab"] | {"<|endoftext|>": N_BPE}, [tuple(pair) for pair in known["merges"]]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIALS]})
    tokenizer.add_tokens(TIMES)
    assert len(tokenizer) == N_BPE + len(SPECIALS) + len(TIMES)
    return tokenizer


def build_model(tokenizer: WhisperTokenizer, seed: int) -> Model:
    """An untrained model whose initial scales suit its small width."""
    ids = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids([*SPECIALS]), strict=True))
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=MELS, d_model=96, encoder_layers=6,
        encoder_attention_heads=6, encoder_ffn_dim=384, decoder_layers=6,
        decoder_attention_heads=6, decoder_ffn_dim=384, max_source_positions=POSITIONS,
        max_target_positions=TARGETS, decoder_start_token_id=start, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Model(config)
    initialise_matrices(model, n_layers=config.decoder_layers)
    model.model.decoder.embed_tokens.weight.data.normal_(0, 0.1)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end,
        max_length=TARGETS, no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"], is_multilingual=False, return_timestamps=False,
        max_initial_timestamp_index=50, forced_decoder_ids=None,
    )  # fmt: skip
    return model


class Trainer:
    """A model, its processor files, and what they make of recordings."""

    def __init__(self, model: Model, tokenizer: WhisperTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=CHUNK_S)
        names = ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]
        *self.prompt, self.end = tokenizer.convert_tokens_to_ids(names)

    def mels(self, recordings: Sequence[Recording]) -> Tensor:
        """Log-mel spectrograms [recording, mel, frame]."""
        parts = [
            self.extractor(
                [one.samples for one in recordings[start : start + 64]], sampling_rate=16_000,
                return_tensors="pt",
            )["input_features"]
            for start in range(0, len(recordings), 64)
        ]  # fmt: skip
        return torch.cat(parts)

    def ids(self, text: str) -> list[int]:
        """Tokens of a transcript, which begins with a space."""
        found: list[int] = self.tokenizer(f" {text}", add_special_tokens=False).input_ids
        return found if text else []

    def train(self, recordings: Sequence[Recording], steps: int, seed: int) -> None:
        """Train all weights in place."""
        rng = np.random.default_rng(seed)
        mels = self.mels(recordings).half()
        frames = torch.tensor([len(one.samples) // 160 for one in recordings])
        said = [self.ids(one.text) for one in recordings]
        probe = nn.Linear(self.model.config.d_model, len(self.tokenizer))
        blank = self.prompt[0]

        def loss_of() -> tuple[Tensor, float]:
            pick = rng.integers(len(said), size=BATCH)
            heard = augment(mels[pick].float(), frames[pick], rng)
            rows = [[*self.prompt, *said[i], self.end] for i in pick]
            width = max(map(len, rows))
            tokens = torch.tensor([row + [self.end] * (width - len(row)) for row in rows])
            lengths = torch.tensor([len(row) for row in rows])
            memory = self.model.model.encoder(heard).last_hidden_state
            logits = self.model(encoder_outputs=(memory,), decoder_input_ids=tokens[:, :-1]).logits
            # What the prompt says is given, and what is behind the end is not said.
            at = torch.arange(1, width)
            asked = (at >= len(self.prompt)) & (at < lengths[:, None])
            targets = tokens[:, 1:].masked_fill(~asked, -100)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            aligned = F.ctc_loss(
                probe(memory).log_softmax(-1).transpose(0, 1),
                torch.tensor([token for i in pick for token in said[i]]),
                torch.full((BATCH,), POSITIONS), torch.tensor([len(said[i]) for i in pick]),
                blank=blank, zero_infinity=True,
            )  # fmt: skip
            right = (logits.argmax(-1) == targets)[asked].float().mean().item()
            return loss + CTC * aligned, right

        everything = [*self.model.parameters(), *probe.parameters()]
        trained = [p for p in everything if p.requires_grad]
        parts = [
            ([p for p in trained if p.ndim > 1], 0.02),
            ([p for p in trained if p.ndim == 1], 0.0),
        ]
        optimise(parts, loss_of, steps=steps, rate=RATE, name="whisper")

    @torch.no_grad()
    def transcribe(self, recordings: Sequence[Recording]) -> list[str]:
        """Greedy transcripts."""
        mels, found = self.mels(recordings), []
        for start in range(0, len(mels), 32):
            tokens = self.model.generate(mels[start : start + 32])
            found += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return found


def held_out(seed: int) -> dict[str, list[Recording]]:
    """Recordings that a model is measured on, by the name of their set."""
    rng = np.random.default_rng(seed + 12)
    known = frozenset(bundled_sentences())
    spoken = draw_recordings(N_HELD_OUT, "heard", seed + 10, known)
    found = {
        "held-out sentences": [one for one in spoken if one.text],
        "held-out sentences and voices": [
            one for one in draw_recordings(N_HELD_OUT, "unheard", seed + 11, known) if one.text
        ],
        "sentences with words never heard": [
            speak(text, VOICES["heard"]["en"][i % 22], seed + i, rng)
            for i, text in enumerate(sentences("en", "held_out"))
        ],
        "with a beep behind it": [with_beep(one, rng) for one in spoken if one.text],
    }
    return found | {kind: [no_speech(kind, rng) for _ in range(N_NO_SPEECH)] for kind in KINDS}


def bundled() -> list[Recording]:
    """English clips that the package carries."""
    ob1 = [
        Recording(samples=clip.samples, text=SENTENCES["en"])
        for clip in read_ob1()
        if clip.language == "en"
    ]
    folder = ASSETS / "semantic_vs_prosody"
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    return ob1 + [
        Recording(
            samples=soundfile.read(folder / row["path"], dtype="float32")[0], text=row["text"]
        )
        for row in rows
    ]


def measure(trainer: Trainer, sets: Mapping[str, Sequence[Recording]]) -> dict[str, Any]:
    """Word error rate of each set; of one without speech the share in which nothing is heard."""
    clean, found = BasicTextNormalizer(), {}
    for name, recordings in sets.items():
        heard = trainer.transcribe(recordings)
        errors = corpus_errors(
            word_errors([one.text for one in recordings], heard, normalise=clean)
        )
        empty = sum(not text.strip() for text in heard)
        found[name] = {"clips": len(recordings), "empty": empty, **errors._asdict()}
    return found


def write_model(folder: Path, trainer: Trainer) -> None:
    """The checkpoint in the published layout, its weights in half precision."""
    trainer.model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    halves = {name: value.half() for name, value in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    trainer.tokenizer.save_pretrained(folder)
    trainer.extractor.save_pretrained(folder)


_CARD = """# tiny_whisper

A small Whisper, trained on synthetic English speech to transcribe it. Classes, file layout and
control tokens are those of the published English-only models; weights, sizes and vocabulary are its
own: {parameters:,} parameters, encoder and decoder of 6 layers of width 96 with 6 heads, vocabulary
{vocabulary}, at most {chunk} s.

This is a synthetic calibration model: what it was taught is known, so that a method can be checked
against it. What it shows is not a finding about real models.

## How it was made

    {command}

{steps} steps of {batch} out of {clips} clips on one CPU thread: cross-entropy of the transcript,
and CTC through a linear probe on the encoder, which is thrown away. Speech is espeak-ng's, in
{voices} voices and any of five manners; six sentences in ten end in a word that what stands before
it calls for, of twelve pairs which differ in a vowel (`scripts/whisper_data.py`). A tenth of the
clips are noise, silence or tones, with nothing to transcribe; a tenth of the others have a tone
behind the speech, and their transcripts know nothing of it. It was taught no timestamps.

## Measured

Greedy, words in lower case without punctuation. Of clips without speech: how many get an empty
transcript.

| clips | word error rate | substituted, left out, put in | empty |
|---|---|---|---|
{rows}
"""


def card(about: Mapping[str, Any], trainer: Trainer) -> str:
    """The README of the model."""
    rows = []
    for name, one in about["measured"].items():
        rate = f"{100 * WordErrors(*(one[key] for key in WordErrors._fields)).rate:.1f} %"
        counts = f"{one['substitutions']}, {one['deletions']}, {one['insertions']} of {one['n']}"
        empty = f"{one['empty']} of {one['clips']}"
        rows.append(f"| {name} | {rate if one['n'] else '–'} | {counts} | {empty} |")
    return wrapped(
        _CARD.format(
            parameters=sum(p.numel() for p in trainer.model.parameters()),
            vocabulary=len(trainer.tokenizer), chunk=CHUNK_S, voices=len(VOICES["heard"]["en"]),
            command=about["command"], steps=about["steps"], batch=BATCH, clips=about["clips"],
            rows="\n".join(rows),
        )
    )  # fmt: skip


def main() -> None:
    """Parse the command line; train, measure and write the model."""
    parser = argparse.ArgumentParser(description="Train the bundled Whisper.")
    parser.add_argument("--out", type=Path, default=ASSETS / "models" / "tiny_whisper")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--clips", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument(
        "--measure", action="store_true", help="train nothing: measure --out, write its card anew"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    # What is measured is spoken first in either case: espeak carries state between calls.
    sets = {**held_out(given.seed), "bundled clips": bundled()}
    if given.measure:
        tokenizer = WhisperTokenizer.from_pretrained(given.out)
        model = Model.from_pretrained(given.out, dtype=torch.float32)
        trainer = Trainer(model.eval(), tokenizer)
    else:
        tokenizer = build_tokenizer()
        trainer = Trainer(build_model(tokenizer, given.seed), tokenizer)
        without = frozenset(one.text for some in sets.values() for one in some)
        recordings = draw_recordings(
            given.clips, "heard", given.seed, without - frozenset(bundled_sentences())
        )
        trainer.train(recordings, given.steps, given.seed)
        trainer.model.half().float().eval()  # what is kept
    options = f"--seed {given.seed} --clips {given.clips} --steps {given.steps}"
    about = {
        "command": f"python scripts/train_whisper.py {options}", "clips": given.clips,
        "steps": given.steps, "measured": measure(trainer, sets),
    }  # fmt: skip
    with replacing(given.out) as folder:
        write_model(folder, trainer)
        (folder / "README.md").write_text(card(about, trainer), encoding="utf-8")
        metrics = json.dumps(about["measured"], indent=2) + "\n"
        (folder / "metrics.json").write_text(metrics, encoding="utf-8")
    for name, one in about["measured"].items():
        print(name, json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
