"""The page's budget: a sample of clips, the first rows of tables, and never more than can be sent.

The page that a run of a few clips had before there was a budget is the page that it has.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from hooked_alm.experiments.workbench import figures, page, render
from hooked_alm.experiments.workbench.page import CLIP_RATE_HZ, MAX_CLIP_BYTES, MAX_CLIPS, Page
from hooked_alm.experiments.workbench.report import Clip, Report, Table, read_report, write_report
from hooked_alm.experiments.workbench.run_folder import RunFolder

N_MANY = 5000
RUN = {"experiment": "toy", "config": {}, "inputs": {}, "environment": {}}


@dataclass(frozen=True)
class Sound:
    """A clip that there is no file of."""

    name: int
    label: str
    seconds: float = 1.0


def sounds(n: int, seconds: float = 1.0) -> list[Sound]:
    """Nine in ten are sad."""
    return [Sound(i, "angry" if i % 10 == 3 else "sad", seconds) for i in range(n)]


def sampled(path: Path, clips: list[Sound], seed: int = 0, **options: int) -> page.Sample[Sound]:
    return Page(RunFolder(path)).sample(clips, lambda one: one.label, seed=seed, **options)


# --- Clips


@pytest.mark.parametrize("n", [1, 18, MAX_CLIPS])
def test_few_clips_are_all_shown_in_their_order(tmp_path: Path, n: int) -> None:
    assert sampled(tmp_path, sounds(n)) == page.Sample(sounds(n), n, "")


def test_of_many_clips_every_label_is_heard(tmp_path: Path) -> None:
    found = sampled(tmp_path, sounds(3000))
    assert Counter(one.label for one in found.clips) == {"sad": 30, "angry": 30}
    assert found.clips == sorted(found.clips, key=lambda one: one.name)
    assert found.n_of == 3000
    assert "The labels take turns" in found.how
    assert found == sampled(tmp_path, sounds(3000)), "drawn with the seed alone"
    assert found.clips != sampled(tmp_path, sounds(3000), seed=1).clips
    assert found.clips[-1].name > 3000 / 2, "not the first of every label"
    assert len(sampled(tmp_path, sounds(3000), most=7).clips) == 7


def test_a_rare_label_gives_way(tmp_path: Path) -> None:
    clips = [*sounds(1000), Sound(1000, "calm")]
    counts = Counter(one.label for one in sampled(tmp_path, clips, most=21).clips)
    assert counts == {"sad": 10, "angry": 10, "calm": 1}


def test_sound_is_counted_over_the_whole_page(tmp_path: Path) -> None:
    minute = 60 * CLIP_RATE_HZ * 2
    n_fit = MAX_CLIP_BYTES // minute
    shown = Page(RunFolder(tmp_path))
    long = shown.sample([*sounds(30, 60.0), Sound(30, "calm", 1e6)], lambda _: "", seed=0)
    assert len(long.clips) == n_fit
    assert all(one.seconds == 60 for one in long.clips), "what never fits is passed over"
    assert long.how
    assert len(shown.sample(sounds(40), lambda _: "", seed=0).clips) < 40
    assert not shown.sample(sounds(3, 60.0), lambda _: "", seed=0).clips


# --- Tables and settings


def written(shown: Page, **run: object) -> str:
    folder = shown.folder
    folder.write_json("run.json", {**RUN, **run})
    write_report(folder, Report("Toy", "Is it small?", "", False, sections=shown.sections))
    return render.render(folder).read_text("utf-8")


def started(path: Path) -> Page:
    shown = Page(RunFolder(path))
    shown.section("Part")
    return shown


def test_a_long_table_shows_its_first_rows_and_says_so(tmp_path: Path) -> None:
    table = pd.DataFrame({"clip": [f"clip{i}" for i in range(N_MANY)], "words": "x" * 5000})
    shown = started(tmp_path)
    shown.folder.write_table("many", table)
    shown.table("Given", table, of="many")
    shown.table("Named", "many", max_rows=12)
    shown.table("Rows", [{"a": i} for i in range(40)])
    shown.table("Short", [{"b": 1}], of="many")
    text = written(shown)
    assert text.count(f"The first 30 of {N_MANY} rows. ") == 1
    assert text.count(f"The first 12 of {N_MANY} rows. ") == 1
    assert "The first 30 of 40 rows. " in text
    assert text.count("tables/many.parquet</a>") == 2, "not where all are shown"
    assert "clip29<" in text
    assert "clip30<" not in text
    assert "(4000 more letters)" in text
    assert (tmp_path / "report.json").stat().st_size < 200_000 + 30 * 5000
    items = read_report(shown.folder).sections[0].items
    assert [len(one.rows or ()) for one in items if isinstance(one, Table)] == [30, 0, 30, 1]


def test_long_inputs_are_cut(tmp_path: Path) -> None:
    clips = [{"name": f"clip{i}", "sha256": "0" * 64, "seconds": 1.0} for i in range(N_MANY)]
    by_name = {one["name"]: one for one in clips}
    text = written(started(tmp_path), inputs={"clips": clips, "by_name": by_name})
    assert len(text) < 200_000
    assert text.count(f"… {N_MANY - render.MAX_LISTED} more, in run.json") == 2
    assert "clip199&#34;" in text
    assert "clip200&#34;" not in text


# --- Pictures and sound


def with_noise(path: Path, seconds: float = 20.0) -> Page:
    """A page with a figure and a clip."""
    shown = started(path)
    numbers = pd.DataFrame({"x": range(300), "mean": np.random.default_rng(0).normal(size=300)})
    drawing = figures.curves(numbers, "x", title="Noise")
    shown.figure("noise", drawing, numbers, "Noise", "Do not.")
    soundfile.write(path / "noise.flac", np.zeros(int(seconds * CLIP_RATE_HZ)), CLIP_RATE_HZ)
    shown.clips([Clip(shown.folder.add_clip("noise", path / "noise.flac"), "Noise")], "A clip.")
    return shown


def test_a_figure_of_very_many_lines_is_shown_as_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "data:image/svg+xml" in written(with_noise(tmp_path))
    monkeypatch.setattr(render, "MAX_SVG_BYTES", 10_000)
    text = written(with_noise(tmp_path))
    assert "data:image/png" in text
    assert "data:image/svg+xml" not in text
    assert 'alt="Noise: mean by x: ' in text


def test_a_full_page_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(with_noise(tmp_path))
    assert "The page is full" not in whole
    monkeypatch.setattr(render, "MAX_PAGE_BYTES", render.TEXT_BYTES + 400_000)
    text = written(with_noise(tmp_path))
    assert "data:audio" not in text
    assert 'The page is full; the clip is <a href="clips/noise.wav">' in text
    assert "data:image" in text, "what still fits is shown"
    monkeypatch.setattr(render, "MAX_PAGE_BYTES", render.TEXT_BYTES)
    text = written(with_noise(tmp_path))
    assert 'the figure is <a href="figures/noise.svg">' in text
    assert len(text) < 100_000


def test_room_is_used_up() -> None:
    room = render.Room(100)
    sizes = [len(room.left_for({"src": "x" * n, "alt": "A."})["src"]) for n in (60, 60, 40, 1)]
    assert sizes == [60, 0, 40, 0]
    assert room.left_for({"src": "x", "alt": "A."})["alt"] == "A."
