"""`apportion credit`: rollouts in, credit out; and the replay of a run."""

import json

import pytest
import torch

from apportion.credit import capo, grpo
from apportion.record import Run, read_jsonl


def test_a_log_with_credit_is_written(apportion, log_file, tmp_path):
    told = apportion("credit", log_file, "--credit", "chain(grpo(), clip(limit=0.5))", "--out", tmp_path / "out.jsonl")
    assert told.code == 0
    assert f"written: {tmp_path / 'out.jsonl'}" in told.out
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    # outcomes 1 0 0 1: mean 1/2, sample deviation sqrt(1/3); 0.5 / 0.577 = 0.866, clipped to 0.5
    assert lines[0]["advantages"] == [0.0] * 9 + [0.5] * 7
    assert lines[1]["advantages"][9:] == [-0.5] * 7
    assert lines[0]["parts"].keys() == {"outcome", "clip"}
    assert read_jsonl(tmp_path / "out.jsonl").tokens.shape == (4, 16)


def test_the_summary(apportion, log_file):
    told = apportion("credit", log_file, "--credit", "grpo", "--json")
    answer = json.loads(told.out)
    assert answer["credit"] == repr(grpo())
    step = answer["steps"][0]
    assert (step["rows"], step["groups"], step["counted_tokens"], step["positive"]) == (4, 1, 28, 0.5)
    assert "4 rows in 1 groups, 28 of 28 action tokens counted: 50% up, 50% down" in (
        apportion("credit", log_file, "--credit", "grpo").out
    )


def test_replaying_a_run_gives_the_same_bits(apportion, run_folder):
    told = apportion("credit", run_folder, "--check")
    assert told.code == 0
    assert "2 steps recomputed: every bit is as recorded" in told.out


def test_a_replay_that_differs_fails(apportion, run_folder):
    told = apportion("credit", run_folder, "--check", "--credit", "grpo")
    assert told.code == 1
    assert "step 0 of " in told.err
    assert "differ from the record by up to" in told.err
    assert told.err.count("\n") == 1


def test_one_last_bit_is_noticed(apportion, run_folder):
    """An advantage whose last bit is flipped by hand in the record."""
    from dataclasses import replace

    from apportion.record import RunWriter

    run = Run(run_folder)
    credit = run.credit(1)
    bits = credit.advantages.clone().view(torch.int32)
    bits[0, -1] ^= 1
    RunWriter.resume(run_folder).append(1, run.rollouts(1), replace(credit, advantages=bits.view(torch.float32)))
    told = apportion("credit", run_folder, "--check")
    assert told.code == 1
    assert "step 1 of " in told.err


def test_another_method_on_a_recorded_step(apportion, run_folder, tmp_path):
    assert apportion("credit", run_folder, "--step", 1, "--credit", "grpo", "--out", tmp_path / "o.jsonl").code == 0
    line = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    assert line["advantages"][-1] == pytest.approx(0.866, abs=1e-3)
    assert repr(capo()) in apportion("credit", run_folder).out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["{log}"], "a log of rollouts needs --credit METHOD"),
        (["{log}", "--credit", "grpo", "--check"], "--check and --step are for runs; this is a file"),
        (["{run}", "--out", "x"], "--out on a run needs --step N"),
        (["{run}", "--step", "9"], "has no rollouts of step 9; recorded are 0 to 1"),
        (["{log}", "--credit", "grpoo"], "there is no credit method 'grpoo'. Did you mean 'grpo'?"),
        (["{log}", "--credit", "gae"], "gae needs rollouts.values, which this batch lacks."),
        (["{broken}", "--credit", "grpo"], "broken.jsonl line 2: not JSON"),
        (["{log}", "--credit", "grpo", "--out", "/nowhere/x.jsonl"], "No such file or directory: '/nowhere/x.jsonl'"),
    ],
)
def test_mistakes(apportion, run_folder, log_file, tmp_path, argv, line):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"tokens": [1], "group": 0}\n{"tok\n')
    told = apportion("credit", *(x.format(log=log_file, run=run_folder, broken=broken) for x in argv))
    assert told.code == 2
    assert line in told.err
    assert told.err.count("\n") == 1
