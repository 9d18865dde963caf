"""Which nodes count: the split, the tests, the false discovery rate, on tables made by hand."""

import numpy as np
import pandas as pd
import pytest

from hooked_alm.experiments.circuits.settings import CircuitsConfig
from hooked_alm.experiments.circuits.tables import (
    CELL,
    PATH,
    cell_tests,
    confirmed,
    node_cells,
    q_values,
    top_paths,
    winners,
)
from hooked_alm.experiments.materials.held_out import split_groups

GROUPS = tuple(f"g{i:02d}" for i in range(20))
CONFIG = CircuitsConfig(discovery_share=0.5)


def test_benjamini_and_hochberg_by_hand() -> None:
    # q of rank i is the least p_j * 5 / j over j >= i: 0.05 for all of the first four.
    p = np.array([0.04, 0.01, 0.5, 0.03, 0.02])
    every = np.ones(5, bool)
    np.testing.assert_allclose(q_values(p, every), [0.05, 0.05, 0.5, 0.05, 0.05])
    # 0.005 * 4, then 0.04 * 4 / 3 for both, as it is less than 0.03 * 4 / 2.
    p = np.array([0.005, 0.03, 0.04, 0.9])
    np.testing.assert_allclose(q_values(p, every[:4]), [0.02, 0.16 / 3, 0.16 / 3, 0.9])


def test_what_is_no_hypothesis_costs_nothing() -> None:
    p = np.array([1.0, 0.02, 1.0, 0.04])
    q = q_values(p, np.array([False, True, False, True]))
    np.testing.assert_allclose(q, [np.nan, 0.04, np.nan, 0.04])
    assert np.isnan(q_values(p, np.zeros(4, bool))).all()


def test_the_split_is_reproducible_and_by_name() -> None:
    split = split_groups(GROUPS, 0.5, 3)
    assert split == split_groups([*reversed(GROUPS), *GROUPS], 0.5, 3)
    assert split != split_groups(GROUPS, 0.5, 4)
    assert list(split.values()).count("discovery") == 10
    assert set(split_groups(["a", "b"], 0.99, 0).values()) == {"discovery", "held-out"}


def rows(
    effects: dict[tuple[int, int], np.ndarray], n_pairs: int = 2, noise: float = 0.0
) -> pd.DataFrame:
    """Cells with an effect per group; pairs of a group scatter around it by as much each way."""
    parts = split_groups(GROUPS, CONFIG.discovery_share, CONFIG.seed)
    return pd.DataFrame(
        [
            {
                "pair": f"{group}-{k}", "contrast": "c", "group": group, "part": parts[group],
                "direction": "noising", "place": "readout", "layer": layer, "head": head,
                "toward": effect[i] + (k - (n_pairs - 1) / 2), "noise": noise,
            }
            for (layer, head), effect in effects.items()
            for i, group in enumerate(GROUPS)
            for k in range(n_pairs)
        ]
    )  # fmt: skip


def test_pairs_of_a_group_are_one_piece_of_evidence() -> None:
    effects = {(0, 0): np.full(20, 0.3)}
    for n_pairs in (2, 4):
        found = cell_tests(rows(effects, n_pairs), CELL, seed=0)
        # All 20 groups agree, whatever their pairs do.
        assert found["mean"].item() == pytest.approx(0.3)
        assert found.n_groups.item() == 20
        assert found.share_positive.item() == 1
        assert found.p.item() == pytest.approx(1 / 20_001, rel=1.1)


def test_winners_carry_and_are_the_largest() -> None:
    effects = {
        (0, 0): np.full(20, 0.3),
        (0, 1): np.full(20, -0.9),  # opposes
        (1, 0): np.full(20, 0.7),
        (1, 1): np.tile([0.5, -0.5], 10),  # no sign
        (1, -1): np.full(20, 2.0),
        (2, 0): np.full(20, 0.01),  # too small
        (2, 1): np.zeros(20),
    }
    table = rows(effects)
    table.loc[(table.layer == 2) & (table["head"] == 1), "toward"] = 0.0
    cells = node_cells(table, CONFIG)
    assert cells[cells.found][["layer", "head"]].to_numpy().tolist() == [
        [0, 0], [0, 1], [1, 0], [1, -1],
    ]  # fmt: skip
    # Ten groups of one sign: p = 2 / 2^10; six hypotheses, five of them at that p.
    np.testing.assert_allclose(cells[cells.found].q, 2 / 1024 * 6 / 5)
    assert np.isnan(cells.q.iloc[-1])
    chosen = winners(cells, CONFIG)
    assert chosen.node.tolist() == ["L1H0", "L0H0", "MLP 1"]
    few = winners(cells, CircuitsConfig(n_heads=1, n_mlps=0))
    assert few.node.tolist() == ["L1H0"]


def test_what_held_only_on_the_discovery_pairs_is_not_confirmed() -> None:
    table = rows({(0, 0): np.full(20, 0.3), (1, 0): np.full(20, 0.7)})
    is_gone = (table.layer == 1) & (table.part == "held-out")
    table.loc[is_gone, "toward"] *= -1
    chosen = winners(node_cells(table, CONFIG), CONFIG)
    found = confirmed(chosen, table, CELL, CONFIG).set_index("node")
    assert found.confirmed.to_dict() == {"L1H0": False, "L0H0": True}
    # One-sided: 1 / 2^10 of all signs, times two hypotheses.
    assert found.held_out_p["L0H0"] == pytest.approx(1 / 1024)
    assert found.held_out_q["L0H0"] == pytest.approx(2 / 1024)
    assert found.held_out_mean["L1H0"] == pytest.approx(-0.7)


def test_what_rounding_could_be_is_not_found() -> None:
    """Twice the noise of a mean over 20 pairs: below 0.3 by a hair, or above it."""
    for noise, is_found in ((0.33, True), (0.34, False)):
        table = rows({(0, 0): np.full(20, 0.3), (1, 0): np.full(20, 0.9)}, noise=noise * 2)
        cells = node_cells(table, CONFIG)
        np.testing.assert_allclose(cells.noise, noise * 2 / np.sqrt(20))
        assert cells.found.tolist() == [is_found, True]
        chosen = winners(node_cells(table.assign(noise=0.0), CONFIG), CONFIG)
        again = confirmed(chosen, table, CELL, CONFIG).set_index("node")
        assert again.confirmed.to_dict() == {"L1H0": True, "L0H0": is_found}


def test_noise_is_rarely_a_discovery() -> None:
    rng = np.random.default_rng(0)
    n_false = 0
    for _ in range(5):
        effects = {(layer, 0): rng.normal(size=20) for layer in range(40)}
        n_false += int(node_cells(rows(effects), CONFIG).found.any())
    assert n_false <= 1


def test_paths_are_ranked_on_one_part_and_tested_on_the_other() -> None:
    table = rows({(i, 0): np.full(20, size) for i, size in enumerate((0.2, -0.8, 0.0, 0.5))})
    table["toward"] -= [(-0.5, 0.5)[i % 2] for i in range(len(table))]
    table["mode"], table["receiver"] = "edge", "r"
    table["sender"] = "s" + table.layer.astype(str)
    is_gone = (table.layer == 3) & (table.part == "held-out")
    table.loc[is_gone, "toward"] = np.tile([1.0, -1.0], 10)
    top = confirmed(top_paths(table, CONFIG), table, PATH, CONFIG)
    assert top.sender.tolist() == ["s1", "s3", "s0"]
    assert top.confirmed.tolist() == [True, False, True]
    nothing = table.iloc[:0]
    assert confirmed(top_paths(nothing, CONFIG), nothing, PATH, CONFIG).empty
