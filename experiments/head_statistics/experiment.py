"""Head statistics: how large is every head's output, and how much of it reaches the stream?

Multiple-choice questions are read once each; of every head the norm of its output and of what it
adds to the residual stream is taken at the last token, or over all tokens, and summed up over the
items.

Source: seed document 004; methods cards M-004-1 to M-004-9. Tables: ``heads`` and ``layers``
(moments by unit and half of the items), ``items``, ``units``; ``head_statistics``,
``layer_statistics``, ``controls``, ``findings`` (summaries). Beside them the seed's own files:
``config.json``, ``meta.json``, ``head_output_norm_{mean,std}.npy``,
``head_resid_contrib_norm_{mean,std}.npy`` (``[layer, head]``), and two heat maps.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from hooked_alm.errors import InputError
from hooked_alm.methods.statistics.moments import Moments

from ..materials.subject import described, load_subject
from ..workbench.experiment import Experiment, Row, Tables, Unit, UnitResult
from ..workbench.report import Report
from ..workbench.run_folder import RunFolder
from .items import Questions, read_questions
from .measure import HEAD_QUANTITIES, KEPT, HeadMeter, Norms
from .plan import Prompts, QuestionInput
from .report import conclude
from .settings import HeadStatisticsConfig
from .templates import answer_ids

MomentsOfHalf = dict[str, Moments]


class HeadStatistics(Experiment[HeadStatisticsConfig]):
    """Norms of every head, on multiple-choice questions."""

    name = "head_statistics"
    question = "How large is every head's output, and how much of it reaches the residual stream?"
    Config = HeadStatisticsConfig

    def open(self) -> dict[str, Any]:
        """Load model and questions, and make every prompt before the first unit."""
        config = self.config
        questions = read_questions(config.data_dir)
        placement = {} if config.device_map is None else {"device_map": config.device_map}
        self.model = load_subject(config, **placement)
        self.prompts = Prompts(self.model, config, questions.read)
        self.items, too_long = self.prompts.items()
        self.skipped = [*questions.skipped, *too_long]
        self.meter = HeadMeter(
            self.model,
            token_agg=config.token_agg,
            weighting=config.weighting,
            head_output=config.head_output,
        )
        return {
            "model": described(self.model, config),
            "known_defects": config.known_defects(),
            "data": self._described(questions),
            "prompt_format": self.prompts.format,
            "position_ids": "cumulative sum of the attention mask",
            "letter_token_ids": self._letters(),
        }

    def _described(self, questions: Questions) -> Row:
        return {
            "file": questions.file.name,
            "sha256": hashlib.sha256(questions.file.read_bytes()).hexdigest(),
            "clips_sha256": _clips_hash(self.items),
            "n_questions": len(questions.read) + len(questions.skipped),
            "n_measured": len(self.items),
            "skipped": self.skipped,
            "examples": [one.id for one in self.prompts.examples],
        }

    def _letters(self) -> dict[str, list[int]]:
        letters = sorted({one for item in self.items for one in item.question.option_labels})
        first = self.items[0]
        prompt = first.prompt if self.prompts.format == "raw" else ""
        space = first.target.removesuffix(first.question.answer)
        return {one: answer_ids(self.model.tokenizer, prompt, space + one) for one in letters}

    def units(self) -> list[Unit]:
        """Some batches each, in the order of the file."""
        size = self.config.batch_size * self.config.unit_batches
        return [
            Unit(f"items{first:05d}", range(first, min(first + size, len(self.items))))
            for first in range(0, len(self.items), size)
        ]

    def run_unit(self, unit: Unit) -> UnitResult:
        """The norms of some batches, summed up."""
        indices: range = unit.payload
        halves: tuple[MomentsOfHalf, MomentsOfHalf] = ({}, {})
        spans, measured = [], []
        for first in indices[:: self.config.batch_size]:
            batch = range(first, min(first + self.config.batch_size, indices.stop))
            items = [self.items[i] for i in batch]
            x = self.prompts.batch(items)
            norms = self.meter(x)
            _check_finite(norms, items)
            measured.append(norms)
            spans.append(x.spans.to_json())
            for number, half in enumerate(halves):
                _take_in(half, norms, (norms.rows + first) % 2 == number)
        tables = {
            "heads": _rows(unit.id, halves, HEAD_QUANTITIES, ("layer", "head")),
            "layers": _rows(unit.id, halves, (KEPT,), ("layer",)),
            "items": [{"unit": unit.id, **_table_row(self.items[i])} for i in indices],
            "units": [
                {
                    "unit": unit.id,
                    "n_items": len(indices),
                    "identity_error": max(norms.identity_error for norms in measured),
                    "most_kept": max(float(norms.kept.max()) for norms in measured),
                }
            ],
        }
        described = [self.items[i].described() for i in indices]
        return UnitResult(tables=tables, record={"items": described, "spans": spans})

    def conclude(self, tables: Tables, folder: RunFolder) -> Report:
        """The seed's files, figures, summaries and findings, from the tables."""
        return conclude(tables, folder, self.config, self.items, self.skipped)


def _take_in(half: MomentsOfHalf, norms: Norms, chosen: np.ndarray) -> None:
    for name, values in (*norms.heads.items(), (KEPT, norms.kept)):
        half.setdefault(name, Moments()).update(values[chosen])


def _rows(
    unit: str, halves: Iterable[MomentsOfHalf], names: tuple[str, ...], axes: tuple[str, ...]
) -> list[Row]:
    """A row per half and cell; floats are written so that they come back as they were."""
    rows = []
    for number, half in enumerate(halves):
        if not half[names[0]].n:
            continue
        for cell in np.ndindex(half[names[0]].mean.shape):
            row: Row = {"unit": unit, "half": number, **dict(zip(axes, cell, strict=True))}
            row["n"] = half[names[0]].n
            for name in names:
                row[f"{name}_mean"] = float(half[name].mean[cell])
                row[f"{name}_m2"] = float(half[name].m2[cell])
            rows.append(row)
    return rows


def _table_row(item: QuestionInput) -> Row:
    shown = ("id", "answer_letter", "n_tokens", "is_cut", "is_merged")
    found = item.described()
    n_options = len(item.question.option_labels)
    return {**{key: found[key] for key in shown}, "n_options": n_options}


def _check_finite(norms: Norms, items: list[QuestionInput]) -> None:
    for name, values in norms.heads.items():
        if not np.isfinite(values).all():
            sample, layer, head = np.argwhere(~np.isfinite(values))[0]
            where = items[norms.rows[sample]].question.where
            raise InputError(
                f"measuring {where}: {name} of layer {layer}, head {head} is "
                f"{values[sample, layer, head]}, expected a finite number. Use dtype bfloat16 or "
                "float32 in place of float16, and check the weights."
            )


def _clips_hash(items: list[QuestionInput]) -> str | None:
    """Over every clip that is heard; None without any."""
    digest = hashlib.sha256()
    clips = [path for item in items for path in item.question.audio]
    for path in clips:
        digest.update(path.read_bytes())
    return digest.hexdigest() if clips else None
