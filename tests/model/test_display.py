"""What objects say of themselves in a terminal and in a notebook's cell."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from hooked_alm import ALMInput, HookedALM
from hooked_alm.display import Piece, Summary, amount, listed
from hooked_alm.inputs import AudioClip
from hooked_alm.spans import SpanMap
from tiny import hf_inputs
from tiny_text import TextModels

SCREEN = 24, 160
"""Lines and columns."""


class Page(HTMLParser):
    """Balanced tags, attributes of all, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]


def fits(shown: object) -> str:
    text = repr(shown)
    lines = text.splitlines()
    assert len(lines) <= SCREEN[0]
    assert max(map(len, lines)) <= SCREEN[1]
    return text


def test_a_model_in_a_few_lines(gqa: HookedALM) -> None:
    text = fits(gqa)
    cfg = gqa.cfg
    assert text == str(gqa)
    assert f"{cfg.n_layers} blocks × {cfg.n_heads} heads ({cfg.n_key_value_heads} kv)" in text
    assert f"d_model {cfg.d_model}" in text
    assert "float32, cpu" in text
    assert "Qwen2AudioFrontEnd, 25 positions per second" in text
    assert "adapter" not in text
    assert "heads:" not in text
    assert "(0): Block" in str(gqa.blocks)  # the modules are where they were
    assert "Qwen2AudioFrontEnd" in Page(gqa._repr_html_()).text


def test_a_text_model_hears_nothing(tmp_path: Path) -> None:
    assert "  audio: none\n" in fits(TextModels(tmp_path).hooked("llama"))


def test_an_input_draws_its_spans(gqa: HookedALM) -> None:
    x = gqa.encode(**hf_inputs([[63], []], [9, 6]))
    text = fits(x)
    assert text.startswith(f"ALMInput: 2 × {x.shape[1]} positions")
    page = Page(x._repr_html_())
    bars = [a["aria-label"] for a in page.all("div") if a.get("role") == "img"]
    for row, bar in enumerate(bars):
        (start, stop), *_ = x.spans["text"][row]
        assert f"text {start}:{stop}" in str(bar)
        # Every position is in one piece of the bar.
        sizes = re.findall(r"flex:(\d+) 1 0", x._repr_html_())
    assert sum(map(int, sizes)) == len(x) * x.shape[1]
    assert "pad 0:" in str(bars[1])
    assert "pad" not in str(bars[0])


def test_an_input_names_its_clips_and_counts_what_it_leaves_out() -> None:
    ranges = {"text": [[(1, 6)]] * 9, "sink": [[(0, 1)]] * 9, "readout": [[(6, 7)]] * 9}
    clip = AudioClip(torch.zeros(1, 2, 3), (3,), 5, name="<b>&.wav", seconds=1.25)
    x = ALMInput(
        tokens=torch.zeros(9, 7, dtype=torch.long),
        attention_mask=torch.ones(9, 7, dtype=torch.long),
        position_ids=torch.zeros(9, 7, dtype=torch.long),
        spans=SpanMap(ranges={**ranges, "label": [[(2, 3)]] * 9}, n_pos=7),
        clips=(clip,) * 9,
        clip_rows=tuple(range(9)),
    )
    text = fits(x)
    assert "<b>&.wav (1.25 s), " in text
    assert "… (9)" in text
    assert "and: 5 more rows" in text
    assert "label" not in text  # it lies in the text
    page = Page(x._repr_html_())
    assert "<b>&.wav (1.25 s)" in page.text
    assert not page.all("b")
    assert len([a for a in page.all("div") if a.get("role")]) == 4


def test_a_cache_counts_its_blocks_and_its_bytes(gqa: HookedALM) -> None:
    x = gqa.encode(**hf_inputs([[63]], [9]))
    _, cache = gqa.run_with_cache(
        x, names_filter=lambda name: re.fullmatch(r"blocks.*hook_z", name)
    )
    z = cache["z", 0]
    text = fits(cache)
    assert text.startswith(f"ActivationCache: {gqa.cfg.n_layers} names, ")
    assert text.splitlines()[0].endswith(amount(gqa.cfg.n_layers * z.nbytes))
    assert re.search(rf"blocks\.\*\.attn\.hook_z +{re.escape(str([*z.shape]))} +float32", text)
    _, whole = gqa.run_with_cache(x)
    fits(whole)
    # A second name holds nothing of its own.
    _, split = gqa.run_with_cache(x, names_filter="blocks.0.hook_q_input")
    assert len(split.cache_dict) == 2
    assert amount(split["blocks.0.hook_q_input"].nbytes) in repr(split).splitlines()[0]
    headers = Page(whole._repr_html_()).all("th")
    assert headers
    assert {header["scope"] for header in headers} == {"col"}


def test_panels_take_the_notebooks_colours() -> None:
    """Nothing but the pieces of a bar sets a colour, and those set both."""
    bars = [("row 0", [Piece("text", 3, "0:3"), Piece("mine", 1, "3")])]
    html = Summary(title="a", facts=[("b", "c")], columns=("d",), rows=[("e",)], bars=bars).html()
    for style in re.findall(r'style="([^"]*)"', html):
        assert ("color:#000" in style) == bool(re.search(r"background:#", style))
    assert "<script" not in html
    assert "http" not in html


def test_long_tables_end_in_a_count() -> None:
    shown = Summary(title="a", columns=("n",), rows=[(str(i),) for i in range(50)])
    assert str(shown).splitlines()[-2:] == ["  11", "  … 38 more"]
    assert Page(shown.html()).text.split()[-3:] == ["…", "20", "more"]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (3_140_000, "3.14 MB")],
)
def test_amounts(n_bytes: int, text: str) -> None:
    assert amount(n_bytes) == text


def test_lists_are_cut() -> None:
    assert listed([1, 2]) == "1, 2"
    assert listed(range(9)) == "0, 1, 2, 3, 4, 5, … (9)"
