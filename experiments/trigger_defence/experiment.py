"""Which neurons carry an attack on what a model hears, and does holding them undo it?

Clips are attacked towards one of the model's own label words. On some speakers it is seen which
neurons that moves, in the language model and in the audio encoder. On others these are patched,
shifted or pruned, beside random ones, features of a dictionary, and defences on the input.

Source: SPIRIT (EMNLP 2025), mbzuai-nlp/spirit-breaking@e3044bd; M-SP-1 to M-SP-5.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.selection import kept_points
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.robustness.choices import NeuronChoices, add_logs
from hooked_alm.methods.robustness.defences import defence_hooks
from hooked_alm.methods.robustness.denoise import spectral_gate
from hooked_alm.methods.robustness.features import feature_hooks, feature_log
from hooked_alm.methods.robustness.places import n_neurons
from hooked_alm.methods.robustness.sensitivity import SensitivityLog, sensitivity_log

from ..materials.answers import greedy_answers
from ..materials.attacks import AttackedClip, Attacks, Wave, with_noise
from ..materials.conflict_experiment import ConflictExperiment
from ..materials.dictionaries import PlacedDictionary
from ..materials.kept_attacks import keep_attacks, kept_deltas, kept_logs
from ..materials.kept_features import FeatureFiles, files_of
from ..materials.triggers import with_trigger
from ..workbench.experiment import Unit, UnitResult
from ..workbench.page import Page
from ..workbench.results import Row, Tables
from .claims import CLAIMS, CONTROLS
from .pages import CAVEATS, fill_page, lead, method
from .plan import DRAWN, FEATURES, INPUT, Defence, DefencePlan, DefendedClip, SensitiveNeurons
from .plan import defences as every_defence
from .settings import DEFECTS, TriggerDefenceConfig
from .tables import TABLES, DefenceResults, summarise


class TriggerDefence(ConflictExperiment[TriggerDefenceConfig]):
    """Units attack some clips; further ones select neurons, and defend clips by them."""

    name = "trigger_defence"
    title = "Trigger defence"
    question = "Which neurons carry an attack on what a model hears, and does holding them undo it?"
    Config = TriggerDefenceConfig
    tables = TABLES
    defects, controls, claims, caveats = DEFECTS, CONTROLS, CLAIMS, CAVEATS
    leaves = ("arrays",)

    def places(self) -> list[tuple[str, ...]]:
        """None: nothing is aligned."""
        return []

    @cached_property
    def plan(self) -> DefencePlan:
        """What is run on these recordings."""
        return DefencePlan(self.config, self.corpus)

    def identify(self) -> dict[str, Any]:
        """Reads the clips and the dictionary, and refuses what cannot be attacked or held."""
        config, name = self.config, self.config.dictionary_name
        self.dictionary = None if name is None else PlacedDictionary.read(name)
        found, described = super().identify(), None
        neurons = {place: n_neurons(self.model, place) for place in config.places}
        if self.dictionary is not None and name is not None:
            self.dictionary.check(kept_points(self.model, self.dictionary.point)[0], name)
            described = {"name": name, **self.dictionary.described}
        first = self.samples(self.plan.clips.attacked[0].recording)
        if config.attack == "trigger":  # a rate without its tones, or features without a gradient
            with_trigger(first, self.sampling_rate)
        else:
            self.model.read_clip(torch.from_numpy(first).requires_grad_())
        target = self.plan.clips.target
        return {**found, "target": target, "neurons": neurons, "dictionary": described}

    def load(self) -> None:
        """Loads the weights; the dictionary goes where the model is."""
        super().load()
        self.model.requires_grad_(False)
        if self.dictionary is not None:
            self.dictionary.sae.to(self.model.cfg.device)
        self._known: dict[FeatureFiles, NeuronChoices] = {}

    # --- Units

    def further_units(self, tables: Tables) -> list[Unit]:
        """Defences by the neurons that the attacks tell."""
        return self.plan.further_units(files_of(tables["kept"]))

    def measure(self, unit: Unit) -> UnitResult:
        """Some attacks, the list of neurons, some defences, or the sound of some clips."""
        if isinstance(unit.payload, SensitiveNeurons):
            return UnitResult({"sensitivity": [*self._listed(self._choices(unit.payload.files))]})
        self._deltas: dict[str, Wave] = {}
        self._logs: dict[str, SensitivityLog] = {}
        found = super().measure(unit)
        if self._deltas:
            kept = keep_attacks(self.folder, unit.id, self._deltas, self._logs)
            found.tables["kept"] = [kept]
        return found

    def _choices(self, files: FeatureFiles) -> NeuronChoices:
        """What the logs of some units tell together; made once in a process."""
        if files not in self._known:
            logs, config = kept_logs(self.folder, files), self.config
            self._known[files] = NeuronChoices(logs, config.score, config.normalised, config.seed)
        return self._known[files]

    def _listed(self, choices: NeuronChoices) -> Iterator[Row]:
        """A row for every neuron or feature that is held at the percentage of claims."""
        percent, n_draws = self.config.percent, self.config.n_draws
        drawn = [(chosen_by, draw) for chosen_by in DRAWN for draw in range(n_draws)]
        for place in choices.logs:
            scores = choices.scores(place)
            for chosen_by, draw in [("sensitive", 0), *(drawn if place != FEATURES else [])]:
                for rank, at in enumerate(choices.neurons(place, percent, chosen_by, draw)):
                    yield {
                        "place": place, "chosen_by": chosen_by, "draw": draw, "rank": rank,
                        "block": at[0], "neuron": at[1], "score": float(scores[at]),
                    }  # fmt: skip

    def batch_kind(self, work: AttackedClip) -> Hashable:
        """The language, whose labels are read, and the half: neurons are logged in one alone."""
        return work.run.language, work.half

    def measure_batch(self, works: Sequence[Any]) -> list[UnitResult]:
        """Attacks, or defences, of some clips."""
        tables: list[dict[str, list[Row]]] = [defaultdict(list) for _ in works]
        run = self._defend if isinstance(works[0], DefendedClip) else self._attack
        for n, table, row in run(works, self.labels[works[0].run.language]):
            tables[n][table].append(row)
        records = [self.record_of(work.run) for work in works]
        return [UnitResult(dict(t), record) for t, record in zip(tables, records, strict=True)]

    def _heard(self, clips: Sequence[AttackedClip], waves: Sequence[Any]) -> ALMInput:
        """The prompts of some clips, with other waveforms."""
        heard = [self.model.read_clip(wave) for wave in waves]
        return self.input(*(one.run for one in clips), heard=heard)

    def _attack(
        self, clips: Sequence[AttackedClip], labels: LabelSet
    ) -> Iterator[tuple[int, str, Row]]:
        """Clip, table and row of attacks; perturbations and logs are left for the unit."""
        waves = [self.samples(one.recording) for one in clips]
        found = Attacks.on(clips, waves, self.model, labels, self.config, self._heard)
        for n, (one, row) in enumerate(zip(clips, found.rows, strict=True)):
            yield n, "attack", row
            for step, loss in enumerate(found.losses[n]):
                yield n, "losses", {"clip": one.recording.name, "step": step, "loss": loss}
            self._deltas[one.recording.name] = found.deltas[n]
        if clips[0].half == "discovery":
            add_logs(self._logs, self._moved(found.clean, found.attacked))

    def _moved(self, clean: ALMInput, attacked: ALMInput) -> dict[str, SensitivityLog]:
        """What an attack moves, place by place."""
        config = self.config
        logs = {
            str(place): sensitivity_log(
                self.model, clean, attacked, place, span=config.span, site=config.site
            )
            for place in config.places
        }
        if (found := self.dictionary) is not None:
            logs[FEATURES] = feature_log(self.model, found.sae, found.point, clean, attacked)
        return logs

    def _defend(
        self, clips: Sequence[DefendedClip], labels: LabelSet
    ) -> Iterator[tuple[int, str, Row]]:
        """Clip, table and row of every defence."""
        config, is_attacked, files = self.config, clips[0].is_attacked, clips[0].files
        heard = clean = [self.samples(one.recording) for one in clips]
        choices = self._choices(files)
        if is_attacked:
            deltas = kept_deltas(self.folder, files, clips)
            heard = [wave + delta for wave, delta in zip(clean, deltas, strict=True)]
        pairs = [*zip(clips, heard, strict=True)]
        waves = {
            "none": heard, "clean": clean,
            "denoised": [spectral_gate(wave, self.sampling_rate) for wave in heard],
            "noisy": [with_noise(*one, config.noise, config.seed) for one in pairs],
        }  # fmt: skip
        inputs = {name: self._heard(clips, some) for name, some in waves.items()}
        before, own = (greedy_answers(self.model, labels, inputs[k]) for k in ("none", "clean"))
        for defence in every_defence(config, attacked=is_attacked):
            x, hooks = inputs["none"], []
            if defence.place == INPUT:
                x = inputs["denoised" if defence.kind == "denoise" else "noisy"]
            else:
                # C45: the published call takes the attacked clip for the clean one.
                donor = "none" if config.donor == "swapped" else defence.donor
                hooks = self._hooks(defence, choices, x, inputs[donor])
            after = greedy_answers(self.model, labels, x, hooks)
            for n, one in enumerate(clips):
                sides = {"": after[n], "_before": before[n], "_clean": own[n]}
                yield n, "defences" if is_attacked else "utility", {
                    **one.identity(), **defence.identity(), **one.compared(sides),
                }  # fmt: skip

    def _hooks(
        self, defence: Defence, choices: NeuronChoices, x: ALMInput, donor: ALMInput
    ) -> list[Any]:
        """Hooks that hold what a defence holds."""
        config, (place, kind), found = self.config, (defence.place, defence.kind), self.dictionary
        neurons = choices.neurons(place, defence.percent, defence.chosen_by, defence.draw)
        if place == FEATURES and found is not None:
            return feature_hooks(
                self.model, found.sae, found.point, [latent for _, latent in neurons], x, donor,
                is_dense=kind == "dense",
            )  # fmt: skip
        return defence_hooks(
            self.model, x, place, neurons, kind, donor=donor, bias=config.bias,  # type: ignore[arg-type]
            site=config.site, span=config.span, last=config.last,
            every_step=config.every_step and kind != "patch",
        )  # fmt: skip

    # --- What is made of it

    def summaries(self, run: DefenceResults) -> Iterator[tuple[str, pd.DataFrame]]:
        """The clips, and what `summarise` makes of the tables."""
        yield from super().summaries(run)
        yield from summarise(run)

    def lead(self, run: DefenceResults) -> str:
        """What was attacked, and held."""
        return lead(run)

    def page(self, page: Page, run: DefenceResults) -> None:
        """The attack, the neurons that it moves, and what defences restore and cost."""
        fill_page(page, run, self.recordings)

    def method(self, run: DefenceResults) -> str:
        """How clips were attacked and defended, and intervals made."""
        return method(run)
