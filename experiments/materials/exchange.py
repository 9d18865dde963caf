"""Exchange of activations between the two prompts of pairs, both ways, read as one effect.

Noising patches the base with the donor, denoising the donor with the base. Every effect is given as
``toward``: how far the patch moves the metric towards the answer of the side that is written in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.patching.alignment import AlignPolicies
from hooked_alm.methods.patching.donors import Donor
from hooked_alm.methods.patching.metrics import Metric
from hooked_alm.methods.patching.options import Engine
from hooked_alm.methods.patching.results import PatchResult

from ..workbench.controls import ROUNDING

Direction = Literal["noising", "denoising"]
DIRECTIONS: tuple[Direction, ...] = ("noising", "denoising")
PlaceName = Literal["readout", "text", "struct", "audio"]
PLACES: dict[PlaceName, tuple[str, ...]] = {
    "readout": ("readout",),
    "text": ("text",),
    "struct": ("audio_struct", "struct"),
    "audio": ("audio",),
}
"""Name -> spans that are patched together; with ``sink``, which hears nothing, a whole prompt."""
NO_EFFECT = ROUNDING["logit"]["float32"]
"""Effects below this are rounding of fp32 logits, and count as none."""


@dataclass(frozen=True)
class PairExchange:
    """Both prompts of some pairs, a row each, and what is read off every run."""

    model: HookedALM
    base: ALMInput
    donor: ALMInput
    metric: Metric
    """The base's answer against the donor's, in both directions."""
    policy: AlignPolicies
    engine: Engine
    max_bytes: int

    def cells(
        self,
        sweep: Callable[..., PatchResult],
        direction: Direction,
        *what: Any,
        instead: Donor | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Every cell of a sweep, with its effect.

        Args:
            sweep: ``patch``, ``path_patch`` or ``patch_edges``.
            direction: which side is patched.
            what: further arguments of the sweep.
            instead: what is written in place of the other side, such as zeros.
            options: of the sweep.
        """
        sides = (self.base, self.donor) if direction == "noising" else (self.donor, self.base)
        patched, other = sides[0], sides[1] if instead is None else instead
        found = sweep(
            self.model, patched, other, self.metric, *what, policy=self.policy, engine=self.engine,
            max_bytes=self.max_bytes, **options,
        )  # fmt: skip
        cells = found.to_dataframe()
        toward = -cells.effect if direction == "noising" else cells.effect
        names = {" + ".join(spans): name for name, spans in PLACES.items()}
        toward = toward.mask(toward.abs() < NO_EFFECT, 0.0)
        about = {"direction": direction, "mode": found.mode, "place": cells.place.map(names)}
        if found.noise is None:
            about["noise"] = 0.0
        return cells.assign(**about, toward=toward)
