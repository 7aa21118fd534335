import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import (
    Rollouts,
    Signal,
    group_relative,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    returns_to_go,
    whiten,
)
from reference import loops
from reference.batches import random_batch

HOW = ("skip", "reset", "count")


def table(got: torch.Tensor, want: list[list[float]], atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=0, atol=atol)


def observed(**more) -> Rollouts:
    mask = [[True, True, False, True, True]]
    return Rollouts.from_lists([[5] * 5], [0], outcome=[1.0], action_mask=mask, dtype=torch.float64, **more)


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("skip", [0.729, 0.81, 0.0, 0.9, 1.0]),
        ("count", [0.6561, 0.729, 0.0, 0.9, 1.0]),
        ("reset", [0.0, 0.0, 0.0, 0.9, 1.0]),
    ],
)
def test_an_observation_in_between(how, want):
    credit = returns_to_go(observed(), gamma=0.9, observations=how)
    table(credit.advantages, [want])
    assert (credit.returns == credit.advantages).all()


@pytest.mark.parametrize(
    ("dialect", "raw"),
    [
        (reinforce_plus_plus.verl, [0.729, 0.81, 0.9, 1.0]),
        (reinforce_plus_plus.skyrl, [0.0, 0.0, 0.9, 1.0]),
        (reinforce_plus_plus.openrlhf, [0.6561, 0.729, 0.9, 1.0]),
        (reinforce_plus_plus, [0.729, 0.81, 0.9, 1.0]),
    ],
)
def test_dialects_whiten_what_they_computed(dialect, raw):
    credit = dialect(gamma=0.9, kl_coef=0.0)(observed())
    x = torch.tensor(raw, dtype=torch.float64)
    want = (x - x.mean()) / x.std(correction=0 if dialect is reinforce_plus_plus.openrlhf else 1)
    torch.testing.assert_close(credit.advantages[0, [0, 1, 3, 4]], want, rtol=0, atol=1e-6)
    torch.testing.assert_close(credit.returns[0, [0, 1, 3, 4]], x)


def test_the_smallest_variance_of_openrlhf():
    """Returns 1e-5 and 0: variance 2.5e-11, so the divisor is sqrt(1e-8) = 1e-4."""
    r = Rollouts.from_lists([[1], [2]], [0, 1], outcome=[1e-5, 0.0], dtype=torch.float64)
    table(reinforce_plus_plus.openrlhf(kl_coef=0.0)(r).advantages, [[0.05], [-0.05]])


def test_penalty_inside_the_reward():
    """-0.1 times log-ratios 0.5 and -1 at the actions: -0.05 and 0.1, and 2 at the end; gamma 0.5."""
    r = Rollouts.from_lists(
        [[5, 6]], [0], outcome=[2.0], logprobs=[[-0.5, -2.0]], ref_logprobs=[[-1.0, -1.0]], dtype=torch.float64
    )
    credit = returns_to_go(r, gamma=0.5, kl_coef=0.1)
    table(credit.advantages, [[1.0, 2.1]])
    table(credit.parts["kl"].values, [[0.0, 0.1]])
    assert returns_to_go(kl_coef=0.1).requires == ("signals.outcome", "logprobs", "ref_logprobs")
    named = r.with_signals(kl=Signal(torch.tensor([0.1], dtype=torch.float64), "batch"))
    assert torch.equal(returns_to_go(named, gamma=0.5, kl_coef="kl").advantages, credit.advantages)
    for made in (
        returns_to_go(kl_coef="kl"),
        reinforce_plus_plus(kl_coef="kl"),
        reinforce_plus_plus.skyrl(kl_coef="kl"),
    ):
        assert made.requires == ("signals.outcome", "logprobs", "ref_logprobs", "signals.kl")


def rows(**more) -> Rollouts:
    """A trajectory in two rows, the later one first in the batch and behind context; the earlier one ends at its width."""
    return Rollouts.from_lists(
        [[9, 9, 5], [5, 9, 5]],
        [0, 0],
        trajectories=["a", "a"],
        row_index=[1, 0],
        action_mask=[[False, False, True], [True, False, True]],
        outcome=[1.0],
        dtype=torch.float64,
        **more,
    )


@pytest.mark.parametrize(("how", "first", "second"), [("skip", 0.25, 0.5), ("count", 0.125, 0.5), ("reset", 0.0, 0.0)])
def test_what_a_row_boundary_means(how, first, second):
    """One step for "skip" and "count", however much context the next row shows first; the end for "reset"."""
    table(returns_to_go(rows(), gamma=0.5, observations=how).advantages, [[0.0, 0.0, 1.0], [first, 0.0, second]])


def test_rows_that_touch_are_still_two():
    """The second row begins with an action right where the first ended in memory."""
    r = Rollouts.from_lists([[5], [6]], [0, 0], trajectories=["a", "a"], outcome=[1.0], dtype=torch.float64)
    table(returns_to_go(r, gamma=0.5, observations="reset").advantages, [[0.0], [1.0]])
    table(returns_to_go(r, gamma=0.5).advantages, [[0.5], [1.0]])


def test_rewards_of_spans_and_tokens():
    r = Rollouts.from_lists(
        [[5, 6, 7, 8]], [0], steps=[[(0, 2), (2, 4)]], process=[[1.0, float("nan")]], outcome=[9.0], dtype=torch.float64
    )
    table(returns_to_go(r, gamma=0.5, reward="process").advantages, [[0.5, 1.0, 0.0, 0.0]])
    r = r.with_signals(bonus=Signal(torch.tensor([[0.0, 4.0, float("nan"), 1.0]]).double(), "token"))
    table(returns_to_go(r, gamma=0.5, reward="bonus").advantages, [[2.125, 4.25, 0.5, 1.0]])


def test_an_undiscounted_outcome_is_one_number_per_trajectory():
    r = random_batch(11)
    whole = returns_to_go(r)
    assert whole.parts["outcome"].unit == "trajectory"
    outcome = r.signals["outcome"].values[r.trajectory_ids][:, None].expand(r.action_mask.shape)
    assert (whole.advantages[whole.mask] == outcome[whole.mask]).all()
    nearly = returns_to_go(r, gamma=1 - 1e-12)
    torch.testing.assert_close(whole.advantages, nearly.advantages, rtol=0, atol=1e-9)


def plain(r: Rollouts, gamma: float, how: str, kl_coef: float, reward: str) -> list[list[float]]:
    out = loops.blank(r)
    for e in loops.episodes(r):
        if reward == "outcome" and math.isnan(e.outcome):
            continue
        gain = {a: -kl_coef * float(r.old_logprobs[a] - r.ref_logprobs[a]) for a in e.actions}
        if reward == "outcome" and e.actions:
            gain[e.actions[-1]] += e.outcome
        for s in e.steps if reward == "process" else []:
            score = float(r.signals["process"].values[s.number])
            if s.actions and not math.isnan(score):
                gain[s.actions[-1]] += score
        total, after = 0.0, None
        for b, t in reversed(e.actions):
            if after is not None:
                steps = after[1] - t if how == "count" and after[0] == b else 1
                ends = how == "reset" and (after[0] != b or after[1] != t + 1)
                total = 0.0 if ends else gamma**steps * total
            total += gain[b, t]
            out[b][t], after = total, (b, t)
    return out


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("reward", ["outcome", "process"])
@given(seed=st.integers(0, 2**32 - 1), gamma=st.sampled_from([1.0, 0.9, 0.5, 0.0]), kl_coef=st.sampled_from([0.0, 0.1]))
@settings(max_examples=25, deadline=None)
def test_against_plain_loops(how, reward, seed, gamma, kl_coef):
    r = random_batch(seed)
    got = returns_to_go(r, gamma=gamma, observations=how, kl_coef=kl_coef, reward=reward).advantages
    want = loops.table_of(plain(r, gamma, how, kl_coef, reward), r)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_baseline_by_hand():
    """1 and 0 in a group: +-1/2, on one token and on three. Mean -1/4, sample variance (9 + 3) / 16 / 3 = 1/4."""
    r = Rollouts.from_lists([[1], [2, 3, 4]], [0, 0], outcome=[1.0, 0.0], dtype=torch.float64)
    table(reinforce_plus_plus_baseline()(r).advantages, [[1.5, 0.0, 0.0], [-0.5] * 3], 1e-7)
    alone = Rollouts.from_lists([[1], [2], [3]], [0, 0, 1], outcome=[1.0, 0.0, 0.5], dtype=torch.float64)
    for kept, third in (("zero", 0.0), ("raw", 0.5)):
        want = whiten()(group_relative(alone, scale=None, singleton=kept), alone).advantages
        assert (reinforce_plus_plus_baseline(singleton=kept)(alone).advantages == want).all()
        assert group_relative(alone, scale=None, singleton=kept).advantages[2] == third


@pytest.mark.parametrize("method", [returns_to_go, reinforce_plus_plus, reinforce_plus_plus_baseline])
def test_unmeasured_and_empty(method):
    r = Rollouts.from_lists([[1], [], [2]], [0, 0, 0], outcome=[float("nan"), 1.0, 1.0])
    credit = method(r)
    assert credit.mask.tolist() == [[False], [False], [True]]
    assert (credit.advantages[:2] == 0).all()


def test_equal_rewards():
    r = Rollouts.from_lists([[1, 2], [2], [3]], [0, 0, 1], outcome=[0.99] * 3)
    assert (reinforce_plus_plus()(r).advantages == 0).all()
    assert (reinforce_plus_plus_baseline()(r).advantages == 0).all()


def test_messages():
    with pytest.raises(
        ValueError, match=r"returns_to_go needs signals\['outcome'\] with one number per trajectory, span"
    ):
        returns_to_go(observed().with_signals(outcome=Signal(torch.zeros(1), "group")))
    with pytest.raises(
        ValueError, match="returns_to_go needs observations to be 'skip' or 'reset' or 'count'; got 'drop'"
    ):
        returns_to_go(observations="drop")
