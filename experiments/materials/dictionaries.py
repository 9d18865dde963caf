"""Sparse autoencoders that an experiment reads: their files, and the rows that they are of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hooked_alm.bundled import DICTIONARIES, PREFIX, dictionary_folder
from hooked_alm.converters.dictionaries import load_dictionary
from hooked_alm.errors import InputError
from hooked_alm.methods.activations.selection import KeptPoint
from hooked_alm.methods.dictionary.autoencoder import Architecture, SparseAutoencoder
from hooked_alm.storage import expanded

from ..workbench.identity import file_hashes
from ..workbench.settings import ExperimentConfig
from .records import collect


@dataclass(frozen=True, eq=False)
class PlacedDictionary:
    """A dictionary, the hook point of its rows, and what a run's identity says of it."""

    sae: SparseAutoencoder
    point: str
    described: dict[str, Any]
    path: Path
    """Its folder or file."""
    about: dict[str, Any]
    """What its files say of it besides."""

    @classmethod
    def read(
        cls, name: str, *, architecture: Architecture | None = None, point: str | None = None
    ) -> "PlacedDictionary":
        """Reads ``bundled:NAME``, a folder, or an ``ae.pt``.

        Args:
            name: where it is.
            architecture: of a file that does not say.
            point: of its rows; None is what its files say.

        Raises:
            InputError: no such dictionary, or nothing says of which point its rows are.
            ConversionError: files that are not a dictionary's.
        """
        folder = dictionary_folder(name)
        stored = load_dictionary(folder, architecture=architecture)
        if (point := point or stored.point) is None:
            raise InputError(
                f"reading the dictionary {name}: its files do not say of which point its rows "
                "are. Name the hook point as its point."
            )
        cfg, path = stored.sae.cfg, expanded(folder)
        files = [path] if path.is_file() else sorted(path.iterdir())
        return cls(stored.sae, point, {
            "point": point, "d_sae": cfg.d_sae, "k": cfg.k, "architecture": cfg.architecture,
            "files": file_hashes(files, path.parent),
        }, path, stored.about)  # fmt: skip

    @property
    def of_model(self) -> str | None:
        """The model that its files say it is of; None if they do not."""
        found = self.about.get("model") or self.about.get("model_name")
        return str(found) if found else None

    def of_noise(self) -> "PlacedDictionary | None":
        """The one that ``sae_train`` trained on noise beside it; None where there is none."""
        run, kind = self.path.parents[2:3], self.path.parents[1:2]
        if not run or kind[0].name != "sae":
            return None
        beside = run[0] / "noise" / self.path.parent.name / self.path.name
        return PlacedDictionary.read(str(beside), point=self.point) if beside.is_dir() else None

    def check(self, kept: KeptPoint, name: str) -> None:
        """Refuses a dictionary of other rows than the model has at its point.

        Raises:
            InputError: rows of another width, or means over clips.
        """
        if self.about.get("pool") == "mean":
            raise InputError(
                f"reading {name} at {kept.name}: got a dictionary of means over whole clips, "
                "expected one of the rows themselves. Train it with pool=none."
            )
        if kept.width != self.sae.cfg.d_in:
            raise InputError(
                f"reading {name} at {kept.name}: got a dictionary of rows of width "
                f"{self.sae.cfg.d_in}, expected {kept.width}. Give the dictionary of this point."
            )


class DictionaryReaderConfig(ExperimentConfig):
    """Settings of experiments that read one dictionary."""

    dictionary: str = Field(
        default="bundled:follows_voice_sae",
        description="its folder, such as RUN/sae/POINT/seed_0 of sae_train or one of SAELens, or "
        "an ae.pt of dictionary_learning; bundled:NAME; unless given, a bundled model's own",
    )
    architecture: Architecture | None = Field(
        default=None, description="of an ae.pt that does not say; AudioSAE's are batchtopk"
    )
    point: str | None = Field(
        default=None, description="hook point of its rows; None is what its files say"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_bundled_model(cls, values: dict[str, Any]) -> dict[str, Any]:
        own = f"{str(values.get('model', '')).removeprefix(PREFIX)}_sae"
        has_one = str(values.get("model", "")).startswith(PREFIX) and (DICTIONARIES / own).is_dir()
        return {"dictionary": PREFIX + own, **values} if has_one else values

    def read_dictionary(self) -> PlacedDictionary:
        """The dictionary; see ``PlacedDictionary.read``."""
        return PlacedDictionary.read(
            self.dictionary, architecture=self.architecture, point=self.point
        )


def _as_entry(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


class NamedDictionary(BaseModel):
    """A dictionary of a list: where it is, and what its files do not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, max_length=4000)
    name: str | None = Field(default=None, min_length=1, max_length=40)
    point: str | None = None
    architecture: Architecture | None = None


DictionaryEntry = Annotated[NamedDictionary, BeforeValidator(_as_entry)]
"""One of a list of settings: its path alone, or a mapping."""


def named_dictionaries(entries: Sequence[NamedDictionary]) -> dict[str, PlacedDictionary]:
    """Dictionaries by their names, or by as much of their paths' ends as tells them apart.

    Raises:
        InputError: two of one name, or what `PlacedDictionary.read` refuses, of all at once.
        ConversionError: files that are not a dictionary's.
    """
    paths = [one.path.removeprefix(PREFIX).strip("/").split("/") for one in entries]
    names: list[str] = []
    for depth in range(1, max(map(len, paths)) + 1):
        names = [
            one.name or "/".join(parts[-depth:]) for one, parts in zip(entries, paths, strict=True)
        ]
        if len({*names}) == len(names):
            break
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"listing dictionaries: got {', '.join(twice)} twice, expected each once. Leave one "
            "out, or name them: {path: ..., name: ...}"
        )
    found = collect(
        "reading dictionaries",
        lambda one: PlacedDictionary.read(
            one.path, architecture=one.architecture, point=one.point
        ),
        entries, lambda one: one.path,
    )  # fmt: skip
    return dict(zip(names, found, strict=True))
