"""URLs and data sets in the place of local files: the same clips, the same bytes, every fault."""

import base64
import gc
import hashlib
import io
import json
import shutil
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict

from hooked_alm.errors import InputError
from hooked_alm.experiments.activations.experiment import StoreActivations
from hooked_alm.experiments.activations.settings import ActivationsConfig
from hooked_alm.experiments.head_statistics.items import find_file, read_questions
from hooked_alm.experiments.materials.clips import described_table
from hooked_alm.experiments.materials.pairs import read_pairs
from hooked_alm.experiments.materials.recordings import Recording, load_recordings
from hooked_alm.experiments.materials.sources import (
    beside,
    fetch,
    hashes_of,
    is_local,
    is_url,
    local,
    shown,
)
from hooked_alm.experiments.semantic_vs_prosody.items import read_items
from hooked_alm.experiments.workbench import runner
from tiny import TinyModels

pytestmark = pytest.mark.usefixtures("small_figures")

NAMES = ("anna/01.wav", "anna/02 é.wav", "ben/01.wav")
EMOTIONS = ("sad", "angry", "sad")
TABLE = "path,emotion,speaker\n" + "".join(
    f"{name},{emotion},{name.partition('/')[0]}\n"
    for name, emotion in zip(NAMES, EMOTIONS, strict=True)
)


def tone(hz: float) -> bytes:
    file = io.BytesIO()
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(6400) / 16_000)
    soundfile.write(file, wave, 16_000, format="WAV")
    return file.getvalue()


FILES = {
    "clips.csv": TABLE.encode(),
    **{name: tone(150 + 170 * number) for number, name in enumerate(NAMES)},
}


def write_files(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOOKED_ALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hugging face")
    return tmp_path / "cache"


@pytest.fixture
def memory() -> Iterator[dict[str, bytes]]:
    """What ``memory://`` holds, by URL."""
    files = fsspec.filesystem("memory")
    files.store.clear()

    class Held(dict[str, bytes]):
        def __setitem__(self, name: str, content: bytes) -> None:
            files.pipe(f"/{name}", content)

    held = Held()
    for name, content in FILES.items():
        held[f"set/{name}"] = content
    yield held
    files.store.clear()


class Web:
    """A server on this machine, and what it was asked for."""

    def __init__(self) -> None:
        self.files = {f"/set/{name}": content for name, content in FILES.items()}
        self.asked: list[str] = []
        self.rights: list[str | None] = []
        self.before: Callable[[], object] = lambda: None
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                web.rights.append(self.headers["Authorization"])
                web.before()
                path = self.path.partition("?")[0].replace("%20", " ").replace("%C3%A9", "é")
                content = web.files.get(path)
                self.send_response(404 if content is None else 403 if content == b"no" else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/set"


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    thread = threading.Thread(target=web.server.serve_forever, args=(0.01,))
    thread.start()
    yield web
    web.server.shutdown()
    thread.join()
    web.server.server_close()


def facts(clips: list[Recording]) -> list[tuple[object, ...]]:
    """What is known of clips, but for where they are kept."""
    return [
        (one.name, one.path.name, one.cells, one.seconds, one.sha256, one.where) for one in clips
    ]


# --- URLs


@pytest.mark.parametrize("of", ["memory", "web", "zip", "file"])
def test_a_table_at_a_url_gives_the_clips_of_a_local_one(
    of: str, memory: dict[str, bytes], web: Web, tmp_path: Path
) -> None:
    """Cells are relative to it; clips have the names of their files, and of their folders."""
    folder = write_files(tmp_path / "set")
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in FILES.items():
            file.writestr(f"set/{name}", content)
    url = {
        "memory": "memory://set/clips.csv", "web": f"{web.url}/clips.csv",
        "zip": f"zip://set/clips.csv::{archive.as_uri()}",
        "file": (folder / "clips.csv").as_uri(),
    }[of]  # fmt: skip
    found = load_recordings(url)
    assert [one.name for one in found] == ["anna-01", "02-é", "ben-01"]
    assert facts(found) == facts(load_recordings(folder / "clips.csv"))
    assert described_table(url) == described_table(folder / "clips.csv")
    assert (cache_of(tmp_path) == []) == (of == "file")


def cache_of(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_what_was_fetched_is_not_asked_for_again(web: Web, tmp_path: Path) -> None:
    load_recordings(f"{web.url}/clips.csv")
    assert len(web.asked) == len({*web.asked}) == 4
    web.files.clear()
    assert len(load_recordings(f"{web.url}/clips.csv")) == 3
    table = tmp_path / "local.csv"
    table.write_text(f"path,emotion\n{web.url}/ben/01.wav,sad\n", encoding="utf-8")
    assert [one.name for one in load_recordings(table)] == ["01"]
    assert len(web.asked) == 4
    assert cache_of(tmp_path) == ["01.wav", "01.wav", "02 é.wav", "clips.csv"]


def test_a_url_in_many_cells_is_fetched_once(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/ben/01.wav"
    sides = {"base": {"audio": [url, "anna/01.wav"], "text": "a"}, "donor": {"audio": url}}
    web.files["/set/pairs.jsonl"] = json.dumps(
        {**sides, "answers": {"base": "x", "donor": "y"}}
    ).encode()
    (pair,) = read_pairs(f"{web.url}/pairs.jsonl")
    assert pair.base.audio[0] == pair.donor.audio[0] == local(url)
    assert pair.base.audio[1].read_bytes() == FILES["anna/01.wav"]
    assert sorted(web.asked) == ["/set/anna/01.wav", "/set/ben/01.wav", "/set/pairs.jsonl"]


def test_clips_are_fetched_together(web: Web) -> None:
    local(f"{web.url}/clips.csv")
    web.before = partial(threading.Barrier(3).wait, 5)  # nobody passes alone
    assert len(load_recordings(f"{web.url}/clips.csv")) == 3


def test_two_that_fetch_one_file_both_get_it_whole(web: Web, tmp_path: Path) -> None:
    web.before = partial(threading.Barrier(2).wait, 5)
    url = f"{web.url}/ben/01.wav"
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(local, [url, url])
    assert first == second
    assert first.read_bytes() == FILES["ben/01.wav"]
    assert web.asked == ["/set/ben/01.wav"] * 2
    assert cache_of(tmp_path) == ["01.wav"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["urls"]


def test_questions_and_spoken_items_come_from_urls(memory: dict[str, bytes]) -> None:
    question = {
        "id": "1", "question": "Which?", "choices": {"text": [*"abcd"], "label": [*"ABCD"]},
        "answerKey": "A", "audio": "ben/01.wav",
    }  # fmt: skip
    memory["set/arc.jsonl"] = json.dumps(question).encode()
    source = find_file("memory://set/arc.jsonl")
    (found,) = read_questions(source)
    table = local(source)
    hashes = hashes_of([table, *found.audio], table.parent)
    key = hashlib.sha256(b"memory://set/ben/01.wav").hexdigest()[:32]
    assert [*hashes] == ["arc.jsonl", f"urls/{key}/ben/01.wav"], "the same on every machine"
    assert hashes["arc.jsonl"] == hashlib.sha256(table.read_bytes()).hexdigest()
    row = "path,semantic_label,prosody_label,speaker,text\nben/01.wav,sad,angry,ben,x\n"
    memory["set/spoken.csv"] = row.encode()
    assert [one.name for one in read_items("memory://set/spoken.csv", EMOTIONS)] == ["01"]


@pytest.mark.parametrize(
    ("table", "cell", "named"),
    [
        ("https://h/d/t.csv", "a b/é%.wav", "https://h/d/a%20b/%C3%A9%25.wav"),
        ("https://h/d/t.csv?v=1#x", "../a.wav", "https://h/a.wav"),
        ("s3://bucket/d/t.csv", "a b.wav", "s3://bucket/d/a b.wav"),
        ("memory://t.csv", "a.wav", "memory://a.wav"),
        ("zip://d/t.csv::https://h/x.zip?v=1", "a.wav", "zip://d/a.wav::https://h/x.zip?v=1"),
        ("simplecache::https://h/d/t.csv", "a.wav", "simplecache::https://h/d/a.wav"),
        ("https://h/d/t.csv", "hf://datasets/a/b.wav", "hf://datasets/a/b.wav"),
        ("https://h/d/t.csv", "/home/a.wav", Path("/home/a.wav")),
        (Path("/home"), "a/b.wav", Path("/home/a/b.wav")),
    ],
)
def test_what_a_cell_names(table: str | Path, cell: str, named: str | Path) -> None:
    assert beside(table, cell) == named


def test_what_is_local() -> None:
    assert all(is_local(one) for one in ("a.csv", Path("https://h/a.csv"), "bundled:x", "C:\\a"))
    assert all(map(is_url, ("https://h/a", "zip::https://h/a", "file:///a", "a+b://c")))
    assert not is_url("/data/x://y")
    assert not is_local("datasets:superb")


# --- What cannot be fetched


def test_all_faults_are_said_at_once_by_line(web: Web, tmp_path: Path) -> None:
    gone = f"http://127.0.0.1:{free_port()}/gone.wav"
    web.files["/set/locked.wav"] = b"no"
    cells = [
        f"{web.url}/none.wav", gone, f"{web.url}/anna/", f"{web.url}/locked.wav", "s3://b/a.wav",
        "nothing://b/a.wav", f"{web.url}/ben/01.wav", f"{web.url}/clips.csv", "memory://set",
    ]  # fmt: skip
    table = tmp_path / "clips.csv"
    table.write_text("path,emotion\n" + "".join(f"{one},sad\n" for one in cells), encoding="utf-8")
    fsspec.filesystem("memory").pipe("/set/x.wav", b"x")
    with pytest.raises(InputError) as caught:
        load_recordings(table)
    first, *lines = str(caught.value).splitlines()
    assert first.endswith("clips.csv: 8 problems")
    said = [
        ("none.wav'", "there is no such file"), ("gone.wav'", "ClientConnector"),
        ("anna/'", "it is the URL of a folder"), ("locked.wav'", "403"),
        ("s3://b/a.wav'", "a package is missing: Install s3fs"), ("b/a.wav'", "not known: nothing"),
        ("clips.csv", "not an audio file"), ("memory://set'", "it is the URL of a folder"),
    ]  # fmt: skip
    for number, line, (end, reason) in zip((2, 3, 4, 5, 6, 7, 9, 10), lines, said, strict=True):
        assert line.startswith(f"  line {number}: path: "), line
        assert end in line
        assert reason in line
    assert "pip install 'hooked_alm[data]'" in lines[4]


def free_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return server.server_port


@pytest.mark.parametrize(
    ("path", "reason"),
    [("none.csv", "there is no such file"), ("", "it is the URL of a folder")],
)
def test_a_table_that_cannot_be_fetched(path: str, reason: str, web: Web) -> None:
    url = f"{web.url}/{path}"
    with pytest.raises(InputError, match=f"fetching {url}: got {reason}, .*of a folder, give a t"):
        load_recordings(url)


def test_a_transfer_that_breaks_off_leaves_nothing(
    web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Longer(bytes):
        def __len__(self) -> int:
            return super().__len__() + 1

    web.files["/set/ben/01.wav"] = Longer(FILES["ben/01.wav"])
    (reason,) = fetch([f"{web.url}/ben/01.wav"]).values()
    assert "Payload" in str(reason)
    assert cache_of(tmp_path) == []


def test_without_the_extra(web: Web, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("fsspec.core", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for source in (f"{web.url}/clips.csv", "datasets:superb"):
        with pytest.raises(InputError, match=r"pip install 'hooked_alm\[data\]'"):
            load_recordings(source)
    assert len(load_recordings(write_files(tmp_path / "set") / "clips.csv")) == 3


# --- Credentials


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("https://me:pw@h/a.csv", "https://h/a.csv"),
        ("https://token@h/a.csv?v=2", "https://h/a.csv?v=2"),
        ("sftp://me:p@w@h/a.csv", "sftp://h/a.csv"),
        ("abfs://container@account/a@b.csv", "abfs://container@account/a@b.csv"),
        ("https://h/a?id=3&token=x&v=2", "https://h/a?id=3&v=2"),
        ("https://h/a?X-Amz-Date=1&X-Amz-Signature=a:b&X-Amz-Security-Token=c", "https://h/a"),
        ("https://h/a?sv=1&sig=x%3D&api_key=1", "https://h/a?sv=1"),
        ("zip://a.csv::https://me:pw@h/b.zip?key=1", "zip://a.csv::https://h/b.zip"),
        ("zip://a.csv::https://h/b.zip?key=1::x", "zip://a.csv::https://h/b.zip?::x"),
        ("datasets:a/b?split=test&name=key", "datasets:a/b?split=test&name=key"),
        (
            "datasets:json?split=test&data_files=https%3A//me:s@h/x.jsonl%3Fv%3D2%26X-Amz-Date%3D1",
            "datasets:json?split=test&data_files=https://h/x.jsonl%3Fv%3D2",
        ),
        (
            "datasets:json?data_files=https%3A//h/x%3Fsig%3Ds",
            "datasets:json?data_files=https://h/x",
        ),
        ("a?key=1.csv", "a?key=1.csv"),
        ("https://h/a?author=x&keyword=y", "https://h/a?author=x&keyword=y"),
    ],
)
def test_what_is_told_of_a_url(given: str, told: str) -> None:
    assert shown(given) == told


def test_what_says_which_file_it_is_stays(web: Web) -> None:
    """Of what might be a credential, though it is not shown."""
    found = [local(f"{web.url}/clips.csv?key={name}&sig={name}") for name in ("b", "c", "b")]
    assert len({*found}) == 2
    assert len(web.asked) == 2
    assert found[0] == local(f"{web.url}/clips.csv?key=b")


def test_no_credentials_in_errors(web: Web, tmp_path: Path) -> None:
    secret = f"http://me:s3cret1@{web.host}/set/%s?token=s3cret2"
    web.files["/set/locked.wav"] = b"no"
    table = tmp_path / "clips.csv"
    cells = [secret % name for name in ("none.wav", "locked.wav", "ben/01.wav")]
    cells.append(cells[-1].replace("s3cret2", "s3cret3"))
    table.write_text("path,emotion\n" + "".join(f"{one},sad\n" for one in cells), encoding="utf-8")
    errors = []
    for source in (str(table), secret % "none.csv", secret % "", secret % "locked.wav"):
        with pytest.raises(InputError) as caught:
            load_recordings(source)
        errors.append(str(caught.value))
    assert "s3cret" not in "".join(errors)
    assert errors[0].count("line") == 3
    assert "line 5" in errors[0], "which of the two is meant cannot be told"
    assert "leave one out" in errors[0]
    assert {*web.rights} == {"Basic " + base64.b64encode(b"me:s3cret1").decode()}


# --- Runs


def activations(tiny_models: TinyModels, audio: str) -> StoreActivations:
    return StoreActivations(
        ActivationsConfig(
            model=str(tiny_models.folder()), audio=audio, points=["blocks.2.hook_resid_post"],
            batch_size=2, unit_batches=1, n_threads=1, n_resamples=1000,
        )
    )  # fmt: skip


def test_what_a_run_tells_of_a_url_holds_no_credentials(
    web: Web, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """It resumes with other ones, and without any."""
    url = f"http://me:s3cret@{web.host}/set/clips.csv?token=s3cret"
    out = tmp_path / "run"
    folder = runner.run(activations(tiny_models, url), out)
    written = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert not [path for path in written if b"s3cret" in path.read_bytes()]
    assert not [path for path in written if str(tmp_path / "cache").encode() in path.read_bytes()]
    assert folder.provenance["config"]["audio"] == f"{web.url}/clips.csv"
    assert f"audio={web.url}/clips.csv" in folder.provenance["command"]
    table = hashlib.sha256(TABLE.encode()).hexdigest()
    assert folder.provenance["inputs"]["files"] == {"clips.csv": table}
    asked = len(web.asked)
    for again in (f"{web.url}/clips.csv", url.replace("s3cret", "other")):
        runner.run(activations(tiny_models, again), out)
    assert len(web.asked) == asked


def test_a_run_goes_on_with_the_same_contents_alone(
    memory: dict[str, bytes], tiny_models: TinyModels, tmp_path: Path, cache: Path
) -> None:
    """Of a copy that was fetched again, of one that was changed, and of a table."""
    experiment = partial(activations, tiny_models, "memory://set/clips.csv")
    runner.run(experiment(), out := tmp_path / "run")
    shutil.rmtree(cache)
    runner.run(experiment(), out)

    def refused(changed: str) -> None:
        with pytest.raises(InputError, match=rf"resuming the run .*: got a different {changed} \("):
            runner.run(experiment(), out)

    local("memory://set/ben/01.wav").write_bytes(tone(999))
    refused(r"inputs\.clips\.ben-01")
    shutil.rmtree(cache)
    memory["set/ben/01.wav"] = tone(998)
    refused(r"inputs\.clips\.ben-01")
    shutil.rmtree(cache)
    memory["set/ben/01.wav"] = FILES["ben/01.wav"]
    memory["set/clips.csv"] = FILES["clips.csv"] + b"\n"
    refused(r"inputs\.files\.clips\.csv")


# --- Data sets


def data_set(**changes: Any) -> Dataset:
    columns = {
        "audio": [{"bytes": FILES[name], "path": f"{i}.wav"} for i, name in enumerate(NAMES)],
        "emotion": [1, 0, 1],
        "speaker": ["anna", "anna", None],
        "age": [31, 31, 40],
        "words": [["a"], [], []],
        "id": ["x/1", "x/2", "x/3"],
        **changes,
    }
    made = Dataset.from_dict(columns).cast_column("emotion", ClassLabel(names=["angry", "sad"]))
    return made.cast_column("audio", Audio())


def save(made: Any, path: Path) -> str:
    if path.suffix == ".parquet":
        made.to_parquet(path)
        return f"datasets:parquet?data_files={path}"
    made.save_to_disk(path)
    return f"datasets:{path}"


def lines(table: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]


def test_a_data_set_that_was_moved_is_the_same(tmp_path: Path) -> None:
    found = local(save(data_set(), tmp_path / "first"))
    (tmp_path / "first").rename(tmp_path / "second")
    assert local(f"datasets:{tmp_path / 'second'}") == found


@pytest.mark.parametrize("name", ["voices", "voices.parquet"])
def test_a_data_set_is_a_table_of_its_clips(name: str, tmp_path: Path) -> None:
    """Of scalar columns and names of classes; files are where their hashes say."""
    source = save(data_set(), tmp_path / name)
    table = local(source)
    hashes = [hashlib.sha256(FILES[name]).hexdigest() for name in NAMES]
    assert table.name == "dataset.jsonl"
    assert lines(table) == [
        {"path": f"{sha}/{i}.wav", "sha256": sha, "emotion": emotion, "speaker": who, "age": age}
        for i, (sha, emotion, who, age) in enumerate(
            zip(hashes, EMOTIONS, ("anna", "anna", None), (31, 31, 40), strict=True)
        )
    ]
    found = load_recordings(source)
    assert [one.name for one in found] == ["0", "1", "2"]
    assert [one.label for one in found] == [*EMOTIONS]
    assert found[2].cells == {"emotion": "sad", "age": "40"}
    assert [one.sha256 for one in found] == hashes
    assert found[1].where == f"{table.name} line 2"
    assert [one.label for one in load_recordings(source, label_column="age")] == ["31", "31", "40"]
    assert described_table(source)["files"] == {
        table.name: hashlib.sha256(table.read_bytes()).hexdigest()
    }
    assert "torchcodec" not in sys.modules


def test_a_folder_that_was_saved_needs_no_prefix(tmp_path: Path) -> None:
    source = save(data_set(), tmp_path / "voices")
    assert local(tmp_path / "voices") == local(source)
    assert len(load_recordings(tmp_path / "voices")) == 3


@pytest.mark.parametrize("name", ["voices", "voices.parquet"])
def test_another_data_set_is_another_table(name: str, tmp_path: Path) -> None:
    source = save(data_set(), tmp_path / name)
    table = local(source)
    made = table.stat().st_mtime_ns, sorted(table.parent.rglob("*"))
    assert local(source) == table
    assert made == (table.stat().st_mtime_ns, sorted(table.parent.rglob("*"))), "made once"
    shutil.rmtree(tmp_path / name) if name == "voices" else (tmp_path / name).unlink()
    save(data_set(age=[1, 2, 3]), tmp_path / name)
    assert [line["age"] for line in lines(local(source))] == [1, 2, 3]
    assert [line["age"] for line in lines(table)] == [31, 31, 40]


def test_splits(tmp_path: Path) -> None:
    source = save(DatasetDict(train=data_set(), test=data_set(age=[1, 2, 3])), tmp_path / "both")
    with pytest.raises(InputError, match=r"both: got no split, expected one of train, test\. Nam"):
        local(source)
    with pytest.raises(InputError, match="got the split dev, expected one of train, test"):
        local(f"{source}?split=dev")
    assert [line["age"] for line in lines(local(f"{source}?split=test"))] == [1, 2, 3]
    with pytest.raises(InputError, match=r"got name \(nearest: .*expected options that exist"):
        local(f"{source}?split=test&name=x")


@pytest.fixture
def open_file() -> Iterator[None]:
    """``datasets`` leaves the metadata of a folder open."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        yield
        gc.collect()


@pytest.mark.usefixtures("open_file")
def test_folders_of_files(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "files")
    (folder / "clips.csv").unlink()
    rows = TABLE.replace("path,", "file_name,")
    (folder / "metadata.csv").write_text(rows, encoding="utf-8")
    for source in (f"datasets:{folder}", f"datasets:audiofolder?data_dir={folder}"):
        found = load_recordings(source)
        assert [one.path.name for one in found] == ["00001-01.wav", "02 é.wav", "00003-01.wav"]
        assert [one.cells for one in found] == [
            {"emotion": emotion, "speaker": name.partition("/")[0]}
            for name, emotion in zip(NAMES, EMOTIONS, strict=True)
        ]
    assert len(load_recordings(f"datasets:{folder}?split=train[:1]%2Btrain[2:]")) == 2
    assert len(load_recordings(f"datasets:{folder}?split=train[:1]+train[2:]")) == 2
    for name in NAMES[:2]:
        (folder / name).unlink()
    missing = r"cannot read 2 rows\n  row 1: reading .*01.wav: got 'No such file.*\n  row 2: .* é"
    with pytest.raises(InputError, match=missing):
        local(f"datasets:{folder}?split=train[:3]")


def test_clips_without_names_of_files(tmp_path: Path) -> None:
    clips = [{"bytes": FILES[name], "path": path} for name, path in
             zip(NAMES, (None, "a/x.wav", "b/X.flac"), strict=True)]  # fmt: skip
    found = load_recordings(save(data_set(audio=clips), tmp_path / "voices"))
    assert [one.name for one in found] == ["00001", "00002-x", "00003-X"]


@pytest.mark.parametrize(
    ("change", "query", "message"),
    [
        ({"other": "audio"}, "", "of which audio, other hold audio, expected one. Name it: audio_"),
        ({"audio": None}, "", "got the columns emotion, .*, of which none holds audio, expected"),
        ({"audio": [[]]}, "", "of which none holds audio"),
        ({}, "?audio_column=sound", "got the columns audio, .*, of which audio holds audio"),
        ({}, "?sound=audio&token=s3cret", r"got sound .*, token \(nearest: \w+\), expected op"),
        ({}, "?audio_column=age", "got '.*' from the package datasets, expected a data set that"),
        ({"audio": [None] * 3}, "", r"cannot read 3 rows\n  row 1: got no clip.*\n  row 2: got no"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_data_set(
    change: dict[str, Any], query: str, message: str, tmp_path: Path
) -> None:
    made = data_set()
    for name, column in change.items():
        made = made.remove_columns(name) if name in made.features else made
        if column == "audio":
            made = made.add_column(name, [{"bytes": b"x", "path": "x"}] * 3).cast_column(
                name, Audio()
            )
        elif column == [[]]:
            made = made.add_column(name, [[{"bytes": b"x", "path": "x"}]] * 3)
            made = made.cast_column(name, datasets.List(Audio()))
        elif column is not None:
            made = data_set(audio=column)
    source = save(made, tmp_path / "voices") + query
    with pytest.raises(InputError, match=message) as caught:
        local(source)
    assert "s3cret" not in str(caught.value)
    if "other" in change:
        assert len(load_recordings(f"{source}?audio_column=audio")) == 3


def test_a_data_set_that_is_not_there() -> None:
    with pytest.raises(
        InputError, match=r"^reading datasets:nobody/none\?split=x: got '\w+: .*' fr"
    ):
        local("datasets:nobody/none?split=x")


def test_a_run_on_a_data_set_is_that_on_its_local_table(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """The same bytes of tables and of rows; nothing of it says where the copies lie."""
    source = save(data_set().remove_columns(["id", "words"]), tmp_path / "voices")
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = ["path,emotion,speaker,age"]
    speakers = ("anna", "anna", "")
    for i, (name, emotion) in enumerate(zip(NAMES, EMOTIONS, strict=True)):
        (folder / f"{i}.wav").write_bytes(FILES[name])
        rows.append(f"{i}.wav,{emotion},{speakers[i]},{(31, 31, 40)[i]}")
    (folder / "clips.csv").write_text("\n".join(rows), encoding="utf-8")
    runs = [
        runner.run(activations(tiny_models, audio), tmp_path / f"run{number}").path
        for number, audio in enumerate((source, str(folder / "clips.csv")))
    ]
    compared = 0
    for one in sorted(runs[0].rglob("*")):
        name = one.relative_to(runs[0])
        if name.parts[0] in ("tables", "units", "activations") and one.is_file():
            assert one.read_bytes() == (runs[1] / name).read_bytes(), name
            compared += 1
    assert compared >= 6
    said = (runs[0] / "run.json").read_text(encoding="utf-8")
    assert str(tmp_path / "cache") not in said
    assert json.loads(said)["config"]["audio"] == source
    runner.run(activations(tiny_models, source), runs[0])
    save(data_set(audio=[{"bytes": tone(90 + i), "path": f"{i}.wav"} for i in range(3)]),
         tmp_path / "changed")  # fmt: skip
    shutil.rmtree(tmp_path / "voices")
    (tmp_path / "changed").rename(tmp_path / "voices")
    with pytest.raises(InputError, match=r"got a different inputs\.clips\.0"):
        runner.run(activations(tiny_models, source), runs[0])
