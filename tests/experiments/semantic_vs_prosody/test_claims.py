"""What semantic_vs_prosody says of made-up tables, and what it must not say."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hooked_alm.experiments.semantic_vs_prosody.claims import _handoff, _moves, _readable
from hooked_alm.experiments.semantic_vs_prosody.settings import SemanticVsProsodyConfig
from hooked_alm.experiments.semantic_vs_prosody.tables import Sweeps, handoffs, recoveries
from hooked_alm.experiments.workbench.findings import Finding

CONFIG = SemanticVsProsodyConfig(n_resamples=1000)
N, N_BLOCKS = 30, 8
HAPPY, SAD = 1, 2
FALLING = [1, 1, 1, 0.7, 0.3, 0.1, 0, 0, 0]
"""Recovery of an audio span that lets go at depth 4."""


def readable(margins: Sequence[float], n_happy: int = N // 2, constant_to: int = 3) -> Finding:
    """A lens that reads the output from a depth on, before always "happy"; every clip ends with a
    margin of its own, towards which its margins rise."""
    rows = [
        {
            "item": f"clip {i}", "semantic": "sad", "prosody": "happy", "speaker": "s",
            "text": f"sentence {i}", "depth": depth,
            "agrees": float(depth >= constant_to or i < n_happy),
            **{f"z_{label}": 0.0 for label in CONFIG.labels},
            "z_happy": final * depth / N_BLOCKS,
        }
        for i, final in enumerate(margins)
        for depth in range(N_BLOCKS + 1)
    ]  # fmt: skip
    lens = pd.DataFrame(rows)
    runs = lens.drop_duplicates("item")[["item"]]
    runs["top_token"] = ["happy"] * n_happy + ["sad"] * (N - n_happy)
    return _readable({"lens": lens, "runs": runs}, CONFIG, N_BLOCKS)


def test_a_margin_that_may_be_zero_leads_nowhere() -> None:
    """Every resample has a sign, and keeps it at all depths: that does not make it the sign."""
    even = readable([(-1) ** i * 4 + 0.1 for i in range(N)])
    assert not even.established
    assert "the margin at the last depth includes 0" in even.statement
    uneven = readable([2 + (-1) ** i for i in range(N)])
    assert uneven.established
    assert uneven.statement.startswith("The lens reads the voice ahead from depth 3 on")
    assert readable([-1.0] * N).statement.startswith("The lens reads the words ahead")


def test_a_lens_that_reads_the_same_of_every_clip_reads_nothing() -> None:
    """At depth 0 the readout is one token's embedding: it agrees with the commonest output."""
    ahead = [1.0] * N
    found = readable(ahead, n_happy=20, constant_to=4)
    assert found.established
    assert (found.estimate, found.low, found.high) == (4, 4, 4)
    assert "in more than have the commonest output (0.67), from depth 4 [4, 4]" in found.statement
    never = readable(ahead, n_happy=20, constant_to=9)
    assert not never.established
    assert never.claim == "The lens reads the voice ahead"
    assert never.doubts[0].startswith("no such depth")
    assert not readable(ahead, n_happy=N).established


def moves(words: Sequence[int], voice: Sequence[int]) -> Finding:
    """What donors gain, per sentence, in pairs of both types."""
    rows = [
        {
            "type": which, "text": f"sentence {i}", "A": f"clip {i}", "target": "happy",
            "donor_prediction": "happy" if gain > 0 else "sad",
            "base_prediction": "happy" if gain < 0 else "sad",
        }
        for which, gains in (("semantic", words), ("prosody", voice))
        for i, gain in enumerate(gains)
    ]  # fmt: skip
    return _moves(pd.DataFrame(rows), CONFIG)


def test_an_exchange_moves_the_answer_only_if_its_own_effect_is_there() -> None:
    ones, few, back = [1] * N, [1] * 3 + [0] * (N - 3), [-1] * 6 + [0] * (N - 6)
    clear = moves(ones, few)
    assert clear.established
    # The interval of the voice holds 0, and 0.2: no effect, or a small one.
    assert clear.statement.startswith(
        "Exchanging the words moves the answer, exchanging the voice less or not at all. "
    )
    assert moves(few, ones).statement.startswith("Exchanging the voice moves the answer, exch")
    some = moves(ones, [1] * 20 + [0] * (N - 20))
    assert some.established
    assert "exchanging the voice less. " in some.statement
    # They differ, since the voice moves it away; that the words move it does not follow.
    apart = moves(few, back)
    assert apart.low > 0
    assert not apart.established
    assert "the effect of the words includes 0" in apart.statement
    assert "the difference includes 0" in moves(few, few).statement


def handoff(recovered: dict[str, Any], n_texts: int = N) -> Finding:
    """Pairs whose recoveries are all alike."""
    base, donor = (np.eye(5)[[label] * N] * 4.0 for label in (SAD, HAPPY))
    shares = np.broadcast_to(
        np.array(list(recovered.values()), float)[None, ..., None], (N, len(recovered), 9, 1)
    )
    scores = base[:, None, None] + shares * (donor - base)[:, None, None]
    pairs = pd.DataFrame({"text": [f"sentence {i % n_texts}" for i in range(N)]})
    sweeps = Sweeps(pairs, list(recovered), list(range(9)), scores, base, donor, np.full(N, HAPPY))
    summaries = {
        "handoffs": handoffs(sweeps, "semantic", CONFIG),
        "recovery": recoveries(sweeps, "semantic", CONFIG),
    }
    return _handoff(summaries, "semantic", N_BLOCKS, CONFIG)


def test_a_hand_off_needs_someone_who_has_it_then() -> None:
    """At the last depth the readout has all of it, whatever the model does (I5)."""
    rising = [1 - share for share in FALLING]
    found = handoff({"audio": FALLING, "readout": rising})
    assert found.established
    assert found.estimate == 4
    shared = handoff({"audio": FALLING, "text": [0.35] * 9, "readout": [0] * 4 + [0.2] * 4 + [1]})
    assert shared.established
    lost = handoff({"audio": FALLING, "text": [0.1] * 9, "readout": [0] * 8 + [1]})
    assert not lost.established
    assert "the other spans have less than half of it there" in lost.statement
    assert "those of the other spans add up to 0.10" in lost.statement
    assert "no other span was patched" in handoff({"audio": FALLING}).statement


@pytest.mark.parametrize(
    ("audio", "n_texts", "why"),
    [
        (FALLING, 2, "only 2 sentences"),
        ([0.4] * 8 + [0], N, "the audio never has half of it"),
    ],
)
def test_a_hand_off_is_not_established(audio: list[float], n_texts: int, why: str) -> None:
    found = handoff({"audio": audio, "readout": [1 - share for share in audio]}, n_texts)
    assert not found.established
    assert why in found.statement
