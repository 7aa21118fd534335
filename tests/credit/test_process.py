import pytest
import torch

from apportion import Rollouts, capo, process_min, process_penalty, pure

DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
NAN = float("nan")


def close(credit, rows, dtype, **tolerance):
    width = credit.advantages.shape[1]
    want = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=dtype)
    torch.testing.assert_close(credit.advantages, want, **(tolerance or DTYPES[dtype]))


def judged(dtype=torch.float64) -> Rollouts:
    """Two responses of two steps; four critiques that name steps 1; 1; 0 and 1; none, and four times step 1."""
    return Rollouts.from_lists(
        [[1, 2, 3, 4], [1, 2, 3]],
        [0, 0],
        outcome=[1, 0],
        steps=[[(0, 2), (2, 4)], [(0, 1), (1, 3)]],
        judge=[[[0, 0, 1, 0], [1, 1, 1, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]],
        dtype=dtype,
    )


VOTES = {
    "intersection": [[2, 2, 2, 2], [0, -1, -1]],
    "majority": [[2, 2, 1, 1], [0, -1, -1]],
    "union": [[1, 1, 1, 1], [0, -1, -1]],
    "average": [[1.75, 1.75, 1.25, 1.25], [0, -1, -1]],
}
# e.g. intersection: seven rewards with sum 6, mean 6/7, sample deviation 1.463850; (2 - 6/7) / 1.463851 = 0.780720
CAPO = {
    "intersection": [[0.780720] * 4, [-0.585540, -1.268669, -1.268669]],
    "majority": [[1.122721, 1.122721, 0.336816, 0.336816], [-0.449088, -1.234993, -1.234993]],
    "union": [[0.750938] * 4, [-0.300375, -1.351689, -1.351689]],
    "average": [[0.964214, 0.964214, 0.555153, 0.555153], [-0.467498, -1.285618, -1.285618]],
}


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_votes(vote, dtype):
    close(process_penalty(judged(dtype), vote=vote), VOTES[vote], dtype)
    close(capo(judged(dtype), vote=vote), CAPO[vote], dtype)


def test_the_pooled_mean_is_zero_and_the_parts_are_readable():
    credit = capo(judged())
    assert abs(credit.advantages.sum()) < 1e-9
    assert {k: v.unit for k, v in credit.parts.items()} == {
        "outcome": "trajectory",
        "judge": "step",
        "baseline": "group",
    }
    # deviation 1.463850 of the seven rewards: outcome 2 / 1.463851, judge -1 / 1.463851, baseline -(6/7) / 1.463851
    torch.testing.assert_close(
        credit.parts["outcome"].values, torch.tensor([1.366260, 0.0]).double(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        credit.parts["judge"].values, torch.tensor([0.0, 0.0, 0.0, -0.683130]).double(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(credit.parts["baseline"].values, torch.tensor([-0.585540]).double(), rtol=0, atol=1e-6)


def test_identical_critiques_make_all_votes_agree_and_order_is_irrelevant():
    r = Rollouts.from_lists(
        [[1, 2], [3]], [0, 0], outcome=[1, 0], steps=[[(0, 1), (1, 2)], [(0, 1)]], judge=[[[1] * 3, [0] * 3], [[1] * 3]]
    )
    first, *others = [process_penalty(r, vote=v).advantages for v in VOTES]
    assert all((first == o).all() for o in others)
    judge = judged().signals["judge"]
    turned = judged().with_signals(judge=type(judge)(judge.values.flip(1), "step", judge.axes))
    for vote in VOTES:
        assert (capo(turned, vote=vote).advantages == capo(judged(), vote=vote).advantages).all()


def test_without_a_flag_it_is_scaled_outcome_pooled_over_tokens():
    """Rewards 2, 2 and 0: mean 4/3, deviation 2/sqrt(3): 0.577350 and -1.154700."""
    r = Rollouts.from_lists(
        [[1, 2], [3]], [0, 0], outcome=[1, 0], steps=[[(0, 2)], []], judge=[[[0, 0]], []], dtype=torch.float64
    )
    close(capo(r, eps=0.0), [[0.577350, 0.577350], [-1.154701]], torch.float64)


def test_unusable_critiques_are_dropped():
    """Of the first step one usable critique names it: all votes flag it. Of the second none is usable: no penalty."""
    r = Rollouts.from_lists(
        [[1, 2]], [0], outcome=[1], steps=[[(0, 1), (1, 2)]], judge=[[[1, NAN, NAN], [NAN, NAN, NAN]]]
    )
    for vote in VOTES:
        credit = process_penalty(r, vote=vote)
        assert credit.advantages.tolist() == [[1.0, 2.0]]
        assert credit.notes["unjudged_steps"] == 1
    assert (capo(r).advantages == 0).all(), "a group of one"


def test_no_steps_and_an_unmeasured_outcome():
    r = Rollouts.from_lists([[1], [2]], [0, 0], outcome=[1, NAN], steps=[[], [(0, 1)]], judge=[[], [[1.0, 1.0]]])
    credit = process_penalty(r)
    assert credit.advantages.tolist() == [[2.0], [0.0]]
    assert credit.mask.tolist() == [[True], [False]]


def test_notes_on_agreement():
    """Steps with 3:1, 1:3, 4:0 and 0:4 verdicts agree to 3/4, 3/4, 1 and 1."""
    assert process_penalty(judged()).notes["vote_agreement"] == 0.875


def test_graded_verdicts_and_other_units_are_refused():
    r = Rollouts.from_lists([[1]], [0], outcome=[1], steps=[[(0, 1)]], judge=[[[0.5]]], process=[[0.5]])
    with pytest.raises(ValueError, match=r"needs verdicts 0, 1 or NaN in signals\['judge'\]; got 0\.5\. Threshold"):
        process_penalty(r)
    with pytest.raises(ValueError, match=r"needs signals\['process'\] with shape \[S, critiques\]"):
        process_penalty(r, judge="process")
    with pytest.raises(ValueError, match=r"needs signals\['judge'\] with one value per trajectory; got unit 'step'"):
        process_penalty(r, outcome="judge")


# ---- PURE -------------------------------------------------------------------------------------------------------------


def scored(dtype=torch.float64) -> Rollouts:
    return Rollouts.from_lists(
        [[1] * 5, [1] * 3],
        [0, 0],
        outcome=[1, 0],
        steps=[[(0, 2), (2, 4), (4, 5)], [(0, 3)]],
        process=[[0.9, -0.2, 0.8], [0.5]],
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_pure(dtype):
    """Weights exp(-11), 1 and exp(-10) over their sum; baselines 1.5 / 8 and -0.799738 / 8; verifier +-1."""
    credit = pure(horizon=8)(scored(dtype))
    close(credit, [[0.612564, 0.612564, 0.612549, 0.612549, 0.812536], [-0.400033] * 3], dtype)
    tolerance = DTYPES[dtype]
    gain = torch.tensor([-0.199936, -0.199936, -0.199951, -0.199951, 0.000036], dtype=dtype)
    torch.testing.assert_close(credit.parts["process"].values[0], gain, **tolerance)
    torch.testing.assert_close(
        credit.parts["baseline"].values, torch.tensor([-0.1875, 0.099967], dtype=dtype), **tolerance
    )
    torch.testing.assert_close(credit.parts["outcome"].values, torch.tensor([1.0, -1.0], dtype=dtype))


def test_strict_minimum():
    """Minima to come -0.2 four times, then 0.8; baselines 1.5 / 8 and (4 x -0.2 + 0.8) / 8 = 0."""
    credit = process_min(scored(), temperature=None, coef=0.0, horizon=8)
    close(credit, [[-0.3875] * 4 + [0.6125], [0.5] * 3], torch.float64)
    assert "outcome" not in credit.parts


def test_a_cold_soft_minimum_is_the_strict_one_and_a_hot_one_the_mean():
    cold = process_min(scored(), temperature=1e-3, coef=0.0).parts["process"].values[0]
    torch.testing.assert_close(cold[:4], torch.full((4,), -0.2).double())
    hot = process_min(scored(), temperature=1e6, coef=0.0).parts["process"].values[0]
    torch.testing.assert_close(hot[0], torch.tensor(0.5).double(), rtol=1e-5, atol=0)


def test_a_tiny_temperature_does_not_underflow():
    credit = process_min(scored(torch.float32), temperature=1e-6)
    assert credit.advantages.isfinite().all()


def test_step_baselines():
    """Each response's r sums to about its minimum. Step: the other's sum over its steps, once per step end still to come.
    Token: the other's sum over its tokens, times the tokens of each step still to come."""
    first, second = -0.199936, 0.5
    step = process_min(scored(), coef=0.0, baseline="step")
    close(
        step,
        [
            [first - 3 * second] * 2 + [-0.199951 - 2 * second] * 2 + [0.000036 - second],
            [second - first / 3] * 3,
        ],
        torch.float64,
        rtol=0,
        atol=2e-6,
    )
    token = process_min(scored(), coef=0.0, baseline="token")
    close(
        token,
        [
            [first - 5 * second / 3] * 2 + [-0.199951 - 3 * second / 3] * 2 + [0.000036 - second / 3],
            [second - 3 * first / 5] * 3,
        ],
        torch.float64,
        rtol=0,
        atol=2e-6,
    )


def test_filler_steps_do_not_pay():
    """Five more steps of score 0.5 raise the plain sum by 2.5; the soft minimum moves by a few thousandths."""

    def gain(extra: int) -> float:
        n = 3 + extra
        r = Rollouts.from_lists(
            [[1] * n, [1]],
            [0, 0],
            steps=[[(k, k + 1) for k in range(n)], [(0, 1)]],
            process=[[0.9, -0.2, 0.8] + [0.5] * extra, [0.5]],
            dtype=torch.float64,
        )
        return float(process_min(r, coef=0.0).parts["process"].values[0, 0])

    assert abs(gain(5) - gain(0)) < 0.01
    assert abs(gain(5) + 0.2) < 0.01


def test_cutting_the_tokens_otherwise_leaves_the_baseline():
    """Equal scores in n steps give each p / n; the strict minimum is the same on every token, however they are cut."""

    def credit(steps, scores):
        r = Rollouts.from_lists([[1] * 4, [1] * 2], [0, 0], steps=[steps, [(0, 2)]], process=[scores, [0.3]])
        return process_min(r, coef=0.0, temperature=None, horizon=8).advantages

    assert (credit([(0, 4)], [0.6]) == credit([(0, 1), (1, 4)], [0.6, 0.6])).all()


def test_without_steps_only_the_outcome_and_a_group_of_one_nothing():
    r = Rollouts.from_lists([[1], [1], [1]], [0, 0, 1], outcome=[1, 0, 1], steps=[[], [], []], process=[[], [], []])
    assert pure()(r).advantages[:, 0].tolist() == [1.0, -1.0, 0.0]


def test_unmeasured_outcomes():
    r = Rollouts.from_lists(
        [[1]] * 4, [0, 0, 1, 1], outcome=[1, NAN, NAN, NAN], steps=[[(0, 1)]] * 4, process=[[0.5], [0.5], [0.5], [0.0]]
    )
    dropped = process_min(r, horizon=1)
    assert dropped.mask[:, 0].tolist() == [True, False, False, False]
    assert (dropped.advantages == 0).all()
    kept = process_min(r, horizon=1, unmeasured="process")
    assert kept.mask[:, 0].tolist() == [True, False, True, True]
    assert kept.advantages[:, 0].tolist() == [0.0, 0.0, 0.5, -0.5]


def test_a_step_without_score_or_tokens_is_left_out():
    r = Rollouts.from_lists(
        [[1, 2, 3], [4]],
        [0, 0],
        steps=[[(0, 1), (1, 1), (1, 3)], [(0, 1)]],
        process=[[0.5, -1.0, NAN], [0.5]],
    )
    credit = process_min(r, coef=0.0)
    assert credit.parts["process"].values[0].tolist() == [0.5, 0.0, 0.0]
    assert credit.notes["left_out_steps"] == 2


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"temperature above 0; got 0\. Set temperature=None"):
        process_min(scored(), temperature=0.0)
    with pytest.raises(ValueError, match="horizon above 0; got 0"):
        process_min(scored(), horizon=0)
    with pytest.raises(ValueError, match='no step rewards for baseline="step"'):
        process_min(scored(), temperature=None, baseline="step")
