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
    assert torch.equal(checkpoint.read("c", torch.int64), torch.tensor([1, 2, 3]))


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


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"x"', "[" * 10**5, "\\xff", "{}", '{"metadata": {}}',
     '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {}}', '{"weight_map": 3}',
     '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["b"]}}'],
)  # fmt: skip
def test_index_that_is_no_index(sharded: Path, text: str) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_bytes(text.encode().replace(rb"\xff", b"\xff"))
    with pytest.raises(
        ConversionError,
        match=r"index\.json: .*(expected an object whose weight_map|no JSON object|no UTF-8)",
    ):
        SafetensorsCheckpoint(sharded)


@pytest.mark.parametrize(
    "file",
    ["../one.safetensors", "/etc/hostname", "", ".", "..", "a/../../one.safetensors",
     "out/one.safetensors", "loop/one.safetensors", "one\0.safetensors", "x" * 300, "\ud800"],
)  # fmt: skip
def test_files_outside_the_folder(sharded: Path, tmp_path: Path, file: str) -> None:
    """Names of an index do not lead out, by themselves or by a folder that is a link."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "out").symlink_to(tmp_path)
    (inner / "loop").symlink_to("loop")
    write_index(inner, {"a": file})
    with pytest.raises(ConversionError, match="it says that a is in .*file of this folder"):
        SafetensorsCheckpoint(inner)


def test_shards_may_be_links_or_lie_deeper(sharded: Path, tmp_path: Path) -> None:
    """As in the caches of the hub."""
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    (inner / "1.safetensors").symlink_to(sharded / "one.safetensors")
    shutil.copy(sharded / "two.safetensors", inner / "sub")
    deeper = "sub/two.safetensors"
    write_index(inner, {"a": "1.safetensors", "b": deeper, "c": deeper})
    assert set(SafetensorsCheckpoint(inner)) == {"a", "b", "c"}


@pytest.mark.parametrize("index", ["as it is", "{", '{"weight_map": {"a": "../x"}}'])
def test_a_single_file_goes_before_an_index(sharded: Path, index: str) -> None:
    """As transformers reads them: an index that was left behind names older weights."""
    save_file({"a": torch.ones(5)}, sharded / "model.safetensors")
    if index != "as it is":
        (sharded / "model.safetensors.index.json").write_text(index)
    checkpoint = SafetensorsCheckpoint(sharded)
    assert dict(checkpoint) == {"a": (5,)}
    assert torch.equal(checkpoint.read("a", torch.float32), torch.ones(5))


def test_what_else_lies_in_the_folder_is_not_read(sharded: Path) -> None:
    (sharded / "model.safetensors").mkdir()  # no file
    (sharded / "three.safetensors").write_bytes(b"no shard of the index")
    (sharded / "model.fp16.safetensors").write_bytes(b"a variant")
    assert set(SafetensorsCheckpoint(sharded)) == {"a", "b", "c"}


def header(content: bytes, length: int | None = None, data: bytes = bytes(16)) -> bytes:
    n = len(content) if length is None else length
    return n.to_bytes(8, "little") + content + data


def entry(**fields: object) -> bytes:
    return json.dumps(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **fields}}
    ).encode()


HEADERS = {
    "a length beyond the file": header(entry(), 10**6),
    "a giant length": header(entry(), 2**63),
    "no JSON": header(b"{" * 40),
    "no object": header(b"[1, 2]"),
    "no UTF-8": header(b"\xff" * 40),
    "offsets beyond the data": header(entry(data_offsets=[0, 10**9])),
    "offsets that do not fit the shape": header(entry(data_offsets=[0, 8])),
    "backward offsets": header(entry(data_offsets=[16, 0])),
    "overlapping tensors": header(entry()[:-1] + b", " + entry().replace(b'"a"', b'"b"')[1:]),
    "an unknown dtype": header(entry(dtype="F33")),
    "a negative shape": header(entry(shape=[-4])),
    "a giant shape": header(entry(shape=[2**62, 2**62])),
    "data that nothing names": header(entry(), data=bytes(32)),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_headers(tmp_path: Path, damage: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(HEADERS[damage])
    with pytest.raises(
        ConversionError, match=r"model.safetensors \(\d+ bytes\): .*download it again"
    ):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "named"),
    [(torch.int8, "int8"), (torch.int64, "int64"), (torch.uint8, "uint8"), (torch.bool, "BOOL"),
     (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"), (torch.complex64, f"C{64}")],
)  # fmt: skip
def test_dtypes_that_hold_no_weights(tmp_path: Path, dtype: torch.dtype, named: str) -> None:
    """Codes of quantised weights are not read as if they were the weights."""
    save_file({"w": torch.ones(3).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=f"w is stored as {named}, expected float64, float32"):
        SafetensorsCheckpoint(tmp_path).read("w", torch.bfloat16)
    torch.save({"w": torch.ones(3).to(dtype)}, tmp_path / "m.pth")
    with pytest.raises(ConversionError, match="w is stored as .*, expected float64, float32"):
        PickledCheckpoint(tmp_path / "m.pth").read("w", torch.bfloat16)


def test_counts_are_whole_numbers(sharded: Path) -> None:
    with pytest.raises(ConversionError, match="a is stored as float32, expected int64, int32"):
        SafetensorsCheckpoint(sharded).read("a", torch.int64)


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
