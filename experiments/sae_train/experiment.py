"""Sparse autoencoders: which directions make up what a model holds at these points?

Dictionaries of one or several hook points are trained in one pass over clips, or over the rows that
a store of activations has; several of each point from seeds of their own, and as many on noise of
the rows' mean and covariance. They are judged on clips of other speakers: what they leave
unexplained, what the answer loses if their reconstructions stand in the rows' place, and whether
two of a point have found the same directions, beside noise and no training.

The run folder has them in ``sae/POINT/seed_N``, folders that SAELens loads, too.

Source: M-SAE-1, M-SAE-2; C42, C43, C51, C52.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import Tensor

from hooked_alm.converters.dictionaries import (
    WEIGHTS,
    StoredDictionary,
    load_dictionary,
    save_dictionary,
)
from hooked_alm.errors import InputError
from hooked_alm.methods.dictionary.noise import RowNoise
from hooked_alm.methods.dictionary.training import DictionaryTrainer

from ..materials.checkpoints import FOLDER, Checkpoints
from ..materials.clip_rows import ClipRows, HeldOutClips
from ..materials.clips import file_safe
from ..materials.dictionary_partners import copy_row, partner_rows, untrained
from ..materials.dictionary_quality import quality_rows
from ..materials.recordings import load_clips
from ..materials.recovered_answers import ablations, recovery_rows, word_rows
from ..materials.row_source import MeanRows, RowSource
from ..materials.stored_rows import StoredRows
from ..materials.subject import ModelExperiment
from ..workbench.experiment import Unit, UnitResult
from ..workbench.identity import file_sha256
from ..workbench.page import Page
from ..workbench.results import Row
from .claims import CLAIMS, CONTROLS
from .pages import CAVEATS, fill_page, lead, method
from .settings import SAETrainConfig
from .tables import MAY_LACK, TABLES, TrainedResults, summarise

LearntFrom = Literal["rows", "noise"]
Key = tuple[str, LearntFrom, int]
"""Point, what is learnt, seed."""
N_LOGGED = 200  # steps of a training that its table has, about


class TrainDictionaries(ModelExperiment[SAETrainConfig]):
    """Units train some steps of all dictionaries; then one judges those of each point."""

    name = "sae_train"
    title = "Sparse autoencoders"
    question = "Which directions make up what the model holds at these points?"
    Config = SAETrainConfig
    tables, may_lack = TABLES, MAY_LACK
    controls, claims, caveats = CONTROLS, CLAIMS, CAVEATS
    leaves = (FOLDER, "sae", "noise")

    def identify(self) -> dict[str, Any]:
        """Reads the clips, or the store, and counts the rows of every clip."""
        config = self.config
        self.rows = rows = self._source()
        self.split = split = HeldOutClips.of(rows.clips, config)
        n_train, n_held_out = rows.count(split.learnt), rows.count(split.held_out)
        if n_train < config.step_rows or not n_held_out:
            raise InputError(
                f"choosing rows to learn: got {n_train} rows of {len(split.learnt)} clips, "
                f"and {n_held_out} held-out ones; expected at least one step's {config.step_rows}, "
                "and some held out. Give more clips, other spans, or a smaller step_rows."
            )
        self.shapes = {point.name: config.shape(point.width) for point in rows.points}
        return {
            **rows.described,
            "points": {p.name: {"d_in": p.width, "d_sae": self.shapes[p.name].d_sae,
                                 "k": self.shapes[p.name].k}
                       for p in rows.points},
            "rows": {"learnt": n_train, "held out": n_held_out},
            "groups": len({*split.groups}),
            "held_out_groups": split.held_out_groups,
            **({"provenance": config.provenance} if config.recipe else {}),
        }  # fmt: skip

    def _source(self) -> RowSource:
        config = self.config
        found: RowSource
        if config.store is not None:
            found = StoredRows.opened(config.store, config.points, config)
        else:
            self.model = self.lay_out(hears=True)
            found = ClipRows.planned(self.model, load_clips(config.source), config.points, config)
        return MeanRows.of_clips(found) if config.pool == "mean" else found

    def load(self) -> None:
        """Loads the weights, where there is a model to run."""
        if self.config.store is None:
            super().load()
        self._trainers: dict[Key, DictionaryTrainer] = {}
        self._noise: dict[str, RowNoise] = {}
        self._stream: Iterator[dict[str, Tensor]] = iter(())
        """Rows of the steps from that on at which the trainers are."""

    @property
    def keys(self) -> list[Key]:
        """Every dictionary that is trained."""
        sources: list[LearntFrom] = ["rows", "noise"] if self.config.noise else ["rows"]
        return [
            (point, source, seed)
            for point in self.shapes
            for source in sources
            for seed in self.config.seeds
        ]

    @property
    def _checkpoints(self) -> Checkpoints:
        config = self.config
        return Checkpoints(
            self.folder, config.n_steps, config.steps_per_checkpoint, ["sae", "noise"]
        )

    # --- Units

    def units(self) -> list[Unit]:
        """Training, some steps a unit; then a unit for each point."""
        checkpoints = self._checkpoints
        judged = [
            Unit(f"judge__{number:03d}", point, after=checkpoints.last_unit)
            for number, point in enumerate(self.shapes)
        ]
        return checkpoints.units() + judged

    def measure(self, unit: Unit) -> UnitResult:
        """Some steps of every dictionary, or what those of a point are worth."""
        work = unit.payload
        return self._train(work) if isinstance(work, range) else self._judge(work)

    def _train(self, steps: range) -> UnitResult:
        self._begin(steps.start)
        every, table = max(self.config.n_steps // N_LOGGED, 1), []
        for step in steps:
            batch = next(self._stream)
            for (point, source, seed), trainer in self._trainers.items():
                rows = batch[point] if source == "rows" else self._noise_rows(point, step)
                found = trainer.step(rows)
                if step % every == 0 or step == self.config.n_steps - 1:
                    numbers = {name: float(value) for name, value in found._asdict().items()}
                    n_seen = step * self.config.step_rows
                    table.append({"point": point, "source": source, "seed": seed, "step": step,
                                  "rows": n_seen, **numbers})  # fmt: skip
        record = self._checkpoints.write(steps, self._state())
        if steps.stop == self.config.n_steps:
            for key, trainer in self._trainers.items():
                self._save(key, trainer)
            record |= {_named(key): file_sha256(self._dictionary_file(key)) for key in self.keys}
        return UnitResult({"training": table}, record)

    def _begin(self, step: int) -> None:
        """Has all trainers behind a step."""
        if self._trainers and all(one.n_done == step for one in self._trainers.values()):
            return
        state = self._checkpoints.read(step) if step else {}
        stream = self._batches(step)
        first = next(stream)
        self._stream = chain([first], stream)
        batch = {point: rows.float() for point, rows in first.items()}
        for number, (point, rows) in enumerate(batch.items()):
            kept = [state[f"{number}/{name}"] for name in ("mean", "factor")] if step else []
            self._noise[point] = RowNoise(*kept) if step else RowNoise.like(rows)
        self._trainers = {}
        for key in self.keys:
            point, source, seed = key
            rows = batch[point] if source == "rows" else self._noise_rows(point, step)
            trainer = DictionaryTrainer(self.shapes[point], self.config.training(), rows, seed)
            if step:
                prefix = self._prefix(key)
                trainer.restore({
                    name.removeprefix(prefix): value
                    for name, value in state.items()
                    if name.startswith(prefix)
                })  # fmt: skip
            self._trainers[key] = trainer

    def _prefix(self, key: Key) -> str:
        point, source, seed = key
        return f"{[*self.shapes].index(point)}/{source}/{seed}/"

    def _state(self) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for number, point in enumerate(self.shapes):
            noise = self._noise[point]
            found |= {f"{number}/mean": noise.mean, f"{number}/factor": noise.factor}
        for key, trainer in self._trainers.items():
            found |= {self._prefix(key) + name: one for name, one in trainer.state().items()}
        return found

    def _batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """Rows of a step and of all behind it: one shuffled pass after the other."""
        config = self.config
        mixed = self.rows.mixed(self.split.learnt, config.max_bytes)
        epoch, start = divmod(step, len(mixed) // config.step_rows)
        while True:
            yield from mixed.epoch(config.step_rows, seed=config.seed, epoch=epoch, start=start)
            epoch, start = epoch + 1, 0

    def _noise_rows(self, point: str, step: int) -> Tensor:
        """Noise like the point's rows; the same for all seeds of dictionaries."""
        key = (self.config.seed, step, [*self.shapes].index(point))
        return self._noise[point].drawn(self.config.step_rows, key).to(self.rows.device)

    # --- What training leaves

    def _dictionary_file(self, key: Key) -> Path:
        point, source, seed = key
        kind = "sae" if source == "rows" else "noise"
        return self.folder.inside(f"{kind}/{file_safe(point)}/seed_{seed}/{WEIGHTS}")

    def _save(self, key: Key, trainer: DictionaryTrainer) -> None:
        point, source, seed = key
        about = {
            "learnt_from": source,
            "seed": seed,
            "spans": self.config.spans,
            "pool": self.config.pool,
            "prompt": self.rows.prompt,
            "of_model": self.rows.of_model,
            "rows_seen": self.config.n_steps * self.config.step_rows,
            "held_out_groups": self.split.held_out_groups,
            "dead": trainer.dead.nonzero().flatten().tolist(),
        }
        save_dictionary(
            trainer.trained(), self._dictionary_file(key).parent, point=point,
            model=self.rows.of_model.get("name", self.config.subject), about=about,
        )  # fmt: skip

    def _check(self, key: Key) -> None:
        """Refuse a dictionary that is not as training left it."""
        self._checkpoints.check(self._dictionary_file(key), self.config.n_steps, _named(key))

    def _load(self, key: Key) -> StoredDictionary:
        self._check(key)
        found = load_dictionary(self._dictionary_file(key).parent)
        found.sae.to(self.rows.device)
        return found

    def _judge(self, point: str) -> UnitResult:
        loaded = {key: self._load(key) for key in self.keys if key[0] == point}
        saes = {seed: one.sae for (_, source, seed), one in loaded.items() if source == "rows"}
        partners = list[Row]()
        for source in {source: None for _, source, _ in loaded}:
            mine = {seed: one for (_, kind, seed), one in loaded.items() if kind == source}
            partners += partner_rows(
                point, source,
                {seed: one.sae.W_dec for seed, one in mine.items()},
                {seed: one.about["dead"] for seed, one in mine.items()},
            )  # fmt: skip
        partners += partner_rows(point, "untrained", untrained(saes), {seed: [] for seed in saes})
        rows = replace(self.rows, points=[one for one in self.rows.points if one.name == point])
        answers: dict[str, list[Row]] = {}
        if isinstance(rows, ClipRows):
            given = (rows, self.split, point, saes, ablations(rows, self.split, point))
            answers = {"recovery": [*recovery_rows(*given)], "words": [*word_rows(*given)]}
        tables: dict[str, list[Row]] = {
            "quality": [*quality_rows(rows, self.split.held_out, point, saes)],
            **answers,
            "partners": partners,
            "copies": [
                {"point": point, "seed": seed, **copy_row(sae.W_dec, seed)}
                for seed, sae in saes.items()
            ],
        }
        return UnitResult({name: table for name, table in tables.items() if table})

    # --- What is made of it

    def summaries(self, run: TrainedResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """Stability beside its nulls, what answers lose, and how training ended."""
        return summarise(run)

    def lead(self, run: TrainedResults) -> str:
        """What was trained on what."""
        return lead(run)

    def page(self, page: Page, run: TrainedResults) -> None:
        """Every point, then the training."""
        for key in self.keys:
            self._check(key)
        self._checkpoints.remove()
        fill_page(page, run)

    def method(self, run: TrainedResults) -> str:
        """How dictionaries were trained and judged."""
        return method(run)


def _named(key: Key) -> str:
    """A dictionary, as a unit's record has it."""
    return "/".join(map(str, key))
