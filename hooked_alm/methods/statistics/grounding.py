"""The grounding coefficient: to which of two inputs an effect is owed.

Source: seed 003; M-GC and C13.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float

CoefficientForm = Literal["share", "ratio"]


def grounding_coefficient(
    effect_audio: Float[np.ndarray, " *cell"],
    effect_text: Float[np.ndarray, " *cell"],
    *,
    min_effect: float,
    form: CoefficientForm = "share",
) -> Float[np.ndarray, " *cell"]:
    """What the audio has of both effects: e_a / (e_a + e_t), each clipped at 0.

    An effect is a recovery times its total effect, which is how far a patch moves the answer. With
    the inputs exchanged, the coefficients of a cell add up to 1.

    Args:
        effect_audio: how far the audio's exchange moves the answer; ``effect_text``, the text's.
        min_effect: NaN where the clipped effects add up to less: nothing moves the answer there.
        form: ``ratio`` is e_a / e_t, which has no bound, and is NaN where e_t is 0 (C13).
    """
    audio, text = (np.clip(one, 0, None) for one in (effect_audio, effect_text))
    below = audio + text if form == "share" else text
    is_defined = (audio + text >= min_effect) & (below > 0)
    return np.divide(audio, below, out=np.full(below.shape, np.nan), where=is_defined)
