"""Files of one folder: whatever stands in it, nothing outside it is read or written.

No link is followed and no path leads out, so that a folder of anyone's may be opened. What the
system refuses is an `InputError` of one line.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hooked_alm.errors import InputError
from hooked_alm.storage import write_atomic

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space; the same command then goes on"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Choose a place that you may use"),
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOTDIR: "Choose a folder in place of a file",
}
"""Why the system refused -> what to do."""


@contextlib.contextmanager
def refusals(doing: str) -> Iterator[None]:
    """What the system refuses in a `with` block, as an `InputError` that begins with ``doing``."""
    try:
        yield
    except OSError as error:
        cure = CURES.get(error.errno or 0, "Check the path and its disk")
        raise InputError(
            f"{doing}: got '{error.strerror or error}' from the system, expected files that can be "
            f"used. {cure}."
        ) from error


def _mode(path: Path) -> int:
    """What is at a path; 0 for nothing, and for a path that the system does not take."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def is_file(path: Path) -> bool:
    """Whether a file is there; never an error."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether a folder is there; never an error."""
    return stat.S_ISDIR(_mode(path))


class OwnFiles:
    """The files of a folder, by their paths inside it. Making one touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def inside(self, name: str) -> Path:
        """The path of a file, which need not be there yet.

        Raises:
            InputError: it would lead out of the folder, or something else than a file is there.
        """
        parts = name.split("/")
        doing = f"opening {name!r} of {self.path}"
        if "\0" in f"{self.path}{name}" or not {*parts}.isdisjoint(("", ".", "..")):
            raise InputError(f"{doing}: expected a path that stays inside. Is the folder yours?")
        path = self.path
        for number, part in enumerate(parts, start=1):
            path /= part
            with refusals(doing), contextlib.suppress(FileNotFoundError):
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) if number == len(parts) else stat.S_ISDIR(mode)):
                    kind = "a link" if stat.S_ISLNK(mode) else "something else"
                    raise InputError(
                        f"{doing}: got {kind} at {path}, expected a file or folder of a run's own. "
                        "Remove it, or choose another folder."
                    )
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self.inside(name).exists()

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        path = self.inside(name)
        with refusals(f"reading {path}"):
            return path.read_bytes()

    def write(self, name: str, data: bytes | str) -> None:
        """Writes a file whole or not at all; half characters in a text are written as escapes."""
        path = self.inside(name)
        with refusals(f"writing {path}"):
            write_atomic(path, data if isinstance(data, bytes) else encoded(data))

    def append(self, name: str, text: str) -> None:
        """Adds to the end of a file."""
        path = self.inside(name)
        with refusals(f"writing {path}"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_LINK
            with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
                file.write(encoded(text))


def encoded(text: str) -> bytes:
    """UTF-8; half a character, as in a file name that is no text, is escaped as in JSON."""
    return text.encode("utf-8", "backslashreplace")
