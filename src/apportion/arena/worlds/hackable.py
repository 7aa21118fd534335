"""A process reward model that can be gamed: steps that do nothing, and one that does everything wrong, look fine to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import one_hot

from apportion.arena._episodes import Cost, Episodes
from apportion.arena._measuring import COSTS, chunks, critic, from_walk, known, thought_label, verdicts
from apportion.arena._tables import Table
from apportion.types import Rollouts, Signal, Spans

KINDS = ("right", "wrong", "empty", "repeated", "giant", "answer")
"""What a step can be, and the policy's choices."""
_RIGHT, _WRONG, _EMPTY, _REPEATED, _GIANT, _ANSWER = range(6)
_HONEST = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0, 0.0], dtype=torch.float64)  # an answer that is right has 1
_GAMED = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)


_SAME = 1e-9  # a difference of Q that is rounding


@dataclass(frozen=True)
class Hackable:
    """Short solutions, made of steps; the outcome is 1 for an answer after `work` right steps and no wrong one.

    A step may be right, wrong, empty, a right one repeated, or giant: the whole solution at once, with an error in it.
    When all the work is done a further right step only repeats, and a repeated one before the first is empty. The policy
    sees how many right steps there are and whether an error was made, not how many steps are left; a table of its own
    for every prompt. A step is its choice and `filler` tokens that change nothing; the answer is one token.

    The process reward model scores right steps 1 and wrong ones 0. Honest, it gives 0.5 to steps that do nothing, 0 to
    giant steps and to answers that are wrong, and 1 to right answers. Gamed, it takes all of these for right. `process` is
    `1 - gaming` of the one and `gaming` of the other, before errors; `margin` is the same from -1 to 1. The signals
    `judge` and `label` know the truth, but for `verdict_error`: wrong are wrong and giant steps and wrong answers, and
    the first of these is `Episodes.mistake`. `kind` [S, 6] is what each step was, for people.

    Args:
        prompts: how many.
        work: right steps that an answer needs.
        length: steps after which a rollout is cut.
        filler: tokens of a step behind its choice.
        skill: added to the logit of the right step, and of the answer when it is due: what the policy already knows.
        gaming: how far the process reward model is gamed, from 0 to 1.
        verifier_error: chance that the verifier says the opposite of the truth.
        verdict_error: chance that a verdict about a step is the opposite of the truth, and a score one minus itself.
        critic_error: deviation of the critic's V from the exact one.

    Example:
        >>> world = Hackable()
        >>> {kind: round(often, 1) for kind, often in world.habits(world.table).items()}  # doctest: +NORMALIZE_WHITESPACE
        {'right': 2.1, 'wrong': 0.5, 'empty': 0.5, 'repeated': 0.6, 'giant': 0.5, 'answer': 0.9, 'accuracy': 0.1}
    """

    prompts: int = 8
    work: int = 3
    length: int = 10
    filler: int = 1
    skill: float = 2.0
    gaming: float = 1.0
    verifier_error: float = 0.0
    verdict_error: float = 0.1
    critic_error: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.work < self.length:
            raise ValueError(
                f"work must lie between 1 and length - 1 = {self.length - 1}; got {self.work}. Leave a step for the answer."
            )
        if self.filler < 0:
            raise ValueError(f"filler must be at least 0; got {self.filler}. Give 0 for steps of one token.")
        if not 0 <= self.gaming <= 1:
            raise ValueError(
                f"gaming must lie between 0, honest, and 1, gamed; got {self.gaming}. It mixes two scores."
            )

    # ---- the rules: situations are (right steps so far, error made), numbered 2 right + error -----------------------

    @cached_property
    def _situations(self) -> tuple[Int[Tensor, " C"], Bool[Tensor, " C"]]:
        """Right steps so far, and whether an error was made."""
        number = torch.arange(2 * self.work + 2)
        return number // 2, number % 2 == 1

    @cached_property
    def _kinds(self) -> Int[Tensor, "C A"]:
        """What a choice is, in each situation."""
        done, _ = self._situations
        kinds = torch.arange(len(KINDS)).repeat(len(done), 1)
        kinds[done == self.work, _RIGHT] = _REPEATED
        kinds[done == 0, _REPEATED] = _EMPTY
        return kinds

    @cached_property
    def _solved(self) -> Bool[Tensor, "C A"]:
        """The answer that is right."""
        done, spoilt = self._situations
        return ((done == self.work) & ~spoilt)[:, None] & (self._kinds == _ANSWER)

    @cached_property
    def _wrong(self) -> Bool[Tensor, "C A"]:
        kinds = self._kinds
        return (kinds == _WRONG) | (kinds == _GIANT) | ((kinds == _ANSWER) & ~self._solved)

    @cached_property
    def table(self) -> Table:
        """The rules, and what the policy begins with. Behind the choice there are `filler` more rounds of situations."""
        done, spoilt = self._situations
        count, rounds, kinds = len(done), 1 + self.filler, self._kinds
        becomes = 2 * (done[:, None] + (kinds == _RIGHT)) + (spoilt[:, None] | self._wrong)
        follows = torch.arange(count)[:, None].expand(-1, len(KINDS)).repeat(rounds, 1, 1)
        follows[0] = torch.where(kinds == _ANSWER, -1, becomes)
        ahead = (torch.arange(rounds) + 1) % rounds * count
        follows = torch.where(follows >= 0, follows + ahead[:, None, None], -1)
        reward = torch.zeros(rounds, count, len(KINDS), dtype=torch.float64)
        reward[0] = self._solved.double()
        generator = torch.Generator().manual_seed(17)
        shape = (self.prompts, rounds, count, len(KINDS))
        logits = torch.randn(shape, generator=generator, dtype=torch.float64)
        logits[:, 0] += self.skill * torch.where((done < self.work)[:, None], kinds == _RIGHT, kinds == _ANSWER)
        return Table(
            logits.flatten(1, 2),
            follows.flatten(0, 1).expand(self.prompts, -1, -1),
            reward.flatten(0, 1).expand(self.prompts, -1, -1),
            torch.zeros(self.prompts, dtype=torch.int64),
            self.length * rounds,
        )

    def habits(self, table: Table) -> Mapping[str, float]:
        """Exactly: how many steps of each kind a rollout of this policy has on average, and how often it is right."""
        count = len(self._kinds)
        chosen = (table.visits.sum(1)[..., None] * table.policy)[:, :count].mean(0)
        often = one_hot(self._kinds).double().mul(chosen[..., None]).sum((0, 1)).tolist()
        first = torch.arange(self.prompts), 0, table.start
        return dict(zip(KINDS, often, strict=True)) | {"accuracy": float(table.values[first].mean())}

    def hacked(self, rollouts: Rollouts) -> float:
        """The share of steps that are empty or repeated."""
        return float(rollouts.signals["kind"].values[:, [_EMPTY, _REPEATED]].sum(1).mean())

    # ---- episodes -------------------------------------------------------------------------------------------------------

    def episodes(self, groups: int, size: int, seed: int) -> Episodes:
        """As `World.episodes`."""
        return self.played(self.table, groups, size, seed)

    def played(self, table: Table, groups: int, size: int, seed: int) -> Episodes:
        """Episodes of another policy in this world: `replace(world.table, logits=...)`."""
        prompts, generator = torch.arange(groups) % self.prompts, torch.Generator().manual_seed(seed)
        group_ids = torch.arange(groups).repeat_interleave(size)
        walk = table.walk(prompts[group_ids], generator)
        flipped = torch.rand(len(group_ids), generator=generator) < self.verifier_error
        steps = chunks(walk.lengths, 1 + self.filler)
        situation, choice = walk.states[steps.row, steps.start], walk.actions[steps.row, steps.start]
        steps = Spans(steps.row, steps.start, steps.stop, steps.index, state=situation)
        kind, wrong = self._kinds[situation, choice], self._wrong[situation, choice]
        honest = torch.where(self._solved[situation, choice], 1.0, _HONEST[kind])
        score = (1 - self.gaming) * honest + self.gaming * _GAMED[kind]
        score = torch.where(torch.rand(len(kind), generator=generator) < self.verdict_error, 1 - score, score)
        r = from_walk(walk, group_ids, table).with_spans(step=steps)
        greedy = table.walk(prompts)
        outcome = torch.where(flipped, 1 - walk.outcome, walk.outcome)
        used = (kind != _EMPTY) & (kind != _REPEATED)
        truth = {"kind": Signal(one_hot(kind, len(KINDS)).double(), "step", ("kinds",))}
        scores = {"process": Signal(score, "step"), "margin": Signal(2 * score - 1, "step")}
        r = r.replace(values=table.at(critic(table.values, self.critic_error, seed=1), walk)).with_signals(
            outcome=Signal(outcome, "trajectory"),
            greedy_outcome=Signal(greedy.outcome, "group"),
            **{**verdicts(wrong, self.verdict_error, generator), **scores, **truth},
            **thought_label(wrong, used, outcome[steps.row] == 1, self.verdict_error, generator),
        )
        number = torch.arange(len(steps))
        first = torch.full_like(group_ids, -1).scatter_reduce_(
            0, steps.row[wrong], number[wrong], "amin", include_self=False
        )
        return Episodes(
            **known(table, walk, group_ids, prompts),
            rollouts=r,
            decisive=table.at(table.q.amax(-1) - table.q.amin(-1), walk) > _SAME,
            mistake=(r.span_ids("step") == first[:, None]) & (first >= 0)[:, None],
            costs={
                **COSTS,
                "signals.greedy_outcome": Cost(tokens=float(greedy.lengths.double().mean()) / size),
            },
            seed=seed,
        )
