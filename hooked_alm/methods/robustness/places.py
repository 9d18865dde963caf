"""Where neurons are, in the language model and in the audio encoder, and which rows they have.

Source: SPIRIT, mbzuai-nlp/spirit-breaking@e3044bd, whose ``lm`` is the activated gate of every MLP
of the language model, and ``audio`` the activation of every MLP of the encoder; C19, M-SP-2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from ...encoder_rows import EncoderRows
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import ENCODER, hook_name, sites_of
from ..dictionary.splice import spliced_rows
from ..neurons.activity import NeuronSite
from ..statistics.class_neurons import Neuron

NeuronPlace = Literal["lm", "audio"]
"""Neurons of the language model, or of the audio encoder."""
PLACES: tuple[NeuronPlace, ...] = get_args(NeuronPlace)
EVERY = "all"
"""Every row that runs: of the encoder also those of frames that pad a clip."""


def neuron_points(
    model: HookedALM, place: NeuronPlace, site: NeuronSite = "gate"
) -> tuple[str, ...]:
    """Hook points of the neurons, a name for each block.

    Args:
        model: with or without its weights.
        place: whose neurons these are.
        site: the activated gate, where MLPs have one; or what the last projection reads, which is
            its product with the other factor, and the activation itself where there is no gate.

    Raises:
        InputError: an encoder without hook points in its blocks.
    """
    if place == "lm":
        blocks, cfg = [*model.path], model.path_cfg
    else:
        encoder = None if model.audio is None else model.audio.hooked_encoder
        if encoder is None:
            raise InputError(
                "reaching the neurons of the audio encoder: the model has none of Whisper's type, "
                "with hook points in its blocks. Take the neurons of the language model: 'lm'."
            )
        blocks, cfg = [f"{ENCODER}blocks.{n}" for n in range(encoder.cfg.n_layers)], encoder.cfg
    point = site if site in sites_of(cfg) else "post"
    return tuple(hook_name(point, block) for block in blocks)


def n_neurons(model: HookedALM, place: NeuronPlace) -> tuple[int, int]:
    """Number of blocks, and of neurons in each."""
    points = neuron_points(model, place)
    return len(points), model.config_of(points[0]).d_mlp


@dataclass(frozen=True, eq=False)
class NeuronRows:
    """Rows of some prompts at the points of one place."""

    prompts: ALMInput
    """The prompts; of the encoder its rows, prompt by prompt: see ``EncoderRows``."""
    encoder: EncoderRows | None

    @classmethod
    def of(cls, model: HookedALM, x: ALMInput, place: NeuronPlace) -> "NeuronRows":
        """Those of some prompts.

        Raises:
            InputError: prompts without a clip, where the encoder's rows are asked for.
        """
        if place == "lm":
            return cls(x, None)
        rows = model.encoder_rows(x)
        return cls(rows.prompts, rows)

    def mask(self, span: str, last: int | None = None) -> Bool[Tensor, "batch row"]:
        """Rows of a span, pads left out.

        Args:
            span: of the prompts, or ``all``.
            last: how many of them, from the end; None is every one.

        Raises:
            InputError: a span that there is not.
        """
        real = torch.from_numpy(self.prompts.is_real)
        found = real if span == EVERY else spliced_rows(self.prompts, span)
        if last is None:
            return found
        from_the_end = found.flip(1).cumsum(1).flip(1)
        return found & (from_the_end <= last)

    def by_prompt(self, name: str, value: Tensor) -> Tensor:
        """What a point shows, ``[prompt, row, neuron]``."""
        return value if self.encoder is None else self.encoder.by_prompt(name, value)

    def by_window(self, name: str, flat: Tensor, value: Tensor) -> Tensor:
        """Undo ``by_prompt``: what the point shows, with changed rows."""
        return flat if self.encoder is None else self.encoder.by_window(name, flat, value)


def by_point(
    model: HookedALM, place: NeuronPlace, neurons: Sequence[Neuron], site: NeuronSite = "gate"
) -> dict[str, list[int]]:
    """Neurons of each point that has some.

    Raises:
        InputError: neurons that there are not, or one named twice.
    """
    points, (n_blocks, width) = neuron_points(model, place, site), n_neurons(model, place)
    if wrong := sorted((b, n) for b, n in neurons if not (0 <= b < n_blocks and 0 <= n < width)):
        raise InputError(
            f"defending neurons {wrong[:5]} of {place}: expected blocks 0 to {n_blocks - 1}, "
            f"neurons 0 to {width - 1}."
        )
    if len({*neurons}) < len(neurons):
        raise InputError(f"defending {len(neurons)} neurons of {place}: some are named twice.")
    found: dict[str, list[int]] = {}
    for block, neuron in neurons:
        found.setdefault(points[block], []).append(neuron)
    return found
