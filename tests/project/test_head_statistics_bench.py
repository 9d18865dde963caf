"""The benchmark of ``head_statistics`` at its smallest: both sides do the same work.

Times are not tested: at this size they mean nothing.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ["--pairs", "2", "--rows", "3", "--positions", "20", "--d-model", "256", "--layers", "2"]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script as a module; it imports its neighbour by name, as scripts do."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location(
            "bench_head_statistics", SCRIPTS / "bench_head_statistics.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))
        sys.modules.pop("bench_forward", None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_line_for_every_comparison(
    bench: Any, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main([*TINY, "--dtype", dtype])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" / ")[0] for line in lines] == [
        f"3 x 20, {dtype}, {token_agg}" for token_agg in ("last", "last", "all ", "all ")
    ]
    for line in lines:
        ratio, low, high = map(float, re.findall(r"(\d+\.\d{3})[ ,\]]", line)[:3])
        assert 0 < low <= ratio <= high


def test_other_work_is_refused(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hooked side that measured something else would make the ratio worthless."""
    z_norms = bench.z_norms
    monkeypatch.setattr(bench, "z_norms", lambda hf, inputs: z_norms(hf, inputs) * 1.0001)
    with pytest.raises(AssertionError):
        bench.main(TINY)
