"""Macro actions: runs of tokens that count as one action of the policy (MA-RLHF).

Rules, the same for every way to make them:

- They tile the actions: each action is in exactly one, prompt, tool output and padding are in none.
- Each unbroken run of actions is cut by itself, so that none reaches over a tool's output.
- A way to cut says where one opens. The first action of a run always opens one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from random import Random
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.functional import segment_count
from apportion.types import Rollouts, Spans


@dataclass(frozen=True)
class MacroSplitter:
    """`splitter(rollouts) -> Spans`: the macro actions, in the order of rows; `index` counts within the trajectory.

    Scope: row. Degenerate: an empty response has none.

    Args:
        expression: the call that makes it, which is also its `repr`.
        opens: which actions open a macro action, [B, T]; the first of a run does anyway.
        end_alone: the last action of each row is a macro action of its own.
    """

    expression: str
    opens: Callable[[Rollouts], Bool[Tensor, "B T"]] = field(repr=False)
    end_alone: bool = field(default=False, repr=False)

    def __repr__(self) -> str:
        return self.expression

    def __call__(self, rollouts: Rollouts) -> Spans:
        mask = rollouts.action_mask
        opens = mask & (self.opens(rollouts) | _run_starts(mask))
        if self.end_alone:
            opens |= mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        row, start = opens.nonzero(as_tuple=True)
        of = torch.where(mask, opens.flatten().cumsum(0).view(mask.shape) - 1, -1).flatten()
        size = segment_count(of, len(row)).long()
        return Spans(row=row, start=start, stop=start + size, index=_ordinals(rollouts, row))


def fixed_ngrams(n: int = 5, *, end_alone: bool = False) -> MacroSplitter:
    """`n` actions each; what is left at the end of a run is one too. 1 gives tokens.

    Args:
        n: actions in each.
        end_alone: the last action of each row is one of its own, as in the code of MA-RLHF, which averages the rewards
            in a macro action and would thin out the outcome.

    Raises:
        ValueError: n below 1.

    Example:
        >>> fixed_ngrams(3)(Rollouts.from_lists([[5, 6, 7, 8]], [0])).to_lists(1)
        [[(0, 3), (3, 4)]]
    """
    if n < 1:
        raise ValueError(f"fixed_ngrams needs n of at least 1; got {n}.")

    def opens(rollouts: Rollouts) -> Tensor:
        return _place_in_run(rollouts.action_mask) % n == 0

    return MacroSplitter(_call("fixed_ngrams", f"{n}", end_alone), opens, end_alone)


def random_ngrams(
    seed: int = 0,
    *,
    lengths: Sequence[int] = (1, 2, 3, 5, 10),
    repeats: int = 3,
    end_alone: bool = False,
) -> MacroSplitter:
    """Lengths drawn without replacement from a list that holds each `repeats` times; then one more, to the end of the run.

    A row's draw depends on the seed and its tokens alone: the order of rows does not matter, and a recorded run is cut
    again in the same way.

    Args:
        seed: of the draws; printed, and so recorded.
        lengths: numbers of actions.
        repeats: how often the list holds each. The code of MA-RLHF has no default; 3 is ours.
        end_alone: the last action of each row is one of its own.

    Raises:
        ValueError: a length or `repeats` below 1; called on rollouts without tokens.

    Example:
        >>> random_ngrams(7, lengths=(1, 3))(Rollouts.from_lists([[5, 6, 7, 8, 9]], [0])).to_lists(1)
        [[(0, 3), (3, 4), (4, 5)]]
    """
    if min(lengths, default=0) < 1 or repeats < 1:
        raise ValueError(f"random_ngrams needs lengths and repeats of at least 1; got {tuple(lengths)} and {repeats}.")
    bag = list(lengths) * repeats

    def opens(rollouts: Rollouts) -> Tensor:
        if rollouts.tokens is None:
            raise ValueError("random_ngrams needs rollouts.tokens, which this batch lacks. Use fixed_ngrams.")
        out = torch.zeros_like(rollouts.action_mask).tolist()
        tokens = rollouts.tokens.tolist()
        for row, runs in enumerate(_runs(rollouts.action_mask)):
            draw = Random(f"{seed} {tokens[row][: int(rollouts.lengths[row])]}").sample(bag, len(bag))
            cuts = chain(draw, repeat(rollouts.width))
            for at, stop in runs:
                while at < stop:
                    out[row][at] = True
                    at += next(cuts)
        return torch.tensor(out, dtype=torch.bool, device=rollouts.device).view(rollouts.action_mask.shape)

    settings = f"{seed}, lengths={tuple(lengths)}, repeats={repeats}"
    return MacroSplitter(_call("random_ngrams", settings, end_alone), opens, end_alone)


def perplexity_runs(
    reading: Literal["paper", "code"] = "paper",
    *,
    source: Literal["logprobs", "ref_logprobs"] = "logprobs",
    end_alone: bool = False,
) -> MacroSplitter:
    """Runs of falling perplexity: an action less likely than the one before it opens a macro action.

    Args:
        reading: "paper", or "code": as in the code of MA-RLHF the action *before* the less likely one opens it.
        source: whose log-probabilities; the code of MA-RLHF takes those of the reference model.
        end_alone: the last action of each row is one of its own.

    Raises:
        ValueError: another reading or source; called on rollouts without that field.

    Example:
        >>> r = Rollouts.from_lists([[5, 6, 7, 8]], [0], logprobs=[[-3.0, -2.0, -4.0, -1.0]])
        >>> perplexity_runs()(r).to_lists(1), perplexity_runs("code")(r).to_lists(1)
        ([[(0, 2), (2, 4)]], [[(0, 1), (1, 4)]])
    """
    if reading not in ("paper", "code") or source not in ("logprobs", "ref_logprobs"):
        raise ValueError(
            f"perplexity_runs needs reading 'paper' or 'code' and source 'logprobs' or 'ref_logprobs'; got {reading!r} "
            f"and {source!r}."
        )

    def opens(rollouts: Rollouts) -> Tensor:
        logprobs = getattr(rollouts, source)
        if logprobs is None:
            raise ValueError(f"perplexity_runs needs rollouts.{source}, which this batch lacks. Record it first.")
        mask = rollouts.action_mask
        less_likely = torch.zeros_like(mask)
        less_likely[:, 1:] = mask[:, 1:] & mask[:, :-1] & (logprobs[:, 1:] < logprobs[:, :-1])
        return less_likely if reading == "paper" else less_likely.roll(-1, 1)

    return MacroSplitter(_call("perplexity_runs", f"{reading!r}, source={source!r}", end_alone), opens, end_alone)


def constituents(cutoff: int = 5, *, end_alone: bool = False) -> MacroSplitter:
    """Constituents of a parse: the largest with fewer tokens than the cutoff.

    Reads meta["constituents"]: for each row the (start, stop) positions of the parser's constituents, in any order, each
    inside, around or beside any other. Going down from the largest ones: a constituent of 2 to cutoff - 1 tokens is a
    macro action; a longer one is taken apart; single tokens, and tokens in no further constituent, join the macro action
    before them. An outermost constituent, such as a sentence, always opens one. So leave single words out: their
    tokens, one or several, then join what stands before them, as in the code of MA-RLHF.

    Args:
        cutoff: tokens that are too many.
        end_alone: the last action of each row is one of its own.

    Raises:
        ValueError: cutoff below 2; called on rollouts without meta["constituents"], or with two that cross.

    Example:
        >>> r = Rollouts.from_lists([[0] * 7], [0], meta={"constituents": [[(0, 7), (0, 2), (3, 7), (4, 7)]]})
        >>> constituents()(r).to_lists(1)  # (0, 7) is too long; token 2 joins (0, 2)
        [[(0, 3), (3, 7)]]
    """
    if cutoff < 2:
        raise ValueError(f"constituents needs a cutoff of at least 2; got {cutoff}.")

    def opens(rollouts: Rollouts) -> Tensor:
        trees = rollouts.meta.get("constituents")
        if trees is None:
            raise ValueError(
                'constituents needs meta["constituents"], (start, stop) pairs for each row, which this batch lacks. '
                "Parse the responses first, or use fixed_ngrams."
            )
        out = torch.zeros_like(rollouts.action_mask).tolist()
        for row, tree in enumerate(trees):
            for at in _opened(tree, cutoff, row, int(rollouts.lengths[row])):
                out[row][at] = True
        return torch.tensor(out, dtype=torch.bool, device=rollouts.device).view(rollouts.action_mask.shape)

    return MacroSplitter(_call("constituents", f"{cutoff}", end_alone), opens, end_alone)


def _opened(tree: Sequence[tuple[int, int]], cutoff: int, row: int, length: int) -> list[int]:
    """Where macro actions open in a row, from its constituents."""
    out: list[int] = []
    around: list[tuple[int, int, bool]] = []  # the ones that hold the one at hand, and whether each was taken whole
    for start, stop in sorted({(a, b) for a, b in tree}, key=lambda x: (x[0], -x[1])):
        while around and around[-1][1] <= start:
            around.pop()
        crosses = f", which crosses {around[-1][:2]}" if around and stop > around[-1][1] else ""
        if crosses or not 0 <= start < stop <= length:
            raise ValueError(
                f'meta["constituents"] of row {row} has ({start}, {stop}){crosses}; the row has {length} positions. '
                "Give the constituents of one tree."
            )
        inside = bool(around) and around[-1][2]
        whole = inside or 1 < stop - start < cutoff
        if not around or (whole and not inside):
            out.append(start)
        around.append((start, stop, whole))
    return out


# ---- positions ----------------------------------------------------------------------------------------------------------


def _run_starts(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """The first action of every unbroken run."""
    before = torch.zeros_like(mask)
    before[:, 1:] = mask[:, :-1]
    return mask & ~before


def _place_in_run(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How many actions of its run stand before each."""
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return place - torch.where(_run_starts(mask), place, 0).cummax(1).values


def _runs(mask: Bool[Tensor, "B T"]) -> list[list[tuple[int, int]]]:
    """The unbroken runs of actions of each row, half-open."""
    out: list[list[tuple[int, int]]] = [[] for _ in range(mask.shape[0])]
    ends = _run_starts(mask.flip(1)).flip(1)
    rows, starts = _run_starts(mask).nonzero(as_tuple=True)
    for row, start, last in zip(rows.tolist(), starts.tolist(), ends.nonzero()[:, 1].tolist(), strict=True):
        out[row].append((start, last + 1))
    return out


def _ordinals(rollouts: Rollouts, row: Int[Tensor, " S"]) -> Int[Tensor, " S"]:
    """The ordinal of each span in its trajectory, for spans in the order of rows and positions."""
    by_place = torch.argsort(rollouts.row_index, stable=True)
    rows = by_place[torch.argsort(rollouts.trajectory_ids[by_place], stable=True)]
    counts = torch.bincount(row, minlength=rollouts.batch)
    before = torch.empty_like(counts)
    before[rows] = counts[rows].cumsum(0) - counts[rows]
    first = before.new_full((rollouts.num_trajectories,), len(row))
    first.scatter_reduce_(0, rollouts.trajectory_ids, before, "amin")
    within = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    return within + (before - first[rollouts.trajectory_ids])[row]


def _call(name: str, settings: str, end_alone: bool) -> str:
    return f"{name}({settings}{', end_alone=True' if end_alone else ''})"
