"""Credit for attempts at the same problem, one after another: each by its own reward, a bonus for improving (SCoRe)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Estimator, Settings, alias, assemble, estimator, span_values
from apportion.functional import at_members, group_statistics, segment_sum
from apportion.types import Credit, Rollouts, Signal


def _penalised(s: Settings) -> bool:
    return bool(s["beta1"] or (s["stage"] == 1 and s["beta2"]))


def _requires(s: Settings) -> tuple[str, ...]:
    return ("spans.{spans}", "signals.{reward}", *(("logprobs", "ref_logprobs") if _penalised(s) else ()))


@estimator(
    requires=_requires,
    scope="group",
    needs_group_of=2,
    laws=lambda s: ("shift",) if _penalised(s) else ("shift", "equal", "linear"),
)
def self_correction(
    rollouts: Rollouts,
    *,
    stage: Literal[1, 2] = 2,
    alpha: float = 10.0,
    beta1: float = 0.01,
    beta2: float = 0.1,
    reward: str = "attempt_reward",
    spans: str = "attempt",
) -> Credit:
    """Each attempt's own reward above that of the group's other attempts of the same number.

    `A_k = R_k - mean of the others' R_k`, with `KL_k = sum over its actions of ln pi - ln ref`:
    stage 2 `R_0 = r_0 - beta1 KL_0`, `R_k = r_k + alpha (r_k - r_(k-1)) - beta1 KL_k`;
    stage 1 `R_0 = -beta2 KL_0`, `R_k = r_k - beta1 KL_k`.

    Source: SCoRe, arXiv 2409.12917; there is no code by its authors. Departs: more than two attempts, each with the bonus
        over the one before it.
    Reads: signals[reward], spans[spans] with their index, logprobs (old_logprobs first) and ref_logprobs unless the betas
        in use are 0. Scope: group. Unit: span.
    Cost: a second attempt for every rollout; a reference model's pass unless the betas are 0.
    Laws: a constant added to all rewards changes nothing; the first attempt's advantage does not depend on later
        rewards; each part sums to 0 over the attempts compared.
    Degenerate: one measured attempt of a number in the group gets 0; an attempt without its reward, or (stage 2) without
        that of the one before, enters no statistic, advantage 0, mask False, counted in notes; in stage 1 the first needs
        none; positions in no attempt mask False.

    No reward flows from one attempt to another. Notes: `acc_t1` and `acc_t2`, mean reward of the first two attempts,
    `delta` between them, `i_to_c` and `c_to_i`, the shares of trajectories that got better and worse.

    Args:
        rollouts: the batch.
        stage: 1 keeps the first attempt near the reference and rewards later ones; 2 rewards all.
        alpha: weight of the improvement over the attempt before, in stage 2.
        beta1: weight of the penalty against the reference model.
        beta2: the same for the first attempt in stage 1 (the paper's 0.1 for mathematics, 0.25 for code).
        reward: signal over `spans`.
        spans: attempts, one span each, `index` 0, 1, ...

    Raises:
        ValueError: two spans with one index in a trajectory.

    Example:
        >>> from apportion.types import Spans
        >>> twice = {"attempt": Spans.from_lists([[(0, 1), (1, 2)], [(0, 1), (1, 2)]])}
        >>> reward = Signal(torch.tensor([0.0, 1.0, 1.0, 1.0]), "attempt")
        >>> r = Rollouts.from_lists([[1, 2], [1, 3]], [0, 0], spans=twice, signals={"attempt_reward": reward})
        >>> self_correction(r, beta1=0.0).advantages
        tensor([[ -1.,  10.],
                [  1., -10.]])
    """
    attempts = rollouts.spans[spans]
    r = span_values(rollouts, reward, spans, 0, "self_correction")
    before = _before(rollouts, spans)
    first = attempts.index == 0
    ids = rollouts.span_ids(spans)
    terms = {reward: r}
    if stage == 1:
        terms[reward] = torch.where(first, 0.0, r)
    elif alpha:
        terms["bonus"] = torch.where(first, 0.0, alpha * (r - torch.where(before < 0, torch.nan, r[before])))
    if beta1 or (stage == 1 and beta2):
        kl = _log_ratios(rollouts, ids, len(r))
        terms["kl"] = torch.where(first, -(beta2 if stage == 1 else beta1) * kl, -beta1 * kl)
    measured = ~torch.stack(list(terms.values())).isnan().any(0)
    parts = {k: Signal(_above_others(rollouts, spans, x, measured), spans) for k, x in terms.items()}
    mask = rollouts.action_mask & at_members(measured, ids)
    notes = {**_accuracies(r, attempts.index, before), "unmeasured_attempts": float((~measured).sum())}
    return assemble(rollouts, mask, parts, notes=notes)


def _before(rollouts: Rollouts, spans: str) -> Tensor:
    """The attempt before each in its trajectory, [S]; -1 where there is none."""
    attempts = rollouts.spans[spans]
    count = int(attempts.index.max()) + 2 if len(attempts) else 1
    cell = rollouts.trajectory_ids[attempts.row] * count + attempts.index + 1
    table = torch.full((rollouts.num_trajectories * count,), -1, dtype=torch.int64, device=rollouts.device)
    number = torch.arange(len(attempts), device=rollouts.device)
    table[cell] = number
    twice = table[cell] != number
    if bool(twice.any()):
        i = int(twice.nonzero()[0])
        raise ValueError(
            f"self_correction needs one span per attempt; spans[{spans!r}] has two with index {int(attempts.index[i])} in "
            f"trajectory {int(rollouts.trajectory_ids[attempts.row[i]])}. Number the attempts 0, 1, ..."
        )
    return table[cell - 1]


def _log_ratios(rollouts: Rollouts, ids: Tensor, count: int) -> Tensor:
    """Sum of `ln pi - ln ref` over the actions of each attempt, the learner's own where they were recorded."""
    policy = rollouts.logprobs if rollouts.old_logprobs is None else rollouts.old_logprobs
    assert policy is not None
    assert rollouts.ref_logprobs is not None
    ratio = policy.double() - rollouts.ref_logprobs
    return segment_sum(ratio.flatten(), torch.where(rollouts.action_mask, ids, -1).flatten(), count)


def _above_others(rollouts: Rollouts, spans: str, values: Tensor, measured: Tensor) -> Tensor:
    """Each attempt's value above the mean of the group's other measured attempts of the same number; 0 if unmeasured."""
    attempts = rollouts.spans[spans]
    count = int(attempts.index.max()) + 1 if len(attempts) else 1
    ids = rollouts.group_ids[attempts.row] * count + attempts.index
    stats = group_statistics(torch.where(measured, values, torch.nan), ids, rollouts.num_groups * count)
    n = at_members(stats.count, stats.ids)
    return (stats.y - at_members(stats.mean, stats.ids)) * n / (n - 1).clamp(min=1)


def _accuracies(r: Tensor, index: Tensor, before: Tensor) -> dict[str, float]:
    """Rewards of the first two attempts of the trajectories that have both; 0 where none has."""
    pair = (index == 1) & (before >= 0)
    pair &= ~(r + r[before]).isnan()
    second, first, n = r[pair], r[before[pair]], max(int(pair.sum()), 1)
    return {
        "acc_t1": float(first.sum()) / n,
        "acc_t2": float(second.sum()) / n,
        "delta": float((second - first).sum()) / n,
        "i_to_c": float((second > first).sum()) / n,
        "c_to_i": float((second < first).sum()) / n,
    }


@alias
def score(
    *,
    stage: Literal[1, 2] = 2,
    alpha: float = 10.0,
    beta1: float = 0.01,
    beta2: float = 0.1,
    reward: str = "attempt_reward",
    spans: str = "attempt",
) -> Estimator:
    """SCoRe: two attempts, each credited by itself, with a bonus for the second where it improves on the first.

    Source: arXiv 2409.12917, the values for mathematics. Run it with `stage=1` first.
    Cost: a second attempt for every rollout; a reference model's pass unless the betas are 0.

    Example:
        >>> score(stage=1)  # doctest: +NORMALIZE_WHITESPACE
        self_correction(stage=1, alpha=10.0, beta1=0.01, beta2=0.1, reward='attempt_reward', spans='attempt')
    """
    return self_correction(stage=stage, alpha=alpha, beta1=beta1, beta2=beta2, reward=reward, spans=spans)
