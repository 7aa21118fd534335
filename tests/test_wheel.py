"""The wheel alone, without the source tree: trains a tiny model by the command line and shows its credit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import build_tiny_model

ROOT = Path(__file__).parents[1]
SOURCES = ("src", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs; the wheel is built from a copy, so the tree stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    called([sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tree)], folder)
    (wheel,) = (tree / "dist").glob("*.whl")
    shutil.rmtree(tree / "src")
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index"]
    called([*pip, "--target", str(target), str(wheel)], folder)
    return target


def called(command: list[str], where: Path, site: Path | None = None) -> str:
    """Standard output of a command that must succeed; with `site` in front of everything else that Python can import."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(site)} if site else {})
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_a_wheel_trains_and_shows_credit(installed, tmp_path):
    python = sys.executable
    file = called([python, "-c", "import apportion; print(apportion.__file__)"], tmp_path, installed).strip()
    assert Path(file) == installed / "apportion" / "__init__.py"
    assert (installed / "apportion" / "py.typed").is_file()

    build_tiny_model(tmp_path / "tiny")
    command = [python, "-m", "apportion.cli.main"]
    train = "train --model tiny --task arithmetic(train=16,test=4) --credit process_penalty --out run --steps 2 "
    train += "--prompts-per-step 2 --group-size 2 --max-new-tokens 8 --eval-size 4 --json"
    told = json.loads(called([*command, *train.split()], tmp_path, installed))
    assert told["run"] == "run"
    assert [p.name for p in sorted((tmp_path / "run" / "rollouts").iterdir())] == [
        "step-000001.parquet",
        "step-000002.parquet",
    ]
    # A random model writes no equation: the outcome is 0, and the judge takes off 1 for the step that does nothing.
    shown = called([*command, "show", "run"], tmp_path, installed)
    assert "-1.000 = +0.000 outcome -1.000 judge" in shown
    assert "2 steps recomputed: every bit is as recorded" in called(
        [*command, "credit", "run", "--check"], tmp_path, installed
    )
