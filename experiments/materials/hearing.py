"""Recordings as a model hears them: what is known of all, and the features of the last few.

A clip's features are many times as large as the recording, and what the encoder makes of them is
larger still: of thousands of clips, neither would fit into memory.
"""

import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput, AudioClip, Batch, WeightsVersion

from ..workbench.results import Row
from .clips import ClipFile

S = TypeVar("S")
N_KEPT = 64
"""Clips whose features, and what the encoder made of them, are held."""


class Hearing(Generic[S]):
    """Clips of some sources, each read when it is first asked for, and again when it is heard."""

    def __init__(self, read: Callable[[S], AudioClip]) -> None:
        """Reads nothing yet.

        Args:
            read: a source -> its clip, the same whenever it is read.
        """
        self.read = read
        self._kept: OrderedDict[FiledClip[S], Tensor] = OrderedDict()
        self._encoded: OrderedDict[FiledClip[S], None] = OrderedDict()

    def clip(self, source: S) -> "FiledClip[S]":
        """The clip of a source, which is read once now.

        Raises:
            InputError: it cannot be heard.
        """
        read = self.read(source)
        clip = FiledClip(read, source, self)
        self._keep(clip, read.features)
        return clip

    def features(self, clip: "FiledClip[S]") -> Tensor:
        """Features of a clip: those that are held, or read again.

        Raises:
            InputError: its recording was changed since it was first read.
        """
        if clip in self._kept:
            self._kept.move_to_end(clip)
            return self._kept[clip]
        again = self.read(clip.source)
        if (again.n_frames, checksum(again)) != (clip.n_frames, clip.checksum):
            raise InputError(
                f"hearing {clip.name} again: got another recording ({again.seconds} s) than the "
                f"one that was read first ({clip.seconds} s). Put it back; finished units are kept."
            )
        self._keep(clip, again.features)
        return again.features

    def _keep(self, clip: "FiledClip[S]", features: Tensor) -> None:
        self._kept[clip] = features
        if len(self._kept) > N_KEPT:
            self._kept.popitem(last=False)

    def encodes(self, clip: "FiledClip[S]") -> None:
        """Lets what the encoder made of other clips go, since it makes something of this one."""
        self._encoded[clip] = None
        self._encoded.move_to_end(clip)
        if len(self._encoded) > N_KEPT:
            oldest, _ = self._encoded.popitem(last=False)
            oldest.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the features behind: another process reads its own."""
        return {"read": self.read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with nothing held."""
        self.__dict__.update(state, _kept=OrderedDict(), _encoded=OrderedDict())


class FiledClip(AudioClip, Generic[S]):
    """A clip whose features are where its recording is, until they are asked for."""

    def __init__(self, read: AudioClip, source: S, hearing: Hearing[S]) -> None:
        self.n_frames, self.n_tokens, self.name = read.n_frames, read.n_tokens, read.name
        self.seconds, self.notes = read.seconds, read.notes
        self.source, self.hearing, self.checksum = source, hearing, checksum(read)
        self._encoded = WeakKeyDictionary()

    @property
    def features(self) -> Tensor:  # type: ignore[override]
        """Features of the recording; see `Hearing.features`."""
        return self.hearing.features(self)

    def encodings(self, encoder: nn.Module, version: WeightsVersion) -> dict[Batch, Tensor]:
        """See `AudioClip.encodings`."""
        self.hearing.encodes(self)
        return super().encodings(encoder, version)


def described_clip(file: ClipFile, clip: AudioClip) -> Row:
    """What identifies a recording and what a model hears of it, for ``inputs``."""
    return {
        "sha256": file.sha256,
        "seconds": clip.seconds,
        "audio_tokens": clip.n_tokens,
        "notes": [*file.notes, *clip.notes],
    }


def heard_alike(model: HookedALM, clips: Iterable[AudioClip]) -> Hashable:
    """What prompts must share for their clips to be encoded together as they are apart.

    Where a clip's embeddings depend on the longest one that is encoded with it, that is the number
    of frames of a prompt's longest.
    """
    if model.audio is None or not model.audio.depends_on_longest:
        return None
    return max((n for clip in clips for n in clip.n_frames), default=0)


def checksum(clip: AudioClip) -> int:
    """What tells features from others, in less time than they take to make."""
    return zlib.crc32(clip.features.detach().contiguous().view(torch.uint8).numpy().data)


def heard_under(
    model: HookedALM,
    clips: Sequence[AudioClip],
    prompt: str | None,
    language: str | None,
    *,
    stand_in: str | None = None,
) -> ALMInput:
    """Clips under an instruction, left-padded; Whisper is given none, but a language.

    Args:
        model: that hears them.
        clips: one a prompt.
        prompt: None is no instruction.
        language: that is spoken; None has a multilingual Whisper hear it.
        stand_in: language where none is named, of prompts that are made without weights.
    """
    if model.audio is None or not model.audio.is_memory:
        return model.prepare([*clips], prompt)
    if language is None and not getattr(model.generation_config, "is_multilingual", False):
        return model.prepare([*clips])
    return model.prepare([*clips], language=language or stand_in)
