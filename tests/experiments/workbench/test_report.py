"""The report: whole, offline, escaped; figures with their numbers beside them."""

import base64
import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from hooked_alm.errors import InputError
from hooked_alm.experiments.workbench import figures
from hooked_alm.experiments.workbench.render import number, render
from hooked_alm.experiments.workbench.report import read_report, write_report
from hooked_alm.experiments.workbench.run_folder import RECORD, RunFolder
from workbench_toy import run_toy

VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and keeps what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.references: list[str] = []
        self.links: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.ids: set[str] = set()
        self.feed(text)
        assert not self.open_tags

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a" and not (given["href"] or "").startswith("#"):
            self.links.append(given["href"] or "")
        else:
            self.references += [given[key] or "" for key in ("src", "href") if key in given]
        if given.get("class") == "scroll" or tag == "pre":
            assert given["tabindex"] == "0"  # what scrolls can be reached without a mouse
        if tag == "th":
            assert given["scope"] in {"col", "row"}
        self.pictures += [given] if tag == "img" else []
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
    assert {"figures/mean.csv", "figures/mean.svg", "tables/mean.parquet"} <= {*page.links}
    assert all((folder.path / link).is_file() for link in page.links)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(|<script|https?://", text)


def test_figures_follow_the_page_into_the_dark(folder: RunFolder) -> None:
    """Every colour of paper and ink is a variable, whose values are both schemes'."""
    page = Page((folder.path / "report.html").read_text("utf-8"))
    assert len(page.pictures) == 2
    for picture in page.pictures:
        kind, data = (picture["src"] or "").split(",")
        svg = base64.b64decode(data).decode()
        style = "".join(ElementTree.fromstring(svg).itertext())
        assert kind == "data:image/svg+xml;base64"
        light, dark = style.split("@media (prefers-color-scheme: dark)")
        drawn = svg.partition("</style>")[2]
        for colour, other in figures.DARK.items():
            assert f"--c{colour[1:]}: {colour};" in light
            assert f"--c{colour[1:]}: {other};" in dark
            assert colour not in drawn.lower()
        assert f"fill: var(--c{figures.PAPER[1:]})" in drawn
        assert f"fill: var(--c{figures.INK[1:]})" in drawn
    # On disk it is what any program can show.
    assert "var(" not in (folder.path / "figures/mean.svg").read_text("utf-8")


def test_a_picture_says_what_it_shows(folder: RunFolder) -> None:
    page = Page((folder.path / "report.html").read_text("utf-8"))
    first, *_, last = folder.read_table("mean")["mean"]
    expected = (
        f"Δlogit 高兴: mean by depth: the curve goes from {first:.2g} at 0 to {last:.2g} at 2"
    )
    for picture in page.pictures:
        assert (picture["alt"] or "").startswith(expected)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("../other/report.html.", '<a href="../other/report.html">../other/report.html</a>.'),
        ("../none/report.html", "../none/report.html"),
        ("(https://a.org/?b&c)", '(<a href="https://a.org/?b&amp;c">https://a.org/?b&amp;c</a>)'),
        ('javascript:f() <a href="x">', "javascript:f() &lt;a href=&#34;x&#34;&gt;"),
        ('https://a.org/"b="', '<a href="https://a.org/">https://a.org/</a>&#34;b=&#34;'),
    ],
)
def test_links_are_links(folder: RunFolder, tmp_path: Path, text: str, shown: str) -> None:
    other = RunFolder(tmp_path / "other")
    other.write("report.html", b"")
    run = RunFolder(tmp_path / "run")
    run.write_json("run.json", folder.provenance)
    write_report(run, replace(read_report(folder), sections=[], lead=text))
    assert f"<p>{shown}</p>" in render(run).read_text("utf-8")


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
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match="got no such folder, expected the folder of a run"):
        render(folder)
    folder.path.mkdir()
    with pytest.raises(InputError, match=r"got a folder without run\.json"):
        render(folder)
    folder.write_json("run.json", {key: kind() for key, kind in RECORD.items()})
    with pytest.raises(InputError, match=r"got no report\.json, expected a finished run"):
        render(folder)


def test_a_damaged_report_is_named(folder: RunFolder, tmp_path: Path) -> None:
    report = json.loads((folder.path / "report.json").read_text("utf-8"))
    report["sections"][0]["items"][0]["type"] = "film"
    del report["sha256"]
    run = RunFolder(tmp_path)
    run.write_json("report.json", report)
    run.write_json("run.json", folder.provenance)
    with pytest.raises(InputError, match="damaged report"):
        render(RunFolder(tmp_path))


def test_a_missing_figure_is_named(folder: RunFolder) -> None:
    path = folder.path / "figures/mean.svg"
    data = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(InputError, match=r"got no file figures/mean\.svg"):
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
        svg = (tmp_path / f"figures/{name}.svg").read_bytes()
        assert svg.startswith(b"<?xml")
        figures.save_figure(folder, name, figure, data)
        assert (tmp_path / f"figures/{name}.svg").read_bytes() == svg
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


def test_what_figures_show_in_words() -> None:
    data = curve()
    of_curves = "value by depth: a goes from 0 at 0 to 4 at 4; 悲 goes from 0 at 0 to -4 at 4."
    told = {
        of_curves: figures.curves(data, "depth", "value", group="group"),
        "value: 0, a 0; 0, 悲 0; 1, a 1; 1, 悲 -1; 2, a 2; 2, 悲 -2.": figures.bars(
            data[data.depth < 3].sort_values("depth", kind="stable"), "depth", "value",
            group="group",
        ),
        "value: -4 at depth 4, group 悲 to 4 at depth 4, group a.": figures.heat_map(
            data, "depth", "group", "value"
        ),
    }  # fmt: skip
    for words, figure in told.items():
        assert figures.in_words(figure) == words


def test_panels_of_one_quantity_share_its_scale() -> None:
    data = curve()
    small = data.assign(value=data.value / 10)
    maps = figures.panels(
        figures.heat_map, [(data, {}), (small, {}), (small, {"value": "lo"})], x="depth",
        y="group", value="value", centre=0,
    )  # fmt: skip
    limits = [axes.images[0].get_clim() for axes in maps.axes if axes.images]
    assert limits == [(-4, 4), (-4, 4), (-5, 5)]

    drawn = figures.panels(
        figures.curves, [(small, {}), (data, {}), (small, {"y_label": "another"})], x="depth",
        y="value", group="group",
    )  # fmt: skip
    first, second, other = (axes.get_ylim() for axes in drawn.axes)
    assert first == second
    assert first[1] >= 4 > 1 > other[1]
