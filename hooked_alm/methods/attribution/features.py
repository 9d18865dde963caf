"""Attribution of a dictionary's features: what ``patch_features`` would find, to first order.

The score of a feature is ``(f_donor - f_base)_i (W_dec[i] . dL/dx)`` at the base run, summed over
the positions of a place: the gradient of a patch that keeps what is not reconstructed.

Source: Marks et al. 2024 (arXiv 2403.19647), eq. 3, attribution patching of features.
"""

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from ...engine.record import on_device
from ...inputs import ALMInput
from ...model import HookedALM
from ..dictionary.autoencoder import SparseAutoencoder
from ..patching.features import FeatureCells, FeatureDonor, FeatureOptions
from ..patching.metrics import Metric, OnLogits
from ..patching.options import takes
from .gradients import embeddings_of, gradient_runs
from .trust import Attribution, CheckOptions, attribution, score_table


class FeatureAttributionOptions(FeatureOptions, CheckOptions, total=False):
    """Options of ``attribute_features``."""


@torch.inference_mode(mode=False)
@torch.no_grad()
@takes(FeatureAttributionOptions, places=("audio",))
def attribute_features(
    model: HookedALM,
    base: ALMInput,
    donor: FeatureDonor,
    metric: Metric | OnLogits,
    sae: SparseAutoencoder,
    point: str,
    **options: Unpack[FeatureAttributionOptions],
) -> Attribution:
    """Approximate every cell of a ``patch_features`` sweep, and check some of them exactly.

    It costs a forward and a backward per value of the metric, whatever the number of features.

    Args:
        model: to run; its weights get no gradients.
        base: as in ``patch_features``.
        donor: as in ``patch_features``.
        metric: differentiable.
        sae: dictionary of the point.
        point: hook point in a block of the decoder.

    Returns:
        Scores with the axes of ``patch_features``.

    Raises:
        InputError: what ``patch_features`` raises; a metric without a gradient; a point of the
            encoder.
    """
    model.refuse_encoder("attributing features")
    model.refuse_cross_attention("attributing features")
    cells = FeatureCells(
        model, base, donor, metric, sae, point, options["places"], options["features"],
        policy=options["policy"], engine="fast", max_bytes=options["max_bytes"],
    )  # fmt: skip
    measured = cells.measured
    found = score_table(cells.n_cells, measured)
    n_places, n_rows = len(cells.placement.places), len(base)
    table = found.view(len(cells.features), n_places, *found.shape[1:])
    embeddings = embeddings_of(measured.base_runs, base)
    for run in gradient_runs(measured, embeddings, [point], rows_at_once=options["rows_at_once"]):
        mine, by_spot = cells.slopes(run.gradients[point], run.rows)
        by_cell = by_spot.new_zeros(n_places * n_rows, by_spot.shape[1], dtype=torch.float64)
        at = on_device(cells.placement.spots.cells[mine], by_cell)
        by_cell.index_add_(0, at, by_spot.double())
        for number, joint in enumerate(cells.features):
            score = by_cell[:, list(joint)].sum(1).view(n_places, n_rows)
            table[number, ..., run.label] += score.to(found)

    def exact(chosen: Sequence[int]) -> Tensor:
        patched = measured.values(cells.n_cells, [cells.edits], only=np.array(chosen))
        return patched - measured.base_values

    return attribution(
        measured, cells.axes, found, exact, engine="atp", options=options, **cells.about
    )
