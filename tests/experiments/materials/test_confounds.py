"""What else tells clips apart: the statistics against SciPy's, and what is found or passed over."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency, kruskal

from hooked_alm.experiments.materials import confounds as module
from hooked_alm.experiments.materials.confounds import confounds
from hooked_alm.methods.statistics import draws


def clips(n: int = 18, seed: int = 0) -> pd.DataFrame:
    """Clips of three labels, whose features have nothing to do with them."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "emotion": np.resize(["sad", "angry", "calm"], n),
            "duration_s": rng.normal(3, 1, n),
            "rms_dbfs": rng.normal(-20, 3, n),
            "sample_rate": rng.choice([8000, 16000], n),
            "channels": 1,
            "speaker": rng.choice(["ann", "bob", "cat"], n),
        }
    )


def test_statistics_are_those_of_kruskal_and_pearson() -> None:
    table = clips()
    codes = table.emotion.factorize()[0][None]
    parts = [part for _, part in table.groupby("emotion").rms_dbfs]
    ranks = module._kruskal(module._ranks(table.rms_dbfs), codes)[0]
    assert ranks * 17 / 18 == pytest.approx(kruskal(*parts).statistic)  # theirs divides by n − 1
    counts = pd.crosstab(table.emotion, table.speaker)
    found = module._pearson(module._places(table.speaker), codes)[0]
    assert found == pytest.approx(chi2_contingency(counts, correction=False).statistic)


@pytest.mark.parametrize("most_bytes", [2**27, 1])
def test_deals_are_as_many_at_once_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    """The same deals, dealt by the definition."""
    monkeypatch.setattr(module, "N_DEALS", 300)
    monkeypatch.setattr(module, "LEVEL", 5.0)  # whatever it is, it is told
    table = clips(40)
    table["rms_dbfs"] += table.emotion.factorize()[0]
    codes, ranks = table.emotion.factorize()[0], table.rms_dbfs.rank()
    rng = np.random.default_rng(4)
    deals = [codes, *(rng.permutation(codes) for _ in range(module.N_DEALS))]
    fits = [kruskal(*(ranks[deal == code] for code in range(3))).statistic for deal in deals]
    monkeypatch.setattr(draws, "MOST_BYTES", most_bytes)
    found = confounds(table, "emotion", seed=4).set_index("feature").p
    assert found["rms_dbfs"] == np.mean(np.array(fits) >= fits[0] - 1e-9)
    assert 0 < found["rms_dbfs"] < 1


def test_a_speaker_for_every_clip_needs_no_table_of_clips_by_speakers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(draws, "MOST_BYTES", 2**22)
    monkeypatch.setattr(module, "N_DEALS", 200)
    n = 6000
    table = clips(n)[["emotion", "duration_s"]].assign(speaker=[f"s{i}" for i in range(n)])
    tracemalloc.start()
    try:
        found = confounds(table, "emotion", seed=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.empty, "whoever speaks once tells nothing apart"
    assert peak < 2 * 2**22 + 500 * n < 8 * n**2 / 10


@pytest.mark.parametrize(
    ("feature", "values", "found"),
    [
        ("duration_s", {"sad": 4.0, "angry": 2.0, "calm": 3.0}, "sad 4 s, angry 2 s, calm 3 s"),
        ("rms_dbfs", {"sad": -30.0, "angry": -10.0, "calm": -np.inf}, "calm -inf dBFS"),
        ("sample_rate", {"sad": 8000}, "sad 8000 in 6 of 6, angry 16000 in 6 of 6"),
        ("channels", {"calm": 2}, "calm 2 in 6 of 6"),
        ("codec", {"angry": "MP3/MPEG_LAYER_III"}, "angry MP3/MPEG_LAYER_III in 6 of 6"),
        ("speaker", {"sad": "dan", "angry": "eve"}, "sad dan in 6 of 6, angry eve in 6 of 6"),
    ],
)
def test_every_feature_that_goes_with_the_labels_is_named(
    feature: str, values: dict[str, object], found: str
) -> None:
    table = clips()
    usual = {"sample_rate": 16000, "codec": "WAV/PCM_16", "channels": 1, "speaker": "ann"}
    table[feature] = [values.get(one, usual.get(feature)) for one in table.emotion]
    (one,) = confounds(table, "emotion", seed=0).itertuples()
    assert one.feature == feature
    assert found in one.found
    assert one.p < 0.01
    assert confounds(table, "emotion", seed=0, without=[feature]).empty


def test_nothing_is_found_where_nothing_is_and_rarely_by_chance() -> None:
    hits = [not confounds(clips(seed=seed), "emotion", seed=seed).empty for seed in range(60)]
    assert sum(hits) <= 6  # 5 % of all clips' features together; 7 or more have p < 0.04
    assert confounds(clips().drop(columns=["speaker"]), "emotion", seed=1).empty


def test_the_label_itself_is_no_confound() -> None:
    table = clips().assign(speaker=lambda t: t.emotion)
    assert confounds(table, "emotion", seed=0).feature.tolist() == ["speaker"]
    assert confounds(table.drop(columns="emotion"), "speaker", seed=0).empty


def test_two_clips_cannot_show_a_confound() -> None:
    assert confounds(clips(2).assign(duration_s=[1.0, 9.0]), "emotion", seed=0).empty
