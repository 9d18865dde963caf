"""The benchmark of sweeps at its smallest: all sides give the same numbers, and the file is whole.

Times are not tested: at this size they mean nothing.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tolerances import BENCH_SWEEPS

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ["--layers", "3", "--d-model", "32", "--heads", "4", "--positions", "40", "--text", "6",
        "--pairs", "3", "--sampled-positions", "4"]  # fmt: skip
N_CELLS = {
    "head_z_readout": 3 * 4,
    "audio_span_resid": 3,
    "layer_position_resid": 3 * 4,
    "head_to_head_q_edges": 3 * 4 * 4,  # three pairs of layers
    "mlp_out_audio": 3,
    "edges_into_block": 4 * 4,
}
PAIRS = {
    "head_z_readout": 4 * (3 + 2 + 1),
    "audio_span_resid": 6 * (3 + 2 + 1),
    "layer_position_resid": (35 + 25 + 15 + 5) * (3 + 2 + 1),
    "head_to_head_q_edges": 4 * 4 * (2 * 1 + 1 * 2),
    "mlp_out_audio": 20 * (3 + 2 + 1),
    "edges_into_block": 4 * 4 * 2,
}
"""Of layer and position, that the cells reach; a forward has 3 * 40."""
PEERS = {"bridge", "hf_hooks"}


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script as a module; it imports its neighbour by name, as scripts do."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("bench_sweeps", SCRIPTS / "bench_sweeps.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_sweeps"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in ("bench_sweeps", "gpu_check", "sweep_peers"):
            sys.modules.pop(name, None)


def figures(bench: Any, folder: Path, *options: str) -> dict[str, Any]:
    out = folder / "figures.json"
    bench.main([*TINY, "--out", str(out), *options])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_side_gives_the_same_numbers(bench: Any, tmp_path: Path, kv_heads: int) -> None:
    found = figures(
        bench, tmp_path, "--quick", "--kv-heads", str(kv_heads), "--peers", *sorted(PEERS)
    )
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["kv_heads"] == kv_heads
    rows = {(row["work"], row["peer"]): row for row in found["rows"] if "peer" in row}
    alone = {row["work"]: row for row in found["rows"] if "peer" not in row}
    assert [*alone] == ["eap", "eap_ig"]
    assert alone["eap_ig"]["operations"]["dispatched"] > alone["eap"]["operations"]["dispatched"]
    assert set(rows) == {(work, peer) for work in N_CELLS for peer in PEERS}
    for (work, _), row in rows.items():
        assert row["max_abs_error"] < BENCH_SWEEPS
        assert row["largest_effect"] > 100 * BENCH_SWEEPS
        assert row["operations"]["dispatched"] > 1000
        assert row["n_cells"] == N_CELLS[work]
        assert row["model_forwards"] == pytest.approx(PAIRS[work] / (3 * 40))
        assert row["peer_cells_timed"] == 3
        low, high = row["interval"]
        assert 0 < low <= row["ratio"] <= high
        assert 0 < row["ours_s"] < row["whole_call_s"]
        assert 0 < row["sweep_forwards"] < row["whole_call_forwards"]
        assert min(row["peer_s_per_cell"], row["forward_s"]) > 0


def test_every_cell_of_every_side(bench: Any, tmp_path: Path) -> None:
    """Not only those that the rounds draw."""
    from sweep_peers import Models, Sizes, made_peers

    sizes = Sizes(positions=40, text=6, layers=3, heads=4, kv_heads=2, d_model=32)
    models = Models(sizes, tmp_path)
    with torch.no_grad():
        peers = made_peers(models, sorted(PEERS))
        assert models.hf.config.text_config._attn_implementation == "sdpa"  # not the twin's
        for work in bench.works(models, bench.middles(4, 40), [*N_CELLS]):
            result = work.call()
            ours = [float(result.values[*cell.index, 0]) for cell in work.cells]
            assert len(set(ours)) > 0.7 * len(ours), work.name  # cells are told apart
            for peer in peers:
                theirs = [peer.value(cell) for cell in work.cells]
                assert ours == pytest.approx(theirs, abs=BENCH_SWEEPS, rel=0), work.name


def test_a_peer_that_cannot_be_imported_is_left_out(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nnsight", None)
    found = figures(
        bench, tmp_path, "--works", "audio_span_resid", "--peers", "hf_hooks", "nnsight"
    )
    assert [row["peer"] for row in found["rows"]] == ["hf_hooks"]
    assert "left out: nnsight" in capsys.readouterr().out


def test_scaling_has_three_sizes_of_each(bench: Any, tmp_path: Path) -> None:
    found = figures(bench, tmp_path, "--scaling", "--works", "head_z_readout", "--pairs", "1")
    sizes = [row["size"] for row in found["rows"]]
    assert sizes == [f"{axis} = {n}" for axis, ns in {
        "T": (27, 40), "L": (1, 3), "H": (2, 4, 8)}.items() for n in ns]  # fmt: skip
    for row in found["rows"]:
        assert row["sweep_forwards"] > 0
        expected = row["heads"] * (row["layers"] + 1) / (2 * row["positions"])
        assert row["model_forwards"] == pytest.approx(expected)


@pytest.mark.usefixtures("small_figures")
def test_gpu_check_writes_one_file(bench: Any, tmp_path: Path) -> None:
    """On a CPU, at its smallest: tokens and logits are Hugging Face's, and every part is there."""
    out = tmp_path / "check.json"
    sizes = [*TINY[: TINY.index("--pairs")], "--kv-heads", "4", "--device", "cpu"]
    bench.main(["--gpu-check", str(out), *sizes])
    found = json.loads(out.read_text())
    assert found["parity"] == {"is_equal": True, "max_difference": 0.0}
    assert found["generation"]["is_equal"]
    assert [row["work"] for row in found["sweeps"]] == [w for w in bench.WORKS if w in N_CELLS]
    assert all(row["noise"] > 0 for row in found["sweeps"])  # it runs in bf16
    assert found["attribution"][0]["pearson"] is not None
    assert found["machine"]["layers"] == 3
    assert found["experiment"]["n_sweeps"] == 18
    assert found["experiment"]["n_cells"] == 18 * 3 * 8
    assert 0 < found["experiment"]["noise"] < found["experiment"]["shift_std"]
