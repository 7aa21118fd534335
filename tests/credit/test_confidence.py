import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, chain, grpo, penalise_certainty, shape_by_confidence, signed_outcome, ucas
from apportion.functional import self_certainty
from reference.batches import random_batch
from reference.loops import blank, deviation, episodes, mean, put, table_of

NAN = float("nan")
DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
CERTAINTY = [[2, 3], [4, 6, 5], [5, 5], [1, 2]]
LOGITS = [[10, 12], [11, 20, 15], [18, 16], [12, 14]]


def table(rows, dtype=torch.float64, fill=0.0) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def four(
    dtype=torch.float64, outcome=(1, 1, 0, 0), certainty=CERTAINTY, logits=LOGITS, groups=(0, 0, 0, 0)
) -> Rollouts:
    return Rollouts.from_lists(
        [[1] * len(row) for row in CERTAINTY],
        list(groups),
        outcome=list(outcome),
        signals={
            "self_certainty": Signal(table(certainty, dtype, fill=9e9), "token"),
            "sampled_logit": Signal(table(logits, dtype, fill=-9e9), "token"),
        },
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_example(dtype):
    """Rewards 1, 1, 0, 0; C = 2.5, 5, 5, 1.5 by the mean and 5, 15, 10, 3 by the sum; logits from 10 to 20."""

    def check(method, want):
        torch.testing.assert_close(method(four(dtype)).advantages, table(want, dtype), **DTYPES[dtype])

    def shaped(reduce):
        return chain(grpo(), shape_by_confidence(reduce=reduce))

    check(grpo(), [[0.866024] * 2, [0.866024] * 3, [-0.866024] * 2, [-0.866024] * 2])
    check(shaped("mean"), [[0.996651] * 2, [0.701472] * 3, [-1.163208] * 2, [-0.584377] * 2])
    check(shaped("sum"), [[1.007278] * 2, [0.632766] * 3, [-0.970503] * 2, [-0.615359] * 2])
    check(
        ucas(),
        [[0.996651, 0.986651], [0.696472, 0.651472, 0.676472], [-1.203208, -1.193208], [-0.594377, -0.604377]],
    )
    check(
        ucas(reduce="sum"),
        [[1.007278, 0.997278], [0.627766, 0.582766, 0.607766], [-1.010503, -1.000503], [-0.625359, -0.635359]],
    )


@pytest.mark.parametrize(
    ("reduce", "want"),
    [
        ("mean", [-0.561951, 0.842927, 0.842927, -1.123902]),
        ("sum", [-0.604379, 1.255248, 0.325435, -0.976304]),
    ],
)
def test_z_of_the_worked_example(reduce, want):
    """exp(-b Z) is the factor on an advantage of 1."""
    credit = chain(signed_outcome(low=1.0), shape_by_confidence(b_pos=1.0, reduce=reduce))(four())
    torch.testing.assert_close(-credit.advantages[:, 0].log(), torch.tensor(want).double(), rtol=0, atol=5.1e-7)


def test_self_certainty_of_logits():
    logits = torch.tensor([[2, 0, -1, 0.5], [0, 0, 0, 0]], dtype=torch.float64)
    want = torch.tensor([1.967350, 1.386294], dtype=torch.float64)
    torch.testing.assert_close(self_certainty(logits), want, rtol=0, atol=5.1e-7)
    torch.testing.assert_close(self_certainty(logits + 7), self_certainty(logits))
    divergence = -math.log(4) - logits.log_softmax(1).mean(1)
    torch.testing.assert_close(self_certainty(logits), divergence + math.log(4))


def test_without_strength_it_is_grpo_exactly():
    for r in (four(), random_batch(3), random_batch(4, dtype=torch.float32)):
        nothing = ucas(b_pos=0.0, b_neg=0.0, lam=0.0)(r)
        assert torch.equal(nothing.advantages, grpo()(r).advantages)
        assert torch.equal(nothing.mask, grpo()(r).mask)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_signs_and_bounds(seed):
    r = random_batch(seed)
    base, shaped, whole = grpo()(r).advantages, ucas(lam=0.0)(r).advantages, ucas()(r).advantages
    assert torch.equal(base.sign(), shaped.sign())
    assert (whole[shaped > 0] >= 0).all()
    assert (whole[shaped < 0] <= shaped[shaped < 0]).all()


def test_a_constant_on_all_logits_changes_nothing():
    higher = four(
        logits=[[x + 7 for x in row] for row in LOGITS], certainty=[[x - 3 for x in row] for row in CERTAINTY]
    )
    torch.testing.assert_close(ucas()(higher).advantages, ucas()(four()).advantages)


def test_equal_rewards_leave_the_penalty_alone():
    """n = 0, .2 | .1, 1, .5 | .8, .6 | .2, .4: every token is pushed down, unless such groups are skipped."""
    r = four(outcome=[0.3] * 4)
    want = table([[0.0, -0.01], [-0.005, -0.05, -0.025], [-0.04, -0.03], [-0.01, -0.02]])
    torch.testing.assert_close(ucas()(r).advantages, want, rtol=0, atol=1e-8)
    assert (ucas(skip_zero_groups=True)(r).advantages == 0).all()


def test_skipped_groups_still_set_the_extremes():
    r = four(outcome=[1, 0, 0.5, 0.5], groups=[0, 0, 1, 1])
    credit = ucas(b_pos=0.0, b_neg=0.0, skip_zero_groups=True)(r)
    n = torch.tensor([0.1, 1.0, 0.5]).double()
    torch.testing.assert_close(credit.advantages[1], grpo()(r).advantages[1] - 0.05 * n, rtol=0, atol=1e-8)
    assert (credit.advantages[2:] == 0).all()


def test_a_group_of_one_keeps_the_penalty_only():
    r = four(groups=[0, 1, 2, 3])
    credit = ucas()(r)
    assert (credit.parts["outcome"].values == 0).all()
    torch.testing.assert_close(credit.advantages, credit.parts["certainty"].values)
    assert credit.advantages[1, 1] == pytest.approx(-0.05)


def test_logits_that_are_all_alike_are_neutral():
    credit = chain(signed_outcome(), penalise_certainty(lam=0.5))(four(logits=[[3] * len(x) for x in LOGITS]))
    assert credit.advantages[0].tolist() == [0.75, 0.75, 0.0]
    assert credit.advantages[2].tolist() == [-1.25, -1.25, 0.0]


def test_a_rewarded_token_stops_at_zero():
    credit = chain(signed_outcome(), penalise_certainty(lam=3.0))(four())
    assert credit.advantages[1, 1] == 0
    assert credit.parts["certainty"].values[1, 1] == -1
    assert credit.advantages[2, 0] == pytest.approx(-1 - 3 * 0.8)


def test_without_the_deviation_and_with_a_limit():
    """Z = C - mean = -1, 1.5, 1.5, -2; held at 1.25."""
    r = four()
    credit = ucas(b_pos=1.0, b_neg=0.5, scale=None, lam=0.0, limit=1.25)(r)
    want = [0.5 * math.exp(1), 0.5 * math.exp(-1.25), -0.5 * math.exp(0.625), -0.5 * math.exp(-0.625)]
    torch.testing.assert_close(credit.advantages[:, 0], torch.tensor(want).double())
    assert credit.notes["largest_confidence_z"] == 1.25


def test_unmeasured_tokens_and_responses():
    """The third response has no certainty: it stays as it was and the others are compared without it."""
    certainty = [[2, 3], [4, NAN, 5], [NAN, NAN], [1, 2]]
    credit = chain(signed_outcome(), shape_by_confidence())(four(certainty=certainty))
    c = [2.5, 4.5, 1.5]
    z = [(x - mean(c)) / (deviation(c) + 1e-6) for x in c]
    want = torch.tensor([math.exp(-0.25 * z[0]), math.exp(-0.25 * z[1]), -1.0, -math.exp(0.35 * z[2])]).double()
    torch.testing.assert_close(credit.advantages[:, 0], want)
    assert credit.notes["unmeasured_certainties"] == 3
    logits = [[10, NAN], [11, 20, 15], [18, 16], [12, 14]]
    credit = chain(signed_outcome(), penalise_certainty())(four(logits=logits))
    assert credit.advantages[0].tolist() == [1.0, 1.0, 0.0]
    assert credit.notes["unmeasured_logits"] == 1


def test_messages():
    r = four()
    with pytest.raises(
        ValueError, match=r"needs signals\['outcome'\] with one number per token; got unit 'trajectory'"
    ):
        chain(grpo(), penalise_certainty(logit="outcome"))(r)
    with pytest.raises(ValueError, match=r"shape_by_confidence needs a limit above 0; got -1"):
        ucas(limit=-1.0)(r)


def slow(r: Rollouts, reduce: str, scale: bool, skip: bool) -> list[list[float]]:
    out = blank(r)
    every = [e for e in episodes(r) if not math.isnan(e.outcome)]
    tokens = [a for e in every for a in e.actions]
    logit = {a: float(r.signals["sampled_logit"].values[a]) for a in tokens}
    low, high = min(logit.values(), default=0), max(logit.values(), default=0)
    for e in every:
        mates = [m for m in every if m.group == e.group]
        certainties = {id(m): [float(r.signals["self_certainty"].values[a]) for a in m.actions] for m in mates}
        c = {k: mean(v) if reduce == "mean" else sum(v) for k, v in certainties.items() if v}

        def standard(x, xs, scale=scale):
            if len(xs) < 2 or max(xs) - min(xs) < 1e-11:
                return 0.0
            return (x - mean(xs)) / (deviation(xs) + 1e-6 if scale else 1.0)

        def base(m, mates=mates):
            return standard(m.outcome, [k.outcome for k in mates])

        a = base(e)
        z = standard(c[id(e)], list(c.values())) if e.actions else 0.0
        a *= math.exp(-0.25 * z) if a > 0 else math.exp(0.35 * z)
        silent = skip and all(base(m) == 0 or not m.actions for m in mates)
        values = []
        for t in e.actions:
            n = 0.5 if high - low < 1e-8 else (logit[t] - low) / (high - low + 1e-6)
            v = a if silent else a - 0.05 * n
            values.append(max(v, 0.0) if a > 0 else v)
        put(out, e.actions, values)
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    reduce=st.sampled_from(["mean", "sum"]),
    scale=st.booleans(),
    skip=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_agrees_with_the_loop(seed, reduce, scale, skip):
    r = random_batch(seed)
    method = ucas(reduce=reduce, scale="std" if scale else None, skip_zero_groups=skip)
    want = table_of(slow(r, reduce, scale, skip), r)
    torch.testing.assert_close(method(r).advantages, want, rtol=1e-9, atol=1e-9)
