import math
import random

import pytest
import torch

from apportion.functional import tree_depth, tree_sum, tree_values

NAN = math.nan
PARENT = torch.tensor([-1, 0, 0, 1, 1, 2, 2])
REWARDS = torch.tensor([NAN, NAN, NAN, 1.0, 0.0, 0.5, 0.2], dtype=torch.float64)
EDGES = torch.tensor([0.0, -1.0, -0.5, -0.2, -1.2, -0.7, -0.7], dtype=torch.float64)


def forest(seed: int) -> list[int]:
    """Parents in any order: a node may come before its parent."""
    rng = random.Random(seed)
    parent = [rng.randint(-1, n - 1) for n in range(rng.randint(1, 12))]
    place = list(range(len(parent)))
    rng.shuffle(place)
    out = [0] * len(parent)
    for n, p in enumerate(parent):
        out[place[n]] = place[p] if p >= 0 else -1
    return out


def test_worked_tree():
    assert tree_depth(PARENT).tolist() == [0, 1, 1, 2, 2, 2, 2]
    want = torch.tensor([0.425, 0.5, 0.35, 1.0, 0.0, 0.5, 0.2], dtype=torch.float64)
    torch.testing.assert_close(tree_values(REWARDS, PARENT), want)
    want = torch.tensor([0.493865, 0.731059, 0.35, 1.0, 0.0, 0.5, 0.2], dtype=torch.float64)
    torch.testing.assert_close(tree_values(REWARDS, PARENT, EDGES), want, rtol=0, atol=5.1e-7)


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_a_walk_from_the_root(seed):
    parent = forest(seed)
    rng = random.Random(seed)
    values, carry = ([rng.uniform(-1, 1) for _ in parent] for _ in range(2))
    inner = set(parent)
    rewards = [NAN if n in inner or rng.random() < 0.2 else rng.random() for n in range(len(parent))]

    def children(n):
        return [c for c, p in enumerate(parent) if p == n]

    def total(n):
        return values[n] + sum(carry[c] * total(c) for c in children(n))

    def leaves(n):
        return [r for c in children(n) for r in leaves(c)] if children(n) else [r for r in [rewards[n]] if r == r]

    def expected(n):
        below = [c for c in children(n) if leaves(c)]
        weight = [math.exp(values[c]) for c in below]
        return sum(w * expected(c) for w, c in zip(weight, below, strict=True)) / sum(weight) if below else rewards[n]

    nodes = range(len(parent))
    x, c, p, r = (torch.tensor(v) for v in (values, carry, parent, rewards))
    want = torch.tensor([total(n) for n in nodes], dtype=torch.float64)
    torch.testing.assert_close(tree_sum(x, c, p), want, rtol=1e-6, atol=1e-6)
    want = torch.tensor([sum(leaves(n)) / len(leaves(n)) if leaves(n) else NAN for n in nodes], dtype=torch.float64)
    torch.testing.assert_close(tree_values(r, p), want, rtol=1e-6, atol=1e-6, equal_nan=True)
    want = torch.tensor([expected(n) for n in nodes], dtype=torch.float64)
    torch.testing.assert_close(tree_values(r, p, x), want, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_long_chains_no_nodes_and_circles():
    chain = torch.arange(1000) - 1
    assert tree_depth(chain).tolist() == list(range(1000))
    assert tree_sum(torch.ones(1000), torch.ones(1000), chain)[0] == 1000
    none = torch.zeros(0, dtype=torch.int64)
    assert len(tree_depth(none)) == len(tree_sum(none.double(), none.double(), none)) == 0
    assert len(tree_values(none.double(), none, none.double())) == 0
    for circle in ([0], [1, 0], [-1, 2, 3, 1]):
        with pytest.raises(
            ValueError, match=r"parents go round in a circle\. Every chain of parents must end at a root"
        ):
            tree_depth(torch.tensor(circle))
