import pytest
import torch

from apportion import Rollouts, chain, nsr, psr, scale_by_sign, signed_outcome, w_reinforce
from apportion.losses import Outputs, PolicyGradient, totals_of

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


def logit_direction(method, outcome: float) -> torch.Tensor:
    """Ascent direction on the logits at ratio 1, p = .6, .3, .1, token 0 sampled: A (onehot - p)."""
    logits = torch.tensor([0.6, 0.3, 0.1]).log().requires_grad_()
    r = Rollouts.from_lists([[0]], [0], outcome=[outcome])
    (method(r).advantages[0, 0] * logits.log_softmax(0)[0]).backward()
    return logits.grad


def test_nsr_returns_mass_in_proportion_to_the_prior():
    torch.testing.assert_close(logit_direction(nsr(), 0.0), torch.tensor([-0.4, 0.3, 0.1]))
    torch.testing.assert_close(logit_direction(psr(), 1.0), torch.tensor([0.4, -0.3, -0.1]))


@pytest.mark.parametrize("probabilities", [[0.6, 0.3, 0.1], [0.05, 0.6, 0.25, 0.1]])
def test_one_step_of_nsr_raises_the_others_as_their_probabilities(probabilities):
    """A small step along the gradient of the loss itself, and what it changed."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()
    r = Rollouts.from_lists([[0]], [0], outcome=[0.0], dtype=torch.float64)
    credit = nsr(r)
    new = logits.log_softmax(0)[:1].view(1, 1)
    value, _ = PolicyGradient()(Outputs(new), r, credit, totals_of(r, credit))
    value.backward()
    rise = -1e-3 * logits.grad / torch.tensor(probabilities, dtype=torch.float64)
    assert rise[0] < 0
    torch.testing.assert_close(rise[1:], torch.full_like(rise[1:], 1e-3))


def test_the_policy_loss_gives_the_worked_losses():
    """At ratio 1, token mean; the mask decides over how many tokens."""
    r = three(torch.float64)

    def token_mean(credit):
        return float(PolicyGradient()(Outputs(torch.full((3, 3), -1.0).double()), r, credit, totals_of(r, credit))[0])

    kept = {m: chain(signed_outcome(), m) for m in (scale_by_sign(positive=0.0), scale_by_sign(negative=0.0))}
    got = [token_mean(m(r)) for m in (w_reinforce(), psr(), nsr(), *kept.values())]
    assert got == pytest.approx([0.633333, -1.0, 1.0, 0.666667, -0.333333], abs=1e-6)
    assert token_mean(signed_outcome(r)) == pytest.approx(0.666667 - 0.333333, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
def test_lambda_interpolates_linearly(weight):
    r = three(torch.float64)
    torch.testing.assert_close(
        w_reinforce(r, positive=weight).advantages, nsr(r).advantages + weight * psr(r).advantages
    )


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
