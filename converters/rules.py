"""Rules by which every tensor of a checkpoint is consumed, or dropped for a written reason."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_alm.checkpoint import Checkpoint
from hooked_alm.components.lora import plus_low_rank
from hooked_alm.components.rotary import rotary_frequencies
from hooked_alm.config import HookedALMConfig
from hooked_alm.errors import ConversionError
from hooked_alm.model import HookedALM

from .devices import Destinations

N_SHOWN = 10
"""Tensors that a refusal names."""


@dataclass(frozen=True)
class Rename:
    """Checkpoint names that match ``pattern`` become ``target``, which may name its groups."""

    pattern: str
    target: str
    dtype: torch.dtype | None = None
    """Dtype that the parameter keeps, whatever the other weights are loaded in."""


@dataclass(frozen=True)
class Drop:
    """Checkpoint names that match ``pattern`` are left out, because of ``reason``."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Split:
    """A fused tensor whose rows, one after the other, fill several parameters."""

    pattern: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Lora:
    """A factor of ``scaling * B @ A``, which is added to a parameter on loading."""

    pattern: str
    target: str
    factor: Literal["A", "B"]
    scaling: float
    """Scaling ``alpha / r`` of the product."""


@dataclass(frozen=True)
class Frequencies:
    """Rotary frequencies, which older files keep; compared with the config's, and left out.

    Hugging Face ignores them, so a file whose config says otherwise than its weights were trained
    with is silently another model there.
    """

    pattern: str
    module: str = "rotary"
    """Module of ours whose ``inv_freq`` they must be."""


Rule = Rename | Drop | Split | Lora | Frequencies


@dataclass(frozen=True)
class Update:
    """An addition to a parameter: the checkpoint names of its factors, and their scaling."""

    a: str
    b: str
    scaling: float


@dataclass(frozen=True)
class WeightPlan:
    """Tensors of a checkpoint that fill the parameters of a model, by name."""

    sources: Mapping[str, str]
    """Parameter -> checkpoint name."""
    dropped: Mapping[str, str]
    """Checkpoint name -> reason."""
    rows: Mapping[str, tuple[int, int]]
    """Parameter -> range of the rows of its source that it is, if not all of them."""
    updates: Mapping[str, Update]
    """Parameter -> what is added to it."""
    dtypes: Mapping[str, torch.dtype]
    """Parameter -> its dtype, if it has one of its own."""
    frequencies: Mapping[str, str]
    """Checkpoint name of rotary frequencies -> the module that has them."""


def plan(
    checkpoint: Checkpoint,
    rules: Sequence[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Iterable[str] = (),
    counts: Mapping[str, torch.dtype] | None = None,
) -> WeightPlan:
    """Match checkpoint names with parameters; the first rule that fits a name decides.

    Args:
        checkpoint: names, shapes and dtypes on disk.
        rules: see ``Rename``, ``Drop``, ``Split``, ``Lora`` and ``Frequencies``.
        shapes: the model's parameters.
        tied: parameters that the config declares equal to another one, so that they may be absent.
        counts: those of them that hold whole numbers, and in which dtype.

    Raises:
        ConversionError: names no rule knows, two names for one parameter, parameters left
            unfilled, wrong shapes or dtypes; all offenders at once.
    """
    sources: dict[str, str] = {}
    dropped: dict[str, str] = {}
    rows: dict[str, tuple[int, int]] = {}
    factors: dict[str, dict[str, str]] = {}
    scaling: dict[str, float] = {}
    dtypes: dict[str, torch.dtype] = {**(counts or {})}
    frequencies: dict[str, str] = {}
    problems: list[str] = []
    for name, shape in checkpoint.items():
        rule = rule_for(rules, name)
        if isinstance(rule, Drop):
            dropped[name] = rule.reason
            continue
        if isinstance(rule, Frequencies):
            frequencies[name] = rule.module
            dropped[name] = "rotary frequencies, which the config gives"
            problems += _wrong(checkpoint, name, torch.float32)
            continue
        given = () if rule is None else rule.targets if isinstance(rule, Split) else (rule.target,)
        targets = [re.sub(rule.pattern, one, name) for one in given if rule is not None]
        if not targets or not {*targets} <= {*shapes}:
            problems.append(f"unexpected tensor {name} {list(shape)}")
            continue
        problems += _wrong(checkpoint, name, dtypes.get(targets[0], torch.float32))
        if isinstance(rule, Lora):
            factors.setdefault(targets[0], {})[rule.factor] = name
            scaling[targets[0]] = rule.scaling
            continue
        problems += [
            f"{name} and {sources[target]} both fill {target}"
            for target in targets
            if target in sources
        ]
        expected = shapes[targets[0]]
        if len(targets) > 1:
            ends = list(accumulate((shapes[target][0] for target in targets), initial=0))
            expected = (ends[-1], *expected[1:])
            rows |= dict(zip(targets, pairwise(ends), strict=True))
        if shape != expected:
            problems.append(f"{name} has shape {list(shape)}, expected {list(expected)}")
        sources |= dict.fromkeys(targets, name)
        if isinstance(rule, Rename) and rule.dtype is not None:
            dtypes[targets[0]] = rule.dtype
    for target, names in factors.items():
        problems += _misfits(checkpoint, target, names, shapes[target])
    problems += [
        f"missing tensor for {target} {list(shape)}"
        for target, shape in shapes.items()
        if target not in sources and target not in tied
    ]
    if problems:
        shown = "\n  ".join(problems[:N_SHOWN])
        n_more = len(problems) - N_SHOWN
        more = f"\n  and {n_more} more" if n_more > 0 else ""
        raise ConversionError(
            f"converting {checkpoint.folder}: {len(problems)} tensors do not fit the model that "
            f"its config.json describes:\n  {shown}{more}\nIs it the right folder, and complete?"
        )
    updates = {target: Update(f["A"], f["B"], scaling[target]) for target, f in factors.items()}
    return WeightPlan(
        sources=sources,
        dropped=dropped,
        rows=rows,
        updates=updates,
        dtypes=dtypes,
        frequencies=frequencies,
    )


def _wrong(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> list[str]:
    """The problem with a tensor's dtype, if it has one."""
    return [wrong] if (wrong := checkpoint.misfit(name, dtype)) else []


def _misfits(
    checkpoint: Checkpoint, target: str, factors: Mapping[str, str], shape: tuple[int, ...]
) -> list[str]:
    """Problems with the factors of an update, as sentences."""
    if missing := sorted({"A", "B"} - {*factors}):
        return [f"{next(iter(factors.values()))} has no factor {missing[0]} beside it"]
    a, b = checkpoint[factors["A"]], checkpoint[factors["B"]]
    if len(a) == len(b) == 2 and (b[0], a[1]) == shape and a[0] == b[1]:
        return []
    return [
        f"{factors['B']} {list(b)} times {factors['A']} {list(a)} does not fit {target} "
        f"{list(shape)}"
    ]


def plan_of(model: HookedALM, checkpoint: Checkpoint, rules: Sequence[Rule]) -> WeightPlan:
    """The plan for a model that is laid out; see ``plan``."""
    stored = [*model.named_parameters(), *_stored_buffers(model)]
    shapes = {name: tuple(value.shape) for name, value in stored}
    tied = ("unembed.weight",) if model.cfg.tie_word_embeddings else ()
    counts = {name: value.dtype for name, value in stored if not value.is_floating_point()}
    return plan(checkpoint, rules, shapes, tied=tied, counts=counts)


def _stored_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds beside the parameters, such as a batch norm's statistics."""
    for name, module in model.named_modules():
        for leaf, value in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                yield f"{name}.{leaf}", value


def rule_for(rules: Sequence[Rule], name: str) -> Rule | None:
    """The first rule that fits a checkpoint name, or None."""
    return next((r for r in rules if re.fullmatch(r.pattern, name)), None)


def target_of(rules: Sequence[Rule], name: str) -> str | None:
    """The parameter that a checkpoint name fills by itself, or None."""
    rule = rule_for(rules, name)
    return re.sub(rule.pattern, rule.target, name) if isinstance(rule, Rename) else None


@torch.inference_mode(mode=False)  # inference tensors do not count the edits made to them
def fill(
    model: nn.Module,
    cfg: HookedALMConfig,
    checkpoint: Checkpoint,
    found: WeightPlan,
    placement: Destinations,
) -> None:
    """Put tensors in place of the model's empty parameters and buffers, one at a time.

    Raises:
        ConversionError: tensors that hold what no weights are, or other rotary frequencies.
    """
    for name, rotary in found.frequencies.items():
        ours: Any = model.get_submodule(rotary).inv_freq
        _check_frequencies(checkpoint, name, ours, cfg)
    for target, source in found.sources.items():
        owner_name, _, leaf = target.rpartition(".")
        owner = model.get_submodule(owner_name)
        device = placement.filled_on(target)
        value = checkpoint.read(source, found.dtypes.get(target, cfg.dtype)).to(device)
        stored = checkpoint.stored_at(source)
        if target in found.rows:  # of its own memory, or each part would keep the whole
            value, stored = value[slice(*found.rows[target])].clone(), None
        if (update := found.updates.get(target)) is not None:
            a, b = (
                checkpoint.read(name, torch.float32).to(device) for name in (update.a, update.b)
            )
            value, stored = plus_low_rank(value, a, b, update.scaling), None
        if leaf not in owner._buffers:
            value = placement.put(target, value, stored)
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        setattr(owner, leaf, value)
    for name, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):  # those that no file holds, too
            setattr(module, leaf, placement.put_buffer(f"{name}.{leaf}", buffer))


def _check_frequencies(
    checkpoint: Checkpoint, name: str, ours: Tensor, cfg: HookedALMConfig
) -> None:
    """Compare stored rotary frequencies with the config's, as far as they were rounded.

    Raises:
        ConversionError: they differ.
    """
    stored = checkpoint.read(name, torch.float32)
    # Whatever they are stored in, they were rounded to what the model was kept in.
    halves = (torch.bfloat16, torch.float16)
    kept = next((one for one in halves if torch.equal(stored.to(one).float(), stored)), None)
    rounding = torch.finfo(kept or torch.float32)
    rtol, atol = max(rounding.eps, 1e-5), rounding.tiny * rounding.eps
    expected = [ours]
    if (rope := cfg.rope_parameters)["rope_type"] != "default":
        # Files from before transformers 4.38 scale the positions, and keep frequencies without.
        plain = replace(cfg, rope_parameters={**rope, "rope_type": "default"})
        expected.append(rotary_frequencies(plain)[0])
    if not any(
        stored.shape == one.shape and torch.allclose(stored, one.cpu(), rtol=rtol, atol=atol)
        for one in expected
    ):
        raise ConversionError(
            f"converting {checkpoint.folder}: {name} holds the rotary frequencies "
            f"{stored.tolist()!s:.60}, expected {ours.tolist()!s:.60}, which {rope} of its "
            "config.json gives. Take the config that these weights were trained with."
        )
