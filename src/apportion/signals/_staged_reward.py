"""Partial credit for programs that fail: how far they came (RL for machine learning engineering agents)."""

import re
from collections.abc import Sequence


def count_markers(output: str, markers: Sequence[str]) -> int:
    """How many of the markers, regular expressions, occur in what a program printed; each counts once.

    Let a frozen model put the prints into the program: a model that is trained on them soon prints them alone.

    Example:
        >>> count_markers("imports done; data read; data read; KeyError", ["imports done", "data read", "trained"])
        2
    """
    return sum(re.search(marker, output) is not None for marker in markers)


def staged_reward(
    score: float | None,
    markers: int = 0,
    *,
    lower_is_better: bool = False,
    failure: float = -10.0,
    per_marker: float = 0.1,
) -> float:
    """The grader's score of a valid submission; far below it, for an invalid one, a little for each stage it passed.

    `failure + per_marker * markers` if invalid, else the score, negated where lower is better.

    Source: arXiv 2509.01684, with seven markers from imports to evaluation. Whether the markers add to the -10, as
        here, or replace it is not said in what we read.
    Degenerate: any score above `failure + per_marker * markers` beats every failure, so scores on a scale that reaches
        there need another `failure`. NaN stays NaN: not measured.

    Args:
        score: what the grader says; None for no valid submission, a time-out included.
        markers: stages that the program passed, see `count_markers`.
        lower_is_better: the grader reports an error.
        failure: reward of a program that passed no stage. per_marker: what each stage adds.

    Example:
        >>> staged_reward(None, 4), staged_reward(0.83), staged_reward(1.08, lower_is_better=True)
        (-9.6, 0.83, -1.08)
    """
    if score is None:
        return failure + per_marker * markers
    return -score if lower_is_better else score
