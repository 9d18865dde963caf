"""Time and memory of what comes before and between units, on a manifest of very many clips.

Writes short clips, no two alike, from a few bundled ones, and a manifest of them all; then has
``emotion_conflict`` identify its inputs, and measures one unit in five thousand. What comes after
the units is ``bench_conclude.py``'s.

    python scripts/bench_identify.py [--clips 50000] [--seconds 0.5]
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from hooked_alm.bundled import CLIPS
from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.materials.ob1 import ob1_clip_names
from hooked_alm.experiments.workbench.run_folder import RunFolder
from hooked_alm.experiments.workbench.work import identified, measured, set_threads
from hooked_alm.experiments.workbench.worker import Brief, loaded

RATE_HZ = 16_000
ONE_IN = 5000


def write_clips(folder: Path, n: int, seconds: float) -> Path:
    """Recordings and their manifest; each is a bundled one, at a place of its own."""
    sources = []
    for name in ob1_clip_names():
        samples, _ = soundfile.read(CLIPS / f"{name.stem}.wav", dtype="float32")
        sources.append((name, samples))
    size, lines = int(seconds * RATE_HZ), ["path,emotion,language,speaker,sentence"]
    rng = np.random.default_rng(0)
    for number in range(n):
        name, samples = sources[number % len(sources)]
        start = rng.integers(len(samples) - size)
        cut = samples[start : start + size] * rng.uniform(0.5, 1.0)
        file = f"{number // 1000:03d}/{name.stem}_{number:06d}.wav"
        (folder / file).parent.mkdir(exist_ok=True)
        soundfile.write(folder / file, cut, RATE_HZ, subtype="PCM_16")
        lines.append(f"{file},{name.emotion},{name.language},s{number % 50},{number // 90}")
    (manifest := folder / "manifest.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return manifest


def peak_mib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prints a line for every stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=0.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifest = write_clips(folder, options.clips, options.seconds)
        print(
            f"{options.clips} clips of {options.seconds} s; peak {peak_mib():.0f} MiB", flush=True
        )

        def said(what: str, began: float, before: float) -> None:
            wall, cpu = time.perf_counter() - began, time.process_time() - before
            print(
                f"{what}: {wall:.1f} s, {cpu:.1f} s of CPU, peak {peak_mib():.0f} MiB", flush=True
            )

        experiment = EmotionConflict(EmotionConflictConfig(audio=str(manifest), batch_size=8))
        set_threads(experiment.config.n_threads)
        now = time.perf_counter(), time.process_time()
        _, units = identified(experiment, RunFolder(folder / "run"))
        said(f"identify, {len(units)} units", *now)
        now = time.perf_counter(), time.process_time()
        brief = Brief.of(experiment)
        said(f"a worker's brief of {len(brief.experiment) / 2**20:.0f} MiB", *now)
        loaded(experiment)
        now, some = (time.perf_counter(), time.process_time()), units[::ONE_IN]
        for unit in some:
            measured(experiment, unit)
        said(f"{len(some)} units, one in {ONE_IN}", *now)


if __name__ == "__main__":
    main()
