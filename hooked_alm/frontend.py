"""Front-ends: from audio clips to embeddings in the residual stream.

A family brings its audio encoder and projector as a ``FrontEnd``: a ``HookedEncoder`` where it is
of Whisper's type, and what else there is as Hugging Face wrote it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .audio import Waveform
from .components.lora import updates_of
from .encoder import HookedEncoder, WindowPart, halved
from .errors import InputError
from .hooks import HookPoint
from .inputs import ALMInput, AudioClip, WeightsVersion, positions_from_mask
from .offload import home_of
from .spans import AudioTokens, clip_ranges, span_flags, span_map
from .turns import restored


class Windows(NamedTuple):
    """Pieces of recordings, as the encoder takes them. Most models hear a clip in one."""

    features: Shaped[Tensor, "window feature frame"]
    n_frames: Int[Tensor, " window"]
    """Number of frames that are not padding."""
    place: Int[Tensor, " window"]
    """Index of a window among the pieces of its clip."""
    width: Int[Tensor, " window"]
    """Number of frames that its features came with; those beyond pad it to the widest."""


class _CaughtError(Exception):
    """What an encoder was about to run on."""


class FrontEnd(nn.Module, ABC):
    """Audio encoder and projector of one family.

    Hook points, on demand: ``hook_encoder_in [window, mel, frame]``, ``hook_encoder_out`` and
    ``hook_projector_in [window, audio_pos, d_audio]``, ``hook_projector_out [window, audio_pos,
    d_model]``. A window is a clip, or the piece of a long clip that the encoder hears at a time.
    Positions beyond a window's ``n_tokens`` are padding.
    """

    reads_padding: bool = True
    """Whether embeddings of a clip can depend on the encoder's states beyond its end, also where
    nothing attends to these."""
    depends_on_longest: bool = False
    """Whether embeddings of a clip depend on the longest that is encoded together with it, by more
    than rounding, as in the published code."""
    is_memory: bool = False
    """Whether cross-attention reads a clip, one for each prompt, of which it fills no position."""
    no_prompts: str = ""
    """Why prompts cannot be made of recordings and words; empty where processor files do it."""
    argument_prefix: str = ""
    """Beginning of the names that the family's ``forward`` has for ids, mask and positions."""
    in_float32: tuple[str, ...] = ()
    """Parameters that Hugging Face leaves in float32, whatever the dtype of the others."""

    def __init__(self, tokens: AudioTokens) -> None:
        """Keep the marks of audio in the prompt."""
        super().__init__()
        self.tokens = tokens
        self.special_ids: frozenset[int] = frozenset()
        """Ids that are no text; known once there is a tokenizer."""
        self.hook_encoder_in = HookPoint()
        self.hook_encoder_out = HookPoint()
        self.hook_projector_in = HookPoint()
        self.hook_projector_out = HookPoint()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def _apply(self, fn: Any, recurse: bool = True) -> "FrontEnd":
        """Keep ``in_float32`` and computed tables unchanged under ``.to(bfloat16)`` and its kin."""
        computed = [
            (part, leaf) for part in self.modules() for leaf in part._non_persistent_buffers_set
        ]
        named = [name.rpartition(".") for name in self.in_float32]
        exact = [
            (part, leaf, value.detach())
            for part, leaf in (*computed, *((self.get_submodule(p), leaf) for p, _, leaf in named))
            if (value := getattr(part, leaf)) is not None
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part, leaf, value in exact:
            cast = getattr(part, leaf)
            if cast.dtype != value.dtype:
                cast.data = value.to(cast.device)
        return self

    @property
    def hooked_encoder(self) -> HookedEncoder | None:
        """The module ``encoder``; None where the family has another, Hugging Face's own."""
        found = self._modules.get("encoder")
        return found if isinstance(found, HookedEncoder) else None

    def unfireable(self, name: str) -> str | None:
        """Why a point of the model cannot fire with this front-end, or None."""
        return None

    @property
    @abstractmethod
    def feature_shape(self) -> tuple[int, int]:
        """Shape ``(mel, frame)`` of a window: the most frames that it holds, padding included."""

    @abstractmethod
    def n_tokens(self, n_frames: int) -> int:
        """Positions that a window of ``n_frames`` frames fills: of the prompt, or of the memory."""

    def n_states(self, n_frames: int) -> int:
        """States of the hooked encoder that hear a window of ``n_frames`` frames."""
        found: int = halved(n_frames)
        return found

    @abstractmethod
    def encode(self, windows: Windows) -> Float[Tensor, "window audio_pos d_model"]:
        """Run encoder and projector, past the hook points."""

    @abstractmethod
    def input_from_hf(self, **processor_output: Any) -> ALMInput:
        """An input from the arguments of the family's Hugging Face ``forward``."""

    @abstractmethod
    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Any]:
        """Arguments of the family's ``forward`` that bring clips; undoes ``input_from_hf``."""

    def hf_prompt(self, x: ALMInput) -> dict[str, Tensor]:
        """Arguments of a prompt besides ids, mask and positions; most families need none."""
        return {}

    def clip(
        self,
        features: Shaped[Tensor, "window feature frame"],
        n_frames: Sequence[int],
        **about: Any,
    ) -> AudioClip:
        """A clip of some windows; it copies nothing.

        Raises:
            InputError: too short for one audio position, or with features that are not finite.
        """
        n_tokens = sum(self.n_tokens(n) for n in n_frames)
        if n_tokens < 1:
            raise InputError(
                f"hearing {about.get('name', 'a clip')}: {sum(n_frames)} frames are too short for "
                "one audio position. Give a longer clip."
            )
        if not torch.isfinite(features).all():
            raise InputError(
                f"hearing {about.get('name', 'a clip')}: got features that are NaN or infinite, "
                "expected finite ones. Check its samples, and the feature extractor's settings."
            )
        return AudioClip(features=features, n_frames=(*n_frames,), n_tokens=n_tokens, **about)

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Features of a recording, and the frames of each window that are not padding.

        The base class makes one window, padded to the extractor's full length.
        """
        extracted = extractor(
            [waveform.samples],
            sampling_rate=waveform.sampling_rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return extracted["input_features"], [int(extracted["attention_mask"].sum())]

    def clips_of(
        self,
        features: Shaped[Tensor, "clip feature frame"] | None,
        mask: Int[Tensor, "clip frame"] | None,
    ) -> list[AudioClip]:
        """Clips of one window each, from what a processor returns.

        Raises:
            InputError: features without their mask, or the other way round.
        """
        if features is None and mask is None:
            return []
        if features is None or mask is None:
            raise InputError(
                "encoding a processor's output: the audio features and their mask belong "
                "together; without the mask, padding would be heard as silence."
            )
        # Of its own memory: a view would keep, and pickle, the features of all.
        return [
            self.clip(one.clone()[None], [n], name=f"clip {i}")
            for i, (one, n) in enumerate(zip(features, mask.sum(-1).tolist(), strict=True))
        ]

    def features_and_mask(
        self, clips: Sequence[AudioClip]
    ) -> tuple[Shaped[Tensor, "window feature frame"], Int[Tensor, "window frame"]]:
        """Windows of all clips, padded to the longest, and 1 at frames that are not padding."""
        longest = max(clip.features.shape[-1] for clip in clips)
        features = torch.cat(
            [F.pad(clip.features, (0, longest - clip.features.shape[-1])) for clip in clips]
        )
        n_frames = torch.tensor([n for clip in clips for n in clip.n_frames])
        return features, frame_mask(n_frames, longest)

    def random_clip(self, n_frames: int, generator: torch.Generator) -> AudioClip:
        """A clip of noise, for tests and ``verify``: as many windows as the frames need."""
        n_feature, most = self.feature_shape
        sizes = [min(most, n_frames - start) for start in range(0, n_frames, most)]
        features = torch.randn(len(sizes), n_feature, most, generator=generator)
        return self.clip(features, sizes, name="noise")

    def prompt_ids(self, clip: AudioClip) -> list[int]:
        """Ids that stand for a clip in the prompt: its placeholder, once per audio position.

        Where there is none, any id will do: none of the embeddings is used.
        """
        return [self.tokens.placeholder or 0] * clip.n_tokens

    def read_text(
        self,
        x: ALMInput,
        tokens: Int[Tensor, "batch pos"],
        embed: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Embeddings of the tokens that run, the last of ``x``, before clips are merged in.

        A family that refuses some prompts, or has embeddings of its own for some tokens, says so
        here.
        """
        return embed

    def merge(
        self,
        embed: Float[Tensor, "batch pos d_model"],
        is_audio: Bool[Tensor, "batch pos"],
        features: Float[Tensor, "heard d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Token embeddings with those of the clips in their places, in order."""
        return embed.masked_scatter(is_audio.unsqueeze(-1), features)

    def heard(self, x: ALMInput) -> Float[Tensor, "clip audio_pos d_model"]:
        """Embeddings of an input's clips; see `embed_clips`."""
        if not x.hears_apart or self._is_hooked():
            return self.embed_clips(x.clips)
        rows = groupby(zip(x.clip_rows, x.clips, strict=True), key=lambda one: one[0])
        apart = (self.embed_clips([clip for _, clip in row]) for _, row in rows)
        return pad_sequence([one for row in apart for one in row], batch_first=True)

    def embed_clips(self, clips: Sequence[AudioClip]) -> Float[Tensor, "clip audio_pos d_model"]:
        """Embeddings of the clips, each encoded once and then reused; the result is a copy.

        Clips are encoded together, without gradient, a repeated one only once. An encoding
        is kept with the clip and reused wherever the same clips come together, so that results do
        not depend on what ran before. While an ``audio.*`` point, or a module of the encoder, is
        hooked, or where a clip's features have a gradient, everything is encoded afresh, and
        nothing is kept.
        """
        if self._is_hooked() or any(clip.features.requires_grad for clip in clips):
            return pad_sequence(self._encode(clips), batch_first=True)
        version = self._weights_version()
        distinct = list(dict.fromkeys(clips))  # by identity: one clip may be heard in several rows
        frames = tuple((*clip.n_frames, clip.features.shape[-1]) for clip in distinct)
        known = [clip.encodings(self, version) for clip in distinct]
        if any((frames, index) not in encodings for index, encodings in enumerate(known)):
            # Kept for later runs, with gradients or without.
            with torch.inference_mode(False), torch.no_grad():
                together = self._encode(distinct)
            for index, encodings in enumerate(known):
                encodings[frames, index] = together[index].clone()
        at = {clip: index for index, clip in enumerate(distinct)}
        embeddings = [known[at[clip]][frames, at[clip]] for clip in clips]
        return pad_sequence(embeddings, batch_first=True)

    def _weights_version(self) -> WeightsVersion:
        """Key that changes with weights: replaced, moved, cast, written to, or LoRA switched.

        Buffers are weights here. Writing through ``.data`` leaves no trace but the values, so that
        all of these are read.
        """
        # What a device_map keeps elsewhere cannot be written to.
        tensors = [t for t in (*self.parameters(), *self.buffers()) if not t.is_meta]
        switches = tuple(update.is_on for _, update in updates_of(self))
        traces = ((t.data_ptr(), t._version, t.dtype) for t in tensors)
        return (*traces, switches, checksum(tensors))

    def _is_hooked(self) -> bool:
        # Hook points are modules, and their hooks PyTorch's.
        return any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in self.modules()
        )

    def embed_states(
        self, clips: Sequence[AudioClip], states: Float[Tensor, "window pos d_audio"], n_cells: int
    ) -> Float[Tensor, "cell heard d_model"]:
        """Embeddings of a prompt's clips, if some states had left the hooked encoder's last block.

        Args:
            clips: clips of the prompt, in order.
            states: states of their windows in every cell, as the encoder's points show them.
            n_cells: number of cells.
        """
        assert self.hooked_encoder is not None
        windows = self._windows(clips)
        in_cells = (part.repeat(n_cells, *[1] * (part.ndim - 1)) for part in windows)
        with self.hooked_encoder.resumed(states):
            embedded = self.encode(Windows(*in_cells)).unflatten(0, (n_cells, -1))
        n_tokens = [self.n_tokens(n) for clip in clips for n in clip.n_frames]
        return torch.cat([embedded[:, i, :n] for i, n in enumerate(n_tokens)], dim=1)

    def parts(self, clips: Sequence[AudioClip]) -> list[list[list[WindowPart]]]:
        """Parts by clip and window: where the hooked encoder's states have clips heard together.

        The encoder itself does not run.

        Raises:
            InputError: the clips do not pass the encoder.
        """
        assert self.hooked_encoder is not None

        def catch(encoder: HookedEncoder, args: Any) -> None:
            raise _CaughtError(args)

        # What the encoder would be given is the family's to say, so it is asked.
        handle = self.hooked_encoder.register_forward_pre_hook(catch)
        with restored(handle.remove):
            try:
                self._encode(clips)
            except _CaughtError as caught:
                windows = iter(self.hooked_encoder.parts(*caught.args[0]))
            else:
                raise InputError(
                    "reaching into the audio encoder: these clips do not run it, since they came "
                    "as what it has made of them before. Encode the spectrograms."
                )
        return [[next(windows) for _ in clip.n_frames] for clip in clips]

    def _encode(self, clips: Sequence[AudioClip]) -> list[Float[Tensor, "_audio_pos d_model"]]:
        """Embeddings of each clip, its windows joined."""
        windows = self._windows(clips)
        features = windows.features
        backward_hooks = (m._backward_hooks or m._backward_pre_hooks for m in self.modules())
        if torch.is_grad_enabled() and features.is_floating_point() and any(backward_hooks):
            # Also where the encoder is frozen. A copy: hooks may not write into a leaf.
            windows = windows._replace(features=features.requires_grad_().clone())
        n_tokens = [self.n_tokens(n) for clip in clips for n in clip.n_frames]
        heard = zip(self.encode(windows), n_tokens, strict=True)
        parts = iter([embedded[:n] for embedded, n in heard])
        return [torch.cat([next(parts) for _ in clip.n_frames]) for clip in clips]

    def _windows(self, clips: Sequence[AudioClip]) -> Windows:
        """Windows of some clips, one clip after the other, where the weights are."""
        device = home_of(self)
        features, mask = (part.to(device) for part in self.features_and_mask(clips))
        place = [i for clip in clips for i in range(len(clip.n_frames))]
        width = [clip.features.shape[-1] for clip in clips for _ in clip.n_frames]
        return Windows(
            features, mask.sum(-1), torch.tensor(place, device=device), torch.tensor(width)
        )

    def input_from_features(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        position_ids: Int[Tensor, "*axis batch pos"] | None,
        clips: Sequence[AudioClip],
        is_audio: Bool[Tensor, "batch pos"] | None = None,
        is_text: Bool[Tensor, "batch pos"] | None = None,
        **more: Any,
    ) -> ALMInput:
        """Ids and clips, brought together.

        Ids alone do not tell the instruction from the template, so every token that is neither
        audio nor special counts as ``text``.

        Args:
            tokens: ids with every placeholder expanded.
            attention_mask: 1 at real positions.
            position_ids: None counts real positions.
            clips: clips of all rows, in order.
            is_audio: where clips are heard; None is wherever the placeholder stands.
            is_text: where the instruction is; None is wherever no special token stands.
            more: further fields of the input.

        Raises:
            InputError: the audio positions of a row do not fit its clips.
        """
        where = is_audio
        if where is None:
            nowhere = torch.zeros_like(tokens, dtype=torch.bool)
            placeholder = self.tokens.placeholder
            where = nowhere if placeholder is None else tokens == placeholder
        rows = [*range(len(clips))] if self.is_memory else _rows_of_clips(where, clips)
        heard = where.tolist()
        if is_text is None:
            words = [[i not in self.special_ids for i in ids] for ids in tokens.tolist()]
        else:
            words = is_text.tolist()
        flags = [
            span_flags(
                mask,
                text,
                is_audio=audio,
                is_marker=[i in self.tokens.markers for i in ids],
            )
            for ids, mask, audio, text in zip(
                tokens.tolist(), attention_mask.tolist(), heard, words, strict=True
            )
        ]
        ranges = [
            clip_ranges(
                audio, [c.n_tokens for c, owner in zip(clips, rows, strict=True) if owner == row]
            )
            for row, audio in enumerate(heard)
            if not self.is_memory
        ]
        return ALMInput(
            tokens=tokens,
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask)
            if position_ids is None
            else position_ids,
            spans=span_map(flags, tokens.shape[1], self.tokens.seconds_per_token, ranges),
            clips=tuple(clips),
            clip_rows=tuple(rows),
            **more,
        )


def frame_mask(n_frames: Int[Tensor, " window"], length: int) -> Int[Tensor, "window frame"]:
    """Mask of frames: 1 at those that are not padding."""
    return (torch.arange(length, device=n_frames.device) < n_frames[:, None]).long()


def unpack(
    packed: Float[Tensor, "frame d"], sizes: Sequence[int]
) -> Float[Tensor, "window longest d"]:
    """Windows that an encoder runs as one sequence, apart and padded with zeros."""
    return pad_sequence(list(packed.split(list(sizes))), batch_first=True)


def pack(
    padded: Float[Tensor, "window longest d"], sizes: Sequence[int]
) -> Float[Tensor, "frame d"]:
    """Undo ``unpack``."""
    return torch.cat([window[:n] for window, n in zip(padded, sizes, strict=True)])


_TABLE_WIDTH = 256


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number that changes with every element of some tensors, and with its place.

    Words of 8 bytes are added up along the rows and along the columns of a table, modulo 2**64, and
    the sums are weighted by their place: one of the two shows what an exchange of two elements,
    rows or columns, or of their signs, does to neither total. The memory is read twice, and none
    of that size is made.
    """
    sums: list[Tensor] = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        if flat.storage_offset() % 8:  # no word may begin there
            flat = flat.clone()
        n_words = len(flat) // 8
        words, rest = flat[: 8 * n_words].view(torch.int64), flat[8 * n_words :].long()
        n_rows = n_words // _TABLE_WIDTH
        if n_rows > 1:
            table = words[: n_rows * _TABLE_WIDTH].view(n_rows, _TABLE_WIDTH)
            sums += [table.sum(0), table.sum(1)]
            words = words[n_rows * _TABLE_WIDTH :]
        sums += [words, rest]
    if not sums:
        return 0
    joined = torch.cat([part.to(sums[0].device) for part in sums])
    weights = torch.arange(1, 2 * len(joined), 2, device=joined.device)
    return int((joined * weights).sum())


def _rows_of_clips(is_audio: Tensor, clips: Sequence[AudioClip]) -> list[int]:
    """Hand clips to rows in order, each row taking as many as its placeholders need."""
    rows: list[int] = []
    for row, n_placeholders in enumerate(is_audio.sum(dim=1).tolist()):
        needed, first = n_placeholders, len(rows)
        while needed > 0 and len(rows) < len(clips):
            needed -= clips[len(rows)].n_tokens
            rows.append(row)
        if needed != 0:
            raise InputError(
                f"merging audio into row {row}: it has {n_placeholders} audio placeholders, the "
                f"clips that remain for it give {[c.n_tokens for c in clips[first : len(rows)]]} "
                "positions in order. Expand one placeholder per audio position, as the "
                "processor does, and pass a clip for every placeholder run."
            )
    if len(rows) != len(clips):
        raise InputError(
            f"merging audio: {len(clips)} clips were given, the prompts have room for {len(rows)}."
        )
    return rows
