"""Qwen3, text only: q and k are normed per head, nothing has a bias.

Source: transformers 5.23 ``Qwen3ForCausalLM``.
"""

from functools import partial

from transformers import Qwen3Config

from ..blocks.decoders import decoder_rules, text_decoder_config
from ..family import Card, Family

FAMILY = Family(
    name="Qwen3",
    architectures=("Qwen3ForCausalLM",),
    config_class=Qwen3Config,
    decoder_config=partial(text_decoder_config, qkv_bias=False, qk_norm=True),
    front_end=None,
    card=Card(audio="none", readout="the last token"),
    rules=decoder_rules(r"model\."),
)
