"""The table of models: what is supported, and how far each is proved."""

from collections.abc import Iterator
from typing import NamedTuple

from hooked_alm.bundled import bundled_models

from .registry import FAMILIES, REFUSED, load_family


class FamilyRow(NamedTuple):
    """A family, as a row of the table."""

    family: str
    audio: str
    """Positions per second, and the longest clip."""
    readout: str
    """Place in the prompt where the first token of the answer is predicted."""
    evidence: str
    encoder: str = ""
    """Where the audio encoder has hook points."""
    notes: str = ""
    """Facts that a user has to know besides."""


def rows() -> Iterator[FamilyRow]:
    """Supported families, then those that are refused."""
    for module in dict.fromkeys(FAMILIES.values()):
        family = load_family(module)
        card = family.card
        yield FamilyRow(
            family.name, card.audio, card.readout, card.evidence, card.encoder, card.notes
        )
    for name, reason in dict.fromkeys(REFUSED.values()):
        yield FamilyRow(name, "", "", f"refused, because {reason}")


def as_text() -> str:
    """The table as text for a terminal, a paragraph per family; last what the package carries."""
    families = (
        "\n".join([
            row.family,
            *(f"  {name:<9}{value}" for name, value in row._asdict().items()
              if value and name != "family"),
        ])
        for row in rows()
    )  # fmt: skip
    carried = "\n  ".join(["carried by the package", *bundled_models()])
    return "\n\n".join([*families, carried])


def as_markdown() -> str:
    """The table as the README has it, without the notes; a test compares the two."""
    lines = [
        "| family | audio | the answer's first token is predicted at | evidence |",
        "|---|---|---|---|",
        *("| " + " | ".join(cell.replace("|", r"\|") for cell in row[:4]) + " |" for row in rows()),
    ]
    return "\n".join(lines)
