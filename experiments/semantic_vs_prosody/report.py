"""Tables of a ``semantic_vs_prosody`` run -> summaries, figures, and the report."""

from collections.abc import Sequence

import pandas as pd

from ..workbench.controls import failures
from ..workbench.experiment import Tables
from ..workbench.findings import finding_table
from ..workbench.report import Clip, Clips, Note, Report, Section, SectionItem, Table
from ..workbench.run_folder import CLIP_RATE_HZ, RunFolder
from . import figures as draw
from .claims import findings
from .controls import controls
from .flips import margin
from .items import QUESTIONS, SpokenItem
from .settings import SemanticVsProsodyConfig
from .tables import label_index, lens_scores, summarise

MAX_CLIP_BYTES = 1_600_000
"""Sound that the page carries; a folder of long recordings would make it too large to send."""
CAVEATS = (
    "Flip rates over all pairs are reported with their base rate and ceiling, because between "
    "clips of equal length the run patched at depth 0 is the donor's own: a high plateau there "
    "says how often the donor says the target, not what a layer controls.",
    "A lens says what could be read at a depth, not what the model uses there; what is used, only "
    "patching shows, and only for these prompts and clips.",
    "That the audio's effect decays with depth means that the information has been copied out, not "
    "that it stopped mattering: look for the span whose recovery rises meanwhile.",
    "A clip of another sentence is another recording altogether: semantic pairs share the voice's "
    "emotion and the speaker, not the timing.",
    "Pointwise bands: each depth's interval holds by itself, not the whole curve at once.",
)


def conclude(
    tables: Tables,
    folder: RunFolder,
    config: SemanticVsProsodyConfig,
    *,
    items: Sequence[SpokenItem],
    n_blocks: int,
    is_calibration: bool,
) -> Report:
    """Writes summaries and figures into the run's folder and returns the report."""
    summaries = summarise(tables, config, items)
    checks = controls(tables, summaries, config, n_blocks)
    found = findings(tables, summaries, checks, config, n_blocks)
    summaries |= {"controls_passed": checks, "findings": finding_table(found)}
    for name, table in summaries.items():
        folder.write_table(name, table, is_summary=True)
    warnings = failures(checks)
    sections = [
        *([Section("Read this first", items=[*warnings])] if warnings else []),
        _asked(folder, tables, items, config),
        _answers(folder, summaries),
        _lens(folder, summaries, config),
        _patching(folder, tables, summaries, config),
        _checks(folder, checks, summaries),
        _method(config, summaries["manifest"]),
    ]
    return Report(
        title=f"Semantic against prosody: {config.model}",
        question="When words and voice disagree, which decides, and where?",
        lead=_lead(items, config, is_calibration=is_calibration),
        is_calibration=is_calibration,
        headlines=[one.headline() for one in found.values()],
        sections=sections,
    )


def _lead(
    items: Sequence[SpokenItem], config: SemanticVsProsodyConfig, *, is_calibration: bool
) -> str:
    n_texts, n_speakers = len({item.text for item in items}), len({item.speaker for item in items})
    lead = (
        f"{len(items)} clips ({n_texts} sentences, {n_speakers} speakers) whose words carry one "
        f"emotion and whose voice another. The model is asked: “{config.prompt}” This page shows "
        "whose emotion it answers, at which depth that can be read, and by which way the words and "
        "the voice reach the answer."
    )
    if is_calibration:
        lead += (
            "\n\nfollows_semantics was trained to answer the emotion of the words, "
            "follows_prosody that of the voice; asked for either by name, both can tell it."
        )
        if config.prompt == QUESTIONS["overall"]:
            lead += (
                " What decides, which exchange moves the answer, and what is handed on must "
                "reverse between them."
            )
    if config.variant == "seed":
        lead += "\n\nThis is the seed variant: it reproduces the seed document's own formulas."
    return lead


def _asked(
    folder: RunFolder,
    tables: Tables,
    items: Sequence[SpokenItem],
    config: SemanticVsProsodyConfig,
) -> Section:
    who, depths, scores = lens_scores(tables["lens"], config)
    values = margin(scores, label_index(who.semantic, config), label_index(who.prosody, config))
    by_item = dict(zip(who["item"], values, strict=True))
    prediction = tables["runs"].set_index("item").prediction
    limits = draw.limits_of(values)
    clips, size = [], 0
    for item in _across_labels(items):
        size += int(item.seconds * CLIP_RATE_HZ * 2)
        if size > MAX_CLIP_BYTES:
            break
        table = pd.DataFrame({"depth": depths, "margin": by_item[item.name]})
        figure = draw.clip_figure(folder, item.name, table, limits)
        path = folder.add_clip(item.name, item.path)
        clips.append(
            Clip(
                path,
                f"“{item.text}”",
                figure,
                {
                    "words": item.semantic,
                    "voice": item.prosody,
                    "answer": prediction[item.name],
                    "speaker": item.speaker,
                },
            )
        )
    caption = (
        f"{len(clips)} of the {len(items)} clips as the model hears them, and the margin by depth "
        "(above zero the voice leads; one scale for all)."
    )
    return Section("What was asked", f"“{config.prompt}”", [Clips(clips, caption)])


def _across_labels(items: Sequence[SpokenItem]) -> list[SpokenItem]:
    """One clip of every pair of labels first, each of another speaker where there are several."""
    by_labels: dict[tuple[str, str], list[SpokenItem]] = {}
    for item in items:
        by_labels.setdefault((item.semantic, item.prosody), []).append(item)
    first = [of[index % len(of)] for index, of in enumerate(by_labels.values())]
    return first + [item for item in items if item not in first]


def _answers(folder: RunFolder, summaries: Tables) -> Section:
    table = summaries["answers"]
    overall = table[table.stratum == "all"].drop(columns="stratum").to_dict("records")
    items: list[SectionItem] = [
        Table("What the answer follows, over all clips", rows=overall),
        draw.answers_figure(folder, summaries),
    ]
    return Section("Answers", items=items)


def _lens(folder: RunFolder, summaries: Tables, config: SemanticVsProsodyConfig) -> Section:
    text = (
        f"The logit lens reads the {len(config.labels)} labels' scores at the position that "
        "predicts the answer, at every depth."
    )
    items: list[SectionItem] = [
        draw.win_figure(folder, summaries, config),
        draw.margin_figure(folder, summaries, config),
    ]
    return Section("Lens", text, items)


def _patching(
    folder: RunFolder, tables: Tables, summaries: Tables, config: SemanticVsProsodyConfig
) -> Section:
    types = list(dict.fromkeys(tables["pairs"].type))
    counts = tables["pairs"].groupby("type", sort=False).size()
    unequal = int((tables["pairs"].len_A != tables["pairs"].len_B).sum())
    text = (
        f"A is the base; a part of its residual stream is replaced by B's. {_pair_text(counts)} "
        f"Every pair is run in both directions. In {unequal} of {len(tables['pairs'])} pairs the "
        f"clips differ in length and are aligned by {config.align}."
    )
    items: list[SectionItem] = []
    for which in types:
        items.append(draw.flip_figure(folder, summaries, str(which), config))
        items += [f for f in [draw.delta_figure(folder, summaries, str(which), config)] if f]
    moved = draw.recovery_figure(folder, summaries)
    if moved is None:
        items.append(Note("No pair has a donor that moves the answer: there is no recovery."))
    else:
        items.append(moved)
    items.append(
        Table("Hand-offs among movable pairs, with 95 % bootstrap intervals", name="handoffs")
    )
    return Section("Patching", text, items)


def _pair_text(counts: pd.Series) -> str:
    kinds = {
        "semantic": "semantic pairs share speaker and voice and differ in the words",
        "prosody": "prosody pairs share speaker and words and differ in the voice",
    }
    return "; ".join(f"{n} {kinds[str(which)]}" for which, n in counts.items()) + "."


def _checks(folder: RunFolder, checks: pd.DataFrame, summaries: Tables) -> Section:
    figure = draw.control_figure(folder, summaries)
    items: list[SectionItem] = [
        *([figure] if figure else []),
        Table("Controls", rows=checks.drop(columns="part").to_dict("records")),
        Table(
            "Claims with their numbers",
            rows=summaries["findings"].drop(columns="statement").to_dict("records"),
        ),
    ]
    text = "What has to come out if the measurements are what they claim to be."
    return Section("Controls", text, items)


def _method(config: SemanticVsProsodyConfig, manifest: pd.DataFrame) -> Section:
    shown = ["duration_s", "rms_dbfs", "f0_median_hz", "f0_iqr_hz"]
    means = manifest.groupby("prosody_label", sort=False)[shown].mean().reset_index()
    items: list[SectionItem] = [
        Table(
            "The voices: where duration or level differ by emotion, they alone may give it away",
            rows=means.to_dict("records"),
        )
    ]
    text = (
        f"Model: {config.model}, {config.dtype}, engine {config.engine}. Intervals resample each "
        f"{config.cluster} whole, {config.n_resamples} times with seed {config.seed}; of a pair, "
        "the base's. Depth k is the residual stream after k blocks: patches at depth 0 exchange "
        "the model's inputs. Recovery is the share of the donor's effect on target minus the "
        f"base's answer, undefined below {config.min_effect:g} logits."
    )
    return Section("Methods and caveats", "\n\n".join([text, *CAVEATS]), items)
