"""Neurons patched, shifted or pruned while a model hears a clip that may be attacked.

Source: SPIRIT, mbzuai-nlp/spirit-breaking@e3044bd, ``noise_defender.py``; M-SP-3.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ..neurons.activity import NeuronSite
from ..statistics.class_neurons import Neuron
from .places import EVERY, NeuronPlace, NeuronRows, by_point

RowHook = tuple[str, Callable[[Tensor, Any], Tensor]]
DefenceKind = Literal["patch", "bias", "prune"]
"""A donor's values, a constant that is added, or 0. At a gate, a constant b moves what the MLP's
last projection reads by b times the other factor; 0 is the gain -1 of M-ESN-4."""


@torch.no_grad()
def donor_values(
    model: HookedALM,
    x: ALMInput,
    place: NeuronPlace,
    neurons: Sequence[Neuron],
    site: NeuronSite = "gate",
) -> dict[str, Float[Tensor, "prompt row neuron"]]:
    """What some neurons do in a run, by hook point: the values of a patch; one forward.

    Args:
        model: to run.
        x: prompts.
        place: whose neurons these are.
        neurons: a block and a number each.
        site: see ``neuron_points``.

    Raises:
        InputError: neurons that there are not.
    """
    rows, found = NeuronRows.of(model, x, place), dict[str, Tensor]()

    def keep(value: Tensor, hook: Any, units: list[int]) -> None:
        found[hook.name] = rows.by_prompt(hook.name, value)[..., units].clone()

    chosen = by_point(model, place, neurons, site)
    hooks = [(name, partial(keep, units=units)) for name, units in chosen.items()]
    model.run_with_hooks(x, fwd_hooks=hooks)
    return found


def defence_hooks(
    model: HookedALM,
    x: ALMInput,
    place: NeuronPlace,
    neurons: Sequence[Neuron],
    kind: DefenceKind,
    *,
    donor: ALMInput | None = None,
    bias: int | float = 1.0,
    span: str = EVERY,
    last: int | None = None,
    every_step: bool = False,
    site: NeuronSite = "gate",
) -> list[RowHook]:
    """Hooks that hold some neurons: of ``run_with_hooks``, ``generate``, ``hooks``.

    ::

        hooks = defence_hooks(model, x, "lm", neurons, "patch", donor=denoised)
        logits = model.run_with_hooks(x, fwd_hooks=hooks)

    Args:
        model: that runs.
        x: the prompts that it will run on.
        place: whose neurons these are.
        neurons: a block and a number each.
        kind: what becomes of their values.
        donor: of a patch: the same prompts with other clips of the same length; they run once.
        bias: that is added.
        span: whose rows are held; ``all`` is every one.
        last: how many of them, from the end; None is every one.
        every_step: hold tokens that are generated, too. A patch has no value for these.
        site: see ``neuron_points``. A patch of the gate leaves what passes the other factor.

    Raises:
        InputError: neurons that there are not, a patch without a donor of the same rows or at
            every step, or a span that the prompts lack.
    """
    rows = NeuronRows.of(model, x, place)
    mask, chosen = rows.mask(span, last), by_point(model, place, neurons, site)
    values: dict[str, Tensor] = {}
    if kind == "patch":
        values = donor_values(model, _checked(x, donor, every_step), place, neurons, site)
    hooks: list[RowHook] = []
    for name, units in chosen.items():
        hold = partial(_held, units=units, kind=kind, theirs=values.get(name), bias=bias)
        hooks.append((
            name, partial(_hook, rows=rows, mask=mask, hold=hold, every_step=every_step)
        ))  # fmt: skip
    return hooks


def _checked(x: ALMInput, donor: ALMInput | None, every_step: bool) -> ALMInput:
    """The donor of a patch.

    Raises:
        InputError: see ``defence_hooks``.
    """
    if donor is None or donor.shape != x.shape:
        got = "none" if donor is None else f"prompts of shape {tuple(donor.shape)}"
        raise InputError(
            f"patching neurons from a donor: got {got}, expected the prompts themselves, of shape "
            f"{tuple(x.shape)}, with clips of the same length."
        )
    if every_step:
        raise InputError(
            "patching every step: the donor has values for the prompt alone. Leave every_step out, "
            "or add a bias, or prune."
        )
    return donor


def _hook(
    value: Tensor, hook: Any, *, rows: NeuronRows, mask: Tensor, hold: Any, every_step: bool
) -> Tensor:
    flat = rows.by_prompt(hook.name, value)
    n_new = flat.shape[1] - mask.shape[1]
    if n_new < 0:  # a step of generation, whose prompt is in the cache
        mask = mask.new_full(flat.shape[:2], every_step)
    elif n_new > 0:  # without a cache the prompt comes again
        mask = F.pad(mask, (0, n_new), value=every_step)
    changed = flat.clone()
    changed[mask] = hold(flat[mask], mask=mask)
    return rows.by_window(hook.name, changed, value)


def _held(
    values: Float[Tensor, "held d_mlp"],
    *,
    mask: Bool[Tensor, "batch row"],
    units: list[int],
    kind: DefenceKind,
    theirs: Float[Tensor, "batch _row neuron"] | None,
    bias: int | float,
) -> Float[Tensor, "held d_mlp"]:
    """Rows with some neurons at other values."""
    values = values.clone()
    if theirs is not None:
        # As many rows as run: new tokens have none, and are not held.
        fitted = F.pad(theirs, (0, 0, 0, mask.shape[1] - theirs.shape[1]))
        values[:, units] = fitted.to(values)[mask]
    elif kind == "bias":
        values[:, units] += bias
    else:
        values[:, units] = 0
    return values
