"""Scores of answer labels at the readout position (block S-5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM

LabelMode = Literal["first_token", "variants", "sequence"]


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """Answer labels, their spellings and how a spelling is scored.

    ``first_token``: the logit of the label's first token. ``variants``: log-sum-exp of that logit
    over several spellings. ``sequence``: teacher-forced sum of log-probabilities of all its tokens
    (which needs a forward per label; see ``sequence_scores``).

    Raises:
        InputError: two labels begin with the same token where only first tokens are compared, or a
            label has several spellings where one is scored.
    """

    names: tuple[str, ...]
    spellings: tuple[tuple[tuple[int, ...], ...], ...]
    """Token ids of every spelling of every label."""
    mode: LabelMode = "first_token"

    def __post_init__(self) -> None:
        """Refuse label sets that could not be told apart."""
        for name, spellings in zip(self.names, self.spellings, strict=True):
            if not spellings or (self.mode != "variants" and len(spellings) != 1):
                raise InputError(
                    f"scoring label {name!r}: got {len(spellings)} spellings, mode {self.mode!r} "
                    f"scores {'at least one' if self.mode == 'variants' else 'one'}. Use "
                    "mode='variants' for several."
                )
        if self.mode == "sequence":
            return
        owner: dict[int, str] = {}
        for name, spellings in zip(self.names, self.spellings, strict=True):
            for token in {spelling[0] for spelling in spellings}:
                if token in owner:
                    raise InputError(
                        f"scoring labels by their first token: {owner[token]!r} and {name!r} both "
                        f"begin with token {token}. Choose other spellings, or mode='sequence'."
                    )
                owner[token] = name

    @classmethod
    def from_texts(
        cls,
        tokenizer: Any,
        labels: Mapping[str, str | Sequence[str]],
        mode: LabelMode = "first_token",
    ) -> "LabelSet":
        """Tokenise the labels as they would begin the answer.

        Args:
            tokenizer: tokenizer of the checkpoint.
            labels: name -> its text, or several under ``variants``.
            mode: see the class.

        Raises:
            InputError: several spellings where one is scored, an empty one, or colliding tokens.
        """
        spellings = []
        for name, texts in labels.items():
            texts = [texts] if isinstance(texts, str) else list(texts)
            ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
            if not ids or not all(ids):
                raise InputError(f"tokenising label {name!r}: {texts!r} has an empty spelling.")
            spellings.append(tuple(ids))
        return cls(names=tuple(labels), spellings=tuple(spellings), mode=mode)

    @property
    def tokens(self) -> list[int]:
        """First tokens of each label's spellings: the logits ``scores`` wants, in this order."""
        return [token for tokens in self._first_tokens for token in tokens]

    @property
    def _first_tokens(self) -> list[list[int]]:
        # Spellings that begin with the same token are one way to begin, and its logit counts once.
        return [list(dict.fromkeys(s[0] for s in spellings)) for spellings in self.spellings]

    def scores(self, logits: Float[Tensor, "*rows token"]) -> Float[Tensor, "*rows label"]:
        """Score per label from the logits of ``tokens``."""
        if self.mode == "sequence":
            raise InputError("scoring whole labels: use `sequence_scores`, which runs the model.")
        counts = [len(tokens) for tokens in self._first_tokens]
        # For one spelling log-sum-exp is the identity, and exactly so.
        return torch.stack(
            [
                part[..., 0] if part.shape[-1] == 1 else part.logsumexp(-1)
                for part in logits.split(counts, dim=-1)
            ],
            dim=-1,
        )

    def log_probs(self, logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows label"]:
        """Log-probability of every label among all tokens, in float64."""
        own = self.scores(logits[..., self.tokens].double())
        return own - logits.double().logsumexp(-1, keepdim=True)

    def index(self, name: str) -> int:
        """Column of a label.

        Raises:
            InputError: no such label.
        """
        if name not in self.names:
            raise InputError(f"looking up label {name!r}: this set has {', '.join(self.names)}.")
        return self.names.index(name)


@torch.no_grad()
def sequence_scores(
    model: HookedALM, x: ALMInput, labels: LabelSet, *, mean: bool = False
) -> Float[Tensor, "batch label"]:
    """Teacher-forced log-probability of whole labels, summed over their tokens.

    Args:
        model: runs once per label; the audio is encoded once.
        x: prompts, left-padded.
        labels: one spelling each.
        mean: per-token mean instead of the sum, so that long labels are not punished.
    """
    columns = []
    for (spelling,) in labels.spellings:
        ids = torch.tensor([spelling] * len(x), device=x.device)
        logits = model(x.extend(ids))[:, x.shape[1] - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        columns.append(chosen.mean(1) if mean else chosen.sum(1))
    return torch.stack(columns, dim=-1)
