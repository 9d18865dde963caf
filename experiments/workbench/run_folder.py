"""A run on disk: settings, provenance, one shard per unit of work, tables, figures, report.

``run.json`` says what the run is; ``units/{id}.json`` exists exactly if the unit is done. Every
file but the event log is written whole or not at all, so a run killed at any moment resumes.
"""

import contextlib
import errno
import io
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from hooked_alm.errors import InputError, reason_of

from .files import NO_LINK, OwnFiles, refusals
from .identity import differences, fingerprint, to_json
from .inert import for_sheet, for_terminal

# What a run that was killed while it began may leave: still an unused folder.
UNUSED = {"lock", ".run.json.tmp"}
IDENTITY = ("experiment", "schema_version", "config", "inputs")
RECORD = {"experiment": str, "config": dict, "inputs": dict, "environment": dict}
"""What is read of ``run.json``, and its kind."""
CLIP_RATE_HZ = 16_000
MOST_DEATHS = 3
"""Workers that may die in a unit before the run stops: one that kills its worker ends them all."""


class RunFolder(OwnFiles):
    """A handle on a run folder, new or old. Making one touches nothing on disk."""

    def __init__(self, path: Path | str, *, is_verbose: bool = False) -> None:
        super().__init__(path)
        self.is_verbose = is_verbose

    # --- What the run is

    @property
    def provenance(self) -> dict[str, Any]:
        """``run.json``: settings, inputs, versions, seed, command.

        Raises:
            InputError: the folder holds no run, or a damaged one.
        """
        if not self.has("run.json"):
            came = "a folder without run.json" if self.path.is_dir() else "no such folder"
            raise InputError(
                f"opening the run {self.path}: got {came}, expected the folder of a run. Check the "
                "path: it is what --out was, or runs/..., as the run itself said at its end."
            )
        cure = "copy it back, or start another run"
        found = self.read_json("run.json", cure)
        if wrong := [key for key, kind in RECORD.items() if not isinstance(found.get(key), kind)]:
            raise self._damaged("run.json", f"without a usable {', '.join(wrong)}", cure)
        return found

    def check(self, identity: Mapping[str, Any]) -> bool:
        """Whether the run can begin or go on here; True if it goes on. Nothing is written.

        Args:
            identity: what is known of the run so far, by the keys of `IDENTITY`.

        Raises:
            InputError: the folder holds another run, or files that are no run; or it could not be
                made.
        """
        if self.has("run.json"):
            found, new = self.provenance, json.loads(to_json(identity))
            keys = [key for key in IDENTITY if key in new]
            changed = differences(*({key: one.get(key) for key in keys} for one in (new, found)))
            if changed:
                raise InputError(
                    f"resuming the run in {self.path}: got a different {', '.join(changed)}, "
                    f"expected what the run began with. Choose another --out, or delete the folder."
                )
            return True
        if strangers := self._strangers():
            raise InputError(
                f"starting a run in {self.path}: got a folder with other files in it "
                f"({', '.join(strangers[:5])}), expected a new or empty folder or a run. Choose "
                "another --out."
            )
        return False

    def _strangers(self) -> list[str]:
        """Names of what no run has put there; of none if the folder could be made."""
        with refusals(f"starting a run in {self.path}"):
            if not self.path.exists():
                above = next(one for one in self.path.absolute().parents if one.exists())
                if not os.access(above, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                return []
            return sorted(
                item.name
                for item in self.path.iterdir()
                if item.name not in UNUSED
                or not stat.S_ISREG(item.lstat().st_mode)
                or (item.name == "lock" and item.lstat().st_size)
            )

    def start(self, provenance: Mapping[str, Any]) -> bool:
        """Claims the folder for this run, or finds that it is its own; True if it resumes.

        Raises:
            InputError: see `check`.
        """
        resumes = self.check(provenance)
        if not resumes:
            # From here on the folder is a run.
            self.write_json("run.json", {**provenance, "created": now()})
        settings = yaml.safe_dump(provenance["config"], sort_keys=False, allow_unicode=True)
        self.write("config.yaml", settings)
        return resumes

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for writing; the system lets go of it when the process ends.

        Raises:
            InputError: another process holds it, or the folder is none of a run's; see `check`.
        """
        self.check({})
        with self._held("lock") as held:
            if held is None:
                raise InputError(
                    f"writing to the run in {self.path}: got a folder that another process is "
                    "writing to, expected one writer. Wait for it, or choose another --out."
                )
            yield

    def is_locked(self) -> bool:
        """Whether a process is writing to the run, on this or another machine."""
        if not self.has("lock"):
            return False
        # Somebody else's run may be looked at, too.
        with refusals(f"looking at the run in {self.path}"):
            file = os.open(self.inside("lock"), os.O_RDONLY | NO_LINK)
        try:
            return not _is_taken(file)
        finally:
            os.close(file)

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[int | None]:
        """A file that this process alone has; None if another one has it.

        The system lets go of it when the process ends, however it ends.
        """
        with refusals(f"writing to the run in {self.path}"):
            (path := self.inside(name)).parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINK, 0o666)
        try:
            yield file if _is_taken(file) else None
        finally:
            os.close(file)

    def log(self, event: str, **fields: Any) -> None:
        """Appends a line to ``events.jsonl``, for people; no result depends on it.

        A verbose folder says it on stderr too.
        """
        if self.is_verbose:
            told = ", ".join(f"{key} {value}" for key, value in fields.items())
            line = f"{datetime.now():%H:%M:%S} {event}: {told or self.path}"
            print(for_terminal(line), file=sys.stderr)
        self.append("events.jsonl", to_json({"time": now(), "event": event, **fields}) + "\n")

    # --- Units of work

    @contextlib.contextmanager
    def claim(self, unit_id: str) -> Iterator[bool]:
        """Claims a unit for this process; False where another has it, or has done it.

        A claim is a file of its own, held as the folder is: that of a dead worker is free at once.

        Raises:
            InputError: too many workers died in the unit.
        """
        if self.is_done(unit_id):
            yield False
            return
        with self._held(name := f"claims/{unit_id}") as held:
            # It may have been done while the file was opened.
            if held is None or self.is_done(unit_id):
                yield False
                return
            if os.fstat(held).st_size >= MOST_DEATHS:
                raise InputError(
                    f"measuring {unit_id}: {MOST_DEATHS} workers died in it, expected that one "
                    "ends. Is the memory enough for it? See the system's log; try fewer workers, "
                    "smaller batches or another device."
                )
            os.write(held, b".")
            yield True
            self.inside(name).unlink(missing_ok=True)

    def forget_claims(self) -> None:
        """Removes what earlier workers claimed and did not end, but for those that still live."""
        for path in (self.path / "claims").glob("*"):
            with self._held(f"claims/{path.name}") as held:
                if held is not None:
                    path.unlink(missing_ok=True)

    def claimed(self) -> list[str]:
        """Units that were begun and are not done."""
        return sorted({path.name for path in (self.path / "claims").glob("*")} - self.done())

    def done(self) -> set[str]:
        """Ids of all units that have a shard."""
        try:
            with os.scandir(self.path / "units") as files:
                return {one.name[:-5] for one in files if one.name.endswith(".json")}
        except FileNotFoundError:
            return set()

    def is_done(self, unit_id: str) -> bool:
        """Whether the unit has a shard."""
        return self.has(f"units/{unit_id}.json")

    def read_unit(self, unit_id: str) -> dict[str, Any]:
        """A finished unit: its ``tables`` and its ``record``.

        Raises:
            InputError: the shard is damaged, or another unit's.
        """
        cure = "delete the file; its unit is then redone"
        found = self.read_json(name := f"units/{unit_id}.json", cure)
        tables = found.get("tables")
        if found.get("unit") != unit_id or found.keys() != {"unit", "tables", "record"}:
            raise self._damaged(name, f"the result of {found.get('unit')!r}", cure)
        if not isinstance(tables, dict) or not isinstance(found["record"], dict):
            raise self._damaged(name, "no tables, or no record", cure)
        return found

    def write_unit(self, unit_id: str, tables: Any, record: Any) -> None:
        """Keeps what a unit found; it is then done."""
        found = {"unit": unit_id, "tables": tables, "record": record}
        self.write_json(f"units/{unit_id}.json", found)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a mapping with its `fingerprint`, by the file's path inside the folder."""
        text = to_json({**value, "sha256": fingerprint(value)}, indent=1)
        self.write(name, text + "\n")

    def read_json(self, name: str, cure: str) -> dict[str, Any]:
        """What `write_json` wrote.

        Raises:
            InputError: no such file, or one that was changed since; ``cure`` says what to do.
        """
        try:
            value = json.loads(self.read(name).decode())
        except (ValueError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise self._damaged(name, str(error), cure) from None
        if not isinstance(value, dict):
            raise self._damaged(name, f"a {type(value).__name__}", cure)
        if value.pop("sha256", None) != fingerprint(value):
            raise self._damaged(name, "not what its sha256 was made of", cure)
        return value

    def _damaged(self, name: str, what: str, cure: str) -> InputError:
        return InputError(
            f"reading {self.path / name}: got a damaged file ({what}), expected what a run wrote. "
            f"To go on, {cure}."
        )

    # --- Results

    def write_table(self, name: str, table: pd.DataFrame, *, is_summary: bool = False) -> None:
        """Writes ``tables/{name}.parquet``, and for a summary the same numbers as CSV."""
        data = io.BytesIO()
        table.to_parquet(data, index=False, write_page_checksum=True)
        self.write(f"tables/{name}.parquet", data.getvalue())
        if is_summary:
            self.write_sheet(f"tables/{name}.csv", table)

    def write_sheet(self, name: str, table: pd.DataFrame) -> None:
        """Writes a table as CSV, by the file's path inside the folder."""
        safe = table.rename(columns=for_sheet)
        for number, kind in enumerate(safe.dtypes):
            if not pd.api.types.is_numeric_dtype(kind):
                cells = [for_sheet(cell) for cell in safe.iloc[:, number]]
                safe.isetitem(number, pd.Series(cells, index=safe.index, dtype=object))
        self.write(name, safe.to_csv(index=False, lineterminator="\n"))

    def read_table(self, name: str) -> pd.DataFrame:
        """A table of the run, by name.

        Raises:
            InputError: there is none of that name, or it is damaged.
        """
        if not self.has(file := f"tables/{name}.parquet"):
            tables = (self.path / "tables").glob("*.parquet")
            known = ", ".join(sorted(path.stem for path in tables)) or "none"
            raise InputError(
                f"reading a table of {self.path}: got {name!r}, expected one of: {known}."
            )
        data = io.BytesIO(self.read(file))
        try:
            return pd.read_parquet(data, page_checksum_verification=True)
        except Exception as error:  # a damaged file can fail anywhere in its readers
            reason = reason_of(error)
            raise self._damaged(file, reason, "run the experiment again, which makes it") from None

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray], **axes: str) -> None:
        """Writes ``arrays/{name}.safetensors``; ``axes`` names each array's axes, "layer pos"."""
        from safetensors.numpy import save

        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        # One entry: safetensors writes several in an order of its own, and bytes must repeat.
        about = {"axes": json.dumps(axes, sort_keys=True)}
        self.write(f"arrays/{name}.safetensors", save(contiguous, metadata=about))

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
        self.write(path := f"clips/{name}.wav", data.getvalue())
        return path


def _is_taken(file: int) -> bool:
    """Whether an open file could be taken for this process."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        # A file system without locks: nobody can be told apart.
    return True


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
