"""Credit from step verdicts (CAPO) and from step scores (PURE)."""

from dataclasses import dataclass, replace
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
from apportion.credit._combine import chain
from apportion.credit._line import Line, action_line
from apportion.credit._transforms import whiten
from apportion.functional import (
    at_members,
    group_statistics,
    segment_count,
    segment_max,
    segment_min,
    segment_sum,
    suffix_min,
    suffix_sum,
)
from apportion.types import Credit, Rollouts, Signal

Vote = Literal["intersection", "majority", "union", "average"]


@estimator(requires=("spans.{spans}", "signals.{outcome}", "signals.{judge}"), laws=("additive",))
def process_penalty(
    rollouts: Rollouts,
    *,
    vote: Vote = "intersection",
    correct: float = 2.0,
    penalty: float = 1.0,
    outcome: str = "outcome",
    judge: str = "judge",
    spans: str = "step",
) -> Credit:
    """Outcome reward minus a penalty on the steps that the critiques call wrong.

    `R_t = correct * v - penalty * w(step of t)`, with c of K usable critiques naming the step and w by vote:
    intersection 1[c = K], majority 1[c >= K/2 and c > 0], union 1[c > 0], average c / K.

    Source: CAPO, arXiv 2508.02298; normalised over the group's tokens by `capo`.
    Reads: signals[outcome], signals[judge] [S, critiques], spans[spans]. Scope: row. Unit: span.
    Cost: a judge call per response and critique.
    Laws: adding a constant to the outcomes adds `correct` times it to every token; the order of critiques is irrelevant; identical critiques make all votes agree.
    Degenerate: an unusable critique (NaN) is dropped and K shrinks; no usable critique w = 0, counted in notes; no step
        the outcome alone; positions outside every step get no penalty.

    Args:
        rollouts: the batch.
        vote: how the critiques of a step become one wrongness.
        correct: weight C of the outcome. Keep it above `penalty`, or process fights outcome.
        penalty: weight P of a wrong step.
        outcome: signal with the verifier's outcome, one per trajectory.
        judge: signal with 1 = this critique calls the step wrong, 0 = not, NaN = unusable.
        spans: the steps.

    Raises:
        ValueError: verdicts other than 0, 1 or NaN.

    Example:
        >>> r = Rollouts.from_lists([[1, 2, 3]], [0], outcome=[1.0], steps=[[(0, 2), (2, 3)]], judge=[[[0, 0], [1, 1]]])
        >>> process_penalty(r).advantages
        tensor([[2., 2., 1.]])
    """
    value = trajectory_values(rollouts, outcome, "process_penalty")
    wrong, notes = _wrongness(span_values(rollouts, judge, spans, 1, "process_penalty"), vote, judge)
    measured = ~value.isnan()
    parts = {
        outcome: Signal(torch.where(measured, correct * value, 0.0), "trajectory"),
        judge: Signal(0.0 - penalty * wrong, spans),
    }
    return assemble(rollouts, measured_mask(rollouts, measured), parts, notes=notes)


def _wrongness(verdicts: Tensor, vote: Vote, judge: str) -> tuple[Tensor, dict[str, float]]:
    """How wrong each step is, from its usable critiques [S, K]."""
    usable = ~verdicts.isnan()
    odd = usable & (verdicts != 0) & (verdicts != 1)
    if bool(odd.any()):
        raise ValueError(
            f"process_penalty needs verdicts 0, 1 or NaN in signals[{judge!r}]; got {float(verdicts[odd][0]):g}. "
            "Threshold graded verdicts first."
        )
    of = usable.sum(1).double()
    named = torch.where(usable, verdicts, 0.0).sum(1)
    wrong = {
        "intersection": (named == of) & (named > 0),
        "majority": (named >= of / 2) & (named > 0),
        "union": named > 0,
        "average": named / of.clamp(min=1),
    }[vote].double()
    several = of >= 2
    agreement = (torch.maximum(named, of - named) / of)[several]
    notes = {
        "steps": float(len(of)),
        "unjudged_steps": float((of == 0).sum()),
        "wrong_steps": float(wrong.mean()) if len(of) else 0.0,
        "vote_agreement": float(agreement.mean()) if len(agreement) else 1.0,
    }
    return wrong, notes


@alias
def capo(
    *,
    vote: Vote = "intersection",
    correct: float = 2.0,
    penalty: float = 1.0,
    eps: float = 1e-6,
    outcome: str = "outcome",
    judge: str = "judge",
    spans: str = "step",
) -> Estimator:
    """CAPO: outcome minus penalties on wrong steps, normalised over all tokens of the group.

    Source: arXiv 2508.02298. Departs: what the paper leaves open, whether long responses weigh more, is read as yes.
    Cost: a judge call per response and critique.

    Example:
        >>> capo(vote="majority")  # doctest: +NORMALIZE_WHITESPACE
        chain(process_penalty(vote='majority', correct=2.0, penalty=1.0, outcome='outcome', judge='judge',
        spans='step'), whiten(over='group', ddof=1, eps=1e-06, eps_inside='std'))
    """
    shape = process_penalty(vote=vote, correct=correct, penalty=penalty, outcome=outcome, judge=judge, spans=spans)
    return chain(shape, whiten(over="group", ddof=1, eps=eps, eps_inside="std"))


# ---- PURE -------------------------------------------------------------------------------------------------------------


def _min_requires(s: Settings) -> tuple[str, ...]:
    return ("spans.{spans}", "signals.{process}") + (("signals.{outcome}",) if s["coef"] else ())


@estimator(requires=_min_requires, scope="group", needs_group_of=2, laws=("shift",))
def process_min(
    rollouts: Rollouts,
    *,
    temperature: float | None = 0.1,
    coef: float = 1.0,
    gamma: float = 1.0,
    baseline: Literal["horizon", "step", "token"] = "horizon",
    horizon: int | None = None,
    unmeasured: Literal["drop", "process"] = "drop",
    process: str = "process",
    outcome: str = "outcome",
    spans: str = "step",
) -> Credit:
    """Credit as the worst step still to come, above what the rest of the group got.

    `w_j = softmax_j(-p_j / temperature)`, `r_j = w_j p_j` on the last token of step j, `G_t = sum_(l >= t) gamma^(l-t) r_l`;
    with `temperature=None` instead `G_t = min of p_j over the steps not finished before t`.
    `A_t = coef (v - mean of the others' v) + G_t - b`.

    Source: PURE, arXiv 2504.15275, and its code (branches main and verl). Departs: `horizon=None` takes the
        longest response of the group for N, where the code takes the generation limit of the run.
    Reads: signals[process], signals[outcome] unless `coef=0.0`, spans[spans]. Scope: group. Unit: token.
    Cost: a process reward model's pass.
    Laws: adding a constant to all outcomes changes nothing.
    Degenerate: a group with one measured trajectory gets 0; no scored step G = 0; a step without score or without action
        tokens is left out of the minimum, counted in notes; an unmeasured outcome see `unmeasured`.

    Args:
        rollouts: the batch.
        temperature: of the soft minimum; None for the strict one.
        coef: weight of the verifier's outcome; 0.0 for process scores alone.
        gamma: discount per token.
        baseline: "horizon", `sum over others of all G / ((K-1) N)`; "step", the others' mean of `sum r / steps`, taken
            off at each step end; "token", `others' sum r / others' tokens`, times the tokens of the step, likewise.
        horizon: N, the generation limit in tokens; None for the longest response of the group.
        unmeasured: "drop" a trajectory without outcome, or, in a group where none has one, keep "process" credit alone.
        process: signal with one score per step, in [-1, 1].
        outcome: signal with the verifier's outcome, one per trajectory.
        spans: the steps.

    Raises:
        ValueError: temperature or horizon not above 0; a summed baseline for the strict minimum.

    Example:
        >>> r = Rollouts.from_lists([[1, 2, 3], [4]], [0, 0], steps=[[(0, 2), (2, 3)], [(0, 1)]],
        ...                         process=[[-0.5, 0.5], [0.5]])
        >>> process_min(r, coef=0.0, temperature=None, horizon=4).advantages
        tensor([[-0.6250, -0.6250,  0.3750],
                [ 0.6250,  0.0000,  0.0000]])
    """
    _check_min(temperature, baseline, horizon)
    line = action_line(rollouts)
    steps = _scored_steps(rollouts, line, process, spans)
    above, kept, mask = _outcome_above_others(rollouts, outcome, coef, unmeasured)
    carry = gamma * line.goes_on.double()
    if temperature is None:
        gain = _strict_minimum(steps, line)
    else:
        step_rewards = _soft_minimum(steps, temperature)
        gain = suffix_sum(_at_ends(step_rewards, steps, line, 0.0), carry)
    if baseline == "horizon":
        behind = Signal(-_horizon_baseline(rollouts, line, gain, kept, horizon), "trajectory")
    else:
        charge = _step_charges(rollouts, line, steps, step_rewards, kept, baseline)
        behind = Signal(-line.put(suffix_sum(_at_ends(charge, steps, line, 0.0), carry)), "token")
    parts = {process: Signal(line.put(gain), "token"), "baseline": behind}
    parts = {k: replace(v, values=_where_kept(rollouts, kept, v)) for k, v in parts.items()}
    if coef:
        parts = {outcome: Signal(above, "trajectory"), **parts}
    return assemble(rollouts, mask, parts, notes=_process_notes(steps))


@dataclass(frozen=True)
class _Steps:
    """The steps with what PURE needs of each, [S]; `owner` is the trajectory, -1 for a step that is left out."""

    scores: Tensor
    owner: Tensor
    ends: Tensor
    lengths: Tensor
    trajectories: int


def _scored_steps(rollouts: Rollouts, line: Line, process: str, spans: str) -> _Steps:
    scores = span_values(rollouts, process, spans, 0, "process_min")
    ids = rollouts.span_ids(spans).reshape(-1)[line.positions]
    ends = line.last_of(ids, len(scores))
    owner = torch.where(scores.isnan() | (ends < 0), -1, rollouts.trajectory_ids[rollouts.spans[spans].row])
    return _Steps(scores, owner, ends, segment_count(ids, len(scores)), rollouts.num_trajectories)


def _soft_minimum(steps: _Steps, temperature: float) -> Tensor:
    """Each step's share of the soft minimum of its trajectory, `w_j p_j`; 0 for a step that is left out."""
    lowest = at_members(segment_min(steps.scores, steps.owner, steps.trajectories), steps.owner)
    weight = torch.where(steps.owner >= 0, (-(steps.scores - lowest) / temperature).exp(), 0.0)
    total = at_members(segment_sum(weight, steps.owner, steps.trajectories), steps.owner)
    return torch.where(steps.owner >= 0, weight / total * steps.scores, 0.0)


def _strict_minimum(steps: _Steps, line: Line) -> Tensor:
    """At each action the smallest score of the steps that end there or later; 0 after the last step."""
    least = suffix_min(_at_ends(steps.scores, steps, line, torch.inf), line.goes_on)
    return torch.where(least.isinf(), 0.0, least)


def _at_ends(values: Tensor, steps: _Steps, line: Line, elsewhere: float) -> Tensor:
    """The values of the steps at their last actions, in the line."""
    out = torch.full(line.positions.shape, elsewhere, dtype=torch.float64, device=values.device)
    counted = steps.owner >= 0
    out[steps.ends[counted]] = values[counted]
    return out


def _outcome_above_others(
    rollouts: Rollouts, outcome: str, coef: float, unmeasured: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`coef (v - mean of the others' v)`, which trajectories are compared with others, [N] each, and the mask."""
    groups, count = rollouts.trajectory_groups, rollouts.num_groups
    if coef:
        value = trajectory_values(rollouts, outcome, "process_min")
    else:
        value = torch.zeros(len(groups), dtype=torch.float64, device=rollouts.device)
    stats = group_statistics(value, groups, count)
    measured = stats.measured
    if unmeasured == "process":
        measured = measured | ~at_members(stats.count, groups).bool()
    n = at_members(stats.count, stats.ids)
    above = coef * (stats.y - at_members(stats.mean, stats.ids)) * n / (n - 1).clamp(min=1)
    several = at_members(segment_sum(measured.double(), groups, count), groups) >= 2
    return above, measured & several, measured_mask(rollouts, measured)


def _others_sum(values: Tensor, kept: Tensor, rollouts: Rollouts) -> Tensor:
    """For each trajectory the sum over the other kept ones of its group, [N]."""
    values = torch.where(kept, values, 0.0)
    groups = rollouts.trajectory_groups
    return at_members(segment_sum(values, groups, rollouts.num_groups), groups) - values


def _horizon_baseline(rollouts: Rollouts, line: Line, gain: Tensor, kept: Tensor, horizon: int | None) -> Tensor:
    """`sum over the others of all G / ((K-1) N)`, [N]."""
    n = rollouts.num_trajectories
    others = _others_sum(torch.ones(n, dtype=torch.float64, device=gain.device), kept, rollouts).clamp(min=1)
    if horizon is None:
        lengths = line.lengths(n).double()
        longest = segment_max(lengths, rollouts.trajectory_groups, rollouts.num_groups)
        limit = at_members(longest.clamp(min=1), rollouts.trajectory_groups)
    else:
        limit = torch.full_like(others, float(horizon))
    return _others_sum(segment_sum(gain, line.trajectories, n), kept, rollouts) / (others * limit)


def _step_charges(
    rollouts: Rollouts, line: Line, steps: _Steps, step_rewards: Tensor, kept: Tensor, baseline: str
) -> Tensor:
    """What is taken off at the end of each step, [S]."""
    n = rollouts.num_trajectories
    total = segment_sum(step_rewards, steps.owner, n)
    if baseline == "step":
        mean = total / segment_count(steps.owner, n).clamp(min=1)
        others = _others_sum(torch.ones_like(total), kept, rollouts).clamp(min=1)
        return at_members(_others_sum(mean, kept, rollouts) / others, steps.owner)
    tokens = _others_sum(line.lengths(n).double(), kept, rollouts).clamp(min=1)
    return at_members(_others_sum(total, kept, rollouts) / tokens, steps.owner) * steps.lengths


def _where_kept(rollouts: Rollouts, kept: Tensor, part: Signal) -> Tensor:
    """The part where its trajectory is compared with others; 0 elsewhere."""
    at = kept if part.unit == "trajectory" else kept[rollouts.trajectory_ids][:, None]
    return torch.where(at, part.values, 0.0)


def _check_min(temperature: float | None, baseline: str, horizon: int | None) -> None:
    if temperature is not None and temperature <= 0:
        raise ValueError(
            f"process_min needs a temperature above 0; got {temperature:g}. Set temperature=None for the strict minimum."
        )
    if horizon is not None and horizon <= 0:
        raise ValueError(f"process_min needs a horizon above 0; got {horizon}. Give the generation limit in tokens.")
    if temperature is None and baseline != "horizon":
        raise ValueError(
            f'process_min(temperature=None) has no step rewards for baseline="{baseline}". Set baseline="horizon".'
        )


def _process_notes(steps: _Steps) -> dict[str, float]:
    scores = steps.scores[steps.owner >= 0]
    return {
        "steps": float(len(steps.scores)),
        "left_out_steps": float((steps.owner < 0).sum()),
        "mean_step_score": float(scores.mean()) if len(scores) else 0.0,
    }


@alias
def pure(
    *,
    temperature: float | None = 0.1,
    coef: float = 1.0,
    baseline: Literal["horizon", "step", "token"] = "horizon",
    horizon: int | None = None,
    process: str = "process",
    outcome: str = "outcome",
    spans: str = "step",
) -> Estimator:
    """PURE: the soft minimum of the step scores plus the verifier's outcome, each above the rest of the group.

    Source: arXiv 2504.15275. Departs: the optional whitening of its newer code is left to `chain(pure(), whiten())`.
    Cost: a process reward model's pass.

    Example:
        >>> pure(horizon=512)  # doctest: +NORMALIZE_WHITESPACE
        process_min(temperature=0.1, coef=1.0, baseline='horizon', horizon=512, process='process', outcome='outcome',
        spans='step')
    """
    return process_min(
        temperature=temperature,
        coef=coef,
        baseline=baseline,
        horizon=horizon,
        process=process,
        outcome=outcome,
        spans=spans,
    )
