"""LoRA adapters in PEFT's format, on any decoder: merged on loading, or kept apart and switchable.

Source: PEFT 0.21 ``LoraConfig`` and ``LoraLayer``.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooked_alm.checkpoint import SafetensorsCheckpoint
from hooked_alm.components.lora import LowRank, attach, plus_low_rank
from hooked_alm.errors import ConversionError, InputError
from hooked_alm.model import HookedALM
from hooked_alm.text_files import read_json

from .family import Family
from .rules import Drop, rule_for, target_of

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

HANDLED = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (pissa, olora, ...) belong to base weights that they have changed.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
"""Values that an adapter may have in these fields."""
IRRELEVANT: dict[str, str] = {
    **dict.fromkeys(("auto_mapping", "base_model_name_or_path", "revision", "peft_version",
                     "task_type"), "says where the adapter came from"),
    **dict.fromkeys(("inference_mode", "lora_dropout", "loftq_config", "megatron_config",
                     "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
                     "corda_config"), "training only"),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
                    "the tensors say which modules have an update"),
}  # fmt: skip
"""Field -> why it does not change what the adapter computes. Any other must ask for nothing."""


def apply_lora(model: HookedALM, family: Family, folder: Path, *, merge: bool) -> None:
    """Read an adapter and add it to the weights that it belongs to.

    Args:
        model: filled with the base model's weights.
        family: family of the model, whose rules know the names of its modules.
        folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        merge: add it once, or keep it apart so that ``switch_lora`` can turn it off.

    Raises:
        ConversionError: an adapter that does more than add ``B A``, or that does not fit.
        InputError: no adapter in the folder.
    """
    config = read_adapter_config(folder)
    checkpoint = SafetensorsCheckpoint(folder, "adapter_model")
    factors: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for name in checkpoint:
        match = _NAME.fullmatch(name)
        if match is None:
            problems.append(f"unexpected tensor {name}")
        else:
            factors.setdefault(match["module"], {})[match["factor"]] = name
    updates: dict[str, LowRank] = {}
    for module, names in factors.items():
        rule = rule_for(family.rules, f"{module}.weight")
        if isinstance(rule, Drop):  # so is what it would update
            continue
        target = target_of(family.rules, f"{module}.weight")
        linear = None if target is None else _linear(model, target.removesuffix(".weight"))
        if target is None or linear is None or set(names) != {"A", "B"}:
            problems.append(f"{module} with {sorted(names)}: no linear layer that takes A and B")
            continue
        a, b = (checkpoint.read(names[factor], torch.float32) for factor in "AB")
        shapes = (b.shape[:1] + a.shape[1:], b.shape[1:])
        if shapes != (linear.weight.shape, a.shape[:1]):
            problems.append(
                f"{module}: B {list(b.shape)} times A {list(a.shape)} does not fit "
                f"{list(linear.weight.shape)}"
            )
            continue
        device = linear.weight.device
        updates[target.removesuffix(".weight")] = LowRank(
            a.to(device), b.to(device), _scaling(config, module, len(a), problems)
        )
    if problems or not updates:
        listed = "\n  ".join(problems or ["it holds no update"])
        raise ConversionError(
            f"applying the adapter {folder} to {family.name}:\n  {listed}\nIs it an adapter of "
            "this model?"
        )
    for name, update in updates.items():
        _apply(model.get_submodule(name), update, merge)
    model.cfg.adapter = str(folder)


def _apply(linear: nn.Module, update: LowRank, merge: bool) -> None:
    if not merge:
        attach(linear, update)
        return
    weight = linear.get_parameter("weight")
    merged: Tensor = plus_low_rank(weight.detach(), update.a, update.b, update.scaling)
    linear.weight = nn.Parameter(merged)


def _linear(model: HookedALM, name: str) -> nn.Linear | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Linear) and name != "unembed" else None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Content of an adapter's config, with PEFT's defaults for rank and alpha.

    Raises:
        ConversionError: it is damaged, or asks for more than adding ``B A``.
        InputError: no adapter in the folder.
    """
    path = folder / CONFIG
    if not path.exists():
        raise InputError(
            f"applying an adapter: {folder} has no {CONFIG}. Give the folder that PEFT saved."
        )
    config = {"r": 8, "lora_alpha": 8, **read_json(path)}
    if wrong := [
        f"{name} = {value!r}"
        for name, value in config.items()
        if name not in HANDLED and name not in IRRELEVANT
        if value and value not in PLAIN.get(name, ())
    ]:
        raise ConversionError(
            f"reading {path}: {', '.join(wrong)}. Only plain LoRA is supported, which adds B A to "
            "weights; merge the adapter with PEFT and load the result."
        )
    if wrong := [name for name in sorted(HANDLED) if not _is_usable(name, config.get(name))]:
        listed = ", ".join(f"{name} = {config[name]!r}" for name in wrong)
        raise ConversionError(
            f"reading {path}: got {listed}; expected ranks from 1 on, finite alphas, patterns that "
            "map regular expressions to them, and use_rslora true or false. It is damaged; save "
            "the adapter again."
        )
    return config


def _is_usable(name: str, value: Any) -> bool:
    """Whether a field has a value that scales an update."""
    if name == "use_rslora":
        return value in (None, True, False)
    if name == "r":
        return type(value) is int and value > 0
    if name == "lora_alpha":
        return type(value) in (int, float) and math.isfinite(value)
    one = "r" if name == "rank_pattern" else "lora_alpha"
    if value is None:
        return True
    return isinstance(value, dict) and all(
        _is_pattern(k) and _is_usable(one, v) for k, v in value.items()
    )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _scaling(config: Mapping[str, Any], module: str, rank: int, problems: list[str]) -> float:
    """Scaling ``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA."""
    declared = _pattern(config.get("rank_pattern"), module, config["r"])
    if declared != rank:
        problems.append(f"{module}: rank {rank}, its config says {declared}")
        return 0.0
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
