"""Cells: nothing finished is repeated, nothing stale is kept, a kill loses only what was under way."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from apportion import grpo
from apportion.arena import Trees
from apportion.arena._cells import dumped, load, run, unfinished
from apportion.arena._grid import Measured, measured
from apportion.arena._methods import BARS, every_method
from reference.cells import Slow, resolve, run_slow

SMALL = Trees(prompts=2, length=4, decisions=2)


def cell(**changes) -> Measured:
    made = Measured("trees", SMALL, (), (*BARS, "grpo", "gigpo"), resolve, size=4, groups=8)
    return replace(made, **changes)


def measures(folder: Path, name: str) -> dict:
    return json.loads((folder / "measures/trees/base.json").read_text())["methods"][name]


def test_a_cell_holds_measures_costs_and_what_is_absent(tmp_path):
    assert run(tmp_path, [cell()], workers=1) == 1
    assert measures(tmp_path, "exact_advantage")["measures"]["sign"] == [1.0, 1.0, 1.0]
    assert measures(tmp_path, "gigpo")["absent"] == ["spans.turn", "signals.turn_reward", "spans.turn.state"]
    found = load(tmp_path)[0]
    assert (found["seed"], found["groups"], found["world"]) == (0, 8, repr(SMALL))
    assert found["torch"]
    assert found["machine"]


def test_what_is_finished_is_not_computed_again(tmp_path):
    run(tmp_path, [cell()], workers=1)
    before = (tmp_path / "measures/trees/base.json").read_text()
    assert run(tmp_path, [cell()], workers=1) == 0
    assert (tmp_path / "measures/trees/base.json").read_text() == before


def test_further_methods_are_added_and_the_others_kept(tmp_path):
    run(tmp_path, [cell()], workers=1)
    before = measures(tmp_path, "grpo")
    assert run(tmp_path, [cell(methods=("mine",))], workers=1) == 1
    assert measures(tmp_path, "grpo") == before
    assert measures(tmp_path, "mine")["expression"] == repr(grpo(eps=0.5))


@pytest.mark.parametrize("change", [{"seed": 1}, {"groups": 10}, {"world": Trees(prompts=2, length=4, decisions=1)}])
def test_another_world_seed_or_size_is_computed_anew(tmp_path, change):
    run(tmp_path, [cell()], workers=1)
    assert run(tmp_path, [cell(methods=("grpo",), **change)], workers=1) == 1
    assert set(load(tmp_path)[0]["methods"]) == {"grpo"}  # nothing of the other batch stays beside it


def test_same_seed_same_numbers(tmp_path):
    for folder in ("a", "b"):
        run(tmp_path / folder, [cell()], workers=1)
    a, b = (load(tmp_path / f)[0] for f in ("a", "b"))
    assert a["methods"] == b["methods"]


def test_a_kill_loses_only_what_was_under_way_and_leaves_no_worker(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=run_slow, args=(tmp_path,))
    process.start()
    assert soon(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [x["number"] for x in load(tmp_path)] == [0]
    assert unfinished(tmp_path, [Slow(0), Slow(1)]) == [Slow(1)]
    worker = Path(f"/proc/{(tmp_path / 'pid').read_text()}")
    assert soon(lambda: not worker.exists() or "zombie" in (worker / "status").read_text())


def soon(happens, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("text", ['{"kind": "mea', "[1]"])
def test_a_damaged_file_is_named_with_the_cure(tmp_path, text):
    path = tmp_path / cell().path
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for use in (lambda: load(tmp_path), lambda: run(tmp_path, [cell()], workers=1)):
        with pytest.raises(ValueError, match=r"base\.json is not a result of the arena: .* Delete it"):
            use()


def test_an_error_in_a_cell_is_told(tmp_path):
    with pytest.raises(ValueError, match="no method unknown"):
        run(tmp_path, [cell(methods=("unknown",))], workers=1)


def test_no_workers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1; got 0"):
        run(tmp_path, [cell()], workers=0)


def test_the_quick_grid_is_part_of_the_full_one():
    quick, full = ({c.path: c for c in measured(quick=q, resolve=resolve)} for q in (True, False))
    assert quick.keys() < full.keys()
    assert all(full[path] == c for path, c in quick.items())
    assert all(c.groups >= 200 for c in full.values())


def test_every_method_of_the_library_is_in_the_arena():
    assert list(every_method())[:2] == list(BARS)
    assert {"grpo", "capo", "tempo", "pure", "whiten"} < every_method().keys()


def test_json_is_strict_and_short():
    got = json.loads(dumped({"a": {"b": {"c": [1.23456, float("nan"), float("inf"), 7]}}, "d": float("-inf")}))
    assert got == {"a": {"b": {"c": [1.23, None, "inf", 7]}}, "d": "-inf"}
