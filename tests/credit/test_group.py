import pytest
import torch

from apportion import Rollouts, Signal, Spans, dr_grpo, group_relative, grpo, rloo

DTYPES = {torch.float64: {"rtol": 0, "atol": 5e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}


def four(outcome, dtype=torch.float64, **more) -> Rollouts:
    """One token for each reward, all in one group."""
    return Rollouts.from_lists([[5]] * len(outcome), [0] * len(outcome), outcome=outcome, dtype=dtype, **more)


def first_two(credit) -> list[float]:
    return [round(x, 4) for x in credit.advantages[:2, 0].tolist()]


# r = [1, 0, 0, 0]: mean 1/4; sample deviation 1/2, population deviation sqrt(3)/4 = 0.4330; of the others of the 1: 0,
# of the others of a 0: sqrt(1/3) = 0.5774, around their mean 1/3.
@pytest.mark.parametrize(
    ("how", "want"),
    [
        ({"eps": 0.0}, [1.5, -0.5]),
        ({"eps": 1e-4}, [1.4997, -0.4999]),
        ({"eps": 0.0, "ddof": 0}, [1.7321, -0.5774]),
        ({"scale": None}, [0.75, -0.25]),
        ({"scale": "mean", "eps": 0.0}, [3.0, -1.0]),
        ({"scale": None, "baseline": "leave_one_out"}, [1.0, -0.3333]),
        ({"scale": "leave_one_out_std", "baseline": "leave_one_out", "eps": 0.0}, [0.0, -0.5774]),
        ({"scale": None, "baseline": "none"}, [1.0, 0.0]),
        ({"eps": 0.0625, "eps_inside": "var", "ddof": 1}, [1.3416, -0.4472]),
    ],
    ids=str,
)
def test_conventions(how, want):
    assert first_two(group_relative(four([1, 0, 0, 0]), **how)) == want


def test_a_scale_over_the_batch():
    """Rewards 1, 0 and 1, 1: both groups are centred alone and divided by the deviation of all four, 1/2."""
    r = Rollouts.from_lists([[5]] * 4, [0, 0, 1, 1], outcome=[1, 0, 1, 1], dtype=torch.float64)
    credit = group_relative(r, scale="batch_std", eps=0.0)
    assert credit.advantages[:, 0].tolist() == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [0.99, 0.1, 1 / 3, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_twelve_equal_rewards_give_exactly_nothing(value, dtype, eps):
    r = four([value] * 12, dtype)
    for scale in ("std", "leave_one_out_std", "batch_std", "mean", None):
        for baseline in ("mean", "leave_one_out"):
            credit = group_relative(r, scale=scale, baseline=baseline, eps=eps)
            assert (credit.advantages == 0).all(), (scale, baseline)
            assert credit.mask.all()
            assert credit.notes["zero_signal_groups"] == 1.0


def test_a_small_difference_is_signal():
    assert first_two(grpo(four([0.5, 0.5 + 5e-7]), eps=0.0)) == [-0.7071, 0.7071]


def test_a_group_of_one():
    r = Rollouts.from_lists([[5], [6], [7]], [0, 1, 1], outcome=[1, 1, 0], dtype=torch.float64)
    assert grpo(r).advantages[0] == 0
    assert grpo(r).notes["singleton_groups"] == 1
    assert group_relative(r, singleton="raw").advantages[0] == 1
    assert group_relative(r, baseline="none", scale=None).advantages[0] == 1, "compared with nothing"
    with pytest.raises(ValueError, match=r"needs two measured members in a group; 1 of 2 have one\. Sample more"):
        group_relative(r, singleton="error")


def test_an_unmeasured_trajectory_is_in_no_statistic_and_not_in_the_loss():
    credit = dr_grpo(four([1, 0, float("nan")]))
    assert credit.advantages[:, 0].tolist() == [0.5, -0.5, 0.0]
    assert credit.mask[:, 0].tolist() == [True, True, False]
    assert credit.notes["unmeasured"] == 1


def test_a_trajectory_of_two_rows_counts_once():
    """Rewards 1 and 0 with mean 1/2, although the first trajectory has two rows."""
    r = Rollouts.from_lists([[5], [6], [7]], [0, 0, 0], trajectories=["a", "a", "b"], outcome=[1, 0])
    assert dr_grpo(r).advantages[:, 0].tolist() == [0.5, 0.5, -0.5]


def test_an_empty_response_counts():
    r = Rollouts.from_lists([[5], [6], []], [0, 0, 0], outcome=[1, 0, 0.5])
    assert dr_grpo(r).advantages[:, 0].tolist() == [0.5, -0.5, 0.0]


def test_over_tokens_a_long_response_weighs_more():
    """One token of reward 1, three of 0: mean 1/4."""
    r = Rollouts.from_lists([[5], [6, 7, 8]], [0, 0], outcome=[1, 0])
    assert group_relative(r, unit="token", scale=None).advantages.tolist() == [[0.75, 0, 0], [-0.25, -0.25, -0.25]]


STEPS = [[(0, 1), (1, 3)], [(0, 2), (2, 2), (2, 3)]]


def test_over_spans_equal_ordinals_are_compared():
    """First steps 1 and 0, second 0 and 1 (that one is empty, it counts), the third step has no mate."""
    r = Rollouts.from_lists([[5] * 3] * 2, [0, 0], steps=STEPS, process=[[1, 0], [0, 1, 9]])
    credit = group_relative(r, reward="process", unit="step", scale=None)
    assert credit.parts["process"].values.tolist() == [0.5, -0.5, -0.5, 0.5, 0.0]
    assert credit.advantages.tolist() == [[0.5, -0.5, -0.5], [-0.5, -0.5, 0.0]]


def test_over_spans_all_together():
    """Mean of 1, 0, 0, 1 and 3 is 1."""
    r = Rollouts.from_lists([[5] * 3] * 2, [0, 0], steps=STEPS, process=[[1, 0], [0, 1, 3]])
    credit = group_relative(r, reward="process", unit="step", scale=None, pool="all")
    assert credit.advantages.tolist() == [[0.0, -1.0, -1.0], [-1.0, -1.0, 2.0]]


def test_an_outcome_is_handed_down_to_spans_and_an_unmeasured_span_gives_nothing():
    r = Rollouts.from_lists([[5] * 3] * 2, [0, 0], steps=STEPS, outcome=[1, 0], process=[[1, float("nan")], [0, 0, 0]])
    assert group_relative(r, unit="step", scale=None).advantages.tolist() == [[0.5] * 3, [-0.5, -0.5, 0.0]]
    credit = group_relative(r, reward="process", unit="step", scale=None)
    assert credit.advantages.tolist() == [[0.5, 0.0, 0.0], [-0.5, -0.5, 0.0]]
    assert credit.mask.all()
    assert credit.notes["unmeasured"] == 1


def test_a_reward_finer_than_the_unit_is_refused():
    r = Rollouts.from_lists([[5] * 3] * 2, [0, 0], steps=STEPS, process=[[1, 0], [0, 1, 3]])
    with pytest.raises(ValueError, match=r'needs a reward per trajectory or coarser; signals\["?\'?process'):
        group_relative(r, reward="process")
    many = r.with_signals(aspects=Signal(torch.zeros(2, 3), "trajectory", ("aspects",)))
    with pytest.raises(ValueError, match="one number each; it has the axes"):
        group_relative(many, reward="aspects")


def test_a_token_reward_outside_every_span_is_unmeasured():
    r = Rollouts.from_lists([[5, 6]], [0], spans={"s": Spans.from_lists([[(0, 1)]])})
    r = r.with_signals(x=Signal(torch.tensor([3.0]), "s"))
    credit = group_relative(r, reward="x", unit="token", baseline="none", scale=None)
    assert credit.advantages.tolist() == [[3.0, 0.0]]


def test_aliases():
    r = four([1, 0, 0, 0])
    assert first_two(grpo(r)) == [1.5, -0.5]
    assert first_two(dr_grpo(r)) == [0.75, -0.25]
    assert first_two(rloo(r)) == [1.0, -0.3333]
    assert grpo() == group_relative(ddof=1, baseline="mean")
    assert grpo().needs_group_of == 2
    assert grpo().scope == "group"
    assert group_relative(scale="batch_std").scope == "batch"
    assert group_relative(baseline="none", scale=None).needs_group_of == 1
