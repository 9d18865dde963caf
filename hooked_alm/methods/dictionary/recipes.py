"""How others have trained dictionaries, number by number, and where each number is from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NumberSource = Literal["card", "ours"]
"""``card``: the published model card or README. ``ours``: not published, and so our own choice."""
RecipeName = Literal["audiosae"]


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
}
