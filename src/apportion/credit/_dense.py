"""Credit from dense rewards: log-ratios of two models, changes of a potential, step rewards of a decoder."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.credit._base import (
    Estimator,
    Settings,
    alias,
    assemble,
    estimator,
    measured_mask,
    span_values,
    token_values,
    trajectory_values,
)
from apportion.credit._line import action_line
from apportion.credit._reward_to_go import returns_to_go
from apportion.credit._turns import owners
from apportion.functional import at_members, segment_count, segment_sum
from apportion.types import Credit, Rollouts, Signal

_WHATEVER_THE_OUTCOMES = ("shift", "equal", "linear", "scale")
"""What holds of a method that reads no outcome, and gives 0 where nothing is measured."""


# ---- the log-ratio of two models ----------------------------------------------------------------------------------------


def _ratio_requires(s: Settings) -> tuple[str, ...]:
    return ("signals.{ratio}",) if s["over"] in ("token", "trajectory") else ("spans.{over}", "signals.{ratio}")


@estimator(requires=_ratio_requires, laws=_WHATEVER_THE_OUTCOMES)
def implicit_reward(
    rollouts: Rollouts,
    *,
    beta: float = 0.1,
    over: str = "token",
    clip: float | None = None,
    ratio: str = "log_ratio",
) -> Credit:
    """Credit as the log-ratio of a preference-trained model to its reference, token by token or summed over spans.

    `c_t = beta (ln pi_theta(y_t) - ln pi_ref(y_t))`; for the best policy of a token-level problem with a penalty beta
    against the reference this is `r_t + V(s_(t+1)) - V(s_t)`, the advantage of the token.

    Source: "From r to Q*", arXiv 2404.12358. The paper trains no policy with it; as an advantage it is usually added to
        another, `add((1.0, grpo()), (0.1, implicit_reward()))`. What is still to come of it is
        `returns_to_go(reward="log_ratio")`.
    Reads: signals[ratio] [B, T], spans[over], truncated. Scope: row. Unit: `over`.
    Cost: one pass each of the trained model and of its reference.
    Laws: the credits of a response add up to `sum of r - V(s_0)`, those of spans to those of the actions in them; outcomes
        are not read.
    Degenerate: theta = ref gives 0; an empty response nothing; an unmeasured token adds nothing, counted in notes; a
        position outside every span gets 0. A response cut by a limit lacks V of where it stopped: its sum is the shaped
        return up to there, and the note `truncated_rows` counts such rows.

    Args:
        rollouts: the batch.
        beta: nats to reward; the strength of the penalty with which theta was trained.
        over: "token"; or "trajectory" or the name of a span set, whose tokens all get the sum over their unit.
        clip: bound on |log-ratio| of a token. None cuts nothing: a token that the reference excludes is then an error.
        ratio: token signal, in nats.

    Raises:
        ValueError: an infinite log-ratio without `clip`; a clip not above 0; a ratio that is not one number per token.

    Example:
        >>> ratio = Signal(torch.tensor([[0.4, -0.2, 0.4], [-0.4, 0.2, 0.0]]), "token")
        >>> r = Rollouts.from_lists([[1, 2, 3], [1, 4]], [0, 0], signals={"log_ratio": ratio})
        >>> implicit_reward(r).advantages
        tensor([[ 0.0400, -0.0200,  0.0400],
                [-0.0400,  0.0200,  0.0000]])
    """
    values, notes = _log_ratios(rollouts, clip, ratio)
    if over == "token":
        part = beta * values.double()
    elif over == "trajectory":
        part = beta * segment_sum(
            values.sum(1, dtype=torch.float64), rollouts.trajectory_ids, rollouts.num_trajectories
        )
    else:
        part = beta * segment_sum(values.flatten(), rollouts.span_ids(over).flatten(), len(rollouts.spans[over]))
    return assemble(rollouts, rollouts.action_mask, {ratio: Signal(part, over)}, notes=notes)


def _log_ratios(rollouts: Rollouts, clip: float | None, ratio: str) -> tuple[Tensor, dict[str, float]]:
    """The log-ratio at each action, [B, T], 0 where there is none, and what to note."""
    if clip is not None and clip <= 0:
        raise ValueError(f"implicit_reward needs a clip above 0; got {clip:g}. Set clip=None for no bound.")
    given = token_values(rollouts, ratio, "implicit_reward")
    known = rollouts.action_mask & ~given.isnan()
    values = torch.where(known, given, 0.0)
    if clip is not None:
        values = values.clamp(-clip, clip)
    elif not bool(values.sum(dtype=torch.float64).isfinite()):
        raise ValueError(
            f"implicit_reward needs finite log-ratios; {int(values.isinf().sum())} in signals[{ratio!r}] are infinite: one "
            "of the models excludes a sampled token. Set clip, such as clip=10.0, or score with the same filters."
        )
    notes = {
        "unmeasured_tokens": float(rollouts.action_mask.sum() - known.sum()),
        "truncated_rows": 0.0 if rollouts.truncated is None else float(rollouts.truncated.sum()),
    }
    return values, notes


@alias
def r_to_q(*, beta: float = 0.1, over: str = "token", clip: float | None = None) -> Estimator:
    """From r to Q*: the log-ratio of a DPO model to its reference is the credit of the token.

    Source: arXiv 2404.12358.
    Cost: one pass each of the trained model and of its reference.

    Example:
        >>> r_to_q(over="step")
        implicit_reward(beta=0.1, over='step', clip=None)
    """
    return implicit_reward(beta=beta, over=over, clip=clip)


# ---- a potential of the states -------------------------------------------------------------------------------------------


@estimator(requires=("signals.{signal}",), laws=_WHATEVER_THE_OUTCOMES)
def potential(
    rollouts: Rollouts,
    *,
    gamma: float = 1.0,
    form: Literal["reward", "return"] = "reward",
    state: Literal["after", "before"] = "after",
    signal: str = "goal_cosine",
) -> Credit:
    """Credit as the change of a potential: what the token did to a measured value of the state.

    `r'_t = gamma Phi(s_(t+1)) - Phi(s_t)`, with s_t the state in which action t is chosen and Phi = 0 after the last one.

    Source: shaping by potentials, Ng, Harada and Russell (1999). Phi as the cosine to a goal state is the dense value of
        arXiv 2407.13887; using it as a potential is ours, not the paper's.
    Reads: signals[signal] [B, T]. Scope: row. Unit: token.
    Cost: none beyond the signal; for `goal_cosine` a pass of the reward model.
    Laws: added to a reward it keeps the best policies: the discounted sum of r' from t on is `-Phi(s_t)` (`form="return"`),
        a baseline that no action changes; outcomes are not read.
    Degenerate: a potential of 0 gives 0; a token before or after which Phi was not measured gets 0, counted in notes; an
        empty response nothing. A response cut by a limit ends like any other, with Phi = 0.

    Args:
        rollouts: the batch.
        gamma: discount per action.
        form: "reward" is r' itself, which says where the value rose or fell; "return" is the sum of r' from t on, which
            leaves the expected gradient as it is.
        state: which state the signal describes at a token: the one "after" reading it, as hidden states do (then Phi(s_t)
            stands at the position before action t, prompts and tool output included, and is unknown at position 0), or
            the one "before" it, as `values` do.
        signal: token signal with Phi.

    Raises:
        ValueError: a signal that is not one number per token.

    Example:
        >>> cosine = Signal(torch.tensor([[0.5, 0.75, 0.25]]), "token")
        >>> r = Rollouts.from_lists([[1, 2, 3]], [0], signals={"goal_cosine": cosine})
        >>> potential(r).advantages, potential(r, state="before").advantages
        (tensor([[ 0.0000,  0.2500, -0.7500]]), tensor([[ 0.2500, -0.5000, -0.2500]]))
    """
    given = token_values(rollouts, signal, "potential")
    before = given if state == "before" else pad(given, (1, 0), value=torch.nan)[:, : rollouts.width]
    line = action_line(rollouts)
    here = line.take(before)
    change = -here
    if form == "reward":
        change = torch.where(line.goes_on, gamma * here.roll(-1), 0.0) - here
    unknown = change.isnan()
    part = Signal(line.put(torch.where(unknown, 0.0, change)), "token")
    return assemble(rollouts, rollouts.action_mask, {signal: part}, notes={"unmeasured_tokens": float(unknown.sum())})


# ---- step rewards decoded from returns ---------------------------------------------------------------------------------


@estimator(requires=("spans.{spans}", "signals.{decoded}", "signals.{outcome}"), laws=("linear",))
def redistribution(
    rollouts: Rollouts, *, decoded: str = "decoded", outcome: str = "outcome", spans: str = "step"
) -> Credit:
    """Credit as what a step earned above its even share of the outcome.

    `A_t = g_j - Y / L` for the tokens of step j, with the decoded reward g of each of the L steps and the outcome Y.

    Source: LaRe, arXiv 2412.11120, where g is a dense reward for any algorithm; taking the even share off is its use as
        pure redistribution. The decoders are `signals.LinearDecoder` and `signals.MLPDecoder`.
    Reads: signals[decoded], signals[outcome], spans[spans]. Scope: row. Unit: `spans`.
    Cost: a small decoder, trained beside the policy, and the factors of each step.
    Laws: over the steps of a trajectory it adds up to the error of the decoder, `sum of g - Y`: it says which steps, not
        how good the response was.
    Degenerate: an unmeasured step gets 0 and is not one of the L, counted in notes; a position outside every step gets 0;
        a trajectory without steps nothing; an unmeasured outcome advantage 0 and mask False. A truncated response has the
        outcome that was observed.

    Args:
        rollouts: the batch.
        decoded: signal with one reward per step.
        outcome: signal with one outcome per trajectory.
        spans: the steps; one without tokens counts among the L.

    Raises:
        ValueError: step rewards over other spans, or several each.

    Example:
        >>> r = Rollouts.from_lists([[1, 2, 3]], [0], outcome=[3.0], steps=[[(0, 2), (2, 3)]],
        ...                         signals={"decoded": Signal(torch.tensor([1.0, 2.5]), "step")})
        >>> redistribution(r).advantages
        tensor([[-0.5000, -0.5000,  1.0000]])
    """
    given = span_values(rollouts, decoded, spans, 0, "redistribution")
    value = trajectory_values(rollouts, outcome, "redistribution")
    known = ~given.isnan()
    of = torch.where(known, owners(rollouts, spans), -1)
    share = value / segment_count(of, len(value)).clamp(min=1)
    kept = at_members(~value.isnan(), of)
    parts = {
        decoded: Signal(torch.where(kept, given, 0.0), spans),
        outcome: Signal(torch.where(kept, -at_members(share, of), 0.0), spans),
    }
    notes = {"unmeasured_steps": float((~known).sum())}
    return assemble(rollouts, measured_mask(rollouts, ~value.isnan()), parts, notes=notes)


@alias
def lare(
    *,
    form: Literal["return", "centred"] = "return",
    decoded: str = "decoded",
    outcome: str = "outcome",
    spans: str = "step",
) -> Estimator:
    """LaRe: step rewards decoded from factors, as the return still to come, or above their even share of the outcome.

    "return" gives each token the sum of the decoded rewards of the steps that end at it or later, whatever the outcome;
    put a baseline behind it, such as `chain(lare(), whiten())`. "centred" is `redistribution`.

    Source: arXiv 2412.11120.
    Cost: a small decoder, trained beside the policy, and the factors of each step.

    Example:
        >>> lare()
        returns_to_go(reward='decoded')
        >>> lare(form="centred")
        redistribution(decoded='decoded', outcome='outcome', spans='step')
    """
    if form == "return":
        return returns_to_go(reward=decoded)
    return redistribution(decoded=decoded, outcome=outcome, spans=spans)
