"""Credit as the bounded return of step scores (Clip and Delta)."""

from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import (
    Estimator,
    Settings,
    alias,
    assemble,
    estimator,
    measured_mask,
    span_values,
    trajectory_values,
)
from apportion.credit._line import action_line
from apportion.functional import BoundedForm, at_members, bounded_rewards, segment_mean, suffix_sum
from apportion.types import Cover, Credit, Rollouts, Signal

Eta = float | Literal["group_mean"]


def _clips(s: Settings) -> bool:
    return s["form"] in ("clip", "clip_delta")


def _scope(s: Settings) -> Cover:
    return "group" if _clips(s) and s["eta"] == "group_mean" else "row"


def _laws(s: Settings) -> tuple[str, ...]:
    """Steps with scores of 0 cost nothing unless a fixed eta above 0 clips them."""
    free = not _clips(s) or s["eta"] == "group_mean" or s["eta"] <= 0
    return ("additive", "linear") if free else ("additive",)


@estimator(requires=("spans.{spans}", "signals.{process}", "signals.{outcome}"), scope=_scope, laws=_laws)
def bounded_return(
    rollouts: Rollouts,
    *,
    form: BoundedForm = "clip_delta",
    eta: Eta = "group_mean",
    alpha: float = 0.02,
    process: str = "process",
    outcome: str = "outcome",
    spans: str = "step",
) -> Credit:
    """The outcome plus a little of the step scores still to come, so formed that repeating steps earns nothing.

    `A_t = outcome + alpha * sum of the rewards of the steps that end at t or later`, a step's reward being, by form:
    raw `r_k`; clip `min(r_k - eta, 0)`; delta `r_k - r_(k+1)` for k < K-1, `r_(K-1)` for k = K-1, 0 for the last;
    clip_delta the delta of the clipped scores. Under delta the sum from step k on is r_k.

    Source: arXiv 2410.15115. `alpha` about 0.02 and eta as the mean score of the question's responses are from memory
        and unverified. Departs: the paper trains PPO with a critic; for that, put `functional.bounded_rewards` and the
        outcome into one step signal and use `gae`. Here is the plain return; chain a baseline or `whiten` behind it.
    Reads: signals[process] [S], signals[outcome], spans[spans]. Scope: row, or group for `eta="group_mean"` where it
        clips. Unit: token.
    Cost: a process reward model's pass.
    Laws: a constant added to the outcomes is added to every token; clip never rewards; a repeated step with a score of
        eta or more changes no return under clip and clip_delta.
    Degenerate: one step: delta gives it 0; no step: the outcome alone. A step without score or without action tokens is
        left out before neighbours are found, in notes. An unmeasured outcome advantage 0 and mask False.

    Args:
        rollouts: the batch.
        form: "raw", "clip", "delta" or "clip_delta".
        eta: score from which on a step costs nothing: a number, or the mean of the measured scores of the group's
            steps ("group_mean"). Far below the scores it does nothing; far above, every step costs and answers get
            short.
        alpha: weight of the steps against the outcome.
        process: signal with one score per step, in [0, 1].
        outcome: signal with the verifier's outcome, one per trajectory; a truncated response should have 0.
        spans: the steps.

    Example:
        >>> r = Rollouts.from_lists([[1, 2, 3]], [0], outcome=[1.0], steps=[[(0, 1), (1, 2), (2, 3)]],
        ...                         process=[[0.5, 0.75, 0.25]])
        >>> bounded_return(r, form="delta", alpha=1.0).advantages
        tensor([[1.5000, 1.7500, 1.0000]])
    """
    value = trajectory_values(rollouts, outcome, "bounded_return")
    measured = ~value.isnan()
    scores = span_values(rollouts, process, spans, 0, "bounded_return")
    line = action_line(rollouts)
    ends = line.last_of(rollouts.span_ids(spans).reshape(-1)[line.positions], len(scores))
    owner = rollouts.trajectory_ids[rollouts.spans[spans].row]
    owner = torch.where(scores.isnan() | (ends < 0) | ~measured[owner], -1, owner)
    limit = _group_means(rollouts, scores, owner) if eta == "group_mean" else eta
    rewards = bounded_rewards(scores, owner, ends, form=form, eta=limit)
    at_ends = torch.zeros(len(line.positions), dtype=torch.float64, device=rollouts.device)
    at_ends[ends[owner >= 0]] = alpha * rewards[owner >= 0]
    parts = {
        outcome: Signal(torch.where(measured, value, 0.0), "trajectory"),
        process: Signal(line.put(suffix_sum(at_ends, line.goes_on.double())), "token"),
    }
    return assemble(rollouts, measured_mask(rollouts, measured), parts, notes=_notes(scores, owner, rewards))


def _group_means(rollouts: Rollouts, scores: Tensor, owner: Tensor) -> Tensor:
    """For each step the mean score of its group's steps that count, [S]."""
    groups = torch.where(owner >= 0, at_members(rollouts.trajectory_groups, owner), -1)
    return at_members(segment_mean(scores, groups, rollouts.num_groups), groups)


def _notes(scores: Tensor, owner: Tensor, rewards: Tensor) -> dict[str, float]:
    counted = owner >= 0
    some = bool(counted.any())
    return {
        "steps": float(len(scores)),
        "left_out_steps": float((~counted).sum()),
        "mean_step_score": float(scores[counted].mean()) if some else 0.0,
        "mean_step_reward": float(rewards[counted].mean()) if some else 0.0,
    }


@alias
def clip_delta(
    *,
    eta: Eta = "group_mean",
    alpha: float = 0.02,
    process: str = "process",
    outcome: str = "outcome",
    spans: str = "step",
) -> Estimator:
    """Clip, then Delta: the outcome plus bounded step rewards.

    Source: arXiv 2410.15115; `bounded_return(form=...)` has its single parts. `alpha` is from memory and unverified.
    Cost: a process reward model's pass.

    Example:
        >>> clip_delta(eta=0.75)  # doctest: +NORMALIZE_WHITESPACE
        bounded_return(form='clip_delta', eta=0.75, alpha=0.02, process='process', outcome='outcome', spans='step')
    """
    return bounded_return(form="clip_delta", eta=eta, alpha=alpha, process=process, outcome=outcome, spans=spans)
