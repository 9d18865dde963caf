"""What clips are answered that are asked for attributes, with their audio and without.

Source: M-AL-2, M-AL-4; C47.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.results import PatchResult
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.methods.statistics.label_scores import dealt_hits, lead

from ..workbench.claims import Finding, few, judged, not_measured, shown
from ..workbench.intervals import prefixed
from ..workbench.results import Columns, ItemRows, Results, Row, having, item_rows, parts_by
from .answers import label_weight
from .attribute_prompts import AttributePrompt
from .confounds import confounded
from .resampling import mean_of

OfAttributes = Results[Any]
"""Results of an experiment on clips that are asked for attributes."""
WHO = ("clip", "speaker", "attribute", "prompt", "label")
ANSWERS = {
    "answers": "a clip asked for an attribute in one format, and what is answered",
    "absences": "the same clip and question without its audio, or its transcript",
}
SAID = ("prediction", "hit", "margin")
"""What is answered, whether that is right, and by how much the right label leads the others."""
CHANGED = (*SAID, "gain", "base", "base_hit", "noise")
"""The same in a cell of a sweep, and in what it is moved by."""


@dataclass(frozen=True, eq=False)
class AttributeAnswers:
    """A model, the labels of one attribute, and the prompts of a batch."""

    model: HookedALM
    labels: LabelSet
    prompts: Sequence[AttributePrompt]
    x: ALMInput

    @cached_property
    def own(self) -> Int[np.ndarray, " batch"]:
        """The right label of every prompt."""
        return np.array([self.labels.index(one.label) for one in self.prompts])

    @cached_property
    def who(self) -> Columns:
        """What the prompts are."""
        return _columns([one.identity() for one in self.prompts])

    def rows(self, columns: Columns) -> ItemRows:
        """A row per cell of every prompt."""
        return item_rows(columns, len(self.prompts))

    def said(self, scores: Float[np.ndarray, "*cell batch label"]) -> Columns:
        """The columns `SAID`."""
        best = scores.argmax(axis=-1)
        margin = lead(scores, self.own).astype(np.float64)
        found = np.array(self.labels.names)[best], (best == self.own).astype(float), margin
        return dict(zip(SAID, found, strict=True))

    def changed(self, swept: PatchResult) -> Columns:
        """The answer in every cell of a sweep, and how far the right label's margin is moved."""
        said, base = self.said(swept.values), self.said(swept.base)
        change = {"gain": said["margin"] - base["margin"], "base": base["margin"]}
        return {**said, **change, "base_hit": base["hit"], "noise": swept.noise_between_labels}

    @torch.no_grad()
    def answers(self, **about: str) -> ItemRows:
        """The answer to every prompt, with further columns."""
        return self.rows({**self.answered(self.model(self.x)[:, -1].float()), **about})

    def answered(self, logits: Float[Tensor, "batch vocab"]) -> Columns:
        """The answers that logits at the readout are."""
        return {
            **self.who,
            **self.said(self.labels.scores(logits[:, self.labels.tokens]).cpu().numpy()),
            **_columns([label_weight(self.labels, row) for row in logits]),
            "top_token": [self.model.tokenizer.decode([top]) for top in logits.argmax(-1).tolist()],
        }


def _columns(rows: Sequence[Row]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}


# --- What is made of it


def attributes_of(run: OfAttributes) -> list[str]:
    """Attributes in their order."""
    return [*run.inputs["labels"]]


def accuracy(run: OfAttributes) -> pd.DataFrame:
    """How often, and by how much, the right label leads; with the audio and without."""
    every = pd.concat([run["answers"].assign(heard="audio"), run["absences"]])
    return pd.DataFrame([
        {**names, **mean_of(run, part, "hit"), **prefixed("margin", mean_of(run, part, "margin")),
         "chance": dealt_hits(part.prediction, part.label)}
        for names, part in parts_by(every, "attribute", "prompt", "heard")
    ])  # fmt: skip


def lost_in_silence(run: OfAttributes, attribute: str) -> Row:
    """Margin with the audio minus margin with silence in its place, clip by clip."""
    silent = having(run["absences"], attribute=attribute, heard="silence")
    answers = having(run["answers"], attribute=attribute, prompt=run.config.causal_prompt)
    both = answers.merge(silent[["clip", "margin"]], on="clip", suffixes=("", "_silent"))
    if both.empty:
        return {"mean": np.nan, "low": np.nan, "high": np.nan, "n": 0, "n_clusters": 0}
    return mean_of(run, both.assign(lost=both.margin - both.margin_silent), "lost")


def told_apart_by(run: OfAttributes, attribute: str) -> dict[str, bool]:
    """What else than the attribute the clips may be told apart by, as reasons against a claim."""
    return confounded(having(run["confounds"], attribute=attribute), run.config)


def answered_finding(run: OfAttributes, attribute: str) -> Finding:
    """The claim that the model answers an attribute."""
    rows = having(run["accuracy"], attribute=attribute, heard="audio")
    row = having(rows, prompt=run.config.causal_prompt).iloc[0].to_dict()
    chance = max(row["chance"], 1 / len(run.inputs["labels"][attribute]))
    others = "".join(
        f", {one['mean']:.2f} under the format {one['prompt']}"
        for one in rows.to_dict("records")
        if one["prompt"] != run.config.causal_prompt
    )
    return judged(
        f"The model answers the {attribute}",
        f"Right in {shown(row)} of {int(row['n'])} clips under the format "
        f"{run.config.causal_prompt}{others}; by chance in {chance:.2f}",
        {
            **few(row["n_clusters"], run.config.resampled),
            f"not surely above chance, {chance:.2f}": not row["low"] > chance,
            **told_apart_by(run, attribute),
        },
        numbers=row,
        unit="rate",
    )


def audio_finding(run: OfAttributes, attribute: str) -> Finding:
    """The claim that it is the audio that an answer is made of (C47)."""
    claim = f"The answer to the {attribute} rests on the audio"
    lost = lost_in_silence(run, attribute)
    if not lost["n"]:
        return not_measured(claim, "nothing was taken away", "logits")
    without = having(run["accuracy"], attribute=attribute).query("heard != 'audio'")
    said = ", ".join(f"{one['mean']:.2f} ({one['heard']})" for one in without.to_dict("records"))
    return judged(
        claim,
        f"With silence in its place the right label leads by {shown(lost)} logits less; right "
        f"without the audio, or a transcript: {said}",
        {
            **few(lost["n_clusters"], run.config.resampled),
            "the loss is not surely above 0": not lost["low"] > 0,
        },
        numbers=lost,
        unit="logits",
    )
