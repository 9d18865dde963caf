"""Clips written down, with all heads or without some, and which heads their failures rest on."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.hooks import Hook, HookPoint
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.attribution.head_gates import head_point, screen_heads
from hooked_alm.methods.statistics.repetition import loops, repetition

from ..materials.clips import ClipFile
from ..materials.transcription import Transcription, whose
from ..workbench.results import Row
from .plan import ALL, Failure, HeadNode


class Decoder:
    """A model that writes clips down, all of a batch at once."""

    def __init__(self, model: HookedALM, ours: Transcription) -> None:
        self.model, self.ours = model, ours

    def write(self, x: ALMInput, without: HeadNode | None = None) -> list[list[int]]:
        """Greedy tokens of every prompt, without those that end them."""
        return self.ours.write(x, [] if without is None else ablations(self.model, without))

    def row(self, clip: ClipFile, tokens: Sequence[int]) -> Row:
        """What came of a clip."""
        text = self.ours.text(tokens)
        errors = self.ours.errors(self.ours.said_in(clip), text)
        return {
            **whose(clip), "holds": self.ours.holds(clip), "text": text, "n_tokens": len(tokens),
            "loops": float(loops(tokens)), "heard": float(self.ours.is_heard(text)),
            "repetition": repetition(tokens, 1),
            **{f"reference_{name}": n for name, n in errors._asdict().items()},
        }  # fmt: skip

    def screen(self, x: ALMInput, tokens: Sequence[int], failure: Failure) -> Iterator[Row]:
        """What closing each head would do to the failing transcript of one clip.

        The objective is the mean of its tokens' log-probabilities.
        """
        said = torch.tensor([tokens], dtype=torch.long, device=x.device)
        found = screen_heads(self.model, x.extend(said), partial(mean_log_p, said))
        for kind, screen in found.items():
            for layer, head in torch.cartesian_prod(
                torch.arange(screen.effect.shape[0]), torch.arange(screen.effect.shape[1])
            ).tolist():
                yield {
                    "of": failure, "kind": kind, "layer": layer, "head": head,
                    "effect": float(screen.effect[layer, head, 0]),
                    "norm": float(screen.norm[layer, head, 0]),
                }  # fmt: skip


def mean_log_p(said: Tensor, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
    """Mean log-probability of the last tokens of every row."""
    log_p = logits[:, -said.shape[1] - 1 : -1].log_softmax(-1)
    return log_p.gather(-1, said[..., None])[..., 0].mean(-1)


def ablations(model: HookedALM, node: HeadNode) -> list[Hook]:
    """Hooks under which a head writes nothing, at every step of a generation."""

    def leave_out(z: Tensor, hook: HookPoint) -> Tensor:
        z = z.clone()
        z[:, :, node.head] = 0
        return z

    layers = range(len(model.path)) if node.layer == ALL else [node.layer]
    return [(head_point(model, node.kind, layer), leave_out) for layer in layers]
