"""Every experiment's declarations at work: what fails, what it takes back, what can come out.

``{name}_verdicts`` in ``tests/support`` has, for each experiment, ``cases()``: results in which
every control passes; ``BROKEN``: control -> those results with a fault that it must show; and
``OTHER_WAY``: finding -> results in which it comes out the other way.
"""

import functools
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from hooked_alm.experiments.registry import EXPERIMENTS, load_experiment
from hooked_alm.experiments.workbench.claims import Verdict, judge
from hooked_alm.experiments.workbench.controls import FAIL

NAMES = sorted(EXPERIMENTS)


@functools.cache
def made(name: str) -> Any:
    return import_module(f"{name}_verdicts")


@functools.cache
def _sound(name: str) -> Any:
    return made(name).cases()


def sound(name: str) -> Any:
    """Results in which every control passes, to be changed at will."""
    run = _sound(name)
    return replace(run, tables={key: table.copy() for key, table in run.tables.items()})


def evidence(kind: Any, verdict: Verdict, finding: str) -> set[str]:
    """Tables that a finding rests on, and the name of the claim that it is of."""
    claims = {one.name for one in kind.claims if one.name == finding or "{}" in one.name}
    return {*verdict.rests_on[finding], *claims}


@pytest.mark.parametrize("name", NAMES)
def test_every_control_passes_and_every_one_can_fail(name: str) -> None:
    kind = load_experiment(name)
    before = kind.judge(sound(name)).controls
    assert not {*before.control[before.verdict == FAIL]}
    assert {one.name for one in kind.controls} == {*made(name).BROKEN}
    for control in kind.controls:
        found = kind.judge(made(name).BROKEN[control.name](sound(name)))
        verdicts = dict(zip(found.controls.control, found.controls.verdict, strict=True))
        assert verdicts[control.name] == FAIL, control.name
        doubt = f"the control '{control.name}' failed"
        for finding, one in found.findings.items():
            is_hit = bool({*control.of} & evidence(kind, found, finding))
            assert (doubt in one.doubts) == is_hit, (control.name, finding)
            assert not (is_hit and one.established)
        assert control.name in found.warnings["Failed controls"]


@pytest.mark.parametrize("name", NAMES)
def test_every_defect_takes_back_what_it_touches(name: str) -> None:
    kind, run = load_experiment(name), sound(name)
    for defect in kind.defects:
        here = [replace(defect, holds=lambda config: True)]
        found = judge(kind.controls, kind.claims, here, run)
        for finding, one in found.findings.items():
            is_hit = bool({*defect.touches} & evidence(kind, found, finding))
            assert (f"known defects {defect.id}" in one.doubts) == is_hit, (defect.id, finding)


@pytest.mark.parametrize("name", NAMES)
def test_no_claim_rests_on_nothing(name: str) -> None:
    kind = load_experiment(name)
    for claim in kind.claims:
        assert {*claim.rests_on} <= {*kind.tables}
        guards = [one.name for one in kind.controls if {*one.of} & {*claim.rests_on, claim.name}]
        assert guards, f"no control vouches for {claim.name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_can_come_out_both_ways(name: str) -> None:
    kind = load_experiment(name)
    before = kind.judge(sound(name)).findings
    assert {*before} == {*made(name).OTHER_WAY}
    for finding, other_way in made(name).OTHER_WAY.items():
        after = kind.judge(other_way(sound(name))).findings[finding]
        assert after.established != before[finding].established, (finding, after.doubts)
