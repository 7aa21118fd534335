"""The examples of the pages print what they say."""

import doctest
import re
from pathlib import Path

import pytest

from apportion import credit

PAGES = sorted((Path(__file__).parents[2] / "docs" / "methods").glob("*.md"))
HEADINGS = ("## The equation", "## What it reads", "## Laws", "## Degenerate cases", "## Differences", "## Example")


def examples(page: Path) -> list[str]:
    return [b for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if ">>>" in b]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_examples(page):
    globs: dict = {}
    assert examples(page), "a page shows an example with its output"
    for block in examples(page):
        test = doctest.DocTestParser().get_doctest(block, globs, page.name, str(page), 0)
        failures: list[str] = []
        doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(
            test, out=failures.append, clear_globs=False
        )
        assert not failures, "".join(failures)
        globs = test.globs


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_sections(page):
    text = page.read_text()
    for heading in (*HEADINGS, "## Evidence", "## When not to use it"):
        assert heading in text, heading


def test_every_named_method_has_a_page():
    written = "\n".join(page.read_text() for page in PAGES)
    for name in credit.__all__:
        if getattr(getattr(credit, name), "role", None) in ("estimator", "alias"):
            assert f"`{name}`" in written, name
