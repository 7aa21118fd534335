import math
from dataclasses import replace

import pytest
import torch

from apportion import Rollouts, Signal, Spans, chain, group_relative, returns_to_go, tree_relative
from apportion.functional import tree_depth
from apportion.signals import (
    TreeLabels,
    backed_up,
    consistent_paths,
    kept_steps,
    pick_child,
    right_probability,
    rollout_value,
    step_labels,
    uct,
)

NAN = math.nan


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(got, *want):
    torch.testing.assert_close(got, numbers(*want), rtol=0, atol=5.1e-7, equal_nan=True)


# ---- the value of a rollout -------------------------------------------------------------------------------------------


def test_worked_rollout():
    """(1 - 2/3 + 1/3) / 3 for the steps, 1/3 for the right answer."""
    close(rollout_value(numbers(1, -1, 1)[None], numbers(1)), 0.555556)
    close(rollout_value(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([1.0])), 0.555556)


def test_without_a_step_the_outcome_is_the_value_and_rollouts_of_any_length_share_a_tensor():
    verdicts = torch.tensor([[NAN, NAN, NAN], [1.0, -1.0, 1.0], [1.0, NAN, NAN]])
    close(rollout_value(verdicts, numbers(-1, 1, -1)), -1.0, 0.555556, 0.0)
    close(rollout_value(torch.zeros(2, 0), numbers(-1, 1)), -1.0, 1.0)
    close(rollout_value(torch.zeros(0, 3), numbers()))


@pytest.mark.parametrize("n", range(1, 6))
def test_all_right_and_all_flipped(n):
    ones = torch.ones(1, n, dtype=torch.float64)
    close(rollout_value(ones, numbers(1)), (n + 1) / (2 * n) + 1 / n)
    close(rollout_value(-ones, numbers(-1)), -(n + 1) / (2 * n) - 1 / n)


def test_the_weight_of_the_outcome_is_a_setting():
    """2/9 of the steps; N = 0 is still the outcome alone."""
    verdicts = torch.tensor([[1.0, -1.0, 1.0], [NAN, NAN, NAN]])
    close(rollout_value(verdicts, numbers(-1, -1), final_weight=0.5), 2 / 9 - 0.5, -1.0)


def test_undecided_steps_count_in_the_length():
    close(rollout_value(numbers(0, 0)[None], numbers(1)), 0.5)


# ---- the tree ----------------------------------------------------------------------------------------------------------


def test_worked_back_up():
    value, visits = backed_up(numbers(NAN, NAN, 5 / 9), torch.tensor([-1, 0, 1]))
    close(value, 0.45, 0.5, 0.555556)
    assert visits.tolist() == [1, 1, 1]
    _, released = backed_up(numbers(NAN, NAN, 5 / 9), torch.tensor([-1, 0, 1]), own_visit=False)
    assert released.tolist() == [1, 1, 0]


def test_rollouts_add_up_at_their_common_ancestors():
    """Node 1 was rolled out itself (-1) and has children worth 0.5 and 1; node 4 was never reached."""
    value, visits = backed_up(numbers(NAN, -1, 0.5, 1, NAN), torch.tensor([-1, 0, 1, 1, 0]), gamma=0.5)
    close(value, 0.5 * -0.25, -0.25, 0.5, 1, NAN)
    assert visits.tolist() == [3, 3, 1, 1, 0]


def test_worked_selection_and_its_readings():
    q, n, above = numbers(0.5), numbers(1), numbers(3)
    close(uct(q, n, above, c=1.414), 1.677232)
    close(uct(q, n, above), 0.5 + 1.8 * math.sqrt(math.log(4) / 2))
    close(uct(q, n, above, c=1.414, seek="wrong"), 0.677232)
    close(uct(numbers(6), numbers(3), numbers(3), c=0.0, use="mean"), 2.0)
    close(uct(numbers(NAN), numbers(0), numbers(0), use="mean"), 0.0)


def test_the_released_code_enters_any_child():
    scores = numbers(0.1, 0.7, 0.3)
    assert pick_child(scores) == 1
    dice = torch.Generator().manual_seed(0)
    assert {pick_child(scores, rule="random", generator=dice) for _ in range(30)} == {0, 1, 2}


# ---- labels and samples ------------------------------------------------------------------------------------------------


def test_labels_are_signs_and_nothing_is_wrong():
    close(step_labels(numbers(2.0, 1e-9, 0.0, -0.5, NAN)), 1, 1, -1, -1, NAN)
    assert step_labels(torch.tensor([1.0])).dtype == torch.float32


def test_worked_path():
    path = numbers(0.4, -0.2, -0.1, 0.3, -0.5)[None]
    assert kept_steps(path, torch.tensor([False])).tolist() == [3]
    assert kept_steps(path, torch.tensor([True])).tolist() == [5], "a correct path stays whole"


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([0.4, 0.1, NAN], 2),
        ([0.4, -0.1, -0.3], 3),
        ([0.0, 0.0, -0.1], 1),
        ([-0.1, 0.2, 0.3], 1),
        ([NAN, NAN, NAN], 0),
    ],
)
def test_where_a_wrong_path_ends(values, kept):
    assert kept_steps(numbers(*values)[None], torch.tensor([False])).tolist() == [kept]
    assert kept_steps(torch.zeros(1, 0), torch.tensor([False])).tolist() == [0]


@pytest.mark.parametrize(
    ("value", "verdict", "symmetric", "released"),
    [
        (0.5, 1, True, True),
        (-0.5, -1, True, True),
        (0.5, -1, False, False),
        (-0.5, 1, False, True),
        (0.0, 1, False, False),
        (0.0, -1, False, False),
        (0.5, 0, False, False),
        (-0.5, 0, False, False),
    ],
)
def test_which_paths_are_kept(value, verdict, symmetric, released):
    values, verdicts = numbers(0.1, value, NAN)[None], numbers(1, verdict, NAN)[None]
    assert consistent_paths(values, verdicts).tolist() == [symmetric]
    assert consistent_paths(values, verdicts, rule="released").tolist() == [released]


# ---- the judge's probability ---------------------------------------------------------------------------------------------


def test_worked_probability():
    assert right_probability([{"Right": -0.2, "Wrong": -1.9}]) == pytest.approx(0.845535, abs=5e-7)


def test_where_the_probability_is_read():
    early, late = {"Right": -0.1, "Wrong": -3.0}, {"Wrong": -0.1, "Right": -3.0}
    assert right_probability([early, late, {"}": -0.1}]) == pytest.approx(1 / (1 + math.exp(2.9)))
    only = {"Right": -0.5, "a": -1.0, "b": -4.0}
    assert right_probability([only]) == pytest.approx(1 / (1 + math.exp(-3.5))), "the other gets the smallest listed"
    assert right_probability([{"Wrong": -0.5, "b": -4.0}]) == pytest.approx(1 / (1 + math.exp(3.5)))
    assert right_probability([{"a": -0.5}, {}]) == 0.5
    assert right_probability([]) == 0.5
    crowd = {**{f"t{k}": -1.0 - k for k in range(10)}, "Right": -20.0}
    assert right_probability([crowd]) == 0.5, "the eleventh token is not read"
    assert right_probability([crowd], listed=11) == 0.5, "alone and smallest, it stands against itself"
    assert right_probability([{"yes": -0.2, "no": -1.9}], right="yes", wrong="no") == pytest.approx(0.845535, abs=5e-7)


# ---- from a tree to credit -----------------------------------------------------------------------------------------------


def searched(u: list[float], parent: list[int], rows: list[list[tuple[int, int]]], outcome=None) -> Rollouts:
    spans = replace(Spans.from_lists(rows), parent=torch.tensor(parent), index=tree_depth(torch.tensor(parent)))
    length = [max((e for _, e in row), default=0) for row in rows]
    return Rollouts.from_lists(
        [[1] * n for n in length],
        [0] * len(rows),
        outcome=outcome,
        spans={"branch": spans},
        signals={"rollout_value": Signal(numbers(*u), "branch")},
        dtype=torch.float64,
    )


def test_a_wrong_step_that_reaches_the_right_answer_is_marked_by_the_fused_label_alone():
    """To add 2+3+4: the first child says 2+3=6, and its rollouts still end at 9; the second says 2+3=5.

    Three simulated steps each. Behind the wrong step the tool refutes what is built on it, yet the answer comes out
    right; outcomes alone call both children right.
    """
    verdicts = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    outcome = numbers(1, 1)
    fused = rollout_value(verdicts, outcome)
    alone = rollout_value(torch.full((2, 0), NAN), outcome)
    r = searched([NAN, *fused.tolist()], [-1, 0, 0], [[(0, 1), (1, 2)], [(0, 1)]])
    assert TreeLabels().measure(r)["label"].values.tolist() == [1.0, -1.0, 1.0]
    r = searched([NAN, *alone.tolist()], [-1, 0, 0], [[(0, 1), (1, 2)], [(0, 1)]])
    assert TreeLabels().measure(r)["label"].values.tolist() == [1.0, 1.0, 1.0]


def test_labels_are_step_rewards_for_any_policy_loss():
    r = searched([NAN, 1, -1], [-1, 0, 0], [[(0, 1), (1, 2)], [(0, 1)]])
    labels = TreeLabels(gamma=0.5)
    r = r.with_signals(**labels.measure(r))
    assert labels.requires == ("spans.branch", "spans.branch.parent", "signals.rollout_value")
    assert {f"signals.{k}" for k in labels.measure(r)} == set(labels.provides)
    got = group_relative(r, reward="label", unit="branch", scale=None).advantages
    torch.testing.assert_close(got, torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64))
    got = returns_to_go(r, reward="label").advantages
    torch.testing.assert_close(got, torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64))
    values = chain(tree_relative(reward="node_value", scale=None))(r).advantages
    torch.testing.assert_close(values, torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64))


def test_a_step_no_rollout_reached_is_not_measured():
    r = searched([NAN, 1, NAN], [-1, 0, 0], [[(0, 1), (1, 2)], [(0, 1)]])
    close(TreeLabels().measure(r)["node_value"].values, 0.9, 1.0, NAN)
    close(TreeLabels().measure(r)["label"].values, 1, 1, NAN)


def test_simulated_steps_keep_their_verdict():
    """Behind node 1 two steps were simulated, true and undecided; node 1 has a verdict too, which its W overrules."""
    r = searched([NAN, -1, NAN, NAN], [-1, 0, 1, 2], [[(0, 1), (1, 2), (2, 3), (3, 4)]])
    r = r.with_signals(verdict=Signal(numbers(NAN, 1, 1, 0), "branch"))
    made = TreeLabels(verdict="verdict")
    assert made.requires[-1] == "signals.verdict"
    close(made.measure(r)["node_value"].values, -0.9, -1, 1, 0)
    close(made.measure(r)["label"].values, -1, -1, 1, -1)
    close(TreeLabels().measure(r)["label"].values, -1, -1, NAN, NAN)
