"""Every block of docs/guide.md runs, in its order, in one folder: with a tiny model, and with fewer and smaller steps."""

import contextlib
import importlib
import io
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import build_tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
MODEL = "smollm2-135m-instruct"
BLOCK = re.compile(r"^```(\w+) ?([\w.]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
SMALLER = {
    "--steps": "2",
    "--warmup": "1",
    "--critic-warmup": "1",
    "--prompts-per-step": "2",
    "--group-size": "2",
    "--mini-batches": "2",
    "--max-new-tokens": "32",
    "--eval-size": "2",
    "--eval-samples": "2",
    "--max-turns": "2",
}
ALWAYS = ("--steps", "--prompts-per-step", "--group-size", "--max-new-tokens", "--eval-size")


def commands(block: str) -> list[list[str]]:
    """The command lines of a block, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def smaller(words: list[str], model: str) -> list[str]:
    """The same command on the tiny model and with small numbers."""
    if words[:2] != ["apportion", "train"]:
        return words
    words = [model if word == MODEL else word for word in words]
    for flag, value in SMALLER.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    if "--resume" in words:
        return [*words, "--steps", "3"] if "--steps" in words else words
    missing = [x for flag in ALWAYS if flag not in words for x in (flag, SMALLER[flag])]
    return [*words, *missing, "--warmup-batch", "2", "--precision", "float32", "--no-progress"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all sections run, one after the other: later ones use what earlier ones made."""
    place = tmp_path_factory.mktemp("guide")
    build_tiny_model(place / "tiny", context=256)
    for _, name, text in BLOCK.findall(PAGE):
        if name:
            (place / name).write_text(text)
    yield place
    for name in [x for x in sys.modules if x.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    """The folder, its modules, and a question at the keyboard."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 7+5?\n"))
    importlib.invalidate_caches()


def executed(code: str, model: str, monkeypatch) -> str:
    """What a block of Python prints; a run in it is a small one."""
    import apportion.train

    real, told = apportion.train.run, io.StringIO()
    sizes = {"prompts_per_step": 2, "group_size": 2, "eval_size": 2, "warmup_batch": 2, "progress": False}
    with monkeypatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(apportion.train, "run", lambda c: real(replace(c, model=model, steps=1, warmup=1, **sizes)))
        exec(compile(code, "docs/guide.md", "exec"), {"__name__": "guide"})
    return told.getvalue()


@pytest.mark.parametrize("section", SECTIONS, ids=[s.split("\n")[0] for s in SECTIONS])
def test_a_section_runs(section, folder, monkeypatch):
    from apportion.cli.main import main

    blocks, model = BLOCK.findall(section), str(folder / "tiny")
    for at, (language, name, text) in enumerate(blocks):
        if language == "python" and not name and (told := executed(text, model, monkeypatch)):
            assert blocks[at + 1] == ("text", "", told)
        for words in commands(text) if language == "sh" else ():
            if words[0] == "apportion":
                assert main(smaller(words, model)[1:]) == 0, shlex.join(words)
            else:
                assert words[:2] == ["pip", "install"]
