"""Time and memory of what follows the measurement, by the number of clips: everything is linear.

The tables of an ``emotion_conflict`` run are made up, as a model of so many blocks would leave
them; summaries, controls, claims, the page and its report are then made by ``conclude`` and
``render`` as at the end of any run. What is measured of the clips' sound, which reads every file,
is made up too.

A line per stage: seconds, the most memory that the process had meanwhile, and how much of that is
above what it had before (the tables themselves are in it). ``--profile`` says where time goes.

    python scripts/bench_conclude.py                       # 50,000 clips
    python scripts/bench_conclude.py --clips 2000 5000 --blocks 32 --profile
"""

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import soundfile

from hooked_alm.experiments.emotion_conflict.experiment import EmotionConflict
from hooked_alm.experiments.emotion_conflict.settings import EmotionConflictConfig
from hooked_alm.experiments.emotion_conflict.tables import EmotionResults, summarise
from hooked_alm.experiments.materials.conflict_runs import NAMES_TARGET
from hooked_alm.experiments.materials.confounds import confound_table
from hooked_alm.experiments.materials.ob1 import CONFLICT_MAP, EMOTIONS
from hooked_alm.experiments.materials.recordings import Recording
from hooked_alm.experiments.workbench.claims import Verdict
from hooked_alm.experiments.workbench.conclude import conclude
from hooked_alm.experiments.workbench.page import Page
from hooked_alm.experiments.workbench.render import render
from hooked_alm.experiments.workbench.run_folder import RunFolder

SEGMENTS = {"audio": 0.4, "audio_struct": 0.1, "text": 0.1, "struct": 0.1, "sink": 0.2,
            "readout": 0.1}  # fmt: skip


# --- Made-up tables


def made_tables(
    config: EmotionConflictConfig, n_clips: int, n_blocks: int
) -> dict[str, pd.DataFrame]:
    """Tables of a run on so many clips, one in five of which is heard or judged otherwise."""
    rng = np.random.default_rng(0)
    voice = np.resize(np.array(EMOTIONS, dtype=object), n_clips)
    who = pd.DataFrame(
        {
            "clip": [f"clip{i:06d}" for i in range(n_clips)],
            "language": np.resize(np.array(["en", "zh"], dtype=object), n_clips),
            "prompt_language": np.resize(np.array(["en", "zh"], dtype=object), n_clips),
            "voice": voice,
            "intensity": np.resize(np.array(["normal", "strong", "weak"], dtype=object), n_clips),
            "target": [CONFLICT_MAP[one] for one in voice],
        }
    )
    runs = pd.concat([_runs(who, mode, rng) for mode in config.modes], ignore_index=True)
    runs.insert(0, "unit", runs["clip"] + "__" + runs.condition)
    depths = _depths(runs, n_blocks, rng)
    labels = {name: depths[f"z_{name}"].to_numpy() for name in EMOTIONS}
    at = np.repeat(np.arange(len(runs)), n_blocks + 1)
    delta = sum(
        labels[name] * ((runs.target == name).to_numpy()[at] * 1.0 - (runs.voice == name)[at])
        for name in EMOTIONS
    )
    return {
        "runs": runs,
        "delta": depths[["unit", "depth"]].assign(
            target=runs.target.to_numpy()[at], delta=np.asarray(delta)
        ),
        "depths": depths,
        "attention": _attention(runs, n_blocks, rng),
        "patching": _patching(who, config, n_blocks, rng),
    }


def _runs(who: pd.DataFrame, mode: str, rng: np.random.Generator) -> pd.DataFrame:
    answer = who.target if mode == "conflict" else who.voice
    other = rng.choice(np.array(EMOTIONS, dtype=object), len(who))
    answer = answer.where(rng.random(len(who)) < 0.8, other)
    named = who.target if mode in NAMES_TARGET else who.voice if mode == "consistent" else None
    z = rng.normal(0, 0.3, (len(who), len(EMOTIONS)))
    z += 5.0 * (answer.to_numpy()[:, None] == np.array(EMOTIONS, dtype=object))
    return who.assign(
        condition=mode,
        named=named,
        prediction=np.array(EMOTIONS, dtype=object)[z.argmax(axis=1)],
        **{f"z_{name}": z[:, i] for i, name in enumerate(EMOTIONS)},
        label_mass=0.9,
        best_label_rank=1,
        n_tokens=20,
        n_audio_tokens=8,
    )


def _repeated(table: pd.DataFrame, columns: list[str], **axes: Any) -> pd.DataFrame:
    """Every row with every value of the axes, the last fastest."""
    sizes = [len(values) for values in axes.values()]
    places = np.indices((len(table), *sizes)).reshape(1 + len(sizes), -1)
    found = {name: table[name].to_numpy()[places[0]] for name in columns}
    for (name, values), at in zip(axes.items(), places[1:], strict=True):
        found[name] = np.asarray(values)[at]
    return pd.DataFrame(found)


def _depths(runs: pd.DataFrame, n_blocks: int, rng: np.random.Generator) -> pd.DataFrame:
    names = [f"z_{name}" for name in EMOTIONS]
    found = _repeated(runs, ["unit", *names], depth=range(n_blocks + 1))
    share = found.depth / n_blocks
    noise = rng.normal(0, 1, (len(found), len(names))) * (share < 1).to_numpy()[:, None]
    found[names] = found[names].to_numpy() * share.to_numpy()[:, None] + noise
    return found.assign(
        kl=1 - share, agrees=(share > 0.5).astype(float), entropy=1.0, residual_norm=1.0 + share
    )


def _attention(runs: pd.DataFrame, n_blocks: int, rng: np.random.Generator) -> pd.DataFrame:
    found = _repeated(
        runs, ["unit"], layer=range(n_blocks), span=np.array([*SEGMENTS], dtype=object)
    )
    mass = np.resize([*SEGMENTS.values()], len(found))
    moved = np.repeat(rng.uniform(0, 0.05, len(found) // len(SEGMENTS)), len(SEGMENTS))
    mass = mass + moved * np.resize([1.0, 0, -1, 0, 0, 0], len(found))
    is_sink = (found.span == "sink").to_numpy()
    return found.assign(
        mass=mass, density=mass, mass_without_sink=np.where(is_sink, np.nan, mass / 0.8),
        n_tokens=np.where(found.span == "audio", 2, 1),
    )  # fmt: skip


def _patching(
    who: pd.DataFrame, config: EmotionConflictConfig, n_blocks: int, rng: np.random.Generator
) -> pd.DataFrame:
    spans = np.array([*config.patched_spans()], dtype=object)
    parts = []
    for donor in config.donors:
        columns = ["clip", "voice", "prompt_language", "target"]
        part = _repeated(who, columns, block=range(n_blocks), span=spans)
        gone = part.block.to_numpy() / max(n_blocks - 1, 1)
        source = {"text_swap": "text", "audio_swap": "audio"}.get(donor)
        share = np.where(part.span == source, 1 - gone, np.where(part.span == "readout", gone, 0.0))
        share = np.where(part.span.isin(["all", "text+readout"]), 1.0, share) * (donor != "self")
        total = np.repeat(rng.normal(5, 1, len(who)), n_blocks * len(spans)) * (donor != "self")
        moved = share + rng.normal(0, 0.05, len(part)) * ((0 < share) & (share < 1))
        is_there = (moved > 0.5) & (donor != "random_other")
        parts.append(
            part.assign(
                named=part.target, donor=donor, donor_clip=part["clip"], donor_named=part.voice,
                toward=part.voice, prediction=part.voice.where(is_there, part.target),
                flip=is_there.astype(float), shift=total * moved,
                recovery=np.where(total > config.min_effect, moved, np.nan),
                base=-5.0, donor_metric=total - 5.0, total_effect=total, noise=0.0,
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def made_manifest(recordings: list[Recording]) -> pd.DataFrame:
    """What is known of the clips, with some of what would be measured."""
    rng, n = np.random.default_rng(1), len(recordings)
    cells = pd.DataFrame([one.cells for one in recordings])
    return cells.assign(
        clip=[one.name for one in recordings], speaker=[f"speaker{i % 40}" for i in range(n)],
        sha256=[one.sha256 for one in recordings], duration_s=rng.normal(1, 0.1, n),
        rms_dbfs=rng.normal(-20, 1, n), sample_rate=16_000, channels=1, codec="WAV/PCM_16",
        voiced_fraction=0.5,
    )  # fmt: skip


def made_recordings(folder: Path, runs: pd.DataFrame) -> list[Recording]:
    """Recordings that are all of one file."""
    path = folder / "tone.wav"
    soundfile.write(path, 0.1 * np.sin(np.arange(16_000) / 20), 16_000)
    first = runs.drop_duplicates("clip")
    return [
        Recording(
            name=row.clip, path=path, seconds=1.0, sampling_rate=16_000, channels=1,
            codec="WAV/PCM_16", sha256=f"{i:064x}", notes=(), where=row.clip,
            cells={"emotion": row.voice, "language": row.language, "intensity": row.intensity},
        )
        for i, row in enumerate(first.itertuples(index=False))
    ]  # fmt: skip


# --- Stages


class Stages:
    """Time and peak memory of one stage after the other."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Measures what is done in a `with` block, which may give it another name."""
        row: dict[str, Any] = {"stage": name}
        before = _memory("VmRSS")
        began = time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        yield row
        row |= {"seconds": time.perf_counter() - began, "peak_mib": _memory("VmHWM")}
        row["above_mib"] = row["peak_mib"] - before
        self.rows.append(row)
        print(
            f"{row['stage']:<28}{row['seconds']:9.1f} s {row['peak_mib']:9.0f} MiB, "
            f"{row['above_mib']:+7.0f}",
            flush=True,
        )


def _memory(field: str) -> float:
    """MiB, as Linux counts them."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


class Timed(EmotionConflict):
    """The experiment, on what is made up, stage by stage."""

    name = "emotion_conflict"
    stages: ClassVar[Stages]
    made: pd.DataFrame

    def summaries(self, run: EmotionResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """As the experiment's own, but for the sound of the clips."""
        yield "manifest", self.made
        with self.stages.stage("summary: confounds"):
            table = confound_table(run, self.config.label_column)
        yield table
        rest = summarise(run)
        is_left = True
        while is_left:
            with self.stages.stage("summary: none is left") as row:
                found = list(islice(rest, 1))
                row["stage"] = f"summary: {found[0][0]}" if found else row["stage"]
            yield from found
            is_left = bool(found)

    @classmethod
    def judge(cls, run: EmotionResults) -> Verdict:
        """The experiment's own controls and claims."""
        with cls.stages.stage("controls and claims"):
            return super().judge(run)

    def page(self, page: Page, run: EmotionResults) -> None:
        """The experiment's own page."""
        with self.stages.stage("page"):
            super().page(page, run)


def bench(n_clips: int, n_blocks: int, n_resamples: int) -> dict[str, Any]:
    """Everything after the measurement of so many clips."""
    stages, config = Stages(), EmotionConflictConfig(n_resamples=n_resamples)
    with tempfile.TemporaryDirectory() as place:
        folder, experiment = RunFolder(Path(place) / "run"), Timed(config)
        with stages.stage("tables (made up)"):
            tables = made_tables(config, n_clips, n_blocks)
            recordings = made_recordings(Path(place), tables["runs"])
        Timed.stages, experiment.made = stages, made_manifest(recordings)
        experiment.folder, experiment.recordings = folder, recordings
        inputs = {
            "model": {"blocks": n_blocks}, "audio_is_first": True, "labels": [*EMOTIONS],
            "prompts": {"en": {"audio_only": "What is it?"}},
            "clips": [{"name": one.name, "sha256": one.sha256} for one in recordings],
        }  # fmt: skip
        run = {"experiment": "emotion_conflict", "config": config.model_dump(mode="json")}
        folder.write_json("run.json", {**run, "inputs": inputs, "environment": {}})
        began = time.perf_counter()
        conclude(experiment, inputs, tables, folder)
        whole = time.perf_counter() - began
        print(f"{'conclude, in all':<28}{whole:9.1f} s")
        with stages.stage("render"):
            size = render(folder).stat().st_size
        print(f"report.html: {size / 1e6:.1f} MB")
        return {"clips": n_clips, "blocks": n_blocks, "stages": stages.rows, "report_bytes": size,
                "conclude_s": whole}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[50_000])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--profile", action="store_true", help="functions that take most time")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    found = []
    profile = cProfile.Profile()
    for n_clips in options.clips:
        print(f"{n_clips} clips, {options.blocks} blocks")
        if options.profile:
            profile.enable()
        found.append(bench(n_clips, options.blocks, options.resamples))
        profile.disable()
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
