"""What ``attribute_lens`` runs: which clip is asked how, and what is done to the run."""

from collections.abc import Mapping
from dataclasses import dataclass

from hooked_alm.methods.patching.enrich import EnrichMode

from ..materials.attribute_prompts import AttributePrompt
from ..materials.clips import file_safe
from ..materials.held_out import Half
from ..materials.recordings import Recording


@dataclass(frozen=True)
class Reading:
    """The answer to a prompt, and what a lens reads of it; without its audio, the answer alone."""

    prompt: AttributePrompt


@dataclass(frozen=True)
class Knockouts:
    """A prompt whose queries do not see some keys."""

    prompt: AttributePrompt


@dataclass(frozen=True)
class EnrichmentSearch:
    """A prompt enriched by every depth after every block, in every mode."""

    prompt: AttributePrompt


@dataclass(frozen=True)
class ChosenEnrichment:
    """What was best on the clips of the search."""

    mode: EnrichMode
    source: int
    """Depth."""
    layer: int


@dataclass(frozen=True)
class EnrichmentTest:
    """A prompt of another clip, enriched as chosen, and by what must not help."""

    prompt: AttributePrompt
    chosen: ChosenEnrichment
    other: Recording | None
    """A clip of another label; None where there is none."""


AttributeWork = Reading | Knockouts | EnrichmentSearch | EnrichmentTest


def work_name(work: AttributeWork) -> str:
    """Names a unit."""
    prompt, kind = work.prompt, type(work).__name__.lower()
    about = [prompt.clip.name, file_safe(prompt.attribute)]
    if isinstance(work, Reading):
        about += [prompt.format, prompt.heard]
    return "__".join([kind, *about])


def windows(n_layers: int, size: int) -> list[tuple[int, ...]]:
    """Every window of so many blocks, the last block alone, and all blocks at once.

    What words before the readout see in the last block, nothing reads any more: a control.
    """
    some = [tuple(range(first, first + size)) for first in range(n_layers - size + 1)]
    last, every = (n_layers - 1,), tuple(range(n_layers))
    return [one for one in dict.fromkeys([*some, last]) if one != every] + [every]


def is_searched(parts: Mapping[str, Half], clip: Recording) -> bool:
    """Whether an enrichment is chosen on a clip, and not judged on it."""
    return parts[clip.name] == "discovery"
