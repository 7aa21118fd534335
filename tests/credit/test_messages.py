"""Messages about wrong types; these run without the run-time type checker, which would speak first."""

import pytest

from apportion import add, chain, clip, grpo, partition, tempo


def test_wrong_members_are_refused():
    with pytest.raises(TypeError, match=r"chain needs an Estimator here; got grpo\. Call it first: grpo\(\)\."):
        chain(grpo)
    with pytest.raises(TypeError, match="chain needs a Transform here; got Estimator"):
        chain(grpo(), tempo())
    with pytest.raises(TypeError, match=r"add needs \(weight, estimator\) pairs; got a str as weight"):
        add(("1", grpo()))
    with pytest.raises(TypeError, match="add needs at least one"):
        add()
    with pytest.raises(TypeError, match="partition needs an Estimator here; got Transform"):
        partition({"think": clip()})
    with pytest.raises(TypeError, match=r"partition needs \{spans_name: estimator\}; got nothing"):
        partition({})
