"""The files of pairs: clips, their manifest, and ``pairs.jsonl``, which `pairs` reads."""

import io
import json
from collections.abc import Callable, Sequence

import soundfile
import torch

from hooked_alm import HookedALM
from hooked_alm.inputs import AudioClip

from ..workbench.experiment import UnitResult
from ..workbench.identity import file_sha256
from ..workbench.results import Row
from ..workbench.run_folder import RunFolder
from .clips import open_clip
from .pair_candidates import Candidate, ClipVersion, PairMaterial
from .recordings import Recording, write_manifest

FOLDER = "pairs"


def write_pairs(
    folder: RunFolder,
    model: HookedALM,
    material: PairMaterial,
    pairs: Sequence[tuple[Candidate, tuple[str, str]]],
    measured: Callable[[ClipVersion], AudioClip],
) -> UnitResult:
    """Writes the clips of some pairs, their manifest and the pairs; then hears every clip again.

    Args:
        folder: of the run; files go into ``pairs/``.
        model: that hears them.
        material: that the pairs are made of.
        pairs: with their answers.
        measured: the clips that were measured.
    """
    versions = {one.name: one for pair, _ in pairs for one in (pair.a, pair.b)}
    files = {name: _write(folder, one, material) for name, one in versions.items()}
    root = folder.path / FOLDER
    recordings = [
        open_clip(
            Recording, root / "clips" / files[name], name,
            {**one.recording.cells, **({"change": one.change} if one.change else {})},
            label_column=material.config.attribute,
        )
        for name, one in versions.items()
    ]  # fmt: skip
    # A change that changes nothing is the same recording, which a table may name once.
    manifest = write_manifest(root, [*{one.sha256: one for one in recordings[::-1]}.values()][::-1])
    lines = "".join(
        json.dumps(_line(pair, answers, files, material), ensure_ascii=False) + "\n"
        for pair, answers in pairs
    )
    folder.write(f"{FOLDER}/pairs.jsonl", lines)
    rows: list[Row] = []
    for name, one in versions.items():
        path = root / "clips" / files[name]
        again = model.read_clip(path, truncate=material.config.truncate).features
        off = (again - measured(one).features).abs().max() if again.shape else torch.zeros(())
        rows.append({"clip": name, "file": files[name], "difference": float(off)})
    hashes = {path.name: file_sha256(path) for path in (manifest, root / "pairs.jsonl")}
    return UnitResult({"written": rows}, {"files": hashes})


def _write(folder: RunFolder, one: ClipVersion, material: PairMaterial) -> str:
    """Writes a clip; the name of its file."""
    if one.is_file(material.config):
        path = one.recording.path
        file, data = f"{one.name}{path.suffix.lower()}", path.read_bytes()
    else:
        samples, rate = one.samples(material.config)
        held = io.BytesIO()
        soundfile.write(held, samples, rate, format="WAV", subtype="PCM_16")
        file, data = f"{one.name}.wav", held.getvalue()
    folder.write(f"{FOLDER}/clips/{file}", data)
    return file


def _line(
    pair: Candidate, answers: tuple[str, str], files: dict[str, str], material: PairMaterial
) -> dict[str, object]:
    """A pair as `pairs` reads it."""
    segments = [list(part) for part in material.segments[pair.a.recording.name]]
    sides = {"base": pair.a, "donor": pair.b}
    return {
        "id": pair.id, "group": pair.group, "contrast": pair.attribute,
        **{
            side: {"audio": f"clips/{files[one.name]}", "segments": segments}
            for side, one in sides.items()
        },
        "answers": dict(zip(sides, answers, strict=True)),
    }  # fmt: skip
