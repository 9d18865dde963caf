"""Tables of an ``emotion_conflict`` run -> summaries, figures, and the report."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..materials.recordings import Recording
from ..workbench.controls import failures
from ..workbench.experiment import Tables
from ..workbench.findings import finding_table
from ..workbench.report import Clip, Clips, Figure, Report, Section, SectionItem, Table
from ..workbench.run_folder import CLIP_RATE_HZ, RunFolder
from . import figures as draw
from .claims import claims, finding_by_id
from .controls import controls
from .settings import EmotionConflictConfig
from .tables import MEAN_CURVE, PATCHING, items_with_delta, summarise

CSV = (
    *("manifest", "delta_logit_curves", "critical_layers", "accuracy", "ob1_flip_summary"),
    *("flip_matrix", "patching_summary", "handoffs", "controls", "findings"),
)
MAX_CLIP_BYTES = 4_000_000
"""Sound that the page carries; a folder of long recordings would make it too large to send."""
CONDITIONS = {
    "audio_only": "asks for the voice's emotion A, and names none",
    "conflict": "asks to judge in the tone of another emotion T",
    "consistent": "the same words, naming the voice's own emotion A",
    "mention_only": "control: mentions T as an example, without asking for it",
    "list_all": "control: lists all labels, in another order for every clip",
    "irrelevant_adjective": "control: the words of conflict with an adjective that is no emotion",
}
CAVEATS = (
    "Voice and sentence: all clips of OB1 share one voice and one sentence. The intervals say what "
    "other readings of this sentence by this voice would give, not what other speakers or "
    "sentences would.",
    "Attention is no cause: a position may be attended to and not used. What is used, only "
    "patching shows, and only for these prompts.",
    "Label copying: the instruction of conflict contains the word of T, so T's logit may rise "
    "by copying. mention_only and list_all measure that, and the label span is patched apart.",
    "Pointwise bands: each depth's interval holds by itself, not the whole curve at once.",
    "The logit lens applies the final norm and the unembedding to inner states; where its "
    "fidelity is low it says little. Late settling should also show under patching.",
)
TUNED_LENS = (
    "The tuned lens adds a trained map at every depth, which learnt to predict the output: it can "
    "read a label at a depth where the model has not settled it."
)


def conclude(
    tables: Tables,
    folder: RunFolder,
    config: EmotionConflictConfig,
    *,
    recordings: Sequence[Recording],
    n_blocks: int,
    is_calibration: bool,
) -> Report:
    """Writes summaries and figures into the run's folder and returns the report."""
    tables = {"patching": pd.DataFrame(columns=PATCHING), **tables}
    summaries = summarise(tables, config, recordings, n_blocks)
    checks = controls(
        tables, config, n_blocks, audio_is_first=_audio_is_first(folder, tables["runs"])
    )
    found = claims(tables, summaries, checks, config, n_blocks)
    summaries |= {"controls": checks, "findings": finding_table(finding_by_id(found))}
    for name, table in summaries.items():
        folder.write_table(name, table, is_summary=name in CSV)
    items = items_with_delta(tables)
    warnings = failures(checks)
    sections = [
        *([Section("Read this first", items=[*warnings])] if warnings else []),
        _asked(folder, items, recordings, config),
        _answers(folder, summaries),
        _lens(folder, summaries, config),
        _patching(folder, summaries, config),
        _attention(folder, summaries),
        _checks(checks, summaries["findings"]),
        _method(config, summaries["manifest"]),
    ]
    return Report(
        title=f"Emotion conflict: {config.model}",
        question="Where does the voice's emotion lose against the instruction's?",
        lead=_lead(recordings, config, is_calibration),
        is_calibration=is_calibration,
        headlines=[claim.finding.headline() for claim in found],
        sections=sections,
    )


def _audio_is_first(folder: RunFolder, runs: pd.DataFrame) -> bool | None:
    """Whether the audio precedes the instruction, from the span map of the first run."""
    unit = str(runs.unit.iloc[0])
    if not folder.unit_path(unit).exists():
        return None
    spans = folder.read_unit(unit)["record"]["spans"]
    return bool(max(end for _, end in spans["audio"]) <= min(start for start, _ in spans["text"]))


def _lead(
    recordings: Sequence[Recording], config: EmotionConflictConfig, is_calibration: bool
) -> str:
    lead = (
        f"{len(recordings)} clips speak one sentence with different emotions. The instruction "
        "asks for the voice's emotion A, or names another one, T. This page shows which of the "
        "two the answer follows, at which depth that can be read, and which positions carry it."
    )
    if is_calibration:
        lead += (
            "\n\nThe two bundled models were trained on a known rule: one lets the instruction "
            "win, its twin the voice. A method that measures arbitration has to reverse its "
            "conclusion between them."
        )
    if config.variant == "seed":
        lead += "\n\nThis is the seed variant: it reproduces the seed document's own formulas."
    return lead


def _asked(
    folder: RunFolder,
    items: pd.DataFrame,
    recordings: Sequence[Recording],
    config: EmotionConflictConfig,
) -> Section:
    conditions = [{"condition": mode, "instruction": CONDITIONS[mode]} for mode in config.modes]
    limits = draw.clip_limits(items)
    final = items.drop_duplicates(["clip", "target", "condition"]).set_index(["clip", "condition"])
    clips, size = [], 0
    for recording in recordings:
        name = recording.name
        size += int(recording.seconds * CLIP_RATE_HZ * 2)
        figure = draw.clip_figure(folder, name, items, limits)
        path = folder.add_clip(name, recording.path)
        if size <= MAX_CLIP_BYTES:
            answers: dict[str, Any] = {
                f"answer, {mode}": ", ".join(dict.fromkeys(final.loc[[(name, mode)]].prediction))
                for mode in draw.MAIN
                if mode in config.modes
            }
            clips.append(Clip(path, name, figure, answers))
    caption = (
        "Each clip as the model hears it (16 kHz), its Δlogit by depth (T minus A, above zero the "
        "instruction leads; one scale for all clips), and the answers."
    )
    if len(clips) < len(recordings):
        caption += f" {len(recordings) - len(clips)} more are in the run's folder, under clips/."
    listed: list[SectionItem] = [Table("Conditions", rows=conditions), Clips(clips, caption)]
    return Section("What was asked", "The same clip under every instruction.", listed)


def _answers(folder: RunFolder, summaries: Tables) -> Section:
    items: list[SectionItem] = [
        draw.answers_figure(folder, summaries),
        draw.flip_figure(folder, summaries),
        Table(
            "Flip summary; the primary set are the clips whose voice is recognised alone",
            name="ob1_flip_summary",
        ),
    ]
    return Section("Answers", items=items)


def _lens(folder: RunFolder, summaries: Tables, config: EmotionConflictConfig) -> Section:
    controls = [mode for mode in config.modes if mode not in draw.MAIN]
    # Second, so that it keeps the colour that it has in the other figures.
    shown = [*controls[:1], "conflict", *controls[1:]] if controls else []
    curves = {
        "delta_logit__combined": (draw.MAIN, "Δlogit by condition"),
        "delta_logit__controls": (shown, "Δlogit of the control prompts"),
    }
    is_matched = config.contrast == "matched_pair"
    figures = [
        draw.delta_figure(folder, name, summaries, modes, title, is_matched=is_matched)
        for name, (modes, title) in curves.items()
    ]
    figures.append(draw.fidelity_figure(folder, summaries))
    layers = summaries["critical_layers"]
    mean = layers[(layers.file == MEAN_CURVE) & layers.condition.isin(draw.MAIN)]
    columns = ["condition", "method", "depth", "low", "high", "relative_depth", "undefined"]
    table = Table(
        "Depth at which the mean curve turns, by five definitions (per clip: critical_layers)",
        rows=mean[columns].to_dict("records"),
    )
    text = (
        f"The {_lens_name(config)} reads the five labels' scores at the answer position after "
        "every block. "
        f"The primary definition of the critical depth here is {config.critical_method}; where "
        "definitions disagree, the depth is a matter of definition."
    )
    return Section("Lens", text, [*_given(figures), table])


def _lens_name(config: EmotionConflictConfig) -> str:
    return "logit lens" if config.tuned_lens is None else f"tuned lens {config.tuned_lens}"


def _given(figures: Sequence[Figure | None]) -> list[SectionItem]:
    return [figure for figure in figures if figure is not None]


def _patching(folder: RunFolder, summaries: Tables, config: EmotionConflictConfig) -> Section:
    figures = [
        draw.handoff_figure(folder, summaries),
        draw.recovery_figure(folder, summaries, "text_swap", "another instruction"),
        draw.recovery_figure(folder, summaries, "audio_swap", "another voice"),
        draw.seed_patching_figure(
            folder, summaries, audio_is_not_text=config.audio_positions == "not_text"
        ),
    ]
    text = (
        "A conflict run is the base. From a donor run one span's states are written into it after "
        "one block, and the answer is read again: what brings the donor's answer carries it. "
        "text_swap exchanges the instruction's emotion, audio_swap the voice, both both. The "
        "donor's total effect (TE) is how far its own answer gains, in logits, over the label that "
        "it displaces; recovery is the share of TE that the patch brings."
    )
    items: list[SectionItem] = [
        *_given(figures),
        Table("Hand-offs, with 95 % bootstrap intervals over clips", name="handoffs"),
    ]
    if unmoved := _unmoved(summaries["patching_summary"]):
        text += (
            f"\n\nNo recovery is shown for {' and '.join(unmoved)}: no item has a total effect of "
            f"{config.min_effect:g} logits or more."
        )
    return Section("Patching", text, items)


def _unmoved(patching: pd.DataFrame) -> list[str]:
    """Donors, but for the run itself, that change no item's answer enough to be recovered."""
    most = patching[patching.donor != "self"].groupby("donor", sort=False)
    return [str(donor) for donor, part in most if part.recovery_mean.isna().all()]


def _attention(folder: RunFolder, summaries: Tables) -> Section:
    figures = [draw.attention_figure(folder, summaries), draw.ratio_figure(folder, summaries)]
    return Section("Attention", items=[*figures])


def _checks(checks: pd.DataFrame, findings: pd.DataFrame) -> Section:
    rows = checks.drop(columns="part").to_dict("records")
    text = "What has to come out if the measurements are what they claim to be."
    items: list[SectionItem] = [
        Table("Controls", rows=rows),
        Table(
            "Claims with their numbers", rows=findings.drop(columns="statement").to_dict("records")
        ),
    ]
    return Section("Controls", text, items)


def _method(config: EmotionConflictConfig, manifest: pd.DataFrame) -> Section:
    shown = ["path", "duration_s", "rms_dbfs", "f0_median_hz", "f0_iqr_hz"]
    items: list[SectionItem] = [
        Table(
            "The clips: where duration or level differ by emotion, they alone may give it away",
            rows=manifest[shown].to_dict("records"),
        )
    ]
    text = (
        f"Model: {config.model}, {config.dtype}. Intervals resample clips {config.n_resamples} "
        f"times with seed {config.seed}; rates have Wilson intervals, which take items for "
        "independent (under all_pairs a clip has four; they are then too narrow). Recoveries are "
        "undefined "
        f"below a total effect of {config.min_effect:g} logits, and counted."
    )
    caveats = [*CAVEATS, *([] if config.tuned_lens is None else [TUNED_LENS])]
    return Section("Methods and caveats", "\n\n".join([text, *caveats]), items)
