"""Features of a dictionary as units of a sweep: each exchanged, or taken out, by itself.

The edit keeps what the dictionary does not reconstruct: ``x + (f_donor - f_base)_i W_dec[i]`` in
the rows of the patched places, for every feature i, by the exact engine. A feature that base and
donor have alike at all of them changes nothing, and has no cell unless it is asked for.

Source: Marks et al. 2024 (arXiv 2403.19647), with the error kept.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...engine.cells import Edits, Given
from ...engine.record import on_device
from ...errors import InputError
from ...inputs import ALMInput
from ...model import HookedALM
from ...points import ENCODER, SITES, Site, hook_name, sites_of
from ..dictionary.autoencoder import SparseAutoencoder
from ..dictionary.codes import Active
from .choice import place_ticks
from .measurement import Measurement, in_precision
from .metrics import Metric, OnLogits
from .options import ExactOptions, Joint, Option, PlacesOption, takes
from .placement import Placement
from .results import PatchResult

FeatureDonor = ALMInput | Literal["zero"]


class FeatureOptions(ExactOptions, PlacesOption, total=False):
    """Options of ``patch_features``."""

    features: Annotated[
        Sequence[Joint] | None,
        Option(
            None,
            "latents; a tuple patches several at once. None is each whose activation differs "
            "anywhere; all others change nothing.",
        ),
    ]


@torch.no_grad()
@takes(FeatureOptions, places=("audio",))
def patch_features(
    model: HookedALM,
    base: ALMInput,
    donor: FeatureDonor,
    metric: Metric | OnLogits,
    sae: SparseAutoencoder,
    point: str,
    **options: Unpack[FeatureOptions],
) -> PatchResult:
    """Patch every feature at every place, one cell at a time.

    Args:
        model: to run.
        base: prompts to be patched.
        donor: as many prompts, whose features are written in; or ``"zero"``, which takes them out.
        metric: what is read off each run; see ``metrics``.
        sae: dictionary of the point.
        point: hook point in a block, of the decoder or the audio encoder, of width ``d_in``.

    Returns:
        Axes ``feature``, ``place``, ``example`` and, if the metric has several values, ``label``.

    Raises:
        InputError: a point that is none of the stream or of what blocks add to it, or has another
            width; features that there are not; what ``patch`` raises.
    """
    with in_precision(options["precision"], model):
        cells = FeatureCells(
            model, base, donor, metric, sae, point, options["places"], options["features"],
            policy=options["policy"], engine=options["engine"], max_bytes=options["max_bytes"],
        )  # fmt: skip
        found, noise = cells.measured.swept(cells.n_cells, [cells.edits])
        return cells.measured.result(cells.axes, found, noise, **cells.about)


class FeatureCells:
    """Runs of base and donor, and what the patch of each feature adds to the base's rows."""

    def __init__(
        self,
        model: HookedALM,
        base: ALMInput,
        donor: FeatureDonor,
        metric: Metric | OnLogits,
        sae: SparseAutoencoder,
        point: str,
        places: Sequence[Any],
        features: Sequence[Joint] | None,
        **how: Any,
    ) -> None:
        """Run base and donor, and take both apart.

        Raises:
            InputError: see ``patch_features``.
        """
        if not isinstance(donor, ALMInput) and donor != "zero":
            raise InputError(
                f"patching features with donor {donor!r}: expected prompts from `prepare`, or "
                "'zero'."
            )
        sae.check_threshold()
        model, self.site, self.layer = place_of(model, point)
        if sae.cfg.d_in != model.path_cfg.d_model:
            raise InputError(
                f"patching features of {point!r}: got a dictionary of rows of width "
                f"{sae.cfg.d_in}, expected {model.path_cfg.d_model}. Give the dictionary of this "
                "point."
            )
        other = donor if isinstance(donor, ALMInput) else None
        self.placement = Placement(model, base, other, places, how.pop("policy"))
        keep_of_donor = () if other is None else [point]
        self.measured = Measurement(
            model, base, other, metric, keep=[point], keep_of_donor=keep_of_donor, **how
        )
        self.sae, self.name = sae, point
        spots = self.placement.spots
        every = np.arange(len(spots.cells))
        before = sae.encode(spots.of_base(self.measured.base_runs.kept[point], every).float())
        change = -before
        if other is not None:
            assert self.measured.donor_runs is not None
            theirs = spots.of_donor(self.measured.donor_runs.kept[point], every)
            change = sae.encode(theirs.float()) - before
        self.change: Float[Tensor, "spot latent"] = change
        """What a patch adds to each feature, at every position of every place."""
        self.features = self._chosen(features)

    def _chosen(self, features: Sequence[Joint] | None) -> list[tuple[int, ...]]:
        if features is None:
            return [(i,) for i in self.change.any(0).nonzero().flatten().tolist()]
        joint = [(one,) if isinstance(one, int) else tuple(one) for one in features]
        d_sae = self.sae.cfg.d_sae
        if wrong := sorted({i for one in joint for i in one if not 0 <= i < d_sae}):
            raise InputError(
                f"patching features {wrong}: the dictionary has features 0 to {d_sae - 1}."
            )
        return joint

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Axes of the cells, with their coordinates."""
        ticks = tuple(one[0] if len(one) == 1 else one for one in self.features)
        return {"feature": ticks, "place": place_ticks(self.placement.places)}

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of itself."""
        ratios = self.placement.length_ratios
        return {"site": self.site, "mode": "replace", "length_ratios": ratios}

    @property
    def n_cells(self) -> int:
        """Number of cells of each prompt."""
        return len(self.features) * len(self.placement.places)

    @property
    def edits(self) -> Edits:
        """All cells: the rows in which a feature changes, and what is added there."""
        spots, sizes = self.placement.spots, [len(one) for one in self.features]
        latents = self.change.new_tensor([i for one in self.features for i in one]).long()
        of = np.repeat(np.arange(len(self.features)), sizes)
        some = self.change[:, latents]
        spot, member = some.nonzero().unbind(1)
        # An entry is a position in a cell; of features that are patched at once it has several.
        n_spots = len(spots.cells)
        unit = torch.from_numpy(of).to(spot.device)[member]
        entry, where = (unit * n_spots + spot).unique(return_inverse=True)
        order = where.argsort(stable=True)
        active = Active(where[order], latents[member][order], len(entry), self.sae.cfg.d_sae)
        added = active.by_rows(some[spot, member][order], self.sae.W_dec.float())
        found: Int[np.ndarray, " entry"] = entry.cpu().numpy()
        at = found % n_spots
        per_feature = len(self.placement.places) * len(self.placement.base)
        cells = found // n_spots * per_feature + spots.cells[at]
        return Edits(
            site=self.site,
            layer=self.layer,
            cells=cells,
            positions=spots.positions[at],
            write=Given(added, is_added=True),
        )

    def slopes(
        self, gradient: Float[Tensor, "batch pos d_in"], rows: Sequence[int]
    ) -> tuple[Int[np.ndarray, " mine"], Float[Tensor, "mine latent"]]:
        """The spots of some rows, and what each feature's change is worth there to first order.

        Args:
            gradient: of the metric at the point, of these rows.
            rows: consecutive ones of the batch.
        """
        spots = self.placement.spots
        mine = np.flatnonzero(np.isin(spots.rows, rows))
        there = spots._replace(rows=spots.rows - rows[0])
        slope = there.of_base(gradient, mine).float() @ self.sae.W_dec.float().T
        return mine, self.change[on_device(mine, self.change)] * slope


def place_of(model: HookedALM, point: str) -> tuple[HookedALM, Site, int]:
    """The model on the way to whose head a point is, and its site and block along that path.

    Raises:
        InputError: it is none of theirs that holds whole rows.
    """
    if point.startswith(ENCODER) and model.part is None:
        model = model.towards("encoder")
    plain = [
        site for site in sites_of(model.path_cfg) if SITES[site].axes == SITES["resid_post"].axes
    ]
    found = {
        hook_name(site, block): (site, layer)
        for layer, block in enumerate(model.path)
        for site in plain
    }
    if point not in found:
        raise InputError(
            f"patching rows of {point!r}: expected a point of the blocks on the way to the "
            f"head, of {', '.join(plain)}."
        )
    return model, *found[point]
