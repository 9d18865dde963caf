"""Architecture name -> family, and the loader that all families share."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError

from hooked_alm.checkpoint import Checkpoint
from hooked_alm.config import AttentionImplementation, HookedALMConfig
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.model import HookedALM
from hooked_alm.prompts import PromptBuilder

from .family import Family
from .rules import fill, plan

FAMILIES = {
    "Qwen2AudioForConditionalGeneration": "qwen2_audio",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
"""Architecture, as ``config.json`` names it -> module of this package."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
READ_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Layout:
    """A model whose parameters are still empty, and where they come from."""

    model: HookedALM
    family: Family
    folder: Path


def load_model(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    components: dict[str, str] | None = None,
) -> HookedALM:
    """Load a published checkpoint as a ``HookedALM``.

    Args:
        name_or_dir: folder, or id on the Hugging Face hub.
        dtype: of the weights; None keeps the checkpoint's.
        device: where the weights go; None is the CPU.
        device_map: accelerate's placement over several devices, instead of ``device``.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".
        revision: branch, tag or commit on the hub.
        components: folders of parts that the checkpoint leaves out; no supported family has any.

    Raises:
        ConversionError: an unsupported architecture, a quantised checkpoint, a config field or a
            tensor that does not fit.
        InputError: no such folder or id, or an option with a wrong value.
    """
    layout = lay_out(
        name_or_dir,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        revision=revision,
        components=components,
    )
    _fill(layout)
    model = layout.model.eval()
    if device_map is not None:
        from accelerate import dispatch_model, infer_auto_device_map

        if device_map == "auto":
            device_map = infer_auto_device_map(model, no_split_module_classes=["Block"])
        dispatch_model(model, device_map=device_map)
    return model


def lay_out(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    components: dict[str, str] | None = None,
) -> Layout:
    """The model without its weights: hook points, tokenizer and prompts; see ``load_model``."""
    folder = find_folder(name_or_dir, revision)
    published = read_config(folder)
    family = family_of(published, folder)
    if components:
        raise InputError(
            f"loading {family.name}: got components {sorted(components)}, but the checkpoint is "
            "complete in one folder."
        )
    kernels = get_args(AttentionImplementation)
    if attn_implementation not in kernels:
        raise InputError(
            f"loading {family.name}: got attn_implementation={attn_implementation!r}, expected one "
            f"of {', '.join(kernels)}."
        )
    try:
        config = family.config_class.from_dict(dict(published))
    except (StrictDataclassError, ValueError) as error:
        raise ConversionError(
            f"reading {folder / 'config.json'}: transformers refuses it: {error}"
        ) from error
    config._attn_implementation = attn_implementation  # reaches the audio encoder, too
    cfg = family.decoder_config(
        config,
        published,
        original_architecture=published["architectures"][0],
        model_name=str(name_or_dir),
        tokenizer_name=str(folder),
        dtype=_dtype(dtype, published),
        device=torch.device("cpu" if device is None else device),
        attn_implementation=attn_implementation,
    )
    return Layout(_empty_model(family, cfg, config, folder), family, folder)


def find_folder(name_or_dir: str | Path, revision: str | None) -> Path:
    """The folder itself, or a snapshot of the hub's."""
    folder = Path(name_or_dir)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(name_or_dir), revision=revision, allow_patterns=READ_FILES)
        )
    except Exception as error:
        raise InputError(
            f"loading {str(name_or_dir)!r}: it is no folder, and the Hugging Face hub gave none "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the spelling, or "
            "download the checkpoint and give its folder."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, refused if the weights are quantised."""
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
            raise ConversionError(
                f"loading {folder}: it is quantised ({quantised.get('quant_method', 'unknown')}). "
                "Quantised weights are not supported; use the original checkpoint."
            )
    return published


def family_of(published: dict[str, Any], folder: Path) -> Family:
    """The family that answers to the architecture."""
    names = published.get("architectures") or [published.get("model_type")]
    for name in names:
        if name in FAMILIES:
            family: Family = import_module(f".{FAMILIES[name]}", __package__).FAMILY
            return family
    raise ConversionError(
        f"loading {folder}: architecture {', '.join(map(str, names))} is not supported. "
        f"Supported: {', '.join(sorted(FAMILIES))}."
    )


def _dtype(dtype: torch.dtype | str | None, published: dict[str, Any]) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    name = dtype
    if name is None:
        text = published.get("text_config", {})
        keys = ("dtype", "torch_dtype")
        name = next((p[k] for p in (published, text) for k in keys if p.get(k)), "float32")
    if name not in DTYPES:
        raise InputError(f"loading weights as {name!r}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[str(name)]


def _empty_model(family: Family, cfg: HookedALMConfig, config: Any, folder: Path) -> HookedALM:
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    tokenizer, extractor, template = _processor_parts(folder)
    markers = () if tokenizer is None else tokenizer.convert_tokens_to_ids(family.marker_tokens)
    generation = None
    if (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        front_end = family.front_end(config, frozenset(markers)) if family.front_end else None
        model = HookedALM(
            cfg, front_end=front_end, tokenizer=tokenizer, generation_config=generation
        )
    if front_end is not None and tokenizer is not None:
        front_end.special_ids = frozenset(tokenizer.all_special_ids)
        if extractor is not None and template is not None:
            model.prompts = PromptBuilder(
                tokenizer=tokenizer,
                feature_extractor=extractor,
                chat_template=template,
                front_end=front_end,
            )
    return model


def _processor_parts(folder: Path) -> tuple[Any, Any, str | None]:
    """Tokenizer, feature extractor and chat template, as far as the folder has their files."""
    from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer

    has_tokenizer = any((folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json"))
    if not has_tokenizer:
        return None, None, None
    if not any(
        (folder / f).exists() for f in ("preprocessor_config.json", "processor_config.json")
    ):
        return AutoTokenizer.from_pretrained(folder), None, None
    # The processor only for its chat template: its other parts are loaded by themselves.
    processor = AutoProcessor.from_pretrained(folder)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    return processor.tokenizer, extractor, processor.chat_template


def _fill(layout: Layout) -> None:
    model, cfg = layout.model, layout.model.cfg
    checkpoint = Checkpoint(layout.folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = ("unembed.weight",) if cfg.tie_word_embeddings else ()
    found = plan(checkpoint, layout.family.rules, shapes, tied=tied)
    fill(model, cfg, checkpoint, found.sources)
    # Hugging Face's rule: a checkpoint that stores a head of its own is believed over its config.
    cfg.tie_word_embeddings = "unembed.weight" not in found.sources
    if cfg.tie_word_embeddings:
        model.unembed.weight = model.embed.weight
