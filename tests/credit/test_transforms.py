import pytest
import torch

from apportion import Rollouts, chain, clip, gae, process_penalty, scale_by_sign, signed_outcome, whiten


def rewarded(outcome, groups=None, dtype=torch.float64, lengths=None) -> Rollouts:
    tokens = [[5] * n for n in (lengths or [1] * len(outcome))]
    return Rollouts.from_lists(tokens, groups or [0] * len(outcome), outcome=outcome, dtype=dtype)


def test_scale_by_sign_moves_the_parts_along():
    credit = chain(signed_outcome(), scale_by_sign(positive=0.5, negative=2.0))(rewarded([1, 0]))
    assert credit.advantages[:, 0].tolist() == [0.5, -2.0]
    assert credit.parts["outcome"].values[:, 0].tolist() == [0.5, -2.0]


def test_clip_records_what_it_took():
    credit = chain(signed_outcome(low=-3.0, high=0.5), clip(limit=1.0))(rewarded([1, 0]))
    assert credit.advantages[:, 0].tolist() == [0.5, -1.0]
    assert credit.parts["clip"].values[:, 0].tolist() == [0.0, 2.0]
    with pytest.raises(ValueError, match="clip needs a limit above 0; got 0"):
        chain(signed_outcome(), clip(limit=0.0))(rewarded([1, 0]))


def test_order_matters():
    r = rewarded([1, 0, 0, 0], lengths=[1, 1, 1, 1])
    far = signed_outcome(low=0.0, high=10.0)
    one_way, other = chain(far, clip(limit=1.0), whiten()), chain(far, whiten(), clip(limit=1.0))
    assert not torch.allclose(one_way(r).advantages, other(r).advantages)
    assert repr(one_way) != repr(other)


def test_whiten_the_batch():
    """Tokens 1, 1, -1, -1, -1, -1: mean -1/3, population variance 8/9."""
    r = rewarded([1, 0], lengths=[2, 4])
    credit = chain(signed_outcome(), whiten(ddof=0, eps=0.0))(r)
    torch.testing.assert_close(credit.advantages[0, 0], torch.tensor(4 / 3 / (8 / 9) ** 0.5).double())
    assert abs(credit.advantages.sum()) < 1e-12
    assert credit.parts["baseline"].unit == "batch"


def test_whiten_each_group():
    """Group 0 holds 1 and -1 (deviation sqrt 2); in group 1 all are equal; group 2 is one trajectory alone."""
    r = rewarded([1, 0, 1, 1, 0], [0, 0, 1, 1, 2])
    credit = chain(signed_outcome(), whiten(over="group", eps=0.0))(r)
    torch.testing.assert_close(
        credit.advantages[:, 0], torch.tensor([0.5**0.5, -(0.5**0.5), 0, 0, 0], dtype=torch.float64)
    )
    assert {k: v.unit for k, v in credit.parts.items()} == {"outcome": "trajectory", "baseline": "group"}


def test_whitening_equal_values_gives_exactly_nothing():
    r = rewarded([1] * 12, dtype=torch.float32)
    for over in ("batch", "group"):
        assert (chain(signed_outcome(high=0.99), whiten(over=over, eps=0.0))(r).advantages == 0).all()


def test_whitening_twice_keeps_both_baselines():
    credit = chain(signed_outcome(), whiten(), whiten())(rewarded([1, 0]))
    assert list(credit.parts) == ["outcome", "baseline", "baseline'"]


def test_whiten_counts_only_the_mask_and_leaves_returns_alone():
    r = Rollouts.from_lists([[1], [2], [3]], [0] * 3, outcome=[1, 0, float("nan")], values=[[0.5], [0.5], [0.5]])
    credit = chain(gae(), whiten(ddof=0, eps=0.0))(r)
    assert credit.advantages[:, 0].tolist() == [1.0, -1.0, 0.0]
    assert (credit.returns == gae(r).returns).all()


def test_whiten_keeps_the_units_of_spans():
    r = Rollouts.from_lists(
        [[1, 2], [3]], [0, 0], outcome=[1, 0], steps=[[(0, 1), (1, 2)], [(0, 1)]], judge=[[[1.0], [0.0]], [[0.0]]]
    )
    for over in ("batch", "group"):
        credit = chain(process_penalty(), whiten(over=over))(r)
        assert credit.parts["judge"].unit == "step"
        torch.testing.assert_close(credit.total(r), credit.advantages)


def test_a_transform_can_be_called_on_credit():
    r = rewarded([1, 0])
    assert clip(signed_outcome(r, high=9.0), r, limit=2.0).advantages[0] == 2.0
