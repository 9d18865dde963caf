"""What a unit holds, and what of ``max_bytes`` it leaves for logits and rows of attention.

``max_bytes`` counts all that grows with vocabulary, with runs x tokens, or with tokens x layers:
the residual streams of all runs at one depth, losses and divergences of every depth, attention by
segment, and the logits or attention rows at work. Beside it are the weights, the prompts, and what
one block makes of one run, as in any forward.

What is counted are tensors. A process grows by more, since the C library keeps what was freed:
28 layers, 2,000 tokens, a vocabulary of 151,936 and a budget of 256 MiB took 543 MiB, and 289 MiB
under ``MALLOC_MMAP_THRESHOLD_=8388608`` (``scripts/bench_prefix_comparison.py``, Linux).
"""

from collections.abc import Sequence

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.methods.reading.divergence import row_bytes

from .prompts import PreparedItem
from .settings import PrefixComparisonConfig

SCORE_COPIES = 8
"""Tensors ``[head, query, key]`` that attention rows take at once, with room to spare."""
RESULT_COPIES = 4
"""Copies of results: by depth and joined, then packed and written."""


def query_bytes(model: HookedALM, n_pos: int) -> tuple[int, int]:
    """What rows of attention hold: once, of the keys, and for every query at work."""
    heads = model.cfg.n_heads
    # Keys are cast, and repeated for the query heads.
    return 3 * 4 * heads * model.cfg.d_head * n_pos, 4 * SCORE_COPIES * heads * n_pos


def left_over(
    model: HookedALM, lengths: Sequence[int], n_tokens: int, n_segments: int, max_bytes: int
) -> int:
    """What is left of ``max_bytes`` for logits, or for rows of attention; enough for one of either.

    Args:
        lengths: positions of every run.
        n_tokens: of the continuation.
        n_segments: of the run that has most, of those whose attention is measured; 0 if none is.

    Raises:
        InputError: it is not enough.
    """
    n_runs, size = len(lengths), model.embed.weight.element_size()
    per_token = n_runs * (4 + 1 + 3 * 4 + 3 * 4 * n_segments)  # nll, hit, divergences, attention
    held = size * model.cfg.d_model * (sum(lengths) + n_runs * n_tokens)
    held += RESULT_COPIES * (len(model.path) + 1) * n_tokens * per_token
    needs = sum(row_bytes(model, n_runs))
    if n_segments:
        needs = max(needs, sum(query_bytes(model, max(lengths))))
    if max_bytes - held >= needs:
        return max_bytes - held
    raise InputError(
        f"comparing {n_runs} runs of up to {max(lengths)} positions: got max_bytes={max_bytes}, "
        f"expected {held + needs} or more: {held} for what is held throughout, {needs} for one "
        "position's logits or attention. Raise it, or leave out conditions or interventions"
    )


def check_memory(
    model: HookedALM, items: Sequence[PreparedItem], config: PrefixComparisonConfig
) -> dict[str, int | str]:
    """The item that holds most, for ``run.json``.

    Raises:
        InputError: ``max_bytes`` is too small for an item; it names the item.
    """
    held: dict[str, int] = {}
    for one in items:
        n = len(one.continuation)
        lengths = [prefix.x.shape[1] + n for prefix in one.prefixes.values()]
        lengths += [max(lengths)] * len(config.interventions)
        # The continuation so far, and its latest tokens, beside those of the prefix.
        n_segments = max(len(prefix.x.spans.ranges) for prefix in one.prefixes.values()) + 2
        try:
            left = left_over(model, lengths, n, n_segments, config.max_bytes)
        except InputError as error:
            raise InputError(f"{one.item.where}: {error}") from None
        held[one.item.id] = config.max_bytes - left
    item = max(held, key=held.__getitem__)
    return {"bytes": held[item], "item": item, "max_bytes": config.max_bytes}
