import math

import pytest
import torch

from apportion.signals import agreement

NAN = float("nan")


def test_worked_room():
    """Five transitions, two subgoals; the judge reports the first one twice."""
    said = torch.tensor([[0.0, 0], [1, 0], [0, 0], [1, 1], [0, 0]])
    true = torch.tensor([[0.0, 0], [1, 0], [0, 0], [0, 1], [0, 0]])
    found = agreement(said, true)
    one = found.pooled
    counts = (one.true_positive, one.false_positive, one.false_negative, one.true_negative)
    assert [float(x) for x in counts] == [2, 1, 0, 7]
    measures = [float(x) for x in (one.precision, one.recall, one.f1, one.accuracy)]
    assert measures == pytest.approx([0.666667, 1.0, 0.8, 0.9], abs=5e-7)
    assert found.precision.tolist() == [0.5, 1.0]
    assert found.accuracy.tolist() == [0.8, 1.0]


def test_each_count():
    verdicts = torch.tensor([[1.0], [1.0], [0.0], [0.0], [NAN], [NAN], [1.0]])
    labels = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0], [0.0], [NAN]])
    found = agreement(verdicts, labels)
    counts = (found.true_positive, found.false_positive, found.false_negative, found.true_negative, found.unusable)
    assert [x.tolist() for x in counts] == [[1], [1], [2], [2], [2]]
    assert found.precision.item() == 0.5
    assert found.recall.item() == pytest.approx(1 / 3)
    assert found.f1.item() == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))
    assert found.accuracy.item() == 0.5


def test_pooling_adds_the_cells():
    """A subgoal without any positive has F1 0, but takes nothing away from the others' when pooled."""
    verdicts = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    found = agreement(verdicts, verdicts)
    assert found.f1.tolist() == [1.0, 0.0]
    assert found.pooled.f1.item() == 1.0
    assert found.pooled.accuracy.item() == 1.0


def test_what_is_undefined_is_zero():
    nothing = agreement(torch.zeros(0, 2), torch.zeros(0, 2))
    for x in (nothing.precision, nothing.recall, nothing.f1, nothing.accuracy):
        assert x.tolist() == [0.0, 0.0]
    assert not math.isnan(agreement(torch.zeros(3, 0), torch.zeros(3, 0)).pooled.f1)


def test_messages():
    with pytest.raises(ValueError, match=r"got \[3\] labels for \[2, 1\] verdicts"):
        agreement(torch.zeros(2, 1), torch.zeros(3))
