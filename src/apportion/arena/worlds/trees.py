"""Token trees: a few tokens decide, the others are filler, and everything is known exactly."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from apportion.arena._episodes import Cost, Episodes
from apportion.arena._measuring import COSTS, chunks, critic, from_walk, known, thought_label, verdicts
from apportion.arena._tables import Table
from apportion.functional import segment_any
from apportion.types import Signal

Where = Literal["early", "spread", "late"]


@dataclass(frozen=True)
class Trees:
    """Random tabular policies that write `length` tokens, `decisions` of which matter.

    At a decisive token some choices are right; the outcome is 1 if all were, and after w wrong ones with the chance
    `forgiving**w`, drawn once for every leaf. At the other tokens any choice is as good as any other, so their advantage
    is exactly 0. Every prompt has a tree and a policy of its own.

    Args:
        prompts: how many trees.
        choices: size of the vocabulary.
        length: tokens of a rollout.
        decisions: how many of them matter.
        where: the decisive tokens stand at the beginning, spread evenly, or at the end.
        step: tokens of a step.
        skill: added to the logit of right choices: what the policy already knows.
        forgiving: how likely a wrong choice is repaired.
        verifier_error: chance that the verifier says the opposite of the truth.
        verdict_error: chance that a verdict about a step is the opposite of the truth.
        critic_error: deviation of the critic's V from the exact one.
    """

    prompts: int = 8
    choices: int = 4
    length: int = 12
    decisions: int = 3
    where: Where = "spread"
    step: int = 2
    skill: float = 1.0
    forgiving: float = 0.1
    verifier_error: float = 0.0
    verdict_error: float = 0.1
    critic_error: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.decisions <= self.length:
            raise ValueError(f"decisions must lie between 1 and length {self.length}; got {self.decisions}.")

    @property
    def places(self) -> list[int]:
        """Where the decisive tokens stand."""
        d, n = self.decisions, self.length
        return {
            "early": list(range(d)),
            "spread": [(2 * i + 1) * n // (2 * d) for i in range(d)],
            "late": list(range(n - d, n)),
        }[self.where]

    @cached_property
    def _tree(self) -> tuple[Table, Tensor]:
        """The table, and which choices are wrong, [K, S, A]."""
        k, a, generator = self.prompts, self.choices, torch.Generator().manual_seed(17)
        offset, size, level_at = [], 0, []  # states of a position are consecutive, one per node of its level
        for t in range(self.length):
            level_at.append(sum(p < t for p in self.places))
            offset.append(size)
            size += a ** level_at[-1]
        logits = torch.randn(k, size, a, generator=generator, dtype=torch.float64)
        wrong = torch.zeros(k, size, a, dtype=torch.bool)
        follows = torch.full((k, size, a), -1)
        reward = torch.zeros(k, size, a, dtype=torch.float64)
        mistakes = torch.zeros(k, 1, dtype=torch.int64)  # of each node of the level, root first
        for t in range(self.length):
            nodes, decides = a ** level_at[t], t in self.places
            here = slice(offset[t], offset[t] + nodes)
            made = mistakes[:, :, None].expand(k, nodes, a)
            if decides:
                rank = torch.rand(k, nodes, a, generator=generator).argsort(-1)
                right = 1 + torch.randint(a - 1, (k, nodes, 1), generator=generator)
                wrong[:, here] = rank >= right
                logits[:, here] += torch.where(wrong[:, here], 0.0, self.skill)
                made = made + wrong[:, here]
            child = torch.arange(nodes * a).view(nodes, a) if decides else torch.arange(nodes)[:, None].expand(-1, a)
            if t + 1 < self.length:
                follows[:, here] = offset[t + 1] + child
            else:
                lucky = torch.rand(made.shape if decides else made.shape[:2], generator=generator)
                lucky = lucky if decides else lucky[..., None]
                reward[:, here] = (lucky < self.forgiving ** made.double()).double()
            mistakes = made.flatten(1) if decides else mistakes
        return Table(logits, follows, reward, torch.zeros(k, dtype=torch.int64), self.length), wrong

    @property
    def table(self) -> Table:
        """What the trees are."""
        return self._tree[0]

    def episodes(self, groups: int, size: int, seed: int) -> Episodes:
        """As `World.episodes`."""
        return self.played(self.table, groups, size, seed)

    def played(self, table: Table, groups: int, size: int, seed: int) -> Episodes:
        """Episodes of another policy in these trees: `replace(world.table, logits=...)`."""
        wrong, generator = self._tree[1], torch.Generator().manual_seed(seed)
        prompts = torch.arange(groups) % self.prompts
        group_ids = torch.arange(groups).repeat_interleave(size)
        walk = table.walk(prompts[group_ids], generator)
        flipped = torch.rand(len(group_ids), generator=generator) < self.verifier_error
        steps = chunks(walk.lengths, self.step)
        r = from_walk(walk, group_ids, table).with_spans(step=steps)
        slips = wrong[walk.prompts[:, None], walk.states, walk.actions]
        first = slips & (slips.cumsum(1) == 1)
        step_ids = r.span_ids("step")
        decisive = torch.zeros_like(walk.used)
        decisive[:, self.places] = True
        outcome = torch.where(flipped, 1 - walk.outcome, walk.outcome)
        slipped, began, used = (
            segment_any(where.flatten(), step_ids.flatten(), len(steps)) for where in (slips, first, decisive)
        )
        r = r.replace(values=table.at(critic(table.values, self.critic_error, seed=1), walk)).with_signals(
            outcome=Signal(outcome, "trajectory"),
            greedy_outcome=Signal(table.walk(prompts).outcome, "group"),
            planning=Signal(decisive.double(), "token"),
            **verdicts(slipped, self.verdict_error, generator),
            **thought_label(slipped, used, outcome[steps.row] == 1, self.verdict_error, generator),
        )
        return Episodes(
            **known(table, walk, group_ids, prompts),
            rollouts=r,
            decisive=decisive,
            mistake=began[step_ids],
            costs={
                **COSTS,
                "signals.greedy_outcome": Cost(tokens=self.length / size),
            },
            seed=seed,
        )
