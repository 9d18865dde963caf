"""Rows of a store that somebody wrote: which clips they are of, read part by part."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hooked_alm.errors import InputError
from hooked_alm.experiments.materials.clip_rows import HeldOutClips, HeldOutClipsConfig
from hooked_alm.experiments.materials.stored_rows import StoredRows
from hooked_alm.methods.activations.rows import ActivationRows
from hooked_alm.methods.activations.writer import ActivationWriter

LENGTHS = {"anna_1": 3, "ben_1": 5, "anna_2": 1, "carl_1": 4}
SHARDS = (("anna_1", "ben_1"), ("anna_2", "carl_1"))
POINT = "encoder.layers.3"


def shard(names: tuple[str, ...]) -> ActivationRows:
    """Rows that say whose they are; prompts are counted from 0 in every shard."""
    n_rows = [LENGTHS[name] for name in names]
    clip = np.repeat(np.array(names, dtype=object), n_rows)
    prompt = np.repeat(np.arange(len(names)), n_rows)
    position = np.concatenate([np.arange(n) for n in n_rows])
    values = torch.tensor([[100.0 * ord(c[0]) + int(c[-1]), p]
                           for c, p in zip(clip, position, strict=True)])  # fmt: skip
    speaker = np.array([one.partition("_")[0] for one in clip], dtype=object)
    index = {"clip": clip, "prompt": prompt, "position": position, "seconds": position / 50,
             "span": np.array(["audio"] * len(clip), dtype=object), "speaker": speaker}  # fmt: skip
    return ActivationRows("module", {POINT: values}, {POINT: (2,)}, index)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "store"
    ActivationWriter(folder, dtype="float32", about={"model": "hubert"}).write_all(SHARDS, shard)
    return folder


def opened(store: Path, **settings: object) -> StoredRows:
    return StoredRows.opened(str(store), ["encoder.layers.*"], config(**settings))


def config(**settings: object) -> HeldOutClipsConfig:
    return HeldOutClipsConfig.model_validate({"batch_size": 2, **settings})


def test_clips_of_every_shard(store: Path) -> None:
    rows = opened(store)
    assert [clip.name for clip in rows.clips] == [*LENGTHS]
    assert rows.n_rows == [*LENGTHS.values()]
    assert rows.clips[3].cells == {"speaker": "carl"}
    assert (rows.of_model, rows.prompt, rows.dtype) == ({"name": "hubert"}, None, torch.float32)
    assert rows.points[0].width == 2


def test_values_part_by_part(store: Path) -> None:
    rows = opened(store)
    for part in [*rows.parts(range(4)), [3, 0, 1]]:
        found = rows.values(part)[POINT]
        for clip, mine in zip(part, rows.by_clip(found, part), strict=True):
            name = rows.clips[clip].name
            assert mine[:, 0].tolist() == [100.0 * ord(name[0]) + int(name[-1])] * LENGTHS[name]
            assert mine[:, 1].tolist() == [*range(LENGTHS[name])]


def test_speakers_are_held_out_whole(store: Path) -> None:
    rows = opened(store)
    split = HeldOutClips.of(rows.clips, config(held_out_share=0.34))
    assert split.groups == ["anna", "ben", "anna", "carl"]
    assert (len(split.held_out_groups), len(split.learnt) + len(split.held_out)) == (1, 4)
    assert not {split.groups[i] for i in split.learnt} & {*split.held_out_groups}


def test_a_damaged_store_is_refused(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    path = tmp_path / "store/shards/00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(InputError, match=r"00001.safetensors: .*other bytes than were written"):
        opened(tmp_path / "store")
