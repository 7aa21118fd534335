import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import (
    Rollouts,
    Signal,
    Spans,
    add,
    chain,
    dr_grpo,
    grpo,
    implicit_reward,
    lare,
    potential,
    r_to_q,
    redistribution,
    returns_to_go,
    whiten,
)
from apportion.losses import dpo_loss
from reference.batches import random_batch
from reference.loops import blank, episodes, put, table_of

F64 = torch.float64
NAN = float("nan")
DTYPES = {F64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
tried = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def with_ratio(rows, dtype=F64, **how) -> Rollouts:
    width = max(map(len, rows))
    values = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=dtype)
    tokens = [list(range(len(row))) for row in rows]
    how = {"groups": [0] * len(rows), **how}
    return Rollouts.from_lists(tokens, signals={"log_ratio": Signal(values, "token")}, dtype=dtype, **how)


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


# ---- the log-ratio: worked numbers --------------------------------------------------------------------------------------

CHOSEN, CHOSEN_REF = [-0.5, -1.0, -0.2], [-0.9, -0.8, -0.6]
REJECTED, REJECTED_REF = [-1.2, -0.7], [-0.8, -0.9]


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_pair(dtype):
    r = with_ratio([minus(CHOSEN, CHOSEN_REF), minus(REJECTED, REJECTED_REF)], dtype)
    credit = r_to_q()(r)
    want = torch.tensor([[0.04, -0.02, 0.04], [-0.04, 0.02, 0.0]], dtype=dtype)
    torch.testing.assert_close(credit.advantages, want, **DTYPES[dtype])
    score = implicit_reward(r, over="trajectory").parts["log_ratio"].values
    torch.testing.assert_close(score[0] - score[1], torch.tensor(0.08, dtype=dtype), **DTYPES[dtype])


def soft_values(rewards, ref, beta):
    """V of every node of a tree of equal arity, level by level: rewards[k] and ref[k] are [A]*(k+1), V(terminal) = 0."""
    after = torch.zeros_like(rewards[-1])
    values, q = [], []
    for r, p in zip(reversed(rewards), reversed(ref), strict=True):
        q.insert(0, r + beta * p.log() + after)
        after = beta * (q[0] / beta).logsumexp(-1)
        values.insert(0, after)
    policy = [((x - v[..., None]) / beta).exp() for x, v in zip(q, values, strict=True)]
    return values, policy


def log_ratios(policy, ref):
    return [(p / q).log() for p, q in zip(policy, ref, strict=True)]


def paths(arity, depth):
    return torch.cartesian_prod(*[torch.arange(arity)] * depth).view(-1, depth)


def along(tables, path):
    return [float(t[tuple(path[: k + 1])]) for k, t in enumerate(tables)]


def test_worked_two_token_problem():
    rewards = [torch.zeros(2, dtype=F64), torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)]
    ref = [torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([[0.5, 0.5], [0.8, 0.2]], dtype=F64)]
    values, policy = soft_values(rewards, ref, 1.0)
    close = {"rtol": 0, "atol": 5.1e-7}
    torch.testing.assert_close(values[0], torch.tensor(0.357374, dtype=F64), **close)
    torch.testing.assert_close(values[1], torch.tensor([0.620115, 0.0], dtype=F64), **close)
    torch.testing.assert_close(policy[0], torch.tensor([0.650245, 0.349755], dtype=F64), **close)
    torch.testing.assert_close(policy[1], torch.tensor([[0.731059, 0.268941], [0.8, 0.2]], dtype=F64), **close)
    ratios = log_ratios(policy, ref)
    r = with_ratio([along(ratios, p) for p in paths(2, 2).tolist()])
    got = implicit_reward(r, beta=1.0).advantages
    want = [[0.262740, 0.379885], [0.262740, -0.620115], [-0.357374, 0.0], [-0.357374, 0.0]]
    torch.testing.assert_close(got, torch.tensor(want, dtype=F64), **close)
    torch.testing.assert_close(values[0] + got.sum(1), torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=F64), **close)


def random_problem(seed, arity=3, depth=3):
    make = torch.Generator().manual_seed(seed)
    shapes = [[arity] * (k + 1) for k in range(depth)]
    rewards = [torch.randn(s, generator=make, dtype=F64) for s in shapes]
    ref = [torch.randn(s, generator=make, dtype=F64).softmax(-1) for s in shapes]
    return rewards, ref


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_best_policy_carries_reward_plus_change_of_value(seed, beta):
    """c = r + V' - V in random problems of depth 3, and its sum over a response is the return minus V(s_0)."""
    rewards, ref = random_problem(seed)
    values, policy = soft_values(rewards, ref, beta)
    ratios = log_ratios(policy, ref)
    every = paths(3, 3).tolist()
    c = implicit_reward(with_ratio([along(ratios, p) for p in every]), beta=beta).advantages
    for path, row in zip(every, c, strict=True):
        v = [float(values[0]), float(values[1][path[0]]), float(values[2][path[0], path[1]]), 0.0]
        r = along(rewards, path)
        want = [r[t] + v[t + 1] - v[t] for t in range(3)]
        torch.testing.assert_close(row, torch.tensor(want, dtype=F64), rtol=0, atol=1e-9)
        assert float(row.sum()) == pytest.approx(sum(r) - v[0], abs=1e-9)


def test_a_potential_in_the_reward_changes_neither_policy_nor_preferences():
    rewards, ref = random_problem(7)
    make = torch.Generator().manual_seed(8)
    phi = [torch.randn([3] * k, generator=make, dtype=F64) for k in range(3)]
    after = [phi[1], phi[2], torch.zeros([3] * 3, dtype=F64)]
    shaped = [r + a - p[..., None] for r, p, a in zip(rewards, phi, after, strict=True)]
    _, policy = soft_values(rewards, ref, 0.5)
    _, same = soft_values(shaped, ref, 0.5)
    for p, q in zip(policy, same, strict=True):
        torch.testing.assert_close(p, q)
    every = paths(3, 3).tolist()
    scores = [
        implicit_reward(with_ratio([along(log_ratios(x, ref), p) for p in every]), over="trajectory")
        for x in (policy, same)
    ]
    torch.testing.assert_close(scores[0].advantages, scores[1].advantages)
    torch.testing.assert_close(preferences(rewards, every), preferences(shaped, every))


def preferences(rewards, every):
    """How likely the first path is preferred to each: Bradley-Terry in the sums of rewards."""
    total = torch.tensor([sum(along(rewards, p)) for p in every], dtype=F64)
    return (total[0] - total).sigmoid()


def test_training_on_a_pair_puts_the_largest_credit_on_the_wrong_token():
    """Two responses that differ in their third token; a table of bigrams learns which is preferred."""
    right, wrong = [0, 1, 2, 3], [0, 1, 4, 3]
    ref = torch.zeros(5, 5, dtype=F64).log_softmax(-1)
    table = torch.zeros(5, 5, dtype=F64, requires_grad=True)
    rows = torch.tensor([right, wrong])
    mask = torch.ones(2, 3, dtype=torch.bool)

    def taken(t):
        return t.log_softmax(-1)[rows[:, :-1], rows[:, 1:]]

    for _ in range(50):
        loss, _ = dpo_loss(taken(table), taken(ref), mask, torch.tensor([0]), torch.tensor([1]), beta=0.5)
        (grad,) = torch.autograd.grad(loss, table)
        table = (table - grad).detach().requires_grad_()
    c = implicit_reward(with_ratio((taken(table) - taken(ref)).tolist()), beta=0.5).advantages
    assert c.abs().argmax(1).tolist() == [1, 1]
    assert c[0, 1] > 0 > c[1, 1]


# ---- the log-ratio: spans, edges ------------------------------------------------------------------------------------------


def test_sums_over_spans_are_additive_and_copied_to_their_tokens():
    r = with_ratio([[0.1, 0.2, 0.3, 0.4]]).with_spans(
        fine=Spans.from_lists([[(0, 1), (1, 3), (3, 3)]]), coarse=Spans.from_lists([[(0, 3)]])
    )
    fine, coarse = implicit_reward(r, beta=1.0, over="fine"), implicit_reward(r, beta=1.0, over="coarse")
    torch.testing.assert_close(fine.advantages, torch.tensor([[0.1, 0.5, 0.5, 0.0]], dtype=F64))
    torch.testing.assert_close(coarse.parts["log_ratio"].values, fine.parts["log_ratio"].values.sum()[None])
    assert fine.parts["log_ratio"].unit == "fine"
    assert fine.mask.all()


def test_only_actions_are_summed_and_equal_models_give_nothing():
    r = with_ratio([[5.0, 0.2, 0.3]], action_mask=[[False, True, True]])
    credit = implicit_reward(r, beta=1.0, over="trajectory")
    torch.testing.assert_close(credit.advantages, torch.tensor([[0.0, 0.5, 0.5]], dtype=F64))
    assert (implicit_reward(with_ratio([[0.0, 0.0]])).advantages == 0).all()
    assert implicit_reward(with_ratio([[0.1], []])).mask.sum() == 1


def test_notes_count_what_is_missing():
    r = with_ratio([[0.1, NAN], [0.2, 0.3]], truncated=[True, False])
    credit = implicit_reward(r, beta=1.0)
    assert credit.advantages.tolist() == [[0.1, 0.0], [0.2, 0.3]]
    assert credit.notes == {"unmeasured_tokens": 1.0, "truncated_rows": 1.0}


def test_an_excluded_token_needs_a_clip():
    r = with_ratio([[math.inf, -3.0]])
    with pytest.raises(ValueError, match=r"finite log-ratios; 1 in signals\['log_ratio'\] are infinite.*Set clip"):
        implicit_reward(r)
    assert implicit_reward(r, beta=1.0, clip=2.0).advantages.tolist() == [[2.0, -2.0]]
    outside = with_ratio([[math.inf, 1.0]], action_mask=[[False, True]])
    assert implicit_reward(outside, beta=1.0).advantages.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda r: implicit_reward(r, clip=0.0), "clip above 0; got 0. Set clip=None"),
        (
            lambda r: implicit_reward(r, ratio="outcome"),
            r"signals\['outcome'\] with one number per token; got unit 'traj",
        ),
        (lambda r: implicit_reward(r, over="turns"), r"needs rollouts.spans\[\"turns\"\]"),
        (lambda r: potential(r, signal="outcome"), "potential needs.*one number per token"),
        (lambda r: redistribution(r, decoded="outcome"), "over spans"),
    ],
)
def test_what_a_wrong_setting_is_answered_with(make, text):
    r = with_ratio([[0.1]], outcome=[1.0], steps=[[(0, 1)]])
    with pytest.raises(ValueError, match=text):
        make(r)


@given(seed=SEEDS, over=st.sampled_from(["token", "trajectory", "step"]))
@tried
def test_log_ratio_agrees_with_the_equation(seed, over):
    r = random_batch(seed)
    want = blank(r)
    for e in episodes(r):
        units = {"token": [[a] for a in e.actions], "trajectory": [e.actions], "step": [s.actions for s in e.steps]}[
            over
        ]
        for actions in units:
            total = 0.1 * math.fsum(float(r.signals["log_ratio"].values[a]) for a in actions)
            put(want, actions, [total] * len(actions))
    torch.testing.assert_close(implicit_reward(r, over=over).advantages, table_of(want, r))


# ---- potentials -----------------------------------------------------------------------------------------------------------

COSINES = [0.964764, 0.983870, 0.355995, 0.948683]


def with_cosines(rows, **how) -> Rollouts:
    r = with_ratio(rows, **how)
    return r.with_signals(goal_cosine=r.signals["log_ratio"])


def test_the_fall_is_charged_to_the_token_that_turned():
    """Cosines of the worked trajectory; its third token turns away. Phi before the first token is not known."""
    credit = potential(with_cosines([COSINES]))
    want = torch.tensor([[0.0, 0.019106, -0.627875, -0.355995]], dtype=F64)
    torch.testing.assert_close(credit.advantages, want, rtol=0, atol=1e-9)
    assert credit.notes["unmeasured_tokens"] == 1


def test_values_of_the_state_before_the_token():
    """r'_t = Phi(t+1) - Phi(t) with Phi(end) = 0, as written."""
    got = potential(with_cosines([COSINES]), state="before").advantages
    torch.testing.assert_close(got, torch.tensor([[0.019106, -0.627875, 0.592688, -0.948683]], dtype=F64))


def test_the_prompt_tells_the_first_state():
    r = with_cosines([[9.0, 0.5, 0.7, 0.6]], action_mask=[[False, False, True, True]])
    torch.testing.assert_close(potential(r).advantages, torch.tensor([[0, 0, 0.2, -0.7]], dtype=F64))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("state", ["after", "before"])
def test_what_is_still_to_come_is_a_baseline(gamma, state):
    """The discounted sum of r' from t on is -Phi(s_t): nothing the policy does changes it."""
    r = with_cosines([[0.3, *COSINES], [0.1, 0.2]], action_mask=[[False, True, True, True, True], [False, True]])
    shaped = potential(r, gamma=gamma, state=state)
    again = r.with_signals(shaped=Signal(shaped.advantages, "token"))
    total = returns_to_go(again, gamma=gamma, reward="shaped").advantages
    torch.testing.assert_close(total, potential(r, gamma=gamma, state=state, form="return").advantages)
    shift = 1 if state == "after" else 0
    torch.testing.assert_close(total[0, 1], -r.signals["goal_cosine"].values[0, 1 - shift])


def test_an_unmeasured_state_silences_its_neighbours_only():
    got = potential(with_cosines([[0.1, NAN, 0.3, 0.4]]), state="before")
    torch.testing.assert_close(got.advantages, torch.tensor([[0, 0, 0.1, -0.4]], dtype=F64))
    assert got.notes["unmeasured_tokens"] == 2


def test_used_beside_an_outcome():
    r = with_cosines([[0.5, 0.75], [0.5, 0.25]], outcome=[1.0, 0.0])
    both = add((1.0, dr_grpo()), (0.5, potential()))(r)
    torch.testing.assert_close(both.advantages, torch.tensor([[0.5, 0.25], [-0.5, -0.75]], dtype=F64))


@given(seed=SEEDS, state=st.sampled_from(["after", "before"]), gamma=st.sampled_from([1.0, 0.9]))
@tried
def test_potential_agrees_with_the_equation(seed, state, gamma):
    r = random_batch(seed)
    phi = r.signals["goal_cosine"].values

    def value(a):
        b, t = a
        if state == "before":
            return float(phi[b, t])
        return float(phi[b, t - 1]) if t else NAN

    want = blank(r)
    for e in episodes(r):
        v = [*map(value, e.actions), 0.0]
        change = [gamma * v[t + 1] - v[t] for t in range(len(e.actions))]
        put(want, e.actions, [0.0 if math.isnan(x) else x for x in change])
    torch.testing.assert_close(potential(r, state=state, gamma=gamma).advantages, table_of(want, r))


# ---- redistribution --------------------------------------------------------------------------------------------------------


def decoded_batch(dtype=F64) -> Rollouts:
    """Step rewards 1, 2, 3 of an episode worth 3, steps of two tokens; 2, 0 of one worth 2, its second step empty."""
    return Rollouts.from_lists(
        [[1] * 6, [1] * 3],
        [0, 0],
        outcome=[3.0, 2.0],
        steps=[[(0, 2), (2, 4), (4, 6)], [(0, 2), (2, 2)]],
        signals={"decoded": Signal(torch.tensor([1.0, 2.0, 3.0, 2.0, 0.0], dtype=dtype), "step")},
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_forms(dtype):
    """What is still to come: 6, 5, 3; above the even share 1: 0, 1, 2. The second: 2; 1 above its share of two steps."""
    r = decoded_batch(dtype)
    to_come = torch.tensor([[6, 6, 5, 5, 3, 3], [2, 2, 0, 0, 0, 0]], dtype=dtype)
    torch.testing.assert_close(lare()(r).advantages, to_come)
    above = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0]], dtype=dtype)
    torch.testing.assert_close(lare(form="centred")(r).advantages, above)


def test_centred_credit_adds_up_to_the_error_of_the_decoder():
    credit = redistribution(decoded_batch())
    total = credit.parts["decoded"].values + credit.parts["outcome"].values
    torch.testing.assert_close(total[:3].sum(), torch.tensor(6.0 - 3.0, dtype=F64))
    torch.testing.assert_close(total[3:].sum(), torch.tensor(2.0 - 2.0, dtype=F64))


def test_unmeasured_steps_and_outcomes():
    r = decoded_batch()
    r = r.with_signals(
        decoded=Signal(torch.tensor([1.0, NAN, 3.0, 2.0, 0.0], dtype=F64), "step"),
        outcome=Signal(torch.tensor([3.0, NAN], dtype=F64), "trajectory"),
    )
    credit = redistribution(r)
    torch.testing.assert_close(credit.advantages[0], torch.tensor([-0.5, -0.5, 0, 0, 1.5, 1.5], dtype=F64))
    assert not credit.mask[1].any()
    assert credit.notes["unmeasured_steps"] == 1
    assert lare()(r).advantages[0].tolist() == [4, 4, 3, 3, 3, 3]  # it reads no outcome, and the step adds nothing


def test_returns_take_any_baseline():
    white = chain(lare(), whiten(ddof=0, eps=0.0))(decoded_batch())
    assert float(white.advantages.sum()) == pytest.approx(0)
    assert repr(lare(form="centred")) == "redistribution(decoded='decoded', outcome='outcome', spans='step')"


@given(seed=SEEDS)
@tried
def test_redistribution_agrees_with_the_equation(seed):
    r = random_batch(seed)
    want = blank(r)
    for e in episodes(r):
        g = {s.number: float(r.signals["decoded"].values[s.number]) for s in e.steps}
        known = [s for s in e.steps if not math.isnan(g[s.number])]
        for s in known:
            if not math.isnan(e.outcome):
                put(want, s.actions, [g[s.number] - e.outcome / len(known)] * len(s.actions))
    torch.testing.assert_close(redistribution(r).advantages, table_of(want, r))


def test_grpo_can_be_joined():
    r = decoded_batch()
    joined = add((1.0, grpo()), (0.1, redistribution()))(r)
    torch.testing.assert_close(joined.advantages, grpo(r).advantages + 0.1 * redistribution(r).advantages)
