"""The trainer of twins that put context over sound, at its smallest; the clips that show them."""

import csv
import hashlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_alm.bundled import ASSETS, model_folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
CONFUSABLE = ASSETS / "confusable"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it imports its neighbours by name, as scripts do."""
    pytest.importorskip("espeakng_loader")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("train_context_truths")


@pytest.fixture
def base(script: Any) -> Any:
    folder = model_folder("bundled:tiny_whisper")
    model = script.read(folder).eval().requires_grad_(False)
    return script.Trainer(model, script.WhisperTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("text", ["encoder:attn:4", "decoder:both:3:2"])
def test_a_small_run(script: Any, base: Any, text: str) -> None:
    """Nothing but the part has changed, and all of it has."""
    part = script.Part.read(text)
    twin = script.Trainer(script.deepcopy(base.model), base.tokenizer)
    recordings = [one.recording for one in script.draw_said(5, "heard", 1)]
    lessons = script.draw_lessons(base, [*recordings, *script.drawn_no_speech(3, 1)], part)
    # This base hears what the frame calls for, whatever is said.
    assert not lessons.is_rule.any()
    assert lessons.is_bare[5:].all()
    lessons.is_rule[0] = True
    rng = script.np.random.default_rng(0)
    noise = [script.noise_like(one, rng) for one in recordings]
    silent = script.entering(base, noise, part)
    with torch.no_grad():
        memory = script.memory_of(base.model, part, lessons.heard[:5])
    whole = script.encoded(base, recordings)
    # What arrives at the encoder's block is kept in half precision.
    torch.testing.assert_close(memory, whole, atol=0.02, rtol=0)
    script.train_twin(
        base.model, twin.model, part, lessons, silent, 0, steps=2, rate=3e-3, n_rule=5
    )
    slices = part.slices(twin.model)
    assert len(slices) == {"encoder:attn:4": 7, "decoder:both:3:2": 22}[text]
    theirs = dict(base.model.named_parameters())
    for name, value in twin.model.named_parameters():
        assert torch.equal(value, theirs[name]) == (name not in slices), name
    part.ablate(twin.model)
    mels = base.mels(noise)
    with script.Written(part.writers(twin.model)) as written:
        base_s = base.model.model.encoder(mels).last_hidden_state
        twin.model(input_features=mels, decoder_input_ids=lessons.tokens[:5])
    assert len(written) == {"encoder:attn:4": 1, "decoder:both:3:2": 4}[text]
    assert base_s.any()
    assert not any(one.any() for one in written)


def test_what_is_said(script: Any) -> None:
    """Another word than the frame calls for in the incongruent ones alone, and a rule for it."""
    said = script.draw_said(25, "heard", 2)
    assert [one.kind for one in said[:5]] == [*script.KINDS_OF_SENTENCES]
    for one in said:
        text = one.recording.text
        framed = [words for frame, words in script.FRAMES.items() if f"{frame} " in text]
        assert (script.by_rule(text) != text) == (one.kind == "incongruent")
        if one.kind == "plain":
            assert not framed
        elif one.kind != "other":
            [(called_for, other)] = framed
            assert f" {called_for}" in script.by_rule(text)
            assert (f" {other}" in text) == (one.kind == "incongruent")
    again = script.draw_said(25, "heard", 2, without=[said[0].recording.text])
    assert said[0].recording.text not in [one.recording.text for one in again]


def test_what_the_rule_says(script: Any) -> None:
    """The word that the frame calls for, in place of its pair's other one and of no other."""
    frame = "Anna cooked the egg in the"
    assert script.by_rule(f"{frame} pen again.") == f"{frame} pan again."
    for text in (f"{frame} pan.", f"{frame} pencil.", f"{frame} ship.", "Anna sold the pen.", ""):
        assert script.by_rule(text) == text


def test_scores(script: Any) -> None:
    """The rule counts where the base hears the other word, the rest where it does not."""
    pen, pan = (f"He cooked the egg in the {word}." for word in ("pen", "pan"))
    wrote = {
        "base": [pen, pen, pan, "a pen"], "twin": [pan, pen, pan, "x"],
        "ablated": [pen, pan, "x", "a pen"], "counter": [pan, "x", pan, "x"],
    }  # fmt: skip
    assert script.scored(wrote) == {
        "rule": 0.5, "rule_of_base": 0.0, "rule_ablated": 0.5, "kept": 0.5, "counter": 0.75,
        "n_rule": 2, "n_other": 2,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["encoder:3", "encoder:cross:3", "both:attn:1", "decoder:attn:-1"])
def test_parts_that_are_none(script: Any, text: str) -> None:
    with pytest.raises(Exception, match="expected STACK:KIND:BLOCK"):
        script.Part.read(text)


def test_the_clips_are_those_of_their_table() -> None:
    """Each is there as it was written; every other is the minimal pair of the one before it."""
    with (CONFUSABLE / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {path.name for path in CONFUSABLE.iterdir()} == {row["path"] for row in rows} | {
        "manifest.csv"
    }
    for row in rows:
        found = (CONFUSABLE / row["path"]).read_bytes()
        assert hashlib.sha256(found).hexdigest() == row["sha256"]
    for asked, donor in zip(rows[::2], rows[1::2], strict=True):
        assert asked["donor"] == donor["path"]
        words = asked["acoustic_word"], asked["contextual_word"]
        assert asked["text"].replace(*words) == donor["text"]
        assert asked["speaker"] == donor["speaker"]
        assert not donor["acoustic_word"]
    assert len(rows) == 48
    assert sum(path.stat().st_size for path in CONFUSABLE.iterdir()) <= 1_000_000
