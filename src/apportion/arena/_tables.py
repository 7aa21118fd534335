"""Worlds small enough to write down: tables of what follows and what it pays, a softmax policy, and exact values."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Walk:
    """Rollouts in a table.

    Args:
        prompts: the table each row walks in, [B].
        states, actions: what was chosen where; only the first `lengths` of a row count, [B, H].
        lengths: choices made, [B].
        outcome: rewards of the row added up, [B].
        ended: the row came to an end; False = it was cut by the horizon, [B].
    """

    prompts: Int[Tensor, " B"]
    states: Int[Tensor, "B H"]
    actions: Int[Tensor, "B H"]
    lengths: Int[Tensor, " B"]
    outcome: Float[Tensor, " B"]
    ended: Tensor

    @property
    def used(self) -> Tensor:
        """True where the row made a choice, [B, H]."""
        return torch.arange(self.states.shape[1]) < self.lengths[:, None]


@dataclass(frozen=True)
class Table:
    """K prompts, each with S states and A actions: `follows` and `reward` say what a choice leads to and pays.

    A row begins in `start` and makes at most `horizon` choices from `softmax(logits[k, s])`. Everything is float64.

    Args:
        logits: -inf forbids a choice, [K, S, A].
        follows: the next state; -1 ends the row, [K, S, A].
        reward: paid for the choice, [K, S, A].
        start: [K].
        horizon: H, the largest number of choices.
    """

    logits: Float[Tensor, "K S A"]
    follows: Int[Tensor, "K S A"]
    reward: Float[Tensor, "K S A"]
    start: Int[Tensor, " K"]
    horizon: int

    @cached_property
    def policy(self) -> Float[Tensor, "K S A"]:
        """pi(a | s)."""
        return self.logits.softmax(-1)

    @cached_property
    def q(self) -> Float[Tensor, "K H S A"]:
        """Q_h(s, a): what is still paid when a is chosen in s with h choices made before.

        `Q_h(s, a) = reward(s, a) + V_{h+1}(follows(s, a))`, V = 0 behind the end and the horizon.
        """
        k = torch.arange(len(self.start))[:, None, None]
        later = torch.zeros_like(self.reward[..., 0])
        out = []
        for _ in range(self.horizon):
            carried = torch.where(self.follows >= 0, later[k, self.follows], 0.0)
            out.append(self.reward + carried)
            later = (self.policy * out[-1]).sum(-1)
        return torch.stack(out[::-1], 1)

    @cached_property
    def values(self) -> Float[Tensor, "K H S"]:
        """V_h(s) = sum over a of pi(a | s) Q_h(s, a)."""
        return (self.policy[:, None] * self.q).sum(-1)

    @cached_property
    def advantages(self) -> Float[Tensor, "K H S A"]:
        """A_h(s, a) = Q_h(s, a) - V_h(s); under the policy its mean is 0 in every state."""
        return self.q - self.values[..., None]

    @cached_property
    def visits(self) -> Float[Tensor, "K H S"]:
        """The chance that a row is in s with h choices made before."""
        k = torch.arange(len(self.start))
        here = torch.zeros_like(self.reward[..., 0])
        here[k, self.start] = 1.0
        out = []
        for _ in range(self.horizon):
            out.append(here)
            flow = torch.where(self.follows >= 0, here[..., None] * self.policy, 0.0)
            here = torch.zeros_like(here).scatter_add_(1, self.follows.clamp(min=0).flatten(1), flow.flatten(1))
        return torch.stack(out, 1)

    @cached_property
    def gradient(self) -> Float[Tensor, "K S*A"]:
        """Of the expected outcome, to the logits: sum over h of visits_h(s) pi(a | s) A_h(s, a)."""
        return torch.einsum("khs,khsa,ksa->ksa", self.visits, self.advantages, self.policy).flatten(1)

    def walk(self, prompts: Int[Tensor, " B"], generator: torch.Generator | None = None) -> Walk:
        """One row per entry of `prompts`; without a generator the most likely choice is made everywhere."""
        rows = len(prompts)
        at, done = self.start[prompts], torch.zeros(rows, dtype=torch.bool)
        lengths, outcome = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64)
        states, actions = torch.zeros(2, rows, self.horizon, dtype=torch.int64).unbind()
        for h in range(self.horizon):
            chance = self.policy[prompts, at]
            drawn = chance.argmax(-1) if generator is None else torch.multinomial(chance, 1, generator=generator)[:, 0]
            states[:, h], actions[:, h] = at, drawn
            outcome += torch.where(done, 0.0, self.reward[prompts, at, drawn])
            lengths += ~done
            follows = torch.where(done, -1, self.follows[prompts, at, drawn])
            done, at = follows < 0, torch.where(follows < 0, at, follows)
            if bool(done.all()):
                break
        return Walk(prompts, states, actions, lengths, outcome, done)

    def scores(self, walk: Walk, weights: Float[Tensor, "B H"], groups: Int[Tensor, " B"]) -> Float[Tensor, "G S*A"]:
        """The policy gradient of each group: mean over its rows of sum_h weights d log pi / d logits[prompt]."""
        _, size, choices = self.logits.shape
        weights = torch.where(walk.used, weights, 0.0).double()
        count = int(groups.max()) + 1
        place = (groups[:, None] * size + walk.states).flatten()
        mass = weights.new_zeros(count * size).index_add_(0, place, weights.flatten())
        pushed = weights.new_zeros(count * size * choices)
        pushed.index_add_(0, place * choices + walk.actions.flatten(), weights.flatten())
        prompt = walk.prompts.new_zeros(count).scatter_(0, groups, walk.prompts)
        pulled = mass.view(count, size, 1) * self.policy[prompt]
        rows = torch.bincount(groups, minlength=count)
        return (pushed.view(count, size, choices) - pulled).flatten(1) / rows[:, None]

    def at(self, table: Float[Tensor, "K H S *A"], walk: Walk) -> Float[Tensor, "B H"]:
        """The entry of `values` or `advantages` (or `q`) that each choice of the walk belongs to; 0 behind the end."""
        step = torch.arange(self.horizon)
        index = (walk.prompts[:, None], step, walk.states)
        found = table[(*index, walk.actions)] if table.dim() == 4 else table[index]
        return torch.where(walk.used, found, 0.0)

    def pairs(self, walk: Walk) -> Int[Tensor, "B H"]:
        """An id of (prompt, choices made before, state, action); -1 behind the end."""
        _, size, choices = self.logits.shape
        step = torch.arange(self.horizon)
        state = (walk.prompts[:, None] * self.horizon + step) * size + walk.states
        return torch.where(walk.used, state * choices + walk.actions, -1)
