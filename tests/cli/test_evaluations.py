"""What `compare` and `show` print of evaluations and of a run that stopped early."""

import json

import pytest

from apportion.cli._curves import before_after, group_runs, stopped
from apportion.record import Run, RunWriter

REASON = "the reward collapsed: its mean over 5 steps is 0.1, below 0.5 of its best, 0.8 (collapse_reward)."


def make(path, *, credit="grpo()", more=({}, {}), config=None, stop=None):
    writer = RunWriter.create(path, {"credit": credit, "seed": 0, "config": {"lr": 0.1, **(config or {})}})
    for step, numbers in enumerate(more):
        accuracy = 0.25 * (1 + step)
        writer.metrics(
            step, "eval", tokens=100 * step, accuracy=accuracy, n=4, correct=[accuracy] * 4, unmeasured=0, **numbers
        )
    writer.metrics(1, "train", tokens=100, reward=0.5)
    if stop is not None:
        writer.metrics(stop, "stop", reason=REASON)
    return path


SAMPLED = ({"pass@4": 0.5, "majority@4": 0.25, "greedy": 0.25}, {"pass@4": 1.0, "majority@4": 0.75, "greedy": 0.5})


def test_before_and_after_of_whatever_every_evaluation_measured(tmp_path):
    full = [
        make(tmp_path / "a", more=SAMPLED),
        make(tmp_path / "b", more=({"pass@4": 0.7}, {"pass@4": 0.8, "greedy": 1.0})),
    ]
    (group,) = group_runs(full)
    assert before_after(group, 100)["also"] == {"pass@4": pytest.approx((0.6, 0.9))}
    (group,) = group_runs(full[:1])
    assert before_after(group, 100)["also"] == {"pass@4": (0.5, 1.0), "majority@4": (0.25, 0.75), "greedy": (0.25, 0.5)}


def test_runs_that_differ_in_when_they_would_stop_or_what_memory_they_take_are_one_group(tmp_path):
    options = ("patience", "collapse_reward", "micro_tokens", "tool_seconds")
    paths = [make(tmp_path / f"{i}", config=dict.fromkeys(options, i)) for i in (0, 1)]
    assert len(group_runs(paths)) == 1


def test_a_run_that_went_on_has_not_stopped(tmp_path):
    path = make(tmp_path / "a", stop=1)
    assert stopped(Run(path)) == {"run": str(path), "step": 1, "reason": REASON}
    RunWriter.resume(path).metrics(2, "train", tokens=200, reward=0.5)
    assert stopped(Run(path)) is None
    assert stopped(Run(make(tmp_path / "b"))) is None


def test_compare_prints_them(apportion, tmp_path):
    paths = [make(tmp_path / "a", more=SAMPLED, stop=1), make(tmp_path / "b", credit="capo()")]
    told = apportion("compare", *paths, "--out", tmp_path / "x.png").out
    assert "also measured, before -> after:" in told
    header, grpo, capo = (line.split() for line in told.partition("after:\n")[2].splitlines()[:3])
    assert header == ["credit", "pass@4", "majority@4", "greedy"]
    assert grpo == ["grpo()", "0.5", "->", "1", "0.25", "->", "0.75", "0.25", "->", "0.5"]
    assert capo == ["capo()", "-", "-", "-"]
    assert f"a stopped early, after step 1: {REASON[:40]}" in told.replace("\n", " ")
    groups = json.loads(apportion("compare", *paths, "--json").out)["groups"]
    assert groups[0]["also"]["pass@4"] == [0.5, 1.0]
    assert [len(group["stopped"]) for group in groups] == [1, 0]


def test_compare_without_them_prints_no_second_table(apportion, tmp_path):
    told = apportion("compare", make(tmp_path / "a"), "--out", tmp_path / "x.png").out
    assert "also measured" not in told
    assert "stopped" not in told


def test_show_ends_with_the_last_evaluation_and_the_reason_of_a_stop(apportion, run_folder):
    plain = apportion("show", run_folder).out
    assert "held-out" not in plain
    assert "stopped" not in plain
    writer = RunWriter.resume(run_folder)
    numbers = {"accuracy": 0.5, "n": 4, "pass@4": 1.0, "intervals": {"accuracy": [0.15, 0.85]}, "length": 6.5}
    writer.metrics(1, "eval", tokens=56, **numbers)
    writer.metrics(1, "stop", reason="\x1b[31m" + REASON)
    told = apportion("show", run_folder).out
    assert told.startswith(plain)
    evaluation, stop = (line for line in told[len(plain) :].splitlines() if line)
    assert (
        evaluation == "held-out after step 1: accuracy 0.500 (0.150 to 0.850) on 4 problems  pass@4 1.000  length 6.5"
    )
    assert stop.startswith("the run stopped early, after step 1: ")
    assert "\x1b" not in stop
    answer = json.loads(apportion("show", run_folder, "--json").out)
    assert answer["evaluation"]["pass@4"] == 1.0
    assert answer["stopped"]["step"] == 1
