"""Gradients of a metric at the activations of a run: what every attribution is made of."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.runs import Runs
from ...errors import InputError
from ...hooks import HookPoint
from ...inputs import ALMInput
from ...model import HookedALM
from ...turns import restored
from ..patching.measurement import Measurement
from ..patching.metrics import OnLogits


@dataclass(frozen=True, eq=False)
class GradientRun:
    """Activations of some rows of the batch, and the gradient of one value of the metric."""

    rows: list[int]
    """Rows of the batch that are axis 0 of the activations."""
    label: int
    """Index of the metric's value; 0 where it has one."""
    values: dict[str, Tensor]
    """Activations by hook name, as the hook shows them."""
    gradients: dict[str, Tensor]
    """Gradients by hook name. A row's metric depends on that row alone, so these are each row's
    own."""


def gradient_runs(
    measured: Measurement,
    embeddings: Float[Tensor, "batch pos d_model"],
    names: Sequence[str],
    *,
    rows_at_once: int | None = None,
) -> Iterator[GradientRun]:
    """Run the base from some embeddings, and differentiate its metric.

    Weights are frozen meanwhile and their gradients untouched; audio is not encoded again.

    Args:
        measured: the base, its runs without gradients, and the metric.
        embeddings: what enters the first block; the base's own, or others in their place.
        names: hook points, of those that lie on the path of the computation.
        rows_at_once: rows whose graph is held at a time; None is the whole batch.

    Yields:
        For every part of the batch, one run per value of the metric.

    Raises:
        InputError: the metric has no gradient.
    """
    n = rows_at_once or len(measured.base)
    for start in range(0, len(measured.base), n):
        rows = list(range(len(measured.base)))[start : start + n]
        held, sums = _forward(measured, embeddings[rows], names, rows)
        for label, total in enumerate(sums):
            found = torch.autograd.grad(
                total,
                [held[name] for name in names],
                retain_graph=label < len(sums) - 1,
                allow_unused=True,
                materialize_grads=True,
            )
            values = {name: held[name].detach() for name in names}
            yield GradientRun(rows, label, values, dict(zip(names, found, strict=True)))


def _forward(
    measured: Measurement, embeddings: Tensor, names: Sequence[str], rows: list[int]
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Activations, and every value of the metric summed over some rows, in one graph."""
    model, records = measured.model, measured.base_runs.records
    held: dict[str, Tensor] = {}

    def hold(value: Tensor, hook: HookPoint) -> None:
        held[str(hook.name)] = value

    root = embeddings.detach().clone().requires_grad_()
    hooks = [(name, hold) for name in names]
    with torch.enable_grad(), frozen(model), model.hooks(fwd_hooks=hooks):
        stream = model(
            root, start_at_layer=0, stop_at_layer=len(model.path), inputs=measured.base[rows]
        )
        readouts = measured.readouts(measured.base, measured.base_runs)
        found = []
        for i, row in enumerate(rows):
            where = records[row].where
            is_whole = isinstance(measured.metric, OnLogits)
            read = stream[i, where if is_whole else where[readouts[row]]]
            found.append(measured.of_stream(read[None], row)[0])
        total = torch.stack(found).sum(dim=0)
        sums = total.flatten().unbind()
    if not total.requires_grad:
        raise InputError(
            f"differentiating {type(measured.metric).__name__}: it is constant where it is not "
            "undefined, so it has no gradient. Attribute a logit difference or a log-probability."
        )
    return held, sums


def embeddings_of(runs: Runs, x: ALMInput) -> Float[Tensor, "batch pos d_model"]:
    """Embeddings that entered the first block of recorded runs; zeros at pads, read by nothing."""
    first = runs.records[0].resid[0]
    stream = first.new_zeros(*x.shape, first.shape[-1])
    for row, record in enumerate(runs.records):
        stream[row, record.where] = record.resid[0]
    return stream


@contextmanager
def frozen(model: HookedALM) -> Iterator[None]:
    """Switch gradients of the weights off within the context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def switch(on: bool) -> None:
        for parameter in trained:
            parameter.requires_grad_(on)

    with model.turn.running(), restored(partial(switch, True)):
        switch(False)
        yield
