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
WORD = re.compile(r"(https?://[^\s<>\"]+|[\w.+=@,/-]+)")
"""What may be an address, or the path of a file, with what punctuation follows."""


def render(folder: RunFolder) -> Path:
    """Writes ``report.html`` from ``report.json``, ``run.json`` and the run's files."""
    run, report = folder.provenance, read_report(folder)
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
        picture=lambda name: picture(folder, name),
        sound=lambda name: data_uri(_read(folder, name), "audio/wav"),
        with_links=lambda text: with_links(text, folder.path),
        cells=lambda item: cells(folder, item),
    )
    folder.write("report.html", page)
    return folder.path / "report.html"


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
    else:
        frame = folder.read_table(item.name or "")
        columns, rows = [str(column) for column in frame], frame.to_dict(orient="records")
    shown = [[row.get(column) for column in columns] for row in rows[: item.max_rows]]
    return {"columns": columns, "rows": shown, "n_rows": len(rows)}


def provenance(run: dict[str, Any]) -> dict[str, Any]:
    """What made the numbers: model, versions, settings."""
    config = run["config"]
    model = run["inputs"].get("model")
    # Not the many hashes of files, which are among the inputs.
    known = {k: v for k, v in model.items() if k != "files"} if isinstance(model, dict) else {}
    facts = {
        "Command": run.get("command"),
        **flatten(known, "model"),
        "dtype, device": f"{config.get('dtype')}, {config.get('device_map') or config['device']}",
        "attention": config.get("attn_implementation"),
        "seed, threads": f"{config.get('seed')}, {config.get('n_threads')}",
        **run["environment"],
        "fingerprint": run.get("config_hash"),
        "began": run.get("created"),
    }
    return {key: value for key, value in facts.items() if value not in (None, {})}


def as_json(value: Any) -> str:
    """JSON to read."""
    return json.dumps(value, indent=1, ensure_ascii=False)
