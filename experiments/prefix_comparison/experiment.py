"""Two prefixes, one continuation: at which depth and token does the one help more?

A real and a silent clip, a recording and its transcript, a prompt with and without a tool's answer:
each is followed by the same tokens, teacher-forced. The logit lens reads the loss on every token
at every depth; attention is summed by segment of the prefix; length and content are controlled.

Source: seed document 002; methods cards M-002-1 to M-002-15. Arrays: ``items/{id}`` (depth by
token).
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from hooked_alm.bundled import ASSETS
from hooked_alm.errors import InputError

from ..materials.clips import described_table
from ..materials.subject import ModelExperiment, described
from ..materials.trained_lens import described_lens, lens_name, open_lens
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from . import figures
from .claims import CLAIMS, CONTROLS, DEFECTS
from .items import read_items
from .measure import TwoPrefixes
from .memory import check_memory
from .plan import filler_ids
from .prompts import prefix_check, prepare_items, sha256
from .settings import PrefixComparisonConfig
from .shards import Maps, shards
from .tables import MAY_LACK, TABLES, PrefixResults, compared, summarise

TUNED_LENS = (
    "\n\nA tuned lens was trained to predict the output: it can decode a token at a depth where "
    "the model does not use it yet."
)
RIGHT = {"file": "as the file says", "greedy": "if every token of it is the most likely one"}


class PrefixComparison(ModelExperiment[PrefixComparisonConfig]):
    """Teacher-forced comparison of two prefixes, on any model and any file of items."""

    name = "prefix_comparison"
    title = "Prefix comparison"
    question = "At which depth and token does one prefix help more than the other?"
    Config = PrefixComparisonConfig
    schema_version = 2
    tables, may_lack = TABLES, MAY_LACK
    defects, controls, claims = DEFECTS, CONTROLS, CLAIMS
    caveats = (
        "ΔNLL is the loss under the first prefix minus that under the second; both predict the "
        "same tokens, given the same tokens before. Blank and special tokens are left out of "
        "means.",
        "Early depths of a logit lens may decode nothing. That two prefixes agree there says "
        "little.",
        "Outcomes depend on the same probabilities as ΔNLL: groups by outcome differ almost by "
        "definition. They describe; to explain, take the outcome from another sample or decoding.",
        "Attention is where a head reads, not whether it matters. Content interventions and "
        "position modes are the controls.",
        "What is sampled are items, or groups of items that share a source.",
        "Probabilities by layer and token: Meng et al. 2022 (ROME). Logit difference as a "
        "difference of losses: Wang et al. 2022. Choice of metrics: Conmy et al. 2023, Zhang and "
        "Nanda 2023. Lens by layer and token: Belrose et al. 2023.",
    )

    def identify(self) -> dict[str, Any]:
        """Reads the items, and checks every prompt."""
        config = self.config
        bundled = str(ASSETS / "prefix_comparison.jsonl")
        items = read_items(source := bundled if config.items == "bundled" else config.items)
        names = list(items[0].conditions)
        a, b = config.a or names[0], config.b or names[1]
        if {a, b} - {*names} or a == b:
            raise InputError(
                f"choosing conditions: got a={a!r} and b={b!r}, expected two different "
                f"ones of {', '.join(names)}. Set -s a=... and -s b=..."
            )
        self.model = self.lay_out()
        self.items = prepare_items(self.model, items, truncate=config.truncate)
        # All that a unit would otherwise find out after work was done.
        memory = check_memory(self.model, self.items, config)
        filler_ids(self.model, config.filler, 1)
        self.comparison = TwoPrefixes(self.model, config, self.items, a, b)
        self._check_runs()
        return {
            "model": described(self.model, config),
            **described_table(source),
            "compared": {"a": a, "b": b, "segment": self.comparison.segment},
            "classes": self.comparison.kind,
            "outcomes": self.comparison.outcomes,
            **described_lens(config.tuned_lens),
            "holds_most": memory,
            "continuations": {one.item.id: sha256(one.item.continuation) for one in self.items},
            "groups": {one.item.id: one.item.group for one in self.items},
            "prefixes": prefix_check(self.items),
        }

    def load(self) -> None:
        """Loads the weights, and the lens; prompts go where the model is."""
        super().load()
        self.items = [one.to(self.model.cfg.device) for one in self.items]
        lens = open_lens(self.config.tuned_lens, self.model)
        self.comparison = replace(self.comparison, items=self.items, lens=lens)

    def _check_runs(self) -> None:
        config, comparison = self.config, self.comparison
        # Tokens are put in, or exchanged, in one stream of ids.
        is_double = any(one.prefixes[comparison.a].x.text_tokens is not None for one in self.items)
        exchanges = comparison.segment != "audio" and bool(config.interventions)
        if is_double and (config.pos_modes != ("as_run",) or exchanges):
            raise InputError(
                f"preparing {config.model!r}: it reads two streams of tokens, in which position "
                "modes and interventions on tokens are not defined. Set -s pos_modes=[as_run] "
                "and -s interventions=[]"
            )
        for one in self.items:
            runs = [comparison.run(one, name) for name in one.prefixes]
            if not comparison.tokens(one, runs).semantic:
                raise InputError(
                    f"{one.item.where}: continuation: got {one.item.continuation!r}, expected at "
                    "least one token that is not blank and not special"
                )

    def units(self) -> list[Unit]:
        """Per item the runs as they were, and one unit for each way to match their lengths."""
        a, b = self.comparison.a, self.comparison.b
        work = [(number, "as_run") for number in range(len(self.items))]
        for mode in self.config.pos_modes:
            for number, one in enumerate(self.items) if mode != "as_run" else ():
                # Prefixes of one length are matched as they are.
                if one.prefixes[a].x.shape[1] != one.prefixes[b].x.shape[1]:
                    work.append((number, mode))
        return [Unit(f"{self.items[n].item.id}__{mode}", (n, mode)) for n, mode in work]

    def measure(self, unit: Unit) -> UnitResult:
        """Two forwards, and one for every further prefix."""
        number, mode = unit.payload
        one, comparison = self.items[number], self.comparison
        found = comparison.as_run(one) if mode == "as_run" else comparison.matched(one, mode)
        # Of many items' clips they would fill the memory; another unit hardly hears these again.
        for clip in comparison.clips:
            clip.forget()
        return found

    # --- What is made of it

    def summaries(self, run: PrefixResults) -> Iterable[tuple[str, pd.DataFrame]]:
        """By depth, class, segment, layer, prefix and position mode; and who has which anchor."""
        yield from summarise(run)
        self.maps = Maps()
        axes = {"delta_nll": "depth token", "js": "depth token", "nll": "run depth any_token"}
        for shard in shards(self.folder, run["items"]):
            self.maps.add(shard, self.config)
            delta, js = shard.maps.astype(np.float32)
            arrays = {"delta_nll": delta, "js": js, "nll": shard.nll}
            self.folder.write_arrays(f"items/{shard.item}", arrays, **axes)
        anchors = pd.DataFrame([*self.maps.anchored.items()], columns=["anchor", "items"])
        yield "anchors", anchors.assign(left_out=len(run["items"]) - anchors["items"])

    def page(self, page: Page, run: PrefixResults) -> None:
        """By depth, by token, attention, content and length."""
        self.folder.write_json("prefix_check.json", {"prefixes": run.inputs["prefixes"]})
        segment = compared(run)[2]
        page.section("By depth")
        figures.add_curves(page, run)
        figures.add_quadrants(page, run["quadrants"])
        figures.add_every_item(page, run)
        if len(run["classes_summary"]) > 1:
            figures.add_classes(page, run["classes_summary"])
        page.table("The items", run["items"])
        page.section("By token")
        for shard in islice(shards(self.folder, run["items"]), self.config.n_shown):
            if len(shard.tokens.semantic) > 1:
                figures.add_item(page, shard, self.config)
        figures.add_aligned(page, self.maps, self.config)
        page.section(f"Attention to {segment}")
        figures.add_mass(page, run)
        figures.add_heads(page, self.maps, run)
        figures.add_coupling(page, run["coupling_summary"])
        page.section(f"If {segment} held something else")
        figures.add_runs(page, run)
        columns = ["role", "run", "n", "delta", "delta_change", "mass", "mass_change"]
        shown = run["runs_summary"][[*columns, "right", "exact"]]
        page.table("Every prefix (_change: against the first)", shown)
        page.section("Lengths matched")
        figures.add_positions(page, run["positions_summary"])

    def lead(self, run: PrefixResults) -> str:
        """How many items, what is compared, and how often either is right."""
        a, b, _ = compared(run)
        items = run["items"]
        lead = (
            f"{len(items)} continuations, each after two prefixes: {a} and {b}. Every depth's "
            "prediction of every token is compared. A run is right "
            f"{RIGHT[run.inputs['outcomes']]}: {a} in {items.right_a.mean():.0%}, {b} in "
            f"{items.right_b.mean():.0%} of the items."
        )
        if self.config.is_calibration:
            lead += (
                "\n\nThe bundled items: a voice speaks one emotion, the instruction names another, "
                "and the continuation is the voice's. follows_voice was trained to answer so, and "
                "should need to hear it; follows_text was trained to answer what the instruction "
                "names, and hearing the voice should help it little. The twins must differ."
            )
        return lead

    def method(self, run: PrefixResults) -> str:
        """How prefixes were joined and read, and how intervals were made."""
        config = self.config
        trained = "" if config.tuned_lens is None else TUNED_LENS
        return (
            f"Model: {config.model}, {config.dtype}. Prefix and continuation are joined as "
            f"{config.concatenate}; residuals come from {config.lens_source}, and are read "
            f"through the {lens_name(config.tuned_lens)}. Token classes: {run.inputs['classes']}. "
            f"Beside weights, prompts and one block of one run, at most "
            f"{config.max_bytes / 2**20:.0f} MiB are held. Intervals resample items "
            f"{config.n_resamples} times, seed {config.seed}.{trained}"
        )
