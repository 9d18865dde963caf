"""Manifests of conflict clips: what is read, what is refused; and pairs made of them."""

import csv
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from hooked_alm.errors import InputError
from hooked_alm.experiments.semantic_vs_prosody import items as items_module
from hooked_alm.experiments.semantic_vs_prosody.experiment import BUNDLED_ITEMS
from hooked_alm.experiments.semantic_vs_prosody.items import (
    EMOTIONS,
    PAIR_TYPES,
    PairType,
    SpokenItem,
    conflict_items,
    draw_pairs,
    like_in_labels,
    read_items,
)
from hooked_alm.experiments.workbench.work import FILE_NAME_SAFE

RATE = 16_000
COLUMNS = ("path", "semantic_label", "prosody_label", "speaker", "text")
LINES = [
    ("a.wav", "happy", "sad", "s1", "Good news."),
    ("b.wav", "angry", "sad", "s1", "How dare you."),
    ("c.wav", "happy", "angry", "s1", "Good news."),
]


def write(folder: Path, lines: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> Path:
    """A manifest, and a clip of its own for every file it names that is not there."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(list(folder.iterdir())))
    for line in lines:
        if line[0].endswith(".wav") and not (folder / line[0]).exists():
            soundfile.write(folder / line[0], 0.1 * rng.standard_normal(RATE // 4), RATE)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *lines])
    return folder


def test_a_manifest_is_read_in_its_order(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "clips",
        [(*line, note) for line, note in zip(LINES, "xyz", strict=True)],
        (*COLUMNS, "note"),
    )
    for source in (folder, folder / "manifest.csv"):
        items = read_items(source, EMOTIONS)
        assert [item.name for item in items] == ["a", "b", "c"]
        assert [(item.semantic, item.prosody) for item in items] == [line[1:3] for line in LINES]
        assert [item.cells["note"] for item in items] == ["x", "y", "z"]
        assert {item.seconds for item in items} == {0.25}


def change(line: int, cell: int, value: str) -> list[tuple[str, ...]]:
    lines = [list(one) for one in LINES]
    lines[line][cell] = value
    return [tuple(one) for one in lines]


@pytest.mark.parametrize(
    ("lines", "columns", "match"),
    [
        (
            change(1, 1, "joyful"),
            COLUMNS,
            r"manifest.csv: line 3: semantic_label: got 'joyful', expected one of neutral",
        ),
        (change(2, 2, ""), COLUMNS, r"line 4: prosody_label: missing"),
        (change(0, 0, ""), COLUMNS, r"line 2: path: missing"),
        (change(0, 0, "none.flac"), COLUMNS, r"line 2: path: .*none\.flac"),
        (change(1, 3, " "), COLUMNS, r"line 3: speaker: missing"),
        (change(1, 4, ""), COLUMNS, r"line 3: text: missing"),
        (change(1, 0, "a.wav"), COLUMNS, r"line 3: the same recording as .* line 2"),
        (
            [("x y.wav", *LINES[0][1:]), ("x(y.wav", *LINES[1][1:])],
            COLUMNS,
            r"line 3: the same file name as .* line 2: .* rename one",
        ),
        (
            change(1, 0, "é" * 51 + ".wav"),
            COLUMNS,
            r"line 3: path: got a file name of 102 bytes .* at most 100",
        ),
        (
            change(2, 1, "sad"),
            COLUMNS,
            r"line 4: semantic_label: got 'sad' for the words that .* line 2 calls 'happy'",
        ),
        ([LINES[0][:4]], COLUMNS, r"line 2: got 4 cells, expected one for each of the 5"),
        (
            [line[:4] for line in LINES],
            COLUMNS[:4],
            r"columns .*\(without \['text'\]\), expected each of",
        ),
        ([], COLUMNS, r"got 0 lines"),
    ],
)
def test_a_bad_manifest_is_refused_by_line_and_column(
    tmp_path: Path, lines: list[tuple[str, ...]], columns: tuple[str, ...], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        read_items(write(tmp_path / "clips", lines, columns), EMOTIONS)


def test_a_quote_that_is_never_closed_does_not_swallow_the_lines_behind_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "clips", LINES)
    table = folder / "manifest.csv"
    text = table.read_text("utf-8")
    table.write_text(text.replace("s1,Good news.", 's1,"Good news.', 1), "utf-8")
    with pytest.raises(
        InputError, match=r"manifest\.csv: line \d: got unexpected end of data.* Close every quote"
    ):
        read_items(folder, EMOTIONS)
    table.write_text(text.replace("Good news.", '"Good ""news"", he said."'), "utf-8-sig")
    assert read_items(folder, EMOTIONS)[0].text == 'Good "news", he said.'


def test_items_are_named_as_files_can_be(tmp_path: Path) -> None:
    names = ["clip 1 (of 2).wav", "它's.wav", "sub.part-2.wav"]
    lines = [(name, *line[1:]) for name, line in zip(names, LINES, strict=True)]
    items = read_items(write(tmp_path / "clips", lines), EMOTIONS)
    assert [item.name for item in items] == ["clip-1-of-2-", "它-s", "sub.part-2"]
    assert [item.path.name for item in items] == names
    assert all(FILE_NAME_SAFE.fullmatch(f"lens__{item.name}") for item in items)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    lines = [("a.wav", "happy", "sad", "s1", "x"), ("b.wav", "no", "sad", "s1", "y")]
    lines.append(("c.wav", "happy", "sad", "", "z"))
    with pytest.raises(InputError, match=r"2 problems\n.*line 3: .*\n.*line 4: speaker"):
        read_items(write(tmp_path / "clips", lines), EMOTIONS)


def test_a_changed_recording_and_a_damaged_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "clips", [(*LINES[0], "0" * 64)], (*COLUMNS, "sha256"))
    with pytest.raises(InputError, match=r"line 2: sha256: got 0+, expected [0-9a-f]{64}"):
        read_items(folder, EMOTIONS)
    (folder / "a.wav").write_bytes(b"no sound")
    with pytest.raises(InputError, match=r"line 2: path: .*a\.wav"):
        read_items(folder, EMOTIONS)


def test_the_same_recording_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "clips", LINES[:2])
    (folder / "b.wav").write_bytes((folder / "a.wav").read_bytes())
    with pytest.raises(InputError, match=r"line 3: the same recording as .* line 2"):
        read_items(folder, EMOTIONS)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reading .*manifest\.csv: got .*expected a CSV sheet"):
        read_items(tmp_path, EMOTIONS)


def test_clips_that_all_agree_are_refused(tmp_path: Path) -> None:
    items = read_items(write(tmp_path / "clips", [("a.wav", "sad", "sad", "s", "x")]), EMOTIONS)
    with pytest.raises(InputError, match="got 1 clips, in all of which semantic_label is"):
        conflict_items(items)


# --- The bundled set, and pairs


@pytest.fixture(scope="module")
def bundled() -> list[SpokenItem]:
    return read_items(BUNDLED_ITEMS, EMOTIONS)


def test_the_bundled_clips(bundled: list[SpokenItem]) -> None:
    """120 conflicts: every cell of words and voice that disagree, by 6 speakers, of one length."""
    assert len(bundled) == 120
    assert all(item.is_conflict for item in bundled)
    cells = Counter((item.semantic, item.prosody) for item in bundled)
    assert len(cells) == 20
    assert set(cells.values()) == {6}
    assert {item.seconds for item in bundled} == {2.4}
    assert len({item.text for item in bundled}) == 30
    size = sum(path.stat().st_size for path in BUNDLED_ITEMS.iterdir())
    assert size < 2.5e6


def test_pairs_differ_in_one_thing(bundled: list[SpokenItem]) -> None:
    """M-001-4, by brute force over all ordered pairs."""
    for which, same, other in (
        ("semantic", "prosody", "semantic"),
        ("prosody", "semantic", "prosody"),
    ):
        tokens = dict.fromkeys((item.name for item in bundled), 60)
        every = draw_pairs(bundled, which, None, 0, tokens=tokens)
        wanted = {
            (a.name, b.name)
            for a in bundled
            for b in bundled
            if a.speaker == b.speaker
            and getattr(a, same) == getattr(b, same)
            and getattr(a, other) != getattr(b, other)
            and (a.text == b.text) == (which == "prosody")
        }
        assert {(pair.a.name, pair.b.name) for pair in every} == wanted
        assert len(every) == len(wanted) > 100
        assert all(pair.target == getattr(pair.b, other) for pair in every)
        assert len({pair.id for pair in every}) == len(every)


def test_drawn_pairs_are_reversed_spread_and_seeded(bundled: list[SpokenItem]) -> None:
    tokens = dict.fromkeys((item.name for item in bundled), 60)
    drawn = draw_pairs(bundled, "semantic", 60, 0, tokens=tokens)
    ids = {(pair.a.name, pair.b.name) for pair in drawn}
    assert len(ids) == 120
    assert ids == {(b, a) for a, b in ids}
    # Every clip is in one pair before any is in two; 59 at most fit without remainder.
    uses = Counter(pair.a.name for pair in drawn)
    assert max(uses.values()) <= 2
    assert len(uses) >= 110
    again = draw_pairs(bundled, "semantic", 60, 0, tokens=tokens)
    assert [pair.id for pair in again] == [pair.id for pair in drawn]
    other = draw_pairs(bundled, "semantic", 60, 1, tokens=tokens)
    assert {pair.id for pair in other} != {pair.id for pair in drawn}


def test_pairs_of_equal_length_come_first(bundled: list[SpokenItem]) -> None:
    some = bundled[:20]
    tokens: dict[str, Any] = {item.name: i % 2 for i, item in enumerate(some)}
    equal = [
        (a.name, b.name)
        for a, b in itertools.combinations(some, 2)
        if (a.speaker, a.prosody) == (b.speaker, b.prosody)
        and a.semantic != b.semantic
        and tokens[a.name] == tokens[b.name]
    ]
    drawn = draw_pairs(some, "semantic", len(equal), 0, tokens=tokens)
    assert equal
    assert {(p.a.name, p.b.name) for p in drawn} == {*equal, *((b, a) for a, b in equal)}


def spoken(number: int, speaker: str, words: str, voice: str) -> SpokenItem:
    cells = {"semantic_label": words, "prosody_label": voice, "speaker": speaker, "text": words}
    about = {"seconds": 1.0, "sampling_rate": RATE, "channels": 1, "codec": "", "sha256": ""}
    name = f"clip{number}"
    return SpokenItem(name=name, path=Path(name), cells=cells, where=name, **about)


@pytest.mark.parametrize("n", [1, 7, 40, 10_000])
@pytest.mark.parametrize("which", PAIR_TYPES)
def test_the_draw_is_the_greedy_one_over_every_pair(which: PairType, n: int) -> None:
    """Against the definition, which looks at all pairs for every one that it draws."""
    rng = np.random.default_rng(n)
    items = [
        spoken(i, f"s{rng.integers(3)}", rng.choice([*"abc"]), rng.choice([*"xy"]))
        for i in range(40)
    ]
    tokens = {item.name: int(rng.integers(3)) for item in items}
    ranks = np.random.default_rng([5, PAIR_TYPES.index(which)]).permutation(len(items))
    rank = dict(zip([item.name for item in items], ranks.tolist(), strict=True))

    def rest(item: SpokenItem) -> tuple[str, str]:
        return item.speaker, item.prosody if which == "semantic" else item.text

    left = [
        (a, b)
        for a, b in itertools.combinations(items, 2)
        if rest(a) == rest(b) and a.label(which) != b.label(which)
    ]
    used: Counter[str] = Counter()

    def cost(pair: tuple[SpokenItem, SpokenItem]) -> tuple[object, ...]:
        first, second = sorted((used[one.name], rank[one.name]) for one in pair)
        differs = tokens[pair[0].name] != tokens[pair[1].name]
        return differs, second[0], first[0], second[1], first[1]

    wanted = set()
    while left and len(wanted) < n:
        best = min(left, key=cost)
        left.remove(best)
        used.update(one.name for one in best)
        wanted.add((best[0].name, best[1].name))
    drawn = draw_pairs(items, which, n, 5, tokens=tokens)
    assert {(p.a.name, p.b.name) for p in drawn[::2]} == wanted
    assert {(p.b.name, p.a.name) for p in drawn[1::2]} == wanted


@pytest.mark.parametrize("n_items", [1_000, 4_000])
def test_the_draw_looks_at_few_pairs(n_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of looks that depends on the pairs drawn, not on the millions there could be."""
    looks = 0
    ends = items_module._ends

    def counted(*pair: Any) -> Any:
        nonlocal looks
        looks += 1
        return ends(*pair)

    monkeypatch.setattr(items_module, "_ends", counted)
    items = [spoken(i, "s", "abcd"[i % 4], "xy"[i % 2]) for i in range(n_items)]
    drawn = draw_pairs(
        items, "semantic", 60, 0, tokens={item.name: i % 7 for i, item in enumerate(items)}
    )
    assert len(drawn) == 120
    assert looks < 300


def test_a_clip_of_the_same_labels(bundled: list[SpokenItem]) -> None:
    tokens = dict.fromkeys((item.name for item in bundled), 60)
    for item in bundled[:7]:
        like = like_in_labels(bundled, item, 0, tokens=tokens)
        assert like is not None
        assert like is not item
        assert (like.semantic, like.prosody) == (item.semantic, item.prosody)
        # The one of equal length, if only one is.
        equal = next(
            other
            for other in bundled[::-1]
            if (other.semantic, other.prosody) == (item.semantic, item.prosody)
        )
        unequal = dict.fromkeys(tokens, 59) | {item.name: 60, equal.name: 60}
        assert like_in_labels(bundled, item, 0, tokens=unequal) is equal
    assert like_in_labels(bundled[:1], bundled[0], 0, tokens=tokens) is None
