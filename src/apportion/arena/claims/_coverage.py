"""Many problems and one policy that cannot tell them apart: what it finds in many tries is what it spreads over."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from apportion.arena._episodes import Episodes
from apportion.arena._learning import learn
from apportion.arena._table_student import TableStudent
from apportion.arena._tables import Table
from apportion.arena.worlds.trees import Trees
from apportion.credit import Estimator
from apportion.types import Rollouts

WORLDS = {
    "hard problems": Trees(prompts=16, length=6, decisions=3, choices=4, forgiving=0.0),
    "easy problems": Trees(prompts=16, length=6, decisions=1, choices=16, forgiving=0.0),
}
"""About one try in eight is right at first, and about one in two. Half of the hard tokens and a sixth of the easy decide."""

TRIES = 64
HELD_OUT = 128  # problems
_MARKS = 10

Course = list[Mapping[str, float]]
"""What `OnePolicy.evaluate` found, mark by mark."""


class OnePolicy(TableStudent):
    """A student that sees what it wrote but not the problem: one table of logits for all prompts of `Trees`.

    With a table for each prompt nothing could be lost: what raises the success rate p of a prompt raises its pass@k too,
    `1 - (1 - p)^k`. Here what suits most problems drives out what suits the others. It begins with logits drawn from a
    normal distribution by `seed`. Held-out problems are further trees.
    """

    def __init__(self, world: Trees, seed: int):
        start = torch.randn(
            1, *world.table.logits.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        super().__init__(_Started(world, start))
        self.logits = torch.nn.Parameter(start.clone())
        self.held_out = replace(world, prompts=HELD_OUT).table
        self.places = world.places
        self.course: Course = []

    @property
    def table(self) -> Table:
        """The training problems under the policy as it is now."""
        return _under(self.world.table, self.logits.detach().clone())

    def logprobs(self, rollouts: Rollouts) -> Tensor:
        """As `Student.logprobs`."""
        return self._chosen(self.logits.expand_as(self.world.table.logits), rollouts.signals["pair"].values.long())

    def evaluate(self, seed: int) -> Mapping[str, float]:
        """As `Student.evaluate`, exactly, and pass@64 on both kinds of problems and the entropy of decisive tokens."""
        table = self.table
        spread = (table.visits * torch.special.entr(table.policy).sum(-1)[:, None]).sum(-1)[0]  # of each position
        found = {
            **super().evaluate(seed),
            f"pass@{TRIES}": pass_at(table, TRIES),
            f"held-out pass@{TRIES}": pass_at(_under(self.held_out, self.logits.detach()), TRIES),
            "entropy": float(spread.mean()),
            "planning entropy": float(spread[self.places].mean()),
        }
        self.course.append(found)
        return found


@dataclass(frozen=True)
class _Started:
    """A world whose policy is another from the start."""

    world: Trees
    logits: Tensor

    @property
    def table(self) -> Table:
        return _under(self.world.table, self.logits)

    def played(self, table: Table, groups: int, size: int, seed: int) -> Episodes:
        return self.world.played(table, groups, size, seed)


def _under(table: Table, logits: Tensor) -> Table:
    return replace(table, logits=logits.expand_as(table.logits))


def pass_at(table: Table, tries: int) -> float:
    """The chance that one of so many tries is right, mean over the prompts; the outcome is 0 or 1.

    >>> pass_at(WORLDS["easy problems"].table, 1) < pass_at(WORLDS["easy problems"].table, 8)
    True
    """
    right = table.values[torch.arange(len(table.start)), 0, table.start].clamp(0, 1)
    return float((1 - (1 - right) ** tries).mean())


@cache
def course(world: Trees, method: Estimator, seed: int, steps: int) -> Course:
    """One `OnePolicy` trained with the method: a group of 8 for every problem in each step, rate 0.03."""
    student = OnePolicy(world, seed)
    tokens = steps * world.prompts * 8 * world.length
    learn(
        student,
        method,
        tokens=tokens,
        evaluate_every=tokens // _MARKS,
        groups=world.prompts,
        size=8,
        seed=seed,
        rate=0.03,
    )
    return student.course


def level_of_both(a: Course, b: Course) -> float:
    """The largest accuracy that both reached."""
    return min(max(mark["accuracy"] for mark in x) for x in (a, b))


def when(course: Course, accuracy: float, name: str) -> float:
    """What `name` was when the accuracy first came to this level, on straight lines between marks.

    >>> when([{"accuracy": 0.0, "x": 1.0}, {"accuracy": 0.5, "x": 3.0}], 0.25, "x")
    2.0
    """
    if course[0]["accuracy"] >= accuracy:
        return course[0][name]
    for before, after in pairwise(course):
        if after["accuracy"] >= accuracy:
            share = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before[name] + share * (after[name] - before[name])
    raise ValueError(f"the accuracy never came to {accuracy:.3g}; at most to {max(m['accuracy'] for m in course):.3g}.")
