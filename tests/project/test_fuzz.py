"""A small part of ``scripts/fuzz.py``: some damaged inputs of every kind have a clear end."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
AREAS = ("weights", "configs", "texts", "audio", "items", "settings", "runs")
N_INPUTS = 8


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """The script as a module; it imports its neighbours by name, as scripts do."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(SCRIPTS)
        yield import_module("fuzz")
    for name in ("fuzz", "fuzz_areas", "fuzz_damage"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", AREAS)
def test_no_damage_ends_in_a_traceback_or_in_silence(
    fuzz: ModuleType, name: str, tmp_path: Path
) -> None:
    area = import_module("fuzz_areas").AREAS[name][0](tmp_path)
    for number in range(N_INPUTS):
        found = fuzz.attempt(area, number, seed=1, folder=tmp_path / f"input{number}")
        assert found["outcome"] not in fuzz.FAULTS, found


def test_what_it_must_see_it_sees(fuzz: ModuleType, tmp_path: Path) -> None:
    """The outcomes themselves: an area of made-up results."""
    from hooked_alm.errors import InputError

    class Made:
        def __init__(self, result: object) -> None:
            self.result = result

        def damage(self, folder: Path, rng: object) -> str:
            return "made up"

        def use(self, folder: Path) -> bool:
            if isinstance(self.result, BaseException):
                raise self.result
            return bool(self.result)

    results = (True, InputError("no"), ValueError("raw"), fuzz.Hang(), False)
    found = [fuzz.attempt(Made(one), 0, 0, tmp_path)["outcome"] for one in results]
    assert found == [*fuzz.OUTCOMES]
