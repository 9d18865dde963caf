"""What ``probes`` controls and claims, on tables made by hand, either way."""

from typing import Any

from hooked_alm.experiments.materials.probe_tables import ProbeResults
from hooked_alm.experiments.probes.experiment import Probes
from hooked_alm.experiments.probes.settings import ProbesConfig
from probe_results import BROKEN, made, other_ways


def again(*args: Any, **changes: Any) -> ProbeResults:
    config = ProbesConfig(n_resamples=1000, audio="my.csv", labels=("mood",))
    return made(Probes, config, *args, **changes)


def cases() -> ProbeResults:
    """Read at depth 2 better than by any baseline, random weights, depth 0 or control labels."""
    return again()


__all__ = ["BROKEN", "OTHER_WAY", "cases"]
OTHER_WAY = other_ways("mood in the decoder", again, ("decodable", "learnt", "deeper", "selective"))
