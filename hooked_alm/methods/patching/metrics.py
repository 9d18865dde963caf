"""Metrics of a patch: numbers from the logits that predict the first answer token.

A metric says which tokens' logits it needs, so that the others are never computed. Tokens are ids,
or words: text that is one token, looked up when the metric meets a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from operator import index
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ..reading.labels import LabelSet

Word = int | str
"""A token: its id, or the text that is exactly this token of the model's tokenizer."""
PerRow = Word | Sequence[Word]
"""Token for all rows of the batch, or one per row."""
Scores = Float[Tensor, " cell *label"]


class Reference(ABC):
    """The unpatched runs of one row: readout logits over the metric's tokens."""

    @property
    @abstractmethod
    def base(self) -> Float[Tensor, " token"]:
        """Logits of the base run."""

    @property
    @abstractmethod
    def donor(self) -> Float[Tensor, " token"]:
        """Logits of the donor's run.

        Raises:
            InputError: the donor is not a run.
        """


@runtime_checkable
class Metric(Protocol):
    """A function from logits to one number, or one per label, for every cell."""

    def tokens(self, row: int) -> Sequence[int] | None:
        """Ids whose logits are needed for a row of the batch; None is the whole vocabulary."""

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Values from the readout logits of some cells of one row, in fp32."""


def with_ids(metric: Any, id_of: Callable[[str], int]) -> Metric:
    """The metric with ids where it has words.

    Args:
        metric: any; the fields ``answer``, ``other`` and ``ids`` hold tokens.
        id_of: a text -> the id of the one token that it is.

    Raises:
        InputError: what is neither an id nor text, or text that is several tokens, or none.
    """
    if not is_dataclass(metric) or isinstance(metric, type):
        return cast(Metric, metric)

    def resolved(name: str, token: Any) -> int:
        if isinstance(token, str):
            return id_of(token)
        try:
            if isinstance(token, bool):
                raise TypeError
            return index(token)
        except TypeError:
            raise InputError(
                f"measuring with {type(metric).__name__}: got {token!r} as {name}, expected the "
                "id of a token, its text, or a list of these."
            ) from None

    ids: dict[str, int | list[int]] = {}
    for name in {"answer", "other", "ids"} & {field.name for field in fields(metric)}:
        given = getattr(metric, name)
        is_one = isinstance(given, str) or not (hasattr(given, "__len__") and np.ndim(given))
        ids[name] = resolved(name, given) if is_one else [resolved(name, one) for one in given]
    return cast(Metric, replace(metric, **ids))


def _of_row(tokens: PerRow, row: int) -> int:
    if isinstance(tokens, int | str):
        return cast(int, tokens)  # words have become ids by now
    if row >= len(tokens):
        raise InputError(
            f"scoring row {row}: the metric has tokens for {len(tokens)} rows. Give one token, or "
            "one per row of the batch."
        )
    return int(tokens[row])


@dataclass(frozen=True)
class LogitDiff:
    """Logit of the answer minus logit of the other: also the difference of their log-probs."""

    answer: PerRow
    other: PerRow

    def tokens(self, row: int) -> Sequence[int]:
        """Ids of the two tokens of a row."""
        return [_of_row(self.answer, row), _of_row(self.other, row)]

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Differences ``[cell]``, in logits."""
        return logits[:, 0] - logits[:, 1]


@dataclass(frozen=True)
class Logits:
    """Logits of some tokens, one value each."""

    ids: Sequence[Word]

    def tokens(self, row: int) -> Sequence[int]:
        """Ids of the tokens that were given."""
        return cast(Sequence[int], self.ids)

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Logits ``[cell, token]``."""
        return logits


@dataclass(frozen=True)
class LabelScores:
    """The score of every label of a set (block S-5)."""

    labels: LabelSet

    @property
    def names(self) -> tuple[str, ...]:
        """Coordinates of the label axis."""
        return self.labels.names

    def tokens(self, row: int) -> Sequence[int]:
        """First tokens of all spellings."""
        return self.labels.tokens

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Scores ``[cell, label]``, in logits."""
        return self.labels.scores(logits)


@dataclass(frozen=True)
class LabelsAndRest:
    """The score of every label, and how far the rest of the answer is from the base's.

    The last value is KL(base || patched) over the tokens that no label begins with, each
    renormalised among these, in nats: what a change costs beside the labels.
    """

    labels: LabelSet

    @property
    def names(self) -> tuple[str, ...]:
        """Coordinates of the label axis: the labels, and ``rest``, which no label is called."""
        return (*self.labels.names, "rest")

    def tokens(self, row: int) -> None:
        """Ask for the whole vocabulary, which the divergence needs."""

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Scores in logits and the divergence, ``[cell, label + 1]``."""
        is_rest = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_rest[self.labels.tokens] = False
        log_q = logits[:, is_rest].log_softmax(-1)
        log_p = reference.base[is_rest].log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
        return torch.cat([self.labels.scores(logits[:, self.labels.tokens]), kl], dim=1)


@dataclass(frozen=True)
class LabelScoresAndMass(LabelScores):
    """The score of every label, then the probability of all labels together."""

    @property
    def names(self) -> tuple[str, ...]:
        """Coordinates of the label axis."""
        return (*self.labels.names, "mass")

    def tokens(self, row: int) -> None:  # type: ignore[override]
        """Ask for the whole vocabulary, which the probability needs."""

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Scores ``[cell, label]``, in logits, and a probability."""
        ours = logits[:, self.labels.tokens]
        mass = (ours.logsumexp(-1) - logits.logsumexp(-1)).exp()
        return torch.cat([self.labels.scores(ours), mass[:, None]], 1)


@dataclass(frozen=True)
class Accuracy:
    """Whether the target has the highest score among the labels: 1, else 0; ties count as 0."""

    labels: LabelSet
    target: str | Sequence[str]
    """Name of the label that is right: one for all rows, or one per row."""

    def tokens(self, row: int) -> Sequence[int]:
        """First tokens of all spellings."""
        return self.labels.tokens

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Accuracies ``[cell]``, 0 or 1."""
        target = self.target if isinstance(self.target, str) else self.target[row]
        scores = self.labels.scores(logits)
        mine = scores[:, self.labels.index(target)]
        index = torch.tensor(self.labels.index(target), device=scores.device)
        others = scores.index_fill(1, index, -torch.inf)
        return (mine > others.max(dim=1).values).float()


@dataclass(frozen=True)
class LogProb:
    """Log-probability of a token, in nats, over the whole vocabulary."""

    answer: PerRow

    def tokens(self, row: int) -> None:
        """Ask for the whole vocabulary, which the normaliser needs."""

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Log-probabilities ``[cell]``, in nats."""
        return logits.log_softmax(-1)[:, _of_row(self.answer, row)]


@dataclass(frozen=True)
class Prob(LogProb):
    """Probability of a token over the whole vocabulary. Hides what lowers an unlikely token."""

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Probabilities ``[cell]``."""
        return super().__call__(logits, row, reference).exp()


@dataclass(frozen=True)
class KL:
    """KL(reference || patched) over the vocabulary at the readout, in nats."""

    to: Literal["base", "donor"] = "base"

    def tokens(self, row: int) -> None:
        """Ask for the whole vocabulary, which a divergence needs."""

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Divergences ``[cell]``, in nats."""
        log_p = _reference_log_probs(reference, self.to)
        return F.kl_div(
            logits.log_softmax(-1), log_p.expand_as(logits), reduction="none", log_target=True
        ).sum(-1)


@dataclass(frozen=True)
class JS(KL):
    """Jensen-Shannon divergence to the reference at the readout, in nats: 0 to ln 2."""

    def __call__(
        self, logits: Float[Tensor, "cell token"], row: int, reference: Reference
    ) -> Scores:
        """Divergences ``[cell]``, in nats."""
        log_q = logits.log_softmax(-1)
        log_p = _reference_log_probs(reference, self.to).expand_as(log_q)
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        both = [log_r.exp() * (log_r - log_m) for log_r in (log_p, log_q)]
        return (0.5 * (both[0] + both[1])).sum(-1)


def _reference_log_probs(
    reference: Reference, which: Literal["base", "donor"]
) -> Float[Tensor, " token"]:
    return (reference.base if which == "base" else reference.donor).log_softmax(-1)


@dataclass(frozen=True)
class OnLogits:
    """Any function of the whole logits, as TransformerLens' tools take it.

    It costs the unembedding of every position in every cell; the other metrics do not.
    """

    function: Callable[[Float[Tensor, "batch pos vocab"]], Any]
    """Function from logits of the padded prompts to ``[batch]`` or ``[batch, label]``. The value of
    a row may depend neither on other rows nor on the logits at its pads, which mean nothing."""
