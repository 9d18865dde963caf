"""What is measured: transcripts, the states where they end, and what tells them without states.

Source: M-BT-5.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.reading.transcripts import no_speech_token, transcript_ends
from hooked_alm.methods.statistics.repetition import compression_ratio

from ..materials.clips import ClipFile
from ..materials.kept_features import ClipFeatures
from ..materials.probe_fits import OF_THE_CLIP, clip_baselines
from ..materials.transcription import Transcription, whose
from ..workbench.results import Row

OF_THE_TRANSCRIPT = {
    "n_tokens": "number of tokens",
    "mean_log_p": "mean log-probability",
    "compression_ratio": "compression ratio",
}
"""What tells how good a transcript is without any state."""
NO_SPEECH = {"no_speech": "no-speech probability"}
"""The same, of models with a token for it."""
TOGETHER = {"together": "all numbers together"}


def baselines_of(model: HookedALM) -> dict[str, str]:
    """The baselines that a model has, each with what a page calls it."""
    there = {} if no_speech_token(model) is None else NO_SPEECH
    return {**OF_THE_CLIP, **OF_THE_TRANSCRIPT, **there, **TOGETHER}


def transcript_rows(
    ours: Transcription, clips: Sequence[ClipFile], x: ALMInput, said: Sequence[Sequence[int]]
) -> Iterator[tuple[Row, ClipFeatures]]:
    """What is known of every transcript, and its features: states where it ends, and baselines.

    Args:
        ours: the run's clips, and the model.
        clips: some of them, which run together.
        x: their prompts.
        said: their transcripts, without the tokens that end them.
    """
    ends, token = transcript_ends(ours.model, x, said), no_speech_token(ours.model)
    states, names = ends.states.float().cpu().numpy(), ours.model.depth_names()
    for i, (clip, tokens) in enumerate(zip(clips, said, strict=True)):
        # Whisper's own mean, too, counts what ends a transcript as one of its tokens.
        has_ended = len(tokens) < ours.config.max_new_tokens
        own = slice(None if has_ended else -1)
        measures = {
            "n_tokens": float(len(tokens)),
            "mean_log_p": float(ends.log_p[i][own].double().mean()),
            "compression_ratio": compression_ratio(ours.text(tokens)),
        }
        if token is not None:
            measures["no_speech"] = float(ends.start[i, token].double().exp())
        numbers = {name: np.array([value], np.float32) for name, value in measures.items()}
        features = {
            **{name: states[depth, i] for depth, name in enumerate(names)},
            **clip_baselines(ours.heard(clip)), **numbers,
        }  # fmt: skip
        together = np.concatenate([features["duration"], *numbers.values()])
        greedy = {"not_greedy": 1 - float(ends.is_likeliest[i][own].double().mean())}
        row = {**_row(ours, clip, tokens), **measures, **greedy, "ended": float(has_ended)}
        yield row, {**features, "together": together}


def _row(ours: Transcription, clip: ClipFile, tokens: Sequence[int]) -> dict[str, Any]:
    text = ours.text(tokens)
    errors = ours.errors(ours.said_in(clip), text)
    return {
        **whose(clip), "holds": ours.holds(clip), "text": text,
        "heard": float(ours.is_heard(text)), "rate": errors.rate,
        **{f"reference_{name}": n for name, n in errors._asdict().items()},
    }  # fmt: skip
