"""What ``attribute_lens`` reads off a model: answers, lens, attention knocked out, enrichment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.enrich import enrich
from hooked_alm.methods.patching.knock_out import KeyMask, knock_out
from hooked_alm.methods.patching.metrics import LabelScores
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.reading.lens import (
    Lens,
    StreamReader,
    lens_fidelity,
    read_rows,
    readout_positions,
    residual_rows,
)
from hooked_alm.methods.statistics.information import information_scores

from ..materials.attribute_prompts import AttributePrompt
from ..materials.attributes import MENTION
from ..workbench.results import Row
from .plan import ChosenEnrichment, windows
from .settings import AttributeLensConfig

Found = list[list[Row]]
"""Rows of every prompt of a batch."""


@dataclass(frozen=True, eq=False)
class AttributeMeasures:
    """A model, its lenses, the labels of one attribute, and the prompts of a batch."""

    model: HookedALM
    lenses: Mapping[str, Lens]
    labels: LabelSet
    config: AttributeLensConfig
    prompts: Sequence[AttributePrompt]
    x: ALMInput
    ends_in_mention: bool
    """Whether the readout is the last word that names the attribute."""

    @property
    def _own(self) -> Int[Tensor, " batch"]:
        return torch.tensor([self.labels.index(one.label) for one in self.prompts])

    def _margin(self, scores: Float[np.ndarray, "*cell batch label"]) -> np.ndarray:
        """Score of each prompt's own label minus the largest of the others."""
        own = np.eye(scores.shape[-1], dtype=bool)[self._own.numpy()]
        others = np.where(own, -np.inf, scores).max(axis=-1)
        return np.where(own, scores, 0.0).sum(axis=-1) - others

    def _said(self, scores: Float[np.ndarray, "batch label"]) -> list[Row]:
        """What is answered, and by how much the right label leads."""
        margins, said = self._margin(scores).tolist(), scores.argmax(axis=-1).tolist()
        return [
            {"prediction": self.labels.names[best], "hit": float(best == own), "margin": margin}
            for best, own, margin in zip(said, self._own.tolist(), margins, strict=True)
        ]

    def mention(self) -> Int[Tensor, "batch 1"] | None:
        """The last position that names the attribute; None where it is the readout, or nowhere."""
        if self.ends_in_mention or MENTION not in self.x.spans:
            return None
        return torch.tensor(
            [self.x.spans.positions(MENTION, row)[-1:] for row in range(len(self.x))]
        )

    # --- Answers and lens

    @torch.no_grad()
    def answers(self) -> Found:
        """The answer to every prompt."""
        return [[row] for row in self._answers(self.model(self.x)[:, -1].float())]

    def _answers(self, logits: Float[Tensor, "batch vocab"]) -> list[Row]:
        tokens = self.labels.tokens
        ours = logits[:, tokens]
        mass = logits.log_softmax(-1)[:, tokens].exp().sum(-1).tolist()
        ranks = ((logits > ours.amax(-1, keepdim=True)).sum(-1) + 1).tolist()
        tops = [self.model.tokenizer.decode([top]) for top in logits.argmax(-1).tolist()]
        said = self._said(self.labels.scores(ours).cpu().numpy())
        about = zip(self.prompts, said, mass, ranks, tops, strict=True)
        return [
            {**one.identity(), **row, "label_mass": m, "best_label_rank": r, "top_token": top}
            for one, row, m, r, top in about
        ]

    @torch.no_grad()
    def reading(self) -> tuple[Found, Found]:
        """Answers, and what every lens reads at every depth of readout and mention."""
        mention, where = self.mention(), [readout_positions(self.x)]
        where += [] if mention is None else [mention]
        reader = StreamReader(self.model, self.x, torch.cat(where, dim=1))
        with self.model.hooks(fwd_hooks=reader.hooks):
            logits = self.model(self.x)[:, -1].float()
        rows = reader.rows()
        information: Found = [[] for _ in self.prompts]
        for name, lens in self.lenses.items():
            scores = self.labels.scores(read_rows(self.model, rows, self.labels.tokens, lens))
            fidelity = lens_fidelity(self.model, rows, lens=lens)
            for place, position in enumerate(("readout", MENTION)[: len(where)]):
                at = scores[:, :, place]
                own = self._own.to(at.device)
                read = information_scores(at, own, fidelity.normaliser[:, :, place])
                columns = {
                    "best": at.argmax(-1), "hit": read.hit, "p_correct_soft": read.soft,
                    "label_mass": read.mass, "kl": fidelity.kl[:, :, place],
                    "agrees": fidelity.agrees[:, :, place],
                }  # fmt: skip
                about = {"position": position, "lens": name}
                for found, more in zip(information, self._by_depth(columns), strict=True):
                    found += [{**row, **about} for row in more]
        return [[row] for row in self._answers(logits)], information

    def _by_depth(self, columns: Mapping[str, Tensor]) -> Found:
        """A row per prompt and depth."""
        every = {name: values.T.tolist() for name, values in columns.items()}
        best, found = every.pop("best"), []
        for n, one in enumerate(self.prompts):
            found.append([
                {**one.identity(), "depth": depth, "prediction": self.labels.names[label],
                 **{name: values[n][depth] for name, values in every.items()}}
                for depth, label in enumerate(best[n])
            ])  # fmt: skip
        return found

    # --- Attention

    def knockouts(self) -> Found:
        """Attention of readout and mention without each set of keys, in every window of blocks."""
        mention = self.mention()
        found: Found = [[] for _ in self.prompts]
        for query, keys in self._key_sets(mention).items():
            swept = knock_out(
                self.model, self.x, LabelScores(self.labels), keys=keys,
                queries=query,
                layers=windows(len(self.model.path), self.config.window),
                engine=self.config.engine, max_bytes=self.config.max_bytes,
            )  # fmt: skip
            for rows, more in zip(found, self._cells(swept), strict=True):
                rows += [
                    {"query": query, "keys": row.pop("keys"), "first": min(blocks),
                     "last": max(blocks), **row}
                    for row in more
                    for blocks in [np.atleast_1d(row.pop("layer")).tolist()]
                ]  # fmt: skip
        return found

    def _key_sets(self, mention: Tensor | None) -> dict[str, dict[str, KeyMask]]:
        """Query -> name -> keys that it is kept from."""
        spans, nowhere = self.x.spans, torch.zeros(self.x.shape, dtype=torch.bool)

        def at(name: str) -> KeyMask:
            return spans.mask(name) if name in spans else nowhere

        named = nowhere if mention is None else at(MENTION)
        every = {
            "audio": at("audio"), "transcript": at("transcript"), MENTION: named,
            "question": at("text") & ~at(MENTION), "random": self._random_keys(at("audio")),
        }  # fmt: skip
        queries = {"readout": [*every], **({MENTION: ["audio", "random"]} if named.any() else {})}
        return {
            query: {name: every[name] for name in names if every[name].any()}
            for query, names in queries.items()
        }

    def _random_keys(self, audio: KeyMask) -> KeyMask:
        """As many keys as the audio has, drawn from all but the first position and the readout."""
        found = torch.zeros_like(audio)
        for row, one in enumerate(self.prompts):
            real = self.x.is_real[row].nonzero()[0][1:-1]
            drawn = one.random(self.config.seed).permutation(len(real))[: int(audio[row].sum())]
            found[row, real[drawn]] = True
        return found

    def _cells(self, swept: PatchResult) -> Found:
        """A row per cell, for every prompt: its coordinates, the answer, and the change of it."""
        axes = {
            name: ticks for name, ticks in swept.axes.items() if name not in ("example", "label")
        }
        cells = [dict(zip(axes, at, strict=True)) for at in product(*axes.values())]
        base = self._said(swept.base)
        values = swept.values.reshape(len(cells), *swept.values.shape[-2:])
        found: Found = [[] for _ in self.prompts]
        for cell, scores in zip(cells, values, strict=True):
            for n, (row, before) in enumerate(zip(self._said(scores), base, strict=True)):
                gain = {"gain": row["margin"] - before["margin"], "base": before["margin"]}
                noise = float(swept.noise_between_labels[n])
                found[n].append(
                    {**self.prompts[n].identity(), **cell, **row, **gain,
                     "base_hit": before["hit"], "noise": noise}
                )  # fmt: skip
        return found

    # --- Enrichment

    def search(self) -> Found:
        """Every mode, source and block."""
        n_layers, config = len(self.model.path), self.config
        sources = config.enrich_sources or range(n_layers)
        states = residual_rows(self.model, self.x)[[*sources], :, 0]
        found: Found = [[] for _ in self.prompts]
        for mode in config.enrich_modes:
            swept = enrich(
                self.model, self.x, states, LabelScores(self.labels), mode=mode,
                layers=config.enrich_layers, coefficient=config.coefficient, engine=config.engine,
                max_bytes=config.max_bytes,
            )  # fmt: skip
            for rows, more in zip(found, self._cells(swept), strict=True):
                # Later states are none that a block could be given.
                rows += [
                    {**row, "mode": mode, "source": depth}
                    for row in more
                    if (depth := sources[row["source"]]) <= row["layer"]
                ]
        return found

    @torch.no_grad()
    def enriched(self, chosen: ChosenEnrichment, other: ALMInput | None) -> Found:
        """The chosen enrichment, and its controls."""
        rows = residual_rows(self.model, self.x)[:, :, 0]
        own = rows[chosen.source]
        donors = {"self": own}
        wanted, drawn = (
            self.config.enrich_controls,
            [p.random(self.config.seed) for p in self.prompts],
        )
        if "other_depth" in wanted and len(rows) > 2:
            depths = [k for k in range(len(rows) - 1) if k != chosen.source]
            at = torch.tensor([depths[rng.integers(len(depths))] for rng in drawn])
            donors["other_depth"] = rows[at.to(rows.device), torch.arange(len(at)).to(rows.device)]
        if "other_clip" in wanted and other is not None:
            donors["other_clip"] = residual_rows(self.model, other)[chosen.source, :, 0]
        if "noise" in wanted:
            noise = np.stack([rng.standard_normal(own.shape[-1]) for rng in drawn])
            direction = torch.nn.functional.normalize(torch.from_numpy(noise), dim=-1)
            norm = own.double().norm(dim=-1, keepdim=True).cpu()
            donors["noise"] = (norm * direction).to(own)
        swept = enrich(
            self.model, self.x, torch.stack([*donors.values()]), LabelScores(self.labels),
            layers=[chosen.layer], mode=chosen.mode, coefficient=self.config.coefficient,
            engine=self.config.engine, max_bytes=self.config.max_bytes,
        )  # fmt: skip
        names, about = [*donors], {"mode": chosen.mode, "source": chosen.source}
        return [
            [{**row, **about, "donor": names[row["source"]]} for row in more]
            for more in self._cells(swept)
        ]
