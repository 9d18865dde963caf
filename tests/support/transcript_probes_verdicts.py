"""What ``transcript_probes`` controls and claims, on tables made by hand, either way."""

from typing import Any

import pandas as pd

import probe_results
from hooked_alm.experiments.materials.probe_tables import ProbeResults
from hooked_alm.experiments.transcript_probes.experiment import TranscriptProbes
from hooked_alm.experiments.transcript_probes.settings import TranscriptProbesConfig
from probe_results import RATES, Change, made, other_ways


def again(rates: Any = RATES, **changes: Any) -> ProbeResults:
    config = TranscriptProbesConfig(n_resamples=1000, audio="my.csv", labels=("error",))
    mine = {"model": rates["model"]}
    run = made(TranscriptProbes, config, mine, label="error", **changes)
    run.tables["transcripts"] = pd.DataFrame({"clip": ["c0", "c1"], "not_greedy": [0.0, 0.0]})
    return run


def cases() -> ProbeResults:
    """Read at depth 2 better than by any baseline, depth 0 or control labels."""
    return again()


def _elsewhere(run: ProbeResults) -> ProbeResults:
    run.tables["transcripts"] = run["transcripts"].assign(not_greedy=0.5)
    return run


BROKEN: dict[str, Change] = {
    **probe_results.BROKEN,
    "the transcript is what one pass finds likeliest": _elsewhere,
}
OTHER_WAY = other_ways("error in the decoder", again, ("decodable", "deeper", "selective"))
