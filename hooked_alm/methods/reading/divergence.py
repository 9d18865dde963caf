"""Differences between runs in what they predict, at every depth (cards M-002-3 and M-002-4).

Runs are teacher-forced on one continuation. Through the logit lens, every depth and position gives
a distribution over the vocabulary: its loss on the next token, and its Jensen-Shannon and
Kullback-Leibler divergences from another run's. Runs go up the blocks side by side, and logits
exist for one depth, some positions and all runs at a time: whatever the vocabulary, they stay
within ``max_bytes``. Beside it are held every run's stream at one depth, and the results, a number
per depth, run and position.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ...hooks import Hook
from ...inputs import ALMInput
from ...model import HookedALM
from ...offload import home_of
from ..result import MethodResult
from .lens import LOGIT_LENS, Lens, LensNorm, check_depths, normalised

LN2 = math.log(2)
TILE = (128, 1024)
"""Positions and tokens that one step of the sums reads: on a CPU they stay in a core's cache (four
times as fast as tiles of 400 x 4096, measured)."""
TILE_ELSEWHERE = (4096, 2**15)
TEMPORARIES = 8
"""Tensors of a tile's size that a step of the sums makes for each run, at most."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Divergence(MethodResult):
    """Losses of every run, and divergences of pairs of runs; natural logarithms, fp32."""

    nll: Float[Tensor, "*depth run pos"]
    """−log p(target)."""
    hit: Bool[Tensor, "*depth run pos"]
    """Whether no token is likelier than the target."""
    js: Float[Tensor, "*depth pair pos"]
    """Jensen-Shannon divergence, from 0 to ln 2; 0 for equal logits, exactly."""
    kl: Float[Tensor, "*depth pair pos"]
    """KL(first || second)."""
    kl_back: Float[Tensor, "*depth pair pos"]
    """KL(second || first)."""


@torch.no_grad()
def lockstep(
    model: HookedALM,
    inputs: Sequence[ALMInput],
    positions: Int[Tensor, "run pos"],
    hooks: Sequence[Sequence[Hook]] = (),
) -> Iterator[Float[Tensor, "run pos d_model"]]:
    """The residual stream of several runs at depths 0..L, one depth after the other.

    One forward per run, cut into its blocks: no more than one depth is held.

    Args:
        model: to run.
        inputs: prompts of one row each, of any lengths.
        positions: per run, positions of the rows to give.
        hooks: per run, forward hooks that are active while its blocks run.
    """
    own = [list(some) for some in hooks] or [[] for _ in inputs]

    def rows(streams: Sequence[Tensor]) -> Tensor:
        return torch.stack(
            [one[0, at.to(one.device)] for one, at in zip(streams, positions, strict=True)]
        )

    streams = [model(x, stop_at_layer=0) for x in inputs]
    yield rows(streams)
    for layer, block in enumerate(model.path):
        for run, x in enumerate(inputs):
            with ExitStack() as hooked:
                if mine := [hook for hook in own[run] if _is_of(hook, block)]:
                    hooked.enter_context(model.hooks(fwd_hooks=mine))
                streams[run] = model(
                    streams[run], start_at_layer=layer, stop_at_layer=layer + 1, inputs=x
                )
        yield rows(streams)


def _is_of(hook: Hook, block: str) -> bool:
    name = hook[0]
    return not isinstance(name, str) or name.startswith(f"{block}.")


@torch.no_grad()
def compare_depths(
    model: HookedALM,
    depths: Iterable[Float[Tensor, "run pos d_model"]],
    targets: Int[Tensor, "run pos"],
    pairs: Sequence[tuple[int, int]],
    *,
    lens: Lens = LOGIT_LENS,
    max_bytes: int = 2**28,
) -> Divergence:
    """Losses and divergences at every depth; nothing of size depths x positions x vocabulary.

    Args:
        model: the model whose final norm and unembedding decode the rows.
        depths: residual rows, from ``lockstep``, or caches stacked ``[depth, run, pos, d_model]``.
        targets: per run, the token that each position predicts.
        pairs: indices of runs to compare.
        lens: the lens that reads every depth.
        max_bytes: for logits and what is summed from them; streams and results come on top.

    Raises:
        InputError: ``max_bytes`` is too small for a single position, or the lens was trained for a
            model of another number of depths.
    """
    check_depths(lens, len(model.path) + 1)
    n_rows = rows_at_once(model, len(targets), max_bytes)
    found: dict[str, list[Tensor]] = {field.name: [] for field in fields(Divergence)}
    (n_runs, n_pos), n_pairs = targets.shape, len(pairs)
    kinds = {"nll": (n_runs, torch.float32), "hit": (n_runs, torch.bool)}
    kinds |= dict.fromkeys(("js", "kl", "kl_back"), (n_pairs, torch.float32))
    for depth, rows in enumerate(depths):
        rows = rows.to(home_of(model.head_unembed))
        # Before the logits: small tensors kept after large ones would split the heap.
        kept = {name: rows.new_empty(n, n_pos, dtype=dtype) for name, (n, dtype) in kinds.items()}
        for at in torch.arange(rows.shape[1], device=rows.device).split(n_rows):
            some = lens.translate(rows[:, at], depth)
            aims = targets.to(rows.device)[:, at]
            part = _compare_block(model, some, aims, pairs, lens.norm)
            for name, value in kept.items():
                value[..., at] = getattr(part, name)
        for name, value in kept.items():
            found[name].append(value)
    return Divergence(**{name: torch.stack(values) for name, values in found.items()})


def row_bytes(model: HookedALM, n_runs: int) -> tuple[int, int]:
    """Bytes that comparing runs holds: once, and for every position at work."""
    head = model.head_unembed
    chunk = min(_tile(home_of(head))[1], head.out_features)
    # Logits, what is summed from them, and the row in fp32: squared, normed, and weighted.
    per_row = head.out_features + TEMPORARIES * chunk + 4 * model.cfg.d_model
    return 4 * chunk * model.cfg.d_model, 4 * n_runs * per_row


def rows_at_once(model: HookedALM, n_runs: int, max_bytes: int) -> int:
    """Positions whose logits fit into ``max_bytes``, with what is summed from them.

    Raises:
        InputError: not even one does.
    """
    weights, per_row = row_bytes(model, n_runs)
    if (n := (max_bytes - weights) // per_row) >= 1:
        return min(n, _tile(home_of(model.head_unembed))[0])
    raise InputError(
        f"comparing {n_runs} runs over a vocabulary of {model.head_unembed.out_features}: got "
        f"max_bytes={max_bytes}, expected {weights + per_row} or more, which is one position. "
        "Raise it."
    )


def _tile(device: torch.device) -> tuple[int, int]:
    return TILE if device.type == "cpu" else TILE_ELSEWHERE


def _compare_block(
    model: HookedALM,
    rows: Float[Tensor, "run pos d_model"],
    targets: Int[Tensor, "run pos"],
    pairs: Sequence[tuple[int, int]],
    norm: LensNorm,
) -> Divergence:
    logits = _logits(model, rows, norm)
    parts = logits.split(_tile(logits.device)[1], dim=-1)
    log_sum = torch.stack([part.logsumexp(-1) for part in parts]).logsumexp(0)
    largest = torch.stack([part.amax(-1) for part in parts]).amax(0)
    own = logits.gather(-1, targets[..., None])[..., 0]
    sums = rows.new_zeros(3, len(pairs), rows.shape[1], dtype=torch.float32)
    for part in parts:
        for pair, (first, second) in enumerate(pairs):
            sums[:, pair] += _divergences(
                part[first] - log_sum[first, :, None], part[second] - log_sum[second, :, None]
            )
    return Divergence(
        nll=log_sum - own, hit=own >= largest, js=sums[0], kl=sums[1], kl_back=sums[2]
    )


def _logits(
    model: HookedALM, rows: Float[Tensor, "run pos d_model"], norm: LensNorm
) -> Float[Tensor, "run pos vocab"]:
    """Lens logits in fp32. Only a chunk of the unembedding is ever cast."""
    head = model.head_unembed
    x = normalised(model, rows, norm)
    n_vocab, n_tokens = head.out_features, _tile(x.device)[1]
    logits = x.new_empty(*x.shape[:-1], n_vocab)
    for start in range(0, n_vocab, n_tokens):
        tokens = range(start, min(start + n_tokens, n_vocab))
        logits[..., start : tokens.stop] = F.linear(x, head.directions(tokens).float())
    return logits


def _divergences(
    log_p: Float[Tensor, "pos token"], log_q: Float[Tensor, "pos token"]
) -> Float[Tensor, "divergence pos"]:
    """Terms of JS, KL(p || q) and KL(q || p), summed over these tokens.

    With d = log q − log p, log(p / m) = ln 2 − log(1 + e^d), which needs no logarithm of a mixture:
    equal logits give 0 exactly, and exchanging p and q the same bits.
    """
    d = log_q - log_p
    p, q = log_p.exp(), log_q.exp()
    below = LN2 - d.abs().neg_().exp_().log1p_()  # ln 2 − log(1 + e^−|d|)
    js = ((p + q) * below - (p * d.relu() + q * d.neg().relu_())).sum(-1) / 2
    return torch.stack([js, -(p * d).sum(-1), (q * d).sum(-1)])
