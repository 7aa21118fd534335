import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, chain, dr_grpo, emphasise, grpo, hicra, signed_outcome
from reference.batches import random_batch
from reference.loops import blank, episodes, group_relative, put, table_of

NAN = float("nan")


def four(dtype=torch.float64, marks=((0, 1), (2,), (), ())) -> Rollouts:
    planning = torch.zeros(4, 4, dtype=dtype)
    for row, where in enumerate(marks):
        planning[row, list(where)] = 1
    return Rollouts.from_lists(
        [[1] * n for n in (4, 3, 3, 2)],
        [0] * 4,
        outcome=[1, 0, 0, 0],
        signals={"planning": Signal(planning, "token")},
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_worked_example(dtype):
    """B = 0.75 and -0.25; a fifth of |B| more on planning tokens."""
    want = [[0.9, 0.9, 0.75, 0.75], [-0.25, -0.25, -0.2, 0], [-0.25, -0.25, -0.25, 0], [-0.25, -0.25, 0, 0]]
    torch.testing.assert_close(hicra(alpha=0.2)(four(dtype)).advantages, torch.tensor(want, dtype=dtype))
    from_grpo = hicra(scale="std")(four(dtype)).advantages
    torch.testing.assert_close(from_grpo[0, 0], 1.2 * grpo()(four(dtype)).advantages[0, 0])


def test_the_extra_credit_is_a_part_and_its_sum_is_known():
    """alpha * sum |B| |S| = 0.2 * (0.75 * 2 + 0.25 * 1)."""
    credit = hicra()(four())
    assert credit.parts["planning"].values.sum() == pytest.approx(0.2 * (0.75 * 2 + 0.25))
    assert credit.notes["planning_tokens"] == 3 / 12


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_never_less_and_equal_off_the_marks(seed):
    r = random_batch(seed)
    base, more, marks = dr_grpo()(r).advantages, hicra()(r).advantages, r.signals["planning"].values
    assert (more >= base).all()
    assert torch.equal(more[marks == 0], base[marks == 0])
    assert torch.equal(hicra(alpha=0.0)(r).advantages, base)


def test_no_credit_and_no_marks():
    flat = four().with_signals(outcome=Signal(torch.full((4,), 0.3), "trajectory"))
    assert (hicra()(flat).advantages == 0).all()
    assert torch.equal(hicra()(four(marks=((),) * 4)).advantages, dr_grpo()(four()).advantages)


def test_an_unmeasured_mark_counts_as_none():
    planning = four().signals["planning"].values.clone()
    planning[0, 0] = NAN
    credit = hicra()(four().with_signals(planning=Signal(planning, "token")))
    assert credit.advantages[0].tolist() == pytest.approx([0.75, 0.9, 0.75, 0.75])
    assert credit.notes["unmeasured_planning"] == 1


def test_marks_may_be_given_per_step():
    """As a judge of steps would: the second step plans."""
    r = Rollouts.from_lists([[1, 2, 3]], [0], outcome=[0.0], steps=[[(0, 1), (1, 3)]])
    r = r.with_signals(plans=Signal(torch.tensor([0.0, 1.0]), "step"))
    assert chain(signed_outcome(), emphasise(alpha=0.5, where="plans"))(r).advantages.tolist() == [[-1.0, -0.5, -0.5]]


@pytest.mark.parametrize("alpha", [-0.1, 1.0, 2.0])
def test_alpha_out_of_bounds(alpha):
    with pytest.raises(ValueError, match=f"emphasise needs 0 <= alpha < 1; got {alpha:g}"):
        hicra(alpha=alpha)(four())


def test_messages():
    half = four().with_signals(planning=Signal(torch.full((4, 4), 0.5), "token"))
    with pytest.raises(ValueError, match=r"marks 0, 1 or NaN in signals\['planning'\]; got 0.5. Threshold them first"):
        hicra()(half)
    two = random_batch(1)
    with pytest.raises(ValueError, match=r"needs signals\['factors'\] with one mark each"):
        hicra(planning="factors")(two)


@given(seed=st.integers(0, 2**32 - 1), alpha=st.sampled_from([0.0, 0.2, 0.9]))
@settings(max_examples=25, deadline=None)
def test_agrees_with_the_loop(seed, alpha):
    r = random_batch(seed)
    base, want = group_relative(r, scale=None), blank(r)
    for e in episodes(r):
        marks = [float(r.signals["planning"].values[a]) for a in e.actions]
        credit = [base[b][t] for b, t in e.actions]
        put(want, e.actions, [x + alpha * abs(x) if m else x for x, m in zip(credit, marks, strict=True)])
    torch.testing.assert_close(hicra(alpha=alpha)(r).advantages, table_of(want, r), rtol=1e-9, atol=1e-9)
