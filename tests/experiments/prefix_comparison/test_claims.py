"""What ``prefix_comparison`` must not let pass."""

import numpy as np

from hooked_alm.experiments.prefix_comparison.experiment import PrefixComparison
from prefix_comparison_verdicts import cases, spoilt


def test_a_divergence_out_of_range_is_found_in_every_table() -> None:
    check = {one.name: one.check for one in PrefixComparison.controls}["JS lies between 0 and ln 2"]
    for table in ("items", "runs", "curves", "classes", "matched"):
        for js in (np.log(2) + 0.01, -1e-5, np.nan):
            assert check(spoilt(cases(), table, "js", js)).passed is False
