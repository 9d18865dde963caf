"""What ``component_patching`` controls and claims, on tables made by hand, either way."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from hooked_alm.experiments.component_patching.experiment import ComponentPatching
from hooked_alm.experiments.component_patching.settings import ComponentPatchingConfig
from hooked_alm.experiments.component_patching.tables import PatchingResults, summarise

Change = Callable[[PatchingResults], PatchingResults]
N = 40
"""Clips, in all of which the contextual word is the likelier one."""
RESTORES = {("encoder", "attn", 0): 1.0, ("decoder", "mlp", 0): 0.0}
"""Component -> share of the clips that noise in it restores; of all others it is none."""
MOVED = {"block": 8.0, "attn": 2.0, "mlp": 1.0}
REFERENCES = {"noise": -1.0, "silence": -1.5, "zero": None}


def made(restores: dict[tuple[str, str, int], float] | None = None) -> PatchingResults:
    """Results in which patching some components restores some shares of the clips."""
    restores = {**RESTORES, **(restores or {})}
    tables: dict[str, list[dict[str, Any]]] = {"runs": [], "patched": []}
    for i in range(N):
        who, base = {"clip": f"c{i}", "speaker": f"s{i % 4}"}, -3.0
        tables["runs"].append({**who, "reference": "none", "draw": 0, "value": base})
        for reference, whole in REFERENCES.items():
            if whole is not None:
                tables["runs"].append({**who, "reference": reference, "draw": 0, "value": whole})
            for stack in ("encoder", "decoder"):
                for site in MOVED:
                    for layer in (0, 1):
                        is_restored = i < restores.get((stack, site, layer), 0) * N
                        end = 3.0 if is_restored else base
                        if site == "block" and layer == 1 and whole is not None:
                            end = whole
                        for alpha in (1.0,) if whole is None else (0.0, 1.0):
                            tables["patched"].append({
                                **who, "stack": stack, "site": site, "layer": layer, "head": -1,
                                "reference": reference, "draw": 0, "alpha": alpha, "base": base,
                                "value": end if alpha else base, "moved": alpha * MOVED[site],
                                "stranger_base": -1.0, "stranger": 1.0 if i % 5 == 0 else -1.0,
                            })  # fmt: skip
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    config = ComponentPatchingConfig(n_resamples=1000, audio="my.csv")
    run = ComponentPatching.results(config, {"model": {"blocks": 2}}, frames)
    for name, table in summarise(run):
        run.tables[name] = table
    return run


def cases() -> PatchingResults:
    """One component of each stack restores clips, the encoder's more of them."""
    return made(restores={("decoder", "mlp", 0): 0.8})


def _something_at_zero(run: PatchingResults) -> PatchingResults:
    table = run["patched"]
    run.tables["patched"] = table.assign(value=table.value + 0.01 * (table.alpha == 0))
    return run


def _another_reference(run: PatchingResults) -> PatchingResults:
    table = run["runs"]
    run.tables["runs"] = table.assign(value=table.value + (table.reference == "silence"))
    return run


def _other_clips(run: PatchingResults) -> PatchingResults:
    run.tables["patched"] = run["patched"].iloc[1:]
    return run


BROKEN: dict[str, Change] = {
    "strength 0 changes nothing": _something_at_zero,
    "the last block replaced is the reference": _another_reference,
    "every component is patched in the same clips": _other_clips,
}
OTHER_WAY: dict[str, Change] = {
    "encoder_component": lambda run: made(restores={("encoder", "attn", 0): 0.3}),
    "decoder_component": lambda run: made(),
    "encoder_not_decoder": lambda run: made(restores={("decoder", "mlp", 0): 1.0}),
}
