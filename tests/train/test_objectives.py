"""The options of the loss on a real model: the step that each makes is the gradient of its equation, written out here."""

import pytest
import torch

from apportion.train import Request, Sampling
from apportion.train.learner import update
from apportion.types import Credit, Spans


@pytest.fixture
def batch(policy, task):
    """Eight responses of the tiny model; what the learner, the sampler and the reference say of them is moved about."""
    requests = [Request(p, n) for p, n in zip(task.train, (4, 1, 3), strict=False)]
    r = policy.sample(requests, Sampling(max_new_tokens=8), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    count = torch.tensor([8, 3, 5, 8, 1, 7, 2, 6])  # tokens of each response that are trained on
    mask = r.action_mask & (r.action_mask.cumsum(1) <= count[:, None])
    old, sampled, ref = (r.logprobs + 0.5 * torch.randn(mask.shape, generator=g) for _ in range(3))
    first = mask.byte().argmax(1).tolist()
    pairs = [[(start, start + 2)] if n > 2 else [] for start, n in zip(first, count, strict=True)]
    r = r.replace(action_mask=mask, old_logprobs=old, logprobs=sampled, ref_logprobs=ref)
    advantages = torch.randn(mask.shape, generator=g) * mask
    return r.with_spans(step=Spans.from_lists(pairs)), Credit(advantages, mask)


def stepped(policy, batch, loss):
    """By how much one step of plain gradient descent moves the weights."""
    parameters = list(policy.trainable().values())
    before = [p.detach().clone() for p in parameters]
    update(policy, parameters, torch.optim.SGD(parameters, lr=1.0), *batch, loss, micro_tokens=60, grad_clip=1e9)
    moved = torch.cat([(a - p.detach()).flatten() for a, p in zip(before, parameters, strict=True)])
    with torch.no_grad():
        for p, a in zip(parameters, before, strict=True):
            p.copy_(a)
    return moved


def written(policy, batch, loss_of):
    """The gradient of an equation in new log-probabilities, entropies, the batch and A."""
    r, credit = batch
    outputs = policy.outputs(r, r.action_mask, ("entropies",))
    loss = loss_of(outputs.logprobs, outputs.entropies, r, credit.advantages)
    slopes = torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True)
    sizes = policy.trainable().values()
    return torch.cat([(torch.zeros_like(p) if s is None else s).flatten() for s, p in zip(slopes, sizes, strict=True)])


def mean(x, r):
    return x[r.action_mask].mean()


def clipped(gap, a, low=0.8, high=1.28):
    rho = gap.exp()
    return torch.maximum(-a * rho, -a * rho.clamp(low, high))


def row_sum(x, r):
    return torch.where(r.action_mask, x, 0.0).sum(1, keepdim=True)


def by_span(new, r):
    """The sum over the first two tokens of a response of more than two; else the token's own."""
    gap = torch.where(r.action_mask, new - r.old_logprobs, 0.0)
    spans, out = r.spans["step"], gap.clone()
    for row, start in zip(spans.row.tolist(), spans.start.tolist(), strict=True):
        out[row, start : start + 2] = gap[row, start : start + 2].sum()
    return out


def corrected(new, r, a, weight):
    return mean(clipped(new - r.old_logprobs, a) * weight, r)


def penalty(new, r, a, of):
    return mean(clipped(new - r.old_logprobs, a) + 0.3 * of(r.ref_logprobs - new), r)


EQUATIONS = {
    "clip": ({}, lambda n, h, r, a: mean(clipped(n - r.old_logprobs, a), r)),
    "bounds": (
        {"clip_low": 0.1, "clip_high": 0.1},
        lambda n, h, r, a: mean(clipped(n - r.old_logprobs, a, 0.9, 1.1), r),
    ),
    "no bounds": (
        {"clip_low": None, "clip_high": None},
        lambda n, h, r, a: mean(-a * (n - r.old_logprobs).exp(), r),
    ),
    "cispo": (
        {"objective": "cispo"},
        lambda n, h, r, a: mean(-a * n * (n - r.old_logprobs).exp().clamp(max=1.28).detach(), r),
    ),
    "dual clip": (
        {"dual_clip": 1.5},
        lambda n, h, r, a: mean(
            torch.where(a < 0, clipped(n - r.old_logprobs, a).minimum(-1.5 * a), clipped(n - r.old_logprobs, a)), r
        ),
    ),
    "row ratio": (
        {"ratio": "sequence"},
        lambda n, h, r, a: mean(
            clipped((row_sum(n - r.old_logprobs, r) / r.action_mask.sum(1, keepdim=True)).expand_as(a), a), r
        ),
    ),
    "span ratio": ({"ratio": "step"}, lambda n, h, r, a: mean(clipped(by_span(n, r), a), r)),
    "row means": (
        {"aggregation": "sequence_mean_token_mean"},
        lambda n, h, r, a: (row_sum(clipped(n - r.old_logprobs, a), r)[:, 0] / r.action_mask.sum(1)).mean(),
    ),
    "constant length": (
        {"aggregation": "token_sum_norm", "max_new_tokens": 8},
        lambda n, h, r, a: row_sum(clipped(n - r.old_logprobs, a), r).sum() / (8 * len(a)),
    ),
    "token_truncate": (
        {"correction": "token_truncate", "correction_cap": 1.2},
        lambda n, h, r, a: corrected(n, r, a, (r.old_logprobs - r.logprobs).exp().clamp(max=1.2)),
    ),
    "token_mask": (
        {"correction": "token_mask", "correction_cap": 1.2},
        lambda n, h, r, a: corrected(n, r, a, masked((r.old_logprobs - r.logprobs).exp())),
    ),
    "sequence_truncate": (
        {"correction": "sequence_truncate", "correction_cap": 1.2},
        lambda n, h, r, a: corrected(n, r, a, row_sum(r.old_logprobs - r.logprobs, r).exp().clamp(max=1.2)),
    ),
    "sequence_mask": (
        {"correction": "sequence_mask", "correction_cap": 1.2},
        lambda n, h, r, a: corrected(n, r, a, masked(row_sum(r.old_logprobs - r.logprobs, r).exp())),
    ),
    "k1": ({"kl_coef": 0.3, "kl_estimator": "k1"}, lambda n, h, r, a: penalty(n, r, a, lambda d: -d)),
    "k2": ({"kl_coef": 0.3, "kl_estimator": "k2"}, lambda n, h, r, a: penalty(n, r, a, lambda d: d**2 / 2)),
    "k3": ({"kl_coef": 0.3}, lambda n, h, r, a: penalty(n, r, a, lambda d: d.exp() - d - 1)),
    "abs": ({"kl_coef": 0.3, "kl_estimator": "abs"}, lambda n, h, r, a: penalty(n, r, a, torch.abs)),
    "entropy": ({"entropy_coef": 0.3}, lambda n, h, r, a: mean(clipped(n - r.old_logprobs, a) - 0.3 * h, r)),
}


def masked(weight):
    return torch.where(weight > 1.2, 0.0, weight)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_step_is_the_gradient_of_the_equation(config, policy, batch, name):
    options, equation = EQUATIONS[name]
    got = stepped(policy, batch, config(**options).loss())
    torch.testing.assert_close(got, written(policy, batch, equation), rtol=1e-4, atol=1e-5)
    if options:
        assert (got - stepped(policy, batch, config().loss())).abs().max() > 1e-2


def test_the_steered_weight_replaces_the_first_one(config, policy, batch):
    steered = stepped(policy, batch, config(kl_coef=0.1).loss(0.3))
    torch.testing.assert_close(steered, stepped(policy, batch, config(kl_coef=0.3).loss()))
