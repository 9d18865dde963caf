"""Check that every field of a published config is handled, irrelevant, or at its default."""

import re
from collections.abc import Mapping, Set
from typing import Any

from hooked_alm.config import LARGEST, MOST_LAYERS, is_real, is_size, rope_problems
from hooked_alm.errors import ConversionError

PROVENANCE = re.compile(
    r"_.+|unsloth_.+|(accelerate|axolotl|peft|swift|torch|transformers|trl)_version"
)
"""Names of fields that say who wrote a file, and how: they begin with an underscore, or name a
library."""

IRRELEVANT: Mapping[str, str] = {
    "architectures": "read by the registry",
    "model_type": "read by the registry",
    "auto_map": "names the publisher's own code, which is never run",
    "model_name": "says where the file came from",
    "torch_dtype": "the caller chooses; the checkpoint's own is the default",
    "dtype": "the caller chooses; the checkpoint's own is the default",
    "use_cache": "a default of generation, not of the function computed",
    "return_dict": "shape of Hugging Face's outputs",
    "output_attentions": "shape of Hugging Face's outputs",
    "output_hidden_states": "shape of Hugging Face's outputs",
    "initializer_range": "training only",
    "attention_dropout": "training only",
    "ignore_index": "loss only",
    "bos_token_id": "belongs to the tokenizer and the generation config",
    "eos_token_id": "belongs to the tokenizer and the generation config",
    "unk_token_id": "belongs to the tokenizer",
    "pretraining_tp": "how products were cut into parts in training; their sum is the same",
    "pad_token_id": "only zeroes a gradient; its embedding row is stored like any other",
    "id2label": "classification only",
    "label2id": "classification only",
    "problem_type": "classification only",
    "chunk_size_feed_forward": "memory only; changes no value",
    "is_encoder_decoder": "the class decides",
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

PARTS = frozenset({
    "text_config", "audio_config", "encoder_config", "projector_config", "audio_encoder_config",
    "thinker_config", "quantization_config",
})  # fmt: skip
"""Parts that are read; other fields end in ``_config``, too, and some are text."""

SWITCHED_OFF: Mapping[str, object] = {
    "use_mrope": False,  # published Qwen2 and Qwen2-Audio files name it; their classes do not
}
"""Fields that transformers' config classes do not know -> the value that asks for nothing."""


def object_parts(published: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A config without its parts (``*_config``) that are null, to any depth.

    To transformers as well such a part is as good as left out.

    Raises:
        ConversionError: a part that is read, and is no object.
    """
    found = {}
    for name, value in published.items():
        if name.endswith("_config") and isinstance(value, dict):
            found[name] = object_parts(value, f"{where}{name}.")
        elif name in PARTS and value is not None:
            raise ConversionError(
                f"reading a config: got {where}{name} = {value!r:.60}, expected an object. It is "
                "damaged; download it again."
            )
        elif value is not None or not name.endswith("_config"):
            found[name] = value
    return found


def account_for(
    config: Any,
    published: Mapping[str, Any],
    handled: Set[str],
    irrelevant: Mapping[str, str] | None = None,
) -> None:
    """Check that no field of a config is silently ignored, and that each is of its kind.

    Args:
        config: transformers' config object, which knows the defaults.
        published: the object of ``config.json`` that it was made from, as written.
        handled: fields the converter acts on.
        irrelevant: fields of this family that change nothing, with their reasons.

    Raises:
        ConversionError: fields that are unknown, or known but not at a default, or numbers that
            count or measure nothing; all of them.
    """
    defaults = type(config)().to_dict()
    reads = {
        name: value
        for name, value in published.items()
        if name not in {**IRRELEVANT, **(irrelevant or {})} and not PROVENANCE.fullmatch(name)
    }
    offenders = {
        name: value
        for name, value in reads.items()
        if name not in handled
        and not (name in SWITCHED_OFF and SWITCHED_OFF[name] == value)
        # Null asks for nothing where nothing is the default.
        and not (value is None and not defaults.get(name))
        and (name not in defaults or defaults[name] != value)
    }
    if offenders:
        listed = ", ".join(f"{name} = {value!r:.60}" for name, value in sorted(offenders.items()))
        raise ConversionError(
            f"reading a {type(config).__name__}: this converter does not act on {listed}. A model "
            "that needs them would be silently wrong. Load a config that the family published; new "
            "fields have to be added to the converter first."
        )
    aliases = type(config).attribute_map
    misfits = [
        f"{name} = {value!r:.60}, expected {wanted}"
        for name, value in reads.items()
        if (wanted := _misfit(name, value, defaults.get(aliases.get(name, name))))
    ]
    if isinstance(rope := getattr(config, "rope_parameters", None), dict):
        misfits += rope_problems(rope)
    if misfits:
        raise ConversionError(
            f"reading a {type(config).__name__}: got {'; '.join(misfits)}. Take the published "
            "config."
        )


def _misfit(name: str, value: Any, default: Any) -> str | None:
    """What was expected instead of a value, by the kind of its default."""
    if value is None:  # transformers' classes say which of theirs may be
        return None
    if "drop" in name:
        return None if is_real(value) and 0 <= value <= 1 else "a number from 0 to 1"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, float) or (isinstance(default, int) and re.search("theta|base", name)):
        if not is_real(value):
            return "a number"
        if value <= 0 and re.search("theta|base|step|second|stride", name):
            return "a number above 0"
        return "no negative number" if value < 0 and "eps" in name else None
    if not isinstance(default, int):
        return None
    if re.search("(_id|_ids|_index|_token)$", name) or default < 1 or name == "max_window_layers":
        return None if type(value) is int and abs(value) < 2**63 else "a whole number"
    is_length = re.match("max_position|seq_length|sliding_window", name)
    most = 2**53 if is_length else MOST_LAYERS if "layers" in name else LARGEST
    return None if is_size(value, most) else f"a whole number from 1 to {most}"


def account_for_encoder(
    config: Any, published: Mapping[str, Any], irrelevant: Mapping[str, str] | None = None
) -> None:
    """Account for the config of an encoder that is Hugging Face's own and acts on all it knows.

    Raises:
        ConversionError: fields that transformers' config class does not know.
    """
    known = {*type(config)().to_dict(), *type(config).attribute_map}
    account_for(config, published, handled=known, irrelevant=irrelevant)
