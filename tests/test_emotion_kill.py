"""``kill -9`` of ``hooked-alm run emotion_conflict`` at five random moments, resumed each time.

What the workbench promises for any experiment is tested with a toy; this is the real one, through
the real command line. The first process is the installed command; the others are forked from a
server that has done its imports, which take longer than the run.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from hooked_alm.experiments.bundled import CLIPS

NAMES = ("zh_sad_strong", "zh_cheerful_strong", "zh_cheerful_normal")
N_UNITS = 3 * 2 + 3 * 2
SETTINGS = (
    "modes=[audio_only, conflict]", "donors=[self, text_swap]", "patch_layers=[2, 9]",
    "n_resamples=1000",
)  # fmt: skip

# Reads a command line as JSON, runs it in a fork, prints its process id, then its wait status.
SERVER = """
import json, os, sys
from hooked_alm.experiments import emotion_conflict
from hooked_alm.converters import qwen2_audio
from hooked_alm.experiments.workbench import cli, figures, runner

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.argv = json.loads(line)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            cli.main()
        except SystemExit as done:
            os._exit(done.code or 0)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


class Server:
    """Processes that have their imports behind them."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def start(self, command: list[str]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def status(self) -> int:
        """Of the process started last: its exit code, or minus its signal."""
        return os.waitstatus_to_exitcode(self._answer())

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@contextmanager
def serving() -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


def units(out: Path) -> set[str]:
    return {path.name for path in out.glob("units/*.json")}


def read_events(out: Path) -> bytes:
    return (out / "events.jsonl").read_bytes()


def wait_for(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not is_reached():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


def results(folder: Path) -> dict[str, bytes]:
    """Every file that must not depend on when and how often the run was started."""
    free = {"run.json", "events.jsonl", "report.html"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in free
    }


def test_five_kills_end_with_the_same_bytes(tmp_path: Path) -> None:
    audio = tmp_path / "clips"
    audio.mkdir()
    for name in NAMES:
        shutil.copy(CLIPS / f"{name}.wav", audio)
    whole, out = tmp_path / "whole", tmp_path / "killed"

    def command(folder: Path) -> list[str]:
        words = [word for setting in SETTINGS for word in ("-s", setting)]
        options = ["--audio", str(audio), "--out", str(folder), *words]
        return ["hooked-alm", "run", "emotion_conflict", *options]

    moments = random.Random(17)
    with serving() as server:
        # Before the first unit, of the command as a user starts it.
        installed = Path(sys.executable).with_name("hooked-alm")
        first = subprocess.Popen([installed, *command(out)[1:]], stderr=subprocess.DEVNULL)
        wait_for(lambda: (out / "events.jsonl").exists() and b"start" in read_events(out))
        time.sleep(moments.uniform(0, 0.1))
        first.kill()
        assert first.wait() == -signal.SIGKILL
        made = units(out)
        assert len(made) < N_UNITS

        # Amid the units, three times: between any two, or within one.
        for _ in range(3):
            pid = server.start(command(out))
            wait_for(lambda before=made: len(units(out)) > len(before))
            time.sleep(moments.uniform(0, 0.05))  # a unit takes as long
            os.kill(pid, signal.SIGKILL)
            assert server.status() == -signal.SIGKILL
            assert made < units(out)
            made = units(out)
        assert len(made) < N_UNITS

        # While it concludes.
        pid = server.start(command(out))
        wait_for(lambda: len(units(out)) == N_UNITS)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert server.status() == -signal.SIGKILL
        assert not (out / "report.html").exists()

        for folder in (out, whole):
            server.start(command(folder))
            assert server.status() == 0

    events = [json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()]
    starts = [event for event in events if event["event"] in ("start", "resume")]
    assert [event["event"] for event in starts] == ["start", *["resume"] * 5]
    assert starts[-1]["done"] == N_UNITS
    assert len(units(whole)) == N_UNITS

    expected, got = results(whole), results(out)
    assert {f"tables/{name}.parquet" for name in ("runs", "delta", "patching")} <= expected.keys()
    assert "report.json" in expected
    assert [name for name in expected if got.get(name) != expected[name]] == []
    assert got.keys() == expected.keys()
    assert len(pd.read_parquet(out / "tables/patching.parquet")) == 6 * 2 * 8
