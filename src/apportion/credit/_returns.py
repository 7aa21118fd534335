"""Credit from a critic's values: generalised advantage estimation over tokens or over spans."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.credit._base import Settings, assemble, estimator, measured_mask
from apportion.credit._line import Line, action_line
from apportion.functional import at_members, segment_sum, suffix_sum
from apportion.types import Credit, Rollouts, Signal


def _requires(s: Settings) -> tuple[str, ...]:
    spans = () if s["over"] == "token" else ("spans.{over}",)
    penalty = ("logprobs", "ref_logprobs") if s["kl_coef"] else ()
    return (*spans, "values", "signals.{reward}", *penalty)


@estimator(requires=_requires)
def gae(
    rollouts: Rollouts,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    over: str = "token",
    kl_coef: float = 0.0,
    reward: str = "outcome",
) -> Credit:
    """Generalised advantage estimation: how much better than the critic expected, from each decision on.

    `delta_t = r_t + gamma V_(t+1) - V_t`, `A_t = delta_t + gamma lam A_(t+1)`, `returns_t = A_t + V_t`, where t + 1 is the
    next action of the trajectory: prompts, tool output and padding in between are skipped.

    Source: arXiv 1506.02438; token rewards as in ReFT, 2401.08967, and 2406.09279: the outcome on the last
        action, `-kl_coef (ln pi_old - ln pi_ref)` on every one. Whitening is `whiten`, never done here.
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
        over: "token", or the name of a span set whose spans are one decision each, with the value of its first action.
        kl_coef: weight of the penalty against the reference model inside the reward.
        reward: a signal per trajectory (on its last action), per span (on the span's last action) or per token.

    Raises:
        ValueError: `bootstrap` without `truncated`; a reward with several values each.

    Example:
        >>> r = Rollouts.from_lists([[1, 2]], [0], outcome=[1.0], values=[[0.5, 0.75]])
        >>> gae(r, lam=1.0).advantages
        tensor([[0.5000, 0.2500]])
    """
    line = action_line(rollouts)
    unit = _decisions(rollouts, line, over)
    carry = gamma * lam * unit.goes_on.double()
    measured, earned = _rewards(rollouts, line, reward)
    flows = {reward: suffix_sum(unit.gather(earned), carry)}
    if kl_coef:
        flows["kl"] = suffix_sum(unit.gather(-kl_coef * _log_ratio(rollouts, line)), carry)
    following = torch.where(unit.goes_on, unit.values.roll(-1), unit.after)
    flows["values"] = suffix_sum(gamma * following - unit.values, carry)
    parts = {k: Signal(_as_signal(v, unit, line, rollouts, over), over) for k, v in flows.items()}
    mask = measured_mask(rollouts, measured) & line.put(unit.of >= 0)
    returns = line.put(at_members(torch.stack(list(flows.values())).sum(0) + unit.values, unit.of))
    notes = {"decisions": float(len(unit.names)), "actions_outside_spans": float((unit.of < 0).sum())}
    return assemble(rollouts, mask, parts, returns=torch.where(mask, returns, 0.0), notes=notes)


@dataclass(frozen=True)
class _Decisions:
    """The decisions of the batch in the order of time, `U` of them: actions, or spans of actions.

    Args:
        of: the decision that each action of the line is part of, -1 for none, [M].
        gets: the decision that each action's reward goes to, -1 for none, [M].
        names: which span each decision is (which action, over tokens), [U].
        values: V before the decision, [U]. after: V after it where it is the trajectory's last, [U].
        goes_on: another decision of the trajectory follows, [U].
    """

    of: Tensor
    gets: Tensor
    names: Tensor
    values: Tensor
    after: Tensor
    goes_on: Tensor

    def gather(self, rewards: Tensor) -> Tensor:
        """Sum of the rewards that go to each decision."""
        return segment_sum(rewards, self.gets, len(self.names))


def _decisions(rollouts: Rollouts, line: Line, over: str) -> _Decisions:
    assert rollouts.values is not None
    values, after = line.take(rollouts.values), _value_after_end(rollouts)[line.trajectories]
    if over == "token":
        each = torch.arange(len(values), device=rollouts.device)
        return _Decisions(each, each, each, values, after, line.goes_on)
    span = rollouts.span_ids(over).reshape(-1)[line.positions]
    before = torch.cat([span.new_full((1,), -1), span[:-1]])[: len(span)]
    first = (span >= 0) & (span != before)
    begun = first.cumsum(0) - 1
    owner = line.trajectories[first]
    gets = torch.where(_belongs(begun, owner, line), begun, begun + 1)
    gets = torch.where(_belongs(gets, owner, line), gets, -1)
    goes_on = torch.zeros_like(owner, dtype=torch.bool)
    goes_on[:-1] = owner[1:] == owner[:-1]
    return _Decisions(torch.where(span >= 0, begun, -1), gets, span[first], values[first], after[first], goes_on)


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
            "gae needs rollouts.truncated to know where rollouts.bootstrap applies; this batch has only the latter. "
            "Say which rows were cut by a limit."
        )
    last = torch.zeros_like(rollouts.trajectory_ids[: len(out)]).scatter_reduce(
        0, rollouts.trajectory_ids, rollouts.row_index, "amax", include_self=False
    )
    cut = rollouts.truncated & (rollouts.row_index == last[rollouts.trajectory_ids])
    out[rollouts.trajectory_ids[cut]] = rollouts.bootstrap[cut].double()
    return out


def _rewards(rollouts: Rollouts, line: Line, reward: str) -> tuple[Tensor, Tensor]:
    """Which trajectories have their own outcome, [N], and the reward at each action, [M]; unmeasured ones give 0."""
    signal = rollouts.signals[reward]
    if signal.unit in ("batch", "group") or signal.values.dim() != (2 if signal.unit == "token" else 1):
        raise ValueError(
            f"gae needs signals[{reward!r}] with one number per trajectory, span or token; got unit {signal.unit!r} "
            f"and shape {list(signal.values.shape)}. Aggregate it first."
        )
    measured = torch.ones(rollouts.num_trajectories, dtype=torch.bool, device=rollouts.device)
    if signal.unit == "token":
        return measured, line.take(signal.values).nan_to_num(nan=0.0)
    ids = rollouts.unit_ids(signal.unit).reshape(-1)[line.positions]
    last = line.last_of(ids, len(signal.values))
    earned = torch.zeros(len(ids), dtype=torch.float64, device=rollouts.device)
    known = (last >= 0) & ~signal.values.isnan()
    earned[last[known]] = signal.values[known].double()
    return (~signal.values.isnan() if signal.unit == "trajectory" else measured), earned


def _log_ratio(rollouts: Rollouts, line: Line) -> Tensor:
    """`ln pi_old - ln pi_ref` at each action, the learner's own log-probabilities where they were recorded."""
    old = rollouts.logprobs if rollouts.old_logprobs is None else rollouts.old_logprobs
    assert old is not None
    assert rollouts.ref_logprobs is not None
    return line.take(old) - line.take(rollouts.ref_logprobs)


def _as_signal(values: Tensor, unit: _Decisions, line: Line, rollouts: Rollouts, over: str) -> Tensor:
    """One value per decision, as the values of a signal over tokens or over the spans."""
    if over == "token":
        return line.put(values)
    out = torch.zeros(len(rollouts.spans[over]), dtype=torch.float64, device=values.device)
    out[unit.names] = values
    return out
