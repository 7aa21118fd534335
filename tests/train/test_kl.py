"""The penalty in the reward and the coefficient that is steered to a target, by hand."""

import math

import pytest
import torch

from apportion import Rollouts, Signal, group_relative, returns_to_go
from apportion.train.kl import penalised, reference_kl, steered
from apportion.train.schedule import rate

F64 = torch.float64
NAN = float("nan")


@pytest.mark.parametrize(
    ("kl", "count", "expected"),
    [
        (0.11, 1000, 0.0505),  # e = .1, gain .1
        (0.09, 1000, 0.0495),
        (0.5, 1000, 0.051),  # e is 4, cut at .2
        (-0.3, 1000, 0.049),  # e is -4, cut at -.2
        (0.1, 1000, 0.05),
        (0.5, 10000, 0.06),  # a whole horizon: a fifth
        (0.0, 100000, 0.04),  # ten horizons in one step: no more than a fifth
        (0.0, 0, 0.05),
        (NAN, 1000, 0.05),
    ],
)
def test_a_step_of_the_controller(kl, count, expected):
    assert steered(0.05, kl, target=0.1, horizon=10000, count=count) == pytest.approx(expected, rel=1e-12)
    assert steered(0.0, kl, target=0.1, horizon=10000, count=count) == 0


def test_it_brings_the_divergence_to_the_target():
    """Where the divergence is .01 / coef, the coefficient that gives .1 is .1; from .01 and from 1 it gets there."""
    for coef in (0.01, 1.0):
        for _ in range(200):
            coef = steered(coef, 0.01 / coef, target=0.1, horizon=100, count=64)
        assert coef == pytest.approx(0.1, rel=1e-3)


def test_a_target_of_nothing_is_refused():
    for target, horizon in ((0.0, 100), (-1.0, 100), (0.1, 0)):
        with pytest.raises(ValueError, match="kl_target and kl_horizon above 0; got"):
            steered(0.05, 0.1, target=target, horizon=horizon, count=1)


def batch(**more):
    """Two responses of one group, the first in two rows with tool output; ln pi - ln ref = .5, 1 | -.25 and 2."""
    return Rollouts.from_lists(
        [[1, 2, 3], [1], [4]],
        [0, 0, 0],
        trajectories=["a", "a", "b"],
        row_index=[0, 1, 0],
        action_mask=[[True, False, True], [True], [True]],
        outcome=[1.0, 0.0],
        old_logprobs=[[-1.0, NAN, -1.0], [-1.0], [-1.0]],
        ref_logprobs=[[-1.5, NAN, -2.0], [-0.75], [-3.0]],
        dtype=F64,
    ).replace(**more)


def test_mean_over_the_actions():
    assert reference_kl(batch()) == pytest.approx((0.5 + 1 - 0.25 + 2) / 4)
    sampled = batch(old_logprobs=None, logprobs=batch().old_logprobs + 1)  # old_logprobs first, else the sampler's
    assert reference_kl(sampled) == pytest.approx(3.25 / 4 + 1)
    assert reference_kl(batch(logprobs=batch().old_logprobs + 1)) == pytest.approx(3.25 / 4)
    assert math.isnan(reference_kl(batch(action_mask=torch.zeros(3, 3, dtype=torch.bool))))


def test_taken_off_the_outcome():
    """1 - .1 * 1.25 and 0 - .1 * 2; what the verifier gave stays beside it, and groups compare what is left."""
    made = penalised(batch(), 0.1)
    torch.testing.assert_close(made.signals["outcome"].values, torch.tensor([0.875, -0.2], dtype=F64))
    assert made.signals["score"].values.tolist() == [1.0, 0.0]
    advantages = group_relative(scale=None)(made).advantages
    assert advantages[0, 0] == pytest.approx((0.875 + 0.2) / 2)
    assert torch.equal(penalised(batch(), 0.0).signals["outcome"].values, batch().signals["outcome"].values)
    unmeasured = batch().with_signals(outcome=Signal(torch.tensor([NAN, 0.0]), "trajectory"))
    assert penalised(unmeasured, 0.1).signals["outcome"].values.isnan().tolist() == [True, False]


def test_at_the_first_action_it_is_the_penalty_of_every_token():
    """An undiscounted return with the penalty on each token begins with what the whole response pays."""
    r = batch(logprobs=batch().old_logprobs)
    inside, whole = returns_to_go(r, kl_coef=0.1).advantages, returns_to_go(penalised(r, 0.1)).advantages
    torch.testing.assert_close(inside[[0, 2], 0], whole[[0, 2], 0])


def test_what_it_needs():
    with pytest.raises(ValueError, match=r"needs rollouts\.ref_logprobs, which this batch lacks"):
        reference_kl(batch(ref_logprobs=None))
    with pytest.raises(ValueError, match=r"needs rollouts\.logprobs, which this batch lacks"):
        penalised(batch(old_logprobs=None), 0.1)
    per_token = batch().with_signals(outcome=Signal(torch.zeros(3, 3), "token"))
    with pytest.raises(ValueError, match=r"one number per trajectory; got unit 'token' and shape \[3, 3\]"):
        penalised(per_token, 0.1)


# ---- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.775, 0.55, 0.325, 0.1]),  # 1 - .9 p, p = 0, 1/4 ... 1
        ("cosine", [0.5, 1, 0.868198, 0.55, 0.231802, 0.1]),  # .1 + .45 (1 + cos pi p), cos pi/4 = .707107
    ],
)
def test_rates(schedule, expected):
    got = [rate(step, 6, ramp=2, schedule=schedule, final=0.1) for step in range(1, 7)]
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_short_runs(schedule):
    """Without a ramp the first step is at the peak; a run within its ramp never falls; one step is a step."""
    assert [rate(s, 2, ramp=0, schedule=schedule, final=0.0) for s in (1, 2)] == pytest.approx([1.0, 0.0], abs=1e-15)
    assert [rate(s, 2, ramp=4, schedule=schedule, final=0.0) for s in (1, 2)] == [0.25, 0.5]
    assert [rate(s, 4, ramp=4, schedule=schedule, final=0.0) for s in (3, 4)] == [0.75, 1.0]
    assert rate(1, 1, ramp=0, schedule=schedule, final=0.0) == 1.0
