import pytest
import torch

from apportion import Rollouts, Signal, Spans, chain, gae, whiten

DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}


def one(n: int, values, outcome=1.0, dtype=torch.float64, **more) -> Rollouts:
    return Rollouts.from_lists([[5] * n], [0], outcome=[outcome], values=[values], dtype=dtype, **more)


def close(got, want, dtype=torch.float64):
    torch.testing.assert_close(got, torch.tensor([want], dtype=dtype), **DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_reft(dtype):
    """Terminal reward 0.1 (a wrong answer was extracted), penalty 0.05."""
    r = one(
        3,
        [0.3, 0.35, 0.6],
        0.1,
        dtype,
        logprobs=[[-0.4, -0.9, -0.3]],
        ref_logprobs=[[-0.5, -0.7, -0.6]],
    )
    credit = gae(r, kl_coef=0.05, lam=0.95)
    close(credit.advantages, [-0.172787, -0.229250, -0.515000], dtype)
    close(credit.returns, [0.127213, 0.120750, 0.085000], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_ppo_with_whitening(dtype):
    r = one(
        4,
        [0.4, 0.5, 0.9, 1.2],
        1.5,
        dtype,
        logprobs=[[-0.5, -1.0, -0.2, -0.8]],
        ref_logprobs=[[-0.6, -0.8, -0.2, -1.0]],
    )
    credit = chain(gae(kl_coef=0.05, lam=0.95), whiten(eps=1e-6))(r)
    close(gae(r, kl_coef=0.05).advantages, [1.003889, 0.956725, 0.575500, 0.290000], dtype)
    close(credit.advantages, [0.881106, 0.741356, -0.388249, -1.234212], dtype)
    close(credit.returns, [1.403889, 1.456725, 1.475500, 1.490000], dtype)


def test_positions_that_are_no_actions_are_skipped():
    """Reward 1 at the end, an observation with V = 9 in between: 0.5, then 0.475, 0.45125 and 0.4286875 of 0.95."""
    mask = [[True, True, False, True, True]]
    r = one(5, [0.5, 0.5, 9.0, 0.5, 0.5], action_mask=mask)
    close(gae(r).advantages, [0.428688, 0.451250, 0.0, 0.475000, 0.500000])
    close(gae(r, gamma=0.9, lam=1.0).returns, [0.729, 0.81, 0.0, 0.9, 1.0])


def test_undiscounted_is_rewards_to_come_minus_value():
    r = one(3, [0.1, 0.2, 0.3])
    close(gae(r, lam=1.0).advantages, [0.9, 0.8, 0.7])
    close(gae(one(3, [0.0] * 3), lam=1.0).advantages, [1.0] * 3)
    close(gae(r, lam=0.0).advantages, [0.1, 0.1, 0.7])


def test_bootstrap_only_after_a_truncated_row():
    r = one(1, [0.5], 0.0, bootstrap=[2.0], truncated=[True])
    close(gae(r, gamma=0.5).advantages, [0.5])
    close(gae(r.replace(truncated=torch.tensor([False])), gamma=0.5).advantages, [-0.5])
    with pytest.raises(ValueError, match=r"gae needs rollouts\.truncated to know where rollouts\.bootstrap applies"):
        gae(r.replace(truncated=None))


def test_a_trajectory_goes_on_in_its_next_row_whatever_the_order():
    """Two rows, the later one first in the batch: V 0.25 then 0.5, reward 1 on the last action of the later row."""
    r = Rollouts.from_lists(
        [[5], [5, 5]],
        [0, 0],
        trajectories=["a", "a"],
        row_index=[1, 0],
        outcome=[1],
        values=[[0.5], [0.25, 0.25]],
        dtype=torch.float64,
    )
    assert gae(r, lam=0.0).advantages.tolist() == [[0.5, 0.0], [0.0, 0.25]]


def test_over_spans():
    """Two decisions with V 0.5 and 0.25; the separator's reward goes to the first, it gets nothing itself."""
    r = one(5, [0.5, 9.0, 9.0, 0.25, 9.0], 1.0, spans={"turn": Spans.from_lists([[(0, 2), (3, 5)]])})
    r = r.with_signals(bonus=Signal(torch.tensor([[0.0, 0.0, 0.125, 0.0, 1.0]]).double(), "token"))
    credit = gae(r, lam=0.0, over="turn", reward="bonus")
    close(credit.advantages, [-0.125, -0.125, 0.0, 0.75, 0.75])
    close(credit.returns, [0.375, 0.375, 0.0, 1.0, 1.0])
    assert credit.mask.tolist() == [[True, True, False, True, True]]
    assert credit.parts["bonus"].unit == "turn"
    assert credit.notes["actions_outside_spans"] == 1


def test_a_reward_for_each_span_lies_on_its_last_action():
    r = one(4, [0.0] * 4, steps=[[(0, 2), (2, 4)]], process=[[1.0, float("nan")]])
    close(gae(r, lam=1.0, reward="process").advantages, [1.0, 1.0, 0.0, 0.0])


def test_unmeasured_and_empty():
    r = Rollouts.from_lists([[1], []], [0, 0], outcome=[float("nan"), 1.0], values=[[0.5], []])
    credit = gae(r)
    assert (credit.advantages == 0).all()
    assert (credit.returns == 0).all()
    assert not credit.mask.any()


def test_a_critic_that_failed_on_one_trajectory_spoils_no_other():
    r = Rollouts.from_lists([[1], [2]], [0, 0], outcome=[1, 1], values=[[0.5], [float("nan")]])
    assert gae(r).advantages[0] == 0.5


def test_messages():
    r = Rollouts.from_lists([[1]], [0], outcome=[1.0])
    with pytest.raises(ValueError) as error:
        gae(r)
    assert str(error.value) == (
        "gae needs rollouts.values, which this batch lacks. Train with a critic, or use group_relative."
    )
    judged = one(1, [0.0], steps=[[(0, 1)]], judge=[[[0.0, 1.0]]])
    with pytest.raises(
        ValueError, match=r"one number per trajectory, span or token; got unit 'step' and shape \[1, 2\]"
    ):
        gae(judged, reward="judge")
