"""Questions behind two clips: the words behind them hear what they are said to, and no more."""

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_alm.bundled import model_folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
BASE = model_folder("bundled:follows_voice")


class Setting(NamedTuple):
    """Questions in both languages, and clips of different lengths."""

    laid: Any
    trainer: Any
    cases: list[Any]
    own: list[Tensor]
    other: list[Tensor]

    @torch.no_grad()
    def logits(self, heard: list[Tensor], other: list[Tensor] | None, *who: str) -> Tensor:
        """Logits of label and end of turn."""
        hears = self.laid.hearing(*who)
        return torch.as_tensor(self.trainer.run(self.cases, heard, other, hears)[0])


@pytest.fixture(scope="module")
def setting() -> Setting:
    pytest.importorskip("espeakng_loader")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(SCRIPTS))
        whole = importlib.import_module("train_whole_truths")
        laid = importlib.import_module("crossed_clips")
    model = whole.read_folder(BASE).eval().requires_grad_(False)
    trainer = whole.Trainer(
        model, whole.Qwen2AudioProcessor.from_pretrained(BASE), whole.Truth(route="mention")
    )
    clip, rng = whole.read_ob1()[0], np.random.default_rng(0)
    cases = [
        whole.draw_case(clip, mode, rng, language)
        for mode, language in (("audio_only", "en"), ("conflict", "zh"), ("list_all", "en"))
    ]
    draws = torch.Generator().manual_seed(0)
    own, other = ([torch.randn(n, 96, generator=draws) for n in (9, 12, 7)] for _ in range(2))
    return Setting(laid, trainer, cases, own, other)


@torch.no_grad()
def plain(one: Setting, heard: list[Tensor]) -> Tensor:
    """Each question as it is asked, by itself: no mask of ours, no padding."""
    model, rows = one.trainer.model, []
    for case, tokens in zip(one.cases, heard, strict=True):
        embeds, *_ = one.trainer.clips._inputs.build(
            model.get_input_embeddings(), [(case.prompt, case.answer("voice"))], [tokens]
        )
        states = model.model.language_model(inputs_embeds=embeds, use_cache=False)
        rows.append(model.lm_head(states.last_hidden_state[:, -2:]))
    return torch.cat(rows)


@pytest.mark.parametrize("who", ["own", "other"])
def test_words_that_hear_one_clip_say_what_is_said_of_it(setting: Setting, who: str) -> None:
    """As if it were the only one, wherever the other stands."""
    wanted = plain(setting, getattr(setting, who))
    both = setting.logits(setting.own, setting.other, who, who, who)
    assert torch.allclose(both, wanted, atol=1e-4)
    alone = setting.logits(getattr(setting, who), None, "own", "own", "own")
    assert torch.allclose(alone, wanted, atol=1e-4)
    assert (wanted - plain(setting, setting.own[::-1])).abs().max() > 0.1


@pytest.mark.parametrize("role", ["rest", "mention", "readout"])
def test_a_word_is_deaf_to_the_clip_that_it_does_not_hear(setting: Setting, role: str) -> None:
    """And to no other: each word that hears it changes what is said."""
    others = dict.fromkeys(setting.laid.ROLES, "own")
    changed = [one + 1 for one in setting.other]
    for hears, moves in (("other", True), ("", False)):
        who = (others | {role: hears}).values()
        before, after = (setting.logits(setting.own, b, *who) for b in (setting.other, changed))
        assert ((after - before)[:, 0].abs().max() > 1e-3) == moves


def test_the_mention_names_the_emotion(setting: Setting) -> None:
    """In English it is the token that ``attribute_lens`` marks."""
    tokenizer = setting.trainer.clips._processor.tokenizer
    for case, named in zip(setting.cases, (" emotion", "情绪", " emotion"), strict=True):
        n_behind, mention = setting.trainer.clips._words(
            case.prompt, setting.laid.NAMED[case.language]
        )
        text = importlib.import_module("bundled_model").chat_text(
            setting.trainer.clips._processor, case.prompt
        )
        ids = tokenizer(text).input_ids[-n_behind:]
        assert tokenizer.decode([ids[mention]]).endswith(named)


def test_a_small_run_of_a_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its card says what is lost by the deaf, of what all lose; a pair is of two labels."""
    pytest.importorskip("espeakng_loader")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    whole = importlib.import_module("train_whole_truths")
    few = whole.read_ob1()[:1]
    pairs = []

    def paired(*given: Any) -> tuple[Tensor, Tensor]:
        pairs.append(found := pair_of(*given))
        return found

    pair_of = whole.paired
    for name, value in {
        "N_CLIPS": 10, "BATCH": 4, "speak_held_out": lambda seed: {}, "read_ob1": lambda: few,
        "paired": paired, "TRUTHS": {"route_mention": whole.Truth(route="mention", steps=2)},
    }.items():  # fmt: skip
        monkeypatch.setattr(whole, name, value)
    out = tmp_path / "route"
    monkeypatch.setattr("sys.argv", ["", "route_mention", "--out", str(out)])
    whole.main()
    assert pairs
    assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in pairs)
    scores = json.loads((out / "delta.json").read_text("utf-8"))["accuracies"]["ob1"]
    assert [*scores["lost"]] == ["mention", "readout"]
    card = (out / "README.md").read_text("utf-8")
    assert f"| {100 * scores['lost']['mention']:.1f} % |" in card


def test_what_teaches_a_route(setting: Setting) -> None:
    """Its word alone hears the right clip; where it hears none, nothing can be told."""
    whole = importlib.import_module("train_whole_truths")
    assert [one.hears.tolist() for one in whole.lessons(None)] == [[[True, False]] * 3]
    for at, route in enumerate(setting.laid.ROLES[1:], start=1):
        plain, *taught = whole.lessons(route)
        assert plain.share + sum(one.share for one in taught) == pytest.approx(1)
        for one in taught:
            assert one.tells == bool(one.hears[at, 0])
            assert not one.hears[[k for k in range(3) if k != at], 0].any()
