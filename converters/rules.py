"""Every tensor of a checkpoint is consumed, or dropped with a written reason."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hooked_alm.checkpoint import Checkpoint
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import ConversionError


@dataclass(frozen=True)
class Rename:
    """Checkpoint names that match ``pattern`` become ``target``, which may name its groups."""

    pattern: str
    target: str


@dataclass(frozen=True)
class Drop:
    """Checkpoint names that match ``pattern`` are left out, because of ``reason``."""

    pattern: str
    reason: str


Rule = Rename | Drop


@dataclass(frozen=True)
class Plan:
    """Which tensor of the checkpoint fills which parameter."""

    sources: Mapping[str, str]
    """Parameter -> checkpoint name."""
    dropped: Mapping[str, str]
    """Checkpoint name -> reason."""


def plan(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Iterable[str] = (),
) -> Plan:
    """Match checkpoint names with parameters; the first rule that fits a name decides.

    Args:
        checkpoint: names and shapes on disk.
        rules: see ``Rename`` and ``Drop``.
        shapes: the model's parameters.
        tied: parameters that the config declares equal to another one, so that they may be absent.

    Raises:
        ConversionError: names no rule knows, two names for one parameter, parameters left
            unfilled, wrong shapes; all offenders at once.
    """
    sources: dict[str, str] = {}
    dropped: dict[str, str] = {}
    problems: list[str] = []
    for name, shape in checkpoint.items():
        rule = next((r for r in rules if re.fullmatch(r.pattern, name)), None)
        if isinstance(rule, Drop):
            dropped[name] = rule.reason
            continue
        target = None if rule is None else re.sub(rule.pattern, rule.target, name)
        if target is None or target not in shapes:
            problems.append(f"unexpected tensor {name} {list(shape)}")
            continue
        if target in sources:
            problems.append(f"{name} and {sources[target]} both fill {target}")
        elif shape != shapes[target]:
            problems.append(f"{name} has shape {list(shape)}, expected {list(shapes[target])}")
        sources[target] = name
    problems += [
        f"missing tensor for {target} {list(shape)}"
        for target, shape in shapes.items()
        if target not in sources and target not in tied
    ]
    if problems:
        shown = "\n  ".join(problems[:40])
        more = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise ConversionError(
            f"converting {checkpoint.folder}: {len(problems)} tensors do not fit the model that "
            f"its config.json describes:\n  {shown}{more}\nIs it the right folder, and complete?"
        )
    return Plan(sources=sources, dropped=dropped)


@torch.inference_mode(mode=False)  # inference tensors do not count the edits made to them
def fill(
    model: nn.Module, cfg: HookedALMConfig, checkpoint: Checkpoint, sources: Mapping[str, str]
) -> None:
    """Put tensors in place of the model's empty parameters, one at a time."""
    for target, source in sources.items():
        owner_name, _, leaf = target.rpartition(".")
        owner = model.get_submodule(owner_name)
        value = checkpoint.read(source, cfg.dtype).to(cfg.device)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
