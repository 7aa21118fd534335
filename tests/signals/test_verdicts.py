"""Scores from verdicts."""

import torch

from apportion import Rollouts
from apportion.signals import VerdictScore

NAN = float("nan")


def test_the_share_of_critiques_that_pass_a_step_is_stretched_to_minus_one_and_one():
    # 0 of 4 wrong: 1; 1 of 4: 1 - 2/4; 2 of 2 usable: -1; none usable: not measured
    verdicts = [[[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, NAN, NAN], [NAN] * 4]]
    r = Rollouts.from_lists([[1, 2, 3, 4]], [0], steps=[[(i, i + 1) for i in range(4)]], judge=verdicts)
    score = VerdictScore().measure(r)["process"]
    assert score.unit == "step"
    torch.testing.assert_close(score.values, torch.tensor([1.0, 0.5, -1.0, NAN]), equal_nan=True)


def test_no_steps_no_scores():
    r = Rollouts.from_lists([[1]], [0], steps=[[]], judge=[[]])
    assert VerdictScore().measure(r)["process"].values.shape == (0,)
