"""Links of the docs resolve, with their anchors, and the files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAB = ROOT / "docs" / "lab"
MEASUREMENTS = ROOT / "docs" / "measurements.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "svg2_compile").rglob("*.md")),
]
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
NAMED = re.compile(
    r"(?<![\w/.-])(?:benchmarks|docs|examples|kernels|passes|svg2_compile|tests)/[\w/.-]*\.(?:json|md|png|py|sh)\b"
)


def prose(page: Path) -> str:
    """Return a page without its blocks of code, which have neither headings nor links."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(text: str) -> list[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, flags=re.M):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each) is not None for each in found)
        found.append(f"{slug}-{count}" if count else slug)
    return found


def links(page: Path) -> list[str]:
    """Return where the links of a page to other files of ours, and to its own headings, go."""
    return [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_anchors_are_those_of_github():
    text = "# `svg2 explain`: before the GPU\n## 7. A b, and c (2026-11-25)\n### x_y\n## x_y\n## See [a](b.md)!\n"
    assert anchors(text) == [
        "svg2-explain-before-the-gpu",
        "7-a-b-and-c-2026-11-25",
        "x_y",
        "x_y-1",
        "see-a",
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve_with_their_anchors(page):
    dead = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(prose(target))):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_measurements_have_anchors_and_links_to_the_lab_name_one_entry(page):
    vague = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve()
        if (target == MEASUREMENTS and not anchor) or target == LAB:
            vague.append(link)
    assert not vague


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    named = set(NAMED.findall(page.read_text(encoding="utf-8")))
    assert not sorted(path for path in named if not (ROOT / path).exists())


def test_every_entry_of_the_lab_book_is_in_its_index_and_keeps_its_number():
    index = (LAB / "README.md").read_text(encoding="utf-8")
    entries = sorted(path for path in LAB.glob("*.md") if path.name != "README.md")
    for number, path in enumerate(entries, 1):
        day, title = path.name[:10], path.read_text(encoding="utf-8").splitlines()[0]
        assert path.name.startswith(f"{day}-{number:02d}-")
        assert re.fullmatch(rf"# {number}\. .* \({day}\)", title), title
        assert re.search(rf"^\| {number} \| {day} \| \[.*\]\({re.escape(path.name)}\) \|", index, flags=re.M), title


def test_the_sections_that_the_code_cites_are_in_the_lab_book():
    numbers = {int(path.name[11:13]) for path in LAB.glob("2*.md")}
    rooms = ("benchmarks", "kernels", "passes", "svg2_compile", "tests")
    sources = [path.read_text(encoding="utf-8") for room in rooms for path in (ROOT / room).rglob("*.py")]
    cited = {int(number) for text in sources for number in re.findall(r"docs/lab, (\d+)", text)}
    assert cited and cited <= numbers
    assert not any(re.search(r"docs/measurements\.md,? \d", text) for text in sources)
