"""Thinking under budgets: cut at several lengths and answered at each cut, and everything is known exactly."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.arena._episodes import Cost, Episodes
from apportion.arena._measuring import COSTS, chunks, critic, from_walk, known, verdicts
from apportion.arena._tables import Table, Walk
from apportion.functional import segment_any
from apportion.types import Rollouts, Signal, Spans

_ANSWER = 4  # tokens of a summary


@dataclass(frozen=True)
class Budgets:
    """A policy thinks for `length` tokens; after each of `budgets` equal stretches several short answers are asked for.

    What the policy has understood is a level. The first token of every step moves it: one choice up, one down, the others
    not; the rest of a step is filler, whose advantage is exactly 0. An answer asked for at a cut is right with a chance
    that rises in equal parts with the level, from `floor` to `ceiling`. Levels rise on average, and may fall: an answer
    may be found early and lost again. The outcome is the share of right answers, budgets weighed by `prior`.

    Answers are written by a frozen answerer, so their tokens are no part of a row: the spans "budget" hold the stretches of
    thinking and, as empty spans, the answers after each, with the signal "score". A step is wrong if it moves down.

    Args:
        prompts: how many problems, each with a policy of its own.
        choices: size of the vocabulary.
        length: tokens of thinking.
        budgets: how many cuts, the end included.
        summaries: answers asked for at each cut.
        step: tokens of a step.
        levels: how many there are above the one that thinking begins with.
        floor, ceiling: chance of a right answer at the lowest and at the highest level.
        skill: added to the logit of the choice that moves up: what the policy already knows.
        prior: weight of the budgets: equal, proportional to the budget, or all on the last.
        verifier_error: chance that the verifier says the opposite of the truth about an answer.
        verdict_error: chance that a verdict about a step is the opposite of the truth.
        critic_error: deviation of the critic's V from the exact one.
    """

    prompts: int = 8
    choices: int = 4
    length: int = 24
    budgets: int = 4
    summaries: int = 4
    step: int = 2
    levels: int = 6
    floor: float = 0.1
    ceiling: float = 0.9
    skill: float = 0.5
    prior: Literal["uniform", "linear", "base"] = "uniform"
    verifier_error: float = 0.0
    verdict_error: float = 0.1
    critic_error: float = 0.1

    def __post_init__(self) -> None:
        if self.budgets < 1 or self.length % self.budgets:
            raise ValueError(f"length must be a multiple of budgets; got {self.length} and {self.budgets}.")
        if min(self.choices, 2 * self.summaries, 2 * self.step, 2 * self.levels) < 2:
            raise ValueError("choices must be at least 2, and summaries, step and levels at least 1.")

    @property
    def weights(self) -> Float[Tensor, " M"]:
        """Weight of each budget; they add up to 1."""
        place = torch.arange(1, self.budgets + 1, dtype=torch.float64)
        shape = {"uniform": torch.ones_like(place), "linear": place, "base": (place == self.budgets).double()}[
            self.prior
        ]
        return shape / shape.sum()

    @cached_property
    def _moves(self) -> Int[Tensor, "K T L A"]:
        """What each choice does to the level before the ends of the scale stop it."""
        shape = (self.prompts, self.length, self.levels + 1, self.choices)
        rank = torch.rand(shape, generator=torch.Generator().manual_seed(29)).argsort(-1)
        moves = (rank == 0).long() - (rank == 1).long()
        return torch.where((torch.arange(self.length) % self.step == 0)[:, None, None], moves, 0)

    @cached_property
    def table(self) -> Table:
        """State `t * (levels + 1) + level`; a choice that ends a stretch pays the chance of a right answer, weighed."""
        width = self.levels + 1
        noise = torch.randn(self._moves.shape, generator=torch.Generator().manual_seed(31), dtype=torch.float64)
        level = (torch.arange(width)[:, None] + self._moves).clamp(0, self.levels)
        step = torch.arange(self.length)[:, None, None]
        size, ends = self.length // self.budgets, (step + 1) % (self.length // self.budgets) == 0
        return Table(
            logits=(noise + self.skill * (self._moves > 0)).flatten(1, 2),
            follows=torch.where(step + 1 < self.length, (step + 1) * width + level, -1).flatten(1, 2),
            reward=torch.where(ends, self.weights[step // size] * self._chance(level), 0.0).flatten(1, 2),
            start=torch.zeros(self.prompts, dtype=torch.int64),
            horizon=self.length,
        )

    def _chance(self, level: Tensor) -> Tensor:
        return self.floor + (self.ceiling - self.floor) * level.double() / self.levels

    def episodes(self, groups: int, size: int, seed: int) -> Episodes:
        """As `World.episodes`."""
        return self.played(self.table, groups, size, seed)

    def played(self, table: Table, groups: int, size: int, seed: int) -> Episodes:
        """Episodes of another policy in this world: `replace(world.table, logits=...)`."""
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.arange(groups) % self.prompts
        group_ids = torch.arange(groups).repeat_interleave(size)
        walk = table.walk(prompts[group_ids], generator)
        r = self._answered(from_walk(walk, group_ids, table), self._scores(walk, generator))
        moved = self._moves.flatten(1, 2)[walk.prompts[:, None], walk.states, walk.actions]
        slips, step_ids = moved < 0, r.span_ids("step")
        first = slips & (slips.cumsum(1) == 1)
        slipped, began = (
            segment_any(where.flatten(), step_ids.flatten(), len(r.spans["step"])) for where in (slips, first)
        )
        greedy = self._scores(table.walk(prompts), generator).mean(-1) @ self.weights
        r = r.replace(values=table.at(critic(table.values, self.critic_error, seed=1), walk)).with_signals(
            greedy_outcome=Signal(greedy, "group"), **verdicts(slipped, self.verdict_error, generator)
        )
        asked = float(self.budgets * self.summaries * _ANSWER)
        return Episodes(
            **known(table, walk, group_ids, prompts),
            rollouts=r,
            decisive=(torch.arange(self.length) % self.step == 0).expand(len(group_ids), -1),
            mistake=began[step_ids],
            costs={
                **COSTS,
                "signals.outcome": Cost(tokens=asked),
                "signals.score": Cost(tokens=asked),
                "signals.greedy_outcome": Cost(tokens=(self.length + asked) / size),
            },
            seed=seed,
        )

    def _scores(self, walk: Walk, generator: torch.Generator) -> Float[Tensor, "B M A"]:
        """1 for a right answer, 0 for a wrong one, as the verifier sees it."""
        cuts = torch.arange(1, self.budgets + 1) * (self.length // self.budgets) - 1
        states, actions = walk.states[:, cuts], walk.actions[:, cuts]
        moved = self._moves.flatten(1, 2)[walk.prompts[:, None], states, actions]
        level = (states % (self.levels + 1) + moved).clamp(0, self.levels)
        drawn = torch.rand(2, *level.shape, self.summaries, generator=generator, dtype=torch.float64)
        right = drawn[0] < self._chance(level)[..., None]
        return (right ^ (drawn[1] < self.verifier_error)).double()

    def _answered(self, r: Rollouts, scores: Float[Tensor, "B M A"]) -> Rollouts:
        """With the steps, the stretches of thinking, the answers behind them, and the outcome."""
        rows, cuts, answers = scores.shape
        row, cut, place = torch.meshgrid(*(torch.arange(n) for n in (rows, cuts, answers + 1)), indexing="ij")
        stop = (cut + 1) * (self.length // self.budgets)
        start = torch.where(place == 0, stop - self.length // self.budgets, stop)
        parent = torch.where(place == 0, -1, (row * cuts + cut) * (answers + 1))
        row, start, stop, cut, parent = (x.flatten() for x in (row, start, stop, cut, parent))
        spans = Spans(row=row, start=start, stop=stop, index=cut, parent=parent)
        thought = torch.full_like(scores[..., :1], torch.nan)
        return r.with_spans(step=chunks(r.lengths, self.step), budget=spans).with_signals(
            outcome=Signal(scores.mean(-1) @ self.weights, "trajectory"),
            score=Signal(torch.cat([thought, scores], -1).flatten(), "budget"),
        )
