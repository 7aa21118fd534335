import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, Spans, chain, gae, ma_rlhf, vapo, whiten
from reference import loops
from reference.batches import random_batch

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


def test_a_named_coefficient_is_read_from_the_batch():
    """As the number itself: the first response above. NaN takes nothing off: A = .1 - .6, .25 + .95 A, .05 + .95 A."""
    r = one(3, [0.3, 0.35, 0.6], 0.1, logprobs=[[-0.4, -0.9, -0.3]], ref_logprobs=[[-0.5, -0.7, -0.6]])
    steered = gae(kl_coef="kl", lam=0.95)
    assert steered.requires == ("values", "signals.outcome", "logprobs", "ref_logprobs", "signals.kl")
    credit = steered(r.with_signals(kl=Signal(torch.tensor([0.05], dtype=torch.float64), "batch")))
    close(credit.advantages, [-0.172787, -0.229250, -0.515000])
    close(credit.returns, [0.127213, 0.120750, 0.085000])
    nothing = steered(r.with_signals(kl=Signal(torch.tensor([math.nan], dtype=torch.float64), "batch")))
    close(nothing.advantages, [-0.16375, -0.225, -0.5])
    for made in (vapo(kl_coef="kl"), ma_rlhf(kl_coef="kl"), gae.verl(kl_coef="kl"), gae.openrlhf(kl_coef="kl")):
        assert "signals.kl" in made.requires
    assert repr(ma_rlhf(kl_coef="kl")).count("kl_coef='kl'") == 1


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
    turns = one(1, [0.0], spans={"turn": Spans.from_lists([[(0, 1)]])})
    with pytest.raises(ValueError, match=r"gae\(over='turn'\) takes one step per span, so .* cannot be 'count'"):
        gae(turns, over="turn", observations="count")
    with pytest.raises(ValueError, match="gae needs alpha above 0; got 0"):
        gae(turns, alpha=0.0)
    scored = one(1, [0.0], logprobs=[[0.0]], ref_logprobs=[[0.0]])
    with pytest.raises(ValueError, match=r'gae needs rollouts\.signals\["kl"\], which this batch lacks'):
        gae(scored, kl_coef="kl")
    with pytest.raises(
        ValueError, match=r"one number for the batch; got unit 'trajectory' and shape \[1\]. Give Signal"
    ):
        gae(scored, kl_coef="outcome")


# ---- observations, and what other trainers compute ----------------------------------------------------------------------

OBSERVED = [[True, True, False, True, True]]
"""Reward 1 at the end, V = 0.5 at actions and 9 at an observation, gamma 1, lam 0.95."""


def observed(**more) -> Rollouts:
    return one(5, [0.5, 0.5, 9.0, 0.5, 0.5], action_mask=OBSERVED, **more)


def test_a_counted_observation_is_a_step():
    """With V = 0 there: A = .5; .475; (.5 + .95 * .475); -.5 + .95 * .95125; .95 * .4036875. With V = 9: see the last two."""
    close(gae(observed(), observations="count").advantages, [0.383503, 0.403688, 0.0, 0.475, 0.5])
    close(gae(observed(), observations="valued").advantages, [0.811003, 0.853688, 0.0, 0.475, 0.5])
    counted = gae(observed(), gamma=0.9, lam=1.0, observations="count")
    close(counted.returns, [0.6561, 0.729, 0.0, 0.9, 1.0])
    assert counted.notes["decisions"] == 4
    assert counted.parts["values"].values[0, 2] == 0


@pytest.mark.parametrize(
    ("dialect", "raw"),
    [
        (gae.verl, [0.428688, 0.451250, 0.475, 0.5]),
        (gae.openrlhf, [0.383503, 0.403688, 0.475, 0.5]),
        (gae.skyrl, [0.811003, 0.853688, 0.475, 0.5]),
    ],
)
def test_dialects_whiten_what_they_computed(dialect, raw):
    """Sample variance for verl and SkyRL, the population's for OpenRLHF."""
    credit = dialect(lam=0.95, kl_coef=0.0)(observed())
    x = torch.tensor(raw, dtype=torch.float64)
    want = (x - x.mean()) / x.std(correction=0 if dialect is gae.openrlhf else 1)
    torch.testing.assert_close(credit.advantages[0, [0, 1, 3, 4]], want, rtol=0, atol=2e-5)
    assert gae.openrlhf().requires == ("values", "signals.outcome", "logprobs", "ref_logprobs")
    assert credit.returns[0, 4] == 1


def test_row_boundaries():
    """Two rows, an observation in the first, context before the second's action: one step from row to row in every case.

    V = 0, gamma .5, lam 1: the last action gets 1, the one before .5; the first is one step further, or two.
    """
    r = Rollouts.from_lists(
        [[5, 8, 5], [7, 7, 5]],
        [0, 0],
        trajectories=["a", "a"],
        row_index=[0, 1],
        action_mask=[[True, False, True], [False, False, True]],
        outcome=[1],
        values=[[0.0] * 3] * 2,
        dtype=torch.float64,
    )
    for how, first in (("skip", 0.25), ("count", 0.125), ("valued", 0.125)):
        got = gae(r, gamma=0.5, lam=1.0, observations=how).advantages
        assert got.tolist() == [[first, 0.0, 0.5], [0.0, 0.0, 1.0]], how


# ---- VAPO ---------------------------------------------------------------------------------------------------------------


def test_vapo_trusts_rewards_the_more_the_longer_the_response():
    """alpha 0.5: 4 actions have lam 1/2, 2 actions lam 0. V = 0.5 everywhere, reward 1: delta = 0 ... 0, 0.5."""
    r = Rollouts.from_lists(
        [[1] * 4, [1] * 2], [0, 1], outcome=[1, 1], values=[[0.5] * 4, [0.5] * 2], dtype=torch.float64
    )
    credit = vapo(alpha=0.5)(r)
    assert credit.advantages.tolist() == [[0.0625, 0.125, 0.25, 0.5], [0.0, 0.5, 0.0, 0.0]]
    assert credit.returns.tolist() == [[1.0] * 4, [1.0, 1.0, 0.0, 0.0]]
    assert gae(r, alpha=0.5).returns.tolist() == [[0.5625, 0.625, 0.75, 1.0], [0.5, 1.0, 0.0, 0.0]]


def test_vapo_counts_the_actions_of_all_rows_and_no_observations():
    r = Rollouts.from_lists(
        [[1, 9, 1], [9, 1, 1]],
        [0, 0],
        trajectories=["a", "a"],
        row_index=[0, 1],
        action_mask=[[True, False, True], [False, True, True]],
        outcome=[1],
        values=[[0.5] * 3] * 2,
        dtype=torch.float64,
    )
    assert vapo(alpha=0.5)(r).advantages.tolist() == [[0.0625, 0.0, 0.125], [0.0, 0.25, 0.5]]
    assert (gae(r, alpha=0.5, observations="valued").advantages[1] == torch.tensor([0.0, 0.25, 0.5])).all()


# ---- macro actions ------------------------------------------------------------------------------------------------------

V = [0.1, 0.3, 0.2, 0.4, 0.5, 0.1, 0.6]
R = [-0.01, 0.0, 0.02, -0.03, 0.0, 0.01, 1.0]


def macros(sizes: list[int], dtype=torch.float64) -> Rollouts:
    """The response above, cut into macro actions of these sizes."""
    stops = list(accumulate(sizes))
    spans = Spans.from_lists([[(stop - n, stop) for stop, n in zip(stops, sizes, strict=True)]])
    r = one(7, V, dtype=dtype, spans={"macro": spans})
    return r.with_signals(r=Signal(torch.tensor([R], dtype=dtype), "token"))


def spread(values: list[float], sizes: list[int]) -> list[float]:
    return [v for v, n in zip(values, sizes, strict=True) for _ in range(n)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "advantages", "returns"),
    [
        ([3, 3, 1], [0.738667, 0.626667, 0.4], [0.938667, 0.96, 1.0]),
        ([3, 2, 2], [0.732150, 0.497, 0.66], [0.932150, 0.947, 1.01]),
        (
            [1] * 7,
            [0.716429, 0.554136, 0.688564, 0.493225, 0.445500, 0.89, 0.4],
            [0.816429, 0.854136, 0.888564, 0.893225, 0.945500, 0.99, 1.0],
        ),
    ],
    ids=["3-grams", "perplexity", "tokens"],
)
def test_worked_macro_actions(dtype, sizes, advantages, returns):
    credit = ma_rlhf(kl_coef=0.0, reward="r")(macros(sizes, dtype))
    close(credit.advantages, spread(advantages, sizes), dtype)
    close(credit.returns, spread(returns, sizes), dtype)


def test_macro_actions_of_one_token_are_tokens():
    r = macros([1] * 7)
    for value in ("first", "mean", "last", "position"):
        close(gae(r, over="macro", span_value=value, reward="r").advantages, gae(r, reward="r").advantages[0].tolist())
        torch.testing.assert_close(gae(r, over="macro", span_value=value).returns, gae(r).returns)


def test_one_macro_action_is_a_bandit():
    """A = sum of rewards - mean value."""
    credit = ma_rlhf(kl_coef=0.0, reward="r")(macros([7]))
    close(credit.advantages, [sum(R) - sum(V) / 7] * 7)


def test_undiscounted_macro_actions_are_rewards_to_come_minus_their_value():
    credit = ma_rlhf(lam=1.0, kl_coef=0.0, reward="r")(macros([3, 3, 1]))
    close(credit.advantages, spread([0.99 - 0.2, 0.98 - 1 / 3, 1.0 - 0.6], [3, 3, 1]))


@pytest.mark.parametrize(
    ("how", "values"),
    [
        ("first", [0.1, 0.4, 0.6]),
        ("mean", [0.2, 1 / 3, 0.6]),
        ("last", [0.2, 0.1, 0.6]),
        ("position", [(0.1 + 0.3 / 2 + 0.2 / 3) * 6 / 11, (0.4 + 0.5 / 2 + 0.1 / 3) * 6 / 11, 0.6]),
    ],
)
def test_values_of_macro_actions(how, values):
    """lam 0 and no reward before the end: A = V' - V, then 1 - V."""
    credit = gae(macros([3, 3, 1]), lam=0.0, over="macro", span_value=how)
    close(credit.advantages, spread([values[1] - values[0], values[2] - values[1], 1 - values[2]], [3, 3, 1]))


def test_averaged_rewards_thin_out_the_outcome_unless_the_last_action_is_alone():
    """The released code: rewards averaged in each macro action. V = 0, lam 0."""
    joined = one(4, [0.0] * 4, spans={"macro": Spans.from_lists([[(0, 2), (2, 4)]])})
    close(gae(joined, lam=0.0, over="macro", span_reward="mean").advantages, [0.0, 0.0, 0.5, 0.5])
    alone = joined.with_spans(macro=Spans.from_lists([[(0, 2), (2, 3), (3, 4)]]))
    close(gae(alone, lam=0.0, over="macro", span_reward="mean").advantages, [0.0, 0.0, 0.0, 1.0])


def plain(r, gamma, lam, over, value, gain, alpha, critic_lam) -> tuple[list[list[float]], list[list[float]]]:
    """The equations, one trajectory and one decision at a time; over tokens, `value` says what an observation is."""
    table, returns = loops.blank(r), loops.blank(r)
    for e in loops.episodes(r, over if over != "token" else "step"):
        if math.isnan(e.outcome) or not e.actions:
            continue
        reward = {a: -0.1 * float(r.old_logprobs[a] - r.ref_logprobs[a]) for a in e.actions}
        reward[e.actions[-1]] += e.outcome
        decisions = [[a] for a in e.actions] if over == "token" else [s.actions for s in e.steps if s.actions]
        if over == "token" and value != "skip":
            decisions = []
            for b in e.rows:
                acts = [t for row, t in e.actions if row == b]
                decisions += [[(b, t)] for t in range(min(acts), max(acts) + 1)] if acts else []
        values, gathered = [], []
        for d in decisions:
            v = [float(r.values[a]) for a in d]
            w = {"first": [1.0] + [0.0] * len(v), "last": [0.0] * (len(v) - 1) + [1.0], "mean": [1.0] * len(v)}
            w = w.get(value, [1 / (k + 1) for k in range(len(v))])[: len(v)]
            counted = value != "count" or d[0] in reward
            values.append(sum(x * y for x, y in zip(v, w, strict=True)) / sum(w) if counted else 0.0)
            gathered.append(sum(reward.get(a, 0.0) for a in d) / (len(d) if gain == "mean" else 1))
        if not decisions:
            continue
        own = [d for d in decisions if d[0] in reward]
        last = e.rows[-1]
        values.append(float(r.bootstrap[last]) if r.truncated[last] else 0.0)
        trust = lam if alpha is None else max(0.0, 1 - 1 / (alpha * len(own)))
        above = critic = 0.0
        for k in range(len(decisions) - 1, -1, -1):
            delta = gathered[k] + gamma * values[k + 1] - values[k]
            above = delta + gamma * trust * above
            critic = delta + gamma * (trust if critic_lam is None else critic_lam) * critic
            for a in decisions[k]:
                if a in reward:
                    table[a[0]][a[1]] = above
                    returns[a[0]][a[1]] = critic + values[k]
    return table, returns


@pytest.mark.parametrize(
    "how",
    [
        {"over": "macro", "span_value": "mean"},
        {"over": "macro", "span_value": "position", "span_reward": "mean"},
        {"over": "macro", "span_value": "last", "alpha": 0.7, "critic_lam": 1.0},
        {"over": "half", "span_value": "position", "critic_lam": 0.5},
        {"observations": "skip", "alpha": 0.3},
        {"observations": "count", "critic_lam": 0.0},
        {"observations": "valued", "alpha": 1.5, "critic_lam": 1.0},
    ],
    ids=str,
)
@given(seed=st.integers(0, 2**32 - 1), gamma=st.sampled_from([1.0, 0.9, 0.0]), lam=st.sampled_from([1.0, 0.8, 0.0]))
@settings(max_examples=25, deadline=None)
def test_against_plain_loops(how, seed, gamma, lam):
    r = random_batch(seed)
    credit = gae(r, gamma=gamma, lam=lam, kl_coef=0.1, **how)
    value = how.get("span_value", how.get("observations"))
    over, gain = how.get("over", "token"), how.get("span_reward", "sum")
    table, returns = plain(r, gamma, lam, over, value, gain, how.get("alpha"), how.get("critic_lam"))
    torch.testing.assert_close(credit.advantages, loops.table_of(table, r), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(credit.returns, loops.table_of(returns, r), rtol=1e-9, atol=1e-9)


def test_compositions():
    assert repr(ma_rlhf(macro="step", kl_coef=0.0)) == (
        "gae(gamma=1.0, lam=0.95, over='step', span_value='mean', span_reward='sum', kl_coef=0.0, reward='outcome')"
    )
    assert ma_rlhf().requires == ("spans.macro", "values", "signals.outcome", "logprobs", "ref_logprobs")
