"""Settings of ``minimal_pairs``."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from hooked_alm.bundled import PREFIX
from hooked_alm.methods.patching.options import Engine

from ..materials.records import Words
from ..materials.sources import Source
from ..workbench.batches import BatchedConfig, BatchSize
from ..workbench.settings import EngineBytes, Truncate

PairKind = Literal["label", "word", "noise", "band", "level", "pitch", "range", "pace"]
PairFamily = Literal["waveform", "prosodic", "phonological"]
Hertz = Annotated[float, Field(gt=0, le=10**6)]
FAMILIES: dict[PairKind, PairFamily] = {
    "label": "prosodic",
    "word": "phonological",
    "noise": "waveform",
    "band": "waveform",
    "level": "waveform",
    "pitch": "prosodic",
    "range": "prosodic",
    "pace": "prosodic",
}
"""Kind of pair -> what its clips differ in."""
MOVES: dict[PairKind, tuple[str, ...]] = {
    "label": ("F0",),
    "level": ("level", "level leak"),
    "pitch": ("F0",),
    "range": ("F0",),
}
"""Kind of pair -> criteria that it is there to break."""


class MinimalPairsConfig(BatchedConfig):
    """Which clips, which pairs are made of them, and what an accepted pair has to fulfil."""

    KNOWN_WITH: ClassVar = ("audio",)

    model: str = Field(
        default=f"{PREFIX}follows_voice",
        description="id, folder, bundled:NAME, or BASE+DELTA: a localised twin",
    )
    batch_size: BatchSize = 6
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
    kinds: tuple[PairKind, ...] = Field(
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
    probe_point: str | None = Field(
        default=None,
        description="hook point whose mean over a clip probes read; None is where a hooked encoder "
        "begins, else the decoder: what is in the sound, whether the model keeps it or not",
    )
    max_probe_change: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="of the probability of what a probe should read; to fail, the interval of its "
        "fits has to lie beyond",
    )
    ablation: Literal["mean", "zero"] = Field(
        default="mean", description="what stands for a removed head; mean of some recordings"
    )
    n_reference: int = Field(
        default=8, ge=1, le=1000, description="recordings behind the mean of an ablation"
    )
    min_effect: float = Field(
        default=0.05, gt=0, le=1e6, description="logits; a head that surely moves less is idle"
    )
    engine: Engine = Field(default="fast", description="hooks is one whole forward per cell")
    max_bytes: EngineBytes = 2**30

    @model_validator(mode="after")
    def _what_makes_sense(self) -> "MinimalPairsConfig":
        if not self.band_hz[0] < self.band_hz[1]:
            raise ValueError("band_hz must be two frequencies, the lower one first")
        if len({*self.kinds}) < len(self.kinds):
            raise ValueError("kinds must be named once each")
        if self.attribute in (*FAMILIES, *self.others):
            raise ValueError("attribute must be no kind of pair, and none of others")
        return self
