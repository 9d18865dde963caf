"""``device_map`` as transformers takes it: a strategy, one device, or module -> device."""

import re
from typing import Any

import torch

from hooked_alm.config import check_device
from hooked_alm.errors import InputError, nearest
from hooked_alm.model import HookedALM

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names of accelerate's ways to spread a model over what devices there are."""
DeviceMap = str | dict[str, Any]


def read_device_map(device_map: Any) -> DeviceMap:
    """A strategy, or module -> device, where ``""`` is the whole model.

    Raises:
        InputError: something else, or a device that is not there.
    """
    if isinstance(device_map, str) and device_map in STRATEGIES:
        return device_map
    if isinstance(device_map, str | torch.device) or type(device_map) is int:
        device_map = {"": device_map}
    if not isinstance(device_map, dict) or not device_map:
        raise _no_map(device_map)
    for name, device in device_map.items():
        is_device = isinstance(device, str | torch.device) or (type(device) is int and device >= 0)
        if not isinstance(name, str) or not is_device or device == "disk":
            raise _no_map(device_map)
        check_device("loading a model by a device_map on", device)
    return device_map


def _no_map(device_map: Any) -> InputError:
    return InputError(
        f"loading a model: got device_map={device_map!r:.60}, expected one of "
        f"{', '.join(STRATEGIES)}, a device such as 'cpu', 'cuda:0' or 0, or a dict of modules and "
        "devices. Weights are not left on the disk."
    )


def check_modules(model: HookedALM, device_map: DeviceMap) -> None:
    """Check that a map names modules of the model, and leaves none of its weights out.

    Raises:
        InputError: it does not.
    """
    if isinstance(device_map, str) or "" in device_map:
        return
    names = [name for name, _ in model.named_modules() if name]
    if unknown := [name for name in device_map if name not in names]:
        raise InputError(
            f"loading a model: its device_map names {unknown[0]!r} (nearest: "
            f"{nearest(unknown[0], names)}), expected modules as they are called here. "
            "`print(model)` lists them."
        )
    covered = re.compile("|".join(rf"{re.escape(name)}\..+" for name in device_map))
    left = [name for name, _ in model.named_parameters() if not covered.fullmatch(name)]
    if left:
        raise InputError(
            f"loading a model: its device_map has no place for {len(left)} tensors, {left[0]} "
            "among them. Name every module, or give '' for the rest."
        )


def place(model: HookedALM, device_map: DeviceMap) -> None:
    """Move a model's modules to their devices."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    if isinstance(device_map, str):
        whole: Any = {"no_split_module_classes": ["Block"]}
        memory = get_max_memory()
        if device_map != "sequential":
            low_zero = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, memory, low_zero=low_zero, **whole)
        device_map = infer_auto_device_map(model, memory, **whole)
    dispatch_model(model, device_map=device_map)
