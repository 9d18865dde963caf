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


class Embed(nn.Embedding):
    """Token embedding."""

    def __init__(self, cfg: HookedALMConfig) -> None:
        """Allocate the table."""
        super().__init__(cfg.d_vocab, cfg.d_model)
        self.multiplier = cfg.embedding_multiplier

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """Rows of the table, by ids that it has; see ``check``."""
        self.check(ids)
        return super().forward(ids)

    def check(self, ids: Int[Tensor, "..."]) -> None:
        """Refuse ids that have no row: on a GPU they would end the process, not the call.

        Raises:
            InputError: there are some.
        """
        if ids.is_meta or not bool(((ids < 0) | (ids >= self.num_embeddings)).any()):
            return
        raise InputError(
            f"encoding ids from {int(ids.min())} to {int(ids.max())}: the vocabulary has 0 to "
            f"{self.num_embeddings - 1}. Are they of this model's tokenizer?"
        )

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The table, under TransformerLens' name, times the config's multiplier."""
        return self.weight if self.multiplier == 1 else self.weight * self.multiplier


class PosEmbed(nn.Embedding):
    """Learned embedding of positions, which is added to that of the tokens (Whisper)."""

    def __init__(self, cfg: HookedALMConfig) -> None:
        """Allocate the table."""
        super().__init__(cfg.n_ctx, cfg.d_model)

    def forward(self, positions: Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """Rows of the table, by positions that it has; see ``check``."""
        self.check(positions)
        return super().forward(positions)

    def check(self, positions: Int[Tensor, "..."]) -> None:
        """Refuse positions that have no row.

        Raises:
            InputError: there are some.
        """
        if positions.is_meta or not bool(
            ((positions < 0) | (positions >= self.num_embeddings)).any()
        ):
            return
        raise InputError(
            f"embedding positions {int(positions.min())} to {int(positions.max())}: the model has "
            f"{self.num_embeddings} of them, from 0 on. Give a shorter prompt."
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
