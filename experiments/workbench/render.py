"""``report.json`` -> ``report.html``: one page that needs no network and no script."""

import base64
import html
import json
import math
from pathlib import Path
from string import Template
from typing import Any

from hooked_alm.errors import InputError

from .report import Clip, Clips, Figure, Headline, Note, Section, SectionItem, Table, read_report
from .run_folder import RunFolder, flatten, write_atomic

CALIBRATION = (
    "Calibration: this model was trained on a rule that is known, so the right answer is known "
    "beforehand. The page tests the method. It discovers nothing about published models."
)
MEDIA_TYPES = {".png": "image/png", ".wav": "audio/wav"}


def render(folder: RunFolder) -> Path:
    """Writes ``report.html`` from ``report.json``, ``run.json`` and the run's files."""
    report, run = read_report(folder), folder.provenance
    sections = enumerate(report.sections, start=1)
    page = Template(Path(__file__).with_name("report.html").read_text("utf-8")).substitute(
        title=text(report.title),
        question=text(report.question),
        lead=paragraphs(report.lead),
        banner=banner(report.is_calibration, run["inputs"].get("known_defects") or {}),
        headlines="".join(headline(item) for item in report.headlines),
        contents="".join(
            f'<a href="#s{index}">{text(section.title)}</a>'
            for index, section in enumerate(report.sections, start=1)
        ),
        sections="".join(section_html(folder, index, item) for index, item in sections),
        provenance=provenance(run),
    )
    path = folder.path / "report.html"
    write_atomic(path, page.encode())
    return path


def text(value: object) -> str:
    """Anything, as HTML text."""
    return html.escape(str(value))


def paragraphs(value: str) -> str:
    """Text in which a blank line begins a new paragraph."""
    return "".join(f"<p>{text(part)}</p>" for part in value.split("\n\n") if part.strip())


def number(value: Any) -> str:
    """A table cell: four significant digits, a dash for what is missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        return f"{value:.4g}".replace("-", "−") if math.isfinite(value) else str(value)
    return "–" if value is None else text(value)


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


def headline(item: Headline) -> str:
    """A finding with its verdict in words, so that colour is not needed to read it."""
    kind, verdict = ("yes", "established") if item.established else ("no", "not established")
    return (
        f'<li class="{kind}"><span class="verdict">{verdict}</span>'
        f"<strong>{text(item.text)}</strong>{paragraphs(item.detail)}</li>"
    )


def section_html(folder: RunFolder, index: int, section: Section) -> str:
    """A section with an anchor for the table of contents."""
    items = "".join(item_html(folder, item) for item in section.items)
    return (
        f'<section id="s{index}"><h2>{text(section.title)}</h2>'
        f"{paragraphs(section.text)}{items}</section>"
    )


def item_html(folder: RunFolder, item: SectionItem) -> str:
    """One figure, table, set of clips or note."""
    match item:
        case Figure():
            return figure(folder, item)
        case Table():
            return table(folder, item)
        case Clips():
            cards = "".join(clip(folder, one) for one in item.clips)
            return f'<p>{text(item.caption)}</p><div class="clips">{cards}</div>'
        case Note():
            return f'<div class="note {item.kind}">{paragraphs(item.text)}</div>'


def figure(folder: RunFolder, item: Figure) -> str:
    """A picture, its caption, how to read it, and its controls."""
    lines = [("How to read", item.how_to_read), ("Controls", item.controls)]
    notes = "".join(f"<p><b>{name}.</b> {text(line)}</p>" for name, line in lines if line)
    source = data_uri(folder, f"figures/{item.name}.png")
    return (
        f'<figure><img src="{source}" alt="{text(item.caption)}">'
        f"<figcaption><p><strong>{text(item.caption)}</strong></p>{notes}"
        f'<p class="file">Numbers: figures/{text(item.name)}.csv</p></figcaption></figure>'
    )


def table(folder: RunFolder, item: Table) -> str:
    """The first rows of a table, in a box of its own that scrolls sideways."""
    if item.rows is not None:
        rows, columns = item.rows, list(dict.fromkeys(key for row in item.rows for key in row))
    else:
        frame = folder.read_table(item.name or "")
        columns = [str(column) for column in frame.columns]
        rows = frame.to_dict(orient="records")
    first = rows[0] if rows else {}
    head = "".join(f"<th{align(first.get(column))}>{text(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(cell(row.get(column)) for column in columns) + "</tr>"
        for row in rows[: item.max_rows]
    )
    where = f"tables/{item.name}.parquet" if item.name else ""
    more = f"The first {item.max_rows} of {len(rows)} rows. " if len(rows) > item.max_rows else ""
    note = f'<p class="file">{more}{text(where)}</p>' if more or where else ""
    return (
        f'<div class="table"><p><strong>{text(item.caption)}</strong></p><div class="scroll">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</div>"
    )


def cell(value: Any) -> str:
    """A table cell."""
    return f"<td{align(value)}>{number(value)}</td>"


def align(value: Any) -> str:
    """Numbers, and the head of their column, stand right."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return ' class="num"' if is_number else ""


def clip(folder: RunFolder, item: Clip) -> str:
    """A player with the clip's own curve and numbers."""
    picture = ""
    if item.figure:
        source = data_uri(folder, f"figures/{item.figure}.png")
        picture = f'<img src="{source}" alt="{text(item.label)}: its curve">'
    facts = "".join(
        f"<dt>{text(key)}</dt><dd>{number(value)}</dd>" for key, value in item.numbers.items()
    )
    return (
        f'<div class="clip"><strong>{text(item.label)}</strong>'
        f'<audio controls preload="metadata" src="{data_uri(folder, item.path)}"></audio>'
        f"{picture}<dl>{facts}</dl></div>"
    )


def banner(is_calibration: bool, defects: dict[str, str]) -> str:
    """What has to be known before the first number is read."""
    calibration = f'<p class="banner">{text(CALIBRATION)}</p>' if is_calibration else ""
    if not defects:
        return calibration
    listed = "".join(f"<dt>{text(key)}</dt><dd>{text(why)}</dd>" for key, why in defects.items())
    return (
        f'{calibration}<div class="note warning"><p><b>Known defects of these settings</b></p>'
        f"<dl>{listed}</dl></div>"
    )


def provenance(run: dict[str, Any]) -> str:
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
    rows = "".join(
        f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>"
        for key, value in facts.items()
        if value not in (None, {})
    )
    details = "".join(
        f"<details><summary>{name}</summary><pre>"
        f"{text(json.dumps(value, indent=1, ensure_ascii=False))}</pre></details>"
        for name, value in (("All settings", config), ("All inputs", run["inputs"]))
    )
    return f'<div class="scroll"><table class="facts">{rows}</table></div>{details}'
