"""Credit that follows the rhythm of attention: tokens that plan, and tokens that are looked back at."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from apportion.credit._base import Estimator, Settings, alias, token_values, transform
from apportion.credit._combine import chain
from apportion.credit._group import group_relative
from apportion.credit._line import Line, action_line
from apportion.functional import row_median, row_top, segment_any
from apportion.types import Credit, Rollouts

Mode = Literal["local", "global", "coupled"]


def _requires(s: Settings) -> tuple[str, ...]:
    read = {"local": ("waad",), "global": ("fai",), "coupled": ("waad", "fai")}[s["mode"]]
    return tuple(f"signals.{{{name}}}" for name in read)


@transform(requires=_requires)
def amplify_by_attention(
    credit: Credit,
    rollouts: Rollouts,
    *,
    mode: Mode = "coupled",
    q: float = 0.4,
    amp: float = 1.5,
    k: int = 3,
    alpha: float = 0.5,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    min_length: int = 50,
    waad: str = "waad",
    fai: str = "fai",
) -> Credit:
    """Amplify positive credit on the tokens where attention plans ahead, on those it comes back to, or on both.

    `A' = gamma_t A where A > 0`, with TopQ the `ceil(q n)` largest of a response and `delta_t = |WAAD_t - WAAD_(t+1)|`:
    local, gamma = amp on TopQ(delta); global, gamma = amp on the anchors TopQ(FAI); coupled, an anchor with
    WAAD <= tau_waad and a delta of at least tau_delta among the k tokens before it gives the share alpha of its bonus
    `amp - 1` to the token of the largest such delta. Elsewhere 1; bonuses on one token add up.

    Source: arXiv 2510.13554. The paper gives no thresholds and no alpha: medians of the response and 1/2 are ours. So
        are the ties: TopQ takes the earlier token, the largest delta before an anchor is the later one.
    Reads: signals[waad] and signals[fai] [B, T], as `mode` needs. Scope: row. Unit: token.
    Cost: one forward pass that keeps the attention maps of a few layers.
    Laws: blame is never changed; `amp = 1` changes nothing; `1 <= gamma <= 1 + (amp - 1) (1 + alpha)` when coupled.
    Degenerate: a response shorter than `min_length` tokens keeps its credit, as FAI looks that far ahead; the last
        token has delta 0; a token without measurement is left out, so that its neighbours become neighbours, in notes.

    Args:
        credit: what to change. rollouts: the batch.
        mode: "local", "global" or "coupled".
        q: share of a response's tokens that is selected, above 0 and at most 1.
        amp: factor on selected tokens, at least 1.
        k: how many tokens before an anchor are searched.
        alpha: share of a dominated anchor's bonus that goes to the token before it, 0 to 1.
        tau_waad: an anchor that looks back at most this far is locally dominated; None for the response's median WAAD.
        tau_delta: smallest delta that counts; None for the response's median delta.
        min_length: actions a response must have.
        waad: token signal, the windowed average attention distance of the local heads.
        fai: token signal, the future attention influence in the global heads.

    Raises:
        ValueError: q, amp, k or alpha out of bounds; a signal that is not one number per token.

    Example:
        >>> import torch
        >>> from apportion.credit import chain, signed_outcome
        >>> from apportion.types import Signal
        >>> r = Rollouts.from_lists([[5, 6, 7, 8]], [0], outcome=[1.0],
        ...     signals={"waad": Signal(torch.tensor([[9.0, 1.0, 1.0, 2.0]]), "token"),
        ...              "fai": Signal(torch.tensor([[0.0, 0.3, 0.1, 0.0]]), "token")})
        >>> chain(signed_outcome(), amplify_by_attention(q=0.25, min_length=1))(r).advantages
        tensor([[1.2500, 1.2500, 1.0000, 1.0000]])
    """
    _check(q, amp, k, alpha)
    names = {"local": (waad,), "global": (fai,), "coupled": (waad, fai)}[mode]
    signals = [token_values(rollouts, name, "amplify_by_attention") for name in names]
    unknown = torch.stack([x.isnan() for x in signals]).any(0)
    rewarded = segment_any((credit.advantages > 0).any(1), rollouts.trajectory_ids, rollouts.num_trajectories)
    rewarded = rollouts.action_mask & rewarded[rollouts.trajectory_ids][:, None]
    line = action_line(rollouts)
    used = (rewarded & ~unknown).reshape(-1)[line.positions]
    line = Line(line.positions[used], line.trajectories[used], line.shape)
    lengths = torch.unique_consecutive(line.trajectories, return_counts=True)[1]
    rows, places = _rows(lengths)
    values = [_laid_out(line.take(x), rows, places, lengths) for x in signals]
    if mode == "coupled":
        bonus = _coupled(values[0], values[1], lengths, q, k, alpha, tau_waad, tau_delta)
    else:
        bonus = row_top(_steps(values[0], lengths) if mode == "local" else values[0], lengths, q).double()
    bonus = line.put(torch.where(lengths >= min_length, 1.0, 0.0)[rows] * bonus[rows, places])
    factor = torch.where(credit.advantages > 0, 1 + (amp - 1) * bonus, 1.0)
    notes = {
        "unmeasured_attention": float((rewarded & unknown).sum()),
        "amplified_tokens": float((factor > 1).sum()),
    }
    return replace(credit.scaled(factor, rollouts), notes={**credit.notes, **notes})


def _coupled(
    distance: Tensor,
    influence: Tensor,
    lengths: Tensor,
    q: float,
    k: int,
    alpha: float,
    tau_waad: float | None,
    tau_delta: float | None,
) -> Tensor:
    """The share of the bonus of each token: 1 on an anchor; of a dominated one, alpha moves to the token before it."""
    anchor, delta = row_top(influence, lengths, q), _steps(distance, lengths)
    largest, where = _largest_before(delta, k)
    far = row_median(distance, lengths)[:, None] if tau_waad is None else tau_waad
    jump = row_median(delta, lengths)[:, None] if tau_delta is None else tau_delta
    dominated = anchor & (distance <= far) & (largest >= jump)
    introduces = torch.zeros_like(anchor)
    rows, places = dominated.nonzero(as_tuple=True)
    introduces[rows, where[rows, places]] = True
    return anchor.double() - alpha * dominated.double() + alpha * introduces.double()


def _steps(distance: Tensor, lengths: Tensor) -> Tensor:
    """delta: how much the distance changes from each token to the next, 0 at the last."""
    change = pad((distance[:, 1:] - distance[:, :-1]).abs(), (0, 1)) if distance.numel() else distance
    return torch.where(torch.arange(distance.shape[1], device=distance.device) < lengths[:, None] - 1, change, 0.0)


def _largest_before(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of the k entries before each in its row, -inf for the first, and where: the latest of equals."""
    here = torch.arange(values.shape[1], device=values.device).expand(values.shape)
    largest, where = torch.full_like(values, -torch.inf), here
    for back in range(1, min(k, values.shape[1] - 1) + 1):
        earlier = pad(values[:, :-back], (back, 0), value=-torch.inf)
        where = torch.where(earlier > largest, here - back, where)
        largest = torch.maximum(largest, earlier)
    return largest, where


def _rows(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the place of each token, when every response is a row of its own."""
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows), device=lengths.device) - starts[rows]


def _laid_out(values: Tensor, rows: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
    out = values.new_zeros(len(lengths), int(lengths.max()) if len(lengths) else 0)
    out[rows, places] = values
    return out


def _check(q: float, amp: float, k: int, alpha: float) -> None:
    if not 0 < q <= 1:
        raise ValueError(f"amplify_by_attention needs 0 < q <= 1, a share of the tokens; got {q:g}.")
    if amp < 1:
        raise ValueError(
            f"amplify_by_attention needs amp of at least 1; got {amp:g}. To weaken credit use scale_by_sign."
        )
    if k < 1:
        raise ValueError(f"amplify_by_attention needs k of at least 1 token to search; got {k}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"amplify_by_attention needs 0 <= alpha <= 1, a share of the bonus; got {alpha:g}.")


@alias
def attention_rhythm(
    *,
    mode: Mode = "coupled",
    q: float = 0.4,
    amp: float = 1.5,
    k: int = 3,
    alpha: float = 0.5,
    min_length: int = 50,
    scale: Literal["std"] | None = "std",
    reward: str = "outcome",
) -> Estimator:
    """GRPO with positive credit amplified where attention plans ahead and where it comes back to.

    Source: arXiv 2510.13554; `amplify_by_attention` has the thresholds, which the paper leaves open.
    Cost: one forward pass that keeps the attention maps of a few layers.

    Example:
        >>> attention_rhythm(mode="local")  # doctest: +NORMALIZE_WHITESPACE
        chain(group_relative(reward='outcome', scale='std'),
        amplify_by_attention(mode='local', q=0.4, amp=1.5, k=3, alpha=0.5, min_length=50))
    """
    return chain(
        group_relative(reward=reward, scale=scale),
        amplify_by_attention(mode=mode, q=q, amp=amp, k=k, alpha=alpha, min_length=min_length),
    )
