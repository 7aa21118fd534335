import pytest

from apportion.signals import count_markers, staged_reward

NAN = float("nan")
MARKERS = ["imported packages", r"loaded \d+ rows", "built the model", "trained"]


def test_worked_example():
    """Higher is better: a crash with 0 and with 4 markers, then a valid score; lower is better: an error of 1.08."""
    assert [staged_reward(None), staged_reward(None, 4), staged_reward(0.83)] == pytest.approx([-10.0, -9.6, 0.83])
    assert staged_reward(1.08, lower_is_better=True) == -1.08


def test_any_score_in_reach_beats_any_failure():
    failures = [staged_reward(None, m) for m in range(8)]
    assert failures == sorted(failures)
    assert max(failures) < min(staged_reward(s, lower_is_better=low) for s in (-1.0, 0.0, 1.0) for low in (False, True))


def test_markers_do_not_add_to_a_valid_score():
    assert staged_reward(0.5, 7) == 0.5


def test_not_measured_stays_so():
    assert staged_reward(NAN) != staged_reward(NAN)


def test_markers_are_patterns_and_count_once():
    output = "imported packages\nloaded 120 rows\nloaded 7 rows\nTraceback ..."
    assert count_markers(output, MARKERS) == 2
    assert count_markers("", MARKERS) == 0
    assert staged_reward(None, count_markers(output, MARKERS)) == pytest.approx(-9.8)
