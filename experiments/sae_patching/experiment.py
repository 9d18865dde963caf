"""Do the features in which two voices differ flip the answer?

Features of a dictionary are exchanged in a clip of one label for those of a clip of another: the
ones whose means differ most between both labels on other clips. Beside that stand as many others
that are as active, the most frequent, and pushes without a dictionary that move rows as far.

Source: M-SAE-3, M-SP-5; Marks et al. 2024 (arXiv 2403.19647), AudioSAE (arXiv 2602.05027).
"""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.methods.activations.selection import kept_points
from hooked_alm.methods.dictionary.exchanges import KindExchange
from hooked_alm.methods.dictionary.steering import Activity
from hooked_alm.methods.patching.features import place_of
from hooked_alm.methods.patching.row_edits import aligned_rows

from ..materials.answers import answers_of
from ..materials.clip_activities import activity_features, read_activities
from ..materials.conflict_experiment import ConflictExperiment
from ..materials.conflict_runs import PromptRun
from ..materials.kept_features import files_of, keep_features
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from .claims import CLAIMS
from .controls import CONTROLS
from .measure import SPAN, exchanged
from .pages import CAVEATS, fill_page, lead, method
from .plan import ExchangePlan, VoiceExchange
from .settings import DEFECTS, SAEPatchingConfig
from .tables import TABLES, ExchangeResults, summarise
from .truths import TRUTHS


class SAEPatching(ConflictExperiment[SAEPatchingConfig]):
    """Units keep what is active in some clips; further ones exchange features of some."""

    name = "sae_patching"
    title = "Exchanged features"
    question = "Do the features in which two voices differ flip the answer?"
    Config = SAEPatchingConfig
    tables, truths = TABLES, TRUTHS
    defects, controls, claims, caveats = DEFECTS, CONTROLS, CLAIMS, CAVEATS
    leaves = ("arrays",)

    def places(self) -> list[tuple[str, ...]]:
        """Spans that are edited."""
        return [(SPAN,)]

    @cached_property
    def plan(self) -> ExchangePlan:
        """What is run on these recordings."""
        return ExchangePlan(self.config, self.corpus)

    def identify(self) -> dict[str, Any]:
        """Reads dictionary and clips, and refuses what does not go together."""
        dictionary, most = self.config.read_dictionary(), max(self.config.sizes)
        self.sae, self.point = dictionary.sae, dictionary.point
        if 4 * most > self.sae.cfg.d_sae:
            raise InputError(
                f"exchanging {most} latents of either label, beside as many others: the dictionary "
                f"has {self.sae.cfg.d_sae} latents, expected {4 * most} or more. Lower sizes."
            )
        inputs = super().identify()
        dictionary.check(kept_points(self.model, self.point)[0], self.config.dictionary)
        place_of(self.model, self.point)
        return {**inputs, "dictionary": dictionary.described, "groups": self.plan.groups}

    def lay_out(self, *, hears: bool = False) -> HookedALM:
        """The model, still without weights, if it answers a question."""
        model = super().lay_out(hears=hears)
        if model.cfg.cross_attention:
            raise InputError(
                f"running {self.name} on {self.config.model!r}: the model writes down what is "
                "said, expected one that answers with a label. Transcripts: run sae_steering."
            )
        return model

    def load(self) -> None:
        """Loads the weights; the dictionary goes where the model is."""
        super().load()
        self.sae.to(self.model.cfg.device)

    def units(self) -> list[Unit]:
        """Units for the clips that latents are chosen on, and for how they sound."""
        return [one for one in self.plan.units if not _exchanges(one)]

    def further_units(self, tables: Tables) -> list[Unit]:
        """Units for the exchanges."""
        return self.plan.exchange_units(files_of(tables["features"]))

    def measure(self, unit: Unit) -> UnitResult:
        """Keeps what is active in some clips, or exchanges features of some."""
        if not isinstance(unit.payload, tuple) or _exchanges(unit):
            return super().measure(unit)
        size, works = self.config.batch_size, unit.payload
        parts = [works[first : first + size] for first in range(0, len(works), size)]
        found = [one for part in parts for one in self._activity(part)]
        return keep_features(self.folder, unit.id, "model", found)

    def _activity(self, works: Sequence[PromptRun]) -> list[Any]:
        x = self.input(*works)
        rows = aligned_rows(self.model, x, x, self.point, SPAN)
        return [activity_features(Activity.of(self.sae, [one.float()])) for one in rows]

    def batch_kind(self, work: PromptRun | VoiceExchange) -> Hashable:
        """The language, whose labels are read."""
        return work.prompts[0].language

    def measure_batch(self, works: Sequence[Any]) -> list[UnitResult]:
        """Answers, and every edit of the bases' rows."""
        if isinstance(works[0], PromptRun):  # as tried for its size
            return [UnitResult() for _ in self._activity(works)]
        bases = [work.base for work in works]
        donors = [work.donor for work in works if work.donor is not None]
        sides = {"base": bases} | ({"donor": donors} if donors else {})
        inputs = {role: self.input(*runs) for role, runs in sides.items()}
        labels = self.labels[bases[0].language]
        found: list[dict[str, list[Row]]] = [defaultdict(list) for _ in works]
        for role, x in inputs.items():
            for tables, row in zip(found, answers_of(self.model, labels, x), strict=True):
                tables["runs"].append({"role": role, **row})
        pairs = [(work, self._exchange(work)) for work in works]
        for k, table, row in exchanged(
            self.model, self.point, labels, self.config, pairs, inputs["base"], inputs.get("donor")
        ):
            found[k][table].append(row)
        return [self._result(*pair, tables) for pair, tables in zip(pairs, found, strict=True)]

    def _exchange(self, work: VoiceExchange) -> KindExchange:
        labels = np.array([one.label for one in self.recordings])
        others = ~np.isin([*self.plan.groups.values()], work.without)
        over = read_activities(self.folder, work.chosen_on).of
        own, other = (over(others & (labels == one)) for one in (work.voice, work.toward))
        return KindExchange(self.sae, own, other, over(others))

    def _result(
        self, work: VoiceExchange, exchange: KindExchange, tables: dict[str, list[Row]]
    ) -> UnitResult:
        latents = exchange.latents(self.config.n_latents).tolist()
        lists = {"without": [*work.without], "latents": latents}
        tables["exchanges"][0] |= {name: json.dumps(one) for name, one in lists.items()}
        who, (record, *donor) = work.identity(), map(self.record_of, work.prompts)
        return UnitResult.of(who, tables, {"pair": work.pair, **record, "donor": donor})

    def summaries(self, run: ExchangeResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield from super().summaries(run)
        yield from summarise(run)

    def lead(self, run: ExchangeResults) -> str:
        """What is exchanged in which clips."""
        return lead(run)

    def page(self, page: Page, run: ExchangeResults) -> None:
        """Flips by the number of latents and the strength, and every edit."""
        fill_page(page, run, self.recordings)

    def method(self, run: ExchangeResults) -> str:
        """How latents were chosen, and edits and intervals made."""
        return method(run)


def _exchanges(unit: Unit) -> bool:
    return isinstance(unit.payload, tuple) and isinstance(unit.payload[0], VoiceExchange)
