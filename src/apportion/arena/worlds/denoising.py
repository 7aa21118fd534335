"""Branching denoising: a flow policy on a line whose paths may share their beginnings; values in closed form."""

from dataclasses import dataclass
from functools import cached_property
from math import log, pi

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.arena._episodes import Cost, Episodes
from apportion.arena._measuring import COSTS
from apportion.types import Rollouts, Signal, Spans

_HEIGHTS = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
_WIDTH = 0.4  # of a bump
_BINS = 3  # of `Episodes.pairs`, to a deviation of the step's noise


@dataclass(frozen=True)
class Denoising:
    """A sampler turns noise into data on a line, step by step: `x_(k+1) = a_k x_k + b_k + s_k z`, z standard normal.

    It is the stochastic sampler of the exact flow to data N(0, 1), with `noise` times the root of the step's length as
    s_k. An action is a number, x_(k+1); the parameters of the policy are a and b. A prompt fixes the noise x_0 that all
    its paths begin from, and the reward of x_K: two bumps, 2/3 and 1/3 high. So V_k(x), the expected reward, is closed
    form: a Gaussian against bumps that are Gaussian too. A(x_k, x_(k+1)) = V_(k+1)(x_(k+1)) - V_k(x_k).

    The paths of a group form a tree (spans "branch"): after each share of the steps in `forks` every path goes on `width`
    ways, until there are as many as the group has rollouts. A group larger than `width ** len(forks)` has several paths from
    the beginning on. A step that several rollouts share stands, as an action, in the first of them alone, and is context in
    the others. Without forks the paths are independent; `sampled` counts steps, to compare the two.

    Every step is decisive. Nothing is wrong on a line, so `Episodes.mistake` is the step of the rollout's own that lost
    the most value. `Episodes.pairs` puts numbers closer than a third of s_k together: inside such a choice the advantage
    varies by 2 to 3 % of its mean square, so the exact advantage itself shows that much noise.
    `Episodes.gradients` counts a shared step once for every rollout through it, with the credit where it stands as action.

    Args:
        prompts: how many.
        length: steps from noise to data, K.
        forks: where paths fork, as shares of the steps, each once; () = independent paths.
        width: how many ways a path goes on where it forks.
        noise: of the sampler.
        verifier_error: deviation of the verifier's reward from the true one.
        critic_error: deviation of the critic's V from the exact one.

    Example:
        >>> world = Denoising(length=4)
        >>> world.episodes(groups=1, size=4, seed=0).rollouts.action_mask.int()
        tensor([[1, 1, 1, 1],
                [0, 0, 1, 1],
                [0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
        >>> world.sampled(size=4), Denoising(length=4, forks=()).sampled(size=4)
        (11, 16)
    """

    prompts: int = 4
    length: int = 8
    forks: tuple[float, ...] = (0.25, 0.5)
    width: int = 2
    noise: float = 0.7
    verifier_error: float = 0.0
    critic_error: float = 0.1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(
                f"length must be at least 1; got {self.length}. Without a step there is nothing to credit."
            )
        if not all(0 <= share < 1 for share in self.forks):
            raise ValueError(
                f"forks must be shares of the steps, from 0 to below 1; got {self.forks}. Give () for independent paths."
            )
        if self.width < 2:
            raise ValueError(f"width must be at least 2; got {self.width}. For independent paths set forks=().")
        if self.noise <= 0:
            raise ValueError(f"noise must be above 0; got {self.noise}. Steps without noise have no probability.")

    # ---- the sampler and what it is worth -------------------------------------------------------------------------

    @cached_property
    def policy(self) -> Float[Tensor, "2 K"]:
        """a and b of every step.

        At noise level r a sample is (1 - r) data + r noise, and the flow's velocity E[noise - data | x] = c x. A step of
        length d = 1 / K goes to `x - d (c x + noise^2 / 2r (x + (1 - r) c x))`.
        """
        r = 1 - torch.arange(self.length, dtype=torch.float64) / self.length
        c = (2 * r - 1) / ((1 - r).square() + r.square())
        a = 1 - (c + self.noise**2 / (2 * r) * (1 + (1 - r) * c)) / self.length
        return torch.stack([a, torch.zeros_like(a)])

    @property
    def spread(self) -> float:
        """s, the deviation of every step."""
        return float(self.noise * self.length**-0.5)

    @cached_property
    def _prompts(self) -> tuple[Tensor, Tensor]:
        """Where the paths of a prompt begin, [prompts], and where its bumps are, [prompts, 2]."""
        drawn = torch.randn(self.prompts, 3, generator=torch.Generator().manual_seed(17), dtype=torch.float64)
        return drawn[:, 0], drawn[:, 1:]

    def value(self, policy: Float[Tensor, "2 K"]) -> Float[Tensor, " prompts"]:
        """The expected reward of each prompt under other a and b; its gradient is that of a policy that learns."""
        return self.values(policy, torch.arange(self.prompts), self._prompts[0][:, None])[:, 0]

    def values(
        self, policy: Float[Tensor, "2 K"], prompts: Int[Tensor, " B"], x: Float[Tensor, "B k"]
    ) -> Float[Tensor, "B k"]:
        """V_0(x_0), V_1(x_1), ... of paths or their beginnings.

        From x_k the end is normal, with mean A x_k + B and variance S: from the end backwards A <- a A, B <- A b + B and
        S <- A^2 s^2 + S.
        """
        scale, shift, variance = policy.new_ones(()), policy.new_zeros(()), policy.new_zeros(())
        ahead = [torch.stack([scale, shift, variance])]
        for a, b in policy.T.flip(0):
            shift, variance, scale = scale * b + shift, scale.square() * self.spread**2 + variance, scale * a
            ahead.append(torch.stack([scale, shift, variance]))
        scale, shift, variance = torch.stack(ahead[::-1], 1)[:, : x.shape[1]]
        away = (scale * x + shift)[..., None] - self._prompts[1][prompts, None]
        broad = (variance + _WIDTH**2)[:, None]
        bumps: Tensor = _HEIGHTS * _WIDTH / broad.sqrt() * (-away.square() / (2 * broad)).exp()
        return bumps.sum(-1)

    # ---- the tree -----------------------------------------------------------------------------------------------------

    @property
    def _forks(self) -> list[int]:
        return sorted({int(share * self.length) for share in self.forks})

    def _owners(self, size: int) -> Int[Tensor, "size K"]:
        """Which rollout of a group holds each step of each: the first of those that share it."""
        forked = (torch.tensor(self._forks) <= torch.arange(self.length)[:, None]).sum(1)
        roots = -(-size // self.width ** len(self._forks))
        paths = (roots * self.width**forked).clamp(max=size)
        path = torch.arange(size)[:, None] * paths // size
        first: Tensor = -(-path * size // paths)
        return first

    def sampled(self, size: int) -> int:
        """Steps that a group of this size takes; without forks `size * length`."""
        return int((self._owners(size) == torch.arange(size)[:, None]).sum())

    def _branches(self, owners: Int[Tensor, "B K"]) -> Spans:
        starts = torch.tensor(sorted({0, *self._forks}))
        stops = torch.cat([starts[1:], torch.tensor([self.length])])
        owners = owners[:, starts]
        mine = owners == torch.arange(len(owners))[:, None]
        ids = (mine.flatten().cumsum(0) - 1).view_as(mine)
        above = torch.full_like(ids, -1)
        above[:, 1:] = ids[owners[:, :-1], torch.arange(len(starts) - 1)]
        row, stage = mine.nonzero(as_tuple=True)
        index = (mine.cumsum(1) - 1)[mine]
        return Spans(row, starts[stage], stops[stage], index, parent=above[mine])

    # ---- episodes -------------------------------------------------------------------------------------------------------

    def episodes(self, groups: int, size: int, seed: int) -> Episodes:
        """As `World.episodes`."""
        return self.played(self.policy, groups, size, seed)

    def played(self, policy: Float[Tensor, "2 K"], groups: int, size: int, seed: int) -> Episodes:
        """Episodes of other a and b in this world."""
        policy = policy.detach()
        prompts = torch.arange(groups) % self.prompts
        generator = torch.Generator().manual_seed(seed)
        group_ids = torch.arange(groups).repeat_interleave(size)
        of, rows, steps = prompts[group_ids], torch.arange(groups * size), torch.arange(self.length)
        owners = (self._owners(size) + torch.arange(groups)[:, None, None] * size).flatten(0, 1)
        acted = owners == rows[:, None]
        z = torch.randn(len(rows), self.length, generator=generator, dtype=torch.float64)[owners, steps]
        x = self._path(policy, self._prompts[0][of], z)
        values = self.values(policy, of, x)
        advantages = torch.where(acted, values.diff(dim=1), 0.0)
        error = torch.randn(len(rows), generator=generator, dtype=torch.float64)
        greedy = self._path(policy, self._prompts[0], torch.zeros(self.prompts, self.length))
        logprobs = torch.where(acted, -z.square() / 2 - log(self.spread) - log(2 * pi) / 2, 0.0)
        r = Rollouts(
            actions=x[:, 1:, None],
            lengths=torch.full_like(rows, self.length),
            action_mask=acted,
            group_ids=group_ids,
            trajectory_ids=rows,
            row_index=torch.zeros_like(rows),
            truncated=torch.zeros_like(rows, dtype=torch.bool),
            logprobs=logprobs,
            ref_logprobs=logprobs,
            values=values[:, :-1] + self._critic_errors(of, x[:, :-1]),
            spans={"branch": self._branches(owners)},
            signals={
                "outcome": Signal(values[:, -1] + self.verifier_error * error, "trajectory"),
                "greedy_outcome": Signal(self.values(policy, torch.arange(self.prompts), greedy)[prompts, -1], "group"),
            },
        )
        worst = advantages.argmin(1, keepdim=True) == steps

        def gradients(weights: Float[Tensor, "B T"]) -> Float[Tensor, "G P"]:
            """The score of step k is z / s to b_k, and x_k times that to a_k."""
            to_b = weights.double()[owners, steps] * z / self.spread
            return torch.cat([to_b * x[:, :-1], to_b], 1).view(groups, size, -1).mean(1)

        return Episodes(
            rollouts=r,
            advantages=advantages,
            decisive=acted,
            mistake=worst & (advantages < 0),
            pairs=torch.where(acted, self._pairs(of, x), -1),
            prompts=prompts,
            gradients=gradients,
            gradient=torch.autograd.functional.jacobian(self.value, policy).flatten(1)[prompts],
            costs={
                **COSTS,
                "signals.greedy_outcome": Cost(tokens=self.length / size),
            },
            seed=seed,
        )

    def _path(
        self, policy: Float[Tensor, "2 K"], x: Float[Tensor, " B"], z: Float[Tensor, "B K"]
    ) -> Float[Tensor, "B K+1"]:
        path = [x]
        for (a, b), step in zip(policy.T, z.T, strict=True):
            path.append(a * path[-1] + b + self.spread * step)
        return torch.stack(path, 1)

    def _critic_errors(self, prompts: Int[Tensor, " B"], x: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
        """What a critic is off by belongs to the state: a wave along the line, another for each prompt and step."""
        generator = torch.Generator().manual_seed(1)
        shape = (2, self.prompts, self.length)
        fast, phase = torch.rand(shape, generator=generator, dtype=torch.float64)[:, prompts]
        return self.critic_error * 2**0.5 * torch.sin(2 * pi * (fast * x + phase))

    def _pairs(self, prompts: Int[Tensor, " B"], x: Float[Tensor, "B K+1"]) -> Int[Tensor, "B K"]:
        bins = (x * (_BINS / self.spread)).floor().long().clamp(-(2**15), 2**15 - 1) + 2**15
        state = (prompts[:, None] * self.length + torch.arange(self.length)) * 2**16 + bins[:, :-1]
        return state * 2**16 + bins[:, 1:]
