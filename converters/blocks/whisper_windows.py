"""Long recordings, cut into windows that a Whisper-type encoder hears one by one."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from hooked_alm.audio import Waveform
from hooked_alm.errors import InputError
from hooked_alm.frontend import FrontEnd
from hooked_alm.inputs import ALMInput, AudioClip, ids_and_mask
from hooked_alm.spans import AudioTokens, as_ranges


def note_silence(clip: AudioClip, tokens: AudioTokens) -> AudioClip:
    """The clip, with a note on the positions that hear nothing but what fills it up."""
    if clip.seconds is not None and tokens.seconds_per_token is not None:
        n_sound = math.ceil(round(clip.seconds / tokens.seconds_per_token, 6))
        if (n_silent := clip.n_tokens - n_sound) > 0:
            note = f"padded with silence: {n_silent} of {clip.n_tokens} positions"
            clip.notes = (*clip.notes, note)
    return clip


class WindowedFrontEnd(FrontEnd):
    """A front-end whose clips are as many windows as they last.

    transformers takes the windows of all clips along one axis. A run of placeholders is one clip,
    and takes the next windows until they fill it.
    """

    def windows_of(
        self, waveform: Waveform, extractor: Any
    ) -> tuple[Float[Tensor, "window mel frame"], list[int]]:
        """Windows of the extractor's ``chunk_length``, the last one padded."""
        size = int(waveform.sampling_rate * extractor.chunk_length)
        samples = waveform.samples
        extracted = extractor(
            [samples[start : start + size] for start in range(0, len(samples), size)],
            sampling_rate=waveform.sampling_rate,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return extracted["input_features"], extracted["attention_mask"].sum(-1).tolist()

    def input_from_hf(
        self,
        *,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        input_features: Float[Tensor, "window mel frame"] | None = None,
        input_features_mask: Int[Tensor, "window frame"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        **refused: object,
    ) -> ALMInput:
        """An input from the arguments of the published ``forward``; see ``HookedALM.encode``."""
        ids, mask = ids_and_mask(
            input_ids, attention_mask, refused, "input_features, input_features_mask"
        )
        if input_features is None or input_features_mask is None:
            clips = self.clips_of(input_features, input_features_mask)
        else:
            clips = self.clips_in(ids, input_features, input_features_mask.sum(-1).tolist())
        return self.input_from_features(ids, mask, position_ids, clips)

    def hf_arguments(self, clips: Sequence[AudioClip]) -> dict[str, Any]:
        """Windows of all clips, and which of their frames are no padding."""
        features, mask = self.features_and_mask(clips)
        return {"input_features": features, "input_features_mask": mask}

    def clips_in(
        self,
        ids: Int[Tensor, "batch pos"],
        features: Float[Tensor, "window mel frame"],
        n_frames: Sequence[int],
    ) -> list[AudioClip]:
        """The clips of a batch.

        Raises:
            InputError: windows of another size, or that do not fit the runs of placeholders.
        """
        if features.shape[1:] != self.feature_shape:
            mel, frame = self.feature_shape
            raise InputError(
                f"encoding a processor's output: got input_features {list(features.shape)}, "
                f"expected [window, {mel}, {frame}]. Pad every window to the full length."
            )
        sizes = [self.n_tokens(n) for n in n_frames]
        clips: list[AudioClip] = []
        end = 0
        for row in ids.tolist():
            places = (pos for pos, id_ in enumerate(row) if id_ == self.tokens.placeholder)
            for start, stop in as_ranges(places):
                first, room = end, stop - start
                # A last window of a few samples fills no position, but belongs to its clip.
                while end < len(sizes) and (room > 0 or sizes[end] == 0):
                    room -= sizes[end]
                    end += 1
                if room != 0:
                    raise InputError(
                        f"merging audio: a run of {stop - start} placeholders does not fit the "
                        f"windows that are next, of {sizes[first:]} positions. Expand one "
                        "placeholder per position, and give the windows in order."
                    )
                # Of its own memory: a view would keep, and pickle, the features of all.
                windows = features[first:end].clone()
                clips.append(self.clip(windows, n_frames[first:end], name=f"clip {len(clips)}"))
        if end != len(sizes):
            raise InputError(
                f"merging audio: {len(sizes)} windows were given, the placeholders have room for "
                f"{end}."
            )
        return clips
