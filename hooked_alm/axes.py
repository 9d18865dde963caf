"""Axis names of the tensors that cross module borders, and aliases for the four most common.

Axes: ``batch`` prompts; ``pos`` positions of the padded prompt; ``d_model`` residual width;
``head`` query heads; ``kv_head`` key/value heads (query head ``h`` reads kv head
``h // (head / kv_head)``); ``d_head`` width of a head; ``d_mlp`` MLP width; ``vocab``;
``query_pos`` and ``key_pos`` positions that attend and are attended to; ``clip`` audio clips of
the whole batch, in order of appearance; ``mel`` and ``frame`` axes of a log-mel spectrogram;
``audio_pos`` positions that one clip fills in the prompt; ``memory_pos`` positions of what
cross-attention reads.
"""

from jaxtyping import Float, Int
from torch import Tensor

Resid = Float[Tensor, "batch pos d_model"]
Heads = Float[Tensor, "batch pos head d_head"]
FullLogits = Float[Tensor, "batch pos vocab"]
TokenIds = Int[Tensor, "batch pos"]
