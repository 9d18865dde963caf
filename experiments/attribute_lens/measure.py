"""What ``attribute_lens`` reads off a model: answers, lens, and attention knocked out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_alm.methods.patching.knock_out import KeyMask, knock_out, random_keys, windows
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.reading.label_reading import read_labels
from hooked_alm.methods.reading.lens import Lens, StreamReader, readout_positions

from ..materials.attribute_experiment import AttributeWork
from ..materials.attributes import MENTION
from ..materials.enrichment import EnrichmentMeasures
from ..workbench.results import ItemRows, joined
from .settings import AttributeLensConfig


class Reading(AttributeWork):
    """The answer to a prompt, and what a lens reads of it; without its audio, the answer alone."""


class Knockouts(AttributeWork):
    """A prompt whose queries do not see some keys."""


@dataclass(frozen=True, eq=False)
class AttributeMeasures(EnrichmentMeasures):
    """The answers of a batch, its lenses, and where the attribute is named."""

    config: AttributeLensConfig
    lenses: Mapping[str, Lens]
    mention: Int[Tensor, "batch 1"] | None
    """The last position that names the attribute, where that is not the readout."""

    @torch.no_grad()
    def reading(self) -> dict[str, ItemRows]:
        """Answers, and what every lens reads at every depth of readout and mention."""
        where = [readout_positions(self.x), *([] if self.mention is None else [self.mention])]
        reader = StreamReader(self.model, self.x, torch.cat(where, dim=1))
        with self.model.hooks(fwd_hooks=reader.hooks):
            logits = self.model(self.x)[:, -1].float()
        rows, parts = reader.rows(), []
        for name, lens in self.lenses.items():
            found = read_labels(self.model, rows, self.labels, torch.from_numpy(self.own), lens)
            values = {
                "prediction": found.best, "hit": found.information.hit,
                "p_correct_soft": found.information.soft, "label_mass": found.information.mass,
                "kl": found.fidelity.kl, "agrees": found.fidelity.agrees,
            }  # fmt: skip
            for place, position in enumerate(("readout", MENTION)[: len(where)]):
                here = {column: one[:, :, place].cpu().numpy() for column, one in values.items()}
                here["prediction"] = np.array(self.labels.names)[here["prediction"]]
                depth, about = np.arange(len(rows))[:, None], {"position": position, "lens": name}
                parts.append(self.rows({**self.who, "depth": depth, **here, **about}))
        return {"answers": self.rows(self.answered(logits)), "information": joined(parts)}

    def knockouts(self) -> ItemRows:
        """Attention of readout and mention without each set of keys, in every window of blocks."""
        blocks = windows(len(self.model.path), self.config.window)
        first, last = (np.array([end(one) for one in blocks])[:, None, None] for end in (min, max))
        parts = []
        for query, keys in self._key_sets():
            swept = knock_out(
                self.model, self.x, LabelScores(self.labels), keys=keys, queries=query,
                layers=blocks, engine=self.config.engine, max_bytes=self.config.max_bytes,
            )  # fmt: skip
            at = {"query": query, "keys": np.array([*keys])[:, None], "first": first, "last": last}
            parts.append(self.rows({**at, **self.who, **self.changed(swept)}))
        return joined(parts)

    def _key_sets(self) -> Iterator[tuple[str, dict[str, KeyMask]]]:
        """Queries, and by name the keys that they are kept from."""
        spans, nowhere = self.x.spans, torch.zeros(self.x.shape, dtype=torch.bool)
        audio, transcript, named, text = (
            spans.mask(name) if name in spans else nowhere
            for name in ("audio", "transcript", MENTION, "text")
        )
        every = {
            "audio": audio, "transcript": transcript,
            MENTION: nowhere if self.mention is None else named, "question": text & ~named,
            "random": random_keys(self.x, audio.sum(dim=1).tolist(), self.draws()),
        }  # fmt: skip
        some = {name: keys for name, keys in every.items() if keys.any()}
        yield "readout", some
        if MENTION in some:
            yield MENTION, {name: some[name] for name in ("audio", "random") if name in some}
