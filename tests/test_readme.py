"""The README's Python blocks run and print what it says; its tables, links and picture are true."""

import contextlib
import html
import io
import re
import runpy
from pathlib import Path

import pytest

from apportion import credit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> list[tuple[str, str | None]]:
    """Every Python block, with the text block that follows it directly as its output."""
    pattern = r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?"
    return re.findall(pattern, README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("code", "output"), blocks())
def test_a_block_prints_what_the_page_says(code, output):
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert told.getvalue() == output


def test_the_first_thing_shown_is_code_with_its_output():
    assert blocks()[0][1]
    assert README.index("```python") == README.index("```")


def test_the_table_names_methods_that_exist():
    table = README.partition("## Methods")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = re.findall(r"`(\w+)`", " ".join(rows))
    assert {"grpo", "capo", "tempo"} <= set(names)
    assert [name for name in names if name not in credit.__all__] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [p.relative_to(ROOT / "docs") for p in PAGES if "docs" in p.parts and p.name != "index.md"]
    assert "(methods)" in index, "the folder of the methods' pages, which need no line of their own"
    assert [str(p) for p in pages if p.parts[0] != "methods" and f"({p})" not in index] == []


def test_the_picture_is_what_the_command_prints_today(tmp_path):
    runpy.run_path(str(ROOT / "docs/images/heatmap.py"))["main"](tmp_path / "heatmap.svg")
    assert texts(tmp_path / "heatmap.svg") == texts(ROOT / "docs/images/heatmap.svg")


def texts(picture: Path) -> list[str]:
    """What can be read in a picture."""
    return [html.unescape(x) for x in re.findall(r"<text[^>]*>(.*?)</text>", picture.read_text())]
