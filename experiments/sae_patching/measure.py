"""What ``sae_patching`` reads off a model: what every edit of a clip's rows moves.

An edit's effect is in logits: of the label that is written in, less the voice's own.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_alm import HookedALM
from hooked_alm.inputs import ALMInput
from hooked_alm.methods.dictionary.exchanges import KindEdit, KindExchange
from hooked_alm.methods.patching.metrics import LabelScoresAndMass
from hooked_alm.methods.patching.row_edits import aligned_rows, patch_rows
from hooked_alm.methods.reading.labels import LabelSet

from ..workbench.results import Row
from .plan import VoiceExchange
from .settings import SAEPatchingConfig

SPAN = "audio"


@torch.no_grad()
def exchanged(
    model: HookedALM,
    point: str,
    labels: LabelSet,
    config: SAEPatchingConfig,
    works: Sequence[tuple[VoiceExchange, KindExchange]],
    base: ALMInput,
    donor: ALMInput | None,
) -> Iterator[tuple[int, str, Row]]:
    """Exchange, table and row of every edit, and of the exchange itself."""
    own = aligned_rows(model, base, base, point, SPAN)
    theirs: Sequence[Tensor | None] = [None] * len(works)
    if donor is not None:
        theirs = aligned_rows(model, base, donor, point, SPAN, config.align_policies())
    edits = []
    for (work, exchange), rows in zip(works, theirs, strict=True):
        digest = hashlib.sha256(f"{config.seed}/{work.pair}".encode()).digest()
        seed = int.from_bytes(digest[:7], "big")  # the same whatever else is run
        found = exchange.edits(config.sizes, config.n_latents, config.alphas, rows, seed)
        edits.append([*found])
    # All exchanges have the same edits, in the same order.
    by_edit = {
        str(i): [one.edit for one in some] for i, some in enumerate(zip(*edits, strict=True))
    }
    result = patch_rows(
        model, base, LabelScoresAndMass(labels), by_edit, point, SPAN, engine=config.engine,
        max_bytes=config.max_bytes,
    )  # fmt: skip
    for k, (work, exchange) in enumerate(works):
        x = own[k].float()
        yield k, "exchanges", {"error_change": exchange.error_change(x, theirs[k])}
        for i, edit in enumerate(edits[k]):
            scores = result.values[i, k], result.base[k]
            yield k, "edits", _row(work, edit, x, labels.names, *scores)


def _row(
    work: VoiceExchange,
    edit: KindEdit,
    x: Float[Tensor, "row d_in"],
    names: Sequence[str],
    values: Float[np.ndarray, " label"],
    before: Float[np.ndarray, " label"],
) -> Row:
    toward, voice = names.index(work.toward), names.index(work.voice)
    answer, first = (names[int(one[:-1].argmax())] for one in (values, before))
    margin, start = (float(one[toward] - one[voice]) for one in (values, before))
    return {
        "family": edit.family, "n_latents": edit.n_latents, "alpha": edit.alpha,
        "prediction": answer,
        # Nothing is to be flipped where it is the answer already, nor to be left alone where the
        # voice is the answer.
        "flipped": float(answer == work.toward) if first != work.toward else np.nan,
        "stayed": float(answer == first) if first != work.voice else np.nan,
        "shift": margin - start, "moved": float((edit.edit(x) - x).norm(dim=-1).mean()),
        "activity": edit.activity, "label_mass": float(values[-1]),
    }  # fmt: skip
