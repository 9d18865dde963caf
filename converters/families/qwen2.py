"""Qwen2 and Qwen2.5, text only: query, key and value have a bias.

Source: transformers 5.23 ``Qwen2ForCausalLM``.
"""

from functools import partial

from transformers import Qwen2Config

from ..blocks.decoders import decoder_rules, text_decoder_config
from ..family import Card, Family

FAMILY = Family(
    name="Qwen2 and Qwen2.5",
    architectures=("Qwen2ForCausalLM",),
    config_class=Qwen2Config,
    decoder_config=partial(text_decoder_config, qkv_bias=True, qk_norm=False),
    front_end=None,
    card=Card(audio="none", readout="the last token"),
    rules=decoder_rules(r"model\."),
)
