"""What a second model learns from other rollouts of a world: an implicit process reward, and decoded step rewards."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, singledispatch
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.arena._episodes import Cost, Episodes, World
from apportion.arena._tables import Table
from apportion.arena.worlds.budgets import Budgets
from apportion.arena.worlds.hackable import KINDS, Hackable
from apportion.arena.worlds.rooms import ACTIONS, Rooms
from apportion.arena.worlds.trees import Trees
from apportion.losses import implicit_prm_loss
from apportion.signals import LinearDecoder
from apportion.types import Signal

_CHUNK = 256  # groups sampled at a time


@runtime_checkable
class Tabular(World, Hashable, Protocol):
    """A world whose policy is a table, and whose `pairs` are numbered as `Table.pairs` does, at whatever positions."""

    @property
    def table(self) -> Table:
        """What the world is."""


@dataclass(frozen=True)
class Lesson:
    """The rollouts that the second model learns from: of the same world and policy, with nothing known but the outcome.

    They are not counted among the costs: in a training run they are the rollouts of earlier steps, which are there anyway.

    Args:
        groups: how many; each is seen once. At least as many as the world has prompts.
        size: rollouts of each.
        seed: of these rollouts, and counting on from it.
        batch: groups per update of the implicit reward model.
        rate: of Adam, for the implicit reward model.
        beta: nats to reward, in its loss.
    """

    groups: int = 1024
    size: int = 8
    seed: int = 1_000_000
    batch: int = 16
    rate: float = 0.01
    beta: float = 0.05

    def episodes(self, world: Tabular) -> Iterator[Episodes]:
        """In chunks; the chunks depend on nothing but the seed, so a longer lesson begins as a shorter one."""
        if self.groups < (prompts := len(world.table.start)):
            raise ValueError(f"a lesson of {self.groups} groups does not see all {prompts} prompts. Raise groups.")
        for i, done in enumerate(range(0, self.groups, _CHUNK)):
            yield world.episodes(min(_CHUNK, self.groups - done), self.size, self.seed + i)


def with_learned(world: World, episodes: Episodes, lesson: Lesson | None = None) -> Episodes:
    """The episodes with what can be learned in their world: `log_ratio`, and `decoded` where `factors` knows the world.

    The same world and lesson give the same signals. A world whose policy is not a table gets its episodes back.

    Args:
        world: whose own policy sampled the episodes.
        lesson: default: `Lesson()`.

    Example:
        >>> from apportion.arena import Yardstick
        >>> from apportion.credit import grpo, r_to_q
        >>> world = Trees(prompts=2, length=4)
        >>> episodes = with_learned(world, world.episodes(groups=16, size=8, seed=0))
        >>> found = Yardstick(episodes, resamples=100).difference(r_to_q()(episodes.rollouts), grpo()(episodes.rollouts))
        >>> found["rank"].low > 0
        True
    """
    lesson = lesson or Lesson()
    if not isinstance(world, Tabular):
        return episodes
    if lesson.seed <= episodes.seed <= lesson.seed + lesson.groups // _CHUNK:
        raise ValueError(
            f"the episodes have the seed {episodes.seed}, as part of the lesson has; they would be scored by a model that "
            "has seen their outcomes. Choose another seed."
        )
    found, costs = {"log_ratio": log_ratio(world, episodes, lesson)}, {"signals.log_ratio": Cost(passes=1)}
    if type(world) in factors.registry:
        found["decoded"] = decoded(world, episodes, lesson)
    return replace(episodes, rollouts=episodes.rollouts.with_signals(**found), costs={**episodes.costs, **costs})


# ---- the implicit process reward --------------------------------------------------------------------------------------


def log_ratio(world: Tabular, episodes: Episodes, lesson: Lesson) -> Signal:
    """ln pi_phi - ln pi of every action."""
    ratio = implicit_rewards(world, lesson)[choices(world.table, episodes)]
    return Signal(torch.where(episodes.rollouts.action_mask, ratio, 0.0), "token")


@lru_cache(maxsize=16)
def implicit_rewards(world: Tabular, lesson: Lesson) -> Float[Tensor, "K S A"]:
    """ln pi_phi - ln pi of every choice; phi begins as the policy, and learns to tell the better rollout of a group.

    One update of Adam on `implicit_prm_loss` for each batch of groups. The policy stands still, and so does the reference.
    """
    start = world.table.logits.log_softmax(-1)
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lesson.rate)
    for episodes in lesson.episodes(world):
        r, at = episodes.rollouts, choices(world.table, episodes)
        for rows in torch.arange(r.batch).split(lesson.batch * lesson.size):
            here = tuple(x[rows] for x in at)
            _, groups = torch.unique(r.group_ids[rows], return_inverse=True)
            logprobs, outcomes = logits.log_softmax(-1)[here], r.signals["outcome"].values[rows]
            loss, _ = implicit_prm_loss(
                logprobs, start[here], r.action_mask[rows], torch.arange(len(rows)), groups, outcomes, beta=lesson.beta
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return logits.detach().log_softmax(-1) - start


def choices(table: Table, episodes: Episodes) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Prompt, state and action at each position, read off `Episodes.pairs`; three zeros where there is no action."""
    _, states, actions = table.logits.shape
    pair = episodes.pairs.clamp(min=0)
    return pair // (actions * states * table.horizon), pair // actions % states, pair % actions


# ---- decoded step rewards ---------------------------------------------------------------------------------------------

Reader = Callable[[Tabular, Episodes], Float[Tensor, "S D"]]
"""Factors of each step."""


@singledispatch
def factors(world: Tabular, episodes: Episodes) -> Float[Tensor, "S D"]:
    """What a program can read off each step that knows the rules of the world, but not which step is a good one."""
    raise TypeError(f"no factors are known of {type(world).__name__}. Register a function with `factors.register`.")


@factors.register(Trees)
@factors.register(Budgets)
def _tokens_at_places(world: Trees | Budgets, episodes: Episodes) -> Float[Tensor, "S D"]:
    """Which token stands at which place: factor `place * choices + token`."""
    r = episodes.rollouts
    assert r.tokens is not None
    which = torch.arange(r.width) * world.choices + r.tokens
    phi = torch.zeros(len(r.spans["step"]), r.width * world.choices)
    phi[r.span_ids("step")[r.action_mask], which[r.action_mask]] = 1.0
    return phi


HACKABLE_FACTORS = ("new", *KINDS[2:])


@factors.register
def _of_hackable(world: Hackable, episodes: Episodes) -> Float[Tensor, "S D"]:
    """`HACKABLE_FACTORS`: what kind of step it is, as its form shows. Right and wrong look the same, "new"."""
    kind = episodes.rollouts.signals["kind"].values
    return torch.cat([kind[:, :2].sum(1, keepdim=True), kind[:, 2:]], 1).float()


ROOM_FACTORS = ("turn", "in vain", "key taken", "door opened", "been there before", *ACTIONS[:4])


@factors.register
def _of_rooms(world: Rooms, episodes: Episodes) -> Float[Tensor, "S D"]:
    """`ROOM_FACTORS`: what an action changed, and where it went. How far the goal is takes a map and is not among them."""
    r, spans = episodes.rollouts, episodes.rollouts.spans["step"]
    prompt, state, action = (x[spans.row, spans.stop - 1] for x in choices(world.table, episodes))
    follows = world.table.follows[prompt, state, action]
    moves, vain = action < 4, follows == state
    count = world.table.logits.shape[1]
    first = torch.full((r.batch * count,), r.width).scatter_reduce(0, spans.row * count + state, spans.index, "amin")
    before = first[spans.row * count + follows.clamp(min=0)] <= spans.index
    found = [
        torch.ones_like(vain),
        vain,
        ~vain & (action == ACTIONS.index("take")),
        ~vain & (action == ACTIONS.index("open")),
        moves & ~vain & (follows >= 0) & before,
        *(action == move for move in range(4)),
    ]
    return torch.stack(found, 1).float()


def decoded(world: Tabular, episodes: Episodes, lesson: Lesson, read: Reader = factors) -> Signal:
    """The reward of each step, by the decoder of its prompt."""
    phi, weights = read(world, episodes), factor_weights(world, lesson, read)
    prompt = episodes.prompts[episodes.rollouts.group_ids[episodes.rollouts.spans["step"].row]]
    rewards = torch.zeros(len(phi), dtype=weights.dtype)
    for k in range(len(weights)):
        rewards[prompt == k] = phi[prompt == k].double() @ weights[k]
    return Signal(rewards, "step")


@lru_cache(maxsize=16)
def factor_weights(world: Tabular, lesson: Lesson, read: Reader = factors) -> Float[Tensor, "K D"]:
    """What each factor is worth: a `LinearDecoder` for each prompt, taught by the outcomes of whole rollouts."""
    decoders = [LinearDecoder() for _ in world.table.start]
    for episodes in lesson.episodes(world):
        phi = Signal(read(world, episodes), "step", ("factors",))
        r, prompt = episodes.rollouts.with_signals(factors=phi), episodes.prompts[episodes.rollouts.group_ids]
        for k, decoder in enumerate(decoders):
            decoder.update(r.select((prompt == k).nonzero()[:, 0], covers="group"))
    return torch.stack([d.weights for d in decoders if d.weights is not None])
