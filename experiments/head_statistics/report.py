"""Tables of a ``head_statistics`` run -> the seed's files, summaries, figures, and the report."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooked_alm.methods.statistics.moments import Moments

from ..materials.bundled import PREFIX
from ..workbench.experiment import Tables
from ..workbench.findings import finding_table
from ..workbench.report import Clip, Clips, Note, Report, Section, Table
from ..workbench.run_folder import RunFolder, write_atomic
from . import figures as draw
from .claims import controls, findings
from .measure import CONTRIBUTION, COSINE, HEAD_QUANTITIES, KEPT, OUTPUT
from .plan import QuestionInput
from .settings import HeadStatisticsConfig

N_TOP, N_CLIPS = 12, 6
CAVEATS = (
    "A norm says how much a head writes, not what for: a head that writes much may change no "
    "answer, and a small one may decide it. Patch heads (see circuits) to learn that.",
    "Norms of parts do not add up to the norm of the sum: heads of a layer may write against each "
    "other. The share that is kept, and each head's cosine with the sum, are given beside them.",
    "What a head adds counts in relation to the residual stream it is added to, whose norm grows "
    "with depth in most models: compare heads within a layer rather than across layers.",
    "Items share the template's words, so that they vary less than free text would.",
)


def conclude(
    tables: Tables,
    folder: RunFolder,
    config: HeadStatisticsConfig,
    measured: Sequence[QuestionInput],
    skipped: Sequence[dict[str, Any]],
) -> Report:
    """Writes the seed's files, summaries and figures into the run's folder."""
    heads, layers = tables["heads"], tables["layers"]
    whole = {name: merged(heads, name) for name in HEAD_QUANTITIES}
    halves = {name: tuple(merged(heads, name, half=half) for half in (0, 1)) for name in whole}
    summaries = {
        "head_statistics": head_table(whole, config.ddof),
        "layer_statistics": layer_table(whole, merged(layers, KEPT), config.ddof),
        "controls": controls(tables["units"], config),
    }
    found = findings(whole, halves, len(tables["items"]), summaries["controls"], config)
    summaries["findings"] = finding_table(found)
    for name, table in summaries.items():
        folder.write_table(name, table, is_summary=True)
    figures = draw.figures(folder, summaries["head_statistics"], summaries["layer_statistics"])
    write_seed_files(folder, whole, tables["items"], skipped, config)
    return Report(
        title=f"Head statistics: {config.model}",
        question="How large is every head's output, and how much of it reaches the stream?",
        lead=_lead(tables["items"], skipped, config),
        is_calibration=config.model.startswith(PREFIX),
        headlines=[one.headline() for one in found.values()],
        sections=[
            _asked(folder, tables["items"], measured, skipped),
            Section("Heads", items=[*figures, _top(summaries["head_statistics"])]),
            _checks(summaries),
            Section("Methods and caveats", "\n\n".join([_method(config), *CAVEATS])),
        ],
    )


# --- Summing up


def merged(table: pd.DataFrame, name: str, half: int | None = None) -> Moments:
    """Moments of all units, or of one half of the items, in the order of the units."""
    total = Moments()
    axes = [axis for axis in ("layer", "head") if axis in table]
    shape = [int(table[axis].max()) + 1 for axis in axes]
    for (_, number), part in table.groupby(["unit", "half"], sort=False):
        if half in (None, number):
            mean, m2 = (part[f"{name}_{what}"].to_numpy().reshape(shape) for what in ("mean", "m2"))
            total = total.merge(Moments(int(part.n.iloc[0]), mean, m2))
    return total


def head_table(whole: dict[str, Moments], ddof: int) -> pd.DataFrame:
    """A row per head: mean and standard deviation of each quantity, and its rank in the layer."""
    n_layers, n_heads = whole[OUTPUT].mean.shape
    table = pd.DataFrame(
        [(layer, head) for layer in range(n_layers) for head in range(n_heads)],
        columns=["layer", "head"],
    )
    table["n"] = whole[OUTPUT].n
    for name, moments in whole.items():
        table[f"{name}_mean"] = moments.mean.ravel()
        table[f"{name}_std"] = moments.std(ddof=ddof).ravel()
    order = table.groupby("layer")[f"{CONTRIBUTION}_mean"].rank(ascending=False, method="first")
    table["rank_in_layer"] = order.astype(int)
    return table


def layer_table(whole: dict[str, Moments], kept: Moments, ddof: int) -> pd.DataFrame:
    """A row per layer: mean, least and most over its heads, and the share that is kept."""
    columns: dict[str, Any] = {"layer": np.arange(len(kept.mean)), "n": kept.n}
    for name in (OUTPUT, CONTRIBUTION):
        values = whole[name].mean
        columns |= {name: values.mean(1), f"{name}_low": values.min(1)}
        columns[f"{name}_high"] = values.max(1)
    return pd.DataFrame({**columns, "kept_mean": kept.mean, "kept_std": kept.std(ddof=ddof)})


# --- The seed's files


def write_seed_files(
    folder: RunFolder,
    whole: dict[str, Moments],
    items: pd.DataFrame,
    skipped: Sequence[dict[str, Any]],
    config: HeadStatisticsConfig,
) -> None:
    """``config.json``, ``meta.json``, the arrays and the heat maps, where the seed had them."""
    run = folder.provenance
    folder.write_json("config.json", config.model_dump(mode="json"))
    n_layers, n_heads = whole[OUTPUT].mean.shape
    folder.write_json(
        "meta.json",
        {
            "model": run["inputs"]["model"],
            "num_layers": n_layers,
            "num_heads": n_heads,
            "num_processed": len(items),
            "num_skipped": len(skipped),
            "num_samples": whole[OUTPUT].n,
            "token_agg": config.token_agg,
            "weighting": config.weighting,
            "ddof": config.ddof,
            "template_name": config.template_name,
            "dtype": config.dtype,
            "seed": config.seed,
            "variant": config.variant,
            "known_defects": sorted(config.known_defects()),
            **{
                key: run["inputs"][key]
                for key in ("prompt_format", "position_ids", "letter_token_ids", "data")
            },
        },
    )
    for name in (OUTPUT, CONTRIBUTION):
        _save_array(folder, f"{name}_mean", whole[name].mean)
        _save_array(folder, f"{name}_std", whole[name].std(ddof=config.ddof))
        png = f"{name}_heatmap.png"
        write_atomic(folder.path / png, (folder.path / "figures" / png).read_bytes())


def _save_array(folder: RunFolder, name: str, values: Float[np.ndarray, "layer head"]) -> None:
    data = io.BytesIO()
    np.save(data, values)
    write_atomic(folder.path / f"{name}.npy", data.getvalue())


# --- The report's parts


def _lead(
    items: pd.DataFrame, skipped: Sequence[dict[str, Any]], config: HeadStatisticsConfig
) -> str:
    loses_the_end = config.overflow == "right" and items.is_cut.any()
    where = "at the last token of the prompt"
    if config.token_agg == "all":
        by_token = config.weighting == "tokens"
        where = "at every token" if by_token else "as the mean over all tokens of the prompt"
    elif not items.is_merged.any() and not loses_the_end:
        where += ", after which the answer follows"
    lead = (
        f"{len(items)} multiple-choice questions were read once each. Of every head, the norm of "
        f"its output z and of what it adds to the residual stream, W_h z, were taken {where}."
    )
    if skipped:
        lead += f" {len(skipped)} questions were left out."
    if config.model.startswith(PREFIX):
        lead += (
            "\n\nThe bundled models name emotions and were never trained on such questions: their "
            "norms show that the measurement works, not how a model reasons."
        )
    return lead


def _asked(
    folder: RunFolder,
    items: pd.DataFrame,
    measured: Sequence[QuestionInput],
    skipped: Sequence[dict[str, Any]],
) -> Section:
    columns = ["id", "n_options", "answer_letter", "n_tokens", "is_cut"]
    shown: list[Any] = [Table("The questions", rows=items[columns].to_dict("records"), max_rows=12)]
    if skipped:
        shown.append(Table("Left out", rows=list(skipped)))
    if n := int(items.is_cut.sum()):
        shown.append(Note(f"{n} of {len(items)} prompts were cut to max_length.", kind="warning"))
    if n := int(items.is_merged.sum()):
        text = (
            f"In {n} of {len(items)} prompts the tokenizer merges the end of the prompt with the "
            "answer: the last token that was measured is not the one that predicts it (C35)."
        )
        shown.append(Note(text, kind="warning"))
    heard = [item.question for item in measured if item.question.audio][:N_CLIPS]
    if heard:
        clips = [
            Clip(folder.add_clip(f"clip{number:02d}", one.audio[0]), one.id, None,
                 {"question": one.question, "answer": one.answer})
            for number, one in enumerate(heard)
        ]  # fmt: skip
        shown.append(Clips(clips, f"The first {len(clips)} that are heard."))
    return Section("What was asked", items=shown)


def _top(heads: pd.DataFrame) -> Table:
    top = heads.sort_values(f"{CONTRIBUTION}_mean", ascending=False).head(N_TOP)
    names = {
        **{name: name for name in ("layer", "head", "rank_in_layer")},
        f"{CONTRIBUTION}_mean": "‖W_h z‖", f"{CONTRIBUTION}_std": "std of it",
        f"{OUTPUT}_mean": "‖z‖", f"{OUTPUT}_std": "its std", f"{COSINE}_mean": "cosine",
    }  # fmt: skip
    rows = top[list(names)].rename(columns=names).to_dict("records")
    return Table(f"The {N_TOP} heads that write most", rows=rows)


def _checks(summaries: Tables) -> Section:
    return Section(
        "Controls",
        "What has to come out if the norms are what they claim to be.",
        [
            Table("Controls", rows=summaries["controls"].to_dict("records")),
            Table(
                "Claims with their numbers",
                rows=summaries["findings"].drop(columns="statement").to_dict("records"),
            ),
        ],
    )


def _method(config: HeadStatisticsConfig) -> str:
    counted = "token" if config.weighting == "tokens" else "item"
    source = {
        "hook_z": "the input of the output projection",
        "pattern_times_v": "the attention pattern times the values, computed again",
    }[config.head_output]
    return (
        f"Model: {config.model}, {config.dtype}, {config.attn_implementation}. Template: "
        f"{config.template_name} ({config.template_form}), {config.few_shot} solved examples. "
        f"z is {source}. Norms in fp32, moments in fp64; means and standard deviations (ddof "
        f"{config.ddof}) are over {counted}s."
    )
