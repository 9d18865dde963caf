"""Which pairs are made of which recordings, and what an accepted one has to fulfil.

Source: M-MP.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..workbench.settings import EachOnce, ExperimentConfig, Truncate
from .records import Words
from .sources import Source

PairKind = Literal["label", "word", "noise", "band", "level", "pitch", "range", "pace"]
PairFamily = Literal["waveform", "prosodic", "phonological"]
Hertz = Annotated[float, Field(gt=0, le=10**6)]
FAMILIES: dict[PairKind, PairFamily] = {
    "label": "prosodic", "word": "phonological", "noise": "waveform", "band": "waveform",
    "level": "waveform", "pitch": "prosodic", "range": "prosodic", "pace": "prosodic",
}  # fmt: skip
"""Kind of pair -> what its clips differ in."""
MOVES: dict[PairKind, tuple[str, ...]] = {
    "label": ("F0",), "level": ("level", "level leak"), "pitch": ("F0",), "range": ("F0",),
}  # fmt: skip
"""Kind of pair -> criteria that it is there to break."""


class PairsConfig(ExperimentConfig):
    """Settings of experiments on pairs of clips that are to differ in one thing."""

    audio: Source = Field(
        default="bundled",
        description="table of clips, folder with a manifest.csv, or of OB1-named clips; columns "
        "path, the attribute, and, as far as known, speaker, text, language and answer",
    )
    attribute: str = Field(
        default="emotion", min_length=1, max_length=40, description="column that pairs differ in"
    )
    prompt: Words | None = Field(
        default=None,
        description="what every clip is asked; None is OB1's question, in the clip's language",
    )
    kinds: Annotated[tuple[PairKind, ...], EachOnce] = Field(
        default=("label", "word", "noise", "band", "level", "pitch", "range", "pace"),
        min_length=1,
        description="label and word pair two recordings, the others a recording and its change",
    )
    n_pairs: int = Field(default=18, ge=1, le=10**6, description="most pairs of a kind, drawn")
    truncate: Truncate = False
    level_dbfs: float | None = Field(
        default=-26.0,
        ge=-90,
        le=0,
        description="every clip is brought to this level first; None leaves levels as they are",
    )
    snr_db: float = Field(default=10.0, ge=-40, le=80, description="of noise")
    band_hz: tuple[Hertz, Hertz] = Field(
        default=(300.0, 3400.0), description="what band leaves, from and to"
    )
    level_db: float = Field(default=-6.0, ge=-60, le=60, description="by which level changes it")
    pitch_st: float = Field(default=4.0, ge=-12, le=12, description="semitones of pitch")
    range_factor: float = Field(default=0.5, ge=0, le=3, description="of the pitch range")
    pace_factor: float = Field(default=1.25, ge=1, le=3, description="of the pace; 1 or more")
    max_level_db: float = Field(
        default=0.5, ge=0, le=60, description="largest difference of level in a pair"
    )
    max_snr_db: float = Field(
        default=0.5, ge=0, le=60, description="largest distance of the noise from snr_db"
    )
    max_f0_st: float = Field(
        default=0.5, ge=0, le=48, description="largest difference of median F0, in semitones"
    )
    others: tuple[str, ...] = Field(
        default=("speaker", "text"),
        description="columns that probes read and that must not change, beside the attribute",
    )
    max_probe_change: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="of the probability of what a probe should read; to fail, the interval of its "
        "fits has to lie beyond",
    )

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "PairsConfig":
        if not self.band_hz[0] < self.band_hz[1]:
            raise ValueError("band_hz must be two frequencies, the lower one first")
        if self.attribute in (*FAMILIES, *self.others):
            rest = ", ".join(one for one in self.others if one != self.attribute)
            raise ValueError(
                f"attribute must be no kind of pair, and none of others: got {self.attribute!r}. "
                f"Others without it is others=[{rest}]"
            )
        return self
