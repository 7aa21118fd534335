"""When a run is stopped, what it says, and that it stays stopped or goes on when it is resumed."""

import io
import math
from contextlib import nullcontext

import pytest
import torch

from apportion.record import Run
from apportion.train import CausalPolicy, run
from apportion.train.evaluating import evaluate
from apportion.train.report import _line
from apportion.train.watching import Watch


def watched(config, rewards=(), lengths=None, entropies=None, **options):
    watch = Watch(config(**options))
    for i, reward in enumerate(rewards):
        numbers = {"reward": reward, "length": 20.0 if lengths is None else lengths[i]}
        watch.sees(numbers if entropies is None else {**numbers, "entropy": entropies[i]})
    return watch


def after(config, accuracies, **options):
    watch = Watch(config(**options))
    return watch, [watch.saw(10 * i, {"accuracy": a}) for i, a in enumerate(accuracies)]


# ---- the best evaluation, and patience ------------------------------------------------------------------------------


def test_the_best_is_the_highest_accuracy_and_a_tie_keeps_the_earlier(config):
    watch, said = after(config, [0.2, 0.3, 0.3, 0.1, 0.4])
    assert said == ["best", "best", None, None, "best"]
    assert (watch.best, watch.best_step) == (0.4, 40)
    assert watch.reason is None


@pytest.mark.parametrize(
    ("accuracies", "stops"), [([0.3, 0.2], False), ([0.3, 0.2, 0.3], True), ([0.3, 0.2, 0.4], False)]
)
def test_patience_counts_evaluations_without_a_new_best(config, accuracies, stops):
    watch, _ = after(config, accuracies, patience=2)
    assert (watch.reason is not None) == stops


def test_the_reason_of_patience(config):
    watch, _ = after(config, [0.3, 0.2, 0.3], patience=2)
    assert watch.reason == (
        "no progress: 2 evaluations (patience 2) were no better than the accuracy 0.300 of step 0. keep_best would have "
        "kept its model. To go on all the same, resume with another patience (0 = never stop)."
    )
    kept, _ = after(config, [0.3, 0.2, 0.3], patience=2, keep_best=True)
    assert "RUN/best holds its model" in kept.reason


# ---- collapse -------------------------------------------------------------------------------------------------------


def test_a_reward_below_a_share_of_its_best(config):
    """Best five: 0.8. Then 0, 0: mean of five (0.8 * 3) / 5 = 0.48 and, after a third 0, 0.32 < 0.5 * 0.8 = 0.4."""
    rewards = [0.2] * 5 + [0.8] * 5 + [0.0, 0.0]
    assert watched(config, rewards, collapse_reward=0.5).reason is None
    assert watched(config, [*rewards, 0.0]).reason is None
    assert watched(config, [*rewards, 0.0], collapse_reward=0.5).reason == (
        "the reward collapsed: its mean over 5 steps is 0.32, below 0.5 of its best, 0.8 (collapse_reward). Lower lr, or "
        "raise kl_coef. To go on all the same, resume with another collapse_reward (0 = never stop)."
    )


def test_nothing_is_said_before_there_are_five_steps(config):
    assert watched(config, [0.9, 0.0, 0.0, 0.0], collapse_reward=0.9).reason is None


def test_rewards_that_were_never_above_0_have_no_share(config):
    assert watched(config, [-0.2] * 5 + [-9.0] * 5, collapse_reward=0.5).reason is None


def test_an_entropy_below_a_share_of_the_first_fives(config):
    """First five: 2 nats. Falling to 0.1: mean of five (2 * 2 + 0.3) / 5 = 0.86, then (2 + 0.4) / 5 = 0.48 < 0.5."""
    entropies = [2.0] * 5 + [0.1] * 4
    assert watched(config, [0.5] * 8, entropies=entropies[:8], collapse_entropy=0.25).reason is None
    reason = watched(config, [0.5] * 9, entropies=entropies, collapse_entropy=0.25).reason
    assert reason.startswith(
        "the entropy collapsed: its mean over 5 steps is 0.48, below 0.25 of that of the first 5 steps, 2 (collapse_entropy)."
        " The policy explores no more"
    )


def test_a_rising_entropy_is_none_of_its_business(config):
    assert watched(config, [0.5] * 10, entropies=[0.1] * 5 + [9.0] * 5, collapse_entropy=0.5).reason is None


@pytest.mark.parametrize(
    ("then", "told"),
    [
        (
            9.0,
            "its mean over 5 steps is 9, below 0.5 of that of the first 5 steps, 20 (collapse_length). See whether a short",
        ),
        (
            41.0,
            "its mean over 5 steps is 41, above 1/0.5 of that of the first 5 steps, 20 (collapse_length). See whether a long",
        ),
        (11.0, None),
        (39.0, None),
    ],
)
def test_a_length_that_falls_below_the_share_or_rises_above_its_inverse(config, then, told):
    reason = watched(config, [0.5] * 10, lengths=[20.0] * 5 + [then] * 5, collapse_length=0.5).reason
    assert (reason is None) if told is None else told in reason


def test_steps_that_measured_nothing_are_left_out(config):
    """NaN between: the five are 0.8 0.8 0 0 0."""
    rewards = [0.8] * 5 + [0.0, math.nan, 0.0, math.nan, math.nan]
    assert watched(config, rewards, collapse_reward=0.5).reason is None
    assert "is 0.32, below" in watched(config, [*rewards, 0.0], collapse_reward=0.5).reason


# ---- remembered -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_it_and_the_options_of_today_decide(config):
    options = {"collapse_reward": 0.5, "patience": 2}
    watch = watched(config, [0.8] * 5 + [0.0] * 3, **options)
    for step, accuracy in enumerate([0.4, 0.3]):
        watch.saw(step, {"accuracy": accuracy})
    file = io.BytesIO()
    torch.save(watch.state_dict(), file)
    for changes, stopped in (({}, True), ({"collapse_reward": 0.3}, False), ({"collapse_reward": 0.0}, False)):
        file.seek(0)
        again = Watch(config(**{**options, **changes}))
        again.load_state_dict(torch.load(file, weights_only=True))
        assert (again.reason is not None) == stopped
        assert again.state_dict() == watch.state_dict()
    again.saw(2, {"accuracy": 0.4})
    assert "patience 2" in again.reason
    assert watch.waited == 1  # the states are copies


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_a_run_without_progress_stops_stays_stopped_and_goes_on_when_told(config, digits):
    """Learning rate 0: every evaluation is that of step 0, so that patience 2 ends the run after step 2 of 6."""
    options = {"task": digits, "steps": 6, "lr": 1e-30, "patience": 2}
    folder = run(config(**options))
    assert Run(folder).steps() == [1, 2]
    (stop,) = Run(folder).metrics("stop")
    assert stop["step"] == 2
    assert "2 evaluations (patience 2)" in stop["reason"]
    assert _line(2, "stop", stop, config()).startswith("step    2  stopped: no progress")
    run(config(**options), resume=True)
    run(config(**{**options, "steps": 9}), resume=True)
    assert Run(folder).steps() == [1, 2]
    run(config(**{**options, "patience": 3}), resume=True)
    assert Run(folder).steps() == [1, 2, 3]
    run(config(**{**options, "patience": 0}), resume=True)
    assert Run(folder).steps() == [1, 2, 3, 4, 5, 6]


class Spoilt:
    """Pays until step 5, and nothing afterwards."""

    splitter = judge = None
    name = "spoilt"

    def __init__(self, task, paid):
        self.train, self.test, self.left = task.train, task.test, paid

    def __repr__(self):
        return "spoilt"

    def verify(self, problem, text):
        self.left -= 1
        return float(self.left >= 0)


def test_a_run_whose_reward_collapses_stops(config, task):
    """16 rewards a step: means of five are 1, .8, .6, .4 < .5 at step 8."""
    folder = run(config(task=Spoilt(task, 5 * 16), steps=12, eval_every=0, collapse_reward=0.5))
    assert Run(folder).steps()[-1] == 8
    assert "is 0.4, below 0.5 of its best, 1 (collapse_reward)" in Run(folder).metrics("stop")[0]["reason"]


def test_a_run_whose_entropy_collapses_stops(config, digits):
    """A large rate on a reward for digits makes a policy that is sure of its digits."""
    options = {"task": digits, "steps": 30, "lr": 1e-2, "max_new_tokens": 4, "eval_every": 0, "save_every": 0}
    folder = run(config(**options, collapse_entropy=0.5))
    last = Run(folder).metrics("stop")[0]
    assert "the entropy collapsed" in last["reason"]
    entropies = [m["entropy"] for m in Run(folder).metrics("train")]
    assert sum(entropies[-5:]) < 0.5 * sum(entropies[:5])
    assert len(entropies) < 30


def test_the_best_model_is_kept(config, digits):
    """The first two steps make it worse, so the best is the model they began with."""
    settings = config(task=digits, steps=2, lr=1e-2, keep_best=True, save_model=True)
    folder = run(settings)
    accuracies = [m["accuracy"] for m in Run(folder).metrics("eval")]
    assert accuracies[-1] < max(accuracies)
    for name, accuracy in (("best", max(accuracies)), ("model", accuracies[-1])):
        policy = CausalPolicy.load(str(folder / name), precision="float32")
        numbers = evaluate(settings, policy.sample, lambda title, total: nullcontext(lambda n: None))
        assert numbers["accuracy"] == accuracy
