"""Credit from a critic's values: generalised advantage estimation over tokens or over spans, and its relatives."""

from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from apportion.credit._base import Estimator, Settings, alias, assemble, dialect, estimator, measured_mask
from apportion.credit._combine import chain
from apportion.credit._line import Line, action_line
from apportion.credit._transforms import whiten
from apportion.functional import at_members, segment_count, segment_mean, segment_sum, suffix_sum
from apportion.types import Credit, Rollouts, Signal

SpanValue = Literal["first", "mean", "last", "position"]
SpanReward = Literal["sum", "mean"]


def _requires(s: Settings) -> tuple[str, ...]:
    spans = () if s["over"] == "token" else ("spans.{over}",)
    return (*spans, "values", "signals.{reward}", *penalty_requires(s))


def penalty_requires(s: Settings) -> tuple[str, ...]:
    """What the penalty against the reference reads."""
    named = ("signals.{kl_coef}",) if isinstance(s["kl_coef"], str) else ()
    return ("logprobs", "ref_logprobs", *named) if s["kl_coef"] else ()


@estimator(requires=_requires)
def gae(
    rollouts: Rollouts,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    over: str = "token",
    span_value: SpanValue = "first",
    span_reward: SpanReward = "sum",
    observations: Literal["skip", "count", "valued"] = "skip",
    alpha: float | None = None,
    critic_lam: float | None = None,
    kl_coef: float | str = 0.0,
    reward: str = "outcome",
) -> Credit:
    """Generalised advantage estimation: how much better than the critic expected, from each decision on.

    `delta_t = r_t + gamma V_(t+1) - V_t`, `A_t = delta_t + gamma lam A_(t+1)`, `returns_t = A_t + V_t`, where t + 1 is the
    next action of the trajectory: prompts, tool output and padding in between are skipped.

    Source: arXiv 1506.02438; token rewards as in ReFT, 2401.08967, and 2406.09279: the outcome on the last
        action, `-kl_coef (ln pi_old - ln pi_ref)` on every one; macro actions, MA-RLHF, 2410.02743; `alpha` and
        `critic_lam`, VAPO, 2504.05118. Whitening is `whiten`, never done here. What other trainers compute: `.verl()`,
        `.openrlhf()`, `.skyrl()`.
    Reads: values, signals[reward], bootstrap and truncated, spans[over], logprobs (old_logprobs first) and ref_logprobs
        for `kl_coef`. Scope: row. Unit: token, or `over`.
    Cost: a critic, trained beside the policy; a reference model's pass if `kl_coef`.
    Laws: `gamma = lam = 1` gives the sum of rewards from t on minus V_t; with V = 0 too, the outcome everywhere.
    Degenerate: after the last action V is `bootstrap` where the trajectory's last row is truncated, else 0; an empty
        response nothing; an unmeasured outcome advantage 0 and mask False. Over spans, a position outside every span
        decides nothing: mask False, its rewards go to the span before it (the first span, if none is before), and a
        span without an action is skipped.

    Args:
        rollouts: the batch.
        gamma: discount per decision.
        lam: 1 trusts the rewards, 0 the critic.
        over: "token", or the name of a span set whose spans are one decision each.
        span_value: V of a span: that of its first action ("first", the state before the span), of its last, or the mean
            over its actions, equal or with weights 1, 1/2, 1/3 ... ("position").
        span_reward: the rewards of a span's actions are added, or averaged.
        observations: positions between the actions of a row take no time ("skip"), or one step each with V = 0
            ("count") or with the critic's V there ("valued"). From row to row it is one step in every case.
        alpha: instead of `lam`, 1 - 1 / (alpha l) for a trajectory of l decisions, and 0 where that is negative.
        critic_lam: lam of the returns, None = the advantages' own.
        kl_coef: weight of the penalty against the reference model inside the reward; or the name of a batch signal that
            holds it (NaN = no penalty), where a trainer steers it from step to step.
        reward: a signal per trajectory (on its last action), per span (on the span's last action) or per token.

    Raises:
        ValueError: `bootstrap` without `truncated`; a reward with several values each; counted observations over spans;
            alpha not above 0.

    Example:
        >>> r = Rollouts.from_lists([[1, 2]], [0], outcome=[1.0], values=[[0.5, 0.75]])
        >>> gae(r, lam=1.0).advantages
        tensor([[0.5000, 0.2500]])
    """
    _check(over, observations, alpha)
    line = action_line(rollouts, observations=observations != "skip")
    unit = _decisions(rollouts, line, over, span_value, valued=observations == "valued")
    measured, gains = _gains(rollouts, line, unit, gamma, span_reward, kl_coef, reward)
    mask = measured_mask(rollouts, measured)
    if over != "token":
        mask = mask & line.put(unit.of >= 0)
    goes_on = unit.goes_on.double()
    carry = gamma * (lam if alpha is None else _adaptive_lam(unit, alpha, rollouts.num_trajectories)) * goes_on
    returns = unit.values.clone()
    if critic_lam is not None:
        returns += suffix_sum(reduce(torch.add, gains.values()), gamma * critic_lam * goes_on)
    del goes_on
    names = list(gains)
    flows = suffix_sum(torch.stack([gains.pop(name) for name in names]), carry)
    if critic_lam is None:
        returns += flows.sum(0)
    del carry  # memory: from here on the parts are what takes it
    parts = {k: Signal(_as_signal(f, unit, line, rollouts, over), over) for k, f in zip(names, flows, strict=True)}
    notes = {"decisions": float(unit.count), "actions_outside_spans": float((unit.of < 0).sum())}
    target = _as_returns(returns, unit, line, measured)
    del line, unit, returns, flows
    return assemble(rollouts, mask, parts, returns=target, notes=notes)


def _gains(
    rollouts: Rollouts,
    line: Line,
    unit: "_Decisions",
    gamma: float,
    span_reward: SpanReward,
    kl_coef: float | str,
    reward: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Which trajectories were measured, [N]; and delta at each decision, term by term, [U]."""
    measured, earned = rewards_at_actions(rollouts, line, reward, "gae")
    gains = {reward: unit.gather(earned, span_reward)}
    if kl_coef:
        gains["kl"] = unit.gather(penalty_at_actions(rollouts, line, kl_coef, "gae"), span_reward)
    following = torch.where(unit.goes_on, unit.values.roll(-1), unit.after)
    gains["values"] = following.mul_(gamma).sub_(unit.values)
    return measured, gains


def _as_returns(values: Tensor, unit: "_Decisions", line: Line, measured: Tensor) -> Tensor:
    """What a critic should say at each action of a measured trajectory, [B, T]."""
    counted = line.spread(measured)
    if line.acts is not None:
        counted &= line.acts
    return line.put(torch.where(counted, unit.at_actions(values), 0.0))


@dataclass(frozen=True)
class _Decisions:
    """The decisions of the batch in the order of time, `U` of them: actions, or spans of actions.

    Args:
        of: the decision that each action of the line is part of, -1 for none, [M].
        gets: the decision that each action's reward goes to, -1 for none, [M].
        names: which span each decision is (which action, over tokens), [U].
        values: V before the decision, [U]. after: V after it where it is the trajectory's last, [U].
        goes_on: another decision of the trajectory follows, [U].
        trajectories: whose decision it is, [U].
        acts: which are decisions of the policy, [U]; None = all. The others are observations that take time.
    """

    of: Tensor
    gets: Tensor
    names: Tensor
    values: Tensor
    after: Tensor
    goes_on: Tensor
    trajectories: Tensor
    acts: Tensor | None = None

    @property
    def count(self) -> int:
        """How many there are, observations not counted."""
        return len(self.names) if self.acts is None else int(self.acts.sum())

    def gather(self, rewards: Tensor, how: SpanReward) -> Tensor:
        """The rewards that go to each decision, added or averaged."""
        if self.gets is self.of:  # every action is a decision
            return rewards
        return (segment_sum if how == "sum" else segment_mean)(rewards, self.gets, len(self.names))

    def at_actions(self, values: Tensor) -> Tensor:
        """What each decision has, at each of its actions; 0 where an action belongs to none."""
        return values if self.gets is self.of else at_members(values, self.of)


def _check(over: str, observations: str, alpha: float | None) -> None:
    if over != "token" and observations != "skip":
        raise ValueError(
            f"gae(over={over!r}) takes one step per span, so that observations cannot be {observations!r}. "
            'Leave observations="skip", or set over="token".'
        )
    if alpha is not None and alpha <= 0:
        raise ValueError(f"gae needs alpha above 0; got {alpha:g}. Leave it None to use lam.")


def _decisions(rollouts: Rollouts, line: Line, over: str, span_value: SpanValue, valued: bool) -> _Decisions:
    assert rollouts.values is not None
    values, after = line.take(rollouts.values), line.spread(_value_after_end(rollouts))
    if over == "token":
        values = values if valued else line.of_actions(values)
        each = torch.arange(len(values), device=rollouts.device)
        return _Decisions(each, each, each, values, after, line.goes_on, line.trajectories, line.acts)
    span = line.ids(rollouts, over)
    before = torch.cat([span.new_full((1,), -1), span[:-1]])[: len(span)]
    first = (span >= 0) & (span != before)
    begun = first.cumsum(0) - 1
    owner = line.trajectories[first]
    gets = torch.where(_belongs(begun, owner, line), begun, begun + 1)
    gets = torch.where(_belongs(gets, owner, line), gets, -1)
    of = torch.where(span >= 0, begun, -1)
    goes_on = torch.zeros_like(owner, dtype=torch.bool)
    goes_on[:-1] = owner[1:] == owner[:-1]
    of_spans = values[first] if span_value == "first" else _span_values(values, of, first, line, span_value)
    return _Decisions(of, gets, span[first], of_spans, after[first], goes_on, owner)


def _span_values(values: Tensor, of: Tensor, first: Tensor, line: Line, how: SpanValue) -> Tensor:
    """V of each span, from those of its actions."""
    starts = first.nonzero()[:, 0]
    spans = len(starts)
    if how == "last":
        return values[line.last_of(of, spans)]
    if how == "mean":
        return segment_mean(values, of, spans)
    place = torch.arange(1, len(values) + 1, device=values.device) - at_members(starts, of)
    weight = 1 / place.double()
    return segment_sum(weight * values, of, spans) / segment_sum(weight, of, spans)


def _adaptive_lam(unit: _Decisions, alpha: float, trajectories: int) -> Tensor:
    """`1 - 1 / (alpha l)` of each decision's trajectory, l its number of decisions; 0 where alpha l is below 1."""
    mine = unit.trajectories if unit.acts is None else torch.where(unit.acts, unit.trajectories, -1)
    lam = 1 - 1 / (alpha * segment_count(mine, trajectories)).clamp(min=1)
    return lam[unit.trajectories]


def _belongs(decision: Tensor, owner: Tensor, line: Line) -> Tensor:
    """Whether the decision exists and is one of the action's own trajectory."""
    inside = (decision >= 0) & (decision < len(owner))
    return inside & (at_members(owner, torch.where(inside, decision, -1)) == line.trajectories)


def _value_after_end(rollouts: Rollouts) -> Tensor:
    """V after each trajectory's last action, [N]: the bootstrap of its last row where that was truncated, else 0."""
    out = torch.zeros(rollouts.num_trajectories, dtype=torch.float64, device=rollouts.device)
    if rollouts.bootstrap is None:
        return out
    if rollouts.truncated is None:
        raise ValueError(
            "gae needs rollouts.truncated to know where rollouts.bootstrap applies, which this batch lacks. "
            "Say which rows were cut by a limit."
        )
    last = torch.zeros_like(rollouts.trajectory_ids[: len(out)]).scatter_reduce(
        0, rollouts.trajectory_ids, rollouts.row_index, "amax", include_self=False
    )
    cut = rollouts.truncated & (rollouts.row_index == last[rollouts.trajectory_ids])
    out[rollouts.trajectory_ids[cut]] = rollouts.bootstrap[cut].double()
    return out


def rewards_at_actions(rollouts: Rollouts, line: Line, reward: str, needed_by: str) -> tuple[Tensor, Tensor]:
    """Which trajectories have their own outcome, [N], and the reward at each action, [M]; unmeasured ones give 0.

    Raises:
        ValueError: the signal is per batch or per group, or has more axes.
    """
    signal = rollouts.signals[reward]
    if signal.unit in ("batch", "group") or signal.values.dim() != (2 if signal.unit == "token" else 1):
        raise ValueError(
            f"{needed_by} needs signals[{reward!r}] with one number per trajectory, span or token; got unit "
            f"{signal.unit!r} and shape {list(signal.values.shape)}. Aggregate it first."
        )
    measured = torch.ones(rollouts.num_trajectories, dtype=torch.bool, device=rollouts.device)
    if signal.unit == "token":
        return measured, line.of_actions(line.take(signal.values).nan_to_num(nan=0.0))
    ids = line.ids(rollouts, signal.unit)
    ids = ids if line.acts is None else torch.where(line.acts, ids, -1)
    last = line.last_of(ids, len(signal.values))
    earned = torch.zeros(len(ids), dtype=torch.float64, device=rollouts.device)
    known = (last >= 0) & ~signal.values.isnan()
    earned[last[known]] = signal.values[known].double()
    return (~signal.values.isnan() if signal.unit == "trajectory" else measured), earned


def penalty_at_actions(rollouts: Rollouts, line: Line, coef: float | str, needed_by: str) -> Tensor:
    """`-coef (ln pi_old - ln pi_ref)` at each action, the learner's own log-probabilities where they were recorded.

    Raises:
        ValueError: `coef` names a signal that is not one number for the batch.
    """
    old = rollouts.logprobs if rollouts.old_logprobs is None else rollouts.old_logprobs
    assert old is not None
    assert rollouts.ref_logprobs is not None
    weight = _coefficient(rollouts, coef, needed_by) if isinstance(coef, str) else coef
    return line.of_actions(line.take(old) - line.take(rollouts.ref_logprobs)).mul_(-weight)


def _coefficient(rollouts: Rollouts, name: str, needed_by: str) -> float:
    signal = rollouts.signals[name]
    if signal.unit != "batch" or signal.values.dim() != 1:
        raise ValueError(
            f"{needed_by} needs signals[{name!r}] with one number for the batch; got unit {signal.unit!r} and shape "
            f"{list(signal.values.shape)}. Give Signal(torch.tensor([coefficient]), 'batch')."
        )
    return float(signal.values.nan_to_num(nan=0.0))


def _as_signal(values: Tensor, unit: _Decisions, line: Line, rollouts: Rollouts, over: str) -> Tensor:
    """One value per decision, as the values of a signal over tokens or over the spans."""
    if over == "token":
        return line.put(line.of_actions(values))
    out = torch.zeros(len(rollouts.spans[over]), dtype=torch.float64, device=values.device)
    out[unit.names] = values
    return out


# ---- what other trainers compute --------------------------------------------------------------------------------------


@dialect(gae)
def verl(*, gamma: float = 1.0, lam: float = 1.0, kl_coef: float | str = 0.0, reward: str = "outcome") -> Estimator:
    """verl 0.9.1: observations skipped, then whitened over the batch's tokens (sample variance, eps 1e-8 inside)."""
    return chain(gae(gamma=gamma, lam=lam, kl_coef=kl_coef, reward=reward), whiten())


@dialect(gae)
def openrlhf(
    *, gamma: float = 1.0, lam: float = 1.0, kl_coef: float | str = 0.01, reward: str = "outcome"
) -> Estimator:
    """OpenRLHF 0.11.2: an observation is a step with V = 0; whitened by the population variance, at least 1e-8."""
    return chain(
        gae(gamma=gamma, lam=lam, observations="count", kl_coef=kl_coef, reward=reward),
        whiten(ddof=0, eps_inside="floor"),
    )


@dialect(gae)
def skyrl(*, gamma: float = 1.0, lam: float = 1.0, kl_coef: float | str = 0.0, reward: str = "outcome") -> Estimator:
    """SkyRL 0.3.0: an observation is a step with the critic's V there; whitened as in verl."""
    return chain(gae(gamma=gamma, lam=lam, observations="valued", kl_coef=kl_coef, reward=reward), whiten())


# ---- named settings -----------------------------------------------------------------------------------------------------


@alias
def vapo(
    *,
    gamma: float = 1.0,
    alpha: float = 0.05,
    critic_lam: float = 1.0,
    kl_coef: float | str = 0.0,
    reward: str = "outcome",
) -> Estimator:
    """VAPO's credit: the longer the response, the more it trusts rewards; the critic learns from whole returns.

    Source: arXiv 2504.05118, length-adaptive and decoupled GAE. Its other parts (value pre-training, clip-higher, a
        likelihood term on correct responses) are training, not credit. Where the formula is negative, up to 20 tokens
        here, lam is 0, as in NeMo-RL.
    Cost: a critic, trained beside the policy.

    Example:
        >>> vapo()
        gae(gamma=1.0, alpha=0.05, critic_lam=1.0, kl_coef=0.0, reward='outcome')
    """
    return gae(gamma=gamma, alpha=alpha, critic_lam=critic_lam, kl_coef=kl_coef, reward=reward)


@alias
def ma_rlhf(
    *,
    macro: str = "macro",
    gamma: float = 1.0,
    lam: float = 0.95,
    span_value: SpanValue = "mean",
    span_reward: SpanReward = "sum",
    kl_coef: float | str = 0.05,
    reward: str = "outcome",
) -> Estimator:
    """MA-RLHF's credit: runs of tokens are one action, worth the mean of their values.

    Source: arXiv 2410.02743. Its code averages the rewards of a macro action (`span_reward="mean"`) and ends every
        response with one of a single token (`fixed_ngrams(5, end_alone=True)` in apportion.signals, which has the other
        ways to make them too).
    Cost: a critic, trained beside the policy; a reference model's pass.

    Example:
        >>> ma_rlhf(kl_coef=0.0)
        gae(gamma=1.0, lam=0.95, over='macro', span_value='mean', span_reward='sum', kl_coef=0.0, reward='outcome')
    """
    return gae(
        gamma=gamma,
        lam=lam,
        over=macro,
        span_value=span_value,
        span_reward=span_reward,
        kl_coef=kl_coef,
        reward=reward,
    )
