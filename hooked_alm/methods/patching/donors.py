"""Donors: a patch takes its values from another run, a mean, noise, zeros, or the run itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.record import Record
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import Site
from .alignment import align_place
from .measurement import Measurement
from .placement import Placement


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
        kept: dict[str, Tensor] = {}
        if self.run is not None and measured.donor_runs is not None:
            kept = measured.donor_runs.kept
        elif self.reads_base:
            kept = measured.base_runs.kept
        elif isinstance(self.donor, Mean):
            _, kept = self.model.run_with_cache(
                self.donor.inputs, names_filter=list(names), return_cache_object=False
            )
        # Positions first for every site: ``[batch, query_pos, head, key_pos]`` for the pattern.
        self._kept = {n: v.transpose(1, 2) if site == "pattern" else v for n, v in kept.items()}

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
        ours, theirs = self.base.attention_mask.cpu(), other.attention_mask.cpu()
        rows = theirs if mean is None else theirs[:, None]  # a mean is over all its rows
        if ours.shape[1] != theirs.shape[1] or not bool((ours == rows).all()):
            raise InputError(
                f"patching the pattern: the base has {ours.shape[1]} positions, the donor "
                f"{theirs.shape[1]}, or they are padded differently. Patterns are exchanged "
                "between prompts whose keys are the same positions."
            )

    def records(self, measured: Measurement) -> list[Record]:
        """The donor's runs, if the fast engine made any."""
        runs = measured.base_runs if self.donor == "self" else measured.donor_runs
        return [] if runs is None else runs.records

    def values(
        self, name: str, row: int, place: int, units: Sequence[int] | None
    ) -> Float[Tensor, " aligned *features"] | float:
        """Values to write at a place of a row, for some units or all."""
        if self.donor == "zero":
            return 0.0
        alignment = self.placement.alignments[place][row]
        if isinstance(self.donor, Mean):
            return self._mean(self.donor, name, row, place, units)
        donor = self._kept[name][row]
        chosen = donor if units is None else donor[:, list(units)]
        found = alignment.donor_values(chosen)
        if isinstance(self.donor, Noise):
            real = donor[self.base.attention_mask[row].bool().to(donor.device)]
            # Drawn for the whole row and then cut: the noise at a position does not depend on the
            # cell.
            generator = torch.Generator().manual_seed(self.donor.seed)
            every = torch.randn(donor.shape, generator=generator).to(donor)
            noise = every if units is None else every[:, list(units)]
            found = found + self.donor.scale * real.float().std() * noise[alignment.base]
        return found

    def _mean(
        self, donor: Mean, name: str, row: int, place: int, units: Sequence[int] | None
    ) -> Tensor:
        """Mean over the donor's rows, of the place's positions one by one or all together."""
        where = [
            # Position by position each row is aligned with the base; else its own place counts, of
            # any length.
            align_place(self.base[row], donor.inputs[other], self.placement.places[place])
            if donor.by_position
            else align_place(donor.inputs[other], donor.inputs[other], self.placement.places[place])
            for other in range(len(donor.inputs))
        ]
        values = self._kept[name] if units is None else self._kept[name][:, :, list(units)]
        rows = [one.donor_values(values[other]) for other, one in enumerate(where)]
        if donor.by_position:
            return torch.stack(rows).mean(dim=0)
        n = len(self.placement.alignments[place][row].base)
        return torch.cat(rows).mean(dim=0).expand(n, *rows[0].shape[1:])
