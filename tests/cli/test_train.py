"""`apportion train` as a user types it: a tiny model trains, resumes, replays; mistakes get one line."""

import json
import re
import sys

import pytest
import torch

from apportion.record import Run

TASK = "arithmetic(terms=2, train=32, test=8)"
SMALL = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "8", "--eval-size", "4"]
QUIET = ["--no-progress", "--no-save-model", "--precision", "float32"]


@pytest.fixture
def train(apportion, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*options: str, task: str = TASK, model: str = tiny_model):
        return apportion("train", "--model", model, "--task", task, "--out", "run", *SMALL, *QUIET, *options)

    return call


def test_a_run_can_be_shown_checked_and_compared(train, apportion):
    told = train("--credit", "process_penalty", "--json")
    assert told.code == 0
    answer = json.loads(told.out)
    assert (answer["run"], answer["eval"][0]["step"]) == ("run", 2)
    info = Run("run").info
    assert info["command"].startswith("apportion train --model")
    assert info["credit"] == "process_penalty()"
    assert apportion("show", "run").code == 0
    assert apportion("credit", "run", "--check").code == 0
    assert apportion("compare", "run", "--json").code == 0


def test_what_is_printed_in_run_json_can_be_typed_back(train):
    assert train("--credit", "capo").code == 0
    first = Run("run")
    assert train("--out", "again", "--credit", first.info["credit"]).code == 0
    for step in (1, 2):
        assert torch.equal(first.credit(step).advantages, Run("again").credit(step).advantages)
    assert Run("again").info["credit"] == first.info["credit"]


def test_a_run_resumes_with_the_options_it_was_started_with_and_may_grow(train, apportion):
    assert train("--steps", "1").code == 0
    assert apportion("train", "--resume", "run", "--steps", "2").code == 0
    grown = [m["reward"] for m in Run("run").metrics("train")]
    assert train("--out", "whole").code == 0
    assert grown == [m["reward"] for m in Run("whole").metrics("train")]
    assert apportion("train", "--resume=run").code == 0  # finished: nothing left to do


def test_pure_takes_its_step_scores_from_the_judge(train):
    assert train("--credit", "pure(horizon=8)").code == 0
    assert "process" in Run("run").rollouts(1).signals


def test_an_own_task_is_found_in_the_working_directory(train, apportion, tmp_path, monkeypatch):
    (tmp_path / "my_arithmetic.py").write_text(
        "from apportion.tasks import arithmetic\ndef task(): return arithmetic(terms=2, train=16, test=4)\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert train(task="my_arithmetic:task").code == 0
    assert "16 problems to train on" in apportion("tasks", "my_arithmetic:task").out


def test_an_own_task_and_an_own_method(train, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from apportion.tasks import arithmetic\n"
        "from apportion.credit import grpo\n"
        "def task(): return arithmetic(terms=2, train=16, test=4)\n"
        "def credit(): return grpo(eps=0.5)\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert train("--credit", "mine:credit", task="mine:task").code == 0
    assert Run("run").info["credit"] == "mine:credit"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--credit", "cpao"], "there is no credit method 'cpao'. Did you mean 'capo'?"),
        (["--task", "arithmetik"], "there is no task 'arithmetik'. Did you mean 'arithmetic'?"),
        (["--model", "smollm2-135m"], "Did you mean 'smollm2-135m-instruct'?"),
        (["--model", "no/such/folder"], "is neither a folder, nor a hub name"),
        (["--group-size", "1"], "compares responses of a group and needs at least 2 per prompt, but group_size is 1"),
        (
            ["--credit", "gae"],
            "needs values, which nothing in this run supplies. Train with a critic (--critic head, or --critic model).",
        ),
        (["--splitter", "line"], "--splitter 'line' is unknown. Did you mean 'lines'?"),
        (["--judge", "tol"], "--judge 'tol' is unknown. Did you mean 'tool'?"),
        (["--judge", "http://127.0.0.1:9/v1"], "needs --judge-model"),
        (["--max-new-tokens", "500"], "Shorten the prompt or lower max_new_tokens."),
        (["--grup-size", "3"], "Unrecognized options: --grup-size, 3 Perhaps you meant: --group-size INT"),
        (["--kl-coef", "nan"], "kl_coef must be at least 0; got nan."),
        (["--stop", ""], "stop must hold texts, none of them empty"),
        (["--track", "wandb"], "track 'wandb' needs the package wandb. Run: pip install wandb"),
        (["--measures", "os:getcwd"], "--measures os:getcwd is a str. A measure has provides, requires and measure."),
        (["--measures", "os.path:join"], "is called as os.path:join(), but: missing a required argument"),
        (["--group-sizes", "os:getcwd"], "--group-sizes os:getcwd is called as os:getcwd(problem), but: too many"),
        (["--rewards", "os:nothing"], "--rewards: os has no 'nothing'."),
        (["--objective", "clp"], "Expected one of ('clip', 'cispo')"),
        (["--steps", "many"], "steps"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_a_mistake_gets_one_line_no_traceback_and_no_folder(train, tmp_path, options, line):
    told = train(*options)
    assert told.code == 2
    assert not (tmp_path / "run").exists()
    assert line in told.err
    assert len(told.err.splitlines()) == 1
    assert "Traceback" not in told.err


def test_a_folder_in_use_is_not_written_over(train):
    assert train().code == 0
    told = train()
    assert told.code == 2
    assert "not empty" in told.err


def test_a_judge_that_cannot_be_reached_is_found_at_the_start(train, tmp_path):
    told = train("--credit", "capo", "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m", "--judge-cache", "cache")
    assert told.code == 2
    assert "LLMJudge needs a chat model 'm' at http://127.0.0.1:9/v1" in told.err
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_named_without_the_whole_help(apportion):
    assert apportion("train").err == (
        "apportion: Missing from apportion train: --model STR --out STR --task STR. See: apportion train --help\n"
    )


def test_the_help_has_the_headings_of_the_source(apportion):
    page = apportion("train", "--help").out
    for heading, first in (("how much", "--steps"), ("what is kept", "--save-every"), ("the call", "--resume")):
        assert re.search(rf"\n\n {heading}\n -+\n  {first} ", page)
    assert "# -" not in page


def test_resume_needs_a_run(apportion, tmp_path):
    assert "there is no such folder" in apportion("train", "--resume", str(tmp_path / "nothing")).err
    assert "--resume needs the folder of a run" in apportion("train", "--resume").err
