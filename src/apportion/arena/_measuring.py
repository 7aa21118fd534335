"""What a world measures about its rollouts besides the outcome: verdicts, a critic, statistics of the policy."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.arena._episodes import Cost
from apportion.arena._tables import Table, Walk
from apportion.signals import TOKEN_STATISTICS, token_statistics
from apportion.types import Rollouts, Signal, Spans

CRITIQUES = 3


def from_walk(walk: Walk, groups: Tensor, table: Table) -> Rollouts:
    """A walk as rollouts: a choice is a token, a row is its choices and nothing else."""
    logits = table.logits[walk.prompts[:, None], walk.states]
    return Rollouts(
        tokens=walk.actions,
        lengths=walk.lengths,
        action_mask=walk.used,
        group_ids=groups,
        trajectory_ids=torch.arange(len(groups)),
        row_index=torch.zeros_like(groups),
        truncated=~walk.ended,
        logprobs=chosen_logprobs(logits, walk),
        ref_logprobs=chosen_logprobs(logits, walk),
        signals={"outcome": Signal(walk.outcome, "trajectory"), **statistics(logits, walk)},
    )


def known(table: Table, walk: Walk, groups: Tensor, prompts: Tensor) -> dict[str, Any]:
    """What is true of a walk whose choices are its positions: the fields of `Episodes` that the table tells."""
    return {
        "advantages": table.at(table.advantages, walk),
        "pairs": table.pairs(walk),
        "prompts": prompts,
        "gradients": lambda weights: table.scores(walk, weights, groups),
        "gradient": table.gradient[prompts],
    }


def chosen_logprobs(logits: Float[Tensor, "B H A"], walk: Walk) -> Float[Tensor, "B H"]:
    """log pi of what was chosen; 0 behind the end."""
    return torch.where(walk.used, logits.log_softmax(-1).gather(-1, walk.actions[..., None])[..., 0], 0.0)


def statistics(logits: Float[Tensor, "B H A"], walk: Walk) -> dict[str, Signal]:
    """Entropy, self-certainty, chosen logit and sum of squares of the distribution each choice was drawn from."""
    found = token_statistics(logits.flatten(0, 1), walk.actions.flatten(), names=TOKEN_STATISTICS)
    return {k: Signal(torch.where(walk.used, v.view_as(walk.actions), 0.0), "token") for k, v in found.items()}


def verdicts(wrong: Bool[Tensor, " S"], error: float, generator: torch.Generator) -> dict[str, Signal]:
    """What judges say of steps, each verdict turned into its opposite with the chance `error`, independently.

    `judge` [S, 3]: 1 = this critique calls the step wrong; `process` [S]: the score of a process reward model, 1 for a step
    it takes for right, else 0; `margin` [S]: that score from -1 to 1, as PURE reads it.
    """
    flips = torch.rand(len(wrong), CRITIQUES + 1, generator=generator) < error
    found = (wrong[:, None] ^ flips).double()
    judge = Signal(found[:, :CRITIQUES], "step", ("critiques",))
    score = 1 - found[:, -1]
    return {"judge": judge, "process": Signal(score, "step"), "margin": Signal(2 * score - 1, "step")}


def thought_label(
    wrong: Bool[Tensor, " S"],
    used: Bool[Tensor, " S"],
    right: Bool[Tensor, " S"],
    error: float,
    generator: torch.Generator,
) -> dict[str, Signal]:
    """`label` [S] as `tp_grpo` reads it, turned into its opposite with the chance `error`.

    In a rollout that is `right`, 1 = the step is not wrong; in another, 1 = what came of it rests on the step.
    """
    true = torch.where(right, ~wrong, used)
    return {"label": Signal((true ^ (torch.rand(len(true), generator=generator) < error)).double(), "step")}


def critic(values: Float[Tensor, "K H S"], error: float, seed: int) -> Float[Tensor, "K H S"]:
    """V as a critic sees it: off by a normal number with deviation `error` that belongs to the state, whoever visits."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=values.dtype)
    return values + error * noise


def chunks(lengths: Tensor, size: int) -> Spans:
    """Steps of `size` positions each; the last of a row may be shorter."""
    return Spans.from_lists([[(s, min(s + size, n)) for s in range(0, n, size)] for n in lengths.tolist()])


COSTS = {
    "values": Cost(passes=1),
    "ref_logprobs": Cost(passes=1),
    "signals.judge": Cost(judge_calls=CRITIQUES),  # one reply speaks about every step
    "signals.process": Cost(passes=1),
    "signals.margin": Cost(passes=1),
    "signals.label": Cost(judge_calls=1),
}
"""Of a critic, a reference, and the signals of `verdicts` and `thought_label`."""
