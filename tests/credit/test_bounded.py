import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, bounded_return, chain, clip_delta, gae, whiten
from apportion.functional import bounded_rewards
from reference.batches import random_batch
from reference.loops import blank, episodes, mean, put, table_of

NAN = float("nan")
SCORES = [0.9, 0.6, 0.8, 0.7]
REPEATED = [0.9, 0.6, 0.8, 0.8, 0.8, 0.8, 0.7]


def answer(scores, outcome=1.0, dtype=torch.float64) -> Rollouts:
    """One step a token."""
    steps = [[(i, i + 1) for i in range(len(scores))]]
    return Rollouts.from_lists(
        [[1] * max(len(scores), 1)], [0], outcome=[outcome], steps=steps, process=[scores], dtype=dtype
    )


def returns(scores, form, outcome=1.0, eta=0.75, alpha=0.02, dtype=torch.float64) -> list[float]:
    """The return from each step; from the first it is the episode's."""
    r = answer(scores, outcome, dtype)
    return bounded_return(form=form, eta=eta, alpha=alpha)(r).advantages[0].tolist()


def rewards(scores, form, eta=0.75) -> list[float]:
    n = len(scores)
    x = torch.tensor(scores, dtype=torch.float64)
    return bounded_rewards(x, torch.zeros(n, dtype=torch.int64), torch.arange(n), form=form, eta=eta).tolist()


def test_worked_step_rewards():
    assert rewards(SCORES, "raw") == SCORES
    assert rewards(SCORES, "clip") == pytest.approx([0, -0.15, 0, -0.05])
    assert rewards(SCORES, "delta") == pytest.approx([0.3, -0.2, 0.8, 0])
    assert rewards(SCORES, "clip_delta") == pytest.approx([0.15, -0.15, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("form", "once", "repeated"),
    [("raw", 1.06, 1.108), ("clip", 0.996, 0.996), ("delta", 1.018, 1.018), ("clip_delta", 1.0, 1.0)],
)
def test_worked_returns_with_and_without_repetition(form, once, repeated, dtype):
    """The step of 0.8 four times: only the raw return grows, by 0.016 a copy."""
    assert returns(SCORES, form, dtype=dtype)[0] == pytest.approx(once, abs=2e-6 if dtype == torch.float32 else 1e-12)
    assert returns(REPEATED, form, dtype=dtype)[0] == pytest.approx(repeated, abs=2e-6)


def test_worked_returns_from_each_step():
    assert returns(SCORES, "delta") == pytest.approx([1.018, 1.012, 1.016, 1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
def test_telescoping_and_the_sign_of_clip(scores):
    """From step k < K on, delta adds up to r_k, and to 0 at K; clip never rewards."""
    delta = rewards(scores, "delta")
    for k in range(len(scores)):
        assert math.fsum(delta[k:]) == pytest.approx(scores[k] if k < len(scores) - 1 else 0.0, abs=1e-12)
    assert max(rewards(scores, "clip")) <= 0
    assert returns(scores, "clip")[0] <= 1
    assert returns(scores, "delta")[0] <= 1 + 0.02


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.data(), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_repeating_a_good_step_earns_nothing(scores, data, copies):
    k = data.draw(st.integers(0, len(scores) - 2))
    scores[k] = max(scores[k], 0.75)
    more = scores[:k] + [scores[k]] * copies + scores[k:]
    for form in ("clip", "clip_delta"):
        assert returns(more, form)[0] == pytest.approx(returns(scores, form)[0], abs=1e-12)
    assert returns(more, "raw")[0] == pytest.approx(returns(scores, "raw")[0] + copies * 0.02 * scores[k])


def test_few_steps():
    assert rewards([0.4], "delta") == [0]
    assert rewards([0.4], "clip") == pytest.approx([-0.35])
    assert rewards([0.4], "clip_delta") == [0]
    assert rewards([0.4, 0.9], "delta") == [0.4, 0]
    assert rewards([], "delta") == []
    assert returns([], "clip_delta") == [1.0]


def test_equal_scores():
    """Delta pays c before the last step and nothing else; clip takes min(c - eta, 0) each time."""
    assert rewards([0.5] * 4, "delta") == [0, 0, 0.5, 0]
    assert rewards([0.5] * 4, "clip") == [-0.25] * 4
    assert rewards([0.8] * 4, "clip") == [0] * 4


def test_a_wrong_answer_has_the_steps_alone():
    assert returns(SCORES, "delta", outcome=0.0) == pytest.approx([0.018, 0.012, 0.016, 0.0])


def test_unmeasured_steps_are_dropped_from_the_sequence():
    """In the middle, and at the end, where the step before it becomes the last."""
    assert rewards([0.9, NAN, 0.6, 0.8, 0.7], "delta") == pytest.approx([0.3, 0, -0.2, 0.8, 0])
    assert rewards([0.9, 0.6, 0.8, NAN], "delta") == pytest.approx([0.3, 0.6, 0, 0])
    credit = bounded_return(form="delta")(answer([0.9, NAN, 0.6, 0.8, 0.7]))
    assert credit.notes["left_out_steps"] == 1
    assert credit.advantages[0].tolist() == pytest.approx([1.018, 1.012, 1.012, 1.016, 1.0])


def test_tokens_between_and_after_the_steps():
    """A token has the return of the steps that end at it or later; behind the last step, the outcome."""
    r = Rollouts.from_lists([[1] * 6], [0], outcome=[1.0], steps=[[(1, 3), (4, 5)]], process=[[0.5, 0.25]])
    want = [[1.75, 1.75, 1.75, 1.25, 1.25, 1.0]]
    assert bounded_return(form="raw", alpha=1.0)(r).advantages.tolist() == want


def test_eta_as_the_mean_of_the_group():
    """Mean of 0.9, 0.5 | 0.4 in one group: 0.6; the response without outcome has no say, the other group its own."""
    r = Rollouts.from_lists(
        [[1, 2], [1], [1], [1]],
        [0, 0, 0, 1],
        outcome=[1.0, 0.0, NAN, 0.0],
        steps=[[(0, 1), (1, 2)], [(0, 1)], [(0, 1)], [(0, 1)]],
        process=[[0.9, 0.5], [0.4], [0.0], [0.1]],
        dtype=torch.float64,
    )
    credit = bounded_return(form="clip", alpha=1.0)(r)
    torch.testing.assert_close(credit.advantages, torch.tensor([[0.9, 0.9], [-0.2, 0], [0, 0], [0, 0]]).double())
    assert credit.mask[:, 0].tolist() == [True, True, False, True]
    assert (bounded_return(form="clip").scope, bounded_return(form="clip", eta=0.5).scope) == ("group", "row")
    assert bounded_return(form="delta").scope == "row"


def test_the_alias():
    r = answer(SCORES)
    assert clip_delta(eta=0.75)(r).advantages[0].tolist() == returns(SCORES, "clip_delta")
    assert chain(clip_delta(eta=0.75), whiten()).laws == ("shift",)


def test_as_a_signal_for_gae():
    """The outcome joins the reward of the last step; V = 0 and lam = 1 give the same returns."""
    r = answer(SCORES)
    step = 0.02 * torch.tensor(rewards(SCORES, "delta"), dtype=torch.float64)
    step[-1] += 1.0
    r = r.replace(values=torch.zeros(1, 4, dtype=torch.float64)).with_signals(step_reward=Signal(step, "step"))
    credit = gae(reward="step_reward", over="step", lam=1.0)(r)
    assert credit.advantages[0].tolist() == pytest.approx([1.018, 1.012, 1.016, 1.0])


def test_steps_in_any_order():
    scores, ids = torch.tensor([0.7, 0.3, 0.9, 0.6, 0.1, 0.8]).double(), torch.tensor([0, 1, 0, 0, 1, -1])
    got = bounded_rewards(scores, ids, torch.tensor([3, 1, 0, 1, 0, 7]), form="delta")
    torch.testing.assert_close(got, torch.tensor([0, 0, 0.3, 0.6, 0.1, 0]).double())


def slow(r: Rollouts, form: str, eta: float | str, alpha: float) -> list[list[float]]:
    out = blank(r)
    every = [e for e in episodes(r) if not math.isnan(e.outcome)]
    score = {s.number: float(r.signals["process"].values[s.number]) for e in every for s in e.steps if s.actions}
    score = {k: v for k, v in score.items() if not math.isnan(v)}
    for e in every:
        mates = [score[s.number] for m in every if m.group == e.group for s in m.steps if s.number in score]
        limit = mean(mates) if eta == "group_mean" else eta
        steps = [s for s in e.steps if s.number in score]
        x = [score[s.number] for s in steps]
        if "clip" in form:
            x = [min(v - limit, 0.0) for v in x]
        if "delta" in form:
            last = len(x) - 1
            x = [x[k] - (x[k + 1] if k + 1 < last else 0.0) if k < last else 0.0 for k in range(len(x))]
        at = {s.actions[-1]: alpha * v for s, v in zip(steps, x, strict=True)}
        values = [e.outcome + math.fsum(at.get(a, 0.0) for a in e.actions[t:]) for t in range(len(e.actions))]
        put(out, e.actions, values)
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["raw", "clip", "delta", "clip_delta"]),
    eta=st.sampled_from(["group_mean", 0.3, -0.5]),
)
@settings(max_examples=40, deadline=None)
def test_agrees_with_the_loop(seed, form, eta):
    r = random_batch(seed)
    got = bounded_return(form=form, eta=eta, alpha=0.5)(r).advantages
    torch.testing.assert_close(got, table_of(slow(r, form, eta, 0.5), r), rtol=1e-9, atol=1e-9)
