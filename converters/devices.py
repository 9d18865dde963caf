"""``device_map`` as transformers takes it: a strategy, one device, or module -> device.

A device may be "cpu", whose weights run on the first accelerator of the map if it has one, or
"disk", whose weights stay in files: the checkpoint's own where it has them as they are, else copies
in a folder that goes when the model does.
"""

import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooked_alm.components.block import Block
from hooked_alm.config import check_device
from hooked_alm.encoder import HookedEncoder
from hooked_alm.errors import InputError, nearest
from hooked_alm.model import HookedALM
from hooked_alm.offload import home_of, read_on_demand

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Names of accelerate's ways to spread a model over what devices there are."""
DISK = "disk"
Device = str | int
DeviceMap = str | dict[str, Device]
MaxMemory = Mapping[int | str, int | str]
"""Bytes by device, as a number or as text such as "20GiB"."""


def read_device_map(device_map: Any) -> DeviceMap:
    """A strategy, or module -> device, where ``""`` is the whole model.

    Raises:
        InputError: something else, or a device that is not there.
    """
    if isinstance(device_map, str) and device_map in STRATEGIES:
        return device_map
    if isinstance(device_map, str | torch.device) or type(device_map) is int:
        device_map = {"": device_map}
    if not isinstance(device_map, Mapping) or not device_map:
        raise _no_map(device_map)
    found: dict[str, Device] = {}
    for name, device in device_map.items():
        is_device = isinstance(device, str | torch.device) or (type(device) is int and device >= 0)
        if not isinstance(name, str) or not is_device or str(device) == "meta":
            raise _no_map(device_map)
        if device != DISK:
            check_device("loading a model by a device_map on", device)
        found[name] = device if type(device) is int else str(device)
    return found


def _no_map(device_map: Any) -> InputError:
    return InputError(
        f"loading a model: got device_map={device_map!r:.60}, expected one of "
        f"{', '.join(STRATEGIES)}, a device such as 'cpu', 'cuda:0', 0 or 'disk', or a dict of "
        "modules and devices."
    )


def check_modules(model: HookedALM, device_map: DeviceMap) -> None:
    """Check that a map names modules of the model, and leaves none of its weights out.

    Raises:
        InputError: it does not, or it takes a block apart.
    """
    if isinstance(device_map, str):
        return
    modules = dict(model.named_modules())
    if unknown := [name for name in device_map if name not in modules]:
        raise InputError(
            f"loading a model: its device_map names {unknown[0]!r} (nearest: "
            f"{nearest(unknown[0], filter(None, modules))}), expected modules as they are called "
            "here. `print(model)` lists them."
        )
    blocks = [f"{name}." for name, module in modules.items() if isinstance(module, Block)]
    if inside := [name for name in device_map if name.startswith(tuple(blocks))]:
        raise InputError(
            f"loading a model: its device_map names {inside[0]!r}, expected blocks whole: the "
            "stream is added up within them. Give the block's device."
        )
    if "" in device_map:
        return
    covered = re.compile("|".join(rf"{re.escape(name)}\..+" for name in device_map))
    left = [name for name, _ in model.named_parameters() if not covered.fullmatch(name)]
    if left:
        raise InputError(
            f"loading a model: its device_map has no place for {len(left)} tensors, {left[0]} "
            "among them. Name every module, or give '' for the rest."
        )


def read_max_memory(max_memory: Any, device_map: DeviceMap | None) -> MaxMemory | None:
    """Bytes that a strategy may use of each device; devices that are not named stay empty.

    Raises:
        InputError: no such device or number, or no strategy that would ask for it.
    """
    from accelerate.utils import convert_file_size_to_int

    if max_memory is None:
        return None
    if not isinstance(device_map, str):
        raise InputError(
            f"loading a model: got max_memory={max_memory!r:.60} without a strategy that spreads "
            f"the model. Give device_map as one of {', '.join(STRATEGIES)}."
        )
    try:
        found = {name: convert_file_size_to_int(size) for name, size in max_memory.items()}
        is_sound = bool(found) and all(type(size) is int and size >= 0 for size in found.values())
    except (AttributeError, TypeError, ValueError):
        is_sound = False
    if not is_sound or any(isinstance(name, bool) for name in found):
        raise InputError(
            f"loading a model: got max_memory={max_memory!r:.60}, expected bytes by device, such "
            "as {0: '20GiB', 'cpu': '60GiB'}."
        )
    for name in found:
        check_device("loading a model with max_memory of", name)
    return found


def whole_modules(model: nn.Module, device_map: Mapping[str, Device]) -> dict[str, Device]:
    """A map without a module inside another, which accelerate would put where the outer one is.

    Tensors that modules taken apart have of their own are in it by their names.
    """
    every = (model.named_parameters, model.named_buffers)
    # Of a tied weight, both names.
    tensors = {name for named in every for name, _ in named(remove_duplicate=False)}
    apart = {
        ".".join(name.split(".")[:n]) if n else ""
        for name in device_map
        for n in range(name.count(".") + 1 if name else 0)
    }
    main = main_device(device_map)
    found: dict[str, Device] = {}

    def walk(module: nn.Module, name: str, device: Device | None) -> None:
        device = device_map.get(name, device)
        below = f"{name}." if name else ""
        if name not in apart:
            # Hook points stay where the stream passes them.
            if device is not None and any(one.startswith(below) for one in tensors):
                found[name] = device
            return
        for leaf, child in module.named_children():
            walk(child, below + leaf, device)
        for leaf in {*module._parameters, *module._buffers}:
            # These few are kept: nothing brings them in.
            own = device_map.get(below + leaf, device)
            if below + leaf in tensors and own is not None:
                found[below + leaf] = main if own in ("cpu", DISK) else own

    walk(model, "", None)
    return found


def main_device(device_map: Mapping[str, Device]) -> Device:
    """The first accelerator of a map, or the CPU."""
    return next((one for one in device_map.values() if one not in ("cpu", DISK)), "cpu")


@dataclass(eq=False)
class Destinations:
    """Where every weight of a model goes."""

    devices: Mapping[str, Device]
    """Module -> device, none inside another; ``""`` is the whole model."""
    offload_folder: Path | None = None
    """Where a folder for copies may be made; None is the system's own place."""
    passes_memory: bool = False
    """Whether weights for the disk are held in memory until the model is dispatched, because they
    are still to be changed."""
    files: dict[str, Any] = field(default_factory=dict)
    """What accelerate wants to know of each weight on the disk."""
    _copies: Path | None = None

    @property
    def main(self) -> Device:
        """Device on which those modules run whose weights are kept elsewhere."""
        return main_device(self.devices)

    @property
    def is_spread(self) -> bool:
        """Whether accelerate has anything to do."""
        return len({*self.devices.values()}) > 1 or DISK in self.devices.values()

    def device_of(self, name: str) -> Device:
        """The device of a tensor: that of the nearest module above it which has one."""
        while name and name not in self.devices:
            name = name.rpartition(".")[0]
        return self.devices[name]

    def filled_on(self, name: str) -> Device:
        """Device on which a tensor is made from what a checkpoint has."""
        device = self.device_of(name)
        return "cpu" if device == DISK else device

    def put(self, name: str, value: Tensor, stored: tuple[Path, str] | None) -> Tensor:
        """A weight where it belongs; what stays on the disk is on ``meta``.

        Args:
            name: of the parameter.
            value: the weight.
            stored: safetensors file that has the weight as it is but for the dtype, and its name
                there.
        """
        from accelerate.utils import offload_weight

        if self.device_of(name) != DISK or self.passes_memory:
            return value.to(self.filled_on(name))
        if stored is None:
            offload_weight(value, name, str(self._folder()), self.files)
        else:
            self.files[name] = {
                "safetensors_file": str(stored[0].absolute()),
                "weight_name": stored[1],
                "dtype": str(value.dtype).removeprefix("torch."),
            }
        return value.to("meta")

    def put_buffer(self, name: str, value: Tensor) -> Tensor:
        """A buffer where it is read: never on the disk."""
        device = self.device_of(name)
        return value.to(self.main if device in ("cpu", DISK) else device)

    def dispatch(self, model: HookedALM) -> None:
        """Have every module run on its device, and read what no device holds when it is needed."""
        from accelerate import dispatch_model

        if self.is_spread:
            dispatch_model(
                model,
                device_map=dict(self.devices),
                main_device=self.main,
                offload_dir=self._folder() if self._copies or self.passes_memory else None,
                offload_index=None if self.passes_memory else self.files,
            )
            self._take_over(model)
            # First, so that pickle comes here before it comes to what accelerate attached.
            model.__dict__ = {"placement": self, **vars(model)}
        model.cfg.device = home_of(model.embed)

    def _take_over(self, model: HookedALM) -> None:
        """Leave accelerate the inputs, and have modules read their own weights."""
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model)
        # Bound to this object, so that they would run for those that `towards` gives.
        for name in [name for name in ("forward", "to", "cuda") if name in vars(model)]:
            delattr(model, name)
        for module in model.modules():
            for hook in _offloading(module):
                # A weight that nobody calls for by its module's forward is never brought in.
                read = hook.weights_map.__getitem__
                read_on_demand(module, read, torch.device(hook.execution_device))
                hook.offload = False
                hook.weights_map.dataset.placement = self  # copies go when nothing reads them

    def __deepcopy__(self, memo: Any) -> "Destinations":
        """Itself: copies of a model read the same files, which go with the last of them."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """None: other processes have neither the devices nor the files.

        Raises:
            InputError: always, which is when a model that is spread is pickled.
        """
        raise InputError(
            "pickling a model: got one that a device_map spreads, whose weights may be anywhere, "
            "expected one in one piece. Send the name of its checkpoint and the device_map "
            "instead, and load it where it is needed."
        )

    def _folder(self) -> Path:
        if self._copies is None:
            self._copies = Path(tempfile.mkdtemp(prefix="hooked-alm-", dir=self.offload_folder))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        return self._copies


def _offloading(module: nn.Module) -> Iterator[Any]:
    """Hooks of accelerate that would load and unload a module's own weights."""
    from accelerate.hooks import AlignDevicesHook

    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if isinstance(one, AlignDevicesHook) and one.offload:
            yield one


def spread(
    model: HookedALM,
    strategy: str,
    max_memory: MaxMemory | None,
    dtypes: Mapping[str, torch.dtype],
) -> dict[str, Device]:
    """Devices of a model's modules by one of ``STRATEGIES``; the model may still be empty.

    Args:
        model: laid out, tied weights tied.
        strategy: its name.
        max_memory: see ``read_max_memory``.
        dtypes: of parameters that keep one of their own.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    # A front-end's parts may read each other's weights, so that only blocks keep them apart.
    parts = () if model.audio is None else model.audio.children()
    whole = {"Block", *(type(one).__name__ for one in parts if not isinstance(one, HookedEncoder))}
    sizes: dict[str, Any] = {
        "no_split_module_classes": sorted(whole),
        "dtype": model.cfg.dtype,
        "special_dtypes": dict(dtypes),
    }
    memory = get_max_memory(None if max_memory is None else dict(max_memory))
    if strategy != "sequential":
        low_zero = strategy == "balanced_low_0"
        memory = get_balanced_memory(model, memory, low_zero=low_zero, **sizes)
    return dict(infer_auto_device_map(model, memory, **sizes))
