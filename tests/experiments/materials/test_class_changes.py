"""What changes of a class's units do to answers, by hand."""

import numpy as np
import pandas as pd
import pytest

from hooked_alm.experiments.materials.class_changes import change_row, second_pass
from hooked_alm.experiments.workbench.intervals import Draws
from hooked_alm.methods.reading.labels import LabelSet

LABELS = LabelSet(names=("glad", "sad"), spellings=(((1,),), ((2,),)))


def test_a_row_by_hand() -> None:
    """Of three values the last is no label's; leads are over the best other label."""
    row = change_row(LABELS, "sad", "glad", np.array([1.0, 3.0, 9.0]), np.array([2.0, 1.5, 9.0]))
    assert row == {
        "of": "glad", "right_clean": 1.0, "right": 0.0, "lead_clean": 2.0, "lead": -0.5,
        "said_of": 1.0, "lead_of": 0.5,
    }  # fmt: skip


def test_the_second_pass_reads_the_units_of_what_was_answered() -> None:
    """Ten items were right, and lose three at 2; five were wrong, and win four."""
    rows, answers = [], []
    for n in range(15):
        was = n < 10
        answers.append({"item": f"i{n}", "prediction": "glad" if was else "sad"})
        for of in LABELS.names:
            for alpha in (0.0, 2.0):
                changes = alpha > 0 and of == answers[-1]["prediction"] and n not in range(3, 11)
                right = float(was != changes)
                other = 1.0 if of != answers[-1]["prediction"] else right  # must not be read
                rows.append({
                    "item": f"i{n}", "group": f"g{n}", "of": of, "alpha": alpha,
                    "right_clean": float(was), "right": other,
                })  # fmt: skip
    found = second_pass(pd.DataFrame(rows), pd.DataFrame(answers), Draws(0, 1000))
    means = found.set_index(["measure", "alpha"])["mean"].to_dict()
    assert means == pytest.approx({
        ("right", 0.0): 10 / 15, ("right", 2.0): 11 / 15, ("lost", 0.0): 0.0, ("lost", 2.0): 0.3,
        ("won", 0.0): 0.0, ("won", 2.0): 0.8,
    })  # fmt: skip
    assert found[found.measure == "won"].n.tolist() == [5, 5]
    none = second_pass(pd.DataFrame(rows), pd.DataFrame(answers).iloc[:0], Draws(0, 1000))
    assert none.empty
