"""Credit weighed by the token rewards that a model gives itself under contrasting prompts (T-REG)."""

from dataclasses import replace

import torch
from torch import Tensor

from apportion.credit._base import token_values, transform
from apportion.functional import contrast_reward
from apportion.types import Credit, Rollouts


@transform(requires=("signals.{contrast}",))
def t_reg(credit: Credit, rollouts: Rollouts, *, alpha: float = 0.25, contrast: str = "contrast") -> Credit:
    """Reward more and blame less what the model itself finds better under a contrast of prompts.

    `A' = (1 + alpha h) A where A > 0, (1 - alpha h) A where A < 0`, with `h = sigmoid(contrast) - 1/2`.

    Source: T-REG, arXiv 2412.02685: the weights of the token gradients of its preference loss (`losses.t_reg_loss`).
        Departs: the paper trains on pairs; using the weights on advantages is ours.
    Reads: signals[contrast] [B, T], ln p of each token under a frozen reference after an "improve" prompt minus after a
        "worsen" prompt, both with the question and the response in them. Scope: row. Unit: token.
    Cost: two reference passes over prompts as long as the response itself.
    Laws: the sign of every advantage is kept; `alpha = 0` and a contrast of 0 change nothing; no weight leaves
        [1 - alpha/2, 1 + alpha/2].
    Degenerate: an advantage of 0 stays 0; an unmeasured contrast leaves the token as it was, counted in notes.

    The notes `contrast_up` and `contrast_down` are the means of h where A > 0 and where A < 0: the first should be the
    larger, else the reference does not react to the prompts.

    Args:
        credit: what to change. rollouts: the batch.
        alpha: strength, 0 to 2; beyond 2 a weight could change its sign. The paper searches 0.1, 0.25 and 0.5.
        contrast: token signal, in nats.

    Raises:
        ValueError: an alpha outside 0 <= alpha <= 2; a contrast that is not one number per token.

    Example:
        >>> from apportion.credit import chain, dr_grpo
        >>> from apportion.types import Signal
        >>> r = Rollouts.from_lists([[5, 6], [7, 8]], [0, 0], outcome=[1.0, 0.0],
        ...     signals={"contrast": Signal(torch.tensor([[1.0, 0.0], [1.0, -1.0]]), "token")})
        >>> chain(dr_grpo(), t_reg(alpha=1.0))(r).advantages
        tensor([[ 0.6155,  0.5000],
                [-0.3845, -0.6155]])
    """
    if not 0 <= alpha <= 2:
        raise ValueError(
            f"t_reg needs 0 <= alpha <= 2; got {alpha:g}. Beyond 2 a token's weight would change its sign."
        )
    given = token_values(rollouts, contrast, "t_reg")
    known = credit.mask & ~given.isnan()
    reward = torch.where(known, contrast_reward(given), 0.0)
    up, down = credit.advantages > 0, credit.advantages < 0
    factor = 1 + alpha * torch.where(down, -reward, reward).double()
    notes = {
        "contrast_up": _mean(reward, up & known),
        "contrast_down": _mean(reward, down & known),
        "unmeasured_contrasts": float(credit.mask.sum() - known.sum()),
    }
    return replace(credit.scaled(factor, rollouts), notes={**credit.notes, **notes})


def _mean(values: Tensor, where: Tensor) -> float:
    """Mean of some of the values; 0 if they are none."""
    total = torch.where(where, values, 0.0).sum(dtype=torch.float64)
    return float(total / where.sum().clamp(min=1))
