"""``report.json`` -> ``report.html``: one page that needs no network and no script."""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2

from hooked_alm.errors import InputError

from .figures import DARK
from .files import is_file
from .identity import flatten
from .report import Table, read_report
from .run_folder import RunFolder

DESCRIPTION = ".//{http://purl.org/dc/elements/1.1/}description"
MAX_PAGE_BYTES = 20_000_000
"""A page that can still be sent, and opens on a phone."""
TEXT_BYTES = 5_000_000
"""What of it is kept for text, tables and settings; all of these are bounded themselves."""
MAX_SVG_BYTES = 1_000_000
"""A figure of more lines or cells than this is shown as PNG."""
MAX_LISTED = 200
"""Entries of a list or mapping of settings or inputs that a page shows."""
MAX_JSON = 500_000
"""Letters of all settings, or of all inputs, that a page shows."""
MAX_CELL = 1000
"""Letters of a table's cell that a page shows."""
WORD = re.compile(r"(https?://[^\s<>\"]+|[\w.+=@,/-]+)")
"""What may be an address, or the path of a file, with what punctuation follows."""


def render(folder: RunFolder) -> Path:
    """Writes ``report.html`` from ``report.json``, ``run.json`` and the run's files."""
    run, report, room = folder.provenance, read_report(folder), Room(MAX_PAGE_BYTES - TEXT_BYTES)
    # Everything is escaped but what the template itself says.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "paragraphs": paragraphs, "is_number": is_number}
    page = environment.get_template("report.html").render(
        report=report,
        facts=provenance(run),
        details={"All settings": as_json(run["config"]), "All inputs": as_json(run["inputs"])},
        picture=lambda name: room.left_for(picture(folder, name)),
        sound=lambda name: room.left_for({"src": data_uri(_read(folder, name), "audio/wav")}),
        with_links=lambda text: with_links(text, folder.path),
        cells=lambda item: cells(folder, item),
    )
    folder.write("report.html", page)
    return folder.path / "report.html"


class Room:
    """What a page can still carry of pictures and sound."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def left_for(self, found: dict[str, str]) -> dict[str, str]:
        """What there is room for as it is; else without its data, for a line that says so."""
        if len(found["src"]) > self.n_bytes:
            return {**found, "src": ""}
        self.n_bytes -= len(found["src"])
        return found


def paragraphs(value: str) -> list[str]:
    """Parts of a text in which a blank line begins a new paragraph."""
    return [part for part in value.split("\n\n") if part.strip()]


def is_number(value: Any) -> bool:
    """Whether a table cell stands right."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> str:
    """A table cell's text: four significant digits, a dash for what is missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        return f"{value:.4g}".replace("-", "−") if math.isfinite(value) else str(value)
    return "–" if value is None else str(value)


def with_links(text: str, beside: Path) -> list[tuple[str, bool]]:
    """The parts of a text, and whether each is an address, or a file of the run or beside it."""
    parts = []
    for i, word in enumerate(WORD.split(text)):
        ends = (n for n in range(len(word), 0, -1) if word[n - 1].isalnum() or word[n - 1] in "_/")
        end = next(ends, 0) if i % 2 else 0
        link = word[:end]
        parts += [(link, "://" in link or _is_beside(link, beside)), (word[end:], False)]
    return parts


def _is_beside(name: str, folder: Path) -> bool:
    """Whether a path is that of a file in the folder, or in the one above."""
    parts = name.removeprefix("../").split("/")
    is_inside = "." in parts[-1] and {*parts}.isdisjoint(("", ".", ".."))
    return is_inside and is_file(folder / name)


def picture(folder: RunFolder, name: str) -> dict[str, str]:
    """A figure's ``src``, in the colours of the reader's page, and its ``alt`` in words."""
    path = f"figures/{name}.svg"
    try:
        svg = _read(folder, path).decode()
        alt = ElementTree.fromstring(svg).findtext(DESCRIPTION) or ""
    except (UnicodeDecodeError, ElementTree.ParseError) as error:
        raise InputError(
            f"rendering the report of {folder.path}: got a damaged {path} ({error}), expected SVG. "
            "Run the experiment again; its finished units are kept."
        ) from None
    if len(svg) > MAX_SVG_BYTES:
        png = _read(folder, f"figures/{name}.png")
        return {"src": data_uri(png, "image/png"), "alt": alt}
    light = "".join(f"--c{one[1:]}: {one}; " for one in DARK)
    dark = "".join(f"--c{one[1:]}: {other}; " for one, other in DARK.items())
    for colour in DARK:
        svg = svg.replace(colour, f"var(--c{colour[1:]})")
    media = "@media (prefers-color-scheme: dark)"
    style = f"<style>:root {{ {light}}} {media} {{ :root {{ {dark}}} }}</style>"
    svg = svg.replace("<defs>", f"<defs>{style}", 1)
    return {"src": data_uri(svg.encode(), "image/svg+xml"), "alt": alt}


def data_uri(data: bytes, kind: str) -> str:
    """A URI that holds the bytes."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read(folder: RunFolder, name: str) -> bytes:
    if not folder.has(name):
        raise InputError(
            f"rendering the report of {folder.path}: got no file {name}, expected what report.json "
            f"names. Run the experiment again; its finished units are kept."
        )
    return folder.read(name)


def cells(folder: RunFolder, item: Table) -> dict[str, Any]:
    """Columns and first rows of a table, and how many rows there are."""
    if item.rows is not None:
        rows, columns = item.rows, list(dict.fromkeys(key for row in item.rows for key in row))
        n_rows = len(rows) if item.n_rows is None else item.n_rows
    else:
        frame = folder.read_table(item.name or "")
        columns, n_rows = [str(column) for column in frame], len(frame)
        rows = frame.head(item.max_rows).to_dict(orient="records")
    shown = [[_cut(row.get(column)) for column in columns] for row in rows[: item.max_rows]]
    return {"columns": columns, "rows": shown, "n_rows": n_rows}


def _cut(value: Any) -> Any:
    """A cell; of a long text, how it begins."""
    is_long = isinstance(value, str) and len(value) > MAX_CELL
    return f"{value[:MAX_CELL]} … ({len(value) - MAX_CELL} more letters)" if is_long else value


def provenance(run: dict[str, Any]) -> dict[str, Any]:
    """What made the numbers: model, versions, settings."""
    config = run["config"]
    model = run["inputs"].get("model")
    # Not the many hashes of files, which are among the inputs.
    known = {k: v for k, v in model.items() if k != "files"} if isinstance(model, dict) else {}
    device = config.get("device_map") or config.get("device")
    facts = {
        "Command": run.get("command"),
        **flatten(known, "model"),
        "dtype, device": f"{config.get('dtype')}, {device}",
        "attention": config.get("attn_implementation"),
        "seed, threads": f"{config.get('seed')}, {config.get('n_threads')}",
        **run["environment"],
        "fingerprint": run.get("config_hash"),
        "began": run.get("created"),
    }
    return {key: value for key, value in facts.items() if value not in (None, {})}


def as_json(value: Any) -> str:
    """JSON to read; of long lists and mappings, how they begin."""
    text = json.dumps(_first_of(value), indent=1, ensure_ascii=False)
    return text if len(text) <= MAX_JSON else f"{text[:MAX_JSON]}\n… and more, in run.json"


def _first_of(value: Any) -> Any:
    if not isinstance(value, dict | list):
        return _cut(value)
    n_more = len(value) - MAX_LISTED
    more = f"… {n_more} more, in run.json"
    if isinstance(value, list):
        found = [_first_of(one) for one in value[:MAX_LISTED]]
        return [*found, more] if n_more > 0 else found
    some = {key: _first_of(value[key]) for key in list(value)[:MAX_LISTED]}
    return {**some, "…": more} if n_more > 0 else some
