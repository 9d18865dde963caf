"""Tokens into the residual stream, and the residual stream into logits."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..axes import FullLogits, Resid
from ..config import HookedALMConfig
from ..errors import InputError
from ..hooks import HookPoint


class _Table(nn.Embedding):
    """A table that refuses what it has no row for: a GPU would end the process, not the call."""

    def forward(self, rows: Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """Rows of the table; see ``check``."""
        self.check(rows)
        return super().forward(rows)

    def check(self, rows: Int[Tensor, "..."]) -> None:
        """Refuse numbers that have no row.

        Raises:
            InputError: there are some.
        """
        if rows.is_meta or not bool(((rows < 0) | (rows >= self.num_embeddings)).any()):
            return
        raise InputError(self._refusal(int(rows.min()), int(rows.max())))

    def _refusal(self, low: int, high: int) -> str:
        raise NotImplementedError


class Embed(_Table):
    """Token embedding."""

    def __init__(self, cfg: HookedALMConfig) -> None:
        """Allocate the table."""
        super().__init__(cfg.d_vocab, cfg.d_model)
        self.multiplier = cfg.embedding_multiplier

    def _refusal(self, low: int, high: int) -> str:
        return (
            f"encoding ids from {low} to {high}: the vocabulary has 0 to "
            f"{self.num_embeddings - 1}. Are they of this model's tokenizer?"
        )

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The table, under TransformerLens' name, times the config's multiplier."""
        return self.weight if self.multiplier == 1 else self.weight * self.multiplier


class PosEmbed(_Table):
    """Learned embedding of positions, which is added to that of the tokens (Whisper)."""

    def __init__(self, cfg: HookedALMConfig) -> None:
        """Allocate the table."""
        super().__init__(cfg.n_ctx, cfg.d_model)

    def _refusal(self, low: int, high: int) -> str:
        return (
            f"embedding positions {low} to {high}: the model has {self.num_embeddings} of them, "
            "from 0 on. Give a shorter prompt."
        )

    @property
    def W_pos(self) -> Float[Tensor, "position d_model"]:
        """The table, under TransformerLens' name."""
        return self.weight


class Unembed(nn.Linear):
    """Logits from the normalised residual stream, without bias.

    Hook points: ``hook_in [batch, pos, d_model]``, ``hook_out [batch, pos, vocab]``.
    """

    def __init__(self, cfg: HookedALMConfig) -> None:
        """Allocate the head."""
        super().__init__(cfg.d_model, cfg.d_vocab, bias=False)
        self.scaling = cfg.logits_scaling
        self.hook_in = HookPoint()
        self.hook_out = HookPoint()

    def forward(self, x: Resid) -> FullLogits:
        """Logits ``W_U x``."""
        logits = super().forward(self.hook_in(x))
        return self.hook_out(logits if self.scaling == 1 else logits / self.scaling)

    def directions(self, tokens: Any = None) -> Float[Tensor, "*token d_model"]:
        """Rows whose products with the normalised stream are the logits.

        Args:
            tokens: ids, of any shape; None is the whole vocabulary.
        """
        rows = self.weight
        if tokens is not None:
            rows = rows[torch.as_tensor(tokens, device=rows.device)]
        return rows if self.scaling == 1 else rows / self.scaling

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """View of the head, unless the config scales the logits."""
        return rearrange(self.directions(), "v d -> d v")

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """Zeros: the head has no bias."""
        return self.weight.new_zeros(self.weight.shape[0])
