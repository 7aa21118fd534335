import pytest
import torch

from apportion import Rollouts, grpo, prefix_td, tempo

DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
TOKENS = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 7, 8], [1, 2, 5, 9]]


def tree(dtype=torch.float64, outcome=(1, 0, 0, 1)) -> Rollouts:
    return Rollouts.from_lists(TOKENS, [0] * 4, outcome=list(outcome), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_tree(dtype):
    """Mean 1/2, sample deviation sqrt(1/3); e.g. the first 2 lifts the value from 1/2 to 2/3."""
    want = [
        [0.866024, 1.154699, 1.443373, 0.866024],
        [-0.866024, -0.577349, -1.154699, -1.732048],
        [-0.866024, -1.732048, -0.866024, 0.0],
        [0.866024, 1.154699, 0.577349, 1.732048],
    ]
    torch.testing.assert_close(tempo(tree(dtype)).advantages, torch.tensor(want, dtype=dtype), **DTYPES[dtype])
    want = [
        [0.5, 0.666667, 0.833333, 0.5],
        [-0.5, -0.333333, -0.666667, -1.0],
        [-0.5, -1.0, -0.5, 0.0],
        [0.5, 0.666667, 0.333333, 1.0],
    ]
    torch.testing.assert_close(
        tempo(tree(dtype), scale=None).advantages, torch.tensor(want, dtype=dtype), **DTYPES[dtype]
    )


def test_changes_add_up_to_the_value_of_the_response():
    """V(response) - mean = reward - 1/2, as no two responses are equal."""
    branch = prefix_td(tree(), scale=None).parts["branch"].values
    torch.testing.assert_close(branch.sum(1), torch.tensor([0.5, -0.5, -0.5, 0.5]).double())


def test_notes_count_branches():
    """2, 3, 1 and 3 branch tokens of 15, and each of them changes the value."""
    notes = prefix_td(tree()).notes
    assert notes["branch_tokens"] == 9 / 15
    assert notes["changed_tokens"] == 9 / 15


def test_without_a_shared_beginning_only_the_first_token_differs_from_grpo():
    r = Rollouts.from_lists([[1, 5, 5], [2, 5, 5]], [0, 0], outcome=[1, 0], dtype=torch.float64)
    difference = tempo(r).advantages - grpo(r).advantages
    assert (difference[:, 1:] == 0).all()
    assert (difference[:, 0] != 0).all()


def test_equal_responses_and_a_response_that_ended():
    """The two equal ones share every node, worth 1/2 each; the third ended where they go on, at a token that also pads."""
    r = Rollouts.from_lists([[3, 0], [3, 0], [3]], [0] * 3, outcome=[1, 0, 0.2], dtype=torch.float64)
    credit = prefix_td(r, scale=None)
    torch.testing.assert_close(
        credit.advantages, torch.tensor([[0.6, 0.7], [-0.4, -0.3], [-0.2, 0.0]], dtype=torch.float64)
    )


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_rewards_and_a_group_of_one_give_exactly_nothing(eps):
    assert (prefix_td(tree(outcome=[0.99] * 4), eps=eps).advantages == 0).all()
    assert (prefix_td(tree(torch.float32, [0.7] * 4), eps=eps).advantages == 0).all()
    alone = Rollouts.from_lists([[1, 2]], [0], outcome=[0.7])
    assert (prefix_td(alone, eps=eps).advantages == 0).all()
    assert (prefix_td(alone, scale=None).advantages == 0).all()


def test_an_unmeasured_response_is_nobodys_sharer():
    with_it = Rollouts.from_lists([[1, 2], [1, 3], [1, 2]], [0] * 3, outcome=[1, 0, float("nan")])
    credit = tempo(with_it)
    without = tempo(Rollouts.from_lists([[1, 2], [1, 3]], [0, 0], outcome=[1, 0]))
    assert (credit.advantages[:2] == without.advantages).all()
    assert (credit.advantages[2] == 0).all()
    assert not credit.mask[2].any()


def test_prompt_and_tool_output_are_not_compared():
    tokens = [[9, 1, 8, 2], [9, 1, 7, 3]]
    mask = [[False, True, False, True]] * 2
    r = Rollouts.from_lists(tokens, [0, 0], outcome=[1, 0], action_mask=mask)
    assert prefix_td(r, scale=None).advantages.tolist() == [[0, 0.5, 0, 1.0], [0, -0.5, 0, -1.0]]
