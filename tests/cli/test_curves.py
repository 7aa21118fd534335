"""The numbers of `compare`: grouping, curves over seeds, and the paired bootstrap."""

import json

import numpy as np
import pytest

from apportion.cli._curves import before_after, budget, curve, group_runs, paired_interval
from apportion.record import RunWriter


def make(path, *, credit="grpo()", seed=0, lr=0.1, evals=(), rewards=()):
    writer = RunWriter.create(
        path, {"credit": credit, "config": {"lr": lr, "seed": seed, "out": str(path)}, "seed": seed}
    )
    for step, (tokens, correct) in enumerate(evals):
        accuracy = sum(correct) / len(correct)
        writer.metrics(step, "eval", tokens=tokens, accuracy=accuracy, n=len(correct), correct=list(correct))
    for step, (tokens, reward) in enumerate(rewards):
        writer.metrics(step, "train", tokens=tokens, reward=reward)
    return path


def test_runs_that_differ_in_the_seed_are_one_group(tmp_path):
    paths = [
        make(tmp_path / "a", seed=0),
        make(tmp_path / "b", credit="capo()", seed=0),
        make(tmp_path / "c", seed=1),
        make(tmp_path / "d", seed=0, lr=0.2),
    ]
    groups = group_runs(paths)
    assert [[run.path.name for run in g.runs] for g in groups] == [["a", "c"], ["b"], ["d"]]
    assert [g.label for g in groups] == ["grpo() lr=0.1", "capo()", "grpo() lr=0.2"]


def test_the_interval_of_constant_changes_is_that_constant():
    assert paired_interval(np.full((3, 10), 0.5)) == pytest.approx((0.5, 0.5))


def test_the_interval_of_one_seed_is_that_of_a_proportion():
    """40 of 100 problems turn from wrong to right: mean 0.4, standard error sqrt(0.4 * 0.6 / 100) = 0.049."""
    low, high = paired_interval(np.array([[1.0] * 40 + [0.0] * 60]))
    assert low == pytest.approx(0.4 - 1.96 * 0.049, abs=0.011)
    assert high == pytest.approx(0.4 + 1.96 * 0.049, abs=0.011)


def test_seeds_that_disagree_widen_the_interval():
    """One seed gains on every problem and one on none: only which seeds are drawn matters."""
    assert paired_interval(np.array([[1.0] * 50, [0.0] * 50])) == (0.0, 1.0)


def test_before_and_after_on_equal_tokens(tmp_path):
    """The second run was evaluated up to 250 tokens only, so the first is read at 200, not at 300."""
    long = make(tmp_path / "a", evals=[(0, [0, 0, 0, 1]), (200, [1, 0, 0, 1]), (300, [1, 1, 1, 1])])
    short = make(tmp_path / "b", credit="capo()", evals=[(0, [0, 0, 0, 1]), (250, [1, 1, 0, 1])])
    begun = make(tmp_path / "c", credit="gae()", evals=[(0, [0, 0, 0, 1])])
    groups = group_runs([long, short, begun])
    tokens = budget(groups)
    assert tokens == 250
    first, second, third = (before_after(g, tokens) for g in groups)
    assert third["before"] is None
    assert (first["before"], first["after"], first["difference"], first["tokens"]) == (0.25, 0.5, 0.25, 200)
    assert (second["before"], second["after"], second["problems"]) == (0.25, 0.75, 4)
    assert first["interval"][0] <= 0.25 <= first["interval"][1]


@pytest.mark.parametrize(("last", "after"), [(105, 1.0), (106, 0.5)])
def test_a_last_evaluation_up_to_5_percent_beyond_the_budget_counts(tmp_path, last, after):
    evals = [(0, [0] * 4), (100, [1, 1, 0, 0]), (last, [1] * 4)]
    groups = group_runs([make(tmp_path / "a", evals=evals)])
    assert before_after(groups[0], 100)["after"] == after


def test_without_a_list_of_answers_there_is_no_interval(tmp_path):
    path = make(tmp_path / "a")
    for step, accuracy in enumerate([0.25, 0.5]):
        RunWriter.resume(path).metrics(step, "eval", tokens=step, accuracy=accuracy)
    answer = before_after(group_runs([path])[0], 10)
    assert (answer["difference"], answer["interval"]) == (0.25, None)


def test_a_run_without_evaluations(tmp_path):
    groups = group_runs([make(tmp_path / "a", rewards=[(10, 0.5)])])
    assert budget(groups) is None
    assert before_after(groups[0], float("inf"))["after"] is None
    assert curve(groups[0].runs, "eval", "accuracy") is None


def test_the_curve_is_the_mean_over_seeds_where_all_of_them_are(tmp_path):
    """At 150 tokens one seed lies at 0.25 (halfway from 0 to 0.5), the other at 0.75: mean 0.5, interval [0.25, 0.75]."""
    paths = [
        make(tmp_path / "a", seed=0, rewards=[(100, 0.0), (200, 0.5)]),
        make(tmp_path / "b", seed=1, rewards=[(50, 0.75), (150, 0.75)]),
    ]
    line = curve(group_runs(paths)[0].runs, "train", "reward")
    assert (line.tokens[0], line.tokens[-1]) == (100, 150)
    assert line.mean[-1] == pytest.approx(0.5)
    assert (line.low[-1], line.high[-1]) == pytest.approx((0.25, 0.75))


def test_one_seed_has_no_interval_and_unmeasured_numbers_are_left_out(tmp_path):
    path = make(tmp_path / "a", rewards=[(100, 0.0), (200, float("nan")), (300, 1.0)])
    line = curve(group_runs([path])[0].runs, "train", "reward")
    assert line.tokens.tolist() == [100, 300]
    assert line.low is None


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def four_runs(tmp_path):
    from apportion.credit import capo, grpo

    return [
        make(
            tmp_path / f"{name}-{seed}",
            credit=repr(method()),
            seed=seed,
            evals=[(0, [0] * 8), (100, [1] * (3 + seed) + [0] * (5 - seed))],
            rewards=[(50, 0.25), (100, 0.5)],
        )
        for name, method in (("grpo", grpo), ("capo", capo))
        for seed in (0, 1)
    ]


def test_compare_prints_a_table_and_draws_curves(apportion, four_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = apportion("compare", *four_runs)
    assert told.code == 0
    lines = told.out.splitlines()
    assert lines[1].split()[:6] == ["grpo", "2", "100", "0.000", "0.438", "+0.438"]  # (3/8 + 4/8) / 2
    assert lines[2].split()[0] == "capo"
    assert "within 100 sampled tokens (up to 5% more)" in told.out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_as_json(apportion, four_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = json.loads(apportion("compare", *four_runs, "--json").out)
    assert answer["tokens"] == 100
    grpo = answer["groups"][0]
    assert grpo["label"] == "grpo"
    assert grpo["seeds"] == [0, 1]
    assert grpo["difference"] == 0.4375
    assert grpo["curves"]["reward"]["mean"][-1] == 0.5
    assert not (tmp_path / "compare.png").exists()
    apportion("compare", *four_runs, "--json", "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


def test_compare_with_an_unknown_kind_of_picture(apportion, four_runs, tmp_path):
    told = apportion("compare", four_runs[0], "--out", tmp_path / "x.nope")
    assert told.code == 2
    assert "x.nope" in told.err
    assert told.err.count("\n") == 1
