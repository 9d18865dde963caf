"""Clips written down, with all heads or without some, and which heads their failures rest on."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.hooks import Hook, HookPoint
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.attribution.head_gates import HeadKind, head_point, screen_heads
from hooked_alm.methods.reading.transcripts import with_transcripts
from hooked_alm.methods.statistics.repetition import loops, repetition

from ..materials.clips import ClipFile
from ..materials.kept_features import ClipFeatures
from ..materials.transcription import Transcription, whose
from ..workbench.results import Row
from .plan import ALL, Failure, HeadNode

HeadMeans = Mapping[str, Float32[np.ndarray, " feature"]]
"""Point -> mean output of its heads, one after the other."""


class Decoder:
    """A model that writes clips down, all of a batch at once."""

    def __init__(self, model: HookedALM, ours: Transcription) -> None:
        self.model, self.ours = model, ours

    def write(
        self, x: ALMInput, without: HeadNode | None = None, stead: HeadMeans | None = None
    ) -> list[list[int]]:
        """Greedy tokens of every prompt, without those that end them; see `ablations`."""
        hooks = [] if without is None else ablations(self.model, without, stead or {})
        return self.ours.write(x, hooks)

    @torch.no_grad()
    def means(
        self, x: ALMInput, said: Sequence[Sequence[int]], kinds: Sequence[HeadKind]
    ) -> list[ClipFeatures]:
        """Mean outputs of all heads over each prompt and its transcript, by their points."""
        y, layers = with_transcripts(x, said), range(len(self.model.path))
        points = [head_point(self.model, kind, layer) for kind in kinds for layer in layers]
        _, cache = self.model.run_with_cache(y, names_filter=points)
        found: list[ClipFeatures] = []
        for row, is_real in enumerate(y.attention_mask.bool()):
            of_row = {name: cache[name][row][is_real.to(cache[name].device)] for name in points}
            found.append({
                name: z.double().mean(0).flatten().float().cpu().numpy()
                for name, z in of_row.items()
            })  # fmt: skip
        return found

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


def ablations(model: HookedALM, node: HeadNode, stead: HeadMeans | None = None) -> list[Hook]:
    """Hooks under which a head writes nothing of its own, at every step of a generation.

    Args:
        model: that is hooked.
        node: a head.
        stead: what its point holds instead, of all heads one after the other; zero if it is not
            there.
    """

    def leave_out(z: Tensor, hook: HookPoint) -> Tensor:
        z, mean = z.clone(), (stead or {}).get(str(hook.name))
        own = torch.zeros(z.shape[2:]) if mean is None else torch.from_numpy(mean)
        z[:, :, node.head] = own.view(z.shape[2:])[node.head].to(z)
        return z

    return [(name, leave_out) for name in points_of(model, node)]


def points_of(model: HookedALM, node: HeadNode) -> list[str]:
    """The hook points that a head writes to."""
    layers = range(len(model.path)) if node.layer == ALL else [node.layer]
    return [head_point(model, node.kind, layer) for layer in layers]
