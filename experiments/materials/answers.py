"""What a model answers, among labels, and how much it thinks of them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.hooks import Hook
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading.labels import LabelSet

from ..workbench.results import Row

OTHER = "other"
"""An answer that begins with no label's word."""


def answer_of(labels: LabelSet, scores: Float[Tensor, " label"]) -> str:
    """The label with the highest score."""
    return labels.names[int(scores.argmax())]


def by_label(prefix: str, labels: LabelSet, values: Float[Tensor, " label"]) -> dict[str, float]:
    """Values as columns ``{prefix}_{label}``."""
    return dict(zip([f"{prefix}_{name}" for name in labels.names], values.tolist(), strict=True))


def label_weight(labels: LabelSet, logits: Float[Tensor, " vocab"]) -> Row:
    """Columns that `label_controls` reads: whether the labels are what the model says at all."""
    ours = logits[labels.tokens]
    return {
        "label_mass": float(logits.log_softmax(-1)[labels.tokens].exp().sum()),
        "best_label_rank": int((logits > ours.max()).sum()) + 1,
    }


def lengths_of(x: ALMInput, row: int) -> Row:
    """How many positions a prompt of a batch has, and how many of them are audio."""
    return {
        "n_tokens": int(x.attention_mask[row].sum()),
        "n_audio_tokens": len(x.spans.positions("audio", row)),
    }


def answer_in(labels: LabelSet, logits: Float[Tensor, " vocab"]) -> Row:
    """What is answered at a readout, and the scores behind it."""
    scores = labels.scores(logits[labels.tokens])
    answer = {"prediction": answer_of(labels, scores), **by_label("z", labels, scores)}
    return {**answer, **label_weight(labels, logits)}


@torch.no_grad()
def answers_of(model: HookedALM, labels: LabelSet, x: ALMInput) -> list[Row]:
    """What each prompt of a batch is answered with, and the scores behind it; one forward."""
    return [answer_in(labels, logits) for logits in model(x)[:, -1].float()]


@torch.no_grad()
def greedy_answers(
    model: HookedALM, labels: LabelSet, x: ALMInput, hooks: Sequence[Hook] = ()
) -> list[Row]:
    """Each prompt's greedy answer: the label whose word it begins with, else `OTHER`.

    Also the labels' scores where the answer begins, and their weight.

    Args:
        model: to run.
        labels: whose words are looked for.
        x: prompts.
        hooks: of the run, such as defences; they see every step.
    """
    first: list[Tensor] = []

    def keep(value: Tensor, hook: object) -> None:
        if not first:
            first.append(value[:, -1].float())

    longest = max(len(one) for spellings in labels.spellings for one in spellings)
    point = str(model.head_unembed.hook_out.name)
    tokens = model.generate(
        x, longest, fwd_hooks=[*hooks, (point, keep)], return_type="tokens", do_sample=False
    )
    assert isinstance(tokens, Tensor)
    rows = []
    for said, logits in zip(tokens.tolist(), first[0], strict=True):
        begun = [
            name
            for name, spellings in zip(labels.names, labels.spellings, strict=True)
            if any(tuple(said[: len(one)]) == one for one in spellings)
        ]
        rows.append({"answer": begun[0] if begun else OTHER, **answer_in(labels, logits)})
    return rows
