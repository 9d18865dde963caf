"""Check that every field of a published config is handled, irrelevant, or at its default."""

from collections.abc import Mapping, Set
from typing import Any

from hooked_alm.errors import ConversionError

IRRELEVANT: Mapping[str, str] = {
    "architectures": "read by the registry",
    "model_type": "read by the registry",
    "auto_map": "names the publisher's own code, which is never run",
    "transformers_version": "says who wrote the file",
    "torch_dtype": "the caller chooses; the checkpoint's own is the default",
    "dtype": "the caller chooses; the checkpoint's own is the default",
    "_name_or_path": "says where the file came from",
    "_attn_implementation_autoset": "the caller chooses",
    "_attn_implementation_internal": "the caller chooses",
    "_commit_hash": "says where the file came from",
    "use_cache": "a default of generation, not of the function computed",
    "return_dict": "shape of Hugging Face's outputs",
    "output_attentions": "shape of Hugging Face's outputs",
    "output_hidden_states": "shape of Hugging Face's outputs",
    "initializer_range": "training only",
    "attention_dropout": "training only",
    "ignore_index": "loss only",
    "bos_token_id": "belongs to the tokenizer and the generation config",
    "eos_token_id": "belongs to the tokenizer and the generation config",
    "pad_token_id": "only zeroes a gradient; its embedding row is stored like any other",
    "id2label": "classification only",
    "label2id": "classification only",
    "problem_type": "classification only",
    "chunk_size_feed_forward": "memory only; changes no value",
    "is_encoder_decoder": "always false for these classes",
    # Generation settings that older transformers wrote into every config file.
    "max_length": "generation", "min_length": "generation", "do_sample": "generation",
    "temperature": "generation", "top_k": "generation", "top_p": "generation",
    "typical_p": "generation", "num_beams": "generation", "num_beam_groups": "generation",
    "diversity_penalty": "generation", "repetition_penalty": "generation",
    "length_penalty": "generation", "no_repeat_ngram_size": "generation",
    "encoder_no_repeat_ngram_size": "generation", "early_stopping": "generation",
    "num_return_sequences": "generation", "bad_words_ids": "generation",
    "suppress_tokens": "generation", "begin_suppress_tokens": "generation",
    "forced_bos_token_id": "generation", "forced_eos_token_id": "generation",
    "exponential_decay_length_penalty": "generation", "remove_invalid_values": "generation",
    "output_scores": "generation", "return_dict_in_generate": "generation",
    # Fields of the base class that no supported architecture reads.
    "add_cross_attention": "not read", "cross_attention_hidden_size": "not read",
    "decoder_start_token_id": "not read", "finetuning_task": "not read",
    "is_decoder": "not read", "prefix": "not read", "pruned_heads": "not read",
    "sep_token_id": "not read", "task_specific_params": "not read",
    "tf_legacy_loss": "not read", "tie_encoder_decoder": "not read",
    "tokenizer_class": "the tokenizer files decide", "torchscript": "not read",
    "use_bfloat16": "not read",
}  # fmt: skip
"""Field -> why it does not change what the model computes."""

SWITCHED_OFF: Mapping[str, object] = {
    "use_mrope": False,  # published Qwen2 and Qwen2-Audio files name it; their classes do not
}
"""Fields that transformers' config classes do not know -> the value that asks for nothing."""


def account_for(
    config: Any,
    published: Mapping[str, Any],
    handled: Set[str],
    irrelevant: Mapping[str, str] | None = None,
) -> None:
    """Check that no field of a config is silently ignored.

    Args:
        config: transformers' config object, which knows the defaults.
        published: the object of ``config.json`` that it was made from, as written.
        handled: fields the converter acts on.
        irrelevant: fields of this family that change nothing, with their reasons.

    Raises:
        ConversionError: fields that are unknown, or known but not at a default; all of them.
    """
    defaults = type(config)().to_dict()
    offenders = {
        name: value
        for name, value in published.items()
        if name not in handled
        and name not in {**IRRELEVANT, **(irrelevant or {})}
        and not (name in SWITCHED_OFF and SWITCHED_OFF[name] == value)
        and (name not in defaults or defaults[name] != value)
    }
    if offenders:
        listed = ", ".join(f"{name} = {value!r}" for name, value in sorted(offenders.items()))
        raise ConversionError(
            f"reading a {type(config).__name__}: this converter does not act on {listed}. A model "
            "that needs them would be silently wrong. Load a config that the family published; new "
            "fields have to be added to the converter first."
        )


def account_for_encoder(
    config: Any, published: Mapping[str, Any], irrelevant: Mapping[str, str] | None = None
) -> None:
    """Account for the config of an encoder that is Hugging Face's own and acts on all it knows.

    Raises:
        ConversionError: fields that transformers' config class does not know.
    """
    known = {*type(config)().to_dict(), *type(config).attribute_map}
    account_for(config, published, handled=known, irrelevant=irrelevant)
