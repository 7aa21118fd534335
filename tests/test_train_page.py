"""docs/train.md: its options are the dataclasses', its example is a Config, its messages are raised."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "train.md").read_text()


def test_the_table_of_options_is_up_to_date():
    """If not: python docs/options.py"""
    assert runpy.run_path(str(ROOT / "docs" / "options.py"))["renewed"](PAGE) == PAGE


def test_every_option_of_the_command_is_in_the_table(capsys):
    from apportion.cli.main import main

    assert main(["train", "--help"]) == 0
    flags = set(re.findall(r"^\W*?(--[a-z][\w-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    assert flags == set(re.findall(r"^\| `(--[\w-]+)` \|", PAGE, re.MULTILINE))


def test_every_flag_that_the_text_mentions_is_there():
    text, _, table = PAGE.partition("## All options")
    elsewhere = {"--check", "--resume", "--no-deps", "--prompt"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - elsewhere <= set(re.findall(r"--[\w-]+", table))


def test_the_example_is_a_config():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    made: dict = {}
    exec(compile(code, "docs/train.md", "exec"), made)
    assert made["config"].loss()


def messages() -> list[str]:
    table = PAGE.partition("## When it stops")[2].partition("## All options")[0]
    return re.findall(r"^\| `(.*?)`", table, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_every_message_stands_in_the_code(message):
    source = "".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    assert message in source
