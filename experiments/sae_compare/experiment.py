"""Sparse autoencoders side by side: what is each worth, and do they agree?

Any list of dictionaries of one model, ours, SAELens' or dictionary_learning's, on the same rows of
the same clips: what they leave unexplained, whether two of a point have the same directions, off
how few latents a label is read and without how many no more, and how codes hold acoustic factors
apart; each beside its nulls.

Source: M-SAE-2, M-SAE-4, M-SAE-6; C40, C44, C49.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hooked_alm.errors import InputError
from hooked_alm.methods.activations.selection import kept_points
from hooked_alm.methods.dictionary.disentanglement import NEEDED, varying

from ..materials.acoustics import HEARD
from ..materials.clip_rows import ClipRows
from ..materials.clips import ClipFile, Sounds, manifest, sound_units
from ..materials.dictionaries import PlacedDictionary, named_dictionaries
from ..materials.dictionary_partners import (
    PARTNERS,
    PartnerCorrelations,
    copy_row,
    partner_rows,
    untrained,
)
from ..materials.dictionary_quality import quality_rows
from ..materials.feature_reading_claims import READING_DEFECTS
from ..materials.feature_readings import (
    Factors,
    FactorWork,
    FeatureKind,
    FeatureSet,
    LabelReading,
)
from ..materials.held_out_labels import (
    check_columns,
    check_grouped,
    described_labels,
    held_out_by,
    held_out_folds,
    held_out_labels,
)
from ..materials.kept_features import FeatureFiles, files_of, keep_features, kept_features
from ..materials.recordings import load_clips
from ..materials.records import collect
from ..materials.subject import ModelExperiment
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from .claims import CLAIMS, CONTROLS
from .pages import CAVEATS, fill_page, lead, method
from .settings import SAECompareConfig
from .tables import MAY_LACK, TABLES, ComparedResults, summarise


@dataclass(frozen=True)
class _OfPoint:
    """A point whose dictionaries are held against each other; the payload of a unit."""

    point: str
    files: FeatureFiles


class CompareDictionaries(ModelExperiment[SAECompareConfig]):
    """Units read some clips; further ones compare the dictionaries of a point, or read features."""

    name = "sae_compare"
    title = "Dictionaries compared"
    question = "What are these sparse autoencoders worth, and which of them agree?"
    Config = SAECompareConfig
    tables, controls, claims, caveats = TABLES, CONTROLS, CLAIMS, CAVEATS
    defects = READING_DEFECTS
    may_lack: ClassVar = {**MAY_LACK, "partners": PARTNERS}
    leaves = ("arrays",)

    def identify(self) -> dict[str, Any]:
        """Reads dictionaries and clips, and refuses what does not go together."""
        config = self.config
        if config.factors and find_spec("sklearn") is None:
            raise InputError(
                "reading acoustic factors: got no scikit-learn, which this needs. Install it: "
                f"{NEEDED}, or leave factors out: -s factors=[]"
            )
        self.dictionaries = named_dictionaries(config.dictionaries)
        self.model = self.lay_out(hears=True)
        names = [*self.dictionaries]
        points = collect("placing dictionaries", self._place, names, str)
        self.point_of = dict(zip(names, points, strict=True))
        self.noise = {
            name: noise for name, one in self.dictionaries.items() if (noise := one.of_noise())
        }
        self.clips = load_clips(config.source)
        self.labels = held_out_labels(self.clips, config)
        by = held_out_by(self.clips, config)
        check_grouped(self.clips, by)
        self.groups = [one.name if by is None else one.cells[by] for one in self.clips]
        self.folds = held_out_folds(np.zeros(len(self.clips), np.int64), self.groups, config)
        of_table = [name for name in config.factors if name not in HEARD]
        check_columns(self.clips, of_table)
        self._of_table = {name: self._numbers(name) for name in of_table}
        self.rows = ClipRows.planned(self.model, self.clips, [*dict.fromkeys(points)], config)
        return {
            **self.rows.described,
            "dictionaries": {
                name: {**one.described, "point": self.point_of[name], "of_model": one.of_model,
                       "seed": one.about.get("seed"),
                       "noise": noise.described if (noise := self.noise.get(name)) else None}
                for name, one in self.dictionaries.items()
            },
            "labels": [*described_labels(self.labels)],
            "held_out_by": by, "groups": len({*self.groups}),
            "rows": self.rows.count(range(len(self.clips))),
        }  # fmt: skip

    def _place(self, name: str) -> str:
        """The point of a dictionary's rows, if they are of its width.

        Raises:
            InputError: several points, or rows of another width.
        """
        one = self.dictionaries[name]
        if len(kept := kept_points(self.model, [one.point])) != 1:
            raise InputError(f"got {len(kept)} points for {one.point}, expected one. Name it")
        one.check(kept[0], name)
        return kept[0].name

    def _numbers(self, column: str) -> list[float]:
        """A factor of the clips' table.

        Raises:
            InputError: cells that are no numbers.
        """
        return collect(
            "reading factors", lambda clip: _number(clip, column), self.clips,
            lambda clip: clip.where,
        )  # fmt: skip

    def load(self) -> None:
        """Loads the weights; dictionaries go where the model is."""
        super().load()
        for one in self.dictionaries.values():
            one.sae.to(self.model.cfg.device)

    def _of(self, point: str) -> dict[str, PlacedDictionary]:
        """The dictionaries of a point."""
        return {
            name: one for name, one in self.dictionaries.items() if self.point_of[name] == point
        }

    # --- Units

    def units(self) -> list[Unit]:
        """Units for some clips each, then for how these sound."""
        size, numbers = self.config.batch_size * self.config.unit_batches, range(len(self.clips))
        return [
            Unit(f"clips__{first:06d}", numbers[first : first + size])
            for first in range(0, len(numbers), size)
        ] + sound_units(self.clips)

    def further_units(self, tables: Tables) -> list[Unit]:
        """Units for the dictionaries of each point, and for what is read off each kind of rows."""
        files, points = files_of(tables["features"]), [one.name for one in self.rows.points]
        units = [Unit(f"point__{n:03d}", _OfPoint(point, files)) for n, point in enumerate(points)]

        def features(*kinds: FeatureKind) -> list[FeatureSet]:
            owners = {_codes(name): name for name in self.dictionaries}
            found = [
                FeatureSet(owner, kind, array, files, self.config.seed)
                for kind in kinds
                for array, owner in (
                    owners.items() if kind in ("codes", "rotated") else
                    [(_rows(point), point) for point in points]
                )
            ]  # fmt: skip
            return found

        units += [
            Unit(f"label__{n:03d}__{m:04d}", LabelReading(label, some))
            for n, label in enumerate(self.labels)
            for m, some in enumerate(features("codes", "rows", "principal"))
        ]
        factors = self._factors(tables["sounds"])
        sets = [None, *features("codes", "rotated", "rows")] if factors.names else []
        return units + [
            Unit(f"factors__{m:04d}", FactorWork(factors, some)) for m, some in enumerate(sets)
        ]

    def _factors(self, sounds: pd.DataFrame) -> Factors:
        """Those that vary, whichever fold is held out."""
        sounds = sounds.set_index("clip").loc[[one.name for one in self.clips]]
        names = self.config.factors
        columns = [self._of_table.get(name, sounds.get(name)) for name in names]
        values = np.array([*columns], np.float64).reshape(len(names), len(self.clips)).T
        values[~np.isfinite(values)] = np.nan  # the level of silence
        varies = varying(values, self.folds)
        kept = tuple(name for name, yes in zip(names, varies, strict=True) if yes)
        return Factors(kept, values[:, varies], self.groups, self.folds)

    def measure(self, unit: Unit) -> UnitResult:
        """Features of some clips, their sound, dictionaries of a point, or what is read off."""
        work = unit.payload
        if isinstance(work, Sounds):
            return work.measured()
        if isinstance(work, range):
            return self._read(unit.id, work)
        if isinstance(work, _OfPoint):
            return self._compare(work)
        found: UnitResult = work.result(self.folder, self.config)
        return found

    @torch.no_grad()
    def _read(self, unit_id: str, clips: range) -> UnitResult:
        """Keeps means of rows and of features, clip by clip, and what is not reconstructed."""
        kept: dict[int, dict[str, Any]] = {clip: {} for clip in clips}
        found = list[Row]()
        for part in self.rows.parts(clips):
            values = {point: rows.float() for point, rows in self.rows.values(part).items()}
            for point, rows in values.items():
                for clip, mine in zip(part, self.rows.by_clip(rows, part), strict=True):
                    kept[clip][_rows(point)] = _mean(mine)
            for name, one in self.dictionaries.items():
                rows = values[self.point_of[name]]
                codes = one.sae.encode(rows)
                off = (rows.double() - one.sae.decode(codes).double()).square().sum(-1)
                pairs = zip(
                    self.rows.by_clip(codes, part), self.rows.by_clip(off, part), strict=True
                )
                for clip, (mine, error) in zip(part, pairs, strict=True):
                    kept[clip][_codes(name)] = _mean(mine)
                    found.append({
                        "dictionary": name, "clip": self.clips[clip].name,
                        "group": self.groups[clip], "rows": len(mine),
                        "active": int((mine > 0).sum()), "error": float(error.sum()),
                    })  # fmt: skip
        features = keep_features(self.folder, unit_id, "model", [kept[clip] for clip in clips])
        return UnitResult({
            **features.tables, "clips": found, "held_out": [*self._held_out(clips)],
        })  # fmt: skip

    def _held_out(self, clips: range) -> Iterator[Row]:
        """In which fold each clip is read, of every column, and of the factors."""
        for clip in clips:
            name = self.clips[clip].name
            yield {"of": "", "clip": name, "group": self.groups[clip],
                   "fold": int(self.folds[clip]), "value": ""}  # fmt: skip
            for one in self.labels:
                for i in (i for i, other in enumerate(one.clips) if other == clip):
                    yield {"of": one.column, "clip": name, "group": one.groups[i],
                           "fold": int(one.folds[i]),
                           "value": one.values[int(one.codes[i])]}  # fmt: skip

    def _compare(self, work: _OfPoint) -> UnitResult:
        """Reads all rows of a point once more, with all of its dictionaries."""
        point, mine = work.point, self._of(work.point)
        saes = {name: one.sae for name, one in mine.items()}
        directions = {name: sae.W_dec for name, sae in saes.items()}
        dead = {name: self._dead(name, work.files) for name in mine}
        partners = [*partner_rows(point, "rows", directions, dead)]
        pairs = PartnerCorrelations(saes, partners, self.config.seed)
        noise = {name: self.noise[name] for name in mine if name in self.noise}
        partners += partner_rows(
            point, "noise", {name: one.sae.W_dec for name, one in noise.items()},
            {name: one.about.get("dead", []) for name, one in noise.items()},
        )  # fmt: skip
        partners += partner_rows(point, "untrained", untrained(saes), dead)
        quality = [
            {**row, "n_dead": len(dead[row["dictionary"]])}
            for row in quality_rows(
                self.rows, range(len(self.clips)), point, saes,
                inferences=("threshold",), named="dictionary", also=pairs.add,
            )
        ]  # fmt: skip
        copies = [
            {
                "dictionary": name,
                **copy_row(one[sorted({*range(len(one))} - {*dead[name]})], self.config.seed),
            }
            for name, one in directions.items()
        ]
        more = {"partners": partners, "correlations": [*pairs.rows(point)]} if partners else {}
        return UnitResult({"quality": quality, "copies": copies, **more})

    def _dead(self, name: str, files: FeatureFiles) -> list[int]:
        """Latents that no row activates, or whose direction is 0."""
        codes = torch.from_numpy(kept_features(self.folder, _codes(name), files))
        alive = (codes > 0).any(0) & (self.dictionaries[name].sae.W_dec.norm(dim=-1) > 0).cpu()
        found: list[int] = (~alive).nonzero().flatten().tolist()
        return found

    # --- What is made of it

    def summaries(self, run: ComparedResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """The clips, every comparison with its intervals, and one table of them all."""
        yield "manifest", manifest(self.clips, run["sounds"])
        yield from summarise(run)

    def lead(self, run: ComparedResults) -> str:
        """What was compared on what."""
        return lead(run)

    def page(self, page: Page, run: ComparedResults) -> None:
        """All dictionaries, then what they were compared by."""
        fill_page(page, run)

    def method(self, run: ComparedResults) -> str:
        """How dictionaries were compared."""
        return method(run)


def _mean(values: Tensor) -> Any:
    return values.double().mean(0).float().cpu().numpy()


def _rows(point: str) -> str:
    return f"rows/{point}"


def _codes(name: str) -> str:
    return f"codes/{name}"


def _number(clip: ClipFile, column: str) -> float:
    """A cell as a number; NaN of an empty one.

    Raises:
        InputError: it is none.
    """
    try:
        return float(clip.cells.get(column, "nan"))
    except ValueError:
        raise InputError(
            f"{column}: got {clip.cells[column][:80]!r}, expected a number, or nothing"
        ) from None
