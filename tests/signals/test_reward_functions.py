"""Form, length and repetition, worked by hand."""

import time

import pytest
import torch

from apportion.signals import acted_tokens, matches, of_signal, overlong, repetition
from apportion.types import Rollouts, Signal


def rollouts():
    """Rows of 1, 3 and 5 actions after a prompt of one token; the third is a trajectory of two rows with the first."""
    return Rollouts.from_lists(
        [[9, 1], [9, 1, 2, 3], [9, 1, 2, 1, 2, 1]],
        [0, 0, 0],
        trajectories=["a", "b", "a"],
        action_mask=[[False] + [True] * n for n in (1, 3, 5)],
    )


def test_the_tokens_of_a_trajectory_are_those_of_all_its_rows_without_prompts():
    assert acted_tokens(rollouts()) == [[1, 1, 2, 1, 2, 1], [1, 2, 3]]


def test_overlong_is_the_equation():
    # limit 10, buffer 4: free up to 6, then a quarter per token, -1 from 10 on.
    penalty = overlong(limit=10, buffer=4)
    assert [penalty.of([0] * n) for n in (0, 6, 7, 8, 9, 10, 11)] == [0, 0, -0.25, -0.5, -0.75, -1, -1]
    assert penalty.score_rollouts([], rollouts()) == [0, 0]
    assert overlong(limit=5, buffer=3).score_rollouts([], rollouts()) == [-1, pytest.approx(-1 / 3)]
    assert [overlong(10, 0).of([0] * n) for n in (10, 11)] == [0, -1]


@pytest.mark.parametrize(("limit", "buffer"), [(0, 0), (10, 11), (10, -1)])
def test_overlong_refuses_what_makes_no_sense(limit, buffer):
    with pytest.raises(ValueError, match=r"overlong needs limit >= 1 and 0 <= buffer <= limit"):
        overlong(limit, buffer)


def test_repetition_is_the_share_of_n_grams_seen_before():
    assert repetition(2).of([1, 1, 2, 1, 2, 1]) == pytest.approx(3 / 5 - 1)  # 11 12 21 12 21: three of five differ
    assert repetition(3).of([1, 2]) == 0
    assert repetition(1).of([]) == 0
    with pytest.raises(ValueError, match="repetition needs n of at least 1; got 0"):
        repetition(0)


def test_matches_searches_and_takes_anchors():
    assert [matches("b+")(None, t) for t in ("abba", "a", "")] == [1, 0, 0]
    whole = matches(r"(?s)\A<a>.*</a>\Z")
    assert [whole(None, t) for t in ("<a>x\ny</a>", "<a>x</a> ")] == [1, 0]
    assert matches("")(None, "") == 1


def test_a_pattern_that_explodes_is_killed_in_time_and_named():
    slow = matches("(a+)+b", seconds=0.3)
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"searching '\(a\+\)\+b' took over 0.3 s; make the pattern simpler"):
        slow(None, "a" * 60)
    assert time.perf_counter() - start < 3
    assert slow(None, "aab") == 1
    slow.worker.close()


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"matches needs a regular expression; '\(' is none"):
        matches("(")


def test_a_signal_is_a_reward():
    found = rollouts().with_signals(environment=Signal(torch.tensor([2.0, 0.5]), "trajectory"))
    reward = of_signal("environment")
    assert reward.name == "of_environment"
    assert reward.score_rollouts([], found) == [2.0, 0.5]
    with pytest.raises(
        ValueError, match=r"of_signal\('other'\) needs a signal of unit trajectory .*; there is: environment"
    ):
        of_signal("other").score_rollouts([], found)


def test_each_prints_as_the_call_that_makes_it():
    for made in (matches(r"\d"), matches("a", seconds=2.0), overlong(10, 4), repetition(2), of_signal("x")):
        again = eval(
            repr(made), {"matches": matches, "overlong": overlong, "repetition": repetition, "of_signal": of_signal}
        )
        assert again == made
