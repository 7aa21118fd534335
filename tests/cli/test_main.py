"""Finding the command, and telling mistakes from bugs."""

import importlib.util
import subprocess
import sys

import pytest

from apportion.cli import _errors
from apportion.cli.main import COMMANDS, main


def test_help_names_every_command_and_every_command_is_there(apportion):
    told = apportion("--help")
    assert told.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in told.out
        assert importlib.util.find_spec(f"apportion.cli.{name}") is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(apportion, name):
    told = apportion(name, "--help")
    assert told.code == 0
    assert f"apportion {name}" in told.out
    assert "Examples:" in told.out


def test_without_a_command_the_help_is_shown_and_the_exit_code_says_so(apportion):
    told = apportion()
    assert told.code == 2
    assert "usage: apportion COMMAND" in told.out


def test_the_version(apportion):
    import apportion as package

    assert apportion("--version").out.strip() == package.__version__


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["mehtods"], "there is no command 'mehtods'. Did you mean 'methods'?"),
        (["zzz"], f"there is no command 'zzz'. There is: {', '.join(COMMANDS)}."),
        (["methods", "--jsn"], "Unrecognized options: --jsn"),
        (["show"], "Missing from apportion show: PATH"),
        (["show", "x", "--step", "q"], "Error parsing --step: no type matching INT could be instantiated from ['q']"),
        (["show", "/nowhere"], "there is no /nowhere. Give a run folder or a JSON lines file."),
        (["compare"], "compare needs at least one run folder."),
        (["compare", "/nowhere"], "/nowhere is not a recorded run: there is no such folder."),
        (["doctor", "trian"], "there is no extra 'trian'. Did you mean 'train'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(apportion, argv, line):
    told = apportion(*argv)
    assert told.code == 2
    assert told.out == ""
    assert told.err.startswith(f"apportion: {line}")
    assert told.err.count("\n") == 1


def test_debug_shows_the_traceback_of_a_mistake(monkeypatch):
    monkeypatch.setenv("APPORTION_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="is not a recorded run"):
        main(["compare", "/nowhere"])


def caught(function, *args):
    try:
        function(*args)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_errors_raised_on_purpose_by_the_library_are_mistakes():
    from apportion import Rollouts

    error = caught(lambda: Rollouts.from_lists([[1]], [0], outcome=[1.0, 2.0]))
    assert _errors.one_line(error) == str(error)
    assert _errors.one_line(OSError("disk\nfull")) == "disk full"


def test_errors_that_happen_by_accident_are_bugs():
    """The interpreter's, torch's, and those of the user's own code keep their traceback."""
    import torch

    from apportion import Rollouts
    from apportion.cli._heat import written_sum

    def own_code():
        raise ValueError("raised on purpose, but not by the library")

    assert _errors.one_line(caught(written_sum, "a", {"b": 1.0})) is None  # the interpreter's TypeError in our frame
    assert _errors.one_line(caught(Rollouts.from_lists, 3, [])) is None
    assert _errors.one_line(caught(torch.zeros, "x")) is None
    assert _errors.one_line(caught(own_code)) is None
    assert _errors.one_line(KeyError("x")) is None


def test_a_missing_extra_is_told_with_its_cure():
    def line(name):
        return _errors.one_line(ModuleNotFoundError(f"No module named {name!r}", name=name))

    assert line("transformers.models") == (
        "this needs the package transformers. Install it: pip install 'apportion[train]'"
    )
    assert line("apportion.lost") is None


def test_a_bug_ends_with_a_traceback(tmp_path):
    code = "from apportion.cli import main, methods; methods.main = lambda argv: {}['bug']; main.main(['methods'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'bug'" in done.stderr


def test_finding_the_command_imports_nothing_heavy():
    code = (
        "import sys; from apportion.cli.main import main; main(['--help'])\n"
        "heavy = {'tyro', 'rich', 'pyarrow', 'matplotlib', 'transformers', 'apportion.record'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m apportion.cli.main methods --json | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")
