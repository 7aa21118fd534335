"""The benchmark runs from end to end with a tiny model, and reports what fails instead of failing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "train_step.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_reports_every_field_and_writes_the_page(bench, tmp_path):
    sizes = [
        "--prompts",
        "4",
        "--group",
        "2",
        "--prompt-tokens",
        "12",
        "--new-tokens",
        "4",
        "--steps",
        "1",
        "--rounds",
        "1",
    ]
    command = [sys.executable, str(SCRIPT), "--tiny", *sizes, "--json", "--page", str(tmp_path / "sub" / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"command", "date", "machine", "settings", "summary", "runs"}
    assert report["settings"]["dead"] == 1  # a quarter of four groups
    assert report["machine"]["versions"]["torch"]
    names = ["everything on", "TRL", "no skipping", "no skipping, no sharing"]
    assert [r["variant"] for r in report["runs"]] == names
    for run in report["runs"]:
        assert run["status"] == "ok", run["status"]
        assert len(run["steps"]) == 1  # the first of two is not counted
        assert run["tokens"] == 4 * 2 * 4
        assert run["seconds"] == pytest.approx(run["sample"] + run["measure"] + run["update"])
        assert min(run["sample"], run["update"], run["memory"]) > 0
    for spread in report["summary"].values():
        assert set(spread["ratio_seconds"]) == {"min", "median", "max"}
        assert spread["ratio_memory"]["median"] > 0
        assert spread["problems"] == []
    assert report["summary"]["TRL"]["ratio_seconds"]["median"] == 1.0
    written = (tmp_path / "sub" / "page.md").read_text()
    assert all(f"| {name} | " in written for name in names)


def test_ratios_are_taken_within_a_round_and_a_missing_round_leaves_them_out(bench):
    seconds = {("TRL", 1): 10.0, ("TRL", 2): 12.0, ("everything on", 1): 5.0, ("everything on", 2): 4.0}
    seconds |= {("no skipping", 1): None, ("no skipping", 2): 6.0}
    blank = {"status": "ok", "steps": [], "sample": None, "measure": None, "update": None}
    runs = [
        {**blank, "variant": v, "round": n, "seconds": s, "memory": 1.0, "gpu_memory": None}
        for (v, n), s in seconds.items()
    ]
    summary = bench.summary(runs)
    assert summary["everything on"]["ratio_seconds"] == {"min": 2.0, "median": 2.5, "max": 3.0}
    assert summary["no skipping"]["ratio_seconds"] == {"min": 2.0, "median": 2.0, "max": 2.0}
    assert summary["everything on"]["gpu_memory"] is None


def test_a_process_that_is_too_slow_or_fails_is_a_result(bench, tmp_path):
    work = {"dead": 0, "threads": 1}
    run = bench._run("TRL", 1, work, tmp_path, limit=0.05)
    assert run["status"] == "stopped after 0.05 s"
    assert (run["steps"], run["seconds"]) == ([], None)
    run = bench._run("TRL", 2, work, tmp_path, limit=120)  # it is not told which model
    assert run["status"].startswith("failed: KeyError")
    summary = bench.summary([run])
    assert bench.problems(summary) == [f"TRL, round 2: {run['status']}"]
    assert bench.rows(summary)[0][1:3] == ("-", "-")


def test_options_that_do_not_fit_are_refused(bench, capsys):
    for argv, text in ((["--group", "1"], "--group must be at least 2"), (["--trl-batch", "7"], "must divide")):
        with pytest.raises(SystemExit):
            bench.parse(argv)
        assert text in capsys.readouterr().err


def test_the_speed_of_credit_is_told_for_the_methods_asked_for(tmp_path):
    script, page = SCRIPT.with_name("credit.py"), tmp_path / "page.md"
    names = ["grpo", "gae", "clip"]
    settings = ["--sizes", "500", "1000", "--seconds", "0.01", "--threads", "1", "--json", "--page", str(page)]
    command = [sys.executable, str(script), "--only", *names, *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    told = {(row["method"], row["tokens"]) for row in report["methods"]}
    assert told == {(n, size) for n in ("grpo", "gae", "grpo, clip") for size in (500, 1000)}
    assert all(row["speed"] > 0 for row in report["methods"])
    assert set(report["memory"]) == set(report["growth"]) == {"grpo", "gae", "grpo, clip"}
    assert "| `grpo, clip` | " in page.read_text()
