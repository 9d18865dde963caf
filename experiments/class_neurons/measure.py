"""What ``class_neurons`` reads off a model: answers and gates, changed neurons, exchanged inputs.

Source: M-ESN-3, M-ESN-4, M-ESN-8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.neurons.activity import ItemActivity, item_activity
from hooked_alm.methods.neurons.gain import gain_neurons
from hooked_alm.methods.neurons.sets import NeuronSets
from hooked_alm.methods.patching.metrics import LabelsAndRest
from hooked_alm.methods.reading.labels import LabelSet

from ..materials.answers import answer_in
from ..materials.class_changes import change_row
from ..materials.class_items import ClassItem
from ..workbench.results import Row
from .plan import ChangedItem
from .settings import OUT, ClassNeuronsConfig


@dataclass(frozen=True, eq=False)
class NeuronMeasures:
    """A model, the labels that it is read with, and the settings of a run."""

    model: HookedALM
    labels: LabelSet
    config: ClassNeuronsConfig

    def answers(self, items: Sequence[ClassItem], x: ALMInput) -> tuple[list[Row], ItemActivity]:
        """What each item is answered, and how neurons are active; one forward."""
        config = self.config
        logits, activity = item_activity(self.model, x, site=config.site, span=config.pool)
        rows = []
        for n, (item, one) in enumerate(zip(items, logits[:, -1].float(), strict=True)):
            found = answer_in(self.labels, one)
            is_right = found["prediction"] == item.cls
            rows.append({
                **item.identity(), "half": item.half, "named": item.run.named,
                "prediction": found["prediction"], "right": float(is_right), **found,
                "n_rows": int(activity.rows[n]),
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
                        clean, changed = found.base[n], found.values[s, a, n]
                        yield n, {
                            **work.item.identity(), "chosen_by": one.chosen_by, "draw": one.draw,
                            **change_row(self.labels, work.item.cls, one.cls, clean, changed),
                            "kl_rest": float(changed[-1]), "alpha": float(alpha),
                            "noise": float(noise[n]),
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
        gates = torch.stack([self._at_readout(x) for x in runs], dim=1)
        for chosen_by in dict.fromkeys(one.chosen_by for one in sets.sets):
            for n, work in enumerate(works):
                named, voice = str(work.item.run.named), work.item.run.recording.label
                if {voice, named} <= {*sets.classes}:
                    found = sets.drive(
                        chosen_by, (named, voice), gates[n], min_effect=self.config.min_drive
                    )
                    who = {**work.item.identity(), "voice": voice, "named": named}
                    yield n, {**who, "chosen_by": chosen_by, **found._asdict()}

    def _at_readout(self, x: ALMInput) -> Float[Tensor, "item block neuron"]:
        _, found = item_activity(self.model, x, site=self.config.site, span="readout")
        return found.total / found.rows[:, None, None]
