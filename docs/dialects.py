"""Writes docs/dialects.md: the same rewards under every dialect. Run: python docs/dialects.py [--check]"""

import argparse
import math
import sys
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path

import torch

from apportion import Rollouts, Signal
from apportion.cli._compose import parse_credit

PAGE = Path(__file__).with_name("dialects.md")
RUN = {"trl": "TRL 1.16.0", "verl": "verl 0.9.1", "skyrl": "SkyRL 0.3.0"}
READ = {
    "openrlhf": "OpenRLHF 0.11.2",
    "slime": "slime 624b824",
    "roll": "ROLL 8eb27cc",
    "oat": "oat c1a074c",
    "torchforge": "torchforge 6e77f0b",
    "rllm": "rLLM 9beb6e0",
    "art": "ART 0.5.18",
    "open_instruct": "open-instruct e6c3044",
    "nemo": "NeMo-RL 7ea279a",
    "prime_rl": "prime-rl 559b447",
}
GROUPS = (
    "group_relative.trl()",
    "group_relative.trl(scale_rewards='none')",
    "group_relative.trl_async()",
    "group_relative.verl()",
    "group_relative.verl(norm_by_std=False)",
    "group_relative.skyrl()",
    *(f"group_relative.{name}()" for name in READ),
    "group_relative.art_tinker()",
    "rloo.trl()",
    "rloo.verl()",
    "rloo.verl_vectorized()",
    "rloo.skyrl()",
    "rloo.openrlhf()",
    "rloo.rllm()",
    "max_rl.skyrl()",
    "max_rl.prime_rl()",
    "opo(singleton='raw')",
    "gpg(singleton='raw')",
    "pass_at_k()",
    "remax()",
    "reinforce_plus_plus_baseline(singleton='raw')",
    "reinforce_plus_plus_baseline.openrlhf()",
)
# Title, rewards of a group, which of its members are shown.
CASES: tuple[tuple[str, list[float], tuple[int, ...]], ...] = (
    ("1, 0, 0, 0", [1.0, 0.0, 0.0, 0.0], (0, 1)),
    (".2, .9, .4, .4", [0.2, 0.9, 0.4, 0.4], (0, 1, 2)),
    ("1, 0", [1.0, 0.0], (0, 1)),
    ("1, 0, 0, NaN", [1.0, 0.0, 0.0, math.nan], (0, 1, 3)),
    (".7 alone", [0.7], (0,)),
    ("four .99", [0.99] * 4, (0,)),
)
PAIRS = ("gdpo.trl()", "gdpo.verl()", "gdpo.nemo()")
TOKENS = (
    "reinforce_plus_plus.verl(gamma=0.9)",
    "reinforce_plus_plus.skyrl(gamma=0.9)",
    "reinforce_plus_plus.openrlhf(gamma=0.9, kl_coef=0.0)",
    "gae.verl(gamma=0.9, lam=0.8)",
    "gae.skyrl(gamma=0.9, lam=0.8)",
    "gae.openrlhf(gamma=0.9, lam=0.8, kl_coef=0.0)",
    "optimal_token_baseline.verl()",
    "optimal_token_baseline.verl(align='action')",
)
# From, to, their calls, why.
MOVES = (
    (
        "TRL to verl",
        "group_relative.trl()",
        "group_relative.verl()",
        "eps is 1e-6, not 1e-4, and a group of one gets its reward, not 0",
    ),
    (
        "TRL's GRPOTrainer to its AsyncGRPO",
        "group_relative.trl()",
        "group_relative.trl_async()",
        "the deviation divides by n, not n - 1",
    ),
    ("verl to rLLM", "group_relative.verl()", "group_relative.rllm()", "the deviation divides by n, not n - 1"),
    ("verl to NeMo-RL", "group_relative.verl()", "group_relative.nemo()", "each is compared with the others only"),
    ("TRL to prime-rl", "group_relative.trl()", "group_relative.prime_rl()", "nothing is divided"),
    ("verl's grpo to its rloo", "group_relative.verl()", "rloo.verl()", "times n / (n - 1), nothing is divided"),
)
TOKEN_MOVES = (
    ("verl to SkyRL, GAE", TOKENS[3], TOKENS[4], "tool output is a step with the critic's V"),
    ("verl to OpenRLHF, GAE", TOKENS[3], TOKENS[5], "tool output is a step with V = 0"),
    ("verl to SkyRL, REINFORCE++", TOKENS[0], TOKENS[1], "what comes after tool output is not earned before it"),
)
SIZES = (4, 8, 16)


def peer(call: str) -> str:
    """The key of the package whose numbers a call gives; a method without dialects follows verl's."""
    name = call.partition("(")[0].partition(".")[2] or "verl"
    return next(key for key in RUN | READ if name.startswith(key))


def checked(calls: Sequence[str]) -> str:
    """Run beside the real package by the tests, or read in its source."""
    peers = dict.fromkeys(map(peer, calls))
    kinds = (("run", RUN), ("read", READ))
    told = [f"{how}: {', '.join(of)}" for how, t in kinds if (of := [t[p] for p in peers if p in t])]
    return "; ".join(told)


def group(rewards: Sequence[float]) -> Rollouts:
    """One group; its responses have 1, 2, 3 ... tokens, and the greedy one has the reward 0.5."""
    tokens = [[0] * (k + 1) for k in range(len(rewards))]
    rollouts = Rollouts.from_lists(tokens, [0] * len(rewards), outcome=rewards, dtype=torch.float64)
    return rollouts.with_signals(greedy_outcome=Signal(torch.tensor([0.5], dtype=torch.float64), "group"))


def first_tokens(call: str, rollouts: Rollouts) -> list[float]:
    """The advantage of each response's first token; NaN where it is not counted."""
    made = parse_credit(call)(rollouts)
    return torch.where(made.mask[:, 0], made.advantages[:, 0], math.nan).tolist()


def number(x: float) -> str:
    """Three decimals; a dash for what is not counted."""
    return "–" if math.isnan(x) else f"{x:z.3f}"


def cells(call: str) -> tuple[str, ...]:
    """A row of the first table."""
    shown = ((first_tokens(call, group(rewards)), members) for _, rewards, members in CASES)
    return tuple(" ".join(number(values[k]) for k in members) for values, members in shown)


def table(title: Sequence[str], rows: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """Calls with the same numbers share a row."""
    same: dict[tuple[str, ...], list[str]] = {}
    for call, numbers in rows:
        same.setdefault(numbers, []).append(call)
    lines = [(" <br> ".join(f"`{x}`" for x in calls), *numbers, checked(calls)) for numbers, calls in same.items()]
    head = ("call", *title, "checked against")
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *lines))


def two_rewards() -> Rollouts:
    """A group with outcomes and formats."""
    form = Signal(torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64), "trajectory")
    return group([1.0, 0.0, 0.0, 0.0]).with_signals(format=form)


def with_tool() -> Rollouts:
    """Two responses of a group; the first calls a tool after its second token."""
    rollouts = Rollouts.from_lists(
        [[0] * 5, [0] * 3],
        [0, 0],
        outcome=[1.0, 0.0],
        action_mask=[[True, True, False, True, True], [True] * 3],
        values=[[0.5, 0.5, 9.0, 0.5, 0.5], [0.25, 0.25, 0.25]],
        logprobs=[[math.log(0.5)] * 5, [math.log(0.8)] * 3],
        dtype=torch.float64,
    )
    squares = torch.tensor([[0.4] * 5, [0.7] * 5], dtype=torch.float64)
    return rollouts.with_signals(sum_pi_squared=Signal(squares, "token"))


def token_cells(call: str) -> tuple[str, ...]:
    """Both responses, token by token; the tool's output is a dot."""
    rollouts = with_tool()
    made = parse_credit(call)(rollouts).advantages.tolist()
    acts = rollouts.action_mask.tolist()
    rows = [[number(x) if a else "·" for x, a in zip(*row, strict=True)] for row in zip(made, acts, strict=True)]
    return " ".join(rows[0]), " ".join(rows[1][:3])


def moving(move: str, old: str, new: str, why: str) -> str:
    """How advantages change, over all groups of some sizes with rewards of 0 and 1."""
    ranges = []
    for size in SIZES:
        groups = [group([1.0] * good + [0.0] * (size - good)) for good in range(1, size)]
        pairs = [pair for g in groups for pair in zip(first_tokens(old, g), first_tokens(new, g), strict=True)]
        changes = [100 * (b / a - 1) for a, b in pairs]
        ranges.append((min(changes), max(changes)))
    largest = max(abs(x) for pair in ranges for x in pair)
    if largest < 0.1:
        told = f"at most {largest:.2f} %"
    else:
        spans = (f"{low:+.0f} %" if high - low < 0.1 else f"{low:+.0f} to {high:+.0f} %" for low, high in ranges)
        told = ", ".join(f"{span} in groups of {size}" for span, size in zip(spans, SIZES, strict=True))
    return f"- **{move}**: {told}; {why}."


def moving_tokens(move: str, old: str, new: str, why: str) -> str:
    """How many actions of the two responses change their sign."""
    rollouts = with_tool()
    before, after = (parse_credit(call)(rollouts).advantages[rollouts.action_mask] for call in (old, new))
    changed = int((before.sign() != after.sign()).sum())
    return f"- **{move}**: {changed} of the {len(before)} actions above get another sign; {why}."


def page() -> str:
    """The whole page."""
    groups = table([title for title, _, _ in CASES], [(call, cells(call)) for call in GROUPS])
    pair = two_rewards()
    pairs = [(call, (" ".join(map(number, first_tokens(call, pair))),)) for call in PAIRS]
    return TEXT.format(
        groups=groups,
        pairs=table(["outcomes 1, 0, 0, 0; formats 0, 1, 1, 0"], pairs),
        tokens=table(["first response", "second response"], [(call, token_cells(call)) for call in TOKENS]),
        moves="\n".join([*(moving(*move) for move in MOVES), *(moving_tokens(*move) for move in TOKEN_MOVES)]),
    )


TEXT = """# Dialects
<!-- Written by docs/dialects.py; a test compares. -->

One name, other numbers: trainers differ in the deviation, in eps and its place, in what a group of one gets, in what tool
output does. A dialect is a method with the settings that give one trainer's own numbers. Below each gets the same rewards.

"run" means: `make test` executes that package's own code beside ours on random batches, and both agree to 2e-6
([verl](../tests/engines/verl/test_parity.py), [SkyRL](../tests/engines/skyrl/test_parity.py),
[TRL](../tests/engines/trl/test_parity.py)). verl and SkyRL have an environment of their own, with versions of transformers
and tensordict that both declare, and torch 2.13.0, where their extras name 2.11.0. "read" means: the formula was read in
that version, and nothing is executed. OpenRLHF cannot be imported without flash-attn; its own methods were run once, by
hand, with such imports left out, and agreed.

## Outcomes
Each column is a batch of one group: the advantages of the first response, the second, and the third where it differs. A
dash is not counted by the loss. Responses have 1, 2, 3, 4 tokens (`opo` and `reinforce_plus_plus_baseline` care); the greedy
response of `remax` has reward 0.5. Calls with the same three decimals share a row.

{groups}

## Several rewards
{pairs}

## Tokens
Two responses of a group, outcomes 1 and 0; the first has two tokens, tool output (·), two tokens. V = 0.5 in the first, 9 at
the tool output, and 0.25 in the second; gamma = 0.9, lam = 0.8. Everything but the last two rows is whitened.

{tokens}

## When you move
How much larger or smaller an advantage becomes, over all groups of 4, 8 and 16 rewards of which some are 1 and some 0:

{moves}

The loss, its clipping, its mean over tokens and the KL term differ too; they are not part of this page.

## Where we do not follow
Each has its test, in the folders named above, that states both numbers.
- **Equal rewards give exactly 0.** In float32 twelve rewards that are not exact in binary leave rounding in the mean, and a
  small eps divides by it: among 0.01 ... 0.99 the worst in verl's and SkyRL's grpo is above 0.01, in TRL's above 1e-4.
- **NaN is not measured.** The others of its group are compared as if it were not there. In verl and SkyRL the group, or
  after whitening the batch, becomes NaN. TRL leaves it out as we do.
- **An outcome after tool output is kept.** verl puts it on the response's last token. Where that is tool output, its GAE and
  REINFORCE++ never see it; here it is on the last action.
- **V behind the end is not read.** SkyRL's GAE reads the critic's values of padding.
- **The tail of `optimal_token_baseline`.** verl compares columns, but finds the second-longest response by counting actions.
  Here both are columns; without tool output they are the same.
- **A mean below 0 turns no signs**: `max_rl` gives 0. In SkyRL the better of two bad answers is pushed down.
"""


def main() -> int:
    """Write the page, or with --check only compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page would change")
    new = page()
    if not parser.parse_args().check:
        PAGE.write_text(new)
        return 0
    old = PAGE.read_text()
    sys.stdout.writelines(unified_diff(old.splitlines(True), new.splitlines(True), "dialects.md", "as it should be"))
    return int(new != old)


if __name__ == "__main__":
    raise SystemExit(main())
