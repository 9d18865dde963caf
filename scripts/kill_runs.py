"""Stops runs of every experiment at random moments, resumes them, and compares what they leave.

A run is stopped by ``kill -9``, by SIGTERM, or by Ctrl-C twice; at a moment of its units, or while
it concludes. On several workers, one of these or Ray's head may be killed in its place. Resumed to
its end it must have the same bytes as a run in one process that nobody stopped.

    .venv/bin/python scripts/kill_runs.py --moments 20 --seed 0
    .venv/bin/python scripts/kill_runs.py --moments 20 --executor process
    .venv/bin/python scripts/kill_runs.py --moments 20 --executor ray
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

from hooked_alm.bundled import ASSETS, CLIPS
from hooked_alm.experiments import cli
from hooked_alm.experiments.registry import EXPERIMENTS
from hooked_alm.experiments.workbench import figures

NAMES = ("zh_sad_strong", "zh_cheerful_strong", "zh_cheerful_normal")
FREE = {"run.json", "events.jsonl", "report.html"}
"""Files that say when the run was made."""
PRELOADED = [
    "hooked_alm.experiments.workbench.runner",
    *(location.partition(":")[0] for location in EXPERIMENTS.values()),
    *(f"hooked_alm.converters.families.{name}" for name in ("qwen2", "qwen2_audio", "whisper")),
]
WAYS: dict[str, tuple[signal.Signals, ...]] = {
    "kill -9": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "Ctrl-C twice": (signal.SIGINT, signal.SIGINT),
}
VICTIMS = {"a worker": ("workbench.worker", "ray::Worker"), "Ray's head": ("gcs_server",)}
"""Processes that may be killed in place of the run's own -> what their command lines have."""
WAYS_BY_EXECUTOR = {
    "serial": [*WAYS],
    "process": ["a worker", "kill -9", "a worker", "Ctrl-C twice"],
    "ray": ["a worker", "kill -9", "a worker", "Ray's head"],
}


def small_settings(inputs: Path) -> dict[str, list[str]]:
    """Experiment -> settings under which it takes some seconds; writes its inputs."""
    (clips := inputs / "clips").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(CLIPS / f"{name}.wav", clips)
    lines = (ASSETS / "prefix_comparison.jsonl").read_text("utf-8").splitlines()[:2]
    for name in ("confusable", "ob1", "semantic_vs_prosody"):
        (inputs / name).symlink_to(ASSETS / name)
    (inputs / "items.jsonl").write_text("\n".join(lines), "utf-8")
    voices = [{"audio": f"clips/{name}.wav", "text": "情绪是什么？"} for name in NAMES[:2]]
    pairs = [
        {"base": voices[side], "donor": voices[1 - side], "group": f"g{side}",
         "answers": {"base": ("悲伤", "高兴")[side], "donor": ("高兴", "悲伤")[side]}}
        for side in (0, 1)
    ]  # fmt: skip
    (inputs / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), "utf-8")
    return {
        "activations": [f"audio={clips}", "batch_size=1", "unit_batches=1"],
        "asr_components": [f"audio={clips}", "n_exact=1", "n_random=1", "batch_size=1"],
        "attribute_lens": [
            *(f"audio={clips}", "enrich_sources=[0, 3]", "enrich_layers=[4]"),
            "attributes={emotion: {question: 'What is the [emotion]?'}}",
        ],
        "component_patching": [
            *(f"audio={inputs}/confusable", "sites=[attn]", "stacks=[decoder]"),
            *("alphas=[0, 1]", "n_noise=1"),
        ],
        "class_neurons": ["n_draws=1", "alphas=[-1, 0]", "batch_size=20"],
        "circuits": [f"pairs={inputs}/pairs.jsonl", "places=[readout]", "n_random=1", "n_paths=2"],
        "convergence": [f"audio={clips}"],
        "emotion_conflict": [
            *(f"audio={clips}", "modes=[audio_only, conflict]", "donors=[self, text_swap]"),
            "patch_layers=[2, 9]",
        ],
        "encoder_lens": [f"audio={clips}"],
        "grounding": [f"audio={clips}"],
        "head_statistics": ["max_samples=8", "batch_size=1", "unit_batches=1"],
        "lora_blocks": [f"audio={clips}", "batch_size=1"],
        "minimal_pairs": [f"audio={clips}", "kinds=[label, range]", "batch_size=1"],
        "prefix_comparison": [f"items={inputs}/items.jsonl", "pos_modes=[as_run]", "n_shown=1"],
        "probes": ["labels=[prosody_label]", "points=[blocks.3.hook_resid_post]", "n_folds=2"],
        "sae_compare": ["ks=[1, 10]", "n_random=1", "n_folds=2", "unit_batches=3"],
        "sae_features": ["n_shown=2", "unit_batches=3"],
        "sae_steering": ["n_random=1", "further_alphas=[]", "batch_size=18"],
        "sae_patching": [
            *(f"audio={inputs}/ob1", "conditions=[audio_only]", "sizes=[3]", "n_latents=3"),
            *("alphas=[]", "group=language", "batch_size=8"),
        ],
        "sae_train": [
            *(f"audio={clips}", "n_rows=600", "step_rows=60", "steps_per_checkpoint=3"),
            "expansion=2",
        ],
        "semantic_vs_prosody": ["n_pairs=2", "spans=[audio]", "controls=[self]"],
        "transcript_probes": ["labels=[speech]", "max_new_tokens=8", "n_folds=2"],
        "trigger_defence": ["n_attacked=8", "steps=3", "further_percents=[]", "batch_size=4"],
        "tuned_lens": [
            *(f"audio={clips}", "n_steps=6", "steps_per_checkpoint=2", "prompts_per_step=2"),
        ],
    }


def command(words: list[str]) -> None:
    """The command line, in silence."""
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    figures.DOTS_PER_INCH = 30  # drawing them takes longer than the runs
    sys.argv = ["hooked-alm", *words]
    cli.main()


def started(
    name: str, settings: list[str], out: Path, how: Sequence[str] = ()
) -> ForkServerProcess:
    """A run in a process of its own, forked from one that has the imports behind it."""
    options = [word for one in (*settings, "n_resamples=1000") for word in ("-s", one)] + [*how]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    process = processes.Process(target=command, args=(["run", name, "--out", str(out), *options],))
    process.start()
    return process


def results(folder: Path) -> dict[str, bytes]:
    """Every file that must not depend on when and how often the run was started."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in FREE)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def n_units(out: Path) -> int:
    """How many units are done."""
    return len([*out.glob("units/*.json")])


def wait_for(is_reached: Callable[[], bool], process: ForkServerProcess) -> None:
    """Wait until a run got somewhere, or ended."""
    while process.is_alive() and not is_reached():
        time.sleep(0.001)


def is_open(out: Path) -> bool:
    """Whether the first unit could begin."""
    return (out / "events.jsonl").exists()


def finished(name: str, settings: list[str], out: Path) -> tuple[Path, float, int]:
    """A run that nobody stops: its folder, seconds that it takes to conclude, number of units."""
    process = started(name, settings, out)
    wait_for(lambda: (out / "tables").exists(), process)
    began = time.monotonic()
    process.join()
    return out, time.monotonic() - began, n_units(out)


def stop(process: ForkServerProcess, way: str) -> int | None:
    """Stops a run, or kills one of its processes; its exit code."""
    if way in VICTIMS:
        with contextlib.suppress(psutil.Error):
            found = psutil.Process(process.pid).children(recursive=True)
            named = [(one, " ".join(one.cmdline())) for one in found]
            chosen = [one for one, line in named if any(part in line for part in VICTIMS[way])]
            for one in chosen[:1]:
                one.kill()
    for number in WAYS.get(way, ()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, number)
        time.sleep(0.02)
    process.join()
    return process.exitcode


def main() -> int:
    """Prints a row for every moment; 1 if any run ended with other bytes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experiments", nargs="+", metavar="NAME", help="some of them alone")
    parser.add_argument("--executor", choices=[*WAYS_BY_EXECUTOR], default="serial")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *VICTIMS], help="some of them alone")
    options = parser.parse_args()
    draw, n_wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        settings, whole = small_settings(Path(scratch) / "inputs"), {}
        settings = {name: settings[name] for name in options.experiments or settings}
        is_alone = options.executor == "serial"
        how = [] if is_alone else ["--executor", options.executor, "--workers", "2"]
        ways = options.ways or WAYS_BY_EXECUTOR[options.executor]
        print(f"{'experiment':<20} {'stopped by':<13} {'amid':<10} units  exit  the same bytes")
        for moment in range(options.moments):
            turn, number = divmod(moment, len(settings))
            name, way = [*settings][number], ways[(number + turn) % len(ways)]
            if name not in whole:
                whole[name] = finished(name, settings[name], Path(scratch) / f"{name} whole")
            reference, seconds, n_all = whole[name]
            process = started(name, settings[name], out := Path(scratch) / f"{name} {moment}", how)
            n_before = n_all if turn % 2 and is_alone else draw.randrange(n_all)
            wait_for(lambda out=out, n=n_before: n_units(out) >= n and is_open(out), process)
            time.sleep(draw.uniform(0, seconds * (0.8 if turn % 2 else 0.1)))
            code, done = stop(process, way), n_units(out)
            resumed = started(name, settings[name], out, how)
            resumed.join()
            is_same = resumed.exitcode == 0 and results(out) == results(reference)
            n_wrong += not is_same
            amid = "report" if turn % 2 and is_alone else "units"
            row = f"{name:<20} {way:<13} {amid:<10}"
            same = "yes" if is_same else "NO"
            print(f"{row} {done:>2}/{n_all:<3} {code!s:>4}  {same}", flush=True)
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
