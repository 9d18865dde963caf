"""Attention of a decoder to what an encoder has made of the audio."""

import torch

from ..axes import Resid
from ..config import LayerType, StackConfig
from ..errors import InputError
from ..hooks import HookPoint, is_hooked
from .attention import Attention, AttentionContext, KeyValues, SplitInputs

_UNMASKED = AttentionContext(
    rotary=None,
    kernel_masks={"full_attention": None},
    additive_masks={"full_attention": None},
)
"""Every position sees all of the memory, padding included, as in Hugging Face."""


class CrossAttention(Attention):
    """Attention whose keys and values are those of ``context.memory``.

    Keys and values are computed once per memory and kept in ``context.memory_cache``, unedited: the
    points show them at every step of a generation, and what a hook makes of them holds for that
    step.

    Hook points: those of ``Attention`` without rotation, ``key_pos`` counting the memory's
    positions: ``hook_k``, ``hook_v [batch, memory_pos, kv_head, d_head]``.

    Source: transformers 5.23 ``WhisperAttention`` with ``key_value_states``.
    """

    def __init__(self, cfg: StackConfig, layer: int, layer_type: LayerType) -> None:
        """Allocate the four projections."""
        super().__init__(cfg, layer, layer_type)
        self.is_causal = False

    def forward(
        self, x: Resid, context: AttentionContext, split: SplitInputs | None = None
    ) -> Resid:
        """What the attention writes to the residual stream, from the normalised ``x``.

        There are no inputs per head, so that ``split`` is always None.

        Raises:
            InputError: no memory, or one of another batch size.
        """
        q = self.hook_q(self.project("q", x)).transpose(1, 2) * self.query_scale
        if context.attend_memory is not None:
            return self._written(self.hook_z(context.attend_memory(self, q)))
        k, v = self._of_memory(len(x), context)
        k, v = _shown(self.hook_k, k), _shown(self.hook_v, v)
        return self._written(self.hook_z(self._attend(q, k, v, _UNMASKED)))

    def _of_memory(self, n_rows: int, context: AttentionContext) -> tuple[KeyValues, KeyValues]:
        """Keys and values of the memory, those that are kept if there are any."""
        kept, memory = context.memory_cache, context.memory
        if kept is not None and kept.is_updated.get(self.layer_idx):
            layer = kept.cross_attention_cache.layers[self.layer_idx]
            return self._of_batch(n_rows, layer.keys, layer.values)
        if memory is None:
            raise InputError(
                "running a block that reads a memory: there is none. Give the audio, or the states "
                "that its encoder has made of it."
            )
        k, v = (self.project(part, memory).transpose(1, 2).contiguous() for part in ("k", "v"))
        k, v = self._of_batch(n_rows, k, v)
        if kept is None:
            return k, v
        kept.is_updated[self.layer_idx] = True
        keys, values = kept.cross_attention_cache.update(k, v, self.layer_idx)
        return keys, values

    def _of_batch(
        self, n_rows: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[KeyValues, KeyValues]:
        """Both as they are, if there is a memory for every row.

        Raises:
            InputError: there are more or fewer; Hugging Face would join or split them.
        """
        if len(keys) != n_rows:
            raise InputError(
                f"reading a memory: it is of {len(keys)} rows, the prompts are {n_rows}. Give one "
                "for each prompt."
            )
        return keys, values


def _shown(point: HookPoint, kept: KeyValues) -> KeyValues:
    """What hooks leave of keys or values, which they may write to without reaching those kept."""
    return point((kept.clone() if is_hooked(point) else kept).transpose(1, 2)).transpose(1, 2)
