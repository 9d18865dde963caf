"""Every row of the families' test table, by name."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from family_case import Case


def all_cases() -> Iterator[Case]:
    for path in sorted((Path(__file__).parent / "cases").glob("*.py")):
        module = import_module(f"cases.{path.stem}")
        yield from getattr(module, "CASES", None) or (module.CASE,)


CASES = {case.name: case for case in all_cases()}
