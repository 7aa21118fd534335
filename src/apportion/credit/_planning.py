"""More credit where the response plans (HICRA)."""

from dataclasses import replace
from typing import Literal

import torch

from apportion.credit._base import Estimator, alias, transform
from apportion.credit._combine import chain
from apportion.credit._group import group_relative
from apportion.types import Credit, Rollouts


@transform(requires=("signals.{where}",))
def emphasise(credit: Credit, rollouts: Rollouts, *, alpha: float = 0.2, where: str = "planning") -> Credit:
    """Reward marked tokens more and blame them less.

    `A' = A + alpha |A|` on marked tokens, which is `(1 + alpha) A` above 0 and `(1 - alpha) A` below; A elsewhere.

    Source: HICRA, arXiv 2509.03646, where the marked tokens are those of planning phrases.
    Reads: signals[where], 1 = marked, 0 = not, of any unit. Scope: row. Unit: token; what is added is the part `where`.
    Cost: none beyond the marks; matching phrases needs the token texts only.
    Laws: never less credit than before, and equal to it off the marks; what is added sums to alpha times the sum of |A|
        over the marked tokens, so zero-mean credit does not stay zero-mean. `alpha = 0` changes nothing.
    Degenerate: no credit, nothing added; an unmeasured mark counts as none, in notes.

    Args:
        credit: what to change. rollouts: the batch.
        alpha: share of |A| that is added, at least 0 and below 1: from 1 on, blame would vanish or turn into praise.
        where: signal with the marks.

    Raises:
        ValueError: an alpha outside 0 <= alpha < 1; marks other than 0, 1 or NaN; several marks each.

    Example:
        >>> import torch
        >>> from apportion.credit import chain, dr_grpo
        >>> from apportion.types import Signal
        >>> r = Rollouts.from_lists([[5, 6], [7, 8]], [0, 0], outcome=[1.0, 0.0],
        ...     signals={"planning": Signal(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "token")})
        >>> chain(dr_grpo(), emphasise(alpha=0.2))(r).advantages
        tensor([[ 0.6000,  0.5000],
                [-0.4000, -0.5000]])
    """
    if not 0 <= alpha < 1:
        raise ValueError(
            f"emphasise needs 0 <= alpha < 1; got {alpha:g}. From 1 on, blame on marked tokens would vanish or flip."
        )
    signal = rollouts.signals[where]
    if signal.values.dim() != (2 if signal.unit == "token" else 1):
        raise ValueError(f"emphasise needs signals[{where!r}] with one mark each; it has the axes {signal.axes}.")
    marks = rollouts.at_tokens(signal)
    marked, unknown = credit.mask & (marks == 1), credit.mask & marks.isnan()
    odd = credit.mask & ~marked & ~unknown & (marks != 0)
    if bool(odd.any()):
        raise ValueError(
            f"emphasise needs marks 0, 1 or NaN in signals[{where!r}]; got {float(marks[odd][0]):g}. "
            "Threshold them first."
        )
    counted = max(int(credit.mask.sum()), 1)
    notes = {
        **credit.notes,
        f"{where}_tokens": float(marked.sum()) / counted,
        f"unmeasured_{where}": float(unknown.sum()),
    }
    added = torch.where(marked, alpha * credit.advantages.abs(), 0.0)
    return replace(credit.replaced(credit.advantages + added, where), notes=notes)


@alias
def hicra(
    *, alpha: float = 0.2, scale: Literal["std"] | None = None, reward: str = "outcome", planning: str = "planning"
) -> Estimator:
    """HICRA: the reward above the group's mean, with more of it on planning tokens.

    Source: arXiv 2509.03646; `scale="std"` starts from GRPO instead.
    Cost: none beyond the marks; matching phrases needs the token texts only.

    Example:
        >>> hicra()
        chain(group_relative(reward='outcome', scale=None), emphasise(alpha=0.2, where='planning'))
    """
    return chain(group_relative(reward=reward, scale=scale), emphasise(alpha=alpha, where=planning))
