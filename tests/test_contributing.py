"""A stranger adds a method as CONTRIBUTING.md says, in a copy of the tree: four places, and everything finds it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("src", "tests", "docs", "README.md", "CONTRIBUTING.md", "pyproject.toml", "recipes", "benchmarks", "Makefile")

METHOD = '''\
"""Credit that grows towards the end of the response."""

import torch

from apportion.credit._base import assemble, estimator, measured_mask, trajectory_values
from apportion.credit._line import action_line
from apportion.functional import at_members, segment_count
from apportion.types import Credit, Rollouts, Signal


@estimator(requires=("signals.{reward}",), laws=("linear",))
def ramp(rollouts: Rollouts, *, power: float = 1.0, reward: str = "outcome") -> Credit:
    """The outcome, weighted by how far the response has come.

    `A_t = r (t / n)^power` for the t-th of n actions, t = 1..n.

    Source: a toy.
    Reads: signals[reward]. Scope: row. Unit: token.
    Cost: none beyond the rollouts.
    Laws: the last action gets the outcome itself.
    Degenerate: an empty response nothing; an unmeasured trajectory advantage 0 and mask False.

    Args:
        rollouts: the batch.
        power: 0 gives every action the outcome.
        reward: signal with one reward per trajectory.

    Example:
        >>> ramp(Rollouts.from_lists([[1, 2]], [0], outcome=[1.0])).advantages
        tensor([[0.5000, 1.0000]])
    """
    value, line = trajectory_values(rollouts, reward, "ramp"), action_line(rollouts)
    count = segment_count(line.trajectories, rollouts.num_trajectories)
    place = torch.arange(len(line.positions), device=rollouts.device) - at_members(
        count.cumsum(0) - count, line.trajectories
    )
    share = ((place + 1) / at_members(count, line.trajectories)) ** power
    earned = line.put(share * at_members(value.nan_to_num(nan=0.0), line.trajectories))
    return assemble(rollouts, measured_mask(rollouts, ~value.isnan()), {reward: Signal(earned, "token")})
'''

TEST = '''\
"""The toy method."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, ramp
from reference import loops
from reference.batches import random_batch


def test_by_hand():
    r = Rollouts.from_lists([[1, 2, 3, 4], [5]], [0, 1], outcome=[2.0, -1.0])
    assert ramp(r).advantages.tolist() == [[0.5, 1.0, 1.5, 2.0], [-1.0, 0.0, 0.0, 0.0]]


def test_unmeasured_and_empty():
    credit = ramp(Rollouts.from_lists([[1], []], [0, 0], outcome=[float("nan"), 1.0]))
    assert not credit.mask.any()


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_slowly(seed):
    r = random_batch(seed)
    table = loops.blank(r)
    for e in loops.episodes(r):
        n = len(e.actions)
        if e.outcome == e.outcome:
            loops.put(table, e.actions, [e.outcome * ((t + 1) / n) ** 2 for t in range(n)])
    torch.testing.assert_close(ramp(r, power=2.0).advantages, loops.table_of(table, r))
'''

PAGE = """\
# Ramp: `ramp`

## The equation

    A_t = r (t / n)^power

## What it reads

`signals["outcome"]`.

## Laws

The last action gets the outcome.

## Degenerate cases

An empty response gets nothing.

## Differences

None: there is no paper.

## Example

```python
>>> from apportion import Rollouts, ramp
>>> ramp()(Rollouts.from_lists([[1, 2]], [0], outcome=[1.0])).advantages
tensor([[0.5000, 1.0000]])

```

## Evidence

None.

## When not to use it

Always.
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tree, as a stranger has cloned it."""
    tree = tmp_path_factory.mktemp("clone")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / part, tree / part)
    return tree


def places() -> list[str]:
    """The numbered places of CONTRIBUTING.md, for a method named ramp."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    return [p.replace("name", "ramp") for p in re.findall(r"^\d\. (?:One export line in )?`(\S+)`", page, re.MULTILINE)]


def export(init: str) -> str:
    """The export line, where the file wants it, and the name in its list."""
    lines = init.splitlines()
    ours = "from apportion.credit._ramp import ramp"
    lines.insert(
        next(i for i, line in enumerate(lines) if line > ours and line.startswith("from apportion.credit.")), ours
    )
    names = sorted([*re.findall(r'^    "(\w+)",$', init, re.MULTILINE), "ramp"])
    start = lines.index("__all__ = [")
    return "\n".join([*lines[: start + 1], *(f'    "{n}",' for n in names), "]", ""])


def test_four_places_and_everything_finds_the_method(copy):
    method, test, page, init = places()
    (copy / method).write_text(METHOD)
    (copy / test).write_text(TEST)
    (copy / page).write_text(PAGE)
    (copy / init).write_text(export((copy / init).read_text()))

    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    code = "import apportion; print(apportion.__file__)"
    here = subprocess.run([sys.executable, "-c", code], env=environment, cwd=copy, capture_output=True, text=True)
    assert here.stdout.startswith(str(copy)), "the copy is what is tested"

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=copy, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("ruff", "format", "--check", method, test, init)
    run("ruff", "check", method, test, init)
    run("pytest", "-p", "no:cacheprovider", test, method, "tests/test_readme.py", "tests/credit/test_exports.py")
    held = run("pytest", "-p", "no:cacheprovider", "tests/laws", "tests/docs", "-k", "ramp or named_method", "-vv")
    assert held.count("[ramp]") > 15
    assert "FAILED" not in held
    rows = {row["name"]: row for row in json.loads(run("apportion.cli.main", "methods", "--json"))}
    assert (rows["ramp"]["needs"], rows["ramp"]["cost"]) == (["signals.outcome"], "none beyond the rollouts")
    log = {"group": "a", "tokens": [1, 2], "outcome": 1.0}
    (copy / "log.jsonl").write_text(json.dumps(log) + "\n")
    assert "ramp" in run("apportion.cli.main", "show", "log.jsonl", "--credit", "ramp(power=2.0)")


def test_the_page_names_four_places():
    assert places() == [
        "src/apportion/credit/_ramp.py",
        "tests/credit/test_ramp.py",
        "docs/methods/ramp.md",
        "src/apportion/credit/__init__.py",
    ]
