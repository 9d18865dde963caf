"""How others have trained dictionaries, number by number, and where each number is from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NumberSource = Literal["card", "code", "ours"]
"""``card``: the published model card or README. ``code``: the published code. ``ours``: not
published, and so our own choice."""
RecipeName = Literal["audiosae", "mariotte", "freud"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a published training."""

    source: str
    settings: Mapping[str, tuple[Any, NumberSource]]
    """Name, as ``sae_train`` has it -> value, and where it is from."""

    @property
    def values(self) -> dict[str, Any]:
        """Value of every setting."""
        return {name: value for name, (value, _) in self.settings.items()}


RECIPES: Mapping[RecipeName, Recipe] = {
    "audiosae": Recipe(
        source="AudioSAE (HuBERT, Whisper), model card",
        settings={
            "architecture": ("batchtopk", "card"),
            "expansion": (8, "card"),
            "k": (50, "card"),
            "learning_rate": (2e-4, "card"),
            "decay_share": (0.2, "card"),  # from step 160,000 of 200,000
            "aux_weight": (0.0, "card"),
            "n_rows": (200_000 * 1024, "card"),  # 200,000 steps of so many rows as:
            "step_rows": (1024, "ours"),
        },
    ),
    "mariotte": Recipe(
        source="Mariotte's audxsae @828fcaf, its training code",
        settings={
            "pool": ("mean", "code"),
            "architecture": ("topk", "code"),
            "n_latents": (2048, "code"),
            "k": (102, "code"),  # int((1 - s) 2048) at s = .95, of .75 to .99
            "is_centred": (False, "code"),
            "keeps_norms": (False, "code"),
            "learning_rate": (1e-3, "code"),
            "decay_share": (0.0, "code"),  # halved every 200 of 100 passes
            "step_rows": (16, "code"),
            "aux_weight": (0.0, "ours"),
        },
    ),
    "freud": Recipe(
        source="FREUD (Mozilla Builders) @e6b6564, its L1 autoencoder",
        settings={
            "architecture": ("standard", "code"),
            "is_tied": (True, "code"),
            "is_centred": (False, "code"),
            "aux_weight": (0.0, "ours"),
            "l1_weight": (0.2, "ours"),
        },
    ),
}
