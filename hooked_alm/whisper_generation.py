"""Whisper's own generation loop, around a hooked model.

``WhisperGenerationMixin`` hears a recording window by window, tries again at higher temperatures
what it distrusts, and calls ``GenerationMixin`` for every window: each such pass is a prompt and
the windows that it is about, and its steps are those of ``GenerationLoop``.
"""

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from .errors import InputError
from .generation_loop import GenerationLoop
from .hooks import Hook, HookPoint
from .inputs import ALMInput, AudioClip
from .points import hook_name

_IN_THE_PROMPT = {
    "language": "language", "task": "task", "is_multilingual": "language",
    "return_timestamps": "timestamps", "prompt_ids": "text", "decoder_input_ids": "answer_prefix",
}  # fmt: skip
"""Options of transformers' that a prompt of ours has in it -> the one of ``prepare``."""
_OURS = {"self", "kwargs", "input_features", "attention_mask", "encoder_outputs"}
_HEARD_AGAIN = ("no_speech_threshold", "logprob_threshold", "compression_ratio_threshold")
"""Options for which a window may be heard again."""


class WhisperLoop(WhisperGenerationMixin, GenerationLoop):
    """A hooked Whisper as ``WhisperGenerationMixin`` needs to see it."""

    main_input_name = "input_features"

    def __init__(self, model: Any, prompt: ALMInput, after_step: Any) -> None:
        super().__init__(model, prompt, after_step)
        self.__dict__.update(asked=prompt, patterns={}, begun=None)
        # transformers asks the encoder for its strides, and has its kernel exchanged where token
        # timestamps are wanted: not ours, whose patterns are computed beside any kernel.
        parts = SimpleNamespace(encoder=model.audio.encoder, config=SimpleNamespace())
        self.__dict__["model"] = parts
        if model.generation_config is None:
            raise InputError(
                f"generating with {model.cfg.model_name!r}: its folder has no "
                "generation_config.json, which says how a transcript begins and ends. Add it."
            )

    @staticmethod
    def config_of(model: Any) -> WhisperConfig:
        """Sizes that the loop reads. Caches are sized by the encoder's layers: here, ours."""
        n_layers = len(model.blocks)
        return WhisperConfig(
            vocab_size=model.cfg.d_vocab,
            encoder_layers=n_layers,
            decoder_layers=n_layers,
            max_source_positions=model.audio.encoder.cfg.n_ctx,
            max_target_positions=model.cfg.n_ctx,
            # The generation config's are what counts.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
            decoder_start_token_id=0,
        )

    @staticmethod
    def options() -> set[str]:
        """Names of what transformers' ``generate`` takes for Whisper, less what prompts say."""
        named = inspect.signature(WhisperGenerationMixin.generate).parameters
        known = {*named, *GenerationConfig().to_dict()} - _OURS
        return known | {"num_beams"}

    def arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` for the prompts.

        Raises:
            InputError: options that the prompts decide, or that Whisper's loop would ignore; a long
                recording whose prompt is for one window, or activations of several passes.
        """
        _check_options(options)
        x, (features, mask) = self.asked, self._features()
        is_long = features.shape[-1] > self.hooked.audio.feature_shape[1]
        is_timed = self._is_timed(is_long)
        if self.after_step is not None:
            self._check_one_pass(options, is_long or is_timed)
        if options.get("return_token_timestamps"):
            self._check_times(options)
        found: dict[str, Any] = {"input_features": features, "return_timestamps": is_timed}
        if (len(x) > 1 and is_long) or options.get("return_token_timestamps"):
            found["attention_mask"] = mask
        if (said := self._said()) is not None:
            found["prompt_ids"] = said
        return found

    def _check_times(self, options: dict[str, Any]) -> None:
        """Refuse what transformers has no times of tokens for."""
        if (options.get("num_return_sequences") or 1) > 1:
            raise InputError(
                "finding times of tokens of several sequences a prompt: transformers cannot. Ask "
                "for one, or repeat the prompts."
            )

    def _is_timed(self, is_long: bool) -> bool:
        """Whether the prompts want timestamps, all of them or none; long recordings need some."""
        x, mute = self.asked, getattr(self.generation_config, "no_timestamps_token_id", None)
        timed = [mute is not None and mute not in ids for ids in x.tokens.tolist()]
        if len({*timed}) > 1:
            raise InputError(
                "generating with Whisper: some prompts want timestamps and others do not. Prepare "
                "them with one `timestamps`."
            )
        if is_long and not timed[0]:
            raise InputError(
                "generating from recordings that are longer than a window: their prompts leave no "
                "room for timestamps, by which they are cut. Prepare them with long_form=True."
            )
        if is_long and not bool(x.attention_mask.all()):
            raise InputError(
                "generating from recordings that are longer than a window: their prompts differ in "
                "length. Generate them one by one."
            )
        return timed[0]

    def _check_one_pass(self, options: dict[str, Any], has_segments: bool) -> None:
        several = [name for name in _HEARD_AGAIN if options.get(name) is not None]
        if not isinstance(options.get("temperature", 1.0), int | float):
            several.append("temperature")
        if several or has_segments:
            raise InputError(
                "caching while generating with Whisper: got "
                + (", ".join(several) or "prompts with timestamps")
                + ", for which a window may be heard more than once. Generate the tokens first, "
                "then cache one run over them: model.run_with_cache(x.extend(tokens[:, :-1]))."
            )

    def _features(self) -> tuple[Tensor, Tensor]:
        """Spectrograms of all prompts, and 1 at frames that are not padding.

        Where a memory was given instead, every row is full of its own number.
        """
        x, front_end = self.asked, self.hooked.audio
        if x.memory is not None:
            rows = torch.arange(len(x), dtype=torch.float32)[:, None, None]
            features = rows.repeat(1, *front_end.feature_shape)
            return features, torch.ones(len(x), features.shape[-1], dtype=torch.long)
        if [*x.clip_rows] != [*range(len(x))]:
            raise InputError(
                f"generating from {len(x)} prompts: they have {len(x.clips)} clips, expected one "
                "each. Make them with `prepare`, or give a memory."
            )
        features, mask = front_end.features_and_mask(x.clips)
        return features, mask

    def _said(self) -> Int[Tensor, " previous"] | None:
        """What was said before, if all prompts begin with the same: transformers wants it apart."""
        start = self.generation_config.decoder_start_token_id
        ids = self.asked.tokens
        at = (ids == start).int().argmax(-1)
        n = int(at[0])
        is_one = bool((ids[torch.arange(len(ids)), at] == start).all() and (at == n).all())
        is_one &= bool(self.asked.attention_mask.all()) and bool((ids[:, :n] == ids[:1, :n]).all())
        return ids[0, :n] if n and is_one else None

    def _retrieve_init_tokens(
        self, *args: Any, generation_config: Any = None, **kwargs: Any
    ) -> Int[Tensor, "batch pos"]:
        """The prompts, whose pads are told by their id from here on."""
        controls = self._controls()
        if controls is not None:
            self.__dict__["begun"] = self._padded(self.asked.tokens)
            return controls.to(self.device)
        said = self._said()
        ids = self.asked.tokens if said is None else self.asked.tokens[:, len(said) :]
        return self._padded(ids)

    def _padded(self, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """The last tokens of prompts with the id of pads where they have any."""
        pad = self.generation_config.pad_token_id
        real = self.asked.attention_mask.bool()[:, -ids.shape[1] :]
        if not bool(real.all()):
            first = real.int().argmax(-1)
            if pad is None or bool((ids[torch.arange(len(ids)), first] == pad).any()):
                raise InputError(
                    "generating with Whisper: prompts of different length begin with the id that "
                    "pads them, or none is named. Generate them one by one."
                )
            ids = ids.masked_fill(~real, pad)
        return ids.to(self.device)

    def _controls(self) -> Int[Tensor, "batch control"] | None:
        """Control tokens alone, where the beginning of a transcript follows them; or None.

        The transcript belongs to the first window: later ones begin with the control tokens.
        """
        start = self.generation_config.decoder_start_token_id
        mute = getattr(self.generation_config, "no_timestamps_token_id", None) or start
        found, has_begun = [], False
        for ids in self.asked.tokens.tolist():
            if start not in ids:
                return None
            rest = ids[ids.index(start) :]
            n = next((i for i, id_ in enumerate(rest) if i and not start < id_ <= mute), len(rest))
            found.append(rest[:n])
            has_begun |= n < len(rest)
        if not has_begun:
            return None
        if len({*map(len, found)}) > 1:
            raise InputError(
                "generating with Whisper: transcripts that have begun, behind different numbers of "
                "control tokens. Generate them one by one."
            )
        return torch.tensor(found)

    def _prepare_decoder_input_ids(
        self, *, cur_bsz: int, kwargs: dict[str, Any], **more: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """The prompt of a window: at first with the transcript so far, if one has begun."""
        if self.begun is None:
            found: tuple[Tensor, dict[str, Any]] = super()._prepare_decoder_input_ids(
                cur_bsz=cur_bsz, kwargs=kwargs, **more
            )
            return found
        ids, self.__dict__["begun"] = self.begun, None
        kwargs.pop("decoder_attention_mask", None)
        return ids.repeat_interleave(cur_bsz // len(ids), 0), kwargs

    def _prompt_of(
        self, features: Float[Tensor, "row mel frame"], ids: Tensor, mask: Tensor | None
    ) -> ALMInput:
        """The prompts of one pass, with what is heard in it."""
        if mask is None:
            pad = self.generation_config.pad_token_id
            is_pad = torch.zeros_like(ids) if pad is None else (ids == pad).long()
            mask = (is_pad.cumprod(-1) == 0).long()
        front_end, memory = self.hooked.audio, None
        clips: list[AudioClip] = []
        if self.asked.memory is not None:
            memory = self.asked.memory[features[:, 0, 0].long()]
        else:
            clips = [self._clip_of(one) for one in features.cpu()]
        made = front_end.input_from_features(
            ids.cpu(), mask.long().cpu(), None, clips, memory=memory
        )
        found: ALMInput = made.to(self.device)
        return found

    def _retrieve_segment(self, **given: Any) -> Any:
        """Segments of a pass, and how far it went.

        One pass is all that there is of a memory, and all that a cache can hold.
        """
        if self.asked.memory is not None or self.after_step is not None:
            given["timestamp_begin"] = self.hooked.cfg.d_vocab  # no token ends a segment
        return super()._retrieve_segment(**given)

    def _clip_of(self, features: Float[Tensor, "mel frame"]) -> AudioClip:
        """The clip of some features: one that was asked for, which may be encoded already."""
        for clip in self.asked.clips:
            if torch.equal(clip.features[0], features):
                return clip
        found: AudioClip = self.hooked.audio.clip(features[None], [features.shape[-1]])
        return found

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Take the prompts of a pass over; the encoder runs in its first step, past the hooks."""
        mask = model_kwargs.pop("decoder_attention_mask", None)
        self.__dict__["prompt"] = self._prompt_of(
            inputs_tensor, model_kwargs["decoder_input_ids"], mask
        )
        return {**model_kwargs, "encoder_outputs": BaseModelOutput()}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        decoder_attention_mask: Tensor | None = None,
        inputs: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Arguments of a step; transformers asks here which it may hand on."""
        if inputs is not None:  # of no step, but of the question whether anybody speaks
            return {}
        return super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values)

    def forward(
        self,
        input_ids: ALMInput | Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        decoder_attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Logits of one step, and the patterns of those heads that align tokens with frames."""
        self.patterns.clear()
        if isinstance(input_ids, Tensor):  # the question whether anybody speaks
            assert input_features is not None
            x = self._prompt_of(input_features, input_ids, decoder_attention_mask)
        else:
            x = input_ids
        step = super().forward(x, past_key_values=past_key_values)
        n_rows, n_layers = len(x), len(self.hooked.blocks)
        return Seq2SeqLMOutput(
            logits=step.logits,
            past_key_values=past_key_values,
            decoder_attentions=(),
            # Of other layers nothing is read.
            cross_attentions=tuple(
                self.patterns.get(layer, step.logits.new_zeros(n_rows, 0, step.logits.shape[1], 0))
                for layer in range(n_layers)
            ),
        )

    def hooks(self, options: dict[str, Any]) -> list[Hook]:
        """Hooks that look at the patterns of heads which align tokens with frames."""
        if not options.get("return_token_timestamps"):
            return []

        heads = getattr(self.generation_config, "alignment_heads", None)
        if heads is None:
            raise InputError(
                f"finding times of tokens with {self.hooked.cfg.model_name!r}: its "
                "generation_config.json names no alignment_heads. Add them."
            )
        points = {layer: hook_name("cross_attn.pattern", f"blocks.{layer}") for layer, _ in heads}
        return [(name, partial(self._look, layer)) for layer, name in points.items()]

    def _look(self, layer: int, pattern: Tensor, hook: HookPoint) -> None:
        self.patterns[layer] = pattern

    def results(self, found: Any) -> tuple[Tensor, dict[str, Any]]:
        """New tokens, and what else transformers was asked for."""
        if isinstance(found, Tensor):
            return found, {}
        return found["sequences"], {k: v for k, v in found.items() if k != "sequences"}


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what prompts decide, or what the loop would ignore.

    Raises:
        InputError: there is any.
    """
    if given := _IN_THE_PROMPT.keys() & options.keys():
        instead = sorted({f"{_IN_THE_PROMPT[name]}=" for name in given})
        raise InputError(
            f"generating with Whisper: got {', '.join(sorted(given))}, which the prompt has in it. "
            f"Give {', '.join(instead)} to `prepare`."
        )
    if options.get("do_sample") and not options.get("temperature"):
        raise InputError(
            "generating with Whisper: got do_sample, which its loop ignores: it samples where the "
            "temperature is above 0. Give temperature, a number or a tuple to fall back on."
        )
    asked = [name for name in _HEARD_AGAIN if options.get(name) is not None]
    if asked and options.get("temperature") is None:
        raise InputError(
            f"generating with Whisper: got {', '.join(asked)}, for which a window is heard again "
            "at another temperature, and no temperature. Give a tuple, from 0.0 on."
        )
