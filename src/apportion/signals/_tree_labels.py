"""Labels of steps from a verified tree search (GroundedPRM): values of rollouts, backed up, signed and filtered."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.functional import tree_sum
from apportion.types import Rollouts, Signal


@dataclass(frozen=True)
class TreeLabels:
    """The signals "node_value" and "label" of a search tree, from what each rollout that left a node was worth.

    `W(n) = sum of u(k) gamma^d over the node and what lies d below it`, `label = 1 if W > 0 else -1`.

    Source: GroundedPRM, arXiv 2510.14942, and its code. Use them as step rewards: `group_relative(reward="label",
        unit="branch")`, or any method that reads a signal over spans.
    Reads: signals[rollout] over spans[spans], NaN where no rollout left a node; spans[spans] with parents; signals[verdict]
        over spans[spans] if named. Scope: row.
    Degenerate: a node with no rollout at it or below has its verdict for W, if one is named, else NaN, not measured; W = 0
        counts as wrong.

    Args:
        gamma: discount per step up the tree.
        rollout: value u of the rollouts from each node, their sum if there were several (see `rollout_value`).
        verdict: 1, -1 or 0 for the steps that were only simulated, which keep it as their value.
        spans: the tree, a span per step.

    Example:
        >>> from dataclasses import replace
        >>> from apportion.types import Spans
        >>> tree = replace(Spans.from_lists([[(0, 1), (1, 2)], [(0, 1)]]), parent=torch.tensor([-1, 0, 0]))
        >>> rollout = Signal(torch.tensor([torch.nan, 0.5, -1.0]), "branch")
        >>> r = Rollouts.from_lists([[7, 8], [9]], [0, 0], spans={"branch": tree}, signals={"rollout_value": rollout})
        >>> {k: v.values.tolist() for k, v in TreeLabels(gamma=0.5).measure(r).items()}
        {'node_value': [-0.25, 0.5, -1.0], 'label': [-1.0, 1.0, -1.0]}
    """

    gamma: float = 0.9
    rollout: str = "rollout_value"
    verdict: str | None = None
    spans: str = "branch"

    @property
    def provides(self) -> tuple[str, ...]:
        """The signals it measures."""
        return ("signals.node_value", "signals.label")

    @property
    def requires(self) -> tuple[str, ...]:
        """The tree, what its rollouts were worth and what was said of simulated steps."""
        verdict = (f"signals.{self.verdict}",) if self.verdict else ()
        return (f"spans.{self.spans}", f"spans.{self.spans}.parent", f"signals.{self.rollout}", *verdict)

    def measure(self, rollouts: Rollouts) -> dict[str, Signal]:
        """`{"node_value": [S], "label": [S]}`."""
        parent, u = rollouts.spans[self.spans].parent, rollouts.signals[self.rollout].values
        assert parent is not None
        value, _ = backed_up(u, parent, gamma=self.gamma)
        if self.verdict:
            value = torch.where(value.isnan(), rollouts.signals[self.verdict].values.double(), value)
        value = value.to(u.dtype)
        return {"node_value": Signal(value, self.spans), "label": Signal(step_labels(value), self.spans)}


def rollout_value(
    verdicts: Float[Tensor, "R D"], outcome: Float[Tensor, " R"], *, final_weight: float | None = None
) -> Float[Tensor, " R"]:
    """What a verified rollout is worth, in float64: its steps' verdicts, earlier ones more, and its outcome F.

    `u = sum over i < N of v_i (N - i) / N^2 + w F` with `w = final_weight`, 1/N if that is None; `u = F` for N = 0.

    Source: GroundedPRM, arXiv 2510.14942, as in its code; the weight of F in the paper's own text was not verified.

    Args:
        verdicts: 1 true, -1 false, 0 undecided, for the simulated steps but the last, which F speaks for; NaN behind the
            last.
        outcome: F, 1 where the final answer is right and -1 where it is wrong.
        final_weight: weight of the outcome; None for 1/N.

    Example:
        >>> rollout_value(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([1.0]))
        tensor([0.5556], dtype=torch.float64)
    """
    given = ~verdicts.isnan()
    n = given.sum(1).double()
    place = torch.arange(verdicts.shape[1], device=verdicts.device)
    share = (n[:, None] - place) / n[:, None].square()
    steps = torch.where(given, verdicts.double() * share, 0.0).sum(1)
    weight = 1 / n if final_weight is None else final_weight
    return torch.where(n > 0, steps + weight * outcome, outcome.double())


def backed_up(
    value: Float[Tensor, " S"], parent: Int[Tensor, " S"], *, gamma: float = 0.9, own_visit: bool = True
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """The value sum W and the visits n of each node of a search tree, in float64.

    A rollout worth u from a node adds u to its W and `gamma^d u` to that of its ancestor d steps above, and a visit to all.

    Args:
        value: u of the rollout that left each node; NaN where none did.
        parent: the parent of each node, -1 for the root.
        gamma: discount per step up.
        own_visit: count the rollout at the node itself; the released code counts it at the ancestors alone.

    Returns:
        W, NaN where no rollout left the node or one below it, and n.

    Example:
        >>> backed_up(torch.tensor([torch.nan, torch.nan, 0.5]), torch.tensor([-1, 0, 1]))
        (tensor([0.4050, 0.4500, 0.5000], dtype=torch.float64), tensor([1., 1., 1.], dtype=torch.float64))
    """
    left = (~value.isnan()).double()
    ones = torch.ones_like(left)
    visits = tree_sum(left, ones, parent)
    total = tree_sum(value.nan_to_num(nan=0.0), gamma * ones, parent)
    return torch.where(visits > 0, total, torch.nan), visits if own_visit else visits - left


def uct(
    value: Float[Tensor, " S"],
    visits: Float[Tensor, " S"],
    parent_visits: Float[Tensor, " S"],
    *,
    c: float = 1.8,
    seek: Literal["right", "wrong"] = "right",
    use: Literal["sum", "mean"] = "sum",
) -> Float[Tensor, " S"]:
    """How promising a child is in the search: `Q + c sqrt(ln(n_parent + 1) / (n + 1))`.

    Args:
        value: W of each child; NaN counts as 0.
        visits: n of each child. parent_visits: n of its parent.
        c: weight of exploration; 1.8 is the value of the released driver, 1.414 that of its class.
        seek: "wrong" takes -W for Q, to find wrong paths once there are enough right ones.
        use: Q is W itself ("sum", as stated, which drowns the second term at nodes often visited) or W / n ("mean").

    Example:
        >>> one = torch.ones(1)
        >>> uct(0.5 * one, one, 3 * one, c=1.414)
        tensor([1.6772], dtype=torch.float64)
    """
    q = value.nan_to_num(nan=0.0).double()
    q = q / visits.clamp(min=1) if use == "mean" else q
    explore = ((parent_visits.double() + 1).log() / (visits + 1)).sqrt()
    return (q if seek == "right" else -q) + c * explore


def pick_child(
    scores: Float[Tensor, " S"],
    *,
    rule: Literal["best", "random"] = "best",
    generator: torch.Generator | None = None,
) -> int:
    """Which child the search enters: the one of highest score, or any ("random", which is what the released code does).

    Example:
        >>> pick_child(torch.tensor([0.1, 0.7, 0.3]))
        1
    """
    if rule == "best":
        return int(scores.argmax())
    return int(torch.randint(len(scores), (), generator=generator))


def step_labels(value: Float[Tensor, " *S"]) -> Float[Tensor, " *S"]:
    """1 where the value is above 0, else -1; NaN where it is NaN.

    Example:
        >>> step_labels(torch.tensor([0.2, 0.0, -3.0, torch.nan]))
        tensor([ 1., -1., -1., nan])
    """
    return torch.where(value.isnan(), value, torch.where(value > 0, 1.0, -1.0).to(value.dtype))


def consistent_paths(
    values: Float[Tensor, "P L"],
    verdicts: Float[Tensor, "P L"],
    *,
    rule: Literal["symmetric", "released"] = "symmetric",
) -> Bool[Tensor, " P"]:
    """Which paths make training samples: the values of all their steps agree in sign with the verdicts, and none is 0.

    Args:
        values: W of the steps of each path, NaN behind its last.
        verdicts: 1 true, -1 false, 0 undecided.
        rule: the released filter lets through a step that is verified true but worth less than 0 ("released").

    Example:
        >>> v, verdicts = torch.tensor([[0.4, -0.2]]), torch.tensor([[1.0, 1.0]])
        >>> consistent_paths(v, verdicts), consistent_paths(v, verdicts, rule="released")
        (tensor([False]), tensor([True]))
    """
    agrees = ((values > 0) & (verdicts > 0)) | ((values < 0) & (verdicts < 0))
    if rule == "released":
        agrees |= (values < 0) & (verdicts > 0)
    return (agrees | values.isnan()).all(1)


def kept_steps(values: Float[Tensor, "P L"], correct: Bool[Tensor, " P"]) -> Int[Tensor, " P"]:
    """How many steps of each path stay in its sample: all of a correct one; a wrong one ends where it recovers.

    A wrong path is cut before the first step worth 0 or more that comes after its first step worth 0 or less.

    Args:
        values: W of the steps of each path, NaN behind its last.
        correct: whether the path ends in the right answer.

    Example:
        >>> kept_steps(torch.tensor([[0.4, -0.2, -0.1, 0.3, -0.5]]), torch.tensor([False]))
        tensor([3])
    """
    bad = (values <= 0).cumsum(1)
    recovers = (values >= 0) & (bad - (values <= 0).long() > 0)
    length = (~values.isnan()).sum(1)
    if not values.shape[1]:
        return length
    return torch.where(recovers.any(1) & ~correct, recovers.byte().argmax(1), length)


def right_probability(
    top: Sequence[Mapping[str, float]], *, right: str = "Right", wrong: str = "Wrong", listed: int = 10
) -> float:
    """The score of a generative step judge: `P(right) / (P(right) + P(wrong))` of its label token.

    Read at the last position whose likeliest tokens have one of the two; if only one is there, the other gets the smallest
    probability listed. 0.5 if no position has either.

    Args:
        top: for each position of the judge's reply, log-probabilities of its likeliest tokens.
        right: the token of a right step. wrong: of a wrong one.
        listed: how many of the likeliest tokens count.

    Example:
        >>> round(right_probability([{"The": -0.1}, {"Right": -0.2, "Wrong": -1.9}, {"}": 0.0}]), 6)
        0.845535
    """
    for tokens in reversed(top):
        best = dict(sorted(tokens.items(), key=lambda item: -item[1])[:listed])
        if right in best or wrong in best:
            least = min(best.values())
            return 1 / (1 + math.exp(best.get(wrong, least) - best.get(right, least)))
    return 0.5
