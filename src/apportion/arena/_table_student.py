"""The student of worlds that are tables: every logit is a parameter, and how well it does is known exactly."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.arena._tables import Table
from apportion.types import Rollouts, Signal


class TableWorld(Protocol):
    """A world whose policy is a table, and whose `pairs` are numbered as `Table.pairs` does."""

    @property
    def table(self) -> Table:
        """What the world is, with the policy that learning begins from."""

    def played(self, table: Table, groups: int, size: int, seed: int) -> Episodes:
        """Episodes of another policy in this world."""


class TableStudent:
    """A `Student` in a world of tables. It begins as the world's own policy, which stays the reference.

    There is nothing to hold out: every prompt is a table of its own, and is trained on. Nothing is sampled to evaluate.

    Example:
        >>> from apportion.arena import Trees
        >>> student = TableStudent(Trees())
        >>> {k: round(v, 3) for k, v in student.evaluate(seed=0).items()}
        {'accuracy': 0.326, 'pass@8': 0.89, 'entropy': 1.091, 'length': 12.0}
    """

    def __init__(self, world: TableWorld):
        self.world = world
        self.logits = torch.nn.Parameter(world.table.logits.clone())

    @property
    def table(self) -> Table:
        """The world under the policy as it is now."""
        return replace(self.world.table, logits=self.logits.detach().clone())

    def parameters(self) -> list[torch.nn.Parameter]:
        """The logits; -inf stays -inf, since its gradient is 0."""
        return [self.logits]

    def sample(self, groups: int, size: int, seed: int) -> Rollouts:
        """As `Student.sample`; the signal `pair` says which choice each position was."""
        prompts = len(self.world.table.start)
        if groups < prompts:
            raise ValueError(
                f"this world has {prompts} prompts, which take turns; got {groups} groups. Give one per prompt."
            )
        episodes = self.world.played(self.table, groups, size, seed)
        return episodes.rollouts.replace(
            ref_logprobs=self._chosen(self.world.table.logits, episodes.pairs)
        ).with_signals(pair=Signal(episodes.pairs.double(), "token"))

    def logprobs(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """As `Student.logprobs`."""
        return self._chosen(self.logits, rollouts.signals["pair"].values.long())

    def _chosen(self, logits: Float[Tensor, "K S A"], pairs: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """log pi of the choices; 0 where there was none. A pair is ((prompt H + h) S + state) A + action."""
        _, states, choices = logits.shape
        at, action = pairs.clamp(min=0) // choices, pairs.clamp(min=0) % choices
        prompt, state = at // (states * self.world.table.horizon), at % states
        return torch.where(pairs >= 0, logits.log_softmax(-1)[prompt, state, action], 0.0)

    def evaluate(self, seed: int) -> Mapping[str, float]:
        """As `Student.evaluate`, exactly: p = V(start) of each prompt, and pass@8 = mean of 1 - (1 - p)^8."""
        table = self.table
        right = table.values[torch.arange(len(table.start)), 0, table.start].clamp(0, 1)
        entropy = torch.special.entr(table.policy).sum(-1)
        return {
            "accuracy": float(right.mean()),
            "pass@8": float((1 - (1 - right) ** 8).mean()),
            "entropy": float((table.visits * entropy[:, None]).sum() / table.visits.sum()),
            "length": float(table.visits.sum() / len(right)),
        }
