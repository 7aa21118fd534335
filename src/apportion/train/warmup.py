"""Supervised steps on worked solutions before the first policy update (the first stage of ReFT, arXiv 2401.08967)."""

from collections.abc import Sequence

import torch

from apportion.tasks import Problem
from apportion.train.config import Config
from apportion.train.policy import CausalPolicy
from apportion.train.turns import demonstrated
from apportion.types import Rollouts


def demonstrations(config: Config, policy: CausalPolicy, problems: Sequence[Problem]) -> Rollouts:
    """The rows of worked solutions, what the policy should write in them as the actions.

    With an environment the solution's turns are played with it (`turns.demonstrated`); else `written`.
    """
    environment = getattr(config.task, "environment", None)
    if environment is None:
        return written(policy, problems, config.max_new_tokens)
    return demonstrated(
        policy,
        problems,
        environment=environment,
        max_new_tokens=config.max_new_tokens,
        max_turns=config.max_turns,
        tool_seconds=config.tool_seconds,
    )


def written(policy: CausalPolicy, problems: Sequence[Problem], max_new_tokens: int) -> Rollouts:
    """Prompt, worked solution and end token as rows; the solution and the end token are the actions.

    Raises:
        ValueError: a problem offers no worked solution, or its solution does not fit into `max_new_tokens`.
    """
    rows, masks = [], []
    for problem in problems:
        if problem.solution is None:
            raise ValueError(
                f"warm-up needs worked solutions, but problem {problem.id} has none. Use a task that offers them, or warmup=0."
            )
        prompt = policy.prompt_ids(problem)
        solution = [*policy.tokenizer(problem.solution, add_special_tokens=False)["input_ids"], policy.end_ids[-1]]
        if len(solution) > max_new_tokens:
            raise ValueError(
                f"the worked solution of problem {problem.id} has {len(solution)} tokens, but a response may have "
                f"{max_new_tokens}: the warm-up would teach what is then cut. Raise max_new_tokens."
            )
        rows.append(prompt + solution)
        masks.append([False] * len(prompt) + [True] * len(solution))
    return Rollouts.from_lists(rows, list(range(len(rows))), action_mask=masks).to(policy.model.device)


def warmup_step(
    policy: CausalPolicy,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    *,
    grad_clip: float,
) -> float:
    """One step on the token-mean cross entropy (nats) of the demonstrations, which it returns."""
    optimizer.zero_grad()
    outputs = policy.outputs(rollouts, rollouts.action_mask, temperature=1.0)
    loss = -outputs.logprobs[rollouts.action_mask].mean()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()
    return loss.item()


def warmup_rate(done: int, total: int, peak: float, ramp: int = 5) -> float:
    """Linear ramp over the first steps, then linear decay to a tenth of the peak."""
    return peak * min(1.0, (done + 1) / ramp) * max(0.1, 1 - done / total)
