"""What ``minimal_pairs`` measures: how clips sound and what they are heard as; then the sweeps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from hooked_alm import HookedALM
from hooked_alm.errors import InputError
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.activations.collect import rows_of
from hooked_alm.methods.activations.selection import kept_points
from hooked_alm.methods.patching.donors import Donor, Mean
from hooked_alm.methods.patching.patch import patch
from hooked_alm.methods.reading.labels import LabelSet
from hooked_alm.points import hook_name

from ..materials.exchange import DIRECTIONS, PLACES, PairExchange, PlaceName

ENCODER_BEGINS = "audio.encoder.hook_embed"


def probe_point(model: HookedALM, named: str | None) -> str:
    """The point that probes read.

    Raises:
        InputError: there is no such point, or there are several.
    """
    first = ENCODER_BEGINS if ENCODER_BEGINS in model.hook_dict else None
    point = named or first or hook_name("resid_pre", model.path[0])
    found = kept_points(model, point)
    if len(found) != 1:
        raise InputError(
            f"probing {point!r}: got {len(found)} hook points, expected one. Name a single point, "
            "as `hooked-alm hooks` lists them"
        )
    return point


@torch.no_grad()
def heard(
    model: HookedALM, x: ALMInput, labels: LabelSet, point: str
) -> list[tuple[Float[np.ndarray, " width"], Float[np.ndarray, " label"]]]:
    """Of every row the mean of a point over its clip, and the scores of its answers."""
    (found,) = rows_of(model, x, point, "audio").values()
    prompts, states = torch.from_numpy(found.index["prompt"]), found.values[point].float().cpu()
    scores = labels.scores(model(x)[:, -1, labels.tokens].float()).cpu().numpy()
    means = [states[prompts == row].mean(dim=0).numpy() for row in range(len(x))]
    return list(zip(means, scores, strict=True))


def places_of(x: ALMInput) -> list[PlaceName]:
    """Places of a prompt that hear its clip, or what is said of it: those that end behind it."""
    first = min(x.spans.positions("audio", 0))
    found: list[PlaceName] = []
    for place, spans in PLACES.items():
        positions = [x.spans.positions(name, 0) for name in spans]
        if all(positions) and max(max(some) for some in positions) >= first:
            found.append(place)
    return found


@dataclass(frozen=True)
class PairSweep:
    """The sweeps of some pairs that run together; ``example`` is the number of one."""

    exchange: PairExchange
    places: Sequence[PlaceName]
    reference: ALMInput | None
    """Prompts whose mean stands for a removed head; None is zeros."""

    @property
    def _spans(self) -> list[tuple[str, ...]]:
        return [PLACES[name] for name in self.places]

    def depths(self) -> pd.DataFrame:
        """Every place patched at every depth, both ways."""
        parts = []
        for direction in DIRECTIONS:
            first = self.exchange.cells(
                patch, direction, places=self._spans, site="resid_pre", layers=[0]
            )
            later = self.exchange.cells(patch, direction, places=self._spans, site="resid_post")
            parts += [first.assign(depth=0), later.assign(depth=later.layer + 1)]
        columns = ["direction", "place", "depth", "value", "toward", "recovery", "noise"]
        return pd.concat(parts)[["example", *columns, "base", "donor"]]

    def heads(self) -> pd.DataFrame:
        """Every head of the base at every place: patched with the donor's, and removed."""
        instead: Donor = "zero" if self.reference is None else Mean(self.reference)
        patched, ablated = (
            self.exchange.cells(
                patch, "noising", instead=one, places=self._spans, site="z", heads="each"
            )
            for one in (None, instead)
        )
        keys = ["example", "place", "layer", "head"]
        both = patched[[*keys, "toward", "noise"]].merge(ablated[[*keys, "toward"]], on=keys)
        names = {"toward_x": "patched", "toward_y": "ablated"}
        return both.rename(columns=names).astype({"head": int})
