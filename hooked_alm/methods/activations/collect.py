"""Rows of a run: of a ``HookedALM`` at any spans, or of any module's outputs."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from ...encoder_rows import EncoderRows, n_real_states
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...spans import SPAN_NAMES
from ...turns import restored
from .rows import ActivationRows, IndexColumn, check_labels, text_column
from .selection import KeptPoint, RowKind, kept_points, select_names, spans_by_kind

ENCODER_SPANS = ("audio", "padding")
RowPlaces = Int64[np.ndarray, " row"]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """The rows that are kept of one kind of points, by prompt and padded position."""

    prompt: RowPlaces
    position: RowPlaces
    index: dict[str, IndexColumn]
    at: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The same on the devices of the points, where each would wait for them otherwise."""

    def of(self, value: Tensor) -> Tensor:
        """Those rows of ``[batch, pos, ...]``, the axes behind laid side by side."""
        if value.device not in self.at:
            prompt, position = map(torch.from_numpy, (self.prompt, self.position))
            self.at[value.device] = prompt.to(value.device), position.to(value.device)
        return value.detach()[self.at[value.device]].flatten(1)


@torch.no_grad()
def rows_of(
    model: HookedALM,
    x: ALMInput,
    points: str | Iterable[str] | Sequence[KeptPoint],
    spans: str | Sequence[str] = "audio",
    *,
    labels: Mapping[str, Sequence[str]] | None = None,
    first_prompt: int = 0,
) -> dict[RowKind, ActivationRows]:
    """Rows of some points at some spans, from one run that goes no deeper than it has to.

    Rows are those of ``run_with_cache``, bit by bit; positions in several spans are kept once,
    under the first of them that was named.

    Args:
        model: to run; what hooks it has act.
        x: prompts. In the encoder, rows are those of ``model.encoder_rows(x)``.
        points: names or patterns of points, or what ``kept_points`` made of them, once for many
            runs.
        spans: of ``x.spans`` for points of the decoder, ``audio`` and ``padding`` for those of the
            encoder; ``all`` is every one but pads and padding.
        labels: further columns, one text for each prompt: the speaker, an emotion.
        first_prompt: number of the first prompt, for the column ``prompt``.

    Returns:
        ``prompt`` -> rows of the decoder's points, ``encoder`` -> rows of the encoder's; of these
        the kinds that were asked for.

    Raises:
        HookNameError: see ``kept_points``.
        InputError: a span that the prompts lack, labels that do not fit, or prompts without audio
            for points of the encoder.
    """
    kept = kept_points(model, points)
    labels = labels or {}
    check_labels(labels, len(x))
    kinds = [*dict.fromkeys(point.kind for point in kept)]
    named = [spans] if isinstance(spans, str) else [*spans]
    by_kind = spans_by_kind(kinds, named, {"prompt": x.spans, "encoder": ENCODER_SPANS})
    encoder = model.encoder_rows(x) if "encoder" in kinds else None
    names, chosen = clip_names(x), dict[RowKind, _Chosen]()
    for kind in kinds:
        prompts = encoder.prompts if kind == "encoder" and encoder is not None else x
        chosen[kind] = _choose(prompts, by_kind[kind], names, labels, first_prompt)
    found: dict[str, Tensor] = {}
    hooks = [(one.name, partial(_keep, found, one, chosen[one.kind], encoder)) for one in kept]
    model.run_with_hooks(x, fwd_hooks=hooks, **_extent(model, [one.name for one in kept]))
    return {kind: _rows(kind, kept, found, chosen[kind].index) for kind in kinds}


def n_rows_of(
    model: HookedALM,
    x: ALMInput,
    kept: Sequence[KeptPoint],
    spans: str | Sequence[str] = "audio",
) -> dict[RowKind, dict[str, int]]:
    """Number of rows that ``rows_of`` will give, by kind and span; the model needs no weights.

    Args:
        model: with or without its weights.
        x: prompts.
        kept: from ``kept_points``.
        spans: as ``rows_of`` takes them; of the encoder's, ``audio`` alone.

    Raises:
        InputError: a span that the prompts lack.
    """
    kinds = [*dict.fromkeys(point.kind for point in kept)]
    named = [spans] if isinstance(spans, str) else [*spans]
    by_kind = spans_by_kind(kinds, named, {"prompt": x.spans, "encoder": ["audio"]})
    found: dict[RowKind, dict[str, int]] = {}
    if "prompt" in kinds:
        index = _choose(x, by_kind["prompt"], clip_names(x), {}, 0).index
        names, counts = np.unique(index["span"].astype(str), return_counts=True)
        found["prompt"] = dict(zip(names.tolist(), counts.tolist(), strict=True))
    if "encoder" in kinds:
        assert model.audio is not None
        n = sum(sum(n_real_states(model.audio, clip)) for clip in x.clips)
        found["encoder"] = {"audio": n}
    return found


def _keep(
    found: dict[str, Tensor],
    point: KeptPoint,
    chosen: _Chosen,
    encoder: EncoderRows | None,
    value: Tensor,
    hook: Any,
) -> None:
    """Put a point's rows aside, and let the rest of it go."""
    if point.kind == "encoder":
        assert encoder is not None
        value = encoder.by_prompt(point.name, value)
    found[point.name] = chosen.of(value)


def _rows(
    kind: RowKind,
    kept: Sequence[KeptPoint],
    found: dict[str, Tensor],
    index: dict[str, IndexColumn],
) -> ActivationRows:
    mine = {one.name: one.shape for one in kept if one.kind == kind}
    return ActivationRows(kind, {name: found[name] for name in mine}, mine, index)


def _extent(model: HookedALM, names: Iterable[str]) -> dict[str, Any]:
    """Arguments of a run that reaches some points and, where it can, goes no further."""
    depth, behind = 0, list[str]()
    path = {name: layer for layer, name in enumerate(model.path)} if model.part is None else {}
    for name in names:
        block = re.match(r"\w*blocks\.\d+", name)
        if block is not None and block[0] in path:
            depth = max(depth, path[block[0]] + 1)
        elif "." in name and not name.startswith("audio."):
            behind.append(name)  # a norm or unembedding, or a block of another head's branch
    if any("unembed" in name for name in behind):
        return {}
    return {"return_type": None} if behind or not path else {"stop_at_layer": depth}


def clip_names(x: ALMInput) -> list[list[str]]:
    """Names of the clips of each prompt, in order of appearance."""
    names: list[list[str]] = [[] for _ in range(len(x))]
    for clip, row in zip(x.clips, x.clip_rows, strict=True):
        names[row].append(clip.name)
    return names


def _choose(
    prompts: ALMInput,
    spans: Sequence[str],
    clips: Sequence[Sequence[str]],
    labels: Mapping[str, Sequence[str]],
    first_prompt: int,
) -> _Chosen:
    """The rows of some spans, in the order of the prompts, with their index."""
    n, n_pos = prompts.shape
    span = np.full((n, n_pos), "", dtype=object)
    for name in reversed(spans):  # the first that was named wins
        for part in _parts_of(prompts, name):
            is_there = prompts.spans.mask(part).numpy() & prompts.is_real
            span[is_there] = part
    prompt, position = (span != "").nonzero()
    seconds, clip = np.full((n, n_pos), np.nan), np.full((n, n_pos), "", dtype=object)
    for row, names in enumerate(clips):
        # Beside its one clip, all of a prompt is about it.
        clip[row] = names[0] if len(names) == 1 else ""
        for name, ranges in zip(names, _of_row(prompts.spans.clips, row), strict=False):
            heard = [pos for start, stop in ranges for pos in range(start, stop)]
            clip[row, heard] = name
            if (step := prompts.spans.seconds_per_token) is not None:
                seconds[row, heard] = np.arange(len(heard)) * step
    first = prompts.is_real.argmax(axis=1)
    index: dict[str, IndexColumn] = {
        "clip": clip[prompt, position],
        "prompt": prompt + first_prompt,
        "position": position - first[prompt],
        "seconds": seconds[prompt, position],
        "span": span[prompt, position],
        **{name: text_column(texts, prompt) for name, texts in labels.items()},
    }
    return _Chosen(prompt.astype(np.int64), position.astype(np.int64), index)


def _parts_of(prompts: ALMInput, name: str) -> list[str]:
    """The spans that a name stands for."""
    every = [one for one in prompts.spans if one in SPAN_NAMES and one != "padding"]
    return every if name == "all" else [name]


def _of_row(clips: Sequence[Any], row: int) -> Sequence[Any]:
    return clips[row] if clips else ()


# --- Of any module


@torch.no_grad()
def rows_of_module(
    module: nn.Module,
    run: Callable[[], object],
    points: str | Iterable[str],
    is_real: Bool[Tensor, "batch frame"],
    *,
    clips: Sequence[str],
    seconds_per_frame: float | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    first_prompt: int = 0,
) -> ActivationRows:
    """Rows of the outputs of any module's parts, for encoders that have no family here.

    Args:
        module: whose parts are looked at; PyTorch hooks are attached for this run alone.
        run: runs it once, as in ``lambda: hubert(**inputs)``.
        points: names or patterns of its parts, as ``named_modules`` has them; see
            ``select_names``. Of an output of several values the first is kept.
        is_real: frames that are no padding. All outputs must have as many frames.
        clips: names of the clips, one for each row of the batch.
        seconds_per_frame: from one frame to the next; None leaves ``seconds`` NaN.
        labels: further columns, one text for each clip.
        first_prompt: number of the first clip, for the column ``prompt``.

    Raises:
        HookNameError: a pattern that matches no part.
        InputError: a part that does not run once, or whose output is no ``[batch, frame, ...]`` of
            the mask's shape; names or labels that do not fit.
    """
    labels = labels or {}
    check_labels({"clips": clips, **labels}, len(is_real))
    names = select_names(points, [name for name, _ in module.named_modules() if name])
    found: dict[str, list[object]] = {name: [] for name in names}
    with ExitStack() as attached:
        for name in names:
            part = module.get_submodule(name)
            handle = part.register_forward_hook(partial(_keep_output, found[name]))
            attached.enter_context(restored(handle.remove))
        run()
    prompt, position = is_real.cpu().numpy().nonzero()
    step = np.nan if seconds_per_frame is None else seconds_per_frame
    index: dict[str, IndexColumn] = {
        "clip": text_column(clips, prompt),
        "prompt": prompt + first_prompt,
        "position": position,
        "seconds": position * step,
        "span": text_column(["audio"], np.zeros_like(prompt)),
        **{name: text_column(texts, prompt) for name, texts in labels.items()},
    }
    values = {name: _output(name, passed, is_real) for name, passed in found.items()}
    chosen = _Chosen(prompt.astype(np.int64), position.astype(np.int64), index)
    kept = {name: chosen.of(value) for name, value in values.items()}
    shapes = {name: (*map(int, value.shape[2:]),) for name, value in values.items()}
    return ActivationRows("module", kept, shapes, index)


def _keep_output(passed: list[object], module: nn.Module, args: Any, output: object) -> None:
    passed.append(output)


def _output(name: str, passed: list[object], is_real: Bool[Tensor, "batch frame"]) -> Tensor:
    """The one output of a part, checked against the mask."""
    doing = f"keeping the output of {name!r}"
    if len(passed) != 1:
        raise InputError(
            f"{doing}: it ran {len(passed)} times, expected once. Leave it out, or give a `run` "
            "that runs it once."
        )
    value = passed[0]
    if not isinstance(value, Tensor):
        try:
            value = value[0]  # type: ignore[index]
        except (TypeError, KeyError, IndexError):
            value = None
    expected = f"expected real numbers [{len(is_real)}, {is_real.shape[1]}, ...]"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise InputError(f"{doing}: got no tensor of real numbers, {expected}. Leave it out.")
    if value.ndim < 3 or value.shape[:2] != is_real.shape:
        raise InputError(
            f"{doing}: got {list(value.shape)}, {expected} as the mask has them. Leave it out, or "
            "give the mask of its frames."
        )
    return value
