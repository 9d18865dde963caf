"""What a user names in the place of a local file: URLs, and data sets with an audio column.

Each becomes a local path, in a cache: ``$HOOKED_ALM_CACHE``, or the user's folder of caches. Below
it, ``urls/KEY/FOLDER/FILE`` is a file that was fetched once, and ``datasets/KEY`` a table of a data
set's clips with the clips beside it, under their hashes. All of it appears whole or not at all, so
that processes may share it; nothing in it is ever replaced. Delete a folder to have it made again.
What a run is hangs on contents alone: tables and clips are hashed as local ones are.

URLs are whatever `fsspec <https://filesystem-spec.readthedocs.io>`_ opens: ``https://``, ``s3://``,
``hf://``, ``zip://clip.wav::https://...``. A data set is ``datasets:NAME?split=test&name=config``,
with the arguments of ``datasets.load_dataset``, or what ``Dataset.save_to_disk`` wrote.
"""

import hashlib
import json
import os
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote

import platformdirs
from pydantic import PlainSerializer

from hooked_alm.errors import InputError, reason_of, refuse_unknown
from hooked_alm.storage import expanded

from ..workbench.files import is_file, is_folder, refusals
from ..workbench.identity import file_hashes

DATASETS = "datasets:"
"""Begins the name of a data set."""
KEYS = ("split", "name", "revision", "data_dir", "data_files", "audio_column")
"""What may stand behind its ``?``: arguments of ``load_dataset``, and the column of the clips."""
TAKEN = ("path", "sha256", "where", "id", "group")
"""Columns of a data set that its table leaves out: they mean something of their own there."""
SAVED = ("state.json", "dataset_dict.json")
"""One of them is in every folder that ``save_to_disk`` made."""
TABLE = "dataset.jsonl"
"""What the table of a data set is called, wherever the data set lies."""
N_AT_ONCE = 8
"""Files that are fetched at a time."""
NEEDED = "pip install 'hooked_alm[data]'"
FOLDER = "it is the URL of a folder"
USER = r"(?<=http://)[^/?#\s]*@|(?<=https://)[^/?#\s]*@|(?<=://)[^/?#@:\s]*:[^/?#\s]*@"
SECRET = re.compile(
    USER
    + r"|(?<=[?&])(?:[^=&\s]*(?:x-amz-|x-goog-|token|secret|passw|signature|credential)[^=&\s]*"
    r"|[^=&\s]*(?:access|api)[_-]?key[^=&\s]*"
    r"|auth(?:orization)?|expires|jwt|key|key-pair-id|policy|pwd|sig)=(?:(?!::)[^&#\s'\"])*&?",
    re.IGNORECASE,
)
"""Who asks, and with which right: before the host of a URL, and in its query."""
SIGNED = re.compile(
    USER + r"|(?<=[?&])(?:x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|googleaccessid"
    r"|signature|sig|expires|access_token|token)=(?:(?!::)[^&#\s'\"])*&?",
    re.IGNORECASE,
)
"""What is no part of which file a URL names: signatures, by their exact names.

Fewer than are not shown: ``key=`` may be a credential, or say which file.
"""


# --- Names


def shown(source: object) -> str:
    """What is named, without the credentials that it may hold: for records, errors and logs."""
    text = str(source)
    if text.startswith(DATASETS):  # its arguments may be URLs, with their own ? and & quoted
        name, mark, query = text.partition("?")
        pairs = (part.partition("=") for part in query.split("&"))
        told = [f"{key}{is_}{_requoted(value)}" for key, is_, value in pairs]
        text = SECRET.sub("", name) + mark + "&".join(told)
        return SECRET.sub("", text).rstrip("?&")
    return SECRET.sub("", text).rstrip("?&") if "://" in text else text


def _requoted(value: str) -> str:
    """A quoted value without the credentials that are in it."""
    plain = unquote(value)
    told = SECRET.sub("", plain).rstrip("?&")
    return value if told == plain else quote(told, safe="/:")


Source = Annotated[str, PlainSerializer(shown, when_used="json")]
"""A setting that names files; what a run writes down of it holds no credentials."""


def is_url(source: str | Path) -> bool:
    """Whether fsspec is to open it; a ``Path`` never is."""
    known = r"[A-Za-z][\w+.-]*:(//|:)"
    return isinstance(source, str) and "://" in source and re.match(known, source) is not None


def is_local(source: str | Path) -> bool:
    """Whether it is a path of this machine that is read as it stands."""
    saved = any(is_file(expanded(source) / name) for name in SAVED)
    return not (saved or is_url(source) or str(source).startswith(DATASETS))


def local(source: str | Path) -> Path:
    """The path of a file, of a URL's copy, or of the table of a data set; see `expanded`.

    Raises:
        InputError: a URL that cannot be fetched, a data set that cannot be read.
    """
    if isinstance(source, str) and is_url(source):
        found = fetch([source])[source]
        if isinstance(found, Path):
            return found
        raise InputError(
            f"fetching {shown(source)}: got {found}, expected a file that can be read. Check the "
            "URL, the network, and that you may read it; of a folder, give a table of its clips."
        )
    return expanded(source) if is_local(source) else _dataset_table(str(source))


def beside(folder: str | Path, cell: str | Path) -> str | Path:
    """What a cell of a table names: a path, or a URL.

    Args:
        folder: of the table; or its URL, if it has one.
        cell: a URL, a path, or a path from there.
    """
    path = expanded(cell)
    if is_url(cell):
        return str(cell)
    if isinstance(folder, Path) or path.is_absolute():
        return folder / path
    scheme, rest, before, after = _file_of(folder)
    relative = quote(path.as_posix()) if _is_web(scheme) else path.as_posix()
    rest = posixpath.normpath(posixpath.join(posixpath.dirname(rest), relative))
    return f"{before}{scheme}://{rest}{after}"


def _file_of(url: str) -> tuple[str, str, str, str]:
    """Scheme and path of what a URL names in the end, and what stands before and after them.

    ``zip://a.wav::https://host/b.zip`` is about a.wav, ``simplecache::https://host/a.wav`` too.
    """
    links = url.split("::")
    at = next(number for number, link in enumerate(links) if "://" in link)
    scheme, _, rest = links[at].partition("://")
    if _is_web(scheme):
        rest = re.split("[?#]", rest)[0]
    before, after = ("".join(f"{one}::" for one in links[:at]), links[at + 1 :])
    return scheme, rest, before, "".join(f"::{one}" for one in after)


def _is_web(scheme: str) -> bool:
    return scheme.lower() in ("http", "https")


def _safe(name: str) -> str:
    """A name as every file system takes it."""
    return re.sub(r'[/\\:*?"<>|\0]', "-", name) if name.strip(".") else "-" * len(name)


# --- The cache


def cache_folder() -> Path:
    """Where copies are kept."""
    if given := os.environ.get("HOOKED_ALM_CACHE"):
        return expanded(given).absolute()
    return platformdirs.user_cache_path("hooked_alm", appauthor=False)


def hashes_of(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """SHA-256 of files, by their paths from a folder; of other copies, from the cache's."""
    found: dict[str, str] = {}
    for path in files:
        found |= file_hashes([path], folder if path.is_relative_to(folder) else cache_folder())
    return found


@contextmanager
def _new_folder() -> Iterator[Path]:
    """A folder of the cache for what is not whole yet."""
    root = cache_folder()
    with refusals(f"using the cache {root} (HOOKED_ALM_CACHE names another)"):
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".new-", dir=root)
    with folder:
        yield Path(folder.name)


# --- URLs


def fetch(urls: Collection[str]) -> dict[str, Path | str]:
    """URL -> its file in the cache, fetched unless it is there; or why it could not be."""
    first: dict[str, str] = {}
    for url in urls:
        first.setdefault(_unsigned(url), url)
    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        found = dict(zip(first.values(), pool.map(_fetched, first.values()), strict=True))
    alike = "another URL differs from it in its credentials alone: leave one out"
    return {url: found.get(url, alike) for url in urls}


def fetched(url: str, ready: Mapping[str, Path | str] | None = None) -> Path:
    """The file of a URL, fetched unless it is ready.

    Raises:
        ValueError: what was expected of it.
    """
    found = (ready or {}).get(url) or fetch([url])[url]
    if isinstance(found, Path):
        return found
    raise ValueError(f"a file that can be fetched ({found})")


def _unsigned(url: str) -> str:
    """The URL as whoever asks for it again will have it, who may be somebody else."""
    return SIGNED.sub("", url).rstrip("?&")


def _fetched(url: str) -> Path | str:
    """The file of a URL; or why there is none, in words that hold no credentials."""
    scheme, rest, _, _ = _file_of(shown(url))
    parts = [unquote(one) if _is_web(scheme) else one for one in rest.split("/")]
    parent = next((one for one in parts[-2::-1] if one), "")
    if not parts[-1].strip(".") or (_is_web(scheme) and not parent):
        return FOLDER
    key = hashlib.sha256(_unsigned(url).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    target = cache_folder() / "urls" / key / _safe(parent) / _safe(parts[-1])
    try:
        return target if is_file(target) else _fetch(url, target)
    except InputError as error:
        return str(error)
    except ImportError as error:
        return f"a package is missing: {error}; {NEEDED} brings those for https"
    except FileNotFoundError:
        return "there is no such file"
    except Exception as error:
        # Others' words may hold the URL as it was asked for, or where it led to.
        return re.sub(r"[\w+.-]+://[^\s'\"]+", "it", reason_of(error))


def _fetch(url: str, target: Path) -> Path:
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    files, path = url_to_fs(url)
    if isinstance(files, LocalFileSystem):
        if is_file(target := Path(path)):  # no copy: what changes there is noticed
            return target
        raise FileNotFoundError
    with _new_folder() as folder:
        partial = folder / "file"
        files.get_file(path, str(partial))
        if not partial.is_file():
            raise InputError(FOLDER)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():  # another process was quicker, and may have read its copy already
            partial.replace(target)
    return target


# --- Data sets


def _dataset_table(source: str) -> Path:
    """The table of a data set's clips, made unless it is there."""
    name, _, query = source.removeprefix(DATASETS).partition("?")
    doing, every = f"reading {shown(source)}", dict[str, list[str]]()
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        every.setdefault(key, []).append(unquote(value))  # no form, since a + joins splits
    refuse_unknown(doing, every, KEYS)
    given: dict[str, Any] = {key: one[0] if len(one) == 1 else one for key, one in every.items()}
    column = given.pop("audio_column", None)
    try:
        data = _opened(doing, name, given)
        return _written(doing, name, data, _audio_column(doing, data.features, column))
    except ImportError as error:
        raise InputError(f"{doing}: a package is missing: {error}. {NEEDED}") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{doing}: got '{shown(reason_of(error.__cause__ or error))}' from the package "
            "datasets, expected a data set that it can read. Check its name, what stands behind "
            "it, and the network."
        ) from None


def _opened(doing: str, name: str, arguments: dict[str, Any]) -> Any:
    """The data set, which is one split of it."""
    import datasets

    folder = expanded(name)
    if any(is_file(folder / one) for one in SAVED):
        refuse_unknown(doing, arguments, ("split",))
        found = datasets.load_from_disk(str(folder))
    else:
        with _paths_as_they_are():
            found = datasets.load_dataset(str(folder) if is_folder(folder) else name, **arguments)
    if not isinstance(found, datasets.DatasetDict):
        return found
    split = arguments.get("split", next(iter(found)) if len(found) == 1 else None)
    if split not in found:
        raise InputError(
            f"{doing}: got {'no split' if split is None else f'the split {split}'}, expected one "
            f"of {', '.join(found)}. Name it: split=..."
        )
    return found[split]


@contextmanager
def _paths_as_they_are() -> Iterator[None]:
    """A block in which ``datasets`` notes where clips are without torchcodec, which it asks for."""
    from datasets import Audio

    before = Audio.encode_example
    Audio.encode_example = lambda _, value: (
        value if isinstance(value, dict) else {"bytes": None, "path": str(value)}
    )
    try:
        yield
    finally:
        Audio.encode_example = before


def _audio_column(doing: str, features: Mapping[str, Any], column: str | None) -> str:
    """The column of the clips: the one that was named, or the only one."""
    from datasets import Audio

    audio = [name for name, one in features.items() if isinstance(one, Audio)]
    if column in features or (column is None and len(audio) == 1):
        return column or audio[0]
    raise InputError(
        f"{doing}: got the columns {', '.join(features)}, of which {', '.join(audio) or 'none'} "
        f"{'hold' if len(audio) > 1 else 'holds'} audio, expected one. Name it: audio_column=..."
    )


def _written(doing: str, name: str, data: Any, column: str) -> Path:
    """A data set's table; its clips lie beside it, in folders that their hashes name."""
    import datasets

    key = hashlib.sha256(f"{data._fingerprint}/{column}".encode()).hexdigest()[:32]
    table = cache_folder() / "datasets" / key / TABLE
    if is_file(table):
        return table
    scalars = {
        name: feature
        for name, feature in data.features.items()
        if isinstance(feature, datasets.ClassLabel | datasets.Value)
        and "binary" not in feature.dtype
        and name not in (column, *TAKEN)
    }
    data = data.select_columns([column, *scalars])
    data = data.cast_column(column, datasets.Audio(decode=False))
    flat = data.flatten().with_format(None)  # all of its columns
    (paths,) = flat.select_columns([f"{column}.path"])[:].values()
    names = _file_names(paths)
    with _new_folder() as folder, refusals(f"copying the clips of {shown(name)} to {table.parent}"):
        (whole := folder / "whole").mkdir()
        lines, faults = [], []
        for number, row in enumerate(data):
            try:
                content = _content(row.pop(column))
            except InputError as error:
                faults.append(f"row {number + 1}: {error}")
                continue
            sha256 = hashlib.sha256(content).hexdigest()
            path = whole / sha256 / names[number]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            cells = {name: _cell(scalars[name], value) for name, value in row.items()}
            lines.append({"path": f"{sha256}/{path.name}", "sha256": sha256, **cells})
        if faults:
            raise InputError("\n  ".join([f"{doing}: cannot read {len(faults)} rows", *faults]))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (whole / table.name).write_bytes(text.encode())
        table.parent.parent.mkdir(exist_ok=True)
        try:
            whole.rename(table.parent)
        except OSError:
            if not is_file(table):  # else another process was quicker
                raise
    return table


def _file_names(paths: Iterable[str | None]) -> list[str]:
    """What clips are called: after their files; by their rows, where those repeat or are none."""
    own = [re.split(r"[/\\]", (path or "").partition("::")[0])[-1] for path in paths]
    count = Counter(Path(name).stem.casefold() for name in own)
    return [
        _safe(name) if name and count[Path(name).stem.casefold()] == 1
        else "-".join(filter(None, [f"{number:05d}", _safe(name)]))
        for number, name in enumerate(own, start=1)
    ]  # fmt: skip


def _content(clip: Mapping[str, Any] | None) -> bytes:
    """The bytes of a clip, which are in the data set or in a file that it names."""
    found = clip or {}
    if found.get("bytes") is not None:
        return found["bytes"]
    if (path := found.get("path")) is None:
        raise InputError("got no clip, expected one in every row. Leave the row out")
    with refusals(f"reading {shown(path)}"):
        return local(path).read_bytes()


def _cell(feature: Any, value: Any) -> Any:
    """A value as JSON has it; the number of a class is its name."""
    if isinstance(classes := getattr(feature, "names", None), list):
        return None if value is None or value < 0 else classes[value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
