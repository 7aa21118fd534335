"""Rows that share a prompt, laid out as one sequence: the prompt once, then each row's own tokens.

    [prompt | own tokens of row 1 | own tokens of row 2 | ...]

Own tokens see the prompt and their own row before them, nothing else, and keep the positions they had in their row.
The result is the unshared pass up to rounding; the prompt is computed once instead of once per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.types import Rollouts


@dataclass(frozen=True)
class Packed:
    """`P` packed sequences of `L` tokens that hold every position of B rows.

    Args:
        tokens, positions: ids and places in their own row, [P, L].
        owner: the row of each token; -1 = a prompt, which all rows of its sequence see, -2 = padding, [P, L].
        home: for each row and position, its place in the flattened packed sequences, [B, T]; padding points at 0.
    """

    tokens: Int[Tensor, "P L"]
    positions: Int[Tensor, "P L"]
    owner: Int[Tensor, "P L"]
    home: Int[Tensor, "B T"]

    def block_mask(self) -> Bool[Tensor, "P 1 L L"]:
        """Who sees whom. Padding sees itself: a softmax over nothing would be NaN."""
        length = self.owner.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=self.owner.device).tril()
        same = self.owner[:, :, None] == self.owner[:, None, :]
        prompt = (self.owner == -1)[:, None, :]
        return ((same | prompt) & before)[:, None]

    def padding_mask(self) -> Int[Tensor, "P L"]:
        """1 where there is a token: all that is needed where no two rows share a sequence."""
        return (self.owner != -2).to(torch.int64)


def pack(rollouts: Rollouts, *, pad_id: int, share: bool = True) -> Packed:
    """Lay out the rows; with `share`, rows of a group whose tokens before the first action are equal share those.

    A group's rows are cut over several sequences only by the caller, who chooses the rows.
    """
    assert rollouts.tokens is not None
    device, rows = rollouts.device, rollouts.tokens.tolist()
    lengths, prompts = rollouts.lengths.tolist(), _prompt_lengths(rollouts)
    shared: dict[object, list[int]] = {}
    for b, (group, n) in enumerate(zip(rollouts.group_ids.tolist(), prompts, strict=True)):
        shared.setdefault((group, *rows[b][:n]) if share and n else ("alone", b), []).append(b)
    width = max(_packed_length(members, lengths, prompts) for members in shared.values())

    tokens = torch.full((len(shared), width), pad_id, dtype=torch.int64)
    positions = torch.zeros(len(shared), width, dtype=torch.int64)
    owner = torch.full((len(shared), width), -2, dtype=torch.int64)
    home = torch.zeros(rollouts.batch, rollouts.width, dtype=torch.int64)
    for p, members in enumerate(shared.values()):
        n = prompts[members[0]]
        tokens[p, :n] = torch.tensor(rows[members[0]][:n], dtype=torch.int64)
        positions[p, :n], owner[p, :n] = torch.arange(n), -1
        start = n
        for b in members:
            own = lengths[b] - n
            tokens[p, start : start + own] = torch.tensor(rows[b][n : lengths[b]], dtype=torch.int64)
            positions[p, start : start + own], owner[p, start : start + own] = torch.arange(n, lengths[b]), b
            home[b, :n] = p * width + torch.arange(n)
            home[b, n : lengths[b]] = p * width + torch.arange(start, start + own)
            start += own
    return Packed(tokens.to(device), positions.to(device), owner.to(device), home.to(device))


def _prompt_lengths(rollouts: Rollouts) -> list[int]:
    """Tokens before the first action, at most all but one of the row."""
    first = rollouts.action_mask.to(torch.int64).argmax(1)
    return torch.where(rollouts.action_mask.any(1), first, rollouts.lengths - 1).clamp(min=0).tolist()


def _packed_length(members: Sequence[int], lengths: Sequence[int], prompts: Sequence[int]) -> int:
    return prompts[members[0]] + sum(lengths[b] - prompts[b] for b in members)
