"""Evaluations: numbers worked by hand from written responses, the settings they sample with, and a tiny model."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from apportion import Rollouts, Signal
from apportion.record import Run
from apportion.tasks import BasicTask, Problem
from apportion.train import run
from apportion.train.collecting import sampler_of
from apportion.train.evaluating import evaluate
from apportion.train.policy import Request
from apportion.train.report import evaluated
from apportion.train.rewards import Reward
from apportion.train.sampler import Sampling
from apportion.train.schedule import generator_for

LIMIT = 24


def number_task(verify=None):
    """Two problems to train on, and two held out whose answers are 7 and 12."""
    made = [Problem(f"p{a}", f"Which number is {a}?", f"Say {a}:", str(a)) for a in (1, 2, 7, 12)]
    return BasicTask(
        "numbers", made[:2], made[2:], verify or (lambda problem, text: float(problem.answer in text.split()))
    )


class Script:
    """Answers problem 7 and problem 12 with written texts; a text that ends in "..." was cut by the limit."""

    def __init__(self, sampled, greedy=("", "")):
        self.sampled, self.greedy, self.asked = sampled, greedy, []

    def __call__(self, requests, sampling, *, generator, statistics=(), on_rows=None):
        self.asked.append((requests, sampling, torch.rand(1, generator=generator).item()))
        written = self.sampled if sampling.temperature else [[text] for text in self.greedy]
        rows = [(g, text) for g, texts in enumerate(written) for text in texts]
        assert [len(texts) for texts in written] == [r.count for r in requests]
        lengths = [max(1, len(text.split())) for _, text in rows]
        rollouts = Rollouts.from_lists(
            [[0] * (1 + n) for n in lengths],
            [g for g, _ in rows],
            action_mask=[[False] + [True] * n for n in lengths],
            truncated=[text.endswith("...") for _, text in rows],
            meta={"text": [text for _, text in rows], "prompt_id": [requests[g].problem.id for g, _ in rows]},
        )
        entropy = torch.where(rollouts.action_mask, 0.5, torch.nan)
        return rollouts.with_signals(entropy=Signal(entropy, "token"))


def numbers_of(settings, script):
    return evaluate(settings, script, lambda title, total: nullcontext(lambda n: None))


@pytest.fixture
def settings(config):
    return config(task=number_task(), eval_samples=4, max_new_tokens=LIMIT)


def test_every_number_by_hand(settings):
    """Problem 7: right, right, 3, 4. Problem 12: right, then 5 three times. Greedy: right, wrong.

    pass@2: 1 - C(2,2)/C(4,2) = 5/6 and 1 - C(3,2)/C(4,2) = 1/2. pass@4: 1 and 1.
    majority@4: the two 7's win; the three 5's win. majority@2 is the accuracy: two votes agree or tie.
    """
    script = Script([["7", "it is 7", "3", "is it 4"], ["12", "5", "5", "5 five 5"]], ["7", "5"])
    found = numbers_of(replace(settings, eval_greedy=True), script)
    assert found["correct"] == [0.5, 0.25]
    assert found["accuracy"] == pytest.approx(3 / 8)
    assert found["pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert found["pass@4"] == 1.0
    assert found["majority@2"] == pytest.approx(3 / 8)
    assert found["majority@4"] == 0.5
    assert found["greedy"] == 0.5
    assert (found["n"], found["unmeasured"], found["truncated"], found["entropy"]) == (2, 0, 0.0, 0.5)
    assert found["length"] == pytest.approx((1 + 3 + 1 + 3 + 1 + 1 + 1 + 3) / 8)
    assert found["intervals"].keys() == {"accuracy", "pass@2", "pass@4", "majority@2", "majority@4", "greedy"}
    assert found["intervals"]["accuracy"] == pytest.approx([0.25, 0.5])  # both problems, twice the one or the other
    assert found["intervals"]["greedy"] == pytest.approx([0.0945, 0.9055], abs=1e-4)  # Wilson, 1 of 2


def test_of_the_runs_sampling_only_the_limits_apply_and_random_numbers_are_the_same(settings):
    run_like = replace(settings, top_p=0.5, top_k=3, min_new_tokens=2, stop=("\n",), temperature=0.7, eval_greedy=True)
    script = Script([["7"] * 4, ["12"] * 4], ["7", "12"])
    assert numbers_of(run_like, script) == numbers_of(run_like, script)
    (_, sampled, first), (_, greedy, _), (_, _, again), _ = script.asked
    assert sampled == Sampling(max_new_tokens=LIMIT, temperature=1.0, stop=("\n",))
    assert greedy == Sampling(max_new_tokens=LIMIT, temperature=0.0, stop=("\n",))
    assert first == again == torch.rand(1, generator=generator_for(settings.seed, 0)).item()


@pytest.mark.parametrize(("samples", "reported"), [(1, []), (2, [2]), (3, [2, 3]), (5, [2, 4, 5]), (8, [2, 4, 8])])
def test_pass_at_powers_of_two_and_at_all(settings, samples, reported):
    found = numbers_of(replace(settings, eval_samples=samples), Script([["7"] * samples, ["0"] * samples]))
    assert [int(name.removeprefix("pass@")) for name in found if name.startswith("pass@")] == reported
    assert found["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("truncated_reward", "accuracy", "majority"), [(0.0, 1 / 8, 0.5), (-1.0, 1 / 8, 0.5), (None, 0.5, 0.5)]
)
def test_a_response_that_was_cut_is_wrong_and_does_not_vote_unless_the_verifier_decides(
    settings, truncated_reward, accuracy, majority
):
    """Problem 7: one answer, three cut. As cut they count 0, a penalty of training included, and 7 is the only vote."""
    script = Script([["7", "7 ...", "7 and ...", "or 7 ..."], ["0", "0", "0", "0"]])
    found = numbers_of(replace(settings, truncated_reward=truncated_reward), script)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["majority@4"] == majority
    assert found["truncated"] == 3 / 8


def test_the_task_may_say_what_an_answer_is(settings):
    """By their last numbers "6 + 1" and "7" differ; the task adds them up, so that 7 has two votes of four."""
    texts = [["7", "6 + 1", "3", "4"], ["0"] * 4]

    def added(text):
        return sum(int(word) for word in text.split() if word.isdigit())

    task = number_task(verify=lambda problem, text: float(added(text) == int(problem.answer)))
    adds = replace(task, answer_of=added)
    assert numbers_of(replace(settings, task=task), Script(texts))["majority@4"] == pytest.approx(2 / 4 / 2)
    assert numbers_of(replace(settings, task=adds), Script(texts))["majority@4"] == pytest.approx(1 / 2)


def test_what_cannot_be_measured_counts_as_wrong_and_is_counted(settings):
    task = number_task(verify=lambda problem, text: math.nan if text == "?" else float(text == problem.answer))
    script = Script([["7", "?", "?", "7"], ["12"] * 4], ["?", "12"])
    found = numbers_of(replace(settings, task=task, eval_greedy=True), script)
    assert (found["accuracy"], found["greedy"], found["unmeasured"]) == (0.75, 0.5, 3)


def test_a_verifier_that_fails_says_why(settings):
    def breaks(problem, text):
        raise KeyError("no such column")

    found = numbers_of(replace(settings, task=number_task(verify=breaks)), Script([["7"] * 4, ["12"] * 4]))
    assert (found["accuracy"], found["unmeasured"]) == (0.0, 8)
    assert "no such column" in found["unmeasured_reason"]
    assert '  8 unmeasured ("verifier: raised KeyError' in evaluated(found)


@pytest.mark.parametrize(("task_weight", "accuracy"), [(1.0, 0.5), (0.5, 0.5), (0.0, 0.3)])
def test_other_rewards_count_only_where_there_is_no_verifier_to_ask(settings, task_weight, accuracy):
    """The reward is 0.1 a letter: 0.3 for "abc", right or wrong."""
    letters = Reward(lambda problem, text: len(text), weight=0.1, name="letters")
    task = number_task(verify=lambda problem, text: float(problem.answer == "7"))
    script = Script([["abc"] * 4, ["abc"] * 4])
    found = numbers_of(replace(settings, task=task, rewards=(letters,), task_weight=task_weight), script)
    assert found["accuracy"] == pytest.approx(accuracy)


# ---- a model ----------------------------------------------------------------------------------------------------------


def sampled(config, policy):
    return evaluate(config, sampler_of(config, policy), lambda title, total: nullcontext(lambda n: None))


def test_one_sample_gives_exactly_the_outcomes_of_one_plain_draw(config, digits, policy):
    settings = config(task=digits)
    plain = policy.sample(
        [Request(p, 1) for p in digits.test[:8]],
        Sampling(max_new_tokens=settings.max_new_tokens, temperature=1.0),
        generator=generator_for(settings.seed, 0),
    )
    right = [digits.verify(None, text) for text in plain.meta["text"]]
    found = sampled(settings, policy)
    assert found["correct"] == right
    assert found["accuracy"] == sum(right) / 8
    assert 0 < found["accuracy"] < 1
    assert not [name for name in found if "@" in name or name == "greedy"]
    assert 0 < found["entropy"] <= math.log(len(policy.tokenizer)) + 1e-6


def test_greedy_is_what_temperature_0_gives(config, digits, policy):
    beside = sampled(config(task=digits, eval_greedy=True), policy)
    alone = sampled(config(task=digits, eval_temperature=0.0), policy)
    assert beside["greedy"] == alone["accuracy"] != beside["accuracy"]


def test_a_run_records_and_tells_them(config, digits):
    folder = run(config(task=digits, eval_samples=4, eval_greedy=True, steps=1))
    first, last = Run(folder).metrics("eval")
    for line in (first, last):
        assert line["accuracy"] == pytest.approx(sum(line["correct"]) / 8)
        assert line["accuracy"] <= line["pass@2"] <= line["pass@4"] <= 1
        low, high = line["intervals"]["accuracy"]
        assert low <= line["accuracy"] <= high
    told = evaluated(last)
    assert told.startswith(f"accuracy {last['accuracy']:.3f} ({low:.3f} to {high:.3f}) on 8 problems  pass@2 ")
    assert f"  majority@4 {last['majority@4']:.3f}  greedy {last['greedy']:.3f}  length {last['length']:.1f}" in told
