"""LLaMA, text only: nothing has a bias; 3.1 and later scale the rotary frequencies.

Source: transformers 5.23 ``LlamaForCausalLM``.
"""

from functools import partial

from transformers import LlamaConfig

from ..blocks.decoders import decoder_rules, text_decoder_config
from ..family import Card, Family

FAMILY = Family(
    name="LLaMA",
    architectures=("LlamaForCausalLM",),
    config_class=LlamaConfig,
    decoder_config=partial(text_decoder_config, qkv_bias=False, qk_norm=False),
    front_end=None,
    card=Card(audio="none", readout="the last token"),
    rules=decoder_rules(r"model\."),
)
