"""Reading safetensors: one shard or several, mapped into memory, damaged files refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hooked_alm import ConversionError
from hooked_alm.checkpoint import JoinedCheckpoint, PickledCheckpoint, SafetensorsCheckpoint
from tiny import TinyModels


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with an index."""
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(4, dtype=torch.bfloat16),
        "c": torch.tensor([1, 2, 3]),
    }
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    for shard in sorted(set(weight_map.values())):
        names = [name for name, file in weight_map.items() if file == shard]
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_names_shapes_and_tensors(sharded: Path) -> None:
    checkpoint = SafetensorsCheckpoint(sharded)
    assert dict(checkpoint) == {"a": (2, 3), "b": (4,), "c": (3,)}
    assert len(checkpoint) == 3
    assert torch.equal(checkpoint.read("a", torch.float32), torch.arange(6.0).reshape(2, 3))
    assert checkpoint.read("b", torch.float32).dtype == torch.float32
    assert checkpoint.read("a", torch.bfloat16).dtype == torch.bfloat16
    # Whole numbers are no weights: a dtype is not for them.
    assert torch.equal(checkpoint.read("c", torch.bfloat16), torch.tensor([1, 2, 3]))


def test_edits_in_memory_do_not_reach_the_file(sharded: Path) -> None:
    before = (sharded / "one.safetensors").read_bytes()
    tensor = SafetensorsCheckpoint(sharded).read("a", torch.float32)
    tensor.zero_()
    assert (sharded / "one.safetensors").read_bytes() == before
    assert SafetensorsCheckpoint(sharded).read("a", torch.float32).any()


def test_missing_files(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"two\.safetensors: the file is missing"):
        SafetensorsCheckpoint(sharded)
    empty = tmp_path_factory.mktemp("empty")
    (empty / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConversionError, match="found neither .* pickled checkpoints are not read"):
        SafetensorsCheckpoint(empty)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_shards(sharded: Path, kept: int) -> None:
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConversionError, match="two.safetensors .*truncated or damaged; download"):
        SafetensorsCheckpoint(sharded)


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors"}, "'c'"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}, "'c'"),
        (
            {n: "two.safetensors" for n in "bcd"} | {"a": "one.safetensors"},
            "'d'",
        ),
    ],
)
def test_index_that_does_not_fit(sharded: Path, weight_map: dict[str, str], named: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(ConversionError, match=f"disagree on 1 tensors, .*{named}"):
        SafetensorsCheckpoint(sharded)


@pytest.mark.parametrize("text", ["", "{", '{"metadata": {}}', "[]", '{"weight_map": ["a"]}'])
def test_index_that_is_no_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConversionError, match="index.json.*download"):
        SafetensorsCheckpoint(sharded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    good, bad = torch.ones(3, 2), torch.ones(3, 2)
    bad[1, 1] = value
    save_file({"good": good, "bad": bad}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    checkpoint.read("good", torch.float32)
    with pytest.raises(ConversionError, match="reading bad from .* holds NaN or infinity"):
        checkpoint.read("bad", torch.float32)


def test_values_that_overflow_the_dtype(tmp_path: Path) -> None:
    save_file({"big": torch.tensor([1e30])}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.read("big", torch.bfloat16).isfinite().all()
    with pytest.raises(ConversionError, match=r"big .*1e\+30, more than torch.float16 can hold"):
        checkpoint.read("big", torch.float16)


def test_loaded_weights_are_mapped_not_copied(tiny_models: TinyModels, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_models.folder(), folder)
    checkpoint = SafetensorsCheckpoint(folder)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    tensor = checkpoint.read("language_model.lm_head.weight", torch.float32)
    mapped = [line.split() for line in maps.read_text().splitlines() if str(folder) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    assert any(start <= tensor.data_ptr() < stop for start, stop in ranges)
    # What is converted is a copy, and the file is let go.
    del tensor
    kept = checkpoint.read("language_model.lm_head.weight", torch.bfloat16)
    assert str(folder) not in maps.read_text()
    assert kept.dtype == torch.bfloat16


def test_a_pickled_file(tmp_path: Path) -> None:
    """Tensors by name, at the top or under a key, without running anything."""
    path, tensors = tmp_path / "m.pth", {"a": torch.arange(6.0).reshape(2, 3)}
    torch.save(tensors, path)
    checkpoint = PickledCheckpoint(path)
    assert dict(checkpoint) == {"a": (2, 3)}
    assert torch.equal(checkpoint.read("a", torch.bfloat16), tensors["a"].bfloat16())
    torch.save({"model": tensors, "step": 3}, path)
    assert dict(PickledCheckpoint(path, "model")) == {"a": (2, 3)}
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = PickledCheckpoint(tmp_path / "old.pth")
    assert torch.equal(old.read("a", torch.float32), tensors["a"])
    with pytest.raises(ConversionError, match="expected tensors by name"):
        PickledCheckpoint(path)
    with pytest.raises(ConversionError, match="tensors by name under 'weights'"):
        PickledCheckpoint(path, "weights")
    for damaged in (path.read_bytes()[:200], b"PK123", b""):
        path.write_bytes(damaged)
        with pytest.raises(ConversionError, match=r"reading .*m\.pth \(\d+ bytes\): it is damaged"):
            PickledCheckpoint(path)
    path.unlink()
    with pytest.raises(ConversionError, match="the file is missing"):
        PickledCheckpoint(path)


class Runs:
    """Writes a file when it is unpickled by a reader that executes code."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.trace, "w")


def test_a_pickled_program_is_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "m.pth", tmp_path / "trace"
    torch.save({"a": Runs(str(trace))}, path)
    with pytest.raises(ConversionError, match="holds more than tensors"):
        PickledCheckpoint(path)
    assert not trace.exists()


def test_parts_under_their_names(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    save_file({"a": torch.ones(4)}, other / "model.safetensors")
    joined = JoinedCheckpoint(
        SafetensorsCheckpoint(sharded), {"text_model": SafetensorsCheckpoint(other)}
    )
    assert dict(joined) == {"a": (2, 3), "b": (4,), "c": (3,), "text_model/a": (4,)}
    assert torch.equal(joined.read("text_model/a", torch.float32), torch.ones(4))
    assert torch.equal(joined.read("a", torch.float32), torch.arange(6.0).reshape(2, 3))
