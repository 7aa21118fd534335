"""Rewards of steps and turns, and the methods that read them."""

import asyncio
import math
import time

import pytest

from apportion import gigpo, pure
from apportion.signals import lines
from apportion.tasks import BasicTask
from apportion.train import RewardFailed, StepReward
from apportion.train.measuring import measures_of
from apportion.types import Rollouts, Spans

PIECES = [["7+5=?\n", "7+5", "=12\n", "12", "<|im_end|>"], ["7+5=?\n", "13", "<|im_end|>"], ["7+5=?\n", "<|im_end|>"]]


@pytest.fixture
def rollouts():
    """Two steps, one step, none."""
    made = Rollouts.from_lists(
        [list(range(1, len(p) + 1)) for p in PIECES],
        [0, 0, 0],
        outcome=[1.0, 0.0, 0.0],
        action_mask=[[False] + [True] * (len(p) - 1) for p in PIECES],
        meta={"pieces": PIECES, "prompt_id": ["p"] * 3, "question": ["7+5=?"] * 3, "answer": ["12"] * 3},
    )
    return made.with_spans(step=lines()(made))


def right(problem, texts):
    return [1.0 if problem.answer in text else -1.0 for text in texts]


async def right_async(problem, texts):
    await asyncio.sleep(0.01)
    return right(problem, texts)


@pytest.mark.parametrize("function", [right, right_async])
def test_every_step_gets_its_reward(rollouts, function):
    measure = StepReward(function)
    assert measure.provides == ("signals.process",)
    assert measure.requires == ("spans.step",)
    found = measure.measure(rollouts)["process"]
    assert (found.values.tolist(), found.unit) == ([1.0, 1.0, -1.0], "step")


def test_the_function_reads_the_steps_of_one_response_in_order(rollouts):
    seen = []

    def read(problem, texts):
        seen.append((problem.id, problem.question, problem.answer, texts))
        return [0.0] * len(texts)

    StepReward(read).measure(rollouts)
    assert seen == [("p", "7+5=?", "12", ["7+5=12\n", "12"]), ("p", "7+5=?", "12", ["13"])]


def test_pure_reads_it(rollouts):
    measured = rollouts.with_signals(**StepReward(right).measure(rollouts))
    credit = pure()(measured)
    assert credit.mask[0, 1:].all()
    assert credit.advantages[0, 1] > credit.advantages[1, 1]


def test_over_turns_it_is_what_gigpo_reads(rollouts):
    turns = Spans.from_lists([[(1, 3), (3, 5)], [(1, 3)], [(1, 2)]])
    with_turns = rollouts.with_spans(turn=Spans(turns.row, turns.start, turns.stop, turns.index, state=turns.index))
    measure = StepReward(right, over="turn")
    assert measure.provides == ("signals.turn_reward",)
    found = with_turns.with_signals(**measure.measure(with_turns))
    assert found.signals["turn_reward"].values.tolist() == [1.0, 1.0, -1.0, -1.0]
    credit = gigpo()(found)
    assert credit.advantages[0, 1] > 0 > credit.advantages[1, 1]


def test_a_step_that_was_not_measured_is_nan(rollouts):
    found = StepReward(lambda p, texts: [None, math.nan][: len(texts)]).measure(rollouts)["process"].values
    assert found.isnan().all()


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda p, texts: [1.0], r"gave 1 numbers for 2 steps"),
        (lambda p, texts: 1.0, r"gave 1.0 instead of one number per step"),
        (lambda p, texts: [math.inf] * len(texts), r"is inf on a step"),
        (lambda p, texts: 1 / 0, r"raised ZeroDivisionError: division by zero \(.*test_step_reward.py:\d+\)"),
        (lambda p, texts: time.sleep(1), r"took longer than 0.4 s"),
    ],
)
def test_what_fails_is_named_or_left_out(rollouts, function, what):
    with pytest.raises(RewardFailed, match=rf"the reward process {what}, on row 0, problem p, text '7\+5=12\\n\\n12'"):
        StepReward(function, seconds=0.4).measure(rollouts)
    found = StepReward(function, seconds=0.4, unmeasured="skip").measure(rollouts)["process"].values
    assert found[:2].isnan().all()


def test_it_supplies_what_a_method_requires(config, task):
    plain = BasicTask("t", task.train, task.test, lambda p, t: 1.0, splitter=lines())
    measure = StepReward(right)
    assert measures_of(config(task=plain, credit=pure(), measures=(measure,))) == [measure]
    with pytest.raises(ValueError, match=r"needs signals\.process"):
        measures_of(config(task=plain, credit=pure()))


def test_other_spans_need_a_name():
    with pytest.raises(ValueError, match="a StepReward over 'macro' needs a name for its signal"):
        StepReward(right, over="macro")
    assert StepReward(right, over="macro", name="own").provides == ("signals.own",)


def test_a_function_by_name_runs_in_a_process(rollouts, tmp_path, monkeypatch):
    (tmp_path / "own_steps.py").write_text(
        "def right(problem, texts):\n    return [float(problem.answer in t) for t in texts]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    measure = StepReward("own_steps:right")
    assert repr(measure) == "StepReward(own_steps:right, over='step', name='process')"
    measure.check()
    assert measure.measure(rollouts)["process"].values.tolist() == [1.0, 1.0, 0.0]
    measure.function.worker.close()
