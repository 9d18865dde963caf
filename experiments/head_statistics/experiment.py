"""Head statistics: how large is every head's output, and how much of it reaches the stream?

Multiple-choice questions are read once each; of every head the norm of its output and of what it
adds to the residual stream is taken at the last token, or over all tokens, and summed up over the
items.

Beside its tables a run has the seed's own files: ``config.json``, ``meta.json``,
``head_output_norm_{mean,std}.npy``, ``head_resid_contrib_norm_{mean,std}.npy`` (``[layer, head]``),
and two heat maps.

Source: seed 004; M-004-1 to M-004-9.
"""

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.bundled import bundled_models
from hooked_alm.errors import InputError
from hooked_alm.methods.reading.head_norms import (
    CONTRIBUTION,
    COSINE,
    HEAD_QUANTITIES,
    KEPT,
    OUTPUT,
    HeadMeter,
    Norms,
)
from hooked_alm.methods.statistics.moments import Moments

from ..materials.sources import hashes_of, local
from ..materials.subject import ModelExperiment, described
from ..workbench.batches import bucketed, heaviest
from ..workbench.experiment import Unit, UnitResult
from ..workbench.identity import to_json
from ..workbench.page import Page
from ..workbench.report import Clip
from ..workbench.results import Row
from . import figures
from .claims import CLAIMS, CONTROLS, DEFECTS
from .items import find_file, read_questions
from .prompts import Prompts, QuestionInput, continuation
from .settings import HeadStatisticsConfig
from .tables import TABLES, HeadResults, head_table, layer_by_head, layer_table

MomentsOf = defaultdict[tuple[int, str], Moments]
"""Half and quantity -> moments over its samples."""
N_TOP, N_CLIPS = 12, 6
ITEM_COLUMNS = ("id", "answer_letter", "n_tokens", "is_cut", "is_merged")
TOP = {
    **{name: name for name in ("layer", "head", "rank_in_layer")},
    f"{CONTRIBUTION}_mean": "‖W_h z‖", f"{CONTRIBUTION}_std": "std of it",
    f"{OUTPUT}_mean": "‖z‖", f"{OUTPUT}_std": "its std", f"{COSINE}_mean": "cosine",
}  # fmt: skip
"""Columns of the table of the largest heads, and what they are called there."""


class HeadStatistics(ModelExperiment[HeadStatisticsConfig]):
    """Norms of every head, on multiple-choice questions."""

    name = "head_statistics"
    title = "Head statistics"
    question = "How large is every head's output, and how much of it reaches the residual stream?"
    Config = HeadStatisticsConfig
    schema_version = 2
    tables, controls, claims, defects = TABLES, CONTROLS, CLAIMS, DEFECTS
    caveats = (
        "A norm says how much a head writes, not what for: a head that writes much may change no "
        "answer, and a small one may decide it. Patch heads (see circuits) to learn that.",
        "Norms of parts do not add up to the norm of the sum: heads of a layer may write against "
        "each other. The share that is kept, and each head's cosine with the sum, are given beside "
        "them.",
        "What a head adds counts in relation to the residual stream it is added to, whose norm "
        "grows with depth in most models: compare heads within a layer rather than across layers.",
        "Items share the template's words, so that they vary less than free text would.",
    )

    def identify(self) -> dict[str, Any]:
        """Reads the questions, and makes every prompt."""
        config = self.config
        questions = read_questions(found := find_file(config.data_dir))
        file = local(found)
        self.model = self.lay_out()
        self.prompts = Prompts(self.model, config, questions)
        self.items, skipped = self.prompts.items()
        return {
            "model": described(self.model, config),
            "data": {
                "file": file.name,
                "files": hashes_of([file, *self._clips()], file.parent),
                "n_questions": len(questions),
                "n_measured": len(self.items),
                "skipped": skipped,
                "examples": [one.id for one in self.prompts.examples],
            },
            "prompt_format": "chat" if self.prompts.is_chat else "raw",
            "position_ids": "cumulative sum of the attention mask",
            "letter_token_ids": self._letters(),
        }

    def load(self) -> None:
        """Loads the weights, and factorises the output projections."""
        super().load()
        how = self.config.model_dump(include={"token_agg", "weighting", "head_output"})
        self.meter = HeadMeter(self.model, **how)

    def _clips(self) -> list[Path]:
        """Every clip that is heard, in examples too."""
        asked = [*self.prompts.examples, *(item.question for item in self.items)]
        return list(dict.fromkeys(path for one in asked for path in one.audio))

    def _letters(self) -> dict[str, list[int]]:
        """Tokens of every letter where it continues a prompt."""
        letters = sorted({one for item in self.items for one in item.question.option_labels})
        first = self.items[0]
        prompt = "" if self.prompts.is_chat else first.prompt
        space = first.target.removesuffix(first.question.answer)
        return {one: continuation(self.model.tokenizer, prompt, space + one)[0] for one in letters}

    def units(self) -> list[Unit]:
        """Items of some batches each, in the order of the file."""
        size = self.config.batch_size * self.config.unit_batches
        return [
            Unit(f"items{first:05d}", range(first, min(first + size, len(self.items))))
            for first in range(0, len(self.items), size)
        ]

    def measure(self, unit: Unit) -> UnitResult:
        """The norms of some batches, summed up by half: even and odd items."""
        indices: range = unit.payload
        moments: MomentsOf = defaultdict(Moments)
        errors, kept, spans = [], [], []
        batches = self._batches(indices)
        for batch in batches:
            items = [self.items[i] for i in batch]
            x = self.prompts.batch(items)
            norms = self.meter(x)
            _check_finite(norms, items)
            errors.append(norms.identity_error)
            kept.append(float(norms.kept.max()))
            spans.append(x.spans.to_json())
            measured = {**norms.heads, KEPT: norms.kept}
            for half, (name, values) in product((0, 1), measured.items()):
                moments[half, name].update(values[np.array(batch)[norms.rows] % 2 == half])
        asked = [self.items[i].described() for i in indices]
        sizes = {"n_items": len(indices), "identity_error": max(errors), "most_kept": max(kept)}
        tables = {
            "heads": _rows(unit.id, moments, HEAD_QUANTITIES, ("layer", "head")),
            "layers": _rows(unit.id, moments, (KEPT,), ("layer",)),
            "items": [
                {"unit": unit.id, **{key: one[key] for key in ITEM_COLUMNS},
                 "n_options": len(one["option_labels"])}
                for one in asked
            ],
            "units": [{"unit": unit.id, **sizes}],
        }  # fmt: skip
        return UnitResult(tables, record={"items": asked, "batches": batches, "spans": spans})

    def _batches(self, indices: Sequence[int]) -> list[list[int]]:
        """Items that run together, by their number."""
        config, items = self.config, [self.items[i] for i in indices]
        by_length = config.batch_order == "length"
        batches = bucketed(
            [one.n_tokens if by_length else 0 for one in items],
            config.batch_size,
            config.batch_positions,
        )
        return [[indices[i] for i in batch] for batch in batches]

    def try_batch(self, size: int) -> int:
        """See `TriesBatches`."""
        lengths = [one.n_tokens for one in self.items]
        longest = heaviest(lengths, size, self.config.batch_positions)
        self.meter(self.prompts.batch([self.items[i] for i in longest]))
        return len(longest)

    # --- What is made of it

    def summaries(self, run: HeadResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """Means and standard deviations by head and by layer."""
        yield "head_statistics", head_table(run)
        yield "layer_statistics", layer_table(run)

    def lead(self, run: HeadResults) -> str:
        """What was taken, and where."""
        items, config = run["items"], run.config
        loses_the_end = config.overflow == "right" and items.is_cut.any()
        where = "at the last token of the prompt"
        if config.weighting == "tokens":
            where = "at every token"
        elif config.token_agg == "all":
            where = "as the mean over all tokens of the prompt"
        elif not items.is_merged.any() and not loses_the_end:
            where += ", after which the answer follows"
        lead = (
            f"{len(items)} multiple-choice questions were read once each. For every head, the "
            "norms of its output z and of what it adds to the residual stream, W_h z, were taken "
            f"{where}."
        )
        if skipped := run.inputs["data"]["skipped"]:
            lead += f" {len(skipped)} questions were left out."
        if config.model in bundled_models():
            lead += (
                "\n\nThe bundled models name emotions and were never trained on such questions: "
                "their norms show that the measurement works, not how a model reasons."
            )
        return lead

    def page(self, page: Page, run: HeadResults) -> None:
        """What was asked, every head, and the seed's own files."""
        self._add_questions(page, run)
        heads = run["head_statistics"]
        page.section("Heads")
        figures.add_head_maps(page, heads)
        figures.add_depth(page, run["layer_statistics"])
        top = heads.sort_values(f"{CONTRIBUTION}_mean", ascending=False)[list(TOP)].head(N_TOP)
        page.table(f"The {N_TOP} heads that write most", top.rename(columns=TOP))
        self._write_seed_files(run)

    def _add_questions(self, page: Page, run: HeadResults) -> None:
        items, skipped = run["items"], run.inputs["data"]["skipped"]
        page.section("What was asked")
        columns = ["id", "n_options", "answer_letter", "n_tokens", "is_cut"]
        page.table("The questions", items[columns], max_rows=12)
        if skipped:
            page.table("Left out", skipped)
        if n := int(items.is_cut.sum()):
            page.note(f"{n} of {len(items)} prompts were cut to max_length.", is_warning=True)
        if n := int(items.is_merged.sum()):
            page.note(
                f"In {n} of {len(items)} prompts the tokenizer merges the end of the prompt with "
                "the answer: the last token that was measured is not the one that predicts it "
                "(C35).",
                is_warning=True,
            )
        heard = [item.question for item in self.items if item.question.audio][:N_CLIPS]
        clips = [
            Clip(self.folder.add_clip(f"clip{number:02d}", one.audio[0]), one.id,
                 numbers={"question": one.question, "answer": one.answer})
            for number, one in enumerate(heard)
        ]  # fmt: skip
        if clips:
            page.clips(clips, f"The first {len(clips)} that are heard.")

    def _write_seed_files(self, run: HeadResults) -> None:
        """``config.json``, ``meta.json``, arrays and heat maps, where the seed had them."""
        inputs, heads, folder = run.inputs, run["head_statistics"], self.folder
        copied = ("token_agg", "weighting", "ddof", "template_name", "dtype", "seed", "variant")
        meta = {
            "num_layers": heads.layer.nunique(), "num_heads": heads["head"].nunique(),
            "num_processed": len(run["items"]), "num_skipped": len(inputs["data"]["skipped"]),
            "num_samples": heads.n[0], **{key: getattr(self.config, key) for key in copied},
            "known_defects": sorted(self.known_defects()),
        }  # fmt: skip
        settings = self.config.model_dump(mode="json")
        for file, content in (("config.json", settings), ("meta.json", {**inputs, **meta})):
            folder.write(file, to_json(content, indent=1) + "\n")
        for name in (OUTPUT, CONTRIBUTION):
            for what in ("mean", "std"):
                data = io.BytesIO()
                np.save(data, layer_by_head(heads, f"{name}_{what}"))
                folder.write(f"{name}_{what}.npy", data.getvalue())
            png = f"{name}_heatmap.png"
            folder.write(png, folder.read(f"figures/{png}"))

    def method(self, run: HeadResults) -> str:
        """How norms and moments were made."""
        config = run.config
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


def _rows(unit: str, moments: MomentsOf, names: Sequence[str], axes: Sequence[str]) -> list[Row]:
    """A row per half and cell; floats are written so that they come back as they were."""
    rows = []
    for half in (0, 1):
        some = {name: moments[half, name] for name in names}
        n, shape = some[names[0]].n, some[names[0]].mean.shape
        for cell in np.ndindex(shape) if n else ():  # a half without items has no row
            row: Row = {"unit": unit, "half": half, **dict(zip(axes, cell, strict=True)), "n": n}
            for name, one in some.items():
                row |= {f"{name}_mean": float(one.mean[cell]), f"{name}_m2": float(one.m2[cell])}
            rows.append(row)
    return rows


def _check_finite(norms: Norms, items: Sequence[QuestionInput]) -> None:
    for name, values in norms.heads.items():
        if not np.isfinite(values).all():
            sample, layer, head = np.argwhere(~np.isfinite(values))[0]
            where = items[norms.rows[sample]].question.where
            raise InputError(
                f"measuring {where}: {name} of layer {layer}, head {head} is "
                f"{values[sample, layer, head]}, expected a finite number. Use dtype bfloat16 or "
                "float32 in place of float16, and check the weights."
            )
