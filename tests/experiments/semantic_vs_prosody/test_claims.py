"""What semantic_vs_prosody says of made-up tables, and what it must not say."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hooked_alm.experiments.semantic_vs_prosody.claims import _handoff, _moves, _readable
from hooked_alm.experiments.semantic_vs_prosody.tables import (
    ProsodyResults,
    handoffs,
    read_patches,
    recoveries,
)
from hooked_alm.experiments.workbench.claims import Finding
from semantic_vs_prosody_verdicts import CONFIG, FALLING, N_BLOCKS, scores

N = 30


def results(**tables: pd.DataFrame) -> ProsodyResults:
    tables["confounds"] = pd.DataFrame(columns=["feature", "p", "found"])
    return ProsodyResults(CONFIG, {"model": {"blocks": N_BLOCKS}}, tables)


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
    return _readable(results(lens=lens, runs=runs))


def test_a_margin_that_may_be_zero_leads_nowhere() -> None:
    """Every resample has a sign, and keeps it at all depths: that does not make it the sign."""
    even = readable([(-1) ** i * 4 + 0.1 for i in range(N)])
    assert not even.established
    assert "the interval of the margin at the last depth includes 0" in even.statement
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
    found = _moves(results(pairs=pd.DataFrame(rows)))
    assert found is not None
    return found


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
    assert "the effect of the words is not surely above 0" in apart.statement
    assert "the interval of the difference includes 0" in moves(few, few).statement


def handoff(recovered: dict[str, Any], n_texts: int = N, noise: float = 0.0) -> Finding:
    """Pairs whose recoveries are all alike."""
    ends = {"base_prediction": "sad", **scores("sad", "base")}
    ends |= {"donor_prediction": "happy", **scores("happy", "donor")}
    pairs = [
        {
            "pair_id": f"pair {i}",
            "type": "semantic",
            "target": "happy",
            "text": f"sentence {i % n_texts}",
            **ends,
        }
        for i in range(N)
    ]
    patches = [
        {
            **{name: pair[name] for name in ("pair_id", "type", "target", "text")},
            **{"depth": depth, "span": span, "prediction": "happy" if share > 0.5 else "sad"},
            "noise": noise,
            **{f"z_{name}": 0.0 for name in CONFIG.labels},
            **{"z_happy": 4.0 * share, "z_sad": 4.0 * (1 - share)},
        }
        for pair in pairs
        for span, by_depth in recovered.items()
        for depth, share in enumerate(np.broadcast_to(by_depth, 9).tolist())
    ]
    run = results(pairs=pd.DataFrame(pairs), patches=pd.DataFrame(patches))
    cells = read_patches(run)
    run.tables["handoffs"] = pd.DataFrame(handoffs(run, cells))
    run.tables["recovery"] = pd.DataFrame(recoveries(run, cells))
    return _handoff(run, "semantic")


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
    # All positions together have everything at every depth (I4), which is nobody's.
    together = handoff({"audio": FALLING, "all": [1] * 9, "readout": [0] * 8 + [1]})
    assert not together.established
    assert "those of the other spans add up to 0.00" in together.statement
    assert "no other span was patched" in handoff({"audio": FALLING}).statement


def test_a_hand_off_of_an_effect_within_rounding() -> None:
    """Half of the effect of 8 logits, against twice the noise of a mean of N pairs."""
    rising = [1 - share for share in FALLING]
    limit = 2 * np.sqrt(N)
    assert handoff({"audio": FALLING, "readout": rising}, noise=0.99 * limit).established
    found = handoff({"audio": FALLING, "readout": rising}, noise=1.01 * limit)
    assert found.doubts == ("half of the effect is within rounding, 4 logits",)


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
