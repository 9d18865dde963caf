"""Alignment of base positions with donor positions (block S-4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ...inputs import ALMInput
from ...spans import SPAN_NAMES
from .warping import dtw_indices

AlignPolicy = Literal[
    "error", "resample_linear", "nearest", "truncate", "pad_last", "dtw", "min_len"
]
AlignPolicies = AlignPolicy | Mapping[str, AlignPolicy]
"""Policy for all spans, or one per span; spans that are not named get ``error``."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Base positions of one row, and where their donor values come from.

    A donor value is ``(1 - weight) * donor[lower] + weight * donor[upper]``.
    """

    base: list[int]
    lower: list[int]
    upper: list[int]
    weight: list[float]
    length_ratio: dict[str, float]
    """Span -> donor length / base length. Behind an unequal span, positions also differ."""

    @property
    def is_exact(self) -> bool:
        """Whether every base position takes one donor position as it is."""
        return not any(self.weight)

    def donor_values(
        self, donor: Float[Tensor, " pos *features"]
    ) -> Float[Tensor, " aligned *features"]:
        """Donor values in the order of ``base``."""
        low = donor[self.lower]
        if self.is_exact:
            return low
        weight = torch.tensor(self.weight, dtype=donor.dtype, device=donor.device)
        weight = weight.reshape(-1, *[1] * (donor.ndim - 1))
        return low + weight * (donor[self.upper] - low)


def align(
    base: ALMInput,
    donor: ALMInput,
    spans: Sequence[str],
    *,
    row: int = 0,
    policy: AlignPolicies = "error",
    features: tuple[Tensor, Tensor] | None = None,
) -> Alignment:
    """Align spans one by one; those of equal length map position to position.

    A span of several ranges (two clips, text around a clip) is aligned range by range, so that no
    clip runs over into the next, and ranges are cut where a named segment begins and ends, so that
    a label of another length does not shift the words behind it. Where the two inputs differ in the
    number of pieces, the span is aligned as one.

    Args:
        base: the run to be patched.
        donor: the run that values come from.
        spans: names, each present in both.
        row: index of the row in both batches.
        policy: for spans of unequal length. ``error`` refuses; ``resample_linear`` stretches the
            time axis (audio only); ``nearest`` stretches without mixing positions, and for a single
            one takes the last, which has seen the whole word; ``truncate`` leaves the longer end
            out; ``pad_last`` repeats the last donor position; ``dtw`` follows the best warping path
            (needs ``features``); ``min_len`` ignores spans and takes the same index from the start
            of both prompts, up to the shorter one: kept to reproduce work that did so (C10).
        features: residual stream ``[pos, d_model]`` of base and donor at depth 0, for ``dtw``.

    Raises:
        InputError: unequal lengths under ``error``, or a policy that does not exist, is for a span
            that does not, or cannot be applied.
    """
    by_span = _policy_of_spans(policy, base)
    if policy == "min_len":
        return _align_from_start(base, donor, spans, row)
    parts: list[tuple[list[int], list[int], list[int], list[float]]] = []
    ratios: dict[str, float] = {}
    for name in spans:
        ours, theirs = base.spans.positions(name, row), donor.spans.positions(name, row)
        ratios[name] = len(theirs) / len(ours) if ours else float("nan")
        if bool(ours) != bool(theirs):
            raise InputError(
                f"aligning span {name!r} of row {row}: it has {len(ours)} positions in the base "
                f"and {len(theirs)} in the donor. There is nothing to align; leave the span out."
            )
        pieces = _pieces(base, name, row), _pieces(donor, name, row)
        if len(pieces[0]) != len(pieces[1]):
            pieces = [ours], [theirs]
        applied = by_span.get(name, "error")
        for ours, theirs in zip(*pieces, strict=True):
            if len(ours) == len(theirs):
                parts.append((ours, theirs, theirs, [0.0] * len(ours)))
            else:
                parts.append(_align_unequal(name, ours, theirs, row, applied, features))
    return Alignment(
        base=[pos for part in parts for pos in part[0]],
        lower=[pos for part in parts for pos in part[1]],
        upper=[pos for part in parts for pos in part[2]],
        weight=[w for part in parts for w in part[3]],
        length_ratio=ratios,
    )


def _policy_of_spans(policy: str | Mapping[str, str], base: ALMInput) -> Mapping[str, AlignPolicy]:
    by_span = dict.fromkeys(base.spans, policy) if isinstance(policy, str) else policy
    known = get_args(AlignPolicy)
    wrong = [name for name in by_span if name not in {*SPAN_NAMES, *base.spans}]
    wrong += [one for one in dict.fromkeys(by_span.values()) if one not in known]
    if wrong:
        raise InputError(
            f"aligning spans: got {', '.join(map(repr, wrong))} in the policy, expected "
            f"{', '.join(known)}, or one of them for some of the spans {', '.join(base.spans)}. "
            "Check the spelling."
        )
    return cast(Mapping[str, AlignPolicy], by_span)


def _pieces(x: ALMInput, name: str, row: int) -> list[list[int]]:
    """The ranges of a span, cut at the edges of the named segments inside it."""
    edges = {
        edge
        for segment in x.spans
        if segment not in SPAN_NAMES and segment != name
        for one in x.spans[segment][row]
        for edge in one
    }
    pieces: list[list[int]] = []
    for start, stop in x.spans[name][row]:
        cuts = sorted({start, stop, *(edge for edge in edges if start < edge < stop)})
        pieces += [list(range(a, b)) for a, b in pairwise(cuts)]
    return pieces


def _align_unequal(
    name: str,
    ours: list[int],
    theirs: list[int],
    row: int,
    policy: AlignPolicy,
    features: tuple[Tensor, Tensor] | None,
) -> tuple[list[int], list[int], list[int], list[float]]:
    what = (
        f"aligning span {name!r} of row {row}: {len(ours)} base and {len(theirs)} donor positions"
    )
    if policy == "truncate":
        n = min(len(ours), len(theirs))
        return ours[:n], theirs[:n], theirs[:n], [0.0] * n
    if policy == "pad_last":
        padded = [theirs[min(i, len(theirs) - 1)] for i in range(len(ours))]
        return ours, padded, padded, [0.0] * len(ours)
    if policy == "resample_linear" and name == "audio":
        at = np.linspace(0, len(theirs) - 1, len(ours))
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, len(theirs) - 1)
        return ours, [theirs[i] for i in low], [theirs[i] for i in high], (at - low).tolist()
    if policy == "nearest":
        at = np.linspace(0, len(theirs) - 1, len(ours)).round().astype(int)
        nearest = [theirs[i] for i in at] if len(ours) > 1 else theirs[-1:]
        return ours, nearest, nearest, [0.0] * len(ours)
    if policy == "dtw" and features is not None:
        path = dtw_indices(features[0][ours], features[1][theirs])
        warped = [theirs[i] for i in path]
        return ours, warped, warped, [0.0] * len(ours)
    raise InputError(
        f"{what}, and policy {policy!r} does not apply. Use clips of equal duration and labels of "
        "equal token count, or a policy (policy=, or an experiment's setting align): "
        "'resample_linear' (audio), 'dtw' (with features), 'nearest', 'truncate', 'pad_last'."
    )


@dataclass(frozen=True)
class Window:
    """A time window of a clip, as a place to patch."""

    start_s: float
    stop_s: float
    clip: int = 0
    """Index of the clip among the row's, in order of appearance."""


Place = str | int | Window | Sequence[str | int | Window]
"""A span, a position of the padded prompt, a time window, or several of these at once."""


def align_place(
    base: ALMInput,
    donor: ALMInput,
    place: Place,
    *,
    row: int = 0,
    policy: AlignPolicies = "error",
    features: tuple[Tensor, Tensor] | None = None,
) -> Alignment:
    """Align a place, whatever names it; see ``align`` for arguments and errors.

    A position stands for the same position of the donor, which must then be as long; a window for
    the same seconds of the donor's clip; ``"all"`` for every real position, span by span.
    """
    parts = [place] if isinstance(place, str | int | Window) else list(place)
    spans = [part for part in parts if isinstance(part, str)]
    if "all" in spans:
        spans = [name for name in base.spans if name in SPAN_NAMES and base.spans[name][row]]
    found = [align(base, donor, spans, row=row, policy=policy, features=features)]
    for part in parts:
        if isinstance(part, int):
            found.append(_align_position(base, donor, part, row))
        elif isinstance(part, Window):
            ours, theirs = (
                [
                    pos
                    for start, stop in x.spans.seconds(
                        row, part.start_s, part.stop_s, clip=part.clip
                    )
                    for pos in range(start, stop)
                ]
                for x in (base, donor)
            )
            found.append(_align_lists("audio", ours, theirs, row, policy, features))
    return Alignment(
        base=[pos for one in found for pos in one.base],
        lower=[pos for one in found for pos in one.lower],
        upper=[pos for one in found for pos in one.upper],
        weight=[w for one in found for w in one.weight],
        length_ratio={name: r for one in found for name, r in one.length_ratio.items()},
    )


def _align_position(base: ALMInput, donor: ALMInput, pos: int, row: int) -> Alignment:
    if base.shape[1] != donor.shape[1] or not 0 <= pos < base.shape[1]:
        raise InputError(
            f"aligning position {pos} of row {row}: the base has {base.shape[1]} positions, the "
            f"donor {donor.shape[1]}. Positions stand for themselves only in prompts of equal "
            "length; name a span instead."
        )
    where = (
        [pos] if all(x.is_real[row, pos] for x in (base, donor)) else []
    )  # a pad has nothing to patch
    return Alignment(
        base=where, lower=where, upper=where, weight=[0.0] * len(where), length_ratio={}
    )


def _align_lists(
    name: str,
    ours: list[int],
    theirs: list[int],
    row: int,
    policy: AlignPolicies,
    features: tuple[Tensor, Tensor] | None,
) -> Alignment:
    applied = policy if isinstance(policy, str) else policy.get(name, "error")
    if len(ours) == len(theirs):
        part = ours, theirs, theirs, [0.0] * len(ours)
    else:
        part = _align_unequal(name, ours, theirs, row, applied, features)
    base, lower, upper, weight = part
    ratio = {name: len(theirs) / len(ours)}
    return Alignment(base=base, lower=lower, upper=upper, weight=weight, length_ratio=ratio)


def _align_from_start(base: ALMInput, donor: ALMInput, spans: Sequence[str], row: int) -> Alignment:
    first_base, first_donor = (int(x.attention_mask[row].argmax()) for x in (base, donor))
    n = min(base.shape[1] - first_base, donor.shape[1] - first_donor)
    wanted = sorted({pos for name in spans for pos in base.spans.positions(name, row)})
    ours = [pos for pos in wanted if pos - first_base < n]
    theirs = [pos - first_base + first_donor for pos in ours]
    return Alignment(
        base=ours, lower=theirs, upper=theirs, weight=[0.0] * len(ours), length_ratio={}
    )
