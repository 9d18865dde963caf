"""Text from data that a terminal or a spreadsheet would act on, made into text that says itself."""

import re
from typing import Any

# Control characters but tab and line break, marks that turn the direction of text, line separators
# of Unicode, and half characters, which no stream can write.
_ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def for_terminal(text: str) -> str:
    """The text with escapes in place of what acts; lines after its first are indented.

    So nothing that a file holds moves the cursor, or looks like a message of its own.
    """
    shown = _ACTS.sub(lambda found: ascii(found[0])[1:-1], text)
    return re.sub(r"\n(?=[^ \n])", "\n  ", shown)


def for_sheet(cell: Any) -> Any:
    """The cell with a quote before what a spreadsheet would calculate; numbers stay as they are."""
    if not isinstance(cell, str) or not _FORMULA.match(cell) or _is_number(cell):
        return cell
    return f"'{cell}"


def from_sheet(cell: str) -> str:
    """What `for_sheet` was given."""
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
