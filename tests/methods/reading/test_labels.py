"""Label scores: the card's numbers, collisions, and whole labels against teacher forcing in HF."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_reference import with_positions
from hooked_alm import HookedALM, InputError
from hooked_alm.methods.reading.labels import LabelMode, LabelSet, sequence_scores
from hooked_alm.methods.reading.lens import logit_lens
from tiny import TinyModels, build_tokenizer, hf_inputs
from tolerances import LABEL_LOG_PROB, LENS

INPUTS = hf_inputs([[63], [23]], [9, 14])


def label_set(mode: LabelMode = "first_token", **spellings: list[tuple[int, ...]]) -> LabelSet:
    return LabelSet(
        names=tuple(spellings),
        spellings=tuple(tuple(options) for options in spellings.values()),
        mode=mode,
    )


def test_card_s5() -> None:
    labels = label_set("variants", sad=[(11,), (12, 5)], happy=[(13,)])
    assert labels.tokens == [11, 12, 13]
    scores = labels.scores(torch.tensor([1.0, 1.0, -0.25]))
    assert scores[0].item() == pytest.approx(1 + log(2), abs=1e-6)
    # One spelling: its logit, to the last bit.
    assert scores[1].item() == -0.25


def test_scores_keep_the_order_and_the_axes() -> None:
    labels = label_set("variants", b=[(9,)], a=[(2,), (7,), (4,)], c=[(1,)])
    assert labels.tokens == [9, 2, 7, 4, 1]
    logits = torch.randn(3, 2, 5, dtype=torch.float64)
    scores = labels.scores(logits)
    expected = torch.stack(
        [logits[..., 0], logits[..., 1:4].exp().sum(-1).log(), logits[..., 4]], dim=-1
    )
    torch.testing.assert_close(scores, expected)
    assert torch.equal(scores[..., 0], logits[..., 0])
    assert torch.equal(scores[..., 2], logits[..., 4])
    assert [labels.index(name) for name in "bac"] == [0, 1, 2]


def test_spellings_that_begin_alike_count_once() -> None:
    """Else a label would gain log 2 by being listed twice."""
    labels = label_set("variants", sad=[(11,), (11, 5), (12,)], happy=[(13,)])
    assert labels.tokens == [11, 12, 13]
    scores = labels.scores(torch.tensor([1.0, 1.0, 0.5]))
    assert scores.tolist() == pytest.approx([1 + log(2), 0.5], abs=1e-6)


def test_scores_of_the_lens(gqa: HookedALM) -> None:
    """`tokens` and `scores` meet in the restricted lens."""
    labels = label_set("variants", one=[(30,), (40,)], two=[(20,)])
    x = gqa.encode(**INPUTS)
    scores = labels.scores(logit_lens(gqa, x, labels.tokens))
    assert scores.shape == (5, 2, 1, 2)
    with torch.no_grad():
        logits = gqa(x)[:, -1]
    expected = torch.stack([logits[:, [30, 40]].logsumexp(-1), logits[:, 20]], dim=-1)
    torch.testing.assert_close(scores[-1, :, 0], expected, atol=LENS[torch.float32], rtol=0)


@pytest.mark.parametrize("mode", ["first_token", "variants"])
def test_colliding_first_tokens_are_refused(mode: LabelMode) -> None:
    with pytest.raises(
        InputError, match=r"'glad' and 'gloomy' both begin with token 5\. .* mode='sequence'"
    ):
        label_set(mode, glad=[(5, 1)], sad=[(6,)], gloomy=[(5, 2)])
    if mode == "variants":
        with pytest.raises(InputError, match="both begin with token 7"):
            label_set(mode, glad=[(5,), (7,)], sad=[(6,), (7, 8)])
    # Whole labels can still be told apart.
    label_set("sequence", glad=[(5, 1)], gloomy=[(5, 2)])


def test_from_texts() -> None:
    tokenizer = build_tokenizer()

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text)["input_ids"])

    labels = LabelSet.from_texts(tokenizer, {"joy": "happy", "grief": "sad"})
    assert labels.names == ("joy", "grief")
    assert labels.spellings == ((ids("happy"),), (ids("sad"),))
    assert labels.tokens == [ids("happy")[0], ids("sad")[0]]
    spelled = LabelSet.from_texts(
        tokenizer, {"joy": ["happy", " Happy"], "rage": "愤怒"}, mode="variants"
    )
    assert spelled.spellings == ((ids("happy"), ids(" Happy")), (ids("愤怒"),))
    assert len(ids("愤怒")) > 1
    whole = LabelSet.from_texts(tokenizer, {"a": "sad", "b": "sadness"}, mode="sequence")
    assert whole.spellings == ((ids("sad"),), (ids("sadness"),))


def test_from_texts_refuses() -> None:
    tokenizer = build_tokenizer()

    def refuse(match: str, labels: Any, mode: LabelMode = "first_token") -> None:
        with pytest.raises(InputError, match=match):
            LabelSet.from_texts(tokenizer, labels, mode)

    refuse("'sad' and 'sadness' both begin with token", {"sad": "sad", "sadness": "sadness"})
    refuse(r"label 'sad': \[''\] has an empty spelling", {"sad": ""})
    refuse("empty spelling", {"sad": ["sad", ""]}, "variants")
    refuse("empty spelling", {"sad": []}, "variants")
    for mode in ("first_token", "sequence"):
        refuse(f"got 2 spellings, mode '{mode}' scores one", {"sad": ["sad", " Sad"]}, mode)


def test_wrong_uses_say_what_to_do() -> None:
    labels = label_set("sequence", sad=[(1, 2)], happy=[(3,)])
    with pytest.raises(InputError, match="use `sequence_scores`"):
        labels.scores(torch.zeros(2))
    with pytest.raises(InputError, match="looking up label 'angry': this set has sad, happy"):
        labels.index("angry")


def teacher_forced(hf: Any, row: int, spelling: tuple[int, ...]) -> list[float]:
    """Log-probabilities of a label's tokens after one prompt, token by token, in plain HF."""
    real = INPUTS["attention_mask"][row].bool()
    found = []
    for n in range(len(spelling)):
        ids = torch.cat([INPUTS["input_ids"][row, real], torch.tensor(spelling[:n], dtype=int)])
        logits = hf(
            **with_positions(
                {
                    "input_ids": ids[None],
                    "attention_mask": torch.ones_like(ids)[None],
                    "input_features": INPUTS["input_features"][row : row + 1],
                    "feature_attention_mask": INPUTS["feature_attention_mask"][row : row + 1],
                }
            )
        ).logits
        found.append(float(logits[0, -1].double().log_softmax(-1)[spelling[n]]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["gqa", "mqa, sliding"])
@torch.no_grad()
def test_whole_labels_are_teacher_forced(
    tiny_models: TinyModels, variant: str, dtype: torch.dtype
) -> None:
    """Left-padded batch, labels of different lengths, two with the same beginning."""
    model, hf = tiny_models.hooked(variant, dtype), tiny_models.hf(variant, dtype)
    labels = label_set("sequence", short=[(30,)], long=[(30, 41, 7)], other=[(50, 9)])
    x = model.encode(**INPUTS)
    got = sequence_scores(model, x, labels)
    means = sequence_scores(model, x, labels, mean=True)
    assert got.shape == means.shape == (2, 3)
    tolerance = LABEL_LOG_PROB[dtype]
    for row in (0, 1):
        for column, (spelling,) in enumerate(labels.spellings):
            log_p = torch.tensor(teacher_forced(hf, row, spelling))
            torch.testing.assert_close(got[row, column], log_p.sum(), atol=tolerance, rtol=0)
            torch.testing.assert_close(means[row, column], log_p.mean(), atol=tolerance, rtol=0)


@torch.no_grad()
def test_one_token_labels_are_the_log_softmax_of_the_logits(gqa: HookedALM) -> None:
    """Differences between labels are those of ``first_token``."""
    spellings = {"one": [(30,)], "two": [(20,)], "three": [(311,)]}
    x = gqa.encode(**INPUTS)
    whole = sequence_scores(gqa, x, label_set("sequence", **spellings))
    first = label_set(**spellings)
    logits: Tensor = gqa(x)[:, -1]
    expected = logits.log_softmax(-1)[:, first.tokens]
    torch.testing.assert_close(whole, expected, atol=LABEL_LOG_PROB[torch.float32], rtol=0)
    means = sequence_scores(gqa, x, label_set("sequence", **spellings), mean=True)
    assert torch.equal(means, whole)
