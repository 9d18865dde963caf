"""What the page of a ``probes`` run says: what was read of what, and how."""

from ..materials.clips import of_whom
from ..materials.probe_pages import PROBE_CAVEATS, how_probed, read_by_whom, what_was_read
from ..materials.probe_tables import streams_of
from ..workbench.results import Results
from .settings import ProbesConfig

CAVEATS = (
    *PROBE_CAVEATS,
    "A probe is linear and reads a mean over positions: what is there in another form, or in the "
    "order of frames alone, stays unread.",
    "The model with random weights has this model's sizes and spreads of weights, and still hears: "
    "what is read off it is what its shape alone leaves of the sound.",
)


def lead(run: Results[ProbesConfig]) -> str:
    """What was read of what."""
    untrained = ", and probes of the same model with random weights"
    return (
        f"Probes read {what_was_read(run)} off {len(run.inputs['points'])} points of the "
        f"{' and the '.join(streams_of(run))}. {read_by_whom(run)} Beside them stand probes that "
        "have only the clip's duration or mean spectrum, or nothing; probes of labels that were "
        f"dealt out at random{untrained if run.config.untrained else ''}. The clips: "
        f"{of_whom(run['manifest'])}."
    )


def method(run: Results[ProbesConfig]) -> str:
    """How probes and intervals were made."""
    return (
        f"Model: {run.config.model}, {run.config.dtype}. Of the decoder the mean over the span "
        f"{run.inputs['span']}, of the encoder that over the clip's frames. {how_probed(run)}"
    )
