"""The controls of ``emotion_conflict``: what must come out if the measurements are what they claim.

Source: methods section 2 (invariants I2, I3 to I7, I9) and cards M-000-9, M-000-12.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..materials.ob1 import EMOTIONS
from ..workbench.controls import ROUNDING, control_row, label_mass, labels_are_said
from ..workbench.experiment import Tables
from ..workbench.findings import MIN_ITEMS
from .settings import EmotionConflictConfig

EmotionEvidence = Literal["answers", "lens", "patching", "attention"]


def controls(
    tables: Tables, config: EmotionConflictConfig, n_blocks: int, *, audio_is_first: bool | None
) -> pd.DataFrame:
    """One row per control: what it found, what it should find, and what it guards against.

    Args:
        tables: of the run.
        config: of the run.
        n_blocks: of the model.
        audio_is_first: whether the audio precedes the instruction in the prompt; None if unknown.
    """
    runs, patching = tables["runs"], tables["patching"]
    tolerance = ROUNDING[config.dtype]
    rows = [
        labels_are_said(runs, "answers"),
        label_mass(runs, "answers"),
        _lens_end(tables, n_blocks, tolerance),
        *_exact_patches(patching, config, n_blocks, audio_is_first),
        _all_positions(patching, runs, tolerance),
        _readout_at_the_end(patching, config, n_blocks),
        _random_donor(patching),
        _mass_sum(tables["attention"]),
    ]
    return pd.DataFrame(rows)


def _lens_end(tables: Tables, n_blocks: int, tolerance: float) -> dict[str, Any]:
    depths, labels = tables["depths"], [f"z_{name}" for name in EMOTIONS]
    last = depths[depths.depth == n_blocks].set_index("unit")[labels]
    found, passed = "the lens does not reach the output", None
    if len(last):
        real = tables["runs"].set_index("unit")[labels]
        worst = float((last - real.loc[last.index]).abs().to_numpy().max())
        found, passed = f"largest difference {worst:.2g}", worst <= tolerance
    return control_row(
        "lens at the last depth = logits",
        "lens",
        f"at most {tolerance:g}",
        "a lens with the final norm left out or applied twice (I2)",
        found=found,
        passed=passed,
    )


def _exact_patches(
    patching: pd.DataFrame,
    config: EmotionConflictConfig,
    n_blocks: int,
    audio_is_first: bool | None,
) -> Iterator[dict[str, Any]]:
    spans, tolerance = config.patched_spans(), _patch_rounding(config)
    unread = [name for name, parts in spans.items() if "readout" not in parts]
    yield _no_shift(
        "a run patched with itself",
        patching[patching.donor == "self"],
        "a donor taken at another place than where it is written (I3)",
        tolerance,
    )
    yield _no_shift(
        "last block, any span without the readout",
        patching[(patching.block == n_blocks - 1) & patching.span.isin(unread)],
        "an answer that is read at another position than the readout (I6)",
        tolerance,
    )
    is_known = spans.get("audio") == ("audio",) and bool(audio_is_first)
    before = patching[(patching.donor == "text_swap") & (patching.span == "audio")]
    yield _no_shift(
        "audio span, other instruction, audio first",
        before if is_known else before.iloc[:0],
        "text information that leaks into the audio span (I7)",
        tolerance,
    )


def _patch_rounding(config: EmotionConflictConfig) -> float:
    """How far a patched run may be from the whole run that it must equal."""
    return 0.0 if config.engine == "hooks" else ROUNDING[config.dtype]


def _exactly(what: str, tolerance: float) -> str:
    return f"{what}, within {tolerance:g} by rounding" if tolerance else f"exactly {what}"


def _no_shift(
    control: str, cells: pd.DataFrame, guards_against: str, tolerance: float
) -> dict[str, Any]:
    worst = float(cells["shift"].abs().max()) if len(cells) else np.nan
    return control_row(
        control,
        "patching",
        _exactly("0", tolerance),
        guards_against,
        found=f"largest |shift| {worst:g} of {len(cells)} cells" if len(cells) else "no such cells",
        passed=worst <= tolerance if len(cells) else None,
    )


def _all_positions(patching: pd.DataFrame, runs: pd.DataFrame, tolerance: float) -> dict[str, Any]:
    cells = patching[(patching.span == "all") & patching.recovery.notna()]
    cells = cells[_has_equal_lengths(cells, runs)]
    found, passed = "no such cells with donors of equal length", None
    if len(cells):
        low, high = cells.recovery.min(), cells.recovery.max()
        missed = float((cells["shift"] - cells.total_effect).abs().max())
        found = f"recovery {low:.6g} to {high:.6g} in {len(cells)} cells"
        passed = missed <= tolerance
    return control_row(
        "all positions patched = the donor's answer",
        "patching",
        "recovery 1 at every block",
        "spans that leave positions out, or a donor of another run (I4)",
        found=found,
        passed=passed,
    )


def _has_equal_lengths(cells: pd.DataFrame, runs: pd.DataFrame) -> "pd.Series[bool]":
    """Whether base and donor are equally long, clip and instruction each."""
    audio = runs.groupby("clip").n_audio_tokens.first()
    template = runs[runs.condition.isin(["conflict", "consistent"])]
    words = (
        (template.n_tokens - template.n_audio_tokens)
        .groupby([template.prompt_language, template.named])
        .first()
    )

    def text(named: str) -> "pd.Series[float]":
        keys = pd.MultiIndex.from_frame(cells[["prompt_language", named]])
        return pd.Series(words.reindex(keys).to_numpy(), cells.index)

    same_audio = cells["clip"].map(audio) == cells["donor_clip"].map(audio)
    return same_audio & (text("named") == text("donor_named"))


def _readout_at_the_end(
    patching: pd.DataFrame, config: EmotionConflictConfig, n_blocks: int
) -> dict[str, Any]:
    read = [name for name, parts in config.patched_spans().items() if "readout" in parts]
    cells = patching[(patching.block == n_blocks - 1) & patching.span.isin(read)]
    missed = float((cells["shift"] - cells.total_effect).abs().max()) if len(cells) else np.nan
    tolerance = _patch_rounding(config)
    return control_row(
        "last block, readout patched = the donor's answer",
        "patching",
        _exactly("it", tolerance),
        "a donor state that the final norm or another block has changed (I5)",
        found=f"largest difference {missed:.2g}" if len(cells) else "no such cells",
        passed=missed <= tolerance if len(cells) else None,
    )


def _random_donor(patching: pd.DataFrame) -> dict[str, Any]:
    """A donor that neither names nor speaks A should bring A less often than one that does.

    It may bring it sometimes: whatever disturbs the instruction leaves the voice.
    """
    start = patching[(patching.base < 0) & patching.donor.isin(["random_other", "text_swap"])]
    start = start.assign(hit=start.prediction == start.toward)
    found, passed = "too few such items", None
    counts = start.groupby(["donor", "block", "span"]).hit.agg(["sum", "size"])
    most = counts.groupby("donor").max().reindex(["random_other", "text_swap"], fill_value=0)
    if most["size"].min() >= MIN_ITEMS:
        (k, n), (k_text, n_text) = most.astype(int).to_numpy().tolist()
        found = f"at most {k} of {n} in any cell, the text-swap donor {k_text} of {n_text}"
        passed = k / n < k_text / n_text
    return control_row(
        "an unrelated donor does not bring the voice's label",
        "patching",
        "less often than the text-swap donor",
        "any disturbance being taken for the donor's content",
        found=found,
        passed=passed,
    )


def _mass_sum(attention: pd.DataFrame) -> dict[str, Any]:
    worst = float((attention.groupby(["unit", "layer"]).mass.sum() - 1).abs().max())
    return control_row(
        "attention of the segments sums to 1",
        "attention",
        "within 1e-4",
        "positions that belong to no segment, or to two (I9)",
        found=f"largest difference {worst:.2g}",
        passed=worst <= 1e-4,
    )
