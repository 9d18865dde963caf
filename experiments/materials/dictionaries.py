"""Sparse autoencoders that an experiment reads: their files, and the rows that they are of."""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from hooked_alm.bundled import dictionary_folder
from hooked_alm.converters.dictionaries import load_dictionary
from hooked_alm.errors import InputError
from hooked_alm.methods.activations.selection import KeptPoint
from hooked_alm.methods.dictionary.autoencoder import Architecture, SparseAutoencoder
from hooked_alm.storage import expanded

from ..workbench.identity import file_hashes
from ..workbench.settings import ExperimentConfig


@dataclass(frozen=True, eq=False)
class PlacedDictionary:
    """A dictionary, the hook point of its rows, and what a run's identity says of it."""

    sae: SparseAutoencoder
    point: str
    described: dict[str, Any]

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
                "are. Name the hook point: -s point=..."
            )
        cfg, path = stored.sae.cfg, expanded(folder)
        files = [path] if path.is_file() else sorted(path.iterdir())
        return cls(stored.sae, point, {
            "point": point, "d_sae": cfg.d_sae, "k": cfg.k, "architecture": cfg.architecture,
            "files": file_hashes(files, path.parent),
        })  # fmt: skip

    def check(self, kept: KeptPoint, name: str) -> None:
        """Refuses a dictionary of other rows than the model has at its point.

        Raises:
            InputError: rows of another width.
        """
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
        "an ae.pt of dictionary_learning; bundled:NAME",
    )
    architecture: Architecture | None = Field(
        default=None, description="of an ae.pt that does not say; AudioSAE's are batchtopk"
    )
    point: str | None = Field(
        default=None, description="hook point of its rows; None is what its files say"
    )

    def read_dictionary(self) -> PlacedDictionary:
        """The dictionary; see ``PlacedDictionary.read``."""
        return PlacedDictionary.read(
            self.dictionary, architecture=self.architecture, point=self.point
        )
