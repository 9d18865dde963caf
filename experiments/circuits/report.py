"""Tables of a ``circuits`` run -> summaries, figures, and the report."""

from typing import Any

import pandas as pd

from ..workbench.experiment import Tables
from ..workbench.findings import finding_table
from ..workbench.report import Note, Report, Section, SectionItem, Table
from ..workbench.run_folder import RunFolder
from . import figures as draw
from .claims import findings
from .plan import DIRECTIONS
from .select import confirm, node_cells, top_paths, winners
from .settings import CircuitsConfig
from .tables import controls, faithfulness, total_effects

WHO = ["pair", "contrast", "group", "part"]
EMPTY = {
    "paths": [*WHO, "mode", "sender", "receiver", "place", "toward"],
    "reads": [*WHO, "layer", "head", "input", "place", "toward"],
    "circuit": [*WHO, "circuit", "what", "n_edges", "value", "share"],
}
CAVEATS = (
    "What is sampled are groups of pairs: pairs of a group are averaged before they are tested. "
    "Groups that share a donor clip, as the bundled ones do, are still not quite independent.",
    "The family of tests are all cells of a contrast: directions, places, layers, heads and MLPs. "
    "Cells that are exactly zero in every group cannot reach the answer and are no hypotheses.",
    "Noising shows what is necessary, denoising what is enough; parts that stand in for each other "
    "show in neither alone. A head's effect contains everything downstream of it.",
    "Paths are edges: the residual connection alone. What passes through MLPs counts under ioi.",
    "A circuit is judged with the donor's messages on all other edges, on pairs that were not used "
    "to choose it. Random circuits of equal size are the yardstick; the whole model is 1.",
)


def conclude(
    tables: Tables,
    folder: RunFolder,
    config: CircuitsConfig,
    *,
    n_layers: int,
    is_calibration: bool,
) -> Report:
    """Writes summaries and figures into the run's folder and returns the report."""
    empty = {name: pd.DataFrame(columns=columns) for name, columns in EMPTY.items()}
    tables = {**empty, **tables}
    summaries = _summaries(tables, config, n_layers)
    found = findings(tables, summaries, config)
    summaries["findings"] = finding_table(found)
    for name, table in summaries.items():
        folder.write_table(name, table, is_summary=True)
    contrasts = list(dict.fromkeys(tables["pairs"].contrast))
    sections = [
        _asked(folder, tables["pairs"], summaries, config),
        *(_contrast(folder, one, tables, summaries, config, n_layers) for one in contrasts),
        _checks(summaries),
        Section("Methods and caveats", "\n\n".join([_method(config), *CAVEATS])),
    ]
    return Report(
        title=f"Circuits: {config.model}",
        question="Which heads carry the answer, and is their circuit enough?",
        lead=_lead(tables["pairs"], is_calibration=is_calibration),
        is_calibration=is_calibration,
        headlines=[one.headline() for one in found.values()],
        sections=sections,
    )


def _summaries(tables: Tables, config: CircuitsConfig, n_layers: int) -> dict[str, pd.DataFrame]:
    cells = node_cells(tables["nodes"], config)
    return {
        "effects": total_effects(tables["pairs"], config),
        "node_means": draw.mean_effects(tables["nodes"]),
        "node_cells": cells,
        "winners": confirm(winners(cells, config), tables["nodes"], config),
        "top_paths": top_paths(tables["paths"], config),
        "faithfulness": faithfulness(tables["circuit"], config),
        "controls": controls(tables, n_layers),
    }


def _lead(pairs: pd.DataFrame, *, is_calibration: bool) -> str:
    counts = pairs.groupby("contrast", sort=False).size()
    kinds = " and ".join(f"{n} pairs that differ in the {name}" for name, n in counts.items())
    lead = (
        f"{kinds[0].upper()}{kinds[1:]}. Every head and MLP is exchanged between the two runs of a "
        "pair, exactly, in both directions; the answer is read each time. What moves it is chosen "
        "on some groups of pairs and tested on the others."
    )
    if is_calibration:
        lead += (
            "\n\nThe prompts name one emotion and are spoken with another. follows_text was "
            "trained to answer what the instruction names, follows_voice what the voice says: "
            "which exchange moves the answer has to reverse between them."
        )
    return lead


def _unit(config: CircuitsConfig) -> str:
    return {
        "logit_diff": "effect (logits)",
        "log_prob": "effect (nats)",
        "prob": "effect (probability)",
    }[config.metric]


def _asked(
    folder: RunFolder, pairs: pd.DataFrame, summaries: Tables, config: CircuitsConfig
) -> Section:
    columns = [
        *("pair", "group", "part", "base_answer", "base_says", "donor_answer", "donor_says"),
        "total_effect",
    ]
    items: list[SectionItem] = [
        draw.effects_figure(folder, summaries["effects"], _unit(config)),
        Table("The pairs: answers given, and made", rows=pairs[columns].to_dict("records")),
    ]
    return Section("What was asked", items=items)


def _contrast(
    folder: RunFolder,
    contrast: str,
    tables: Tables,
    summaries: Tables,
    config: CircuitsConfig,
    n_layers: int,
) -> Section:
    unit, means = _unit(config), summaries["node_means"]
    chosen = _of(summaries["winners"], contrast)
    items: list[SectionItem] = []
    if len(chosen):
        items += _circuit(folder, contrast, chosen, tables, summaries, config, n_layers)
    else:
        items.append(Note("No node wins on the discovery pairs: there is no circuit to show."))
    items += [draw.node_maps(folder, means, contrast, one, unit) for one in DIRECTIONS]
    items += [
        draw.mlp_figure(folder, means, contrast, unit),
        draw.direct_figure(folder, tables["direct"], contrast, unit),
    ]
    return Section(f"The {contrast}", items=items)


def _circuit(
    folder: RunFolder,
    contrast: str,
    chosen: pd.DataFrame,
    tables: Tables,
    summaries: Tables,
    config: CircuitsConfig,
    n_layers: int,
) -> list[SectionItem]:
    unit, top = _unit(config), _of(summaries["top_paths"], contrast)
    n_heads = int(tables["nodes"]["head"].max()) + 1
    drawn = [
        draw.circuit_picture(
            folder, contrast, chosen, top, tables["direct"],
            n_layers=n_layers, n_heads=n_heads, unit=unit.split("(")[1][:-1],
        ),
        draw.faithfulness_figure(folder, summaries["faithfulness"], contrast),
        draw.reads_figure(folder, tables["reads"], contrast, unit),
    ]  # fmt: skip
    return [
        *[figure for figure in drawn if figure is not None],
        Table("Winning nodes, and the held-out pairs", rows=_rows(chosen, "layer", "head")),
        Table("The largest paths, and the held-out pairs", rows=_rows(top)),
    ]


def _rows(table: pd.DataFrame, *left_out: str) -> list[dict[str, Any]]:
    columns = ["contrast", *left_out, *(["found"] if "found" in table else [])]
    return [
        {str(k): v for k, v in row.items()}
        for row in table.drop(columns=columns).to_dict("records")
    ]


def _of(table: pd.DataFrame, contrast: str) -> pd.DataFrame:
    return table[table.contrast == contrast].reset_index(drop=True)


def _checks(summaries: Tables) -> Section:
    items: list[SectionItem] = [
        Table("Controls", rows=summaries["controls"].to_dict("records")),
        Table(
            "Claims with their numbers",
            rows=summaries["findings"].drop(columns="statement").to_dict("records"),
        ),
    ]
    text = "What has to come out if the patches are what they claim to be."
    return Section("Controls", text, items)


def _method(config: CircuitsConfig) -> str:
    return (
        f"Model: {config.model}, {config.dtype}, engine {config.engine}. Metric: {config.metric} "
        f"of the two answers' first tokens. Groups are split by a draw with seed {config.seed}, "
        f"{config.discovery_share:g} of them for discovery. A node wins if a cell of it has "
        f"q ≤ {config.fdr:g} and moves the answer by {config.min_effect:g} or more on average. "
        f"Intervals resample groups {config.n_resamples} times."
    )
