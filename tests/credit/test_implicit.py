import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, Spans, grpo, oprl
from reference.batches import random_batch, with_outcome
from reference.loops import blank, deviation, episodes, mean, put, table_of

NAN = float("nan")
DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
PHI = [[[-0.5, -0.4], [-0.2]], [[-1.0, -0.9], [-0.7], [-0.6, -0.6]]]
OLD = [[[-0.9, -0.8], [-0.4]], [[-0.6, -0.5], [-0.8], [-0.2, -0.4]]]
tried = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def pair(dtype=torch.float64, outcome=(1.0, 0.0)) -> Rollouts:
    """Two trajectories of two and three turns, one row each, with the log-probabilities above."""
    turns, rows = [], []
    for phi, old in zip(PHI, OLD, strict=True):
        edges = [0]
        for turn in phi:
            edges.append(edges[-1] + len(turn))
        turns.append(list(itertools.pairwise(edges)))
        rows.append([p - o for a, b in zip(phi, old, strict=True) for p, o in zip(a, b, strict=True)])
    ratio = torch.zeros(2, 5, dtype=dtype)
    for i, row in enumerate(rows):
        ratio[i, : len(row)] = torch.tensor(row, dtype=dtype)
    r = Rollouts.from_lists([[1] * len(x) for x in rows], [0, 0], outcome=list(outcome), dtype=dtype)
    return r.with_spans(turn=Spans.from_lists(turns)).with_signals(log_ratio=Signal(ratio, "token"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_pair(dtype):
    credit = oprl(pair(dtype))
    near = DTYPES[dtype]
    want = torch.tensor([0.707106, -0.707106], dtype=dtype)
    torch.testing.assert_close(credit.parts["outcome"].values, want, **near)
    want = torch.tensor([1.330139, 0.402135, -1.144538, 0.247468, -0.835203], dtype=dtype)
    torch.testing.assert_close(credit.parts["log_ratio"].values, want, **near)
    want = [[2.037244, 2.037244, 1.109241, 0, 0], [-1.851644, -1.851644, -0.459638, -1.542309, -1.542309]]
    torch.testing.assert_close(credit.advantages, torch.tensor(want, dtype=dtype), **near)


def test_turn_rewards_of_the_worked_pair():
    """.04 .01 and -.04 .005 -.03, whose mean is -.003."""
    part = oprl(pair(), scale=None).parts["log_ratio"].values
    want = torch.tensor([0.04, 0.01, -0.04, 0.005, -0.03], dtype=torch.float64)
    torch.testing.assert_close(part - 0.003, want, rtol=0, atol=1e-12)
    assert oprl(pair()).notes["mean_turn_reward"] == pytest.approx(-0.003)


def test_released_numbers_of_the_worked_pair():
    """The largest |r| is .04: 1 .25 -1 .125 -.75. Of the first turns, 1 and -1, the mean is 0; K = 2 doubles both parts."""
    credit = oprl.released()(pair())
    assert credit.parts["outcome"].values.tolist() == [1.0, -1.0]
    want = torch.tensor([2.0, 0.5, -2.0, 0.25, -1.5], dtype=torch.float64)
    torch.testing.assert_close(credit.parts["log_ratio"].values, want, rtol=1e-4, atol=0)


# ---- against the equation -------------------------------------------------------------------------------------------------


def slow(r: Rollouts, beta=0.05, alpha=1.0, loo=False, std=True, first=False, rescale=False, gate=False, eps=1e-6):
    every = episodes(r, "turn")
    ratio = r.signals["log_ratio"].values
    rewards: list[list[float]] = []
    for e in every:
        each = []
        for s in e.steps:
            known = [float(ratio[a]) for a in s.actions if not math.isnan(ratio[a])]
            each.append(beta * sum(known) if known or not s.actions else NAN)
        rewards.append(each)
    kept = [i for i, e in enumerate(every) if not math.isnan(e.outcome)]
    if rescale:
        largest = max([abs(x) for i in kept for x in rewards[i] if not math.isnan(x)], default=0.0) + 1e-6
        rewards = [[x / largest for x in xs] for xs in rewards]

    def relative(x: float, pool: list[float]) -> float:
        same = max(pool) - min(pool) < 1e-13
        k = len(pool)
        above = (x - mean(pool)) * (k / (k - 1) if loo and k > 1 else 1.0)
        return above if not std else 0.0 if same else above / (deviation(pool) + eps)

    table = blank(r)
    for i in kept:
        mates = [k for k in kept if every[k].group == every[i].group]
        outcomes = [every[k].outcome for k in mates]
        if len(mates) < 2:
            continue
        flat = len(set(outcomes)) == 1
        put(table, every[i].actions, [0.0 if flat else relative(every[i].outcome, outcomes)] * len(every[i].actions))
        measured = [[x for x in rewards[k] if not math.isnan(x)] for k in mates]
        pool = [x for xs in measured for x in (xs[:1] if first else xs)]
        for s, x in zip(every[i].steps, rewards[i], strict=True):
            if math.isnan(x) or (gate and flat):
                continue
            for b, t in s.actions:
                table[b][t] += alpha * relative(x, pool)
    return table_of(table, r)


def with_holes(seed: int) -> Rollouts:
    """A random batch in which some log-ratios were not measured."""
    r = random_batch(seed)
    x = r.signals["log_ratio"].values
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed % 2**31)) < 0.3
    return r.with_signals(log_ratio=Signal(torch.where(holes, NAN, x), "token"))


@given(seed=SEEDS, gate=st.booleans(), alpha=st.sampled_from([0.0, 0.5, 1.0]))
@tried
def test_agrees_with_the_loop(seed, gate, alpha):
    for r in (random_batch(seed), with_holes(seed)):
        for loo, std, first in [(False, True, False), (True, False, False), (False, False, True), (False, True, True)]:
            got = oprl(
                r,
                alpha=alpha,
                gate=gate,
                baseline="leave_one_out" if loo else "mean",
                scale="std" if std else None,
                pool="first" if first else "all",
            )
            want = slow(r, alpha=alpha, loo=loo, std=std, first=first, gate=gate)
            torch.testing.assert_close(got.advantages, want, rtol=1e-9, atol=1e-9)


@given(seed=SEEDS)
@tried
def test_released_agrees_with_the_loop(seed):
    r = with_holes(seed)
    want = slow(r, loo=True, std=False, first=True, rescale=True)
    torch.testing.assert_close(oprl.released()(r).advantages, want, rtol=1e-9, atol=1e-9)


# ---- laws -------------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS)
@tried
def test_without_turn_rewards_it_is_grpo(seed):
    r = random_batch(seed)
    at_start = r.with_signals(log_ratio=Signal(torch.zeros_like(r.signals["log_ratio"].values), "token"))
    for credit in (oprl(r, alpha=0.0), oprl(at_start)):
        torch.testing.assert_close(credit.advantages, grpo(r).advantages, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS)
@tried
def test_the_turn_part_sums_to_zero_over_the_turns_of_a_group(seed):
    r = random_batch(seed)
    part, groups = oprl(r).parts["log_ratio"].values, r.group_ids[r.spans["turn"].row]
    assert torch.zeros(r.num_groups, dtype=part.dtype).index_add(0, groups, part).abs().max() < 1e-8


def test_equal_outcomes():
    """Nothing is known of the trajectories, and the turns speak only without the gate."""
    r = pair(outcome=(0.7, 0.7))
    assert (oprl(r).parts["outcome"].values == 0).all()
    assert (oprl(r).advantages != 0).any()
    assert (oprl(r, gate=True).advantages == 0).all()
    assert oprl(r).notes["equal_groups"] == 1.0
    assert torch.equal(oprl(pair(), gate=True).advantages, oprl(pair()).advantages)


def test_a_single_trajectory_gets_nothing():
    r = pair().select(torch.tensor([1]), covers="batch")
    for method in (oprl(), oprl(scale=None), oprl.released()):
        assert (method(r).advantages == 0).all()
    half = with_outcome(pair(), torch.tensor([1.0, NAN], dtype=torch.float64))
    credit = oprl(half)
    assert (credit.advantages == 0).all()
    assert credit.mask.any(1).tolist() == [True, False]


def test_an_empty_action_has_no_reward_and_counts():
    """Rewards 0, 1 and -4 in nats: their mean is -1, with the turn that has no token."""
    turns = Spans(*torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 1], [0, 1, 0]]))
    r = Rollouts.from_lists([[1], [2]], [0, 0], outcome=[1.0, 1.0], spans={"turn": turns}, dtype=torch.float64)
    r = r.with_signals(log_ratio=Signal(torch.tensor([[1.0], [-4.0]]).double(), "token"))
    credit = oprl(r, beta=1.0, scale=None)
    assert credit.advantages.tolist() == [[2.0], [-3.0]]
    assert credit.parts["log_ratio"].values.tolist() == [1.0, 2.0, -3.0]


def test_what_was_not_measured():
    """One token of the first turn is missing; the second turn has no other."""
    r = pair()
    x = r.signals["log_ratio"].values.clone()
    x[0, 0], x[0, 2] = NAN, NAN
    credit = oprl(r.with_signals(log_ratio=Signal(x, "token")), scale=None)
    assert (credit.notes["unmeasured_tokens"], credit.notes["unmeasured_turns"]) == (2, 1)
    middle = (0.02 - 0.04 + 0.005 - 0.03) / 4
    want = torch.tensor([0.02 - middle, 0, -0.04 - middle, 0.005 - middle, -0.03 - middle], dtype=torch.float64)
    torch.testing.assert_close(credit.parts["log_ratio"].values, want)
    assert credit.mask.sum() == 8


def test_a_shift_of_the_log_ratio_outside_actions_is_not_read():
    r = pair()
    mask = r.action_mask.clone()
    mask[1, 2] = False
    narrow = r.replace(action_mask=mask)
    loud = r.signals["log_ratio"].values.clone()
    loud[1, 2] = 1e6
    other = narrow.with_signals(log_ratio=Signal(loud, "token"))
    assert torch.equal(oprl(narrow).advantages, oprl(other).advantages)


def test_messages():
    r = pair()
    turn = Signal(torch.zeros(5), "turn")
    with pytest.raises(
        ValueError, match=r"oprl needs signals\['log_ratio'\] with one number per token; got unit 'turn'"
    ):
        oprl(r.with_signals(log_ratio=turn))
    with pytest.raises(ValueError, match="oprl compares within the batch, but this slice covers only the group"):
        oprl.released()(r.replace(covers="group"))
    assert oprl(alpha=0.0).requires == ("signals.outcome",)
