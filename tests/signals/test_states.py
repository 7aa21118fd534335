from random import Random

import pytest
import torch

from apportion.signals import anchor_states


def test_equal_observations_of_a_group_share_a_state():
    seen = ["a", "b", "a", "a", "b", ("x", 1), ("x", 1)]
    assert anchor_states(seen, [0, 0, 0, 1, 1, 1, 1]).tolist() == [0, 1, 0, 2, 3, 4, 4]
    assert anchor_states(seen, torch.tensor([0] * 7)).tolist() == [0, 1, 0, 0, 1, 2, 2]
    assert anchor_states([], []).dtype == torch.int64


def test_the_unknown_matches_nothing():
    assert anchor_states([None, None, "a"], [0, 0, 0]).tolist() == [0, 1, 2]
    assert anchor_states([None, None, "a"], [0, 0, 0], similarity=0.5).tolist() == [0, 1, 2]


def test_similar_texts_join_the_first_representative_that_is_near():
    """Ratio 2 m / (a + b): abcd and abce share 3 of 4, abce and abxe too, abcd and abxe only 2."""
    seen = ["abcd", "abce", "abxe", "abce"]
    assert anchor_states(seen, [0] * 4, similarity=0.75).tolist() == [0, 0, 1, 0]
    assert anchor_states(["abcd", "abxe", "abce"], [0] * 3, similarity=0.75).tolist() == [0, 1, 0]
    assert anchor_states(seen, [0] * 4, similarity=0.76).tolist() == [0, 1, 2, 1]
    assert anchor_states(seen, [0, 1, 0, 1], similarity=0.75).tolist() == [0, 1, 2, 1]


def test_a_similarity_of_one_is_equality():
    rng = Random(3)
    seen = ["".join(rng.choice("ab") for _ in range(3)) for _ in range(60)]
    groups = [rng.randint(0, 2) for _ in seen]
    assert anchor_states(seen, groups, similarity=1.0).tolist() == anchor_states(seen, groups).tolist()


def test_long_texts():
    """In 200 characters and more difflib ignores the frequent ones unless told not to."""
    long, other = "x" + "ab" * 150, "y" + "ab" * 150
    assert anchor_states([long, other], [0, 0], similarity=0.9).tolist() == [0, 1]
    assert anchor_states([long, other], [0, 0], similarity=0.9, autojunk=False).tolist() == [0, 0]


def test_messages():
    with pytest.raises(ValueError, match=r"2 observations but 1 groups. Give one per turn"):
        anchor_states(["a", "b"], [0])
    for wrong in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="must lie above 0 and not above 1"):
            anchor_states(["a"], [0], similarity=wrong)
    with pytest.raises(TypeError, match=r"must be hashable; got dict. Give text"):
        anchor_states([{"at": 1}], [0])
    with pytest.raises(TypeError, match="similar states need text; got an observation of type tuple"):
        anchor_states([(1, 2)], [0], similarity=0.9)
