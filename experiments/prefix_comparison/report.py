"""Tables of a ``prefix_comparison`` run -> summaries, figures, arrays, and the report."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..workbench.experiment import Tables
from ..workbench.findings import finding_table
from ..workbench.report import Figure, Note, Report, Section, SectionItem, Table
from ..workbench.run_folder import RunFolder
from . import figures as draw
from . import maps as maps_of
from .claims import findings
from .settings import PrefixComparisonConfig
from .shards import Maps, shards
from .tables import (
    class_summary,
    controls,
    coupling_summary,
    curve_summary,
    mass_summary,
    position_summary,
    quadrant_summary,
    run_summary,
)

CAVEATS = (
    "ΔNLL is the loss under the first prefix minus that under the second; both predict the same "
    "tokens, given the same tokens before. Blank and special tokens are left out of means.",
    "Early depths of a logit lens may decode nothing. That two prefixes agree there says little.",
    "Outcomes depend on the same probabilities as ΔNLL: groups by outcome differ almost by "
    "definition. They describe; to explain, take the outcome from another sample or decoding.",
    "Attention is where a head reads, not whether it matters. Content interventions and position "
    "modes are the controls.",
    "What is sampled are items, or groups of items that share a source.",
)
TUNED_LENS = (
    "A tuned lens was trained to predict the output: it can decode a token at a depth where the "
    "model does not use it yet."
)
CITED = (
    "Probabilities by layer and token: Meng et al. 2022 (ROME). Logit difference as a difference "
    "of losses: Wang et al. 2022. Choice of metrics: Conmy et al. 2023, Zhang and Nanda 2023. Lens "
    "by layer and token: Belrose et al. 2023."
)


def conclude(
    tables: Tables,
    folder: RunFolder,
    config: PrefixComparisonConfig,
    *,
    compared: tuple[str, str, str],
    kind: str,
    outcomes: str,
    is_calibration: bool,
) -> Report:
    """Writes summaries, figures and arrays into the run's folder and returns the report."""
    a, b, segment = compared
    summaries = _summaries(tables, compared, config)
    found = findings(tables, summaries, compared, config)
    summaries["findings"] = finding_table(found)
    for name, table in summaries.items():
        folder.write_table(f"{name}_summary" if name in tables else name, table, is_summary=True)
    maps, own = _maps(folder, tables["items"], config)
    folder.write_table("anchors", pd.DataFrame(
        [{"anchor": name, "items": n, "left_out": len(tables["items"]) - n}
         for name, n in maps.anchored.items()], columns=["anchor", "items", "left_out"],
    ), is_summary=True)  # fmt: skip
    return Report(
        title=f"Prefix comparison: {config.model}",
        question=f"At which depth and token does {a} help more than {b}?",
        lead=_lead(tables["items"], compared, outcomes, is_calibration=is_calibration),
        is_calibration=is_calibration,
        headlines=[one.headline() for one in found.values()],
        sections=[
            Section("By depth", items=_by_depth(folder, tables, summaries, compared, config)),
            Section("By token", items=[*own, *maps_of.aligned_maps(folder, maps, config)]),
            Section(
                f"Attention to {segment}",
                items=[
                    draw.mass_figure(folder, summaries["mass"], (a, b)),
                    draw.heads_figure(folder, maps, a, segment),
                    draw.coupling_figure(folder, summaries["coupling"]),
                ],
            ),
            _content(folder, summaries, compared),
            _positions(folder, summaries["positions"]),
            _checks(summaries),
            Section(
                "Methods and caveats",
                "\n\n".join(
                    [
                        _method(config, kind),
                        *CAVEATS,
                        *([] if config.tuned_lens is None else [TUNED_LENS]),
                        CITED,
                    ]
                ),
            ),
        ],
    )


def _summaries(
    tables: Tables, compared: tuple[str, str, str], config: PrefixComparisonConfig
) -> dict[str, pd.DataFrame]:
    a, b, _ = compared
    items = tables["items"]
    groups: Mapping[str, str] = dict(zip(items.item, items.group, strict=True))
    positions = position_summary(tables, groups, config)
    runs = run_summary(tables["runs"], groups, config)
    n_segment = tables["runs"].groupby("run", sort=False).n_segment.max()
    return {
        "curves": curve_summary(tables["curves"], groups, config),
        "quadrants": quadrant_summary(tables["curves"], items, a, config),
        "mass": mass_summary(tables["mass"], groups, config),
        "coupling": coupling_summary(tables["coupling"], groups, config),
        "runs": runs.assign(n_segment=runs.run.map(n_segment)),
        "classes": class_summary(tables["classes"], groups, config),
        "positions": positions,
        "controls": controls(tables, a, b, positions),
    }


def _maps(
    folder: RunFolder, items: pd.DataFrame, config: PrefixComparisonConfig
) -> tuple[Maps, list[Figure]]:
    """One pass over the shards: sums for the maps, arrays of every item, maps of the first few."""
    maps = Maps()
    own = []
    for number, shard in enumerate(shards(folder, items)):
        maps.add(shard, config)
        arrays = {
            "delta_nll": shard.delta.astype(np.float32),
            "js": shard.js.astype(np.float32),
            "nll": shard.nll,
        }
        folder.write_arrays(
            f"items/{shard.item}", arrays,
            delta_nll="depth token", js="depth token", nll="run depth any_token",
        )  # fmt: skip
        if number < config.n_shown and len(shard.tokens.semantic) > 1:
            own.append(maps_of.item_maps(folder, shard, config))
    return maps, own


def _by_depth(
    folder: RunFolder,
    tables: Tables,
    summaries: Tables,
    compared: tuple[str, str, str],
    config: PrefixComparisonConfig,
) -> list[SectionItem]:
    a, b, _ = compared
    return [
        *draw.curve_figure(folder, summaries["curves"], a, b),
        draw.quadrant_figure(folder, summaries["quadrants"]),
        maps_of.every_item(folder, tables["curves"], a, config),
        *(
            [draw.class_figure(folder, summaries["classes"])]
            if len(summaries["classes"]) > 1
            else []
        ),
        Table("The items", rows=tables["items"].to_dict("records")),
    ]


def _content(folder: RunFolder, summaries: Tables, compared: tuple[str, str, str]) -> Section:
    _, b, segment = compared
    columns = ["role", "run", "n", "delta", "delta_change", "mass", "mass_change", "right", "exact"]
    rows = summaries["runs"][columns].to_dict("records")
    return Section(
        f"If {segment} held something else",
        items=[
            draw.run_figure(folder, summaries["runs"], segment, b),
            Table("Every prefix (_change: against the first)", rows=rows),
        ],
    )


def _positions(folder: RunFolder, positions: pd.DataFrame) -> Section:
    if positions.empty:
        note = Note("The two prefixes are of one length in every item: there is nothing to match.")
        return Section("Lengths matched", items=[note])
    return Section(
        "Lengths matched",
        items=[
            draw.position_figure(folder, positions),
            Table("Position modes", rows=positions.to_dict("records")),
        ],
    )


def _checks(summaries: Tables) -> Section:
    return Section(
        "Controls",
        "What has to come out if the numbers are what they claim to be.",
        [
            Table("Controls", rows=summaries["controls"].to_dict("records")),
            Table(
                "Claims with their numbers",
                rows=summaries["findings"].drop(columns="statement").to_dict("records"),
            ),
        ],
    )


def _lead(
    items: pd.DataFrame,
    compared: tuple[str, str, str],
    outcomes: str,
    *,
    is_calibration: bool,
) -> str:
    a, b, _ = compared
    right = items[["right_a", "right_b"]].mean()
    how = {
        "file": "as the file says",
        "greedy": "if every token of it is the most likely one",
    }[outcomes]
    lead = (
        f"{len(items)} continuations, each after two prefixes: {a} and {b}. Every depth's "
        f"prediction of every token is compared. A run is right {how}: {a} in {right.right_a:.0%}, "
        f"{b} in {right.right_b:.0%} of the items."
    )
    if is_calibration:
        lead += (
            "\n\nThe bundled items: a voice speaks one emotion, the instruction names another, and "
            "the continuation is the voice's. follows_voice was trained to answer so, and should "
            "need to hear it; follows_text was trained to answer what the instruction names, and "
            "hearing the voice should help it little. The twins must differ."
        )
    return lead


def _lens(config: PrefixComparisonConfig) -> str:
    return "logit lens" if config.tuned_lens is None else f"tuned lens {config.tuned_lens}"


def _method(config: PrefixComparisonConfig, kind: str) -> str:
    return (
        f"Model: {config.model}, {config.dtype}. Prefix and continuation are joined as "
        f"{config.concatenate}; residuals come from {config.lens_source}, and are read through the "
        f"{_lens(config)}. Token classes: {kind}. "
        f"Beside weights, prompts and one block of one run, at most "
        f"{config.max_bytes / 2**20:.0f} MiB are held. "
        f"Intervals resample items {config.n_resamples} times, seed {config.seed}."
    )
