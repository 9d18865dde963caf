"""The report: whole, offline, escaped; figures with their numbers beside them."""

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hooked_alm.errors import InputError
from hooked_alm.experiments.workbench import figures
from hooked_alm.experiments.workbench.render import number, render
from hooked_alm.experiments.workbench.report import read_report, write_report
from hooked_alm.experiments.workbench.run_folder import RunFolder
from workbench_toy import run_toy

VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)
        assert not self.open_tags

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.references += [given[key] or "" for key in ("src", "href") if key in given]
        self.ids.add(given.get("id") or "")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_toy(tmp_path_factory.mktemp("report") / "run", n_units=2, variant="seed")


def test_the_page_refers_to_itself_only(folder: RunFolder) -> None:
    text = (folder.path / "report.html").read_text("utf-8")
    page = Page(text)
    for reference in page.references:
        is_anchor = reference.startswith("#") and reference[1:] in page.ids
        assert reference.startswith("data:") or is_anchor, reference
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(|<script|https?://", text)


def test_the_page_says_everything(folder: RunFolder) -> None:
    text = (folder.path / "report.html").read_text("utf-8")
    for expected in (
        *("Calibration: ", "not established", "How to read", "Controls", "Self-patch: 0."),
        *("Known defects", "the consistent curve is zero", "<audio controls", "figures/mean.csv"),
        *("hooked-alm run toy -s variant=seed -s n_units=2", "0123456789abcdef", "2.13", "float32"),
        *("The first 2 of 3 rows.", "<p>First.</p><p>Second.</p>", "高兴"),
    ):
        assert expected in text, expected
    assert text.count("<img") == 2


def test_known_defects_come_before_every_result(folder: RunFolder) -> None:
    text = (folder.path / "report.html").read_text("utf-8")
    assert 0 < text.index("the consistent curve is zero") < text.index('<ul class="headlines">')


def test_text_is_escaped(folder: RunFolder) -> None:
    text = (folder.path / "report.html").read_text("utf-8")
    assert "Toy &lt;script&gt;" in text
    assert "&lt;b&gt;the voice&lt;/b&gt; win over the words &amp; signs" in text
    assert "Up is &lt;text&gt;." in text
    assert "&lt;i&gt;" in text


def test_a_report_is_read_back_and_rendered_again(folder: RunFolder) -> None:
    before = (folder.path / "report.html").read_bytes()
    (folder.path / "report.html").unlink()
    write_report(folder, read_report(folder))
    assert render(folder).read_bytes() == before


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got no report\.json"):
        render(RunFolder(tmp_path))


def test_a_damaged_report_is_named(folder: RunFolder, tmp_path: Path) -> None:
    report = json.loads((folder.path / "report.json").read_text("utf-8"))
    report["sections"][0]["items"][0]["type"] = "film"
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="damaged report"):
        render(RunFolder(tmp_path))


def test_a_missing_figure_is_named(folder: RunFolder) -> None:
    path = folder.path / "figures/mean.png"
    data = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(InputError, match=r"got no file figures/mean\.png"):
            render(folder)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((1234567, "1234567"), (0.123456, "0.1235"), (-2.0, "−2"), (float("nan"), "–")),
        *((None, "–"), (True, "yes"), (float("inf"), "inf"), ("<", "<"), (1e-9, "1e−09")),
    ],
)
def test_numbers_are_short(value: object, text: str) -> None:
    assert number(value) == text


def curve() -> pd.DataFrame:
    rows = [
        (g, k, k * s, k * s - 1.0, k * s + 1.0)
        for g, s in (("a", 1.0), ("悲", -1.0))
        for k in range(5)
    ]
    return pd.DataFrame(rows, columns=["group", "depth", "value", "lo", "hi"])


def test_every_plot_draws_and_keeps_its_numbers(tmp_path: Path) -> None:
    folder, data = RunFolder(tmp_path), curve()
    data.loc[3, "value"] = np.nan
    panels = figures.new_axes(2)
    plots = {
        "curves": figures.curves(
            data, "depth", "value", lo="lo", hi="hi", group="group", axes=panels[0]
        ),
        "bars": figures.bars(data, "depth", "value", lo="lo", hi="hi", group="group"),
        "map": figures.heat_map(data, "depth", "group", "value", centre=0, title="map"),
        "empty map": figures.heat_map(data.iloc[3:4], "depth", "group", "value"),
    }
    for name, figure in plots.items():
        figures.save_figure(folder, name, figure, data)
        assert (tmp_path / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        again = pd.read_csv(tmp_path / f"figures/{name}.csv")
        pd.testing.assert_frame_equal(again, data, check_dtype=False, check_exact=True)
    lines = [line for line in panels[0].lines if len(line.get_xdata()) == 5]
    assert len(lines) == 2
    np.testing.assert_array_equal(lines[1].get_ydata(), [0, -1, -2, -3, -4])


def test_a_heat_map_puts_values_where_they_belong() -> None:
    figure = figures.heat_map(curve(), "depth", "group", "value", centre=0)
    image = figure.axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), [[0, 1, 2, 3, 4], [0, -1, -2, -3, -4]])
    assert image.get_clim() == (-4, 4)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "悲"]
