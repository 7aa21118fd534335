"""A row as it grows: the prompt, what the policy wrote and, in a conversation, what it read between its turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from apportion.signals import pieces_of
from apportion.tasks import Problem
from apportion.train.sampler import Sampled
from apportion.types import Rollouts, Signal


@dataclass(eq=False)
class Row:
    """Token by token what the learner will read; nothing that the policy wrote is ever tokenised again.

    Args:
        group: the request it answers. problem: what is asked. tokens: the prompt, to begin with.
        action_mask, logprobs: one entry per token. statistics: by name, one number per action.
        turns: where each turn of the policy stands, `(start, stop)`.
        truncated: a limit ended it.
    """

    group: int
    problem: Problem
    tokens: list[int]
    action_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    statistics: dict[str, list[float]] = field(default_factory=dict)
    turns: list[tuple[int, int]] = field(default_factory=list)
    truncated: bool = False

    def __post_init__(self) -> None:
        ids, self.tokens = self.tokens, []
        self.read(ids)

    def read(self, ids: Sequence[int]) -> None:
        """Tokens that others wrote."""
        self.tokens += ids
        self.action_mask += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)

    def wrote(self, sampled: Sampled) -> None:
        """A turn of the policy."""
        self.turns.append((len(self.tokens), len(self.tokens) + len(sampled.tokens)))
        self.tokens += sampled.tokens
        self.action_mask += [True] * len(sampled.tokens)
        self.logprobs += sampled.logprobs
        for name, values in sampled.statistics.items():
            self.statistics.setdefault(name, []).extend(values)
        self.truncated = sampled.truncated

    def texts(self, tokenizer: Any) -> list[str]:
        """What the policy wrote, turn by turn, without special tokens."""
        return [text_of(tokenizer, self.tokens[a:b]) for a, b in self.turns]


def text_of(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    """The text of these tokens as it was written: nothing is tidied up, as some tokenizers do with spaces."""
    return str(tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def rollouts_of(rows: Sequence[Row], tokenizer: Any) -> Rollouts:
    """The rows as a batch, on the CPU; the statistics become token signals, NaN where the policy did not write."""
    problems = [row.problem for row in rows]
    rollouts = Rollouts.from_lists(
        [row.tokens for row in rows],
        [row.group for row in rows],
        action_mask=[row.action_mask for row in rows],
        logprobs=[row.logprobs for row in rows],
        truncated=[row.truncated for row in rows],
        meta={
            "prompt_id": [p.id for p in problems],
            "question": [p.question for p in problems],
            "answer": [p.answer for p in problems],
            "text": ["\n".join(row.texts(tokenizer)) for row in rows],
            "pieces": [pieces_of(tokenizer, row.tokens) for row in rows],
        },
    )
    signals = {}
    for name in rows[0].statistics if rows else ():
        values = torch.full(rollouts.action_mask.shape, torch.nan)
        values[rollouts.action_mask] = torch.tensor([v for row in rows for v in row.statistics[name]])
        signals[name] = Signal(values, "token")
    return rollouts.with_signals(**signals)
