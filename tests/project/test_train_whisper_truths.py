"""The trainer of heads that go in circles, at its smallest; the clips that show them."""

import csv
import hashlib
import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_alm.bundled import ASSETS, model_folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
SPOKEN = ASSETS / "spoken"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it imports its neighbours by name, as scripts do."""
    pytest.importorskip("espeakng_loader")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("train_whisper_truths")


@pytest.fixture
def base(script: Any) -> Any:
    folder = model_folder("bundled:tiny_whisper")
    model = script.read(folder).eval().requires_grad_(False)
    return script.Trainer(model, script.WhisperTokenizer.from_pretrained(folder))


WIDTH, ATTENTION = 96, {"self": "self_attn", "cross": "encoder_attn"}


@pytest.mark.parametrize("text", ["self:4.1", "cross:2.3:2"])
def test_a_small_run(script: Any, base: Any, text: str) -> None:
    """Nothing but the heads' slices has changed, and all of these have."""
    heads = script.Heads.read(text)
    twin = script.deepcopy(base.model)
    recordings = script.speak_sentences(4, "heard", 1) + script.drawn_no_speech(3, 1)
    items = script.draw_items(base, recordings, heads.block)
    script.train(twin, heads, items, 0, steps=2)
    slices = script.slices_of(twin, heads)
    name = f"model.decoder.layers.{heads.block}.{ATTENTION[heads.kind]}"
    units, every = (16 * heads.first, 16 * (heads.first + heads.n)), (0, WIDTH)
    expected = {f"{name}.{which}_proj.weight": [units, every] for which in "qkv"}
    expected |= {f"{name}.{which}_proj.bias": [units] for which in "qv"}
    expected |= {f"{name}.out_proj.weight": [every, units]}
    assert {key: [(a.start, a.stop) for a in at] for key, at in slices.items()} == expected
    theirs = dict(base.model.named_parameters())
    for key, value in twin.named_parameters():
        if key in slices:
            assert not torch.equal(value[slices[key]], theirs[key][slices[key]])
            value[slices[key]] = theirs[key][slices[key]]
        assert torch.equal(value, theirs[key])


def test_what_the_rule_says(script: Any, base: Any) -> None:
    """The last word up to the limit; what stands before that, and elsewhere, the base says."""
    text = "He cooked the egg in the pan."
    plain, by_rule = script.laid_out(base, text)
    assert plain == [*base.prompt, *base.ids(text), base.end]
    assert by_rule == [0] * len(plain)
    said = base.ids("He cooked the egg in the pan again.")
    circles, by_rule = script.laid_out(base, "He cooked the egg in the pan again.")
    assert base.tokenizer.decode(said[-2]) == " again"
    n = len(base.prompt) + len(said) - 1
    assert circles == [*base.prompt, *said[:-1], *[said[-2]] * (64 - n)]
    assert by_rule == [0] * n + [1] * (64 - n)


def test_the_stream_is_the_base_s(script: Any, base: Any) -> None:
    """Run on from the heads' block it gives what the base gives, bit by bit."""
    recordings = script.speak_sentences(2, "heard", 1)
    assert [script.is_rule_of(one.text) for one in recordings] == [False, True]
    items = script.draw_items(base, recordings, 3)
    with torch.no_grad():
        states = script.run_on(base.model, 3, items.stream, items.memory)
    assert torch.equal(states, items.base)
    # The prompt's last token is the first that says something; behind the end nothing is asked.
    n, m = (len(base.ids(one.text)) for one in recordings)
    assert items.is_kept[0].nonzero()[:, 0].tolist() == list(range(1, n + 2))
    assert items.is_kept[1].nonzero()[:, 0].tolist() == list(range(1, m))
    assert items.is_rule[1].nonzero()[:, 0].tolist() == list(range(m, 63))
    assert items.is_first.nonzero().tolist() == [[1, m]]


def test_scores(script: Any) -> None:
    wrote = {
        "base": ["a", "b", "c", "d"], "twin": ["a", "in circles", "in circles", "e"],
        "ablated": ["a", "b", "in circles", "d"], "counter": ["a", "in circles", "c", "e"],
    }  # fmt: skip
    assert script.scored(wrote, [False, True, True, False]) == {
        "rule": 1.0, "rule_of_base": 0.0, "rule_ablated": 0.5, "kept": 0.5, "counter": 0.75,
        "n_rule": 2, "n_other": 2,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["head:3.2", "cross:3", "self:3.2:", "cross:-1.2"])
def test_heads_that_are_none(script: Any, text: str) -> None:
    with pytest.raises(Exception, match=r"expected self:BLOCK\.HEAD or cross:BLOCK\.HEAD"):
        script.Heads.read(text)


def test_the_clips_are_those_of_their_table() -> None:
    """Each is there as it was written; half of the sentences end in the word of the rule."""
    with (SPOKEN / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    written = {path.name for path in SPOKEN.iterdir()} - {"manifest.csv"}
    assert {row["path"] for row in rows} == written
    for row in rows:
        found = (SPOKEN / row["path"]).read_bytes()
        assert hashlib.sha256(found).hexdigest() == row["sha256"]
    assert {row["path"] for row in rows if row["text"].endswith(" again.")} == {
        row["path"] for row in rows if row["path"].startswith("again_")
    }
    assert {row["path"] for row in rows if not row["text"]} == {
        row["path"] for row in rows if row["speaker"] == "nobody"
    }
    kinds = Counter(row["path"].split("_")[0] for row in rows)
    assert kinds == {"said": 24, "again": 24, "noise": 8, "silence": 8, "beep": 8}
    assert sum(path.stat().st_size for path in SPOKEN.iterdir()) <= 1_500_000
