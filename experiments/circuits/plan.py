"""What ``circuits`` looks at: the default pairs, the nodes of a decoder, the places of a prompt."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import pandas as pd

from hooked_alm import HookedALM
from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.alignment import align
from hooked_alm.methods.patching.paths import Edge
from hooked_alm.points import hook_name

from ..materials.exchange import PLACES, PlaceName
from ..materials.ob1 import EMOTIONS, LABELS, ClipName, Emotion, ob1_clip_names, prompt_segments
from ..materials.pairs import Pair, PreparedPair, Side
from ..materials.records import collect
from .settings import CircuitsConfig

EMBED = "hook_embed"
LOGITS = "logits"
EVERY_SENDER = (EMBED, hook_name("z", "blocks.*") + "[*]", hook_name("mlp_out", "blocks.*"))
MLP = -1
"""What stands for an MLP where heads are numbered."""


# --- Pairs of the bundled clips


def bundled_pairs(n_per_clip: int) -> list[Pair]:
    """Pairs of the 18 OB1 clips in conflict prompts: once the voice differs, once the instruction.

    A clip of emotion A under an instruction that names T. ``voice``: against a clip of emotion B,
    of the same language and, where there is one, intensity; answers A and B. ``instruction``: the
    same clip, against an instruction that names B; answers T and B. A, T and B are different, and
    change places from clip to clip. Pairs of one clip are a group.
    """
    pairs = []
    for (number, clip), turn in product(enumerate(ob1_clip_names()), range(n_per_clip)):
        others = [emotion for emotion in EMOTIONS if emotion != clip.emotion]
        named, other = (others[(number + turn + i) % 4] for i in range(2))
        intensity = "normal" if other == "neutral" else clip.intensity
        voice = _side(replace(clip, emotion=other, intensity=intensity), named)
        donors = {"instruction": (_side(clip, other), named), "voice": (voice, clip.emotion)}
        words, suffix = LABELS[clip.language], f"-{turn}" if n_per_clip > 1 else ""
        pairs += [
            Pair(
                id=f"{contrast}-{clip.stem}{suffix}",
                base=_side(clip, named),
                donor=donor,
                answers=(words[answer], words[other]),
                group=clip.stem,
                contrast=contrast,
            )
            for contrast, (donor, answer) in donors.items()
        ]
    return sorted(pairs, key=lambda pair: pair.contrast)


def _side(clip: ClipName, named: Emotion) -> Side:
    segments = prompt_segments("conflict", clip.language, voice=clip.emotion, named=named)
    return Side(audio=(CLIPS / f"{clip.stem}.wav",), segments=tuple(segments))


# --- Nodes


class CircuitNode(NamedTuple):
    """A head, or an MLP."""

    layer: int
    head: int

    @property
    def is_head(self) -> bool:
        """Whether it is a head."""
        return self.head != MLP

    @property
    def label(self) -> str:
        """``L3H2``, ``MLP 3``."""
        return f"L{self.layer}H{self.head}" if self.is_head else f"MLP {self.layer}"

    @property
    def sender(self) -> str:
        """The hook it writes at, as path patching names it."""
        return self._point("z" if self.is_head else "mlp_out")

    @property
    def receivers(self) -> list[str]:
        """The hooks it reads at: q, k, v of a head (by query head), or the MLP's input."""
        inputs = [f"attn.{part}_input" for part in "qkv"] if self.is_head else ["mlp_in"]
        return [self._point(name) for name in inputs]

    def _point(self, name: str) -> str:
        return hook_name(name, f"blocks.{self.layer}") + (f"[{self.head}]" if self.is_head else "")


def heads_named(points: pd.Series) -> pd.DataFrame:
    """``layer``, ``head`` and ``input`` (q, k, v; z where it writes) of the points of heads."""
    pattern = r"blocks\.(?P<layer>\d+)\.attn\.hook_(?P<input>.).*\[(?P<head>\d+)\]"
    return points.str.extract(pattern).dropna().astype({"layer": int, "head": int})


def all_nodes(model: HookedALM) -> list[CircuitNode]:
    """Every head and MLP, layer by layer."""
    heads = [*range(model.cfg.n_heads), MLP]
    return [CircuitNode(layer, head) for layer in range(model.cfg.n_layers) for head in heads]


def edges_among(nodes: Sequence[CircuitNode]) -> set[Edge]:
    """Every edge between some nodes, from the embedding, and to the logits."""
    edges = {(EMBED, LOGITS), *((node.sender, LOGITS) for node in nodes)}
    # Heads of a layer do not hear each other; its MLP hears them all.
    stages = {node: (node.layer, not node.is_head) for node in nodes}
    for node in nodes:
        heard = [EMBED, *(one.sender for one in nodes if stages[one] < stages[node])]
        edges.update(product(heard, node.receivers))
    return edges


def random_nodes(
    model: HookedALM, winners: Sequence[CircuitNode], rng: np.random.Generator
) -> list[CircuitNode]:
    """A draw of as many heads and MLPs, from those that did not win as far as these go."""
    chosen: list[CircuitNode] = []
    for is_head in (True, False):
        n = sum(node.is_head == is_head for node in winners)
        every = [node for node in all_nodes(model) if node.is_head == is_head]
        others = [node for node in every if node not in winners]
        drawn = [others[i] for i in rng.permutation(len(others))[:n]]
        rest = [node for node in every if node not in drawn]
        chosen += drawn + [rest[i] for i in rng.permutation(len(rest))[: n - len(drawn)]]
    return sorted(chosen)


# --- Places


def places_of(
    pairs: Sequence[PreparedPair], config: CircuitsConfig
) -> tuple[list[PlaceName], dict[str, str]]:
    """Places to patch in the pairs of one contrast, and why others are left out.

    Before the first difference of base and donor nothing can differ (invariant I7), so that a place
    which ends there in every pair is not patched.

    Raises:
        InputError: a place that some pairs have and others lack, or spans that do not align.
    """
    kept: list[PlaceName] = []
    left_out: dict[str, str] = {}
    for place in config.places:
        ends = [(_end(one.base, place), _end(one.donor, place)) for one in pairs]
        has = [min(both) >= 0 for both in ends]
        if not any(has):
            left_out[place] = "the prompts have none"
        elif not all(has):
            lacks = pairs[has.index(False)].pair
            raise InputError(
                f"patching the place {place!r}: {lacks.where or lacks.id} has none, other pairs of "
                f"the contrast {lacks.contrast!r} have one. Give it another contrast, or choose "
                "other places."
            )
        elif all(end < _first_difference(one) for (end, _), one in zip(ends, pairs, strict=True)):
            left_out[place] = "it ends before base and donor differ"
        else:
            kept.append(place)

    def aligned(one: PreparedPair) -> None:
        spans = [name for name in chain(*PLACES.values()) if one.base.spans[name][0]]
        align(one.base, one.donor, spans, policy=config.align_policies())

    collect("aligning the prompts", aligned, pairs, lambda one: one.pair.where or one.pair.id)
    return kept, left_out


def _end(x: ALMInput, place: PlaceName) -> int:
    """The last position of a place; −1 in a prompt that lacks a span of it."""
    spans = [x.spans.positions(name, 0) for name in PLACES[place]]
    return max(chain(*spans)) if all(spans) else -1


def _first_difference(one: PreparedPair) -> int:
    """The first position where base and donor differ, by tokens or by what is heard."""
    tokens = one.base.tokens[0].tolist(), one.donor.tokens[0].tolist()
    differing = [i for i, (ours, theirs) in enumerate(zip(*tokens, strict=False)) if ours != theirs]
    if any(a is not b for a, b in zip(one.base.clips, one.donor.clips, strict=False)):
        differing += one.base.spans.positions("audio", 0)
    return min([*differing, *map(len, tokens)])
