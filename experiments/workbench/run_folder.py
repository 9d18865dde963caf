"""A run on disk: settings, provenance, one shard per unit of work, tables, figures, report.

``run.json`` says what the run is; ``units/{id}.json`` exists exactly if the unit is done. Every
file but the event log is written whole or not at all, so a run killed at any moment resumes.
"""

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from hooked_alm.errors import InputError
from hooked_alm.storage import write_atomic

# What a run that was killed while it began may leave: still an unused folder.
UNUSED = {"lock", ".run.json.tmp"}
IDENTITY = ("experiment", "schema_version", "config", "n_threads", "inputs")
CLIP_RATE_HZ = 16_000


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON with Python's ``NaN`` and ``Infinity``; numpy scalars become plain numbers."""

    def plain(item: Any) -> Any:
        if isinstance(item, np.generic):
            return item.item()
        raise TypeError(f"{type(item).__name__} is not JSON: {item!r}")

    return json.dumps(value, ensure_ascii=False, indent=indent, default=plain)


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    ordered = json.dumps(json.loads(to_json(value)), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(ordered.encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """One line for every dotted key whose values differ."""
    left, right = flatten(new), flatten(old)
    lines = []
    for key in sorted(left.keys() | right.keys()):
        # Compared as text, because NaN is not equal to itself.
        shown = [to_json(flat[key]) if key in flat else "nothing" for flat in (left, right)]
        if shown[0] != shown[1]:
            shown = [text if len(text) <= 80 else text[:77] + "..." for text in shown]
            lines.append(f"{key} (now {shown[0]}, in the folder {shown[1]})")
    return lines


class RunFolder:
    """A handle on a run folder, new or old. Making one touches nothing on disk."""

    def __init__(self, path: Path | str, *, is_verbose: bool = False) -> None:
        self.path = Path(path)
        self.is_verbose = is_verbose

    # --- What the run is

    @property
    def provenance(self) -> dict[str, Any]:
        """``run.json``: settings, inputs, versions, seed, command.

        Raises:
            InputError: the folder holds no run, or a damaged one.
        """
        if not (self.path / "run.json").is_file():
            came = "a folder without run.json" if self.path.is_dir() else "no such folder"
            raise InputError(
                f"opening the run {self.path}: got {came}, expected the folder of a run. Check the "
                "path: it is what --out was, or runs/..., as the run itself said at its end."
            )
        return self._read_json(self.path / "run.json", "copy it back, or start another run")

    def start(self, provenance: Mapping[str, Any]) -> bool:
        """Claims the folder for this run, or finds that it is its own; True if it resumes.

        Raises:
            InputError: the folder holds another run, or files that are no run.
        """
        resumes = (self.path / "run.json").exists()
        if resumes:
            found = self.provenance
            new = json.loads(to_json(provenance))
            changed = differences(
                {key: new.get(key) for key in IDENTITY}, {key: found.get(key) for key in IDENTITY}
            )
            if changed:
                raise InputError(
                    f"resuming the run in {self.path}: got a different {', '.join(changed)}, "
                    f"expected what the run began with. Choose another --out, or delete the folder."
                )
        else:
            strangers = {item.name for item in self.path.iterdir()} - UNUSED
            if strangers:
                raise InputError(
                    f"starting a run in {self.path}: got a folder with other files in it "
                    f"({', '.join(sorted(strangers)[:5])}), expected a new or empty folder or a "
                    f"run. Choose another --out."
                )
            # From here on the folder is a run.
            self.write_json("run.json", {**provenance, "created": now()})
        if not (self.path / "config.yaml").exists():
            settings = yaml.safe_dump(provenance["config"], sort_keys=False, allow_unicode=True)
            write_atomic(self.path / "config.yaml", settings.encode())
        return resumes

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for writing; the system lets go of it when the process ends.

        Raises:
            InputError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w", encoding="utf-8") as file:
            if sys.platform != "win32":
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise InputError(
                        f"writing to the run in {self.path}: got a folder that another process "
                        f"is writing to, expected one writer. Wait for it, or choose another --out."
                    ) from None
            yield

    def log(self, event: str, **fields: Any) -> None:
        """Appends a line to ``events.jsonl``, for people; no result depends on it.

        A verbose folder says it on stderr too.
        """
        if self.is_verbose:
            told = ", ".join(f"{key} {value}" for key, value in fields.items())
            print(f"{datetime.now():%H:%M:%S} {event}: {told or self.path}", file=sys.stderr)
        line = to_json({"time": now(), "event": event, **fields})
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    # --- Units of work

    def unit_path(self, unit_id: str) -> Path:
        """The unit's shard; it exists exactly if the unit is done."""
        return self.path / "units" / f"{unit_id}.json"

    def read_unit(self, unit_id: str) -> dict[str, Any]:
        """A finished unit: its ``tables`` and its ``record``."""
        return self._read_json(self.unit_path(unit_id), "delete the file; its unit is then redone")

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, by its path inside the folder."""
        write_atomic(self.path / name, (to_json(value, indent=1) + "\n").encode())

    def _read_json(self, path: Path, cure: str) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"reading {path}: got no such file, expected a run folder that has it. "
                f"Check the folder's name."
            ) from None
        except ValueError as error:
            raise InputError(
                f"reading {path}: got a damaged file ({error}), expected JSON. To go on, {cure}."
            ) from None
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise InputError(f"reading {path}: got a {kind}, expected a mapping. To go on, {cure}.")
        return value

    # --- Results

    def write_table(self, name: str, table: pd.DataFrame, *, is_summary: bool = False) -> None:
        """Writes ``tables/{name}.parquet``, and for a summary the same numbers as CSV."""
        data = io.BytesIO()
        table.to_parquet(data, index=False)
        write_atomic(self.path / "tables" / f"{name}.parquet", data.getvalue())
        if is_summary:
            csv = table.to_csv(index=False, lineterminator="\n")
            write_atomic(self.path / "tables" / f"{name}.csv", csv.encode())

    def read_table(self, name: str) -> pd.DataFrame:
        """A table of the run, by name."""
        path = self.path / "tables" / f"{name}.parquet"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.parquet"))) or "none"
            raise InputError(
                f"reading a table of {self.path}: got {name!r}, expected one of: {known}."
            )
        return pd.read_parquet(path)

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray], **axes: str) -> None:
        """Writes ``arrays/{name}.safetensors``; ``axes`` names each array's axes, "layer pos"."""
        from safetensors.numpy import save

        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        # One entry: safetensors writes several in an order of its own, and bytes must repeat.
        about = {"axes": json.dumps(axes, sort_keys=True)}
        write_atomic(self.path / "arrays" / f"{name}.safetensors", save(contiguous, metadata=about))

    def add_clip(self, name: str, recording: Path | str) -> str:
        """Keeps a recording for the report as the model hears it: 16 kHz, mono, 16 bit.

        Returns:
            Its path inside the folder, for `report.Clip`.
        """
        import soundfile
        import soxr

        samples, rate = soundfile.read(recording, dtype="float32", always_2d=True)
        samples = soxr.resample(samples.mean(axis=1), rate, CLIP_RATE_HZ)
        data = io.BytesIO()
        soundfile.write(data, samples, CLIP_RATE_HZ, format="WAV", subtype="PCM_16")
        path = Path("clips") / f"{name}.wav"
        write_atomic(self.path / path, data.getvalue())
        return path.as_posix()


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
