"""Which turns began in the same situation: from what the agent saw to the ids that `Spans.state` holds."""

from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher

import torch
from jaxtyping import Int
from torch import Tensor


def anchor_states(
    observations: Sequence[Hashable | None],
    groups: Sequence[int] | Int[Tensor, " S"],
    *,
    similarity: float | None = None,
    autojunk: bool = True,
) -> Int[Tensor, " S"]:
    """The state of each turn: equal for turns of one group that saw the same, 0, 1, ... in order of appearance.

    What was seen must be the state alone: a step counter, a time or the history in it, and no two turns ever match.

    Args:
        observations: what the agent saw before each turn, in the order of the spans: text, or anything hashable. None
            is unknown and matches nothing.
        groups: the group of each turn, `rollouts.group_ids[spans.row]`; states of two groups never meet.
        similarity: None for equality; else, for text, a turn joins the first earlier state of its group whose first
            observation has `SequenceMatcher.ratio()` at or above this. Depends on the order of the turns, and compares
            every observation with every state of the group.
        autojunk: of difflib: characters that are frequent in a text of 200 or more match less, and comparing is fast.
            False compares them all.

    Raises:
        ValueError: not one group per observation; a similarity outside (0, 1].
        TypeError: an observation that is not hashable, or is not text where similarity is asked for.

    Example:
        >>> anchor_states(["hall", "cellar", "hall", "hall"], [0, 0, 0, 1])
        tensor([0, 1, 0, 2])
        >>> anchor_states(["a red door", "a red door.", "a well"], [0, 0, 0], similarity=0.9)
        tensor([0, 0, 1])
    """
    of = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(of) != len(observations):
        raise ValueError(f"anchor_states has {len(observations)} observations but {len(of)} groups. Give one per turn.")
    if similarity is not None and not 0 < similarity <= 1:
        raise ValueError(f"similarity must lie above 0 and not above 1; got {similarity}. None asks for equality.")
    known: dict[tuple[int, Hashable], int] = {}
    texts: dict[int, list[tuple[SequenceMatcher[str], int]]] = {}
    states, found = 0, []
    for seen, group in zip(observations, of, strict=True):
        _check(seen, similarity)
        state = known.get((group, seen)) if seen is not None else None
        if state is None and similarity is not None and isinstance(seen, str):
            state = _alike(seen, texts.setdefault(group, []), similarity)
        if state is None:
            state, states = states, states + 1
            if similarity is not None and isinstance(seen, str):
                texts[group].append((SequenceMatcher(None, b=seen, autojunk=autojunk), state))
        if seen is not None:
            known[group, seen] = state
        found.append(state)
    return torch.tensor(found, dtype=torch.int64, device=groups.device if isinstance(groups, Tensor) else None)


def _alike(seen: str, texts: list[tuple[SequenceMatcher[str], int]], similarity: float) -> int | None:
    """The first state whose representative is similar enough; the cheap bounds of the ratio are tried first."""
    for text, state in texts:
        text.set_seq1(seen)
        ratios = (text.real_quick_ratio, text.quick_ratio, text.ratio)
        if all(ratio() >= similarity for ratio in ratios):
            return state
    return None


def _check(seen: object, similarity: float | None) -> None:
    if seen is None or isinstance(seen, str):
        return
    if similarity is not None:
        raise TypeError(
            f"similar states need text; got an observation of type {type(seen).__name__}. Render it as text, or set "
            "similarity=None."
        )
    try:
        hash(seen)
    except TypeError:
        raise TypeError(
            f"an observation must be hashable; got {type(seen).__name__}. Give text, or a tuple of what identifies the "
            "state."
        ) from None
