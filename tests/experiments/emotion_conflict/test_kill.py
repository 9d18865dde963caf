"""``kill -9`` of ``hooked-alm run emotion_conflict`` at five random moments, resumed each time.

What the workbench promises for any experiment is tested with a toy; this is the real one, through
the real command line. The first process is the installed command; the others have the imports
behind them, which take longer than the run.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from hooked_alm.bundled import CLIPS
from stopped_runs import command, kill, needs_kill, results, start, units, wait_for

NAMES = ("zh_sad_strong", "zh_cheerful_strong", "zh_cheerful_normal")
N_UNITS = 3 * 2 + 3 * 2 + 1
SETTINGS = (
    "modes=[audio_only, conflict]", "donors=[self, text_swap]", "patch_layers=[2, 9]",
    "n_resamples=1000",
)  # fmt: skip


def read_events(out: Path) -> bytes:
    return (out / "events.jsonl").read_bytes()


@needs_kill
def test_five_kills_end_with_the_same_bytes(tmp_path: Path) -> None:
    audio = tmp_path / "clips"
    audio.mkdir()
    for name in NAMES:
        shutil.copy(CLIPS / f"{name}.wav", audio)
    whole, out = tmp_path / "whole", tmp_path / "killed"

    def words(folder: Path) -> list[str]:
        settings = [word for setting in SETTINGS for word in ("-s", setting)]
        return ["run", "emotion_conflict", "--audio", str(audio), "--out", str(folder), *settings]

    # Before the first unit, of the command as a user starts it.
    installed = Path(sys.executable).with_name("hooked-alm")
    first = subprocess.Popen([installed, *words(out)], stderr=subprocess.DEVNULL)
    wait_for(lambda: (out / "events.jsonl").exists() and b"start" in read_events(out))
    moments = random.Random(17)
    time.sleep(moments.uniform(0, 0.1))
    first.kill()
    assert first.wait() == -signal.SIGKILL
    made = units(out)
    assert len(made) < N_UNITS

    # Amid the units, three times: between any two, or within one.
    for _ in range(3):
        process = start(command, words(out))
        wait_for(lambda before=made: len(units(out)) > len(before))
        time.sleep(moments.uniform(0, 0.05))  # a unit takes as long
        kill(process)
        assert made < units(out)
        made = units(out)
    assert len(made) < N_UNITS

    # While it concludes.
    process = start(command, words(out))
    wait_for(lambda: len(units(out)) == N_UNITS)
    time.sleep(moments.uniform(0, 0.2))
    kill(process)
    assert not (out / "report.html").exists()

    for folder in (out, whole):
        process = start(command, words(folder))
        process.join()
        assert process.exitcode == 0

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
