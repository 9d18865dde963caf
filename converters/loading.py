"""The loader that all families share."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.utils import is_flash_attn_2_available

from hooked_alm.bundled import ADAPTER, parts_of_twin
from hooked_alm.checkpoint import (
    Checkpoint,
    JoinedCheckpoint,
    PickledCheckpoint,
    SafetensorsCheckpoint,
)
from hooked_alm.config import AttentionImplementation, HookedALMConfig, check_device
from hooked_alm.errors import ConversionError, InputError, any_failure
from hooked_alm.model import HookedALM
from hooked_alm.offload import is_offloaded

from .deltas import check_base, overlaid
from .devices import (
    DISK,
    Destinations,
    DeviceMap,
    MaxMemory,
    check_modules,
    read_device_map,
    read_max_memory,
    spread,
    whole_modules,
)
from .family import Family
from .folders import find_folder, read_config
from .lora import apply_lora, read_adapter_config
from .processors import (
    check_extractor,
    generation_config,
    marker_ids,
    processor_parts,
)
from .registry import architectures_of, family_of
from .rules import WeightPlan, fill, plan_of

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Layout:
    """A model whose parameters are still empty, and where they come from.

    It makes prompts and knows its hook points; `load_weights` makes it run.
    """

    model: HookedALM
    folder: Path
    parts: dict[str, Path]
    """Folders of the components."""
    dtype: torch.dtype | None
    """Dtype that the caller or the config asks for; None is that of the weights."""

    @property
    def family(self) -> Family:
        """The model's family. Looked up, since what it is made of cannot be pickled."""
        return family_of(read_config(self.folder), self.folder)


def load_model(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    max_memory: Any = None,
    offload_folder: str | Path | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    components: dict[str, str] | None = None,
    lora: str | Path | None = None,
    merge_lora: bool = True,
) -> HookedALM:
    """Load a published checkpoint as a ``HookedALM``.

    Args:
        name_or_dir: folder, ``bundled:NAME``, or id on the Hugging Face hub. So are all others
            below. ``BASE+DELTA`` is a localised twin; see ``deltas``.
        dtype: dtype of the weights; None keeps the checkpoint's.
        device: where the weights go; None is the CPU.
        device_map: placement over several devices as transformers takes it, instead of ``device``:
            "auto", "balanced", "balanced_low_0", "sequential", a device, or module -> device. The
            device "disk" leaves weights in files, and reads them whenever they are needed.
        max_memory: bytes that a strategy may use of each device, such as ``{0: "20GiB", "cpu":
            "60GiB"}``; the rest of the model stays on the disk. None is what is free.
        offload_folder: folder for copies of weights on the disk that no safetensors file holds as
            they are; None is the system's for temporary files. What is made there goes with the
            model.
        attn_implementation: "sdpa", "eager" or "flash_attention_2".
        revision: branch, tag or commit on the hub.
        components: folders or hub ids of parts that the checkpoint leaves to others, such as
            ``{"text_model": path}``; what is not named here is where the checkpoint says.
        lora: folder or hub id of a LoRA adapter in PEFT's format.
        merge_lora: add the adapter to the weights; False keeps it apart for ``switch_lora``.

    Raises:
        ConversionError: an unsupported architecture, a quantised checkpoint, a config field or a
            tensor that does not fit.
        InputError: no such folder or id, or an option with a wrong value.
    """
    # Before anything is read.
    read_max_memory(max_memory, _devices(device, device_map))
    _offload_folder(offload_folder)
    _check_machine(attn_implementation)
    layout = lay_out(
        name_or_dir,
        dtype=dtype,
        attn_implementation=attn_implementation,
        revision=revision,
        components=components,
        lora=lora,
    )
    return load_weights(
        layout,
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
        merge_lora=merge_lora,
    )


def load_weights(
    layout: Layout,
    *,
    device: torch.device | str | None = None,
    device_map: Any = None,
    max_memory: Any = None,
    offload_folder: str | Path | None = None,
    merge_lora: bool = True,
) -> HookedALM:
    """The model of a layout, filled with its weights; see ``load_model``.

    Raises:
        ConversionError: a tensor that does not fit.
        InputError: a device or an attention kernel that is not there.
    """
    devices = _devices(device, device_map)
    memory = read_max_memory(max_memory, devices)
    folder, model = _offload_folder(offload_folder), layout.model
    if is_offloaded(model) or not model.embed.weight.is_meta:
        raise InputError(
            f"loading weights of {layout.folder}: got a layout that has them already, expected a "
            "new one. Lay the model out again."
        )
    _check_machine(model.cfg.attn_implementation)
    check_modules(model, devices)
    adapter = model.sources.get("lora")
    placement = _fill(layout, devices, memory, folder, passes_memory=adapter is not None)
    model.eval()
    if adapter is not None:
        apply_lora(model, layout.family, adapter, merge=merge_lora)
    placement.dispatch(model)
    return model


def _devices(device: torch.device | str | None, device_map: Any) -> DeviceMap:
    """The map that was given, or one device as a map.

    Raises:
        InputError: both were given, or something that is no map.
    """
    if device is not None and device_map is not None:
        raise InputError(
            f"loading a model: got device={str(device)!r} and device_map={device_map!r:.60}, "
            "expected one of them. A device_map may be one device, too."
        )
    if device_map is not None:
        return read_device_map(device_map)
    check_device("loading a model on", device)
    return {"": "cpu" if device is None else str(device)}


def _offload_folder(folder: str | Path | None) -> Path | None:
    """The folder for copies of weights, before anything is read.

    Raises:
        InputError: there is none of that name.
    """
    if folder is not None and not Path(folder).is_dir():
        raise InputError(
            f"loading a model: got offload_folder={str(folder)!r:.80}, expected a folder that "
            "exists. Make it, or leave it out: then a temporary one is made."
        )
    return None if folder is None else Path(folder)


def lay_out(
    name_or_dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    components: dict[str, str] | None = None,
    lora: str | Path | None = None,
) -> Layout:
    """The model without its weights: hook points, tokenizer and prompts; see ``load_model``.

    Raises:
        ConversionError: an unsupported architecture or config field; see ``load_model``.
        InputError: no such folder or id, or an option with a wrong value.
    """
    _check_kernel(attn_implementation)
    base, delta = parts_of_twin(name_or_dir)
    if delta is not None and (delta / ADAPTER).exists():
        if lora is not None:
            raise InputError(
                f"loading {str(name_or_dir)!r}: it names an adapter, and got another, "
                f"lora={str(lora)!r}. Name the base alone, or leave lora out."
            )
        lora, delta = delta, None
    folder = find_folder(base, revision)
    published = read_config(folder)
    family = family_of(published, folder)
    if family.pickled is not None:
        folder = find_folder(base, revision, also=family.pickled[0])
    parts = _find_parts(family, published, folder, components or {})
    configs = {name: read_config(part) for name, part in parts.items()}
    named = _dtype(dtype, published)
    with _laid_out_from(folder / "config.json"):
        config = family.config_class.from_dict({**published, **configs})
        config._attn_implementation = attn_implementation  # reaches the audio encoder, too
        cfg = family.decoder_config(
            config,
            published,
            original_architecture=architectures_of(published, folder)[0],
            model_name=str(name_or_dir),
            tokenizer_name=str(folder),
            dtype=torch.float32 if named is None else named,
            device=torch.device("cpu"),
            attn_implementation=attn_implementation,
        )
    model = _empty_model(family, cfg, config, folder, parts)
    model.sources = {"model": folder, **parts}
    if lora is not None:
        model.sources["lora"] = adapter = find_folder(lora, None)
        read_adapter_config(adapter)  # before the weights
    layout = Layout(model, folder, parts, named)
    if delta is not None:
        model.sources["delta"] = delta
        check_base(folder, delta)
        own_checkpoint(layout)  # slices that do not fit, from headers alone
    return layout


def _laid_out_from(path: Path) -> AbstractContextManager[None]:
    """Blame the config for errors in here: transformers' classes check theirs in many ways."""
    return any_failure(
        ConversionError,
        f"reading {path}: transformers refuses it, or it contradicts itself",
        "Take the published config.",
    )


def _check_kernel(attn_implementation: str) -> None:
    """Refuse what is no attention kernel."""
    kernels = get_args(AttentionImplementation)
    if attn_implementation not in kernels:
        raise InputError(
            f"loading a model: got attn_implementation={attn_implementation!r}, expected one of "
            f"{', '.join(kernels)}."
        )


def _check_machine(attn_implementation: str) -> None:
    """Refuse a kernel that is not there, before weights are read."""
    _check_kernel(attn_implementation)
    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError(
            "loading a model with attn_implementation='flash_attention_2': the package flash-attn "
            "is missing, or there is no GPU for it. Install it, or take 'sdpa'."
        )


def _find_parts(
    family: Family, published: dict[str, Any], folder: Path, given: dict[str, str]
) -> dict[str, Path]:
    """Folders of the parts that a checkpoint leaves to others."""
    if unknown := sorted(set(given) - set(family.components)):
        have = ", ".join(family.components) or "none: the checkpoint is complete in one folder"
        raise InputError(
            f"loading {family.name}: got components {unknown}, but its components are {have}."
        )
    found = {}
    for name, where in family.components.items():
        source = given.get(name) or where(published, folder)
        if source == folder:
            continue
        if source is None:
            raise InputError(
                f"loading {family.name}: {folder} holds no {name} and names none. Pass "
                f"components={{{name!r}: folder}}."
            )
        try:
            found[name] = find_folder(source, None)
        except InputError as error:
            raise InputError(
                f"loading the {name} of {family.name}: {error} Or pass "
                f"components={{{name!r}: folder}}."
            ) from error
    return found


def _dtype(dtype: torch.dtype | str | None, published: dict[str, Any]) -> torch.dtype | None:
    """The dtype that was asked for, or the config's; None if it names none."""
    name = dtype
    if name is None:
        places = (published, *(published.get(k, {}) for k in ("text_config", "thinker_config")))
        keys = ("dtype", "torch_dtype")
        name = next((p[k] for p in places for k in keys if p.get(k)), None)
    return None if name is None else _named_dtype(name)


def _named_dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise InputError(
            f"loading weights as {name!r:.60}: expected one of {', '.join(DTYPES)}. Say which by "
            "dtype=..."
        )
    return found


def _empty_model(
    family: Family, cfg: HookedALMConfig, config: Any, folder: Path, parts: dict[str, Path]
) -> HookedALM:
    from accelerate import init_empty_weights

    tokenizer, extractor, template = processor_parts(family, config, folder, parts)
    markers: frozenset[int] = frozenset()
    if tokenizer is not None:
        markers = marker_ids(family, tokenizer, cfg.d_vocab, folder)
    with _laid_out_from(folder / "config.json"), init_empty_weights(include_buffers=False):
        front_end = family.front_end(config, markers) if family.front_end else None
        model = HookedALM(
            cfg,
            front_end=front_end,
            tokenizer=tokenizer,
            generation_config=generation_config(folder, cfg.d_vocab),
        )
    if front_end is not None and tokenizer is not None:
        added = tokenizer.added_tokens_decoder.items()  # a tekken file names no special ones
        special = {id_ for id_, token in added if token.special}
        front_end.special_ids = frozenset(tokenizer.all_special_ids) | special
        if extractor is not None and template is not None and not front_end.no_prompts:
            model.prompts = family.prompts(
                tokenizer=tokenizer,
                feature_extractor=extractor,
                chat_template=template,
                front_end=front_end,
                audio_text=family.audio_text,
            )
    return model


def own_checkpoint(layout: Layout) -> Checkpoint:
    """The checkpoint without its components, and with the delta of a twin.

    Raises:
        ConversionError: files that are missing or damaged, more than one where one is expected, or
            a delta that does not fit.
    """
    own: Checkpoint
    if layout.family.pickled is None:
        own = SafetensorsCheckpoint(layout.folder)
    else:
        pattern, key = layout.family.pickled
        files = sorted(layout.folder.glob(pattern))
        if len(files) != 1:
            raise ConversionError(
                f"reading the checkpoint {layout.folder}: found {len(files)} files {pattern}, "
                "expected one. Download it, or leave the others out."
            )
        own = PickledCheckpoint(files[0], key)
    delta = layout.model.sources.get("delta")
    return own if delta is None else overlaid(own, delta)


def open_checkpoint(layout: Layout) -> Checkpoint:
    """The checkpoint with the components' tensors under their names, as one.

    Raises:
        ConversionError: see ``own_checkpoint``.
    """
    own = own_checkpoint(layout)
    parts = {name: SafetensorsCheckpoint(folder) for name, folder in layout.parts.items()}
    return JoinedCheckpoint(own, parts) if parts else own


def _fill(
    layout: Layout,
    devices: DeviceMap,
    max_memory: MaxMemory | None,
    folder: Path | None,
    *,
    passes_memory: bool,
) -> Destinations:
    """Fill a model with its weights, each where it belongs.

    Arguments are those of `load_model`, read, and `Destinations.passes_memory`.
    """
    model, cfg = layout.model, layout.model.cfg
    checkpoint = open_checkpoint(layout)
    cfg.dtype = layout.dtype or _named_dtype(checkpoint.dtype)
    found = plan_of(model, checkpoint, layout.family.rules)
    if model.prompts is not None:
        check_extractor(model.prompts, layout.folder)
    # Hugging Face's rule: a checkpoint that stores a head of its own is believed over its config.
    cfg.tie_word_embeddings = "unembed.weight" not in found.sources
    if cfg.tie_word_embeddings:
        model.unembed.weight = model.embed.weight  # counted once by a strategy
    if isinstance(devices, str):
        devices = spread(model, devices, max_memory, found.dtypes)
    placement = Destinations(whole_modules(model, devices), folder, passes_memory)
    is_shared = cfg.tie_word_embeddings and _is_together(placement)
    fill(model, cfg, checkpoint, found if is_shared else _untied(found), placement)
    if is_shared:
        model.unembed.weight = model.embed.weight
    if layout.family.check is not None:
        layout.family.check(model, checkpoint)
    return placement


def _is_together(placement: Destinations) -> bool:
    """Whether embedding and unembedding are on one device, which can hold them as one."""
    embed, unembed = (placement.device_of(f"{name}.weight") for name in ("embed", "unembed"))
    return embed == unembed != DISK


def _untied(found: WeightPlan) -> WeightPlan:
    """A plan in which a tied unembedding is read by itself, from the embedding's tensor."""
    if "unembed.weight" in found.sources:
        return found
    return replace(
        found, sources={**found.sources, "unembed.weight": found.sources["embed.weight"]}
    )
