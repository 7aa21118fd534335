"""What trains an implicit process reward model: preferences between trajectories, in sums of log-ratios."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from apportion.functional import segment_sum
from apportion.losses._core import Metrics


def implicit_prm_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    trajectory_ids: Int[Tensor, " B"],
    trajectory_groups: Int[Tensor, " N"],
    outcomes: Float[Tensor, " N"],
    *,
    beta: float = 0.05,
    steps: Int[Tensor, " N"] | None = None,
    success: float | None = None,
    margin: float = 0.0,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Bradley-Terry loss over the trajectories of each group: the better outcome should have the larger sum of rewards.

        S_i  = beta * sum over the actions of trajectory i of (ln pi_phi - ln pi_old)
        loss = mean of -ln sigmoid(S_i - S_j) over all pairs of a group with outcome_i > outcome_j

    Source: OPRL, arXiv 2509.19199, and its code (`compute_eto_loss_rm`): there S is the mean over the steps of a
    trajectory (`steps`) and the outcome counts as success or not (`success=0.0`). The pairs of all groups are pooled,
    as in the code, so a group with many pairs weighs more.
    Laws: adding a constant to every outcome changes nothing (without `success`); a step against the gradient raises
    S_i - S_j of the pairs; phi = old gives ln 2.
    Degenerate: no pair, 0 with gradient 0; a NaN outcome is in no pair; nothing outside `mask` is read.

    Args:
        logprobs: of the reward model phi at the tokens of the batch, with gradient, [B, T].
        old_logprobs: of the policy that acted, the moving reference, [B, T].
        mask: the actions, [B, T].
        trajectory_ids: the trajectory of each row, [B].
        trajectory_groups: the group of each trajectory, [N].
        outcomes: of each trajectory, [N].
        beta: nats to reward.
        steps: number of steps of each trajectory; given, S is the mean of the step rewards, not their sum.
        success: given, outcomes above it are equally good and all others equally bad.
        margin: a pair needs a difference above this; for noisy judges.

    Returns:
        The loss, and prm/loss, prm/pairs, prm/ranked (share of pairs with S_i > S_j).

    Example:
        >>> phi = torch.tensor([[-0.5], [-1.0]], requires_grad=True)
        >>> loss, metrics = implicit_prm_loss(
        ...     phi, torch.tensor([[-0.9], [-0.6]]), torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 1]),
        ...     torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
        >>> round(loss.item(), 4), metrics["prm/ranked"]
        (0.6733, 1.0)
    """
    ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0).double().sum(1)
    scores = beta * segment_sum(ratio, trajectory_ids, len(outcomes))
    if steps is not None:
        scores = scores / steps.clamp(min=1)
    worth = outcomes.double()
    if success is not None:
        worth = torch.where(worth.isnan(), torch.nan, (worth > success).double())
    first, second = _pairs(trajectory_groups)
    better = worth[first] > worth[second] + margin
    gap = (scores[first] - scores[second])[better]
    pairs = len(gap)
    loss = softplus(-gap).sum() / max(pairs, 1)
    ranked = float((gap > 0).double().mean()) if pairs else 0.0
    return loss, {"prm/loss": loss.item(), "prm/pairs": float(pairs), "prm/ranked": ranked}


def _pairs(groups: Int[Tensor, " N"]) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """All ordered pairs of members of the same group."""
    if not len(groups):
        return groups, groups
    order = torch.argsort(groups, stable=True)
    sizes = torch.bincount(groups)
    mates = sizes[groups[order]]
    first = torch.repeat_interleave(order, mates)
    place = torch.arange(len(first), device=groups.device) - torch.repeat_interleave(mates.cumsum(0) - mates, mates)
    begin = sizes.cumsum(0) - sizes
    return first, order[begin[groups[first]] + place]
