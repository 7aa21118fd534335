"""Losses over pairs of responses: which of two is preferred, and which of their tokens made it so."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from apportion.functional import contrast_reward
from apportion.losses._core import Metrics

PairForm = Literal["dpo", "simpo"]


def ranking_loss(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], *, margin: float = 0.0
) -> tuple[Float[Tensor, ""], Metrics]:
    """Bradley-Terry loss of pairs of scores: mean of `-ln sigmoid(chosen - rejected - margin)`.

    Degenerate: no pairs give 0. Equal scores give ln 2 (without a margin).
    Metrics: pair/loss; pair/margin (mean of chosen - rejected); pair/ranked (share of pairs with chosen > rejected);
    pair/weight (mean of sigmoid(rejected - chosen + margin), the factor of each pair's gradient).

    Example:
        >>> loss, metrics = ranking_loss(torch.tensor([0.8]), torch.tensor([0.1]))
        >>> round(loss.item(), 6), metrics["pair/ranked"]
        (0.403186, 1.0)
    """
    gap = chosen - rejected
    pairs = max(len(gap), 1)
    loss = softplus(margin - gap).sum() / pairs
    seen = gap.detach().double()
    sums = torch.stack([seen.sum(), (seen > 0).double().sum(), (margin - seen).sigmoid().sum()])
    mean, ranked, weight = (sums / pairs).tolist()
    return loss, {"pair/loss": loss.item(), "pair/margin": mean, "pair/ranked": ranked, "pair/weight": weight}


def dpo_loss(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    *,
    beta: float = 0.1,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Direct preference optimisation: the sum of token credits of the chosen response should exceed the rejected one's.

        c_t  = beta (ln pi_theta - ln pi_ref)              the credit that `credit.implicit_reward` reads off afterwards
        loss = mean over pairs of -ln sigmoid(sum of c over the chosen - sum of c over the rejected)

    Source: arXiv 2305.18290; as a token-level problem "From r to Q*", arXiv 2404.12358.
    Laws: theta = ref gives ln 2; what stands outside `mask` changes nothing, NaN included; nothing flows into the
    reference. Both responses of a pair may become less likely together: only their difference is trained.
    Degenerate: no pairs give 0; an empty response has score 0.

    Args:
        logprobs: of the policy at the tokens, with gradient, [B, T].
        ref_logprobs: of the reference at the same tokens, [B, T].
        mask: the tokens of the responses, the end of text among them; never the prompt's, [B, T].
        chosen: for each pair the row of the preferred response, [P].
        rejected: for each pair the row of the other one, a response to the same prompt, [P].
        beta: nats to reward.

    Returns:
        The loss, and the metrics of `ranking_loss`.

    Example:
        >>> new = torch.tensor([[-0.5, -1.0, -0.2], [-1.2, -0.7, 0.0]], requires_grad=True)
        >>> ref = torch.tensor([[-0.9, -0.8, -0.6], [-0.8, -0.9, 0.0]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> loss, metrics = dpo_loss(new, ref, mask, torch.tensor([0]), torch.tensor([1]))
        >>> round(loss.item(), 6), round(metrics["pair/margin"], 6)
        (0.653947, 0.08)
    """
    score = _scores(logprobs, ref_logprobs, mask, beta, "dpo")
    return ranking_loss(score[chosen], score[rejected])


def t_reg_loss(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"] | None,
    contrast: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    chosen: Int[Tensor, " P"],
    rejected: Int[Tensor, " P"],
    *,
    beta: float = 0.1,
    alpha: float = 0.25,
    form: PairForm = "dpo",
    margin: float = 0.0,
) -> tuple[Float[Tensor, ""], Metrics]:
    """DPO whose tokens are pushed as far as the model's own token rewards agree: T-REG.

        h_t    = sigmoid(contrast_t) - 1/2                  a constant
        reg(y) = -beta sum of h_t ln pi_theta               over the tokens of a response
        loss   = mean over pairs of -ln sigmoid(d) + alpha w (reg(chosen) + reg(rejected)),  w = sigmoid(-d), a constant

    with d = r(chosen) - r(rejected) - margin and r(y) = sum of c as in `dpo_loss`, or for `form="simpo"` r(y) = beta times the
    mean of ln pi_theta, reg by the mean too. So a chosen token is pulled up with beta w (1 + alpha h_t) and a rejected one
    pushed down with beta w (1 - alpha h_t); `credit.t_reg` puts the same weights on advantages.

    Source: arXiv 2412.02685. The length in the regulariser of the SimPO form is our reading. Its code (wzhouad/T-REG)
    could not be read.
    Laws: `alpha = 0` and a contrast of 0 everywhere give DPO (or SimPO); no gradient flows through h, w or the reference.
    Degenerate: no pairs give 0; an unmeasured contrast (NaN) counts as h = 0.

    Args:
        logprobs: of the policy, with gradient, [B, T].
        ref_logprobs: of the reference, [B, T]; not read, and may be None, for `form="simpo"`.
        contrast: ln p under the frozen reference after the "improve" prompt minus after the "worsen" prompt, [B, T].
        mask: the tokens of the responses, [B, T].
        chosen: for each pair the row of the preferred response, [P].
        rejected: for each pair the row of the other one, [P].
        beta: nats to reward.
        alpha: weight of the regulariser; the paper searches 0.1, 0.25 and 0.5.
        form: "dpo", sums against the reference; "simpo", means without it.
        margin: what the chosen score must be ahead.

    Returns:
        The loss; the metrics of `ranking_loss`; pair/regulariser (mean of reg over chosen and rejected, added per pair).

    Raises:
        ValueError: `form="dpo"` without reference; an unknown form.
    """
    if form not in ("dpo", "simpo"):
        raise ValueError(f"t_reg_loss needs form 'dpo' or 'simpo'; got {form!r}.")
    if form == "dpo" and ref_logprobs is None:
        raise ValueError('t_reg_loss needs ref_logprobs for form="dpo"; got None. Score the rows, or use form="simpo".')
    score = _scores(logprobs, ref_logprobs, mask, beta, form)
    reward = contrast_reward(contrast.detach())
    reward = torch.where(mask & ~reward.isnan(), reward, torch.zeros_like(reward))
    pull = torch.where(mask, reward * logprobs, torch.zeros_like(logprobs))
    reg = -beta * _total(pull, mask, form)
    weight = (margin + score[rejected] - score[chosen]).sigmoid().detach()
    added = reg[chosen] + reg[rejected]
    ranked, metrics = ranking_loss(score[chosen], score[rejected], margin=margin)
    pairs = max(len(chosen), 1)
    loss = ranked + alpha * (weight * added).sum() / pairs
    return loss, {**metrics, "pair/loss": loss.item(), "pair/regulariser": float(added.detach().sum()) / pairs}


def _scores(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"],
    beta: float,
    form: PairForm,
) -> Float[Tensor, " B"]:
    """r of each row."""
    gain = logprobs if form == "simpo" or ref_logprobs is None else logprobs - ref_logprobs.detach()
    return beta * _total(torch.where(mask, gain, torch.zeros_like(gain)), mask, form)


def _total(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], form: PairForm) -> Float[Tensor, " B"]:
    """Sum of each row, or its mean over the mask for the length-normalised form."""
    total = values.sum(1)
    return total / mask.sum(1).clamp(min=1) if form == "simpo" else total
