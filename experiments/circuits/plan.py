"""What ``circuits`` looks at: the default pairs, the nodes of a decoder, the places of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.alignment import align
from hooked_alm.methods.patching.paths import Edge
from hooked_alm.points import hook_name

from ..materials.bundled import CLIPS
from ..materials.ob1 import EMOTIONS, LABELS, ClipName, Emotion, ob1_clip_names, prompt_segments
from ..materials.pairs import Pair, PreparedPair, Side
from .settings import PLACES, CircuitsConfig, PlaceName

Direction = Literal["noising", "denoising"]
DIRECTIONS: tuple[Direction, ...] = ("noising", "denoising")
EMBED = "hook_embed"
EVERY_SENDER = (EMBED, hook_name("z", "blocks.*") + "[*]", hook_name("mlp_out", "blocks.*"))
LOGITS = "logits"


# --- Pairs of the bundled clips


def bundled_pairs(n_per_clip: int) -> list[Pair]:
    """Pairs of the 18 OB1 clips in conflict prompts: once the voice differs, once the instruction.

    A clip of emotion A under an instruction that names T. ``voice``: against a clip of emotion B,
    of the same language and, where there is one, intensity; answers A and B. ``instruction``: the
    same clip, against an instruction that names B; answers T and B. A, T and B are different, and
    change places from clip to clip. Pairs of one clip are a group.
    """
    pairs = []
    for number, clip in enumerate(ob1_clip_names()):
        others = [emotion for emotion in EMOTIONS if emotion != clip.emotion]
        for turn in range(n_per_clip):
            first = number + turn
            named, other = others[first % 4], others[(first + 1) % 4]
            suffix = f"-{turn}" if n_per_clip > 1 else ""
            base = _side(clip, named)
            ways = {
                "voice": (_side(_like(clip, other), named), (clip.emotion, other)),
                "instruction": (_side(clip, other), (named, other)),
            }
            for contrast, (donor, answers) in ways.items():
                words = LABELS[clip.language]
                pairs.append(
                    Pair(
                        id=f"{contrast}-{clip.stem}{suffix}",
                        base=base,
                        donor=donor,
                        answers=(words[answers[0]], words[answers[1]]),
                        group=clip.stem,
                        contrast=contrast,
                    )
                )
    return sorted(pairs, key=lambda pair: pair.contrast)


def _like(clip: ClipName, emotion: Emotion) -> ClipName:
    intensity = "normal" if emotion == "neutral" else clip.intensity
    return ClipName(language=clip.language, emotion=emotion, intensity=intensity)


def _side(clip: ClipName, named: Emotion) -> Side:
    segments = prompt_segments("conflict", clip.language, voice=clip.emotion, named=named)
    return Side(audio=(CLIPS / f"{clip.stem}.wav",), segments=tuple(segments))


# --- Nodes


@dataclass(frozen=True, order=True)
class CircuitNode:
    """A head, or an MLP (head −1)."""

    layer: int
    head: int

    @property
    def kind(self) -> Literal["head", "mlp"]:
        """What it is."""
        return "mlp" if self.head < 0 else "head"

    @property
    def label(self) -> str:
        """``L3H2``, ``MLP 3``."""
        return f"MLP {self.layer}" if self.head < 0 else f"L{self.layer}H{self.head}"

    @property
    def sender(self) -> str:
        """Where it writes, as path patching names it."""
        if self.head < 0:
            return hook_name("mlp_out", self._block)
        return f"{hook_name('z', self._block)}[{self.head}]"

    @property
    def receivers(self) -> dict[str, str]:
        """Where it reads: q, k, v of a head (by query head), or the MLP's input."""
        if self.head < 0:
            return {"mlp": hook_name("mlp_in", self._block)}
        inputs = {part: hook_name(f"attn.{part}_input", self._block) for part in "qkv"}
        return {part: f"{name}[{self.head}]" for part, name in inputs.items()}

    @property
    def _block(self) -> str:
        return f"blocks.{self.layer}"


def all_nodes(model: HookedALM) -> list[CircuitNode]:
    """Every head and MLP, layer by layer."""
    heads = [*range(model.cfg.n_heads), -1]
    return [CircuitNode(layer, head) for layer in range(model.cfg.n_layers) for head in heads]


def edges_among(nodes: Sequence[CircuitNode]) -> list[Edge]:
    """Every edge between some nodes, from the embedding, and to the logits."""
    order = sorted(nodes, key=lambda node: (node.layer, node.head < 0, node.head))
    edges = [(EMBED, LOGITS)]
    for i, node in enumerate(order):
        # Heads of a layer do not hear each other; its MLP hears them all.
        above = [b for b in order[i + 1 :] if b.layer > node.layer or b.head < 0]
        edges += [(EMBED, at) for at in node.receivers.values()]
        edges += [(node.sender, at) for later in above for at in later.receivers.values()]
        edges.append((node.sender, LOGITS))
    return edges


def random_nodes(
    model: HookedALM, winners: Sequence[CircuitNode], rng: np.random.Generator
) -> list[CircuitNode]:
    """As many heads and as many MLPs, drawn from those that did not win as far as these go."""
    chosen: list[CircuitNode] = []
    for kind in ("head", "mlp"):
        n = sum(node.kind == kind for node in winners)
        every = [node for node in all_nodes(model) if node.kind == kind]
        others = [node for node in every if node not in winners]
        drawn = [others[i] for i in rng.permutation(len(others))[:n]]
        rest = [node for node in every if node not in drawn]
        drawn += [rest[i] for i in rng.permutation(len(rest))[: n - len(drawn)]]
        chosen += drawn
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
        has = [all(_has(x, place) for x in (one.base, one.donor)) for one in pairs]
        if not any(has):
            left_out[place] = "the prompts have none"
        elif not all(has):
            lacks = pairs[has.index(False)].pair
            raise InputError(
                f"patching the place {place!r}: {lacks.where or lacks.id} has none, other pairs of "
                f"the contrast {lacks.contrast!r} have one. Give it another contrast, or choose "
                "other places."
            )
        elif all(_last(one.base, place) < _first_difference(one) for one in pairs):
            left_out[place] = "it ends before base and donor differ"
        else:
            kept.append(place)
    for one in pairs:
        try:
            align(one.base, one.donor, _spans(one.base), policy=config.align_policies())
        except InputError as error:
            raise InputError(f"{one.pair.where or one.pair.id}: {error}") from error
    return kept, left_out


def _spans(x: ALMInput) -> list[str]:
    names = [name for spans in PLACES.values() for name in spans]
    return [name for name in names if x.spans[name][0]]


def _has(x: ALMInput, place: PlaceName) -> bool:
    return all(x.spans[name][0] for name in PLACES[place])


def _last(x: ALMInput, place: PlaceName) -> int:
    return max(pos for name in PLACES[place] for pos in x.spans.positions(name, 0))


def _first_difference(one: PreparedPair) -> int:
    """The first position where base and donor differ, by tokens or by what is heard."""
    ours, theirs = one.base.tokens[0].tolist(), one.donor.tokens[0].tolist()
    at = min(len(ours), len(theirs))
    at = next((i for i in range(at) if ours[i] != theirs[i]), at)
    if any(a is not b for a, b in zip(one.base.clips, one.donor.clips, strict=False)):
        at = min([at, *one.base.spans.positions("audio", 0)])
    return at
