"""The files of a checkpoint besides its weights: folder, config, tokenizer, feature extractor."""

import json
from pathlib import Path
from typing import Any

from hooked_alm.bundled import model_folder
from hooked_alm.errors import ConversionError, InputError

from .family import Family
from .strict_config import object_parts

READ_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def find_folder(name_or_dir: str | Path, revision: str | None, *, also: str | None = None) -> Path:
    """Path of a folder, ``bundled:NAME`` among them, or of a snapshot from the hub.

    ``also`` is one more pattern to download.

    Raises:
        InputError: no such folder, no such bundled model, and no such id on the hub.
    """
    name, folder = str(name_or_dir), model_folder(name_or_dir)
    if name and folder.is_dir():
        return folder
    is_path = isinstance(name_or_dir, Path) or name.startswith(("/", ".", "~"))
    if is_path or not name or name.count("/") > 1:  # the hub's ids are owner/name
        raise InputError(f"loading {name!r}: there is no such folder. Check the spelling.")
    from huggingface_hub import snapshot_download

    try:
        patterns = [*READ_FILES, *([] if also is None else [also])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise InputError(
            f"loading {name!r}: it is no folder, and the Hugging Face hub gave none "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the spelling, or "
            "download the checkpoint and give its folder."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Content of ``config.json``, refused if the weights are quantised.

    Raises:
        InputError: the folder has no ``config.json``.
    """
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"loading {folder}: it has no config.json. Is it a model folder?")
    try:
        published: dict[str, Any] = {**json.loads(path.read_text())}
    except (ValueError, TypeError) as error:
        raise ConversionError(
            f"reading {path}: it is no JSON object ({error}). It is damaged; download it again."
        ) from error
    parts = [published, *(part for part in published.values() if isinstance(part, dict))]
    for part in parts:
        if quantised := part.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise ConversionError(
                f"loading {folder}: it is quantised ({method or 'unknown'!s:.60}). "
                "Quantised weights are not supported; use the original checkpoint."
            )
    return object_parts(published)


def processor_parts(
    family: Family, config: Any, folder: Path, parts: dict[str, Path]
) -> tuple[Any, Any, str | None]:
    """Tokenizer, feature extractor and chat template, as far as the folder has their files.

    Not by way of the processor classes: some want packages that nothing else here does.
    """
    from transformers import AutoFeatureExtractor

    tokenizer = _tokenizer(folder)
    if tokenizer is None and (part := parts.get(family.tokenizer or "")) is not None:
        tokenizer = _tokenizer(part)
    if tokenizer is None:
        return None, None, None
    if _has_extractor(folder):
        extractor = (family.read_extractor or AutoFeatureExtractor.from_pretrained)(folder)
    elif family.feature_extractor is not None:
        extractor = family.feature_extractor(config)
    else:
        return tokenizer, None, None
    template = family.chat_template
    if (file := folder / "chat_template.jinja").exists():
        template = file.read_text()
    elif (file := folder / "chat_template.json").exists():
        template = json.loads(file.read_text())["chat_template"]
    elif template is None:
        template = tokenizer.chat_template
    return tokenizer, extractor, template


def _has_extractor(folder: Path) -> bool:
    """Whether a folder has a feature extractor; some ``processor_config.json`` name none."""
    if (folder / "preprocessor_config.json").exists():
        return True
    file = folder / "processor_config.json"
    parts = json.loads(file.read_text()) if file.exists() else {}
    return "feature_extractor" in parts or "audio_processor" in parts


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None without one, or where it is code of the folder's alone."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    plain, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if settings.exists() and "auto_map" in json.loads(settings.read_text()):
        return PreTrainedTokenizerFast.from_pretrained(folder) if plain.exists() else None
    if (folder / "tekken.json").exists():
        # Where mistral_common is installed, its own tokenizer would come, which gives no offsets.
        return AutoTokenizer.from_pretrained(folder, mistral_format=False)
    has_files = plain.exists() or settings.exists()
    return AutoTokenizer.from_pretrained(folder) if has_files else None
