"""Each metric against the same number worked out elsewhere, and what it must refuse."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from engine_runs import BASE, OTHER, both, moved
from hooked_alm import HookedALM, InputError
from hooked_alm.methods.patching.metrics import (
    JS,
    KL,
    Accuracy,
    LabelScores,
    LogitDiff,
    Logits,
    LogProb,
    OnLogits,
    Prob,
    Reference,
)
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.labels import LabelSet
from tiny import hf_inputs

LABELS = LabelSet(
    names=("sad", "calm", "glad"),
    spellings=(((5,), (11,)), ((7, 2),), ((9,),)),
    mode="variants",
)
LOGITS = torch.tensor([[1.0, 3.0, 2.0, 0.5], [0.0, -1.0, 4.0, 4.0]])
P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.1, 0.8])


class Given(Reference):
    """Unpatched logits as given: log-probabilities up to a constant."""

    base = torch.tensor(np.log(P) + 3.0, dtype=torch.float32)
    donor = torch.tensor(np.log(Q) - 1.0, dtype=torch.float32)


REFERENCE = Given()


def of(logits: Any) -> torch.Tensor:
    return torch.tensor(np.log(logits), dtype=torch.float32)[None] + 7.0


def test_differences_and_logits() -> None:
    assert LogitDiff(3, [5, 6]).tokens(1) == [3, 6]
    assert LogitDiff(3, [5, 6])(LOGITS[:, :2], 1, REFERENCE).tolist() == [-2.0, 1.0]
    assert Logits([4, 8]).tokens(0) == [4, 8]
    assert torch.equal(Logits([4, 8])(LOGITS, 0, REFERENCE), LOGITS)


def test_labels() -> None:
    """Tokens in the order 5, 11, 7, 9; two spellings add up, as logits of a union."""
    metric = LabelScores(LABELS)
    assert list(metric.tokens(0)) == [5, 11, 7, 9]
    assert metric.names == ("sad", "calm", "glad")
    scores = metric(LOGITS, 0, REFERENCE).numpy()
    expected = [[np.log(np.e**1 + np.e**3), 2.0, 0.5], [np.log(1 + np.e**-1), 4.0, 4.0]]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_accuracy() -> None:
    """The target alone on top counts; a tie does not."""
    assert Accuracy(LABELS, "sad")(LOGITS, 0, REFERENCE).tolist() == [1.0, 0.0]
    assert Accuracy(LABELS, ["sad", "glad"])(LOGITS, 1, REFERENCE).tolist() == [0.0, 0.0]
    assert Accuracy(LABELS, "calm")(LOGITS + torch.eye(4)[2], 0, REFERENCE).tolist() == [0.0, 1.0]


def test_probabilities() -> None:
    assert LogProb([0, 2]).tokens(1) is None
    found = LogProb([0, 2])(of(P), 1, REFERENCE).item(), Prob(1)(of(P), 0, REFERENCE).item()
    np.testing.assert_allclose(found, [np.log(0.2), 0.3], rtol=1e-5)


@pytest.mark.parametrize(("to", "reference"), [("base", P), ("donor", Q)])
def test_divergences(to: Any, reference: np.ndarray) -> None:
    """KL is of the patched from the reference; both are 0 at the reference, JS at most ln 2."""
    other = np.array([0.25, 0.7, 0.05])
    for metric, expected in (
        (KL(to), entropy(reference, other)),
        (JS(to), jensenshannon(reference, other) ** 2),
    ):
        assert metric.tokens(0) is None
        np.testing.assert_allclose(metric(of(other), 0, REFERENCE).item(), expected, rtol=1e-5)
        assert abs(metric(of(reference), 0, REFERENCE).item()) < 1e-6
    assert entropy(reference, other) != pytest.approx(entropy(other, reference), rel=1e-2)
    apart = torch.tensor([[0.0, -200.0, -200.0]]), torch.tensor([-200.0, 0.0, -200.0])

    class Apart(Reference):
        base = donor = apart[1]

    np.testing.assert_allclose(JS(to)(apart[0], 0, Apart()).item(), np.log(2), rtol=1e-6)


def readout_spread(logits: torch.Tensor) -> torch.Tensor:
    """Of one value per row."""
    return logits[:, -1].std(-1)


METRICS = [
    LogitDiff(5, [7, 9]), LogitDiff([5, 6], 9), Logits([5]), Logits([7, 9, 5]), LabelScores(LABELS),
    Accuracy(LABELS, ["glad", "sad"]), LogProb(5), Prob([5, 7]), KL(), KL("donor"), JS(),
    JS("donor"), OnLogits(readout_spread), OnLogits(lambda logits: logits[:, -9:, 7]),
]  # fmt: skip


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
@pytest.mark.parametrize("site", ["z", "resid_post"])
def test_engines_agree(gqa: HookedALM, metric: Any, site: Any) -> None:
    base, donor = gqa.encode(**BASE), gqa.encode(**OTHER)
    fast, plain = both(gqa, base, donor, metric, site=site, places=["audio", "readout"])
    assert moved(plain) > 1e-4 or isinstance(metric, Accuracy)
    if isinstance(metric, KL):
        reached = plain.base if metric.to == "base" else plain.donor
        assert np.abs(reached).max() < 1e-6
        assert fast.base.shape == (2,)


@pytest.mark.parametrize("engine", ["fast", "hooks"])
@torch.no_grad()
def test_metrics_read_the_model(gqa: HookedALM, engine: Any) -> None:
    """Base, donor and a cell against logits of the plain runs, padded differently in each."""
    base, donor = gqa.encode(**BASE), gqa.encode(**hf_inputs([[31], [23]], [6, 9], seed=2))
    ours, theirs = gqa(base)[:, -1].double(), gqa(donor)[:, -1].double()

    def measured(metric: Any) -> Any:
        # At the last position of the last block, the cell's logits are the donor's.
        return patch(gqa, base, donor, metric, places=["readout"], layers=[3], engine=engine)

    found = measured(LogitDiff(5, [7, 9]))
    for got, logits in ((found.base, ours), (found.donor, theirs), (found.values[0, 0], theirs)):
        expected = logits[[0, 1], 5] - logits[[0, 1], [7, 9]]
        np.testing.assert_allclose(got, expected, atol=1e-5)
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(measured(KL()).values[0, 0], kl, rtol=1e-4)
    np.testing.assert_allclose(measured(KL("donor")).base,
                               (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-4)  # fmt: skip
    np.testing.assert_allclose(measured(Prob(5)).donor, log_q[:, 5].exp(), rtol=1e-4)
    scores = measured(LabelScores(LABELS))
    assert scores.axes["label"] == ("sad", "calm", "glad")
    np.testing.assert_allclose(scores.base[:, 0], ours[:, [5, 11]].logsumexp(-1), rtol=1e-5)


@torch.no_grad()
def test_rows_are_scored_a_chunk_at_a_time(gqa: HookedALM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits over the vocabulary are held for some cells, never for all."""
    import hooked_alm.methods.patching.measurement as measurement

    base, donor = gqa.encode(**BASE), gqa.encode(**OTHER)
    seen: list[int] = []

    class Counting(LogProb):
        def __call__(self, logits: Any, row: int, reference: Any) -> Any:
            seen.append(len(logits))
            return super().__call__(logits, row, reference)

    def sweep() -> np.ndarray:
        return patch(gqa, base, donor, Counting(5), site="z", heads="each").values

    whole = sweep()
    assert max(seen) == 24
    seen.clear()
    monkeypatch.setattr(measurement, "CHUNK_BYTES", 4 * 337 * 5)
    np.testing.assert_allclose(sweep(), whole, atol=1e-5)
    assert max(seen) == 5


def test_refusals(gqa: HookedALM) -> None:
    base = gqa.encode(**BASE)
    for engine in ("fast", "hooks"):
        with pytest.raises(InputError, match="measuring 2 rows: the metric has answers for 1"):
            patch(gqa, base, "zero", LogProb([4]), engine=engine)  # type: ignore[arg-type]
        for metric in (KL("donor"), JS("donor")):
            with pytest.raises(InputError, match="from the donor: this donor is not a run"):
                patch(gqa, base, "zero", metric, engine=engine)  # type: ignore[arg-type]
