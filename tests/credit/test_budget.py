import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, Spans, brpo, dr_grpo
from reference.batches import random_batch
from reference.loops import blank, episodes, mean, put, table_of

NAN = float("nan")
DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
SCORES = [[[0, 0], [0, 1], [1, 1], [1, 1]], [[0, 0], [0, 0], [0, 1], [0, 0]]]


def cut(scores, *, apart=False, thought=1, groups=None, dtype=torch.float64) -> Rollouts:
    """A trajectory per entry: its thinking segments of `thought` tokens, summaries of 1 token behind each, or in later rows.

    Every forced token between them is an action in no span.
    """
    tokens, spans, values, labels = [], [], [], []
    for n, rollout in enumerate(scores):
        row, at = len(tokens), 0
        tokens.append([])
        segments = {}
        for j in range(len(rollout)):
            segments[j] = len(spans)
            spans.append((row, at, at + thought, j, -1))
            values.append(NAN)
            at += thought
            for x in [] if apart else rollout[j]:
                spans.append((row, at + 1, at + 2, j, segments[j]))
                values.append(x)
                at += 2
        tokens[row] = [1] * at
        labels.append(n)
        for j, x in [(j, x) for j, pool in enumerate(rollout) for x in pool if apart]:
            spans.append((len(tokens), 1, 2, j, segments[j]))
            values.append(x)
            tokens.append([1, 1])
            labels.append(n)
    owners = [(groups or [0] * len(scores))[n] for n in labels]
    columns = torch.tensor(spans).unbind(1)
    return Rollouts.from_lists(
        tokens,
        owners,
        trajectories=labels,
        spans={"budget": Spans(*columns[:4], parent=columns[4])},
        signals={"score": Signal(torch.tensor(values, dtype=dtype), "budget")},
        dtype=dtype,
    )


def thinking(r: Rollouts, credit, *names: str) -> torch.Tensor:
    """The advantage (or the sum of the named parts) of each segment, a row for each trajectory."""
    spans = r.spans["budget"]
    value = sum(credit.parts[n].values for n in names or ("group", "own"))
    owner = r.trajectory_ids[spans.row]
    rows = [value[(spans.parent < 0) & (owner == n)] for n in range(r.num_trajectories)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def summaries(r: Rollouts, credit) -> list[float]:
    return credit.parts["summary"].values[r.spans["budget"].parent >= 0].tolist()


def numbers(values, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


PRIORS = {
    "linear": [[0.325, 0.443750, 0.370833, 0.135714], [-0.325, -0.206250, -0.0625, -0.135714]],
    "base": [[0.5, 0.625, 0.583333, 0.339286], [-0.5, -0.375, -0.25, -0.339286]],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_worked_thinking(dtype, apart, prior):
    r = cut(SCORES, apart=apart, thought=3, dtype=dtype)
    credit = brpo(r, prior=prior)
    torch.testing.assert_close(thinking(r, credit), numbers(PRIORS[prior], dtype), **DTYPES[dtype])
    ids = r.span_ids("budget")
    each = sum(p.values for p in credit.parts.values())
    torch.testing.assert_close(credit.advantages[ids >= 0], each[ids[ids >= 0]])
    assert not credit.mask[ids < 0].any(), "forced tokens are not counted"
    assert credit.mask[ids >= 0].all()


@pytest.mark.parametrize("prior", [*PRIORS, "uniform", (1.0, 0.0, 0.0, 0.0)])
def test_worked_summaries_whatever_the_prior(prior):
    r = cut(SCORES)
    assert summaries(r, brpo(r, prior=prior)) == [0, 0, -0.5, 0.5, 0, 0, 0, 0, 0, 0, 0, 0, -0.5, 0.5, 0, 0]


def test_worked_steps_on_the_way():
    """R, V1 and V2 of the linear prior, put together again from the parts."""
    to_come = numbers([[0.8, 0.8, 0.7, 0.4], [0.15, 0.15, 0.15, 0.0]])
    own = numbers([[0, 0, 0.233333, 0.285714], [0, 0, 0, 0.114286]])
    group = numbers([0.475, 0.475, 0.425, 0.2])
    share = numbers([0, 0.25, 0.5, 0.75])
    r = cut(SCORES)
    credit = brpo(r, prior="linear")
    close = {"rtol": 0, "atol": 5.1e-7}
    torch.testing.assert_close(thinking(r, credit, "own"), share * (to_come - own), **close)
    torch.testing.assert_close(thinking(r, credit, "group"), (1 - share) * (to_come - group), **close)
    torch.testing.assert_close(thinking(r, credit, "group").sum(0), numbers([0.0] * 4))
    want = numbers([[0.475, 0.35625, 0.329167, 0.264286], [0.475, 0.35625, 0.2125, 0.135714]])
    torch.testing.assert_close(to_come - thinking(r, credit), want, **close)


def test_a_factor_on_the_prior_is_irrelevant():
    r = cut(SCORES)
    want = brpo(r, prior="linear").advantages
    for factor in (1.0, 0.25, 40.0):
        got = brpo(r, prior=tuple(factor * x for x in (1.0, 2.0, 3.0, 4.0))).advantages
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(brpo(r, prior=(3.0,) * 4).advantages, brpo(r).advantages)


def test_one_budget_is_the_mean_centred_grpo_on_thinking():
    scores = [[[1, 0]], [[1, 1]], [[0, 0]]]
    r = cut(scores)
    plain = dr_grpo(Rollouts.from_lists([[1]] * 3, [0] * 3, outcome=[0.5, 1.0, 0.0], dtype=torch.float64))
    for prior in ("uniform", "linear", "base"):
        torch.testing.assert_close(thinking(r, brpo(r, prior=prior)), plain.advantages)


def test_a_later_segment_sees_an_earlier_score_only_in_its_own_baseline():
    r, changed = cut(SCORES), cut([[[0, 0], [1, 1], [1, 1], [1, 1]], SCORES[1]])
    before, after = brpo(r), brpo(changed)
    group = [thinking(x, c, "group") for x, c in ((r, before), (changed, after))]
    assert torch.equal(group[0][:, 2:], group[1][:, 2:])
    assert not torch.equal(group[0][:, :2], group[1][:, :2])
    own = [thinking(x, c, "own") for x, c in ((r, before), (changed, after))]
    assert (own[1][0, 2:] < own[0][0, 2:]).all(), "a better earlier score leaves less to be credited later"
    assert torch.equal(own[0][1], own[1][1])


def test_budgets_of_prior_0_still_shape_the_own_baseline():
    r, other = cut(SCORES), cut([[[1, 1], *SCORES[0][1:]], SCORES[1]])
    first, second = (thinking(x, brpo(x, prior="base")) for x in (r, other))
    assert torch.equal(first[:, 0], second[:, 0])
    assert (first[0, 1:] > second[0, 1:]).all()


def test_a_chain_that_finds_the_answer_and_drifts():
    """Right at the second cut, wrong from the third on: up to the answer it is praised, then blamed."""
    drifting, steady = [[0], [1], [0], [0]], [[0], [0], [0], [0]]
    got = thinking(cut([drifting, steady]), brpo(cut([drifting, steady])))[0]
    assert (got[:2] > 0).all()
    assert (got[2:] < 0).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_give_exactly_nothing(value):
    r = cut([[[value] * 2] * 4] * 3)
    for prior in ("uniform", "linear", "base"):
        assert (brpo(r, prior=prior).advantages == 0).all()
    assert (brpo(cut([[[value] * 2] * 4])).advantages == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3])
def test_equal_graded_scores_give_exactly_nothing(value, dtype):
    for count in (1, 3):
        for prior in ("uniform", "linear", "base", (0.3, 0.1, 0.2, 0.4)):
            r = cut([[[value] * 3, [value], [value] * 2, [value] * 7]] * count, dtype=dtype)
            assert (brpo(r, prior=prior, decay=0.3).advantages == 0).all()


def test_thinking_that_ended_early_is_scored_at_its_end_for_all_later_budgets():
    """The second ended before budget 2 of 4; four summaries were made there: 1, 1, 0, 0. It counts as 0.5 at 2, 3 and 4."""
    early = [[0, 0], [1, 1, 0, 0]]
    r = cut([SCORES[0], early])
    credit = brpo(r, prior="linear")
    same = cut([SCORES[0], [[0, 0], [0, 1], [0, 1], [0, 1]]])
    want = thinking(same, brpo(same, prior="linear"))
    torch.testing.assert_close(thinking(r, credit)[0], want[0])
    torch.testing.assert_close(thinking(r, credit)[1, :2], want[1, :2])
    assert summaries(r, credit)[-4:] == [0.5, 0.5, -0.5, -0.5]
    assert credit.notes["ended_early"] == 0.5
    assert credit.notes["budgets"] == 4


def test_the_number_of_budgets_when_a_whole_group_ended_early():
    """Read off the group it would be 2; told, it is 4: with the own score half of the baseline instead of a quarter."""
    scores = [[[0], [1]], [[1], [0]]]
    r = cut(scores)
    two, four = thinking(r, brpo(r, prior="base")), thinking(r, brpo(r, prior="base", budgets=4))
    torch.testing.assert_close(two, numbers([[0.5, 0.5 * 0.5 + 0.5 * 1], [-0.5, -0.75]]))
    torch.testing.assert_close(four, numbers([[0.5, 0.75 * 0.5 + 0.25 * 1], [-0.5, -0.625]]))
    assert brpo(r, budgets=4).notes["ended_early"] == 1


def test_a_single_summary_is_compared_with_the_group():
    """Scores 1 and 0 at the first budget, 1 and 1 (the second pooled) at the second."""
    r = cut([[[1], [1]], [[0], [1, 1, 0]]])
    want = {"group": [0.5, 1 - 5 / 6, -0.5], "zero": [0.0, 0.0, 0.0]}
    for single, first in want.items():
        got = summaries(r, brpo(r, single=single))
        assert got[:3] == pytest.approx(first)
        assert got[3:] == pytest.approx([1 / 3, 1 / 3, -2 / 3]), "several have their own mean"


def test_a_group_of_one():
    """Scores 0, 0.5: R = 0.25, 0.25. Own earlier scores alone, or with V2 = 0 as in the released code."""
    r = cut([[[0, 0], [1, 0]]])
    torch.testing.assert_close(thinking(r, brpo(r)), numbers([[0.0, 0.25 - 0.0]]))
    torch.testing.assert_close(thinking(r, brpo(r, singleton="raw")), numbers([[0.25, 0.25]]))
    assert brpo(r).mask.sum() == 6
    better = cut([[[1, 0], [1, 1], [0, 0]]])
    own = thinking(better, brpo(better))[0].tolist()
    want = [0.0, 1 / 3 - 2 / 3 * 0.5, 0.0 - 1 / 3 * (0.5 * 0.5 + 1.0) / 1.5]
    assert own == pytest.approx(want)
    raw = thinking(better, brpo(better, singleton="raw"))[0].tolist()
    assert raw == pytest.approx([0.5, 1 / 3 - 1 / 3 * (2 / 3 * 0.5), 0 - 2 / 3 * (1 / 3 * 1.25 / 1.5)])


def test_two_groups_do_not_meet():
    apart = cut([*SCORES, *SCORES], groups=[0, 0, 1, 1])
    want = thinking(cut(SCORES), brpo(cut(SCORES)))
    torch.testing.assert_close(thinking(apart, brpo(apart)), torch.cat([want, want]))


def test_decay_0_trusts_the_latest_score_and_1_all_alike():
    r = cut([[[1], [0], [0]], [[0], [0], [0]]])
    third = {d: float(thinking(r, brpo(r, decay=d), "own")[0, 2]) for d in (0.0, 0.5, 1.0)}
    share, p = 2 / 3, 1 / 3
    assert third == pytest.approx({0.0: 0.0, 0.5: -share * p * (0.5 / 1.5), 1.0: -share * p * 0.5})


def test_unmeasured_summaries_and_budgets():
    """The first cut of the second rollout has no score: its first segment, whose R needs it, is out of V2 and the mask."""
    scores = [SCORES[0], [[NAN, NAN], *SCORES[1][1:]]]
    r = cut(scores)
    credit = brpo(r, prior="uniform")
    got = thinking(r, credit)
    assert (got[0, 0], got[1, 0]) == (0.0, 0.0), "alone in V2; unmeasured"
    ids = r.span_ids("budget")
    spans = r.spans["budget"]
    out = [n for n in range(len(spans)) if not credit.mask[ids == n].any()]
    first = [n for n in range(len(spans)) if int(spans.row[n]) == 1 and int(spans.index[n]) == 0]
    assert out == first, "the segment and its two summaries"
    assert (credit.notes["unmeasured_summaries"], credit.notes["unmeasured_budgets"]) == (2, 1)
    known = thinking(cut(SCORES), brpo(cut(SCORES)))
    torch.testing.assert_close(got[0, 1:], known[0, 1:])
    assert got[1, 1] == pytest.approx(0.125 - 0.375), "no earlier score: the group's mean alone, (0.125 - 0.625) / 2"
    one = cut([[[NAN, 1], [0, 1]], [[0, 0], [0, 0]]])
    assert thinking(one, brpo(one))[0, 0] == pytest.approx(0.75 - 0.375), "one of two summaries is enough"
    needless = cut([[[NAN], [1]], [[0], [0]]])
    torch.testing.assert_close(thinking(needless, brpo(needless, prior="base"))[:, 0], numbers([0.5, -0.5]))


def test_empty_thinking_trains_its_summaries_alone():
    r = cut(SCORES, thought=0)
    credit = brpo(r)
    assert credit.mask.sum() == 16
    assert credit.advantages[credit.mask].tolist() == [0, 0, -0.5, 0.5, 0, 0, 0, 0, 0, 0, 0, 0, -0.5, 0.5, 0, 0]


def test_messages():
    r = cut(SCORES)
    spans = r.spans["budget"]

    def with_parents(parent):
        return r.with_spans(budget=replace(spans, parent=torch.tensor(parent)))

    for parent in ([-1, 0, 1, *spans.parent.tolist()[3:]], [*spans.parent.tolist()[:-1], 0]):
        with pytest.raises(ValueError, match=r"brpo needs the parent of a summary to be a thinking segment .*; span"):
            brpo(with_parents(parent))
    with pytest.raises(ValueError, match=r"brpo has 3 budgets, but spans\['budget'\] goes up to index 3"):
        brpo(r, budgets=3)
    with pytest.raises(ValueError, match=r"brpo got a prior over 2 budgets and budgets=4"):
        brpo(r, prior=(0.5, 0.5), budgets=4)
    with pytest.raises(ValueError, match=r"brpo has 2 budgets"):
        brpo(r, prior=(0.5, 0.5))
    for prior in ((0.0,) * 4, (1.0, 1.0, 1.0, -1.0)):
        with pytest.raises(ValueError, match="needs a prior of weights of 0 or more, not all 0"):
            brpo(r, prior=prior)
    with pytest.raises(ValueError, match="needs a decay of 0 or more; got -1"):
        brpo(r, decay=-1.0)
    with pytest.raises(TypeError, match=r"brpo needs prior to be 'uniform' or 'linear' or 'base'"):
        brpo(prior="flat")


def reference(r: Rollouts, weights, m, decay=0.5, single="group", singleton="own") -> torch.Tensor:
    """The equations, one trajectory and one segment at a time; `weights(m)` is the prior, `m` the number or None."""
    spans, score = r.spans["budget"], r.signals["score"].values
    every = episodes(r, "budget")
    pools, lasts = [], []
    for e in every:
        roots = [s for s in e.steps if int(spans.parent[s.number]) < 0]
        lasts.append(max(s.index for s in roots))
        pool = {s.index: [] for s in roots}
        for s in e.steps:
            if int(spans.parent[s.number]) >= 0 and not math.isnan(score[s.number]):
                pool[int(spans.index[spans.parent[s.number]])].append(float(score[s.number]))
        pools.append(pool)
    table = blank(r)
    for me, e in enumerate(every):
        group = [n for n, k in enumerate(every) if k.group == e.group]
        count = m or max(lasts[n] for n in group) + 1
        p = [w / sum(weights(count)) for w in weights(count)]

        def q(n, j):
            found = pools[n][min(j, lasts[n])]
            return mean(found) if found else NAN

        def to_come(n, s, p=p, count=count, q=q):
            return math.fsum(p[j] * q(n, j) for j in range(s, count) if p[j])

        for step in e.steps:
            parent = int(spans.parent[step.number])
            if parent >= 0:
                j, x = int(spans.index[parent]), float(score[step.number])
                pool = pools[me][j]
                base = mean(pool)
                if len(pool) == 1 and single == "group":
                    base = mean([q(n, j) for n in group if not math.isnan(q(n, j))])
                value = x - base
            else:
                s = step.index
                mates = [to_come(n, s) for n in group if not math.isnan(to_come(n, s))]
                weight = {j: decay ** (s - 1 - j) for j in range(s) if not math.isnan(q(me, j))}
                known = sum(weight.values()) > 0
                share = s / count if known else 0.0
                v1 = sum(p[s:]) * sum(w * q(me, j) for j, w in weight.items()) / sum(weight.values()) if known else 0.0
                v2 = mean(mates)
                if len(mates) == 1 and singleton == "raw":
                    v2 = 0.0
                elif len(mates) == 1 and known:
                    share = 1.0
                value = to_come(me, s) - share * v1 - (1 - share) * v2
            if not math.isnan(value):
                put(table, step.actions, [value] * len(step.actions))
    return table_of(table, r)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_agrees_with_the_slow_reference(seed):
    r = random_batch(seed)
    close = {"rtol": 1e-9, "atol": 1e-9}
    uniform, linear = (lambda m: [1.0] * m), (lambda m: [j + 1.0 for j in range(m)])
    torch.testing.assert_close(brpo(r).advantages, reference(r, uniform, None), **close)
    got = brpo(r, prior="linear", budgets=5, singleton="raw").advantages
    torch.testing.assert_close(got, reference(r, linear, 5, singleton="raw"), **close)
    got = brpo(r, prior=(0.0, 2.0, 0.0, 1.0, 0.0), decay=0.25, single="zero").advantages
    torch.testing.assert_close(got, reference(r, lambda m: [0, 2, 0, 1, 0], 5, 0.25, "zero"), **close)
