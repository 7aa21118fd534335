import torch

from apportion import Rollouts, chain, nsr, psr, scale_by_sign, signed_outcome, w_reinforce

NAN = float("nan")


def three(dtype=torch.float32) -> Rollouts:
    """One right response of two tokens, two wrong ones of three and of one; each in its own group: groups are nothing."""
    return Rollouts.from_lists([[1, 2], [1, 2, 3], [1]], [0, 1, 2], outcome=[1, 0, 0], dtype=dtype)


def loss(credit, over) -> float:
    """The policy loss at ratio 1: minus the mean advantage over the positions counted."""
    return round(float(-credit.advantages.sum() / over.sum()), 6)


def test_worked_example():
    r = three(torch.float64)
    weighted, up, down = w_reinforce(r), psr(r), nsr(r)
    assert weighted.advantages.tolist() == [[0.1, 0.1, 0.0], [-1.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]
    assert up.advantages.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert down.advantages.tolist() == [[0.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [-1.0, 0.0, 0.0]]
    assert loss(weighted, weighted.mask) == 0.633333
    assert (loss(up, up.mask), loss(up, r.action_mask)) == (-1.0, -0.333333)
    assert (loss(down, down.mask), loss(down, r.action_mask)) == (1.0, 0.666667)


def test_dropping_narrows_the_mask_and_keeping_does_not():
    assert nsr(three()).mask.tolist() == [[False] * 3, [True] * 3, [True, False, False]]
    kept = chain(signed_outcome(), scale_by_sign(positive=0.0))(three())
    assert (kept.mask == three().action_mask).all()


def test_the_two_sides_add_up_to_reinforce():
    assert (nsr(three()).advantages + psr(three()).advantages == signed_outcome(three()).advantages).all()
    assert (w_reinforce(three(), positive=1.0).advantages == signed_outcome(three()).advantages).all()


def test_nsr_returns_mass_in_proportion_to_the_prior():
    """Ascent direction on the logits at ratio 1, p = .6, .3, .1, token 0 sampled: A (onehot - p)."""
    logits = torch.tensor([0.6, 0.3, 0.1]).log().requires_grad_()
    r = Rollouts.from_lists([[0]], [0], outcome=[0.0])
    (nsr(r).advantages[0, 0] * logits.log_softmax(0)[0]).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([-0.4, 0.3, 0.1]))


def test_all_correct_is_an_empty_batch():
    r = Rollouts.from_lists([[1], [2]], [0, 0], outcome=[1, 1])
    assert not nsr(r).mask.any()


def test_threshold_unmeasured_and_empty():
    r = Rollouts.from_lists([[1], [2], [3], []], [0] * 4, outcome=[0.5, 0.49, NAN, 1])
    credit = signed_outcome(r, low=-3.0, high=2.0)
    assert credit.advantages[:, 0].tolist() == [2.0, -3.0, 0.0, 0.0]
    assert credit.mask[:, 0].tolist() == [True, True, False, False]
    assert credit.notes == {"right": 2 / 3, "unmeasured": 1.0}


def test_no_group_is_needed():
    assert nsr().needs_group_of == 1
    assert nsr().scope == "row"
