"""Donors: a patch takes its values from another run, a mean, noise, zeros, or the run itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engine.record import Record, on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import Site
from .alignment import align_place
from .measurement import Measurement
from .placement import Chosen, Placement, Spots


@dataclass(frozen=True, eq=False)
class Mean:
    """Mean activation over the rows of some prompts: the value of mean ablation.

    The mean is over all positions of the patched place, or taken position by position (places must
    then be as long as the base's).
    """

    inputs: ALMInput
    by_position: bool = False


@dataclass(frozen=True)
class Noise:
    """The base's own activation plus seeded Gaussian noise, ``scale`` times the site's std.

    The std is over all real positions and features of the row at that block.
    """

    scale: float = 3.0
    seed: int = 0


Donor = ALMInput | Mean | Noise | Literal["self", "zero"]


def run_of(donor: Donor) -> ALMInput | None:
    """The donor itself if it is a run, else None.

    Raises:
        InputError: an unknown donor.
    """
    if not isinstance(donor, ALMInput | Mean | Noise) and donor not in ("self", "zero"):
        raise InputError(
            f"patching with donor {donor!r}: expected prompts from `prepare`, Mean, Noise, 'self' "
            "or 'zero'."
        )
    return donor if isinstance(donor, ALMInput) else None


class DonorValues:
    """A donor's activations at the places of a base batch."""

    def __init__(self, model: HookedALM, donor: Donor, placement: Placement) -> None:
        """Nothing is known until ``read``."""
        self.model, self.donor, self.placement = model, donor, placement
        self.base = placement.base
        self.run = run_of(donor)

    @property
    def reads_base(self) -> bool:
        """Whether values are made from the base's own activations."""
        return self.donor == "self" or isinstance(self.donor, Noise)

    def read(self, site: Site, names: Sequence[str], measured: Measurement) -> None:
        """Take the activations of some hook points over from the runs of a measurement.

        Raises:
            InputError: patterns of prompts that differ in length, or with noise.
        """
        if site == "pattern":
            self._check_pattern()
        if site == "cross_attn.pattern":
            self._check_memory_pattern()
        kept: dict[str, Tensor] = {}
        if self.run is not None and measured.donor_runs is not None:
            kept = measured.donor_runs.kept
        elif self.reads_base:
            kept = measured.base_runs.kept
        elif isinstance(self.donor, Mean):
            inputs = self.donor.inputs
            with self.model.hooks(fwd_hooks=measured.splice_hooks(self.model, inputs)):
                _, kept = self.model.run_with_cache(
                    inputs, names_filter=list(names), return_cache_object=False
                )
            if self.model.part is not None:
                kept = self.model.encoder_rows(self.donor.inputs).kept(kept)
        # Positions first for every site: ``[batch, query_pos, head, key_pos]`` for the pattern.
        is_pattern = site.endswith("pattern")
        self._kept = {n: v.transpose(1, 2) if is_pattern else v for n, v in kept.items()}

    def _check_pattern(self) -> None:
        """Patterns know nothing of masks: refuse what would attend to pads or to the future."""
        mean = self.donor if isinstance(self.donor, Mean) else None
        if isinstance(self.donor, Noise) or (mean is not None and not mean.by_position):
            raise InputError(
                f"patching the pattern with {type(self.donor).__name__}: it would attend to pads "
                "and to the future. Patch q or k instead, or take a Mean(by_position=True)."
            )
        other = self.run if mean is None else mean.inputs
        if other is None:
            return
        ours, theirs = self._keys(self.placement.given), self._keys(other)
        rows = theirs if mean is None else theirs[:, None]  # a mean is over all its rows
        if ours.shape[1] != theirs.shape[1] or not bool((ours == rows).all()):
            raise InputError(
                f"patching the pattern: the base has {ours.shape[1]} positions, the donor "
                f"{theirs.shape[1]}, or they are padded differently. Patterns are exchanged "
                "between prompts whose keys are the same positions."
            )

    def _check_memory_pattern(self) -> None:
        """Refuse what is no pattern over the memory that the base reads."""
        if isinstance(self.donor, Noise):
            raise InputError(
                "patching the pattern with Noise: its rows would not be patterns any more. Patch q "
                "or k instead."
            )
        other = self.donor.inputs if isinstance(self.donor, Mean) else self.run
        given = [self.placement.given] + ([] if other is None else [other])
        sizes = {None if x.memory is None else x.memory.shape[1] for x in given}
        audio = self.model.audio
        full = None if audio is None else audio.n_tokens(audio.feature_shape[1])
        if len({full if size is None else size for size in sizes}) > 1:
            raise InputError(
                "patching the pattern of cross-attention: base and donor read memories of "
                f"{sorted(map(str, sizes))} positions (None is the encoder's {full}), expected "
                "one size."
            )

    def _keys(self, x: ALMInput) -> Bool[Tensor, "batch pos"]:
        """True at positions that may be attended to."""
        if self.model.part is None:
            return x.attention_mask.bool().cpu()
        return torch.from_numpy(self.model.encoder_rows(x).is_seen)

    def records(self, measured: Measurement) -> list[Record]:
        """The donor's runs, if the fast engine made any."""
        if self.model.part is not None:
            return []  # no rows of an encoder stay what they were before a span
        runs = measured.base_runs if self.donor == "self" else measured.donor_runs
        return [] if runs is None else runs.records

    def values(
        self, name: str, spots: Chosen, units: Chosen | None = None
    ) -> Float[Tensor, " chosen *features"] | float:
        """Values to write at some spots, of one unit each or of all."""
        if self.donor == "zero":
            return 0.0
        if isinstance(self.donor, Mean):
            means = self._means(self.donor, self._kept[name])
            where = on_device(spots, means)
            return means[where] if units is None else means[where, on_device(units, means)]
        kept = self._kept[name]
        found = self.placement.spots.of_donor(kept, spots, units)
        if isinstance(self.donor, Noise):
            found = found + self.placement.spots.of_donor(
                self._noise(self.donor, kept), spots, units
            )
        return found

    def _noise(self, donor: Noise, kept: Float[Tensor, "batch pos *features"]) -> Tensor:
        """Noise of every row and position: that at a position does not depend on the cell."""
        generator = torch.Generator().manual_seed(donor.seed)
        noise = torch.randn(kept.shape[1:], generator=generator).to(kept)
        real = self.base.attention_mask.bool().to(kept.device)
        std = torch.stack([
            row[mask].float().std() if mask.any() else torch.zeros((), device=kept.device)
            for row, mask in zip(kept, real, strict=True)
        ])  # fmt: skip
        return donor.scale * std.reshape(-1, *[1] * noise.ndim).to(kept.dtype) * noise

    def _means(
        self, donor: Mean, kept: Float[Tensor, "batch pos *features"]
    ) -> Float[Tensor, " spot *features"]:
        """Means over the donor's rows, position by position or of each place as a whole."""
        theirs, spots = self._mean_spots, self.placement.spots
        values = theirs.of_donor(kept, np.arange(len(theirs.cells)))
        # Sums in fp32: in the dtype of the values, each addition would round.
        n = len(spots.cells) if donor.by_position else len(self.placement.places)
        total = values.new_zeros(n, *values.shape[1:], dtype=torch.float32)
        total.index_add_(0, on_device(theirs.cells, total), values.float())
        counts = np.bincount(theirs.cells, minlength=n).clip(min=1)
        means = total / on_device(counts, total).reshape(-1, *[1] * (total.ndim - 1))
        of = np.arange(n) if donor.by_position else spots.cells // len(self.base)
        return means.to(kept.dtype)[on_device(of, means)]

    @cached_property
    def _mean_spots(self) -> Spots:
        """Spots of the donor's rows; ``cells`` are what they are averaged to: spots, or places."""
        assert isinstance(self.donor, Mean)
        inputs, placement = self.donor.inputs, self.placement
        if not self.donor.by_position:
            # Each row's own place counts, of any length.
            spots = Placement(self.model, inputs, None, placement.places).spots
            return spots._replace(cells=spots.cells // len(inputs))
        inputs = self.model.positions_of(inputs)
        # Position by position each row is aligned with the base.
        parts, first = [], 0
        for place, rows in zip(placement.places, placement.alignments, strict=True):
            for row, ours in enumerate(rows):
                for other in range(len(inputs)):
                    one = align_place(self.base[row], inputs[other], place)
                    n = len(one.base)
                    columns = one.base, one.lower, one.upper, one.weight
                    kinds = int, int, int, float  # of lists that may be empty
                    typed = zip(columns, kinds, strict=True)
                    arrays: list[np.ndarray] = [np.array(c, kind) for c, kind in typed]
                    parts.append([first + np.arange(n), np.full(n, other), *arrays])
                first += len(ours.base)
        return Spots(*(np.concatenate(column) for column in zip(*parts, strict=True)))
