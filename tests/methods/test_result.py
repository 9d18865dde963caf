"""Results on disk: equal after a round trip, whole or absent, and never code."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hooked_alm.errors import InputError
from hooked_alm.methods.attribution.trust import Attribution, Checked
from hooked_alm.methods.patching.alignment import Window
from hooked_alm.methods.patching.pruning import PrunedCircuit
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.methods.reading.lens import LensFidelity
from hooked_alm.methods.result import MethodResult


def patch_result() -> PatchResult:
    generator = np.random.default_rng(0)
    places = ("audio", 7, Window(0.5, 1.25, 1), ("text", Window(0.0, 1.0), 3))
    return PatchResult(
        axes={"layer": (0, 1, (0, 1)), "head": (None,), "place": places, "example": (0, 1)},
        values=generator.normal(size=(2, 4, 1, 3)).T,  # not of one piece
        base=np.array([1.5, -0.0]),
        donor=np.array([np.nan, np.inf]),
        site="z",
        mode="replace",
        engine="fast",
        length_ratios=({"audio": 1.25}, {}),
    )


def checked() -> Checked:
    return Checked(
        coordinates=({"layer": 0, "place": "audio"},) * 3,
        strata=("top", "top", "random"),
        scores=np.arange(6.0).reshape(3, 2),
        exact=np.arange(6.0).reshape(3, 2) ** 2,
    )


RESULTS: list[MethodResult] = [
    patch_result(),
    checked(),
    Attribution(scores=patch_result(), checked=checked()),
    Attribution(scores=patch_result(), checked=None),
    PrunedCircuit(
        kept=(("hook_embed", "logits"),), removed=(), values=(0.25,),
        tested=((("hook_embed", "logits"), float("nan")),),
    ),
    LensFidelity(
        kl=torch.randn(3, 1, 2).to(torch.bfloat16), agrees=torch.ones(3, 1, 2),
        entropy=torch.zeros(3, 1, 2), residual_norm=torch.randn(2, 1, 3).permute(2, 1, 0),
        normaliser=torch.randn(3, 1, 2),
    ),
]  # fmt: skip


def equal(a: Any, b: Any) -> bool:
    """To the bit, and of one type all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, MethodResult):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))  # type: ignore[arg-type]
    if isinstance(a, dict):
        return equal([*a.items()], [*b.items()])
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (a != a and b != b)


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_a_round_trip(result: MethodResult, tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.safetensors"
    result.save(path)
    assert [*path.parent.iterdir()] == [path]
    found = type(result).load(str(path))
    assert equal(result, found)
    assert repr(found) == repr(result)
    if isinstance(found, PatchResult):
        assert not equal(dataclasses.replace(found, values=found.values + 1), result)
        assert found.select(place=Window(0.5, 1.25, 1)).values.shape == (3, 1, 2)
    found.save(path)  # over the older one
    assert equal(type(result).load(path), result)


def test_a_write_that_fails_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result"
    patch_result().save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="saving to .*result: No space left on device"):
        checked().save(path)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    for odd, name in ((len, "builtin_function_or_method"), (np.array([{}]), "ndarray")):
        result = dataclasses.replace(patch_result(), axes={"layer": (odd,)})
        with pytest.raises(InputError, match=f"got a {name} in it, expected numbers, text, arrays"):
            result.save(tmp_path / "odd")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="saving to .*folder: Is a directory"):
        patch_result().save(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    assert not [*tmp_path.iterdir()]


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with pytest.raises(InputError, match="loading a PatchResult from .*: there is no such file"):
        PatchResult.load(path)
    checked().save(path)
    with pytest.raises(InputError, match="it holds a Checked. Load it as that"):
        PatchResult.load(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="damaged or no safetensors"):
        Checked.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="tensors that `save` did not write"):
        Checked.load(path)


@pytest.mark.parametrize(
    "packed",
    [
        {"dataclass": ["os", "system"], "fields": {}},
        {"dataclass": ["hooked_alm.storage", "save"], "fields": {}},
        {"dataclass": ["hooked_alm.gone", "Gone"], "fields": {}},
        {"dataclass": ["hooked_alm.methods.patching.alignment", "Window"], "fields": {"a": 1}},
        {"dataclass": ["hooked_alm.methods.patching.alignment", "Door"], "fields": {}},
        {"set": []},
        {},
    ],
)
def test_other_content_is_refused(packed: Any, tmp_path: Path) -> None:
    path = tmp_path / "result"
    save_file({"a": torch.zeros(1)}, path, metadata={"hooked_alm": json.dumps(packed)})
    with pytest.raises(InputError, match="its content is not that of this version"):
        PatchResult.load(path)
