"""The examples of docs/arena.md print what they say, and its tables are complete."""

import doctest
import re
from pathlib import Path

from apportion.arena import MEASURES

PAGE = (Path(__file__).parents[2] / "docs" / "arena.md").read_text()


def test_examples():
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(blocks, {"__name__": "page"}, "arena.md", "docs/arena.md", 0)
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert len(test.examples) > 10
    assert not failures, "".join(failures)


def test_every_measure_is_explained():
    table = PAGE.partition("## What is measured")[2].partition("## Learning")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(rows)) == ["bias", "noise", "raw_bias", "raw_noise", *list(MEASURES)[4:]]


def test_every_world_is_named():
    from apportion.arena._grid import worlds

    table = PAGE.partition("## The worlds")[2].partition("## What")[0]
    assert set(worlds()) <= set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
