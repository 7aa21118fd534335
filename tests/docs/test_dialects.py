"""docs/dialects.md is what docs/dialects.py writes, and has every dialect."""

import runpy
import sys
from pathlib import Path

import pytest

from apportion import credit

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "dialects.md").read_text()


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DOCS / "dialects.py"))


def test_the_page_is_up_to_date(script):
    """If not: python docs/dialects.py"""
    assert script["page"]() == PAGE


def test_check_fails_on_another_page(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dialects.py", "--check"])
    monkeypatch.setitem(script["main"].__globals__, "page", lambda: PAGE)
    monkeypatch.setitem(script["main"].__globals__, "PAGE", tmp_path / "dialects.md")
    (tmp_path / "dialects.md").write_text(PAGE)
    assert script["main"]() == 0
    (tmp_path / "dialects.md").write_text(PAGE.replace("1.500", "1.732", 1))
    assert script["main"]() == 1
    assert "+| `group_relative.trl()`" in capsys.readouterr().out


def test_the_versions_are_those_that_are_installed(script):
    pins = (DOCS.parent / "constraints.txt").read_text() + (DOCS.parent / "constraints-verl.txt").read_text()
    for package, release in script["RUN"].items():
        assert f"\n{package}=={release.split()[-1]}\n" in pins


METHODS = ("group_relative", "rloo", "gdpo", "max_rl", "reinforce_plus_plus", "gae", "optimal_token_baseline")


@pytest.mark.parametrize("method", METHODS)
def test_every_dialect_is_on_the_page(method):
    names = [name for name, made in vars(getattr(credit, method)).items() if getattr(made, "role", None) == "alias"]
    assert names
    for name in names:
        assert f"`{method}.{name}(" in PAGE, name
