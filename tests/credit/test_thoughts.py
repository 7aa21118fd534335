import math
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, Spans, group_relative, tp_grpo
from reference.batches import random_batch
from reference.loops import blank, deviation, episodes, mean, put, table_of

NAN = float("nan")
DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
LABELS = [[1, 0, 0, 1], [1, 1], [0, 1]]
LENGTHS = [[1, 1, 1, 2], [1, 1], [2, 1]]
tried = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def responses(correct=(1, 1, 0), labels=LABELS, lengths=LENGTHS, answer=1, dtype=torch.float64, truncated=None):
    """Thinking steps of these lengths, and an answer behind them."""
    steps = []
    for row in lengths:
        ends = torch.tensor(row).cumsum(0).tolist()
        steps.append([(e - n, e) for n, e in zip(row, ends, strict=True)])
    tokens = [[1] * (sum(row) + answer) for row in lengths]
    r = Rollouts.from_lists(
        tokens, [0] * len(tokens), outcome=list(correct), steps=steps, truncated=truncated, dtype=dtype
    )
    flat = torch.tensor([x for row in labels for x in row], dtype=dtype)
    return r.with_signals(label=Signal(flat, "step"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_group(dtype):
    """h = .57735 twice and -1.1547; two of three are right, so an incorrect thought costs 2/3."""
    credit = tp_grpo(responses(dtype=dtype))
    want = [
        [0.577350, -0.089317, -0.089317, 0.577350, 0.577350, 0.577350],
        [0.577350, 0.577350, 0.577350, 0, 0, 0],
        [0, 0, -1.154700, -1.154700, 0, 0],
    ]
    torch.testing.assert_close(credit.advantages, torch.tensor(want, dtype=dtype), rtol=2e-6, atol=2e-6)
    h = torch.tensor([0.577350, 0.577350, -1.154700], dtype=dtype)
    torch.testing.assert_close(credit.parts["outcome"].values, h, rtol=2e-6, atol=2e-6)
    assert credit.notes["right_responses"] == pytest.approx(0.666667, abs=5e-7)
    assert -credit.parts["label"].values[1].item() == pytest.approx(0.666667, abs=5e-7)


def test_worked_thoughts():
    """1, 0 0, 1 and 1 1 and 0, 1."""
    thoughts = []
    for labels, lengths in zip(LABELS, LENGTHS, strict=True):
        runs = groupby(zip(labels, lengths, strict=True), key=lambda x: x[0])
        thoughts.append([[label, sum(n for _, n in run)] for label, run in runs])
    assert thoughts == [[[1, 1], [0, 2], [1, 2]], [[1, 2]], [[0, 2], [1, 1]]]
    assert tp_grpo(responses()).notes["thoughts"] == sum(map(len, thoughts))


# ---- against the equation, in both of its forms --------------------------------------------------------------------------


def outcomes_of(r: Rollouts, eps=1e-6):
    """The episodes, which of them are right and cut, and h, acc for each; None where nothing is measured or compared."""
    every = episodes(r, "step")
    cut = [r.truncated is not None and bool(r.truncated[e.rows[-1]]) for e in every]
    right = [e.outcome >= 0.5 and not c for e, c in zip(every, cut, strict=True)]
    known = []
    for e, ok in zip(every, right, strict=True):
        mates = [
            2.0 * y - 1 for x, y in zip(every, right, strict=True) if x.group == e.group and x.outcome == x.outcome
        ]
        if math.isnan(e.outcome) or len(mates) < 2:
            known.append(None)
            continue
        d = deviation(mates)
        h = (2.0 * ok - 1 - mean(mates)) / (d + eps) if d else 0.0
        known.append((h, (mean(mates) + 1) / 2))
    return every, right, cut, known


def direct(r: Rollouts, alpha=1.0, adaptive=True) -> torch.Tensor:
    """Token by token, as the third step of the definition says."""
    table = blank(r)
    for e, ok, cut, found in zip(*outcomes_of(r), strict=True):
        if found is None:
            continue
        h, acc = found
        put(table, e.actions, [h] * len(e.actions))
        for s in e.steps:
            label = 0.0 if cut else float(r.signals["label"].values[s.number])
            if label == 0:
                put(table, s.actions, [h - alpha * (acc if adaptive else 1.0) if ok else 0.0] * len(s.actions))
    return table_of(table, r)


def cumulative(r: Rollouts, merge: bool, alpha=1.0, adaptive=True) -> torch.Tensor:
    """Process rewards at the ends of thoughts, added up from the end; the answer belongs to a last, positive thought."""
    table = blank(r)
    for e, ok, cut, found in zip(*outcomes_of(r), strict=True):
        if found is None:
            continue
        h, acc = found
        stake = alpha * (acc if adaptive else 1.0) if ok else h
        put(table, e.actions, [h] * len(e.actions))
        labels = [0.0 if cut else float(r.signals["label"].values[s.number]) for s in e.steps]
        pairs = list(zip(labels, e.steps, strict=True))
        runs = [list(g) for _, g in groupby(pairs, key=lambda x: x[0])] if merge else [[p] for p in pairs]
        rewards = [stake * (1 if run[0][0] == 1 else -1) for run in runs]
        if merge and runs and runs[-1][0][0] == 1:
            rewards[-1] = 0.0  # it is one thought with the answer
        for k, run in enumerate(runs):
            for _, s in run:
                put(table, s.actions, [h + sum(rewards[k:])] * len(s.actions))
    return table_of(table, r)


@given(seed=SEEDS, alpha=st.sampled_from([0.0, 0.3, 1.0, 2.0]), adaptive=st.booleans())
@tried
def test_agrees_with_the_definition(seed, alpha, adaptive):
    r = random_batch(seed)
    got = tp_grpo(r, alpha=alpha, adaptive=adaptive).advantages
    torch.testing.assert_close(got, direct(r, alpha, adaptive), rtol=1e-9, atol=1e-9)
    r = random_batch(seed, unmeasured=False)
    got = tp_grpo(r, alpha=alpha, adaptive=adaptive).advantages
    torch.testing.assert_close(got, cumulative(r, True, alpha, adaptive), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, direct(r, alpha, adaptive), rtol=1e-9, atol=1e-9)
    apart = tp_grpo(r, alpha=alpha, adaptive=adaptive, merge=False).advantages
    torch.testing.assert_close(apart, cumulative(r, False, alpha, adaptive), rtol=1e-9, atol=1e-9)


# ---- laws -----------------------------------------------------------------------------------------------------------------------


def as_outcomes(r: Rollouts) -> torch.Tensor:
    """GRPO on +1 and -1, a cut response being wrong."""
    x = r.signals["outcome"].values
    _, right, _, _ = outcomes_of(r)
    o = torch.where(x.isnan(), NAN, torch.tensor(right).to(x.dtype) * 2 - 1)
    return group_relative(r.with_signals(right=Signal(o, "trajectory")), reward="right").advantages


@given(seed=SEEDS)
@tried
def test_key_tokens_keep_the_grpo_value_exactly(seed):
    r = random_batch(seed).replace(truncated=None)
    label = r.at_tokens(r.signals["label"])
    inside = r.span_ids("step") >= 0
    key = (label != 0) | ~inside
    got, want = tp_grpo(r).advantages, as_outcomes(r)
    assert torch.equal(got[key], want[key])
    right = torch.tensor(outcomes_of(r)[1])[r.trajectory_ids][:, None] & r.action_mask
    none = tp_grpo(r, alpha=0.0).advantages
    assert torch.equal(none[right], want[right])
    assert (none[~key & ~right] == 0).all()


def test_a_step_cut_in_two_changes_nothing():
    cut = responses(labels=[[1, 0, 0, 1, 1], [1, 1], [0, 0, 1]], lengths=[[1, 1, 1, 1, 1], [1, 1], [1, 1, 1]])
    assert torch.equal(tp_grpo(cut).advantages, tp_grpo(responses()).advantages)
    assert not torch.equal(tp_grpo(cut, merge=False).advantages, tp_grpo(responses(), merge=False).advantages), (
        "unmerged steps are not kept from it"
    )


def test_unmerged_steps_add_up():
    """Five wrong steps after a right one make it worse than nothing."""
    r = responses((1, 0), [[1, 0, 0, 0, 0, 0], [1]], [[1] * 6, [1]])
    first = tp_grpo(r, merge=False).advantages[0, 0].item()
    assert first == pytest.approx(2**-0.5 + 0.5 * (1 - 5), abs=1e-6)
    assert tp_grpo(r).advantages[0, 0].item() == pytest.approx(2**-0.5, abs=1e-6)


# ---- special cases -------------------------------------------------------------------------------------------------------------


def test_all_wrong_and_all_right():
    assert (tp_grpo(responses((0, 0, 0))).advantages == 0).all()
    credit = tp_grpo(responses((1, 1, 1)), alpha=0.7)
    want = [[0, -0.7, -0.7, 0, 0, 0], [0] * 6, [-0.7, -0.7, 0, 0, 0, 0]]
    torch.testing.assert_close(credit.advantages, torch.tensor(want, dtype=torch.float64), rtol=0, atol=0)


def test_fixed_reward():
    credit = tp_grpo(responses(), adaptive=False)
    assert credit.parts["label"].values[1] == -1.0


def test_hard_prompts_are_nearly_grpo():
    r = responses((1,) + (0,) * 49, [[0]] * 50, [[1]] * 50)
    gap = tp_grpo(r).advantages[0] - as_outcomes(r)[0]
    torch.testing.assert_close(gap, torch.tensor([-0.02, 0.0], dtype=torch.float64))


def test_without_reflections_right_responses_have_the_grpo_value():
    r = responses(labels=[[1, 1, 1, 1], [1, 1], [1, 1]])
    assert torch.equal(tp_grpo(r).advantages, as_outcomes(r))


def test_a_single_response_gets_nothing():
    r = responses((1,), [[0, 1]], [[1, 1]])
    credit = tp_grpo(r)
    assert (credit.advantages == 0).all()
    assert credit.mask.all()
    beside = responses((1, NAN), [[0, 1], [0]], [[1, 1], [1]])
    credit = tp_grpo(beside)
    assert (credit.advantages == 0).all()
    assert credit.mask.any(1).tolist() == [True, False]


def test_an_empty_thinking_part():
    r = responses((1, 0), [[], [0]], [[], [1]])
    h = as_outcomes(r)
    credit = tp_grpo(r)
    assert credit.advantages[0, 0] == h[0, 0] > 0
    assert credit.advantages[1].tolist() == [0.0, h[1, 1].item()]


def test_a_truncated_response_is_wrong_and_none_of_its_steps_was_used():
    r = responses((1, 1, 1), truncated=[False, False, True])
    credit = tp_grpo(r)
    assert (credit.advantages[2, :3] == 0).all()
    assert credit.advantages[2, 3] == as_outcomes(r)[2, 3] < 0
    assert credit.notes["truncated_responses"] == 1
    assert credit.notes["right_responses"] == pytest.approx(2 / 3)


def test_only_the_last_row_of_a_trajectory_is_cut():
    r = Rollouts.from_lists(
        [[1], [2], [3]], [0] * 3, trajectories=[0, 0, 1], outcome=[1.0, 0.0], truncated=[True, False, False],
        steps=[[(0, 1)], [], []], signals={"label": Signal(torch.ones(1), "step")},
    )  # fmt: skip
    assert tp_grpo(r).notes["truncated_responses"] == 0
    assert tp_grpo(r.replace(row_index=torch.tensor([1, 0, 0]))).notes["truncated_responses"] == 1


def test_a_step_without_label_keeps_the_grpo_value():
    r = responses(labels=[[1, NAN, 0, 1], [1, 1], [NAN, 0]])
    credit = tp_grpo(r)
    h = as_outcomes(r)
    assert credit.advantages[0, 1] == h[0, 1]
    assert (credit.advantages[2, :2] == h[2, :2]).all()
    assert credit.notes["unlabelled_steps"] == 2


def test_the_threshold():
    graded = responses((0.9, 0.6, 0.2))
    assert tp_grpo(graded).notes["right_responses"] == pytest.approx(2 / 3)
    assert tp_grpo(graded, threshold=0.8).notes["right_responses"] == pytest.approx(1 / 3)


def test_thoughts_reach_over_rows():
    """Two rows of one response: the incorrect thought began in the first."""
    r = Rollouts.from_lists([[1], [2], [3]], [0] * 3, trajectories=[0, 0, 1], outcome=[1.0, 0.0])
    steps = Spans(*torch.tensor([[1, 0], [0, 0], [1, 1], [1, 0]]))
    r = r.with_spans(step=steps).with_signals(label=Signal(torch.zeros(2), "step"))
    assert tp_grpo(r).notes["thoughts"] == 1
    assert tp_grpo(r.with_signals(label=Signal(torch.tensor([0.0, 1.0]), "step"))).notes["thoughts"] == 2


def test_messages():
    with pytest.raises(ValueError, match=r"tp_grpo needs labels 0, 1 or NaN in signals\['label'\]; got 0\.5"):
        tp_grpo(responses(labels=[[1, 0.5, 0, 1], [1, 1], [0, 1]]))
    with pytest.raises(ValueError, match="alpha of at least 0; got -1"):
        tp_grpo(responses(), alpha=-1.0)
