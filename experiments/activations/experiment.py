"""Activations: rows of any hook points at any spans of your clips, stored on disk.

What is stored is read by ``hooked_alm.ActivationReader``: shuffled within a memory bound, split by
speaker, by probes and dictionaries alike. The run folder has a store for each kind of rows:
``activations/prompt`` of the decoder's points, ``activations/encoder`` of the audio encoder's.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_alm.bundled import CLIPS
from hooked_alm.errors import InputError
from hooked_alm.inputs import AudioClip
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.activations.rows import ActivationRows
from hooked_alm.methods.activations.selection import RowKind
from hooked_alm.methods.activations.store import StoreCard, read_shard
from hooked_alm.methods.activations.writer import ActivationWriter

from ..materials.clips import described_table
from ..materials.hearing import heard_alike
from ..materials.recordings import load_clips
from ..materials.subject import ModelExperiment, described
from ..workbench.batches import bucketed, heaviest
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.run_folder import RunFolder
from ..workbench.work import Part, share
from .pages import CAVEATS, fill_page, lead, method
from .plan import (
    StoragePlan,
    check_room,
    labels_of,
    plan_storage,
)
from .settings import ActivationsConfig
from .tables import CONTROLS, TABLES, StoredResults, summarise


class StoreActivations(ModelExperiment[ActivationsConfig]):
    """A unit is a shard: the rows of some clips, in batches that do not depend on what is left."""

    name = "activations"
    title = "Activations"
    question = "What is at these points of the model, at these spans of my clips?"
    Config = ActivationsConfig
    schema_version = 2
    tables, controls = TABLES, CONTROLS
    caveats = CAVEATS
    leaves = ("activations",)

    def __init__(self, config: ActivationsConfig) -> None:
        super().__init__(config)
        self._planned: StoragePlan | None = None
        self._n_words: int | None = None

    def planned(self) -> StoragePlan:
        """What will be stored; clips are read once, and no weight is loaded.

        Raises:
            InputError: clips, spans or a model that cannot be used.
            HookNameError: points that cannot be kept.
        """
        if self._planned is None:
            config = self.config
            self.clips = load_clips(CLIPS if config.audio == "bundled" else config.audio)
            self.labels = labels_of(self.clips)
            self.model = self.lay_out(hears=True)
            self._planned = plan_storage(self.model, self.clips, config)
        return self._planned

    def check_room(self, out: Path, part: Part | None) -> None:
        """Refuse a disk without room for what is still to be written into a run folder.

        Args:
            out: the folder.
            part: of the units that are to be measured.

        Raises:
            InputError: it is so.
        """
        plan, folder = self.planned(), RunFolder(out)
        left = [u.payload for u in share(self.units(), part) if not folder.is_done(u.id)]
        check_room(plan, folder.path, left)

    def identify(self) -> dict[str, Any]:
        """Counts what will be stored."""
        plan = self.planned()
        self._check_shards()
        points: dict[str, dict[str, list[int]]] = {kind: {} for kind in plan.kinds}
        for point in plan.points:
            points[point.kind][point.name] = [*point.shape]
        self.about = {
            "model": described(self.model, self.config),
            "prompt": self.config.prompt,
            "spans": self.config.spans,
        }
        source = self.config.audio
        return {
            "model": self.about["model"],
            **({} if source == "bundled" else described_table(source)),
            "points": points,
            "rows": {kind: plan.n_rows(kind) for kind in plan.kinds},
            "clips": {clip.name: clip.sha256 for clip in self.clips},
            "labels": self.labels,
        }

    def _check_shards(self) -> None:
        """Refuse to resume a run whose finished units have left shards that are not whole."""
        for unit in self.units():
            if not self.folder.is_done(unit.id):
                continue
            try:
                for kind in self.planned().kinds:
                    read_shard(self._store(kind), unit.payload)
            except InputError as error:
                done = self.folder.path / "units" / f"{unit.id}.json"
                raise InputError(f"{error} Delete {done}, too: the unit is then redone.") from None

    # --- Units

    @staticmethod
    def _unit_id(number: int) -> str:
        return f"shard__{number:05d}"

    def units(self) -> list[Unit]:
        """A unit for each shard."""
        numbers = range(len(self.planned().shards))
        return [Unit(self._unit_id(number), number) for number in numbers]

    def measure(self, unit: Unit) -> UnitResult:
        """Runs the clips of a shard and writes their rows."""
        plan, number, config = self.planned(), unit.payload, self.config
        clips, model = plan.shards[number], self.model
        heard = {clip: config.read(model, self.clips[clip]) for clip in clips}
        batches = bucketed(
            [self._n_positions(heard[clip]) for clip in clips],
            config.batch_size,
            config.batch_positions,
            kinds=[heard_alike(model, [heard[clip]]) for clip in clips],
        )
        parts: dict[RowKind, list[ActivationRows]] = {kind: [] for kind in plan.kinds}
        ran: list[int] = []
        for batch in batches:
            some = [clips[i] for i in batch]
            for kind, rows in self._rows({clip: heard[clip] for clip in some}, len(ran)).items():
                parts[kind].append(rows.cast(config.kept_dtype))
            ran += some
        shards, counted = [], []
        for kind in plan.kinds:
            rows = ActivationRows.joined(parts.pop(kind)).by_prompt(ran)
            record = self._writer(kind).write(number, rows)
            shards.append({
                "shard": number, "kind": kind, "clips": len(clips), "rows": record.rows,
                "planned": plan.n_rows(kind, clips),
                "bytes": record.tensor_bytes + record.index_bytes,
                "sha256": record.tensor_sha256, "index_sha256": record.index_sha256,
            })  # fmt: skip
            found = pd.DataFrame({key: rows.index[key] for key in ("clip", "span")})
            sizes = found.groupby(["clip", "span"], sort=False).size()
            counted += [
                {"kind": kind, "clip": clip, "span": span, "rows": int(n)}
                for (clip, span), n in sizes.items()
            ]
        return UnitResult({"shards": shards, "clips": counted})

    def _rows(
        self, clips: Mapping[int, AudioClip], first_prompt: int = 0
    ) -> dict[RowKind, ActivationRows]:
        """Rows of one forward, of clips by their numbers."""
        return rows_of(
            self.model,
            self.config.heard(self.model, [*clips.values()]),
            self.planned().points,
            self.config.spans,
            labels={name: [texts[i] for i in clips] for name, texts in self.labels.items()},
            first_prompt=first_prompt,
        )

    def try_batch(self, size: int) -> int:
        """See `TriesBatches`."""
        # Milliseconds, since no clip has been heard yet; then by what the heard ones fill.
        longest = heaviest([round(1000 * one.seconds) for one in self.clips], size)
        heard = [self.config.read(self.model, self.clips[i]) for i in longest]
        lengths = [self._n_positions(clip) for clip in heard]
        some = heaviest(lengths, size, self.config.batch_positions)
        self._rows({longest[i]: heard[i] for i in some})
        return len(some)

    def _n_positions(self, clip: AudioClip) -> int:
        """Positions of a clip's prompt; all prompts have the same words."""
        if self._n_words is None:
            self._n_words = self.config.heard(self.model, [clip]).shape[1] - clip.n_tokens
        return self._n_words + clip.n_tokens

    def _store(self, kind: RowKind) -> Path:
        return self.folder.inside(f"activations/{kind}/store.json").parent

    def _writer(self, kind: RowKind) -> ActivationWriter:
        dtype = self.config.kept_dtype
        return ActivationWriter(self._store(kind), dtype=dtype, about=self.about)

    # --- What is made of it

    def summaries(self, run: StoredResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """Sizes, and rows by span and label."""
        return summarise(run)

    def lead(self, run: StoredResults) -> str:
        """What is stored, and where."""
        return lead(run)

    def page(self, page: Page, run: StoredResults) -> None:
        """Finishes the stores, then shows what they hold."""
        plan = self.planned()
        cards: dict[str, StoreCard] = {
            kind: self._writer(kind).finish(len(plan.shards)) for kind in plan.kinds
        }
        fill_page(page, run, cards)

    def method(self, run: StoredResults) -> str:
        """How clips were run."""
        return method(run)
