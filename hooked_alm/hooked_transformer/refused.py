"""What HookedTransformer has and ``HookedALM`` has not: refused by name, with the cure."""

from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import InputError, refuse_unknown

_ARGUMENTS = {
    "past_kv_cache": "Cached runs take transformers' Cache: `past_key_values=DynamicCache()`.",
    "tokens": "Beside a residual stream, give the prompt it is of as `inputs`.",
    "shortformer_pos_embed": "Positions are rotary here; there is no embedding of them.",
}
"""Arguments of HookedTransformer's ``forward`` that mean nothing here -> what to do."""
_FORWARD = (
    "return_type start_at_layer stop_at_layer inputs past_key_values loss_per_token head "
    "attention_mask prepend_bos padding_side"
).split()


def refuse_forward_arguments(
    return_type: object, past_key_values: object, more: dict[str, Any]
) -> None:
    """Refuse what a run cannot be asked for; HookedTransformer's defaults (None) pass.

    Raises:
        InputError: an unknown return type or argument, or another cache than transformers'.
    """
    if return_type not in ("logits", "loss", "both", None):
        raise InputError(
            f"running the model: got return_type={return_type!r}, expected 'logits', 'loss', "
            "'both' or None. Text comes from `generate`."
        )
    if past_key_values is not None and not hasattr(past_key_values, "get_seq_length"):
        raise InputError(
            f"running on cached keys and values: got {type(past_key_values).__name__}, "
            "expected a transformers Cache, such as DynamicCache()."
        )
    for name, cure in _ARGUMENTS.items():
        if more.get(name) is not None:
            raise InputError(f"running the model: got {name}, which it does not take. {cure}")
    refuse_unknown("running the model", more.keys() - _ARGUMENTS.keys(), _FORWARD)


def _refused(name: str, cure: str) -> Callable[..., NoReturn]:
    def method(*args: object, **kwargs: object) -> NoReturn:
        raise InputError(f"calling {name}: HookedTransformer has it, HookedALM has not. {cure}")

    method.__name__, method.__doc__ = name, f"Refused. {cure}"
    return method


class RefusedMethods:
    """Mixed into ``HookedALM``; owns nothing."""

    from_pretrained_no_processing = _refused(
        "from_pretrained_no_processing", "`from_pretrained` never processes the weights."
    )
    generate_stream = _refused(
        "generate_stream", "Use `generate`; a transformers `streamer=` shows tokens as they come."
    )
    init_weights = _refused(
        "init_weights", "`interchange.reinitialized` makes an untrained copy of a model."
    )
    load_sample_training_dataset = _refused(
        "load_sample_training_dataset", "Nothing is downloaded. Load the data set yourself."
    )
    move_model_modules_to_device = _refused(
        "move_model_modules_to_device",
        "`model.to(device)` moves all of it, `from_pretrained(device_map=...)` spreads it.",
    )
    sample_datapoint = _refused(
        "sample_datapoint", "Nothing is downloaded. Give text or a recording of your own."
    )
