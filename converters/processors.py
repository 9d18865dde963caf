"""The files of a checkpoint that make prompts: tokenizer, feature extractor, chat template.

transformers reads them, and never runs code that a folder brings.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooked_alm.audio import Waveform
from hooked_alm.errors import ConversionError, InputError, any_failure
from hooked_alm.prompts import PromptBuilder
from hooked_alm.text_files import extractor_config, read_json, read_text

from .family import Family

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
EXTRACTOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
GENERATION = "generation_config.json"
FILES = {
    "tokenizer": (
        *(TOKENIZER, SETTINGS, "special_tokens_map.json", "added_tokens.json", "tekken.json"),
        *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja"),
    ),
    "feature extractor": (EXTRACTOR, PROCESSOR),
    "generation config": (GENERATION,),
}
"""Part of a checkpoint -> files that it may be read from."""
FORCED_IDS = ("forced_bos_token_id", "forced_eos_token_id")
NGRAMS = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size")
LARGEST = {
    "sampling_rate": 10**6,
    "feature_size": 2**12,
    "n_mels": 2**12,
    "n_fft": 2**16,
    "win_length": 2**16,
    "hop_length": 2**16,
    "chunk_length": 2**12,
}
"""Sizes of a feature extractor, above 0, and the most that each may be: tables are made of them."""


def processor_parts(
    family: Family, config: Any, folder: Path, parts: dict[str, Path]
) -> tuple[Any, Any, str | None]:
    """Tokenizer, feature extractor and chat template, as far as the folder has their files.

    Not by way of the processor classes: some want packages that nothing else here does.

    Raises:
        ConversionError: files that are damaged, or do not belong together.
    """
    tokenizer, source = _tokenizer(folder), folder
    if tokenizer is None and (part := parts.get(family.tokenizer or "")) is not None:
        tokenizer, source = _tokenizer(part), part
    if tokenizer is None:
        return None, None, None
    extractor = _extractor(family, folder)
    if extractor is None and family.feature_extractor is not None:
        extractor = family.feature_extractor(config)
    if extractor is None:
        return tokenizer, None, None
    return tokenizer, extractor, _template(family, folder, tokenizer, source)


def from_folder(what: str, load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """What a loader of transformers, or of a family, makes of a folder.

    Raises:
        ConversionError: it fails, for whatever reason.
    """
    with any_failure(
        ConversionError,
        f"loading the {what} of {folder}: {_named(what, folder)} cannot be used",
        "They are damaged, or want code of their own, which is never run; download them again.",
    ):
        return load(folder, **options)


def _named(what: str, folder: Path) -> str:
    """The files of a part that a folder has."""
    return ", ".join(name for name in FILES[what] if (folder / name).exists())


def generation_config(folder: Path, d_vocab: int) -> Any:
    """How the checkpoint generates; None where the folder does not say.

    Raises:
        ConversionError: the file is damaged, or has numbers that would fail amid a generation.
    """
    from transformers import GenerationConfig

    path = folder / GENERATION
    if not path.exists():
        return None
    written = read_json(path)
    ids = {name: written[name] for name in FORCED_IDS if written.get(name) is not None}
    wrong = [
        f"{name} = {value!r:.60} (expected ids below {d_vocab})"
        for name, value in ids.items()
        for one in (value if isinstance(value, list) else [value])
        if not (type(one) is int and 0 <= one < d_vocab)
    ]
    wrong += [f"{n} = {written[n]} (expected a number)" for n in NGRAMS if written.get(n) is True]
    if wrong:
        raise ConversionError(
            f"reading {path}: got {', '.join(wrong)}. It is damaged; download it again."
        )
    return from_folder("generation config", GenerationConfig.from_pretrained, folder)


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None without one, or where it is code of the folder's alone."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    plain, settings = folder / TOKENIZER, folder / SETTINGS
    options: dict[str, Any] = {"trust_remote_code": False}
    written = read_json(plain) if plain.exists() else {}
    asked = read_json(settings) if settings.exists() else {}
    load: Callable[..., Any] = AutoTokenizer.from_pretrained
    if "auto_map" in asked:
        if not written:
            return None
        load = PreTrainedTokenizerFast.from_pretrained
    elif (folder / "tekken.json").exists():
        # Where mistral_common is installed, its own tokenizer would come, which gives no offsets.
        options["mistral_format"] = False
    elif plain.exists() and not asked:
        raise ConversionError(
            f"loading the tokenizer of {folder}: it has {TOKENIZER}, and no {SETTINGS}, which says "
            "what its special tokens are. They would be guessed; download it."
        )
    elif not settings.exists():
        return None
    tokenizer = from_folder("tokenizer", load, folder, **options)
    _check_vocabulary(tokenizer, written, folder)
    # Some damages show only when it runs.
    from_folder("tokenizer", lambda _: tokenizer("a b, 你好"), folder)
    return tokenizer


def marker_ids(family: Family, tokenizer: Any, d_vocab: int, folder: Path) -> frozenset[int]:
    """Ids of the tokens around a clip.

    Raises:
        ConversionError: the tokenizer lacks one, or it has no embedding.
    """
    vocabulary = tokenizer.get_vocab() if family.marker_tokens else {}
    found = {token: vocabulary.get(token) for token in family.marker_tokens}
    ids = frozenset(id_ for id_ in found.values() if id_ is not None and id_ < d_vocab)
    if len(ids) < len(found):
        listed = ", ".join(f"{token!r} as {id_}" for token, id_ in found.items())
        raise ConversionError(
            f"loading the tokenizer of {folder}: it has the tokens around a clip, {listed}; "
            f"expected ids below {d_vocab}, the number of embeddings. It belongs to another model, "
            "or is damaged; download it again."
        )
    return ids


def check_extractor(prompts: PromptBuilder, folder: Path) -> None:
    """Let a feature extractor hear half a second, and see whether the encoder takes what it makes.

    Raises:
        ConversionError: it fails, or its features are not those that the encoder takes.
    """
    what, extractor, front_end = "feature extractor", prompts.feature_extractor, prompts.front_end
    rate = int(extractor.sampling_rate)
    samples = np.linspace(-0.1, 0.1, rate // 2, dtype=np.float32)
    waveform = Waveform(samples=samples, sampling_rate=rate, notes=(), name="half a second")
    try:
        features, _ = from_folder(what, lambda _: front_end.windows_of(waveform, extractor), folder)
    except InputError:
        return  # some hear no recording, or no short one, and say so to whoever gives it
    n_mels, n_frames = front_end.feature_shape
    width = features.shape[-1]
    # Some pad to a full window, whose length the encoder's positions fix (it lacks a frame if n_fft
    # is odd); some do not pad.
    is_full = width + 1 >= getattr(extractor, "nb_max_frames", math.inf)
    problem = None
    if features.shape[1] != n_mels or (is_full and width != n_frames):
        problem = (
            f"it makes windows {list(features.shape[1:])}, and the encoder takes mel bins and "
            f"frames {[n_mels, n_frames]}"
        )
    elif not torch.isfinite(features).all():
        problem = "its features are not finite"
    if problem is not None:
        raise ConversionError(
            f"loading the {what} of {folder}: {problem}. It belongs to another model, or is "
            "damaged; download it again."
        )


def _check_vocabulary(tokenizer: Any, written: Mapping[str, Any], folder: Path) -> None:
    """Refuse what transformers replaces without a word: files that are absent, and ids.

    Raises:
        ConversionError: it would number tokens in another way than the files do.
    """
    if not written and not (folder / "tekken.json").exists():
        names = {*type(tokenizer).vocab_files_names.values()} - {TOKENIZER}
        if missing := sorted(name for name in names if not (folder / name).exists()):
            raise ConversionError(
                f"loading the tokenizer of {folder}: it has neither {TOKENIZER} nor "
                f"{', '.join(missing)}, so that its vocabulary would be empty. Download them."
            )
    vocabulary = written.get("model", {}).get("vocab", {})
    declared = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    declared |= {token["content"]: token["id"] for token in written.get("added_tokens", ())}
    owner: dict[int, str] = {}
    twice = [
        f"{owner[id_]!r} and {token!r} are both {id_}"
        for token, id_ in declared.items()
        if owner.setdefault(id_, token) != token
    ]
    found = tokenizer.get_vocab()
    moved = [
        f"{token!r} is {id_}, and would become {found.get(token)}"
        for token, id_ in declared.items()
        if found.get(token) != id_
    ]
    if wrong := [*twice, *moved]:
        raise ConversionError(
            f"loading the tokenizer of {folder}: in {TOKENIZER} {'; '.join(wrong[:5])}"
            f"{'; ...' if wrong[5:] else ''}. It is damaged; download it again."
        )


def _extractor(family: Family, folder: Path) -> Any:
    """The folder's feature extractor; None without one."""
    from transformers import AutoFeatureExtractor

    found = extractor_config(folder)
    if found is None:
        return None
    _check_sizes(*found)
    if family.read_extractor is not None:
        return from_folder("feature extractor", family.read_extractor, folder)
    load = AutoFeatureExtractor.from_pretrained
    return from_folder("feature extractor", load, folder, trust_remote_code=False)


def _check_sizes(path: Path, written: Any) -> None:
    """Refuse sizes that mean nothing, before tables are made of them."""
    if not isinstance(written, dict):
        raise ConversionError(
            f"reading {path}: its feature extractor is {written!r}, expected an object. It is "
            "damaged; download it again."
        )
    wrong = [
        f"{name} = {written[name]!r} (expected a number above 0, at most {most})"
        for name, most in LARGEST.items()
        if name in written
        if not (type(written[name]) in (int, float) and 0 < written[name] <= most)
    ]
    padding = written.get("padding_value", 0.0)
    if not (type(padding) in (int, float) and math.isfinite(padding)):
        wrong.append(f"padding_value = {padding!r} (expected a number)")
    if written.get("dither", 0.0) != 0:
        wrong.append(
            f"dither = {written['dither']!r} (expected 0: noise would differ in every run)"
        )
    if wrong:
        raise ConversionError(
            f"reading {path}: got {', '.join(wrong)}. It is damaged; download it again."
        )


def _template(family: Family, folder: Path, tokenizer: Any, source: Path) -> str | None:
    """The chat template, from the file that wins."""
    path, found = source / SETTINGS, tokenizer.chat_template
    if (file := folder / "chat_template.jinja").exists():
        path, found = file, read_text(file)
    elif (file := folder / "chat_template.json").exists():
        path, found = file, read_json(file).get("chat_template")
    elif family.chat_template is not None:
        return family.chat_template
    elif isinstance(found, dict):
        found = found.get("default")
    if found is None and path.name == SETTINGS:
        return None
    if not isinstance(found, str):
        raise ConversionError(
            f"reading {path}: its chat template is {found!r}, expected text. It is damaged; "
            "download it again."
        )
    return found
