"""What `fuzz` damages, and how it sees whether the outcome is right.

An area makes good files once, damages a copy of them, and uses the copy. Using it raises what the
library raises, and gives whether the result is right: what Hugging Face makes of the same files
or, where it refuses them, what the undamaged ones give.
"""

import csv
import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from fuzz_damage import ODD, of_bytes, of_file_bytes, of_json, of_text

from hooked_alm import HookedALM
from hooked_alm.audio import decode_file
from hooked_alm.bundled import ASSETS, CLIPS, MODELS
from hooked_alm.experiments.head_statistics.items import read_questions
from hooked_alm.experiments.materials.pairs import read_pairs
from hooked_alm.experiments.materials.recordings import load_recordings
from hooked_alm.experiments.prefix_comparison.items import read_items as read_prefixes
from hooked_alm.experiments.registry import EXPERIMENTS, load_experiment
from hooked_alm.experiments.semantic_vs_prosody.items import read_items as read_spoken
from hooked_alm.experiments.workbench import runner
from hooked_alm.experiments.workbench.experiment import Experiment, Unit, UnitResult
from hooked_alm.experiments.workbench.render import render
from hooked_alm.experiments.workbench.settings import (
    ExperimentConfig,
    as_yaml,
    known_keys,
    load_settings,
)

IDS = torch.arange(1, 21)[None]
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn),
)
BROKEN = (
    *("*a", "&a [*a]", "!!python/object:os.system x", "{a: 1, a: 2}", "0x", "12:99:99", "? a"),
    *("[" * 5000, "9" * 5000, "2020-99-99", "\ud800", "\x1b", "1e999", "- -"),
)
"""YAML that is none, or that says something odd."""
QUESTION = "Judge the emotion of this audio. Output the label only."
CLIP = CLIPS / "en_sad_strong.wav"


def linked(folder: Path, out: Path) -> None:
    """A copy of a folder that shares its files; `put` replaces one of them."""
    shutil.copytree(folder, out, copy_function=os.link)


def put(path: Path, content: bytes | str) -> None:
    """Write a file in place of one that may be shared; half a character is written as it is."""
    path.unlink(missing_ok=True)
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    path.write_bytes(data)


def damaged(path: Path, rng: random.Random) -> str:
    """Damage a text file in place; JSON by its structure."""
    data = path.read_bytes()
    if rng.random() < 0.05:
        content, done = of_file_bytes(data, rng)
        put(path, content)
    else:
        text, done = (of_json if path.suffix == ".json" else of_text)(data.decode("utf-8"), rng)
        put(path, text)
    return f"{path.name}: {done}"


def llama(**change: Any) -> Any:
    """A random LLaMA of Hugging Face, no two sizes of it equal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=337, hidden_size=50, intermediate_size=34, num_hidden_layers=3,
                 num_attention_heads=5, num_key_value_heads=1, head_dim=10,
                 max_position_embeddings=211)  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **change)).eval()


class Checkpoint:
    """A LLaMA folder, of one file or of shards with an index."""

    def __init__(self, root: Path) -> None:
        self.good = {"one": root / "one", "shards": root / "shards"}
        llama().save_pretrained(self.good["one"])
        llama().save_pretrained(self.good["shards"], max_shard_size="30KB")
        self.expected = HookedALM.from_pretrained(self.good["one"])(IDS)

    def use(self, folder: Path) -> bool:
        """Load it, and compare with Hugging Face."""
        found = HookedALM.from_pretrained(folder)(IDS)
        theirs = self.hugging_face(folder)
        return torch.equal(found, self.expected if theirs is None else theirs)

    @staticmethod
    @torch.no_grad()
    def hugging_face(folder: Path) -> torch.Tensor | None:
        """Their logits; none where they refuse, or make up weights."""
        from transformers import AutoModelForCausalLM

        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
            )
            made_up = told["missing_keys"] or told["mismatched_keys"]
            return None if made_up else model.eval()(IDS).logits
        except Exception:
            return None


class Weights(Checkpoint):
    """Bytes, headers, tensors and indices."""

    def damage(self, folder: Path, rng: random.Random) -> str:
        """Damage a weights file or an index."""
        kind = rng.choice(sorted(self.good))
        linked(self.good[kind], folder)
        if kind == "shards" and rng.random() < 0.6:
            return damaged(folder / "model.safetensors.index.json", rng)
        file = rng.choice(sorted(folder.glob("*.safetensors")))
        data = file.read_bytes()
        n = int.from_bytes(data[:8], "little")
        how = rng.choice(("bytes", "header", "header", "header", "tensors", "gone"))
        if how == "bytes":
            content, done = of_bytes(data, rng, header=n)
        elif how == "header":
            text, done = of_json(data[8 : 8 + n].decode(), rng)
            header = text.encode("utf-8", "surrogatepass")
            content = len(header).to_bytes(8, "little") + header + data[8 + n :]
        elif how == "tensors":
            return self._tensors(file, rng)
        else:
            file.unlink()
            return f"{file.name} gone"
        put(file, content)
        return f"{file.name}: {done}"

    @staticmethod
    def _tensors(file: Path, rng: random.Random) -> str:
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
        dtype = rng.choice(DTYPES)
        tensor = tensors.pop(name)
        made = {
            f"{name} as {dtype}": {name: tensor.to(dtype)},
            f"{name} gone": {},
            f"{name} twice": {name: tensor, f"{name}_2": tensor.clone()},
            f"{name} longer": {name: torch.cat([tensor, tensor])},
            f"{name} flat": {name: tensor.flatten()},
            f"{name} a scalar": {name: tensor.flatten()[0].clone()},
            f"{name} NaN": {name: tensor * float("nan")},
            "inv_freq": {name: tensor, "model.layers.0.self_attn.rotary_emb.inv_freq": 1
                         / (10_000 ** (torch.arange(0, 10, 2) / rng.choice((10, 8))))},
        }  # fmt: skip
        done = rng.choice(sorted(made))
        file.unlink()
        save_file(tensors | made[done], file, metadata={"format": "pt"})
        return done


class Configs(Checkpoint):
    """Fields of ``config.json`` of a LLaMA, and of an audio model."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.audio = Texts(root)

    def damage(self, folder: Path, rng: random.Random) -> str:
        """Damage the config of one of them."""
        is_audio = rng.random() < 0.4
        linked(MODELS / "follows_text" if is_audio else self.good["one"], folder)
        return damaged(folder / "config.json", rng)

    def use(self, folder: Path) -> bool:
        """Load it, run it, and compare with Hugging Face."""
        is_audio = (folder / "tokenizer.json").exists()
        return self.audio.use(folder) if is_audio else super().use(folder)


class Texts:
    """Tokenizer, template, processor and generation files of a bundled audio model."""

    FILES = (
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("preprocessor_config.json", "processor_config.json", "generation_config.json"),
    )

    def __init__(self, root: Path) -> None:
        self.expected = self._logits(MODELS / "follows_text")

    def damage(self, folder: Path, rng: random.Random) -> str:
        """Damage one file, or take it away."""
        linked(MODELS / "follows_text", folder)
        path = folder / rng.choice(self.FILES)
        if rng.random() < 0.06:
            path.unlink()
            return f"{path.name} gone"
        return damaged(path, rng)

    def use(self, folder: Path) -> bool:
        """Prepare a prompt with audio and run it, as Hugging Face would."""
        found = self._logits(folder)
        theirs = self._hugging_face(folder)
        return torch.equal(found, self.expected if theirs is None else theirs)

    @staticmethod
    @torch.no_grad()
    def _logits(folder: Path) -> torch.Tensor:
        model = HookedALM.from_pretrained(folder)
        model.generate(x := model.prepare(CLIP, QUESTION), 1)
        return model(x)[0, -1]

    @staticmethod
    @torch.no_grad()
    def _hugging_face(folder: Path) -> torch.Tensor | None:
        from transformers import AutoModelForSeq2SeqLM, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            model, told = AutoModelForSeq2SeqLM.from_pretrained(
                folder, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
            )
            if told["missing_keys"] or told["mismatched_keys"]:
                return None
            samples, rate = soundfile.read(CLIP, dtype="float32")
            content = [{"type": "audio", "audio_url": "x"}, {"type": "text", "text": QUESTION}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            x = processor(text=text, audio=[samples], sampling_rate=rate, return_tensors="pt")
            if "input_features" not in x:
                return None  # what is no processor's name makes a tokenizer, deaf without a word
            positions = x["attention_mask"].cumsum(-1) - 1
            return model.eval()(**x, position_ids=positions).logits[0, -1]
        except Exception:
            return None


class Audio:
    """Sound files of every container that soundfile writes."""

    KINDS = (
        ("wav", "WAV", "PCM_16"), ("wav", "WAV", "FLOAT"), ("wav", "WAVEX", "PCM_24"),
        ("wav", "WAV", "GSM610"), ("wav", "RF64", "PCM_16"), ("w64", "W64", "PCM_16"),
        ("aiff", "AIFF", "PCM_16"), ("au", "AU", "PCM_16"), ("flac", "FLAC", "PCM_16"),
        ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS"), ("mp3", "MP3", "MPEG_LAYER_III"),
        ("caf", "CAF", "PCM_16"), ("sph", "NIST", "PCM_16"), ("voc", "VOC", "PCM_16"),
        ("svx", "SVX", "PCM_16"), ("snd", "AU", "ULAW"), ("wav", "WAV", "IMA_ADPCM"),
    )  # fmt: skip

    def __init__(self, root: Path) -> None:
        samples, rate = soundfile.read(CLIP)
        self.good = []
        for suffix, container, coding in self.KINDS:
            path = root / f"{container}-{coding}.{suffix}"
            soundfile.write(path, samples[: 3 * rate], rate, coding, format=container)
            self.good.append(path)
        self.n_samples = len(samples[: 3 * rate])
        self.least = 0

    def damage(self, folder: Path, rng: random.Random) -> str:
        """Damage one file."""
        folder.mkdir()
        path = rng.choice(self.good)
        content, done = of_bytes(path.read_bytes(), rng)
        put(folder / path.name, content)
        # Of other damages nobody can say what had been recorded.
        whole = {"cut": self.n_samples, "doubled": 2 * self.n_samples}
        self.least = whole.get(done.split(" at ")[0], 0)
        return f"{path.name}: {done}"

    def use(self, folder: Path) -> bool:
        """Read it: a loss of more than a hundredth is named."""
        (path,) = folder.iterdir()
        channels, _, notes = decode_file(path)
        return bool(notes) or channels.shape[1] >= 0.99 * self.least


class Items:
    """Users' tables: recordings, spoken items, pairs, questions, prompts with a prefix."""

    def __init__(self, root: Path) -> None:
        names = sorted(path.name for path in CLIPS.glob("en_*.wav"))[:6]
        emotions = [name.split("_")[1] for name in names]
        sheet = [f"{CLIPS / n},{e},ann" for n, e in zip(names, emotions, strict=True)]
        pairs = [
            {"base": {"audio": str(CLIPS / a), "text": "Which?"},
             "donor": {"audio": str(CLIPS / b), "segments": [["text", "Which"], ["ask", "?"]]},
             "answers": {"base": "sad", "donor": "angry"}, "group": f"g{i}"}
            for i, (a, b) in enumerate(pairwise(names))
        ]  # fmt: skip
        spoken = (ASSETS / "semantic_vs_prosody" / "manifest.csv").read_text("utf-8").splitlines()
        spoken = [f"{ASSETS}/semantic_vs_prosody/{line}" for line in spoken[1:7]] + []
        head = "path,semantic_label,prosody_label,speaker,text,duration_s,sample_rate,rms_dbfs,"
        head += "f0_median_hz,f0_iqr_hz,voiced_fraction,sha256"
        labels = ("neutral", "happy", "sad", "angry", "surprised")

        def first(name: str) -> str:
            lines = (ASSETS / name).read_text("utf-8").splitlines()[:6]
            return "\n".join(lines).replace('"ob1/', f'"{CLIPS}/')

        self.good: dict[str, tuple[str, Callable[[Path], Any]]] = {
            "manifest.csv": ("\n".join(["path,emotion,speaker", *sheet]), load_recordings),
            "spoken.csv": ("\n".join([head, *spoken]), lambda path: read_spoken(path, labels)),
            "pairs.jsonl": ("\n".join(map(json.dumps, pairs)), read_pairs),
            "questions.jsonl": (first("multiple_choice_voices.jsonl"), read_questions),
            "prefixes.jsonl": (first("prefix_comparison.jsonl"), read_prefixes),
        }

    def damage(self, folder: Path, rng: random.Random) -> str:
        """Damage a line, a cell, or the text."""
        folder.mkdir()
        name = rng.choice(sorted(self.good))
        lines = self.good[name][0].splitlines()
        at = rng.randrange(len(lines))
        if rng.random() < 0.7 and name.endswith(".jsonl"):
            lines[at], done = of_json(lines[at], rng)
        elif rng.random() < 0.7 and name.endswith(".csv"):
            cells = lines[at].split(",")
            cells[rng.randrange(len(cells))] = done = str(rng.choice(ODD))
            lines[at] = ",".join(cells)
        else:
            text, done = of_text("\n".join(lines), rng)
            lines = [text]
        put(folder / name, "\n".join(lines) + "\n")
        return f"{name}: {done!r:.60}"

    def use(self, folder: Path) -> bool:
        """Read it: every line that says something is an item."""
        (path,) = folder.iterdir()
        found = self.good[path.name][1](path)
        text = path.read_text("utf-8-sig")
        if path.suffix == ".csv":
            rows = [row for row in csv.reader(io.StringIO(text)) if any(map(str.strip, row))]
            return len(found) == len(rows) - 1
        return len(found) == sum(bool(line.strip()) for line in text.splitlines())


class Settings:
    """Settings of every experiment, as words and as a YAML file."""

    def __init__(self, root: Path) -> None:
        self.kinds = {name: load_experiment(name).Config for name in sorted(EXPERIMENTS)}
        self.words: list[str] = []
        self.kind: type[ExperimentConfig] = ExperimentConfig

    def damage(self, folder: Path, rng: random.Random) -> str:
        """Some settings, or a file of them."""
        folder.mkdir()
        name = rng.choice(sorted(self.kinds))
        self.kind, self.words = self.kinds[name], []
        if rng.random() < 0.3:
            text, done = of_text(as_yaml(self.kind()), rng)
            put(folder / "config.yaml", text)
            return f"{name}, config.yaml: {done}"
        keys = [*known_keys(self.kind), "", "a.b.c", "model.x"]
        for _ in range(rng.choice((1, 1, 2, 3))):
            odd = rng.choice(ODD)
            value = rng.choice((str(odd), rng.choice(BROKEN), rng.choice(BROKEN)))
            if rng.random() < 0.6:
                value = yaml.safe_dump(odd, default_flow_style=True).removesuffix("\n...\n")
            self.words.append(f"{rng.choice(keys)}={value}")
        return f"{name}: {self.words!r:.100}"

    def use(self, folder: Path) -> bool:
        """Read them: what was read is in bounds, and the file that keeps it says the same."""
        file = folder / "config.yaml"
        settings = load_settings(self.kind, file=file if file.exists() else None, words=self.words)
        put(kept := folder / "kept.yaml", as_yaml(settings))
        numbers = [n for n in _numbers(settings.model_dump()) if not isinstance(n, bool)]
        is_sane = all(math.isfinite(n) and abs(n) < 2**63 for n in numbers)
        return is_sane and load_settings(self.kind, file=kept) == settings


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    below = value.values() if isinstance(value, dict) else ()
    for one in value if isinstance(value, list | tuple) else below:
        yield from _numbers(one)


class Levels(Experiment[ExperimentConfig]):
    """A small experiment: how loud some clips are, second by second."""

    name, title = "levels", "Levels"
    question = "How loud are the clips?"
    Config = ExperimentConfig
    tables = {"levels": "a tenth of a second of a clip"}  # noqa: RUF012
    controls, claims, caveats = (), (), ()

    def identify(self) -> dict[str, Any]:
        """Nothing to load."""
        return {"model": {"name": "none", "blocks": 1}}

    def units(self) -> list[Unit]:
        """A unit per clip."""
        return [Unit(path.stem, path) for path in sorted(CLIPS.glob("en_*.wav"))[:4]]

    def measure(self, unit: Unit) -> UnitResult:
        """The levels of one clip."""
        samples = soundfile.read(unit.payload)[0]
        rows = [{"clip": unit.id, "at": i, "rms": float(np.sqrt((part**2).mean()))}
                for i, part in enumerate(np.array_split(samples, 10))]  # fmt: skip
        return UnitResult({"levels": rows}, {"clip": unit.id})

    def summaries(self, run: Any) -> Iterator[tuple[str, Any]]:
        """The mean of each clip."""
        yield "means", run["levels"].groupby("clip", as_index=False).rms.mean()

    def lead(self, run: Any) -> str:
        """What was measured."""
        return "How loud some clips are."

    def page(self, page: Any, run: Any) -> None:
        """A table."""
        page.section("Levels")
        page.table("Means", run["means"])

    def method(self, run: Any) -> str:
        """How."""
        return "Root mean squares."


class Runs:
    """The folder of a finished run, which is resumed and shown again."""

    KEPT = ("report.json", "report.html", "tables/levels.parquet", "tables/means.csv")

    def __init__(self, root: Path) -> None:
        self.good = root / "run"
        runner.run(Levels(ExperimentConfig(n_threads=1)), self.good)
        self.expected = self._kept(self.good)

    def _kept(self, folder: Path) -> dict[str, bytes]:
        return {
            name: (folder / name).read_bytes() for name in self.KEPT if (folder / name).exists()
        }

    def damage(self, folder: Path, rng: random.Random) -> str:
        """Damage, remove or misplace one file of it."""
        linked(self.good, folder)
        path = rng.choice(sorted(one for one in folder.rglob("*") if one.is_file()))
        how = rng.choice(("damage", "damage", "damage", "bytes", "gone", "folder", "link"))
        if how == "damage" and path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".html"):
            return damaged(path, rng)
        data = path.read_bytes()
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "link":
            path.symlink_to("/etc/hostname")
        elif how != "gone":
            put(path, of_bytes(data or b"x", rng)[0])
        return f"{path.relative_to(folder)}: {how}"

    def use(self, folder: Path) -> bool:
        """Resume it, and show it again: it ends with the same bytes."""
        found = runner.run(Levels(ExperimentConfig(n_threads=1)), folder)
        render(found)
        return self._kept(folder) == self.expected


AREAS: dict[str, tuple[type[Any], float]] = {
    "weights": (Weights, 3), "configs": (Configs, 4), "texts": (Texts, 4), "audio": (Audio, 4),
    "items": (Items, 3), "settings": (Settings, 3), "runs": (Runs, 3),
}  # fmt: skip
"""Name -> what is damaged, and its share of the inputs."""
