"""Names of ``hooked_alm``: found at run time, by type checkers and by completion alike."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hooked_alm

SOURCE = Path(hooked_alm.__file__)
DESIGNED = (
    "HookedALM ALMInput patch path_patch LogitDiff Window Mean Noise OnLogits JS logit_lens "
    "compare_with_hf PatchResult"
).split()


def typed() -> dict[str, str]:
    """Name -> module, as the imports for type checkers have it."""
    (block,) = (node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    return {
        alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def test_one_list_for_both() -> None:
    assert typed() == hooked_alm._HOME
    assert {*DESIGNED} <= typed().keys()


@pytest.mark.parametrize("name", typed())
def test_a_name_is_its_modules(name: str) -> None:
    module = importlib.import_module(f"hooked_alm.{typed()[name]}")
    found = getattr(hooked_alm, name)
    assert found is getattr(module, name)
    assert not inspect.ismodule(found)
    assert found.__module__ == module.__name__
    assert name in dir(hooked_alm)


def test_the_function_stays_a_function_when_its_module_is_imported() -> None:
    """In a fresh process, whatever was imported first."""
    program = (
        "import hooked_alm.methods.patching.patch, hooked_alm\n"
        "from hooked_alm import patch, logit_lens\n"
        "assert callable(patch) and callable(logit_lens) and callable(hooked_alm.patch)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'hooked_alm' has no attribute 'pach'"):
        hooked_alm.pach  # noqa: B018
