"""What ``class_neurons`` reads off a model: answers and gates, changed neurons, exchanged inputs.

Source: M-ESN-3, M-ESN-4, M-ESN-8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.neurons.activity import ItemActivity, item_activity
from hooked_alm.methods.neurons.gain import gain_neurons
from hooked_alm.methods.neurons.sets import SELECTORS, ClassSet, NeuronSets
from hooked_alm.methods.patching.metrics import LabelsAndRest
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.statistics.class_neurons import class_scores
from hooked_alm.methods.statistics.grounding import grounding_coefficient

from ..materials.answers import answer_of, by_label, label_weight
from ..workbench.results import Row
from .plan import ChangedItem, NeuronItem
from .settings import OUT, ClassNeuronsConfig


@dataclass(frozen=True, eq=False)
class NeuronMeasures:
    """A model, the labels that it is read with, and the settings of a run."""

    model: HookedALM
    labels: LabelSet
    config: ClassNeuronsConfig

    def answers(self, items: Sequence[NeuronItem], x: ALMInput) -> tuple[list[Row], ItemActivity]:
        """What each item is answered, and how neurons are active; one forward."""
        config = self.config
        logits, activity = item_activity(self.model, x, site=config.site, span=config.pool)
        rows = []
        for n, (item, one) in enumerate(zip(items, logits[:, -1].float(), strict=True)):
            scores = self.labels.scores(one[self.labels.tokens])
            said = answer_of(self.labels, scores)
            is_right = said == item.cls
            rows.append({
                **item.identity(), "half": item.half, "named": item.run.named, "prediction": said,
                "right": float(is_right), **by_label("z", self.labels, scores),
                **label_weight(self.labels, one), "n_rows": int(activity.rows[n]),
                "logged": float(item.half == "discovery" and (is_right or not config.only_right)),
            })  # fmt: skip
        return rows, activity

    def doses(
        self, works: Sequence[ChangedItem], x: ALMInput, sets: NeuronSets
    ) -> Iterator[tuple[int, Row]]:
        """Item and row of every set of neurons and strength."""
        config = self.config
        ours = [one for one in sets.sets if one.chosen_by == config.selector]
        rest = [alpha for alpha in config.alphas if alpha != OUT]
        for some, alphas in ((sets.sets, [OUT]), (ours, rest)):
            found = gain_neurons(
                self.model, x, LabelsAndRest(self.labels), [one.neurons for one in some],
                [float(alpha) for alpha in alphas], place=config.place, site=config.site,
                engine=config.engine, max_bytes=config.max_bytes,
            )  # fmt: skip
            noise = found.noise_between_labels
            for s, one in enumerate(some):
                for a, alpha in enumerate(alphas):
                    for n, work in enumerate(works):
                        clean, values = found.base[n], found.values[s, a, n]
                        row = self._dose(work.item, one, clean, values)
                        yield n, {**row, "alpha": float(alpha), "noise": float(noise[n])}

    def _dose(
        self,
        item: NeuronItem,
        one: ClassSet,
        clean: Float[np.ndarray, " value"],
        changed: Float[np.ndarray, " value"],
    ) -> Row:
        right, own = self.labels.index(item.cls), self.labels.index(one.cls)
        before, after = clean[:-1], changed[:-1]
        return {
            **item.identity(), "chosen_by": one.chosen_by, "draw": one.draw, "of": one.cls,
            "right_clean": float(before.argmax() == right),
            "right": float(after.argmax() == right),
            "lead_clean": _lead(before, right), "lead": _lead(after, right),
            "said_of": float(after.argmax() == own), "lead_of": _lead(after, own),
            "kl_rest": float(changed[-1]),
        }  # fmt: skip

    def drive(
        self, works: Sequence[ChangedItem], runs: Sequence[ALMInput], sets: NeuronSets
    ) -> Iterator[tuple[int, Row]]:
        """Item and row of every selector and control: what each exchange moves.

        Args:
            works: conflicts of a batch.
            runs: these, then with another audio, then with another instruction.
            sets: of every class.
        """
        gates = [self._at_readout(x) for x in runs]
        config = self.config
        for chosen_by in dict.fromkeys(one.chosen_by for one in sets.sets):
            for n, work in enumerate(works):
                voice, named = work.item.run.recording.label, work.item.run.named
                if not {voice, named} <= {*sets.classes}:
                    continue
                toward = [
                    float(sets.mean_of(chosen_by, str(named), values[n : n + 1])
                          - sets.mean_of(chosen_by, voice, values[n : n + 1]))
                    for values in gates
                ]  # fmt: skip
                # Another audio calls for what the instruction names, another text takes it away.
                audio, text = toward[1] - toward[0], toward[0] - toward[2]
                share = grounding_coefficient(
                    np.array([audio]), np.array([text]), min_effect=config.min_drive
                )
                yield n, {
                    **work.item.identity(), "voice": voice, "named": named,
                    "chosen_by": chosen_by, "toward": toward[0], "effect_audio": audio,
                    "effect_text": text, "share": float(share[0]),
                }  # fmt: skip

    def _at_readout(self, x: ALMInput) -> Float[Tensor, "item block neuron"]:
        _, found = item_activity(self.model, x, site=self.config.site, span="readout")
        return found.total / found.rows[:, None, None]


def _lead(scores: Float[np.ndarray, " label"], label: int) -> float:
    """A label's score minus the best other."""
    return float(scores[label] - np.delete(scores, label).max())


def neuron_rows(sets: NeuronSets, config: ClassNeuronsConfig) -> Iterator[Row]:
    """A row for every neuron of every set."""
    scores = {one: class_scores(one, sets.activity, filter=config.lape_filter) for one in SELECTORS}
    lap, mean = sets.activity.lap, sets.activity.mean
    for one in sets.sets:
        number = sets.classes.index(one.cls)
        own = scores.get(one.chosen_by)  # type: ignore[call-overload]
        for rank, at in enumerate(one.neurons):
            others = [n for n in range(len(sets.classes)) if n != number]
            yield {
                "chosen_by": one.chosen_by, "draw": one.draw, "cls": one.cls, "rank": rank,
                "block": at[0], "neuron": at[1],
                "score": float("nan") if own is None else float(own[number][at]),
                "lap": float(lap[number][at]), "lap_rest": float(lap[others][(..., *at)].mean()),
                "mean": float(mean[number][at]),
                "mean_rest": float(mean[others][(..., *at)].mean()),
            }  # fmt: skip
