"""HookedALM: the decoder of an audio language model, with hook points.

A prompt's tokens are embedded, its audio clips are merged in, and the residual stream runs through
the blocks to the final norm and the unembedding.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .audio import AudioSource
from .axes import FullLogits, Resid, TokenIds
from .components.attention import AttentionContext
from .components.block import Block, Blocks
from .components.embed import Embed, PosEmbed, Unembed
from .components.lora import updates_of
from .components.norm import LayerNorm, RMSNorm, norm_of
from .components.rotary import Rotary
from .config import HookedALMConfig, LayerType, StackConfig, check_device
from .display import Shown, Summary
from .encoder_rows import EncoderRows
from .errors import HookNameError, InputError, refuse_unknown
from .frontend import FrontEnd
from .generation import Generation
from .hooked_transformer.refused import RefusedMethods, refuse_forward_arguments
from .hooked_transformer.surface import HookedTransformerSurface
from .hooks import (
    ActivationCache,
    Hook,
    HookedModule,
    HookPoint,
    hook_pairs,
    is_hooked,
    tap,
)
from .inputs import (
    ALMInput,
    AudioClip,
    ModelInput,
    check_embedded,
    check_memory,
    text_input,
    token_ids,
    unpadded_input,
)
from .masks import attention_masks
from .points import ENCODER, point_of
from .prompts import Conversation, PromptBuilder, conversations_from, segments_by_row
from .stacks import Stack, StackedModel, declared_stacks
from .turns import in_turn


class Output(NamedTuple):
    """Logits and loss of one run."""

    logits: FullLogits
    loss: Float[Tensor, "..."]


class HookedALM(
    Shown, StackedModel, Generation, HookedTransformerSurface, RefusedMethods, HookedModule
):
    """An audio language model with TransformerLens' hook points, equal to Hugging Face bit by bit.

    ::

        audio            FrontEnd: encoder and projector, audio.hook_*
        embed            hook_tokens, hook_text_embed, hook_audio_embed -> hook_embed (merged)
                         (with two streams of tokens: hook_code_embed for the first, too)
        (pos_embed       hook_pos_embed, added; with rotary positions there is none)
        blocks.{layer}   ln1 -> attn -> (ln2 -> cross_attn ->) ln2 or ln3 -> mlp
        ln_final
        unembed

    ``stacks`` says which blocks lead to which head. Most models have the text head alone; a branch
    has blocks, norm and unembedding of its own, and starts from the output of one of the blocks;
    ``towards`` says which head everything that is asked of the model is about.

    Hook points of its own: ``hook_tokens [batch, pos]``, on demand; ``hook_text_embed [batch, pos,
    d_model]``, placeholders included; ``hook_audio_embed [clip, audio_pos, d_model]``, before the
    merge; ``hook_embed [batch, pos, d_model]``, after it. Where blocks have cross-attention nothing
    is merged, and ``hook_audio_embed`` is what they read. ``tests/model/test_hook_names.py`` keeps
    the full list.
    """

    blocks: Blocks
    ln_final: RMSNorm | LayerNorm
    unembed: Unembed

    def __init__(
        self,
        cfg: HookedALMConfig,
        *,
        front_end: FrontEnd | None = None,
        tokenizer: Any = None,
        prompts: PromptBuilder | None = None,
        generation_config: Any = None,
    ) -> None:
        """Lay the model out; a converter fills the weights.

        Args:
            cfg: sizes and variants of the decoder.
            front_end: audio encoder and projector; None for a text-only model.
            tokenizer: for strings; None if the checkpoint has none.
            prompts: for ``prepare``; None if the checkpoint has no processor files.
            generation_config: transformers' ``GenerationConfig`` of the checkpoint.
        """
        super().__init__()
        self.cfg = cfg
        self.tokenizer, self.prompts, self.generation_config = tokenizer, prompts, generation_config
        self.audio = front_end
        self.embed = Embed(cfg)
        self.stacks = declared_stacks(cfg)
        n_before = 0  # a branch is counted behind the trunk, and its blocks see everything
        for stack in self.stacks.values():
            types = dict(enumerate(cfg.layer_types)) if stack.reads is None else {}
            blocks = (
                Block(cfg, n_before + i, types.get(i, "full_attention"))
                for i in range(stack.n_layers)
            )
            setattr(self, stack.blocks, Blocks(blocks))
            setattr(self, stack.norm, norm_of(cfg))
            setattr(self, stack.unembed, Unembed(cfg))
            n_before += stack.n_layers
        is_rotary = cfg.positional_embedding_type == "rotary"
        self.rotary = Rotary(cfg) if is_rotary else None
        self.pos_embed = None if is_rotary else PosEmbed(cfg)
        if not is_rotary:
            self.hook_pos_embed = HookPoint()
        self.hook_tokens = HookPoint()
        self.hook_text_embed = HookPoint()
        if cfg.two_token_streams:  # of codes, and of text
            self.hook_code_embed = HookPoint()
        self.hook_audio_embed = HookPoint()
        self.hook_embed = HookPoint()
        self.sources: dict[str, Path] = {}
        """Folders that the weights came from: ``model``, its components, ``lora``. The loader's."""
        self.pos_offset = 0
        """Positions already in the KV cache: axis 1 of a hooked tensor starts at this position."""
        self.setup()

    def _summary(self) -> Summary:
        cfg, n = self.cfg, sum(parameter.numel() for parameter in self.parameters())
        sizes = f"{len(self.reader.path)} blocks × {cfg.n_heads} heads ({cfg.n_key_value_heads} kv)"
        names = ("d_model", "d_head", "d_mlp", "d_vocab")
        widths = ", ".join(f"{name} {getattr(cfg, name)}" for name in names)
        dtype = str(cfg.dtype).removeprefix("torch.")
        facts = [
            ("decoder", f"{sizes}, {widths}, {cfg.attn_implementation}"),
            ("weights", f"{n / 1e6:.4g} M, {dtype}, {cfg.device}"),
            ("audio", "none" if self.audio is None else self._heard()),
        ]
        if len(self.stacks) > 1:
            facts.append(("heads", f"{', '.join(self.stacks)}; in use: {self.head}"))
        facts += [("path", self.part.blocks)] if self.part else []
        facts += [("adapter", str(cfg.adapter))] if cfg.adapter else []
        facts.append(("inside", "`hook_shapes()`: hook points; `print(model.blocks)`: modules"))
        title = f"HookedALM {cfg.model_name}: {cfg.original_architecture}"
        return Summary(title=title, facts=facts)

    def _heard(self) -> str:
        assert self.audio is not None
        tokens, name = self.audio.tokens, type(self.audio).__name__
        if tokens.seconds_per_token:
            name += f", {1 / tokens.seconds_per_token:.4g} positions per second"
        return name + (f", at most {tokens.max_seconds:g} s" if tokens.max_seconds else "")

    def switch_lora(self, on: bool, layers: Iterable[int | str] | None = None) -> None:
        """Let the adapter act, or not, until it is switched again.

        Off, the weights are the base model's, bit by bit; on, what merging makes of them.

        Args:
            on: whether it acts.
            layers: blocks of ``path`` by their number, or any by name, such as
                "audio.encoder.blocks.3"; None is all of the model.

        Raises:
            InputError: no adapter is kept apart, or none in one of the layers.
        """
        found = list(updates_of(self))
        names = [""]
        if layers is not None:
            names = [f"{one if isinstance(one, str) else self.path[one]}." for one in layers]
        if empty := [n for n in names if not any(name.startswith(n) for name, _ in found)]:
            raise InputError(
                f"switching LoRA: there is none to switch in {', '.join(empty) or 'the model'}. "
                "Load it with from_pretrained(..., lora=folder, merge_lora=False)."
            )
        with self.turn:
            for name, update in found:
                if name.startswith(tuple(names)):
                    update.is_on = on

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: Any = None,
        max_memory: Any = None,
        offload_folder: str | Path | None = None,
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        components: dict[str, str] | None = None,
        lora: str | Path | None = None,
        merge_lora: bool = True,
        **unknown: Any,
    ) -> "HookedALM":
        """Load a published checkpoint; see ``hooked_alm.converters.load_model`` for arguments.

        Weights are the checkpoint's, unlike HookedTransformer's default: folding norms would cost
        the equality with Hugging Face. ``process_weights_`` does it on request.

        Raises:
            ConversionError: a checkpoint that cannot be loaded; see ``load_model``.
            InputError: no such checkpoint, an option with a wrong value, or one that does not
                exist.
        """
        from hooked_alm.converters import load_model  # the one import that points back up

        options = {
            "dtype": dtype, "device": device, "device_map": device_map, "max_memory": max_memory,
            "offload_folder": offload_folder, "revision": revision,
            "attn_implementation": attn_implementation, "components": components, "lora": lora,
            "merge_lora": merge_lora,
        }  # fmt: skip
        if steps := unknown.keys() & inspect.signature(cls.process_weights_).parameters:
            raise InputError(
                f"loading a model: got {', '.join(sorted(steps))}, but weights are loaded as they "
                "are. Call `model.process_weights_(...)` with it afterwards."
            )
        refuse_unknown("loading a model", unknown, options)
        return load_model(name_or_dir, **options)

    def prepare(
        self,
        audio: Any = None,
        text: Any = None,
        *,
        conversation: Any = None,
        segments: Any = None,
        answer_prefix: Any = None,
        truncate: bool = False,
        **options: Any,
    ) -> ALMInput:
        """A prompt, or a left-padded batch of them, with the chat template applied.

        Args:
            audio: a file, ``bundled:NAME``, an array at the model's rate, ``(array, rate)``, or a
                clip from ``read_clip``; a list is one item per row, a nested list puts several
                clips into one prompt. Samples in a tensor that requires a gradient get one from
                the logits, through Whisper's spectrogram; the prompt serves one backward.
            text: the instruction, a string; a list is one per row.
            conversation: Hugging Face chat messages instead of audio and text; a list of lists is
                one conversation per row.
            segments: ``[(name, text), ...]`` instead of ``text``: names parts of the instruction as
                spans. A list of such lists is one per row.
            answer_prefix: text appended after the generation prompt; ``[(name, text), ...]`` names
                parts of it as spans.
            truncate: cut over-long audio instead of refusing it.
            options: of the family: Whisper has ``language``, ``task``, ``timestamps`` and
                ``long_form``.

        Raises:
            InputError: unusable audio, placeholders that do not fit the clips, a checkpoint
                without processor files, or options that its family does not have.
        """
        prompts = self._prompts()
        texts = text if isinstance(text, list | tuple) else [text]
        is_named = isinstance(answer_prefix, list | tuple) and all(
            isinstance(part, list | tuple) and len(part) == 2 for part in answer_prefix
        )
        prefixes = [one for part in answer_prefix for one in part] if is_named else [answer_prefix]
        given = {"text": texts, "answer_prefix": prefixes}
        if wrong := [k for k, v in given.items() if not all(isinstance(t, str | None) for t in v)]:
            raise InputError(
                f"preparing a prompt: got {', '.join(wrong)} that is no text. Give words"
                + ("; a list is one text per row." if "text" in wrong else ".")
            )
        if conversation is not None:
            if audio is not None or text is not None:
                raise InputError("preparing a prompt: give a conversation, or audio and text.")
            is_batch = bool(conversation) and not isinstance(conversation[0], dict)
            conversations: list[Conversation] = conversation if is_batch else [conversation]
            named = segments_by_row(segments, len(conversations))
        else:
            conversations, named = conversations_from(audio, text, segments)
        refuse_unknown("preparing a prompt", options, prompts.options)
        x = prompts.build(conversations, named, answer_prefix, truncate, self, **options)
        check_embedded(x.tokens, self.tokenizer, self.cfg.d_vocab)
        return self._placed(x)

    def read_clip(self, source: AudioSource, *, truncate: bool = False) -> AudioClip:
        """Read one clip for several prompts, so that it is encoded once.

        Raises:
            InputError: unusable audio, or a checkpoint without processor files.
        """
        return self._prompts().read_clip(source, truncate)

    def _prompts(self) -> PromptBuilder:
        if self.prompts is None and self.audio is None:
            raise InputError(
                f"preparing a prompt for {self.cfg.model_name!r}: it is a text model and hears no "
                "audio. Give it text or token ids directly, as in `model(text)`."
            )
        if self.prompts is None and self.audio is not None and self.audio.no_prompts:
            raise InputError(
                f"preparing a prompt for {self.cfg.model_name!r}: {self.audio.no_prompts}."
            )
        if self.prompts is None:
            raise InputError(
                f"preparing a prompt for {self.cfg.model_name!r}: its folder has no processor "
                "files (tokenizer, preprocessor_config.json, chat template). Add them, or use "
                "`encode` with what a processor returned."
            )
        return self.prompts

    def encode(self, **processor_output: Any) -> ALMInput:
        """An input from the arguments of the Hugging Face model's ``forward``.

        Raises:
            InputError: an argument that is no input (``labels``, ``past_key_values``), a missing
                one, ids that the vocabulary does not have, or placeholders that do not fit the
                audio.
        """
        name = "input_ids" if self.audio is None else f"{self.audio.argument_prefix}input_ids"
        if (ids := processor_output.get(name)) is not None:
            # Some families have ids of several channels.
            n_axes = (2,) if self.audio is None else (2, 3)
            processor_output[name] = token_ids(ids, n_axes)
        from_hf = text_input if self.audio is None else self.audio.input_from_hf
        x = from_hf(**processor_output)
        self.embed.check(x.tokens)
        if x.text_tokens is not None:
            self.embed.check(x.text_tokens)
        return self._placed(x)

    def _placed(self, x: ALMInput) -> ALMInput:
        """An input where the weights are, refused if it has more positions than are embedded."""
        if self.pos_embed is not None:
            self.pos_embed.check(x.position_ids)
        return x.to(self.cfg.device)

    def hf_arguments(self, x: ALMInput) -> dict[str, Any]:
        """Arguments of Hugging Face's ``forward`` for the same prompts; undoes ``encode``."""
        prefix = "" if self.audio is None else self.audio.argument_prefix
        arguments = {
            f"{prefix}input_ids": x.tokens,
            f"{prefix}attention_mask": x.attention_mask,
            f"{prefix}position_ids": x.position_ids,
        }
        if self.audio is None:
            return arguments
        if x.memory is not None:
            return {**arguments, "encoder_outputs": (x.memory,)}
        heard = self.audio.hf_arguments(x.clips) if x.clips else {}
        return {**arguments, **self.audio.hf_prompt(x), **heard}

    @in_turn
    def forward(
        self,
        input: ModelInput | Resid,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        inputs: ModelInput | None = None,
        past_key_values: Any = None,
        memory: Float[Tensor, "batch memory_pos d_model"] | None = None,
        loss_per_token: bool = False,
        head: str | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        **refused: Any,
    ) -> FullLogits | Resid | Float[Tensor, "..."] | Output | None:
        """Run the decoder.

        Args:
            input: a prompt; with ``start_at_layer`` a residual stream instead.
            return_type: "logits"; "loss", the mean next-token cross-entropy over real text, which
                never scores audio placeholders; "both"; or None to run without unembedding.
            start_at_layer: block to resume at; earlier ones do not run. Negative ones count from
                the end; ``n_layers`` is after the last block.
            stop_at_layer: block to stop before; the residual stream there is returned.
                Layers count along ``path``.
            inputs: with ``start_at_layer``, the prompt that mask and positions come from; without
                it, unpadded positions 0, 1, ...
            past_key_values: transformers ``Cache``; the positions it already holds are not run.
                With cross-attention an ``EncoderDecoderCache``, which keeps the memory, too.
            memory: what cross-attention reads, instead of what the encoder makes of the clips.
            loss_per_token: losses ``[batch, pos - 1]`` instead of their mean; see ``loss_fn``.
            head: name of the head whose logits are returned; None is the head in use. The branch of
                another head runs only if one of its points is hooked.
            attention_mask: with ids alone: 1 at real positions, 0 at pads.
            prepend_bos: for text; see ``to_tokens``.
            padding_side: "left", where texts are padded.
            refused: arguments of HookedTransformer that have another name here, or no meaning.

        Returns:
            Logits ``[batch, pos, vocab]``, a scalar loss, an ``Output`` of both, or the residual
            stream ``[batch, pos, d_model]``.

        Raises:
            InputError: a layer that does not exist, embeddings without ``start_at_layer``, audio
                placeholders without their audio, what ``to_input`` refuses, or an argument that
                does not exist.
        """
        refuse_forward_arguments(return_type, past_key_values, refused)
        reading: dict[str, Any] = {"attention_mask": attention_mask, "prepend_bos": prepend_bos,
                   "padding_side": padding_side}  # fmt: skip
        if self.part is not None and (start_at_layer, stop_at_layer) != (None, None):
            raise InputError(
                f"running some blocks: the path is that of {self.part.blocks}, which run whole. "
                f"Use model.towards({self.head!r})."
            )
        if self.part is not None or head not in (None, self.head):
            return self.towards(head or self.head).forward(
                input, return_type, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer,
                inputs=inputs, past_key_values=past_key_values, memory=memory,
                loss_per_token=loss_per_token, **reading,
            )  # fmt: skip
        layers = self._layers(start_at_layer, stop_at_layer)
        if start_at_layer is None:
            if isinstance(input, Tensor) and input.is_floating_point() and input.ndim == 3:
                raise InputError(
                    "running the model on embeddings: say at which block they enter, with "
                    "start_at_layer (0 for embeddings)."
                )
            x = self._with_memory(self.to_input(input, **reading), memory, past_key_values)
            n_past = 0 if past_key_values is None else past_key_values.get_seq_length()
            self.pos_offset = n_past
            resid = self._embed(x, n_past)
        else:
            resid, x = self._resume(input, inputs, reading)
            x = self._with_memory(x, memory, past_key_values)
        ways = self._hooked_ways() if stop_at_layer is None else {}
        path = self.path[layers.start : layers.stop]
        off = [name for some in ways.values() for way in some for name in way[:-2]]
        contexts = self._contexts([*path, *off], x, resid, past_key_values)
        if start_at_layer is None:
            self._run_ways(ways.get(0, ()), resid, contexts)
        for layer, name in zip(layers, path, strict=True):
            resid = self.get_submodule(name)(resid, contexts[name])
            self._run_ways(ways.get(layer + 1, ()), resid, contexts)
        if stop_at_layer is not None:
            return resid
        normalized = self.head_norm(resid)
        if return_type is None:
            return None
        logits = self.head_unembed(normalized)
        if return_type == "logits":
            return logits
        loss = self.loss_fn(logits, x, loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def _resume(
        self, input: ModelInput | Resid, inputs: ModelInput | None, reading: dict[str, Any]
    ) -> tuple[Resid, ALMInput]:
        """The stream that a block reads, and the prompt it is of."""
        if not (isinstance(input, Tensor) and input.is_floating_point()):
            raise InputError("resuming at a block: give the residual stream it reads.")
        if given := [name for name, value in reading.items() if value is not None]:
            raise InputError(
                f"resuming at a block: got {', '.join(given)}, which a residual stream has no use "
                "for. Give the prompt it is of as `inputs`, with its mask."
            )
        x = unpadded_input(input) if inputs is None else self.to_input(inputs)
        expected = [*x.shape, self.cfg.d_model]
        if list(input.shape) != expected or input.dtype != self.cfg.dtype:
            raise InputError(
                f"resuming at a block: got a {str(input.dtype).removeprefix('torch.')} stream "
                f"{list(input.shape)}, expected {str(self.cfg.dtype).removeprefix('torch.')} "
                f"{expected}, [batch, pos, d_model] of the prompt."
            )
        self.pos_offset = 0
        # A copy: hooks may write in place, and the caller's tensor may be of a cache.
        return self._graph_root(input.clone()), x

    def _with_memory(self, x: ALMInput, given: Tensor | None, cache: Any) -> ALMInput:
        """A prompt with what its cross-attention reads, if it is still to be read.

        Raises:
            InputError: a memory that is none, or none for every prompt; a cache of another kind.
        """
        if not self.cfg.cross_attention:
            if given is not None or x.memory is not None:
                raise InputError(
                    f"running {self.cfg.model_name!r} with a memory: it has no cross-attention "
                    "that could read one. Leave it out."
                )
            return x
        if cache is not None:
            if not hasattr(cache, "cross_attention_cache"):
                raise InputError(
                    f"running {self.cfg.model_name!r} with a {type(cache).__name__}: expected an "
                    "EncoderDecoderCache of transformers, which keeps the memory's keys, too."
                )
            if all(cache.is_updated.get(block.attn.layer_idx) for block in self.all_blocks()):
                return replace(x, memory=None)
        memory = x.memory if given is None else given
        if memory is None:
            assert self.audio is not None
            if [*x.clip_rows] != [*range(len(x))]:
                per_row = [[*x.clip_rows].count(row) for row in range(len(x))]
                raise InputError(
                    f"hearing the prompts: they have {per_row} clips, expected one each, which is "
                    "all that the decoder reads. Make them with `prepare` or `encode`, or give "
                    "memory=, the states that an encoder has made."
                )
            memory = self.audio.heard(x)
        check_memory(memory, len(x), self.cfg.d_model)
        memory = memory.to(self.cfg.device, self.cfg.dtype)
        if given is not None or x.memory is not None:
            memory = memory.clone()  # hooks may write in place, and it is the caller's
        return replace(x, memory=self.hook_audio_embed(self._graph_root(memory)))

    def _encoder_stack(self) -> Stack:
        """The stack of the hooked encoder.

        Raises:
            InputError: there is none, or its last state is not what is heard.
        """
        name = self.cfg.model_name
        encoder = None if self.audio is None else self.audio.hooked_encoder
        if encoder is None or self.audio is None:
            raise InputError(
                f"reaching into the encoder of {name!r}: "
                + ("it hears nothing." if self.audio is None else "its blocks are not hooked.")
                + " `hooked-alm models` says which families' are."
            )
        norm = f"{ENCODER}ln_final"
        if reason := self.audio.unfireable(norm):
            raise InputError(
                f"sweeping along the encoder of {name!r}: {reason}. Edit it by hooks, with "
                "`run_with_hooks`."
            )
        return Stack(
            blocks=f"{ENCODER}blocks", n_layers=encoder.cfg.n_layers, norm=norm, reach="own chunk",
            chunk=encoder.cfg.n_ctx,
        )  # fmt: skip

    def encoder_rows(self, x: ModelInput) -> EncoderRows:
        """Rows of the hooked audio encoder in which the clips of some prompts are heard.

        Raises:
            InputError: no clips, or no encoder whose blocks are hooked.
        """
        self.towards("encoder")  # which says why there is none
        if isinstance(x, ALMInput) and x.memory is not None:
            raise InputError(
                "reaching into the audio encoder: the prompts have a memory instead of what it "
                "makes of clips. Give the clips."
            )
        assert self.audio is not None
        with self.turn.running():
            return EncoderRows.of(self.audio, self.to_input(x))

    def positions_of(self, x: ALMInput) -> ALMInput:
        """Positions of some prompts along the path in use: their own, or rows of the encoder."""
        return x if self.part is None else self.encoder_rows(x).prompts

    @in_turn
    def embed_heard(
        self, x: ALMInput, heard: Float[Tensor, "cell heard d_model"]
    ) -> Float[Tensor, "cell pos d_model"]:
        """The stream that enters the first block if clips were heard otherwise, in many cells.

        Args:
            x: one prompt.
            heard: embeddings of all of its clips, in order.
        """
        return self._embed(x, heard=heard)

    def _embed(self, x: ALMInput, n_past: int = 0, heard: Tensor | None = None) -> Resid:
        """Embed the tokens after the first ``n_past`` and merge the audio in."""
        tokens = x.tokens[:, n_past:]
        if is_hooked(self.hook_tokens):
            replaced = tap(self.hook_tokens, tokens.clone())
            tokens = tokens if replaced is None else replaced
        embed = self.embed(tokens)
        if self.audio is not None:
            embed = self.audio.read_text(x, tokens, embed)
        first = self.hook_code_embed if self.cfg.two_token_streams else self.hook_text_embed
        resid = first(self._graph_root(embed))
        if self.audio is not None and not self.cfg.cross_attention:
            resid = self._merge_audio(x, tokens, resid, heard)
        if x.text_tokens is not None:
            text = self.embed(x.text_tokens[:, n_past:])
            resid = resid + self.hook_text_embed(self._graph_root(text))
        if self.cfg.embedding_multiplier != 1:
            resid = resid * self.cfg.embedding_multiplier
        resid = self._graph_root(self.hook_embed(self._graph_root(resid)))
        if self.pos_embed is not None:
            places = self.pos_embed(x.position_ids[:, n_past:])
            resid = resid + self.hook_pos_embed(self._graph_root(places))
        return resid

    def _graph_root(self, value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Let gradients reach this far if a backward hook waits for them anywhere.

        Frozen weights, reused audio embeddings and what a hook puts in their place have none, and
        the backward hook would never fire.
        """
        if value.requires_grad or not torch.is_grad_enabled():
            return value
        if not any(point.bwd_hooks for point in self.hook_dict.values()):
            return value
        # A view, since the tensor may be a user's; a copy, since no hook may write into a leaf.
        return value.detach().requires_grad_().clone()

    def _merge_audio(
        self, x: ALMInput, tokens: TokenIds, text_embed: Resid, heard: Tensor | None
    ) -> Float[Tensor, "_batch pos d_model"]:
        assert self.audio is not None
        n_past = x.shape[1] - tokens.shape[1]
        is_audio = x.spans.heard[:, n_past:]
        placeholder = self.audio.tokens.placeholder
        if placeholder is not None and not x.clips and (tokens == placeholder).any():
            raise InputError(
                f"running the model: the prompt has {int((tokens == placeholder).sum())} audio "
                "placeholders but no audio. Make the input with `prepare` or `encode`, and pass "
                "it whole."
            )
        if not is_audio.any():  # on the CPU: nothing waits for an accelerator
            return text_embed
        is_audio = is_audio.to(tokens.device)
        if placeholder is not None and not (tokens[is_audio] == placeholder).all():
            raise InputError(
                "merging audio: a hook on hook_tokens changed audio placeholders. It must leave "
                "them alone; audio is edited at hook_audio_embed."
            )
        if heard is not None:
            features = heard.flatten(0, 1).to(text_embed.device, text_embed.dtype)
            one, where = (
                part.expand(len(heard), *part.shape[1:]) for part in (text_embed, is_audio)
            )
            return self.audio.merge(one, where, features)
        embeddings = self.hook_audio_embed(self._graph_root(self.audio.heard(x)))
        n_tokens = torch.tensor([clip.n_tokens for clip in x.clips], device=embeddings.device)
        is_token = torch.arange(embeddings.shape[1], device=embeddings.device) < n_tokens[:, None]
        features = embeddings[is_token].to(text_embed.device, text_embed.dtype)
        if n_past:
            where = x.spans.heard.nonzero()[:, 1]
            features = features[where.to(features.device) >= n_past]
        return self.audio.merge(text_embed, is_audio, features)

    def _contexts(
        self, blocks: Sequence[str], x: ALMInput, resid: Resid, cache: Any
    ) -> dict[str, AttentionContext]:
        """Attention contexts of every block that runs, by its name."""
        positions = x.position_ids[..., x.shape[1] - resid.shape[1] :].to(resid.device)
        along = positions if positions.ndim == 2 else None

        explicit = any(block.attn.needs_scores for block in self.all_blocks())
        rotary = None if self.rotary is None else self.rotary(positions, resid.dtype)
        keeps_memory = self.cfg.cross_attention and cache is not None

        def context(stack: Stack) -> AttentionContext:
            def masks(implementation: str) -> dict[LayerType, Any]:
                return attention_masks(
                    self.cfg, stack, implementation, x.attention_mask, along, resid, cache
                )

            return AttentionContext(
                rotary=rotary,
                kernel_masks=masks(self.cfg.attn_implementation),
                additive_masks=masks("eager") if explicit else {},
                cache=cache.self_attention_cache if keeps_memory else cache,
                memory=x.memory,
                memory_cache=cache if keeps_memory else None,
            )

        # All before the run: a block that updates the cache changes what the mask would be. Stacks
        # whose rows see alike share theirs.
        stacks = {name: self._stack_of(name) for name in blocks}
        alike = {(one.reach, one.chunk): one for one in stacks.values()}
        made = {reach: context(stack) for reach, stack in alike.items()}
        return {name: made[one.reach, one.chunk] for name, one in stacks.items()}

    def to(self, *args: Any, **kwargs: Any) -> "HookedALM":
        """Move or cast the weights; see ``torch.nn.Module.to``.

        Raises:
            InputError: there is no such device.
        """
        target = kwargs.get("device", args[0] if args else None)
        if isinstance(target, str | torch.device | int):
            check_device("moving the model to", target)
        super().to(*args, **kwargs)
        return self

    def cuda(self, device: torch.device | int | None = None) -> "HookedALM":
        """Move the weights to a GPU; see ``to``."""
        return self.to("cuda" if device is None else device)

    def mps(self) -> "HookedALM":
        """Move the weights to an Apple GPU; see ``to``."""
        return self.to("mps")

    def _apply(self, fn: Any, recurse: bool = True) -> "HookedALM":
        """Keep ``cfg`` true under ``.to()``, ``.bfloat16()`` and their kin."""
        if self.is_spread:
            raise InputError(
                "moving or casting a model whose device_map spreads it: got modules that run where "
                "they were placed, expected a model in one piece. Load it with the device_map and "
                "the dtype that it is to have."
            )
        with self.turn:
            super()._apply(fn, recurse)
        self.cfg.dtype, self.cfg.device = self.embed.weight.dtype, self.embed.weight.device
        return self

    @property
    def is_spread(self) -> bool:
        """Whether a device_map keeps the weights on several devices, or off them."""
        return hasattr(self, "hf_device_map")

    @in_turn
    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Iterable[Hook] = (),
        bwd_hooks: Iterable[Hook] = (),
        **kwargs: Any,
    ) -> Any:
        """Run with hooks attached for this run; see ``HookedRootModule.run_with_hooks``.

        Raises:
            HookNameError: a name that matches nothing, that cannot fire, or that the run does not
                reach because of ``start_at_layer`` or ``stop_at_layer``.
            InputError: something else than pairs of a name and a hook.
        """
        fwd_hooks = hook_pairs(fwd_hooks, "fwd_hooks")
        bwd_hooks = hook_pairs(bwd_hooks, "bwd_hooks")
        part = {name: kwargs.get(name) for name in ("start_at_layer", "stop_at_layer")}
        left_out = self._left_out(*part.values())
        for name, _ in (*fwd_hooks, *bwd_hooks):
            if isinstance(name, str) and name.startswith(left_out):
                raise HookNameError(
                    f"hooking {name!r}: got {', '.join(f'{k}={v}' for k, v in part.items())}, a "
                    "run that does not reach it. Hook a point of the blocks that run, or run more."
                )
        return super().run_with_hooks(*args, fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks, **kwargs)

    @in_turn
    def run_with_cache(
        self,
        *args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run, and keep what passed the hook points.

        Takes the arguments of ``HookedRootModule.run_with_cache``, ``names_filter`` first among
        them: None, a name, an iterable of names, or a predicate.

        Returns:
            The model's output, and an ``ActivationCache`` (or a plain dict). Of a model over
            several devices the cache is on that of the embedding, if no ``device`` is given; a
            dict keeps activations where they were made.

        Raises:
            HookNameError: a name that matches nothing or cannot fire.
        """
        if remove_batch_dim and args and len(args[0]) != 1 and not isinstance(args[0], str):
            raise InputError(
                f"removing the batch axis: the input has {len(args[0])} rows, expected one. Leave "
                "remove_batch_dim out."
            )
        if return_cache_object and self.is_spread and kwargs.get("device") is None:
            kwargs["device"] = self.cfg.device  # its methods add activations of all blocks up
        output, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return output, cache
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def unfireable(self, name: str) -> str | None:
        """Points that exist on every model of the class but cannot fire on this one."""
        cfg = self.config_of(name)
        if name.endswith("hook_attn_in") and cfg.n_groups > 1:
            return (
                f"query heads and kv heads differ in number ({cfg.n_heads} and "
                f"{cfg.n_key_value_heads}); use hook_q_input, hook_k_input, hook_v_input"
            )
        if self.audio is not None and (reason := self.audio.unfireable(name)):
            return reason
        if name == "hook_audio_embed" and self.audio is None and not cfg.cross_attention:
            return "the model has no audio front-end"
        if cfg.attn_implementation.startswith("flash") and "key_pos" in point_of(name).axes:
            return "flash attention takes no explicit mask; load with attn_implementation='sdpa'"
        return None

    def hook_shapes(self) -> dict[str, str]:
        """Axes of every point that can fire, sizes filled in where the config fixes them."""
        shapes = {}
        for name in self.hook_dict:
            if name not in self.aliases and not self.unfireable(name):
                cfg = self.config_of(name)
                sizes = {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads,
                         "d_head": cfg.d_head, "d_mlp": cfg.d_mlp, "d_model": self.cfg.d_model,
                         "vocab": self.cfg.d_vocab}  # fmt: skip
                if cfg is not self.cfg:
                    sizes["d_audio"] = cfg.d_model
                axes = point_of(name).axes.split()
                shapes[name] = " ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes)
        return shapes

    def config_of(self, name: str) -> StackConfig:
        """Config of the stack that a hook point belongs to."""
        encoder = None if self.audio is None else self.audio.hooked_encoder
        is_inside = encoder is not None and name.startswith(ENCODER)
        return encoder.cfg if encoder is not None and is_inside else self.cfg
