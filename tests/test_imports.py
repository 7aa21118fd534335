"""Which room may import which, as docs/design.md draws it, and what `import apportion` must not pull in."""

import ast
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "apportion"
HEAVY = {
    *("transformers", "trl", "verl", "peft", "openai", "math_verify", "reasoning_gym"),
    *("fastapi", "uvicorn", "duckdb", "pyarrow", "matplotlib", "tensorboard", "wandb"),
}
PURE = ("types", "functional", "credit", "losses")


def drawing() -> dict[str, set[str]]:
    """Room -> rooms it may import, from the lines `a <- {b, c} <- d` of the design, arrows transitive."""
    page = (ROOT / "docs" / "design.md").read_text()
    block = re.search(r"^```imports\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    allowed: dict[str, set[str]] = {}
    for line in block.splitlines():
        places = [re.findall(r"\w+", place) for place in line.split("<-")]
        for place in places:
            for room in place:
                allowed.setdefault(room, set())
        for below, above in pairwise(places):
            for room in above:
                allowed[room] |= set(below)
    allowed["cli"] = set(allowed)
    return {room: closure(allowed, room) for room in allowed}


def closure(allowed: dict[str, set[str]], room: str) -> set[str]:
    seen, new = {room}, [room]
    while new:
        fresh = allowed[new.pop()] - seen
        seen |= fresh
        new += fresh
    return seen


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "package" if first == "__init__" else first


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported, inside functions too; `from apportion import x` counts as apportion.x."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out in full, so that this test can read them"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def rooms_in(tree: ast.AST, rooms: dict[str, set[str]]) -> set[str]:
    ours = [name.split(".")[1] if "." in name else "" for name in imports(tree) if name.split(".")[0] == "apportion"]
    return {name if name in rooms else "package" for name in ours}


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def test_the_drawing_is_read_as_it_is_meant():
    rooms = drawing()
    assert rooms["types"] == {"types"}
    assert rooms["credit"] == {"credit", "functional", "types"}
    assert rooms["record"] == {"record", "types"}
    assert {"signals", "tasks", "losses", "credit", "record"} < rooms["train"]
    assert "train" not in rooms["engines"]
    assert rooms["cli"] == rooms.keys()


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_import_points_the_wrong_way(path):
    rooms, room = drawing(), room_of(path)
    assert room in rooms, f"the room {room!r} is not in the drawing of docs/design.md"
    wrong = rooms_in(ast.parse(path.read_text()), rooms) - rooms[room]
    assert not wrong, f"{path.name} is in {room!r}, which may not import {sorted(wrong)}"


def test_a_wrong_import_is_found():
    rooms = drawing()
    tree = ast.parse("def f():\n    from apportion.train import run\n    from apportion import signals, Rollouts\n")
    assert rooms_in(tree, rooms) - rooms["credit"] == {"train", "signals", "package"}


@pytest.mark.parametrize("path", [p for p in files() if room_of(p) in PURE], ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_pure_rooms_know_tensors_only(path):
    """Nothing but the standard library, torch, numpy and jaxtyping, not even inside a function."""
    tops = {name.split(".")[0] for name in imports(ast.parse(path.read_text()))}
    assert tops <= sys.stdlib_module_names | {"apportion", "torch", "numpy", "jaxtyping"}


def loaded_after(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after running the code."""
    tell = f"import sys; print('heavy:', *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("heavy:").split())


def test_importing_apportion_stays_light():
    assert loaded_after("import apportion") == set()


@pytest.mark.parametrize("argv", [["--help"], ["methods"]])
def test_the_command_line_stays_light(argv):
    assert loaded_after(f"from apportion.cli.main import main; assert main({argv}) == 0") == set()


def test_the_look_at_loaded_packages_sees_something():
    assert loaded_after("import apportion.record._table") == {"pyarrow"}
