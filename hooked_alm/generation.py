"""Generation by transformers' own loop, so that every processor and option means the same.

What is asked, checked and kept is here; ``generation_loop`` has the loop.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import HookedALMError, InputError, reason_of, refuse_unknown
from .hooks import ActivationCache, Hook, NamesFilter, hook_pairs
from .inputs import ALMInput, ModelInput
from .points import point_of
from .turns import in_turn

if TYPE_CHECKING:
    from .config import HookedALMConfig
    from .stacks import Stack

Generated = list[str] | Tensor | dict[str, Any]


class Generation:
    """Mixed into ``HookedALM``; owns nothing."""

    if TYPE_CHECKING:
        cfg: HookedALMConfig
        tokenizer: Any
        generation_config: Any
        head: str
        stacks: Mapping[str, Stack]
        aliases: dict[str, str]
        get_caching_hooks: Any
        hooks: Any
        to_input: Any

    @in_turn
    def generate(
        self,
        input: ModelInput,
        max_new_tokens: int | None = None,
        *,
        return_type: str = "text",
        use_past_kv_cache: bool = True,
        memory: Float[Tensor, "batch memory_pos d_model"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        fwd_hooks: Iterable[Hook] = (),
        names_filter: NamesFilter = None,
        **options: Any,
    ) -> Generated | tuple[Generated, ActivationCache]:
        """Continue each prompt of a left-padded batch, and keep what passed the hook points.

        The cache joins all steps over positions: ``[batch, prompt + new - 1, ...]``, the prompt's
        rows from the first step and one row from each later one. The last new token is returned but
        never run, so it has no row. Scores and patterns are ``[batch, head, query_pos, key_pos]``
        over the same positions, later keys filled as a causal mask leaves them: 0 in a pattern, the
        dtype's minimum in scores. Points of the audio (``[clip, ...]``) are those of the first
        step. The layout is the same without the KV cache, where the values of a position are those
        of the first step that ran it. Rows of tokens after a row's end, like pads, mean nothing.

        Args:
            input: the prompts.
            max_new_tokens: tokens to add; None follows the checkpoint's generation config.
            return_type: "text" for the new text, one string per row, or "tokens" for the new
                tokens ``[batch, new]``; Whisper's are without the token that ends a row, padded on
                the right.
            use_past_kv_cache: keep keys and values between steps, or run the whole sequence again.
            memory: what cross-attention reads, instead of what the encoder makes of the clips.
            attention_mask: with ids alone: 1 at real positions, 0 at pads.
            prepend_bos: for text; see ``to_tokens``.
            padding_side: "left", where texts are padded.
            fwd_hooks: fire at every step, before the cache sees their edits; ``pos_offset`` is then
                the position of the first row a hook sees (0 in the first step; without the KV
                cache, in every step).
            names_filter: points to cache, as in ``run_with_cache``, except that None caches
                nothing. ``matching(None)`` is what ``run_with_cache`` keeps without a filter,
                ``lambda name: True`` every point there is.
            options: transformers ``generate`` arguments (``do_sample``, ``temperature``, ``top_k``,
                ``num_beams``, ``logits_processor``, ...), over the checkpoint's generation config;
                and HookedTransformer's, where they mean the same: ``stop_at_eos``,
                ``temperature=0`` for greedy, ``verbose`` (nothing is shown either way). Whisper has
                those of its own loop: a tuple of temperatures, ``logprob_threshold``,
                ``condition_on_prev_tokens``, ``return_segments``, ``return_token_timestamps``, ...

        Returns:
            Text or tokens, or transformers' dict of these and what Whisper was asked for besides;
            with a ``names_filter``, a pair of them and the cache. With ``num_return_sequences`` the
            rows of both are copies of the prompts, in the same order.

        Raises:
            InputError: text was asked for without a tokenizer, scores were asked for, the batch is
                padded on the right, an argument has no equal in transformers, no token is to be
                added, or a cache was asked for where rows are reordered between steps (beams) or
                not run one by one (assistants).
            HookNameError: a name that matches nothing or cannot fire.
        """
        x: ALMInput = self.to_input(
            input,
            attention_mask=attention_mask,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
        )
        x = x if memory is None else replace(x, memory=memory)
        _check_request(self, x, return_type, max_new_tokens)
        pairs = hook_pairs(fwd_hooks, "fwd_hooks")
        options = _transformers_options(self, options)
        steps = None if names_filter is None else _Steps(self, names_filter)
        if steps is not None and options.get("past_key_values") is not None:
            raise InputError(
                "caching while generating: positions that past_key_values holds already do not "
                "run, and have no activations. Leave it out."
            )
        kind = _loop_of(self)
        loop = kind(self, x, None if steps is None else steps.take)
        given = loop.arguments(options)
        refuse_unknown("generating", options, kind.options())
        # The user's hooks first: the cache keeps what they make of a value.
        kept = [*loop.hooks(options), *([] if steps is None else steps.hooks)]
        with self.hooks(fwd_hooks=[*pairs, *kept]):
            found = _generated(
                loop,
                use_cache=use_past_kv_cache,
                return_dict_in_generate=False,
                **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}),
                **given,
                **options,
            )
        sequences, more = loop.results(found)
        new: Generated = sequences
        if return_type == "text":
            new = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        if more:
            new = {"sequences": new, **more}
        return new if steps is None else (new, steps.joined())


def _loop_of(model: Generation) -> Any:
    """The loop that generates with a model; half of transformers comes with it."""
    if model.cfg.cross_attention:
        from .whisper_generation import WhisperLoop

        return WhisperLoop
    from .generation_loop import GenerationLoop

    return GenerationLoop


def _generated(loop: Any, **options: Any) -> Any:
    """What a loop returns; what fails before its first step is an option."""
    try:
        found = loop.generate(**options)
    except Exception as error:
        if loop.has_run or isinstance(error, HookedALMError):
            raise  # a hook, a processor or a criterion may be the user's
        raise InputError(
            "generating: transformers refuses the options, or the generation_config.json that came "
            f"with the model ({reason_of(error)}). Give other options, or mend the file."
        ) from error
    return found


def _check_request(
    model: Generation, x: ALMInput, return_type: str, max_new_tokens: int | None
) -> None:
    if max_new_tokens is not None and not (isinstance(max_new_tokens, int) and max_new_tokens > 0):
        raise InputError(
            f"generating: got max_new_tokens={max_new_tokens!r}, expected a number from 1 on, or "
            "None for the checkpoint's own."
        )
    if model.head != "text":
        raise InputError(
            f"generating with the {model.head} head: only text is generated. Use "
            "`towards('text')`, and "
            f"names_filter='{model.stacks[model.head].unembed}.hook_out' for the other head's "
            "logits at every step."
        )
    if return_type not in ("text", "tokens"):
        raise InputError(
            f"generating: got return_type={return_type!r}, expected 'text' or 'tokens', both of "
            "what is new alone (HookedTransformer's 'str', 'tensor' and 'input' begin with the "
            "prompt). For the prompt too, join the new tokens to its `tokens`."
        )
    if return_type == "text" and model.tokenizer is None:
        raise InputError(
            f"generating text with {model.cfg.model_name!r}: its folder has no tokenizer. Use "
            'return_type="tokens", or add the tokenizer files.'
        )
    if not bool(x.attention_mask[:, -1].all()):
        raise InputError(
            "generating: the batch is padded on the right, so new tokens would follow pads. Pad "
            "on the left."
        )


def _transformers_options(model: Generation, options: dict[str, Any]) -> dict[str, Any]:
    """Options of transformers' ``generate``, HookedTransformer's own translated into them."""
    options = dict(options)
    if options.pop("return_dict_in_generate", False):
        raise InputError(
            "generating: return_dict_in_generate is not supported, only text or tokens are "
            "returned. Record scores with names_filter='unembed.hook_out'."
        )
    if penalty := options.pop("freq_penalty", 0.0):
        raise InputError(
            f"generating: got freq_penalty={penalty}, which transformers does not have. Use "
            "repetition_penalty (another formula), or a logits_processor."
        )
    options.pop("verbose", None)
    # HookedTransformer's way to ask for the likeliest token, and Whisper's own.
    if options.get("temperature") == 0 and not model.cfg.cross_attention:
        del options["temperature"]
        options["do_sample"] = False
    stop = options.pop("stop_at_eos", None)
    if stop is False:
        options["eos_token_id"] = None
    elif stop and options.get("eos_token_id") is None:
        # An explicit None would win over the end tokens of the checkpoint.
        options.pop("eos_token_id", None)
        options |= _end_of_text(model, options.get("generation_config"))
    return options


def _end_of_text(model: Generation, config: Any) -> dict[str, int]:
    """Options that make generation stop: the tokenizer's end token where no config names one."""
    if any(c is not None and c.eos_token_id is not None for c in (config, model.generation_config)):
        return {}
    if model.tokenizer is None or model.tokenizer.eos_token_id is None:
        raise InputError(
            f"generating with stop_at_eos=True: {model.cfg.model_name!r} names no end token, in "
            "its generation config or tokenizer. Pass eos_token_id."
        )
    return {"eos_token_id": model.tokenizer.eos_token_id}


class _Steps:
    """Rows that each step adds to a cache, joined at the end."""

    def __init__(self, model: Generation, names_filter: NamesFilter) -> None:
        self.model = model
        self.store, self.hooks, _ = model.get_caching_hooks(names_filter)
        self.n_run = 0
        self.parts: dict[str, list[Tensor]] = {}
        self.aliases: dict[str, str] = {}

    def take(self, n_pos: int) -> None:
        """Keep the rows of the positions up to ``n_pos`` that no earlier step ran."""
        n_new = n_pos - self.n_run
        for name, value in self.store.items():
            # A second name of a value that is kept under its first.
            if name in self.model.aliases:
                self.aliases[name] = self.model.aliases[name]
                continue
            parts = self.parts.setdefault(name, [])
            axis = point_of(name).position_axis
            if axis is None:
                # Audio before the merge: only the first step has any.
                parts[:] = parts or [value]
                continue
            rows = value.narrow(axis, value.shape[axis] - n_new, n_new)
            # Some rows alone: a view would keep the whole step alive.
            parts.append(rows if n_new == value.shape[axis] else rows.clone())
        # So that a point that does not fire in the next step leaves nothing to be taken twice.
        self.store.clear()
        self.n_run = n_pos

    def joined(self) -> ActivationCache:
        """The rows of all steps as one cache; the steps' own tensors are let go on the way."""
        cache: dict[str, Tensor] = {}
        for name in list(self.parts):
            parts = self.parts.pop(name)
            if "key_pos" in point_of(name).axes.split():
                cache[name] = self._joined_over_keys(name, parts)
            else:
                axis = point_of(name).position_axis or 0
                cache[name] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
        cache |= {alias: cache[own] for alias, own in self.aliases.items()}
        return ActivationCache(cache, self.model)

    def _joined_over_keys(self, name: str, parts: list[Tensor]) -> Tensor:
        """Scores or pattern of all steps ``[batch, head, query_pos, key_pos]``, causally masked."""
        hidden = torch.finfo(parts[0].dtype).min if name.endswith("hook_attn_scores") else 0.0
        whole = parts[0].new_full((*parts[0].shape[:2], self.n_run, self.n_run), hidden)
        stop = 0
        for part in parts:
            # The keys of a step end at its last query.
            start, stop = stop, stop + part.shape[2]
            # With a sliding window, earlier keys have left the KV cache.
            whole[:, :, start:stop, stop - part.shape[3] : stop] = part
        return whole
