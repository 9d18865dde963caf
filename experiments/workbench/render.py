"""``report.json`` -> ``report.html``: one page that needs no network and no script."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import jinja2

from hooked_alm.errors import InputError
from hooked_alm.storage import write_atomic

from .report import Table, read_report
from .run_folder import RunFolder, flatten

MEDIA_TYPES = {".png": "image/png", ".wav": "audio/wav"}


def render(folder: RunFolder) -> Path:
    """Writes ``report.html`` from ``report.json``, ``run.json`` and the run's files."""
    report, run = read_report(folder), folder.provenance
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
        data_uri=lambda name: data_uri(folder, name),
        cells=lambda item: cells(folder, item),
    )
    path = folder.path / "report.html"
    write_atomic(path, page.encode())
    return path


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


def data_uri(folder: RunFolder, name: str) -> str:
    """A file of the run, as a URI that holds its bytes."""
    path = folder.path / name
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except FileNotFoundError:
        raise InputError(
            f"rendering the report of {folder.path}: got no file {name}, expected what report.json "
            f"names. Run the experiment again; its finished units are kept."
        ) from None
    return f"data:{MEDIA_TYPES[path.suffix]};base64,{data}"


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
    facts = {
        "Command": run["command"],
        **flatten(run["inputs"].get("model", {}), "model"),
        "dtype, device": f"{config['dtype']}, {config['device']}",
        "attention": config["attn_implementation"],
        "seed, threads": f"{config['seed']}, {run['n_threads']}",
        **run["environment"],
        "fingerprint": run["config_hash"],
        "began": run["created"],
    }
    return {key: value for key, value in facts.items() if value not in (None, {})}


def as_json(value: Any) -> str:
    """JSON to read."""
    return json.dumps(value, indent=1, ensure_ascii=False)
