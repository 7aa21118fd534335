"""Ragged batches twice: as rollouts, and as the tensors of responses alone that verl and SkyRL work on."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion import Rollouts, Signal

Row = tuple[str, int, float, list[bool]]  # group, tokens of its prompt, outcome, which response tokens are actions


@dataclass(frozen=True)
class Batch:
    """The same rollouts in both forms.

    Args:
        rollouts: rows of prompt and response. starts: where each response begins, [B].
        tensors: what the peers' functions take, by name, in float32; junk where the mask is 0.
    """

    rollouts: Rollouts
    starts: Tensor
    tensors: dict[str, Any]

    @property
    def mask(self) -> Tensor:
        return self.tensors["response_mask"].bool()

    def same(self, ours: Tensor, theirs: Tensor) -> None:
        """Ours, [B, T], is theirs, [B, W], at the actions of the responses."""
        columns = (self.starts[:, None] + torch.arange(self.mask.shape[1])).clamp(max=ours.shape[1] - 1)
        cut, wanted = (torch.where(self.mask, x, 0).float() for x in (ours.gather(1, columns), theirs))
        torch.testing.assert_close(cut, wanted, rtol=2e-6, atol=2e-6)


def batch(
    seed: int, *, sizes: tuple[int, int] = (2, 6), gaps: bool = True, dense: bool = False, shift: float = 0.0
) -> Batch:
    """Groups of different sizes and prompts, rows shuffled; no group has equal rewards.

    Rewards are eighths, so that float32 adds them exactly.

    Args:
        sizes: smallest and largest group. gaps: tool output between the actions. dense: rewards on every action.
        shift: added to every outcome.
    """
    rng = Random(seed)
    rows: list[Row] = []
    for number in range(rng.randint(2, 4)):
        size, prompt = rng.randint(*sizes), rng.randint(0, 3)
        outcomes = [shift + rng.randint(-8, 8) / 8 for _ in range(size)]
        outcomes[0] = outcomes[-1] + 1 if size > 1 else shift + 0.5
        for outcome in outcomes:
            between = [not gaps or rng.random() < 0.7 for _ in range(rng.randint(0, 8))]
            rows.append((f"prompt {number}", prompt, outcome, [True, *between, True]))
    rng.shuffle(rows)
    return made(rows, seed, dense=dense)


def group(name: str, *rows: tuple[float, str]) -> list[Row]:
    """A group without a prompt: outcomes and responses, `a` for an action, `-` for tool output."""
    return [(name, 0, outcome, [x == "a" for x in response]) for outcome, response in rows]


def made(rows: list[Row], seed: int = 0, *, dense: bool = False) -> Batch:
    """Random values and probabilities to these rows; the outcome is on the last action."""
    uids, prompts, outcomes, actions = zip(*rows, strict=True)
    lengths = [len(a) for a in actions]
    width, rng = max(lengths), torch.Generator().manual_seed(seed)
    mask = torch.tensor([a + [False] * (width - len(a)) for a in actions])
    groups = list(dict.fromkeys(uids))

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=rng) / 8

    def random() -> Tensor:
        return torch.rand(mask.shape, generator=rng)

    last = torch.where(mask, torch.arange(width), 0).argmax(1, keepdim=True)
    rewards = torch.zeros(mask.shape).scatter_(1, last, torch.tensor(outcomes)[:, None])
    rewards = torch.where(mask, eighths(*mask.shape), 0.0) if dense else rewards
    chance, form, greedy = 0.05 + 0.95 * random(), torch.arange(len(rows)) % 2.0, eighths(len(groups))
    tensors = {
        "token_level_rewards": rewards,
        "response_mask": mask.long(),
        "index": np.array(uids, dtype=object),
        "values": 2 * random() - 1,
        "old_log_probs": chance.log(),
        "ref_log_probs": -2 * random(),
        "sum_pi_squared": chance.square() + 0.05 * random(),
        "reward_baselines": greedy[[groups.index(uid) for uid in uids]],
        "non_tensor_batch": {"outcome": list(outcomes), "format": form.tolist()},
        "batch": {
            "prompts": torch.zeros(len(rows), 4),
            "attention_mask": torch.tensor([[1] * (4 + n) + [0] * (width - n) for n in lengths]),
        },
    }
    rollouts = Rollouts.from_lists(
        [[0] * (p + n) for p, n in zip(prompts, lengths, strict=True)],
        uids,
        outcome=outcomes,
        action_mask=[[False] * p + a for p, a in zip(prompts, actions, strict=True)],
    )

    def placed(values: Tensor) -> Tensor:
        """Of responses, at their positions in the rows."""
        out = torch.zeros(rollouts.action_mask.shape)
        for row, (p, n) in enumerate(zip(prompts, lengths, strict=True)):
            out[row, p : p + n] = values[row, :n]
        return out

    rollouts = rollouts.replace(
        values=placed(tensors["values"]),
        logprobs=placed(tensors["old_log_probs"]),
        ref_logprobs=placed(tensors["ref_log_probs"]),
    ).with_signals(
        rewards=Signal(placed(rewards), "token"),
        sum_pi_squared=Signal(placed(tensors["sum_pi_squared"]), "token"),
        format=Signal(form, "trajectory"),
        greedy_outcome=Signal(greedy, "group"),
    )
    return Batch(rollouts, torch.tensor(prompts), tensors)
