"""Values of everything that a group of rollouts went through, where a policy can only be sampled: exact sums over what is
known, continuations for the rest."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_NEGLIGIBLE = 1e-3

Continue = Callable[[Int[Tensor, " M"], Int[Tensor, " M"], Int[Tensor, " M"]], Float[Tensor, " M"]]
"""From nodes, tokens chosen there and how often, to the mean outcome of that many continuations of each."""


@dataclass(frozen=True)
class Trie:
    """Everything that rows began with, each beginning once: nodes, level by level, parents before children.

    Args:
        nodes: where each row stands after t tokens, t = 0..L; -1 behind its end, [B, L + 1].
        parent: -1 for a root, [S].
        token: the last one, -1 for a root, [S].
        row: one that comes through, [S].
        starts: the first node of each level, and how many nodes there are, [L + 2].
    """

    nodes: Int[Tensor, "B L1"]
    parent: Int[Tensor, " S"]
    token: Int[Tensor, " S"]
    row: Int[Tensor, " S"]
    starts: list[int]

    @classmethod
    def of(cls, prompts: Int[Tensor, " B"], tokens: Int[Tensor, "B L"], lengths: Int[Tensor, " B"]) -> "Trie":
        """Of rows that answer these prompts.

        >>> trie = Trie.of(torch.tensor([0, 0]), torch.tensor([[5, 6], [5, 7]]), torch.tensor([2, 2]))
        >>> trie.nodes, trie.parent
        (tensor([[0, 1, 2],
                [0, 1, 3]]), tensor([-1,  0,  1,  1]))
        """
        rows, width = tokens.shape
        nodes = torch.full((rows, width + 1), -1)
        parents, chosen, through, starts = [], [], [], [0]
        for t in range(width + 1):
            here = (lengths >= t).nonzero()[:, 0]
            before = nodes[here, t - 1] if t else torch.full_like(here, -1)
            last = tokens[here, t - 1] if t else torch.full_like(here, -1)
            keys = torch.stack([before, last if t else prompts], 1)
            distinct, which = torch.unique(keys, dim=0, return_inverse=True)
            first = torch.full((len(distinct),), rows).scatter_reduce_(0, which, here, "amin")
            nodes[here, t] = starts[-1] + which
            parents.append(distinct[:, 0])
            chosen.append(distinct[:, 1] if t else torch.full((len(distinct),), -1))
            through.append(first)
            starts.append(starts[-1] + len(distinct))
        return cls(nodes, torch.cat(parents), torch.cat(chosen), torch.cat(through), starts)

    @property
    def depth(self) -> Int[Tensor, " S"]:
        """Tokens before each node."""
        sizes = torch.tensor(self.starts).diff()
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)


@dataclass(frozen=True)
class Values:
    """What is known of every node of a trie.

    Args:
        value: V, [S].
        variance: of the error of V, [S].
        weights: of each choice in V, they sum to 1: pi, estimated by counts where no row made the choice, [S, A].
        q: of each choice; 0 where the weight is, [S, A].
    """

    value: Float[Tensor, " S"]
    variance: Float[Tensor, " S"]
    weights: Float[Tensor, "S A"]
    q: Float[Tensor, "S A"]

    @property
    def pull(self) -> Float[Tensor, "S A"]:
        """pi(a | s) A(s, a), which sums to 0 in every node."""
        return self.weights * (self.q - self.value[:, None])

    def advantage(self, trie: Trie, nodes: Int[Tensor, "*D"]) -> tuple[Float[Tensor, "*D"], Float[Tensor, "*D"]]:
        """A of the choice that led to each of the nodes (no roots), and its standard error."""
        parent = trie.parent[nodes]
        w = self.weights[parent, trie.token[nodes]]
        others = (self.variance[parent] - w**2 * self.variance[nodes]).clamp(min=0)
        return self.value[nodes] - self.value[parent], ((1 - w) ** 2 * self.variance[nodes] + others).sqrt()


def node_values(
    trie: Trie,
    policy: Float[Tensor, "S A"],
    over: Bool[Tensor, " S"],
    outcome: Float[Tensor, " S"],
    proceed: Continue,
    continuations: int,
    generator: torch.Generator,
) -> Values:
    """V and Q of every node: `V(s) = sum over the choices that rows made of pi V(after) + (the rest of pi) V_rest`.

    V_rest is the mean outcome of continuations that begin with one of the other choices; there are `continuations` times
    the rest of pi of them, rounded up, spread evenly over these choices. Every V_rest is independent of the others, so
    variances add up. That of one is `sum_a n_a p_a (1 - p_a) / n^2`, where p_a, the success of choice a, is drawn to the
    success p of all: k_a of n_a count as (k_a + p) / (n_a + 1), and k of n as (k + 1) / (n + 2).
    Where the rest is below 1 in 1000 nothing is sampled and the choices that rows made stand for all: V is off by no more.

    Args:
        policy: pi at each node; anything where it is `over`.
        over: nothing can be chosen any more, and `outcome`, from 0 to 1, is what came of it.
    """
    size, choices = policy.shape
    inner = ~over
    child = torch.full((size, choices), -1)
    edges = (trie.parent >= 0).nonzero()[:, 0]
    child[trie.parent[edges], trie.token[edges]] = edges
    made = child >= 0
    weights = torch.where(inner[:, None], policy, 0.0)
    rest = torch.where(made, 0.0, weights)
    mass = rest.sum(1)
    counts = torch.where(mass > _NEGLIGIBLE, (mass * continuations).ceil(), 0.0).long()
    at = torch.repeat_interleave(torch.arange(size), counts)
    place = torch.arange(len(at)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    level = (place + torch.rand(size, generator=generator, dtype=torch.float64)[at]) / counts[at]
    cdf = rest.cumsum(1)
    drawn = torch.searchsorted(cdf[at], (level * (1 - 1e-9) * cdf[at, -1])[:, None], right=True)[:, 0]
    begun, copies = torch.unique(at * choices + drawn, return_counts=True)
    node, token = begun // choices, begun % choices
    q, seen = torch.zeros(2, size, choices, dtype=torch.float64).unbind()
    q[node, token] = proceed(node, token, copies).double()
    seen[node, token] = copies.double()
    sampled = (counts > 0)[:, None]
    weights = torch.where(made, weights, mass[:, None] * seen / counts.clamp(min=1)[:, None])
    weights = torch.where(inner[:, None], weights / weights.sum(1, keepdim=True), 0.0)
    overall = ((q * seen).sum(1) + 1) / (counts + 2)
    apart = (q * seen + overall[:, None]) / (seen + 1)
    spread = (seen * apart * (1 - apart)).sum(1) / counts.clamp(min=1)
    own = torch.where(sampled[:, 0], mass**2 * spread / counts.clamp(min=1), 0.0)
    value, variance = outcome.double().clone(), torch.zeros(size, dtype=torch.float64)
    for start, stop in reversed(list(zip(trie.starts[:-1], trie.starts[1:], strict=True))):
        here = slice(start, stop)
        after = child[here].clamp(min=0)
        q[here] = torch.where(made[here], value[after], q[here])
        value[here] = torch.where(over[here], value[here], (weights[here] * q[here]).sum(1))
        carried = torch.where(made[here], weights[here] ** 2 * variance[after], 0.0).sum(1)
        variance[here] = own[here] + carried
    return Values(value, variance, weights, q)
