"""What code, tests and docs cite by an id (``C6``, ``M-002-14``) stands in ``docs/methods.md``.

And the files that the pages name are there.
"""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/methods.md"
FOLDERS = ("hooked_alm", "converters", "experiments", "docs", "scripts", "tests")
SUFFIXES = {".py", ".md", ".html", ".yaml", ".jsonl"}
KIND = r"M-(?:\d{3}|[A-Z]{2,3})-|S-|[CIH]"
# An id inside a longer word is none: an H200, S-1b, AC6.
CITED = re.compile(rf"(?<![\w-])({KIND})(\d{{1,2}})(?: to \1(\d{{1,2}}))?(?!\w|-\w)")
# Cards that have a name in place of a document's number.
NAMED = re.compile(r"(?<![\w-])M-[A-Z]{2,}(?![\w-])")
# "M-001-2, 3" and "M-001-1 to 3": bare numbers are cards of the same document.
SAME_SEED = re.compile(r"(M-\d{3}-)(\d{1,2})(, | to )(\d{1,2})(?![\w%-]|\.\d)")
SEED = re.compile(r"\bseed (?:document )?(\d{3})\b")
# A placeholder in capitals, such as docs/gallery/NAME.py, names no file.
NAMED_FILE = re.compile(rf"\b(?:{'|'.join(FOLDERS)})/[a-z0-9_/.-]+\.[a-z]+\b")
IN_A_NAME = re.compile(r"(?<=_)(?:m_\d{3}_\d{1,2}|[cis]\d{1,2})(?=_|$)")
ENTRY = re.compile(
    rf"^(?:#+|\*\*|\* \*\*) ?((?:{KIND})\d{{1,2}}|M-[A-Z]{{2,}}|seed \d{{3}})\b", re.MULTILINE
)


def citations(line: str) -> Iterator[str]:
    """Ids that a line cites, lists and ranges written out; those in a test's name too."""
    while (longer := SAME_SEED.sub(r"\1\2\3\1\4", line)) != line:
        line = longer
    for kind, first, last in CITED.findall(line):
        yield from (f"{kind}{n}" for n in range(int(first), int(last or first) + 1))
    yield from NAMED.findall(line)
    yield from (f"seed {number}" for number in SEED.findall(line))
    for name in re.findall(r"def (test_\w+)", line):
        for found in IN_A_NAME.findall(name):
            yield re.sub("^S", "S-", found.upper().replace("_", "-"))


def cited() -> dict[str, list[str]]:
    """Id -> file:line of its citations, in all text but the page and this test."""
    below = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))
    found: dict[str, list[str]] = {}
    for path in [*ROOT.glob("*.md"), *(path for path in below if path.suffix in SUFFIXES)]:
        if path in (ROOT / PAGE, Path(__file__).resolve()):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            for one in citations(line):
                found.setdefault(one, []).append(f"{path.relative_to(ROOT)}:{number}")
    return found


def test_every_citation_has_one_entry_and_every_entry_a_citation() -> None:
    """What nothing cites, the page need not define."""
    entries, found = ENTRY.findall((ROOT / PAGE).read_text("utf-8")), cited()
    lost = [f"{one} at {', '.join(found[one])}" for one in sorted({*found} - {*entries})]
    assert not lost, f"cited, and without an entry in {PAGE}:\n" + "\n".join(lost)
    assert len(entries) == len({*entries}), f"an id with two entries in {PAGE}"
    assert not {*entries} - {*found}, f"entries of {PAGE} that nothing cites"


def test_every_file_that_a_page_names_is_there() -> None:
    """Also a renamed test's, which the methods page cites as evidence."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {(page.name, name) for page in pages for name in NAMED_FILE.findall(page.read_text())}
    assert len(named) > 40
    assert not {one for one in named if not (ROOT / one[1]).exists()}


def test_lists_ranges_and_names_are_citations_and_longer_words_are_none() -> None:
    """In the forms that docstrings have."""
    for line, ids in (
        ("cards M-001-2, 3, 6 and corrections C7, C31.", "M-001-2 M-001-3 M-001-6 C7 C31"),
        ("M-001-1 to 3: scores; (I2, I4 to I5)", "M-001-1 M-001-2 M-001-3 I2 I4 I5"),
        ("S-9 to S-11, 95 %; H1_x, H2", "S-9 S-10 S-11 H2"),
        ("def test_i5_i6_last(): def test_cards_s7_and_m_002_12()", "I5 I6 S-7 M-002-12"),
        ("the card M-GC; M-GCx, xM-GC, M-GC-1b", "M-GC"),
        ("M-AL-2 to M-AL-4, M-AL", "M-AL-2 M-AL-3 M-AL-4 M-AL"),
        ("in M-ESN-2, M-ESNX-2", "M-ESN-2"),
        ("an H200, AC6, C6x, S-1-b, G10, N815, M-001-3b", ""),
    ):
        assert [*citations(line)] == ids.split(), line
    assert [*citations("Source: seed document 004")] == ["seed 004"]
