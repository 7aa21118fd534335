"""docs/coming-from.md forgets no key of verl's own configuration, and names none that is not there."""

import re
import runpy
from pathlib import Path

import pytest
import verl

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "coming-from.md").read_text()


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DOCS / "coming_from.py"))


@pytest.fixture(scope="module")
def found(script):
    return script["verl"](Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")


def test_every_key_has_a_row_with_its_default(script, found):
    assert script["problems"](script["rows"](PAGE, "verl"), found) == []
    assert len(found["verl"]) > 700


def test_the_command_sets_keys_that_exist(found):
    text = PAGE.partition("## The same run")[2].partition("\n## ")[0]
    command = next(x for x in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if "main_ppo" in x)
    keys = re.findall(r"(?<=\s)([a-z_]+\.[\w.]+)=", command)
    assert len(keys) > 10
    assert [key for key in keys if key not in found["verl"]] == []
