"""An evaluation: how well held-out problems are answered, one response at a time, several together, and greedily."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.functional import majority_at_k, mean_intervals, pass_at_k
from apportion.signals import stated_answer
from apportion.tasks import Problem
from apportion.train.config import Config
from apportion.train.policy import Request
from apportion.train.rewards import rewarded
from apportion.train.sampler import Sampling
from apportion.train.schedule import generator_for
from apportion.types import Rollouts

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def evaluate(config: Config, sample: Callable[..., Rollouts], bar: Bar) -> dict[str, Any]:
    """The numbers of one evaluation: the first `eval_size` test problems, with the same random numbers every time.

    `eval_samples` responses to each are drawn at `eval_temperature`. Of the run's sampling only the limits of length and
    turns and the texts that end a response apply: `top_p`, `top_k` and `min_new_tokens` shape what is learnt from, and the
    model is measured without them, so that runs that differ in them can be compared.

    A response's outcome is what the task's verifier says, without weights or other rewards. One cut by the limit has 0,
    unless `truncated_reward` is None: then the verifier decides. With `task_weight` 0 there is no verifier to ask, and the
    outcome is the weighted sum of the rewards. What cannot be measured counts as 0, and is counted.

    Returns:
        accuracy: mean outcome of the sampled responses, the mean over problems of `correct`.
        n: problems. correct: mean outcome of each problem.
        unmeasured: responses without an outcome; unmeasured_reason: why, of the first, if there is one.
        pass@k, majority@k: `functional.pass_at_k` and `majority_at_k` for k = 2, 4, 8, ... and `eval_samples`.
        greedy: mean outcome of one greedy response a problem, with `eval_greedy`.
        intervals: 95 % intervals of these means by name, `functional.mean_intervals`.
        length, truncated, entropy: tokens of a response, share that was cut, nats per token; of the sampled ones.
    """
    problems = list(config.task.test[: config.eval_size])
    drawn = _answered(config, sample, bar, problems, config.eval_samples, config.eval_temperature)
    scores = {"accuracy": drawn.correct.mean(1)}
    for k in _draws(config.eval_samples):
        scores[f"pass@{k}"] = pass_at_k(drawn.correct, k)
        scores[f"majority@{k}"] = majority_at_k(drawn.correct, drawn.answers, k)
    unmeasured = drawn.unmeasured
    if config.eval_greedy:
        greedy = _answered(config, sample, bar, problems, 1, 0.0)
        scores["greedy"], unmeasured = greedy.correct.mean(1), [*unmeasured, *greedy.unmeasured]
    columns = torch.stack(list(scores.values()), 1)
    assert drawn.rollouts.truncated is not None
    return {
        **{name: float(score.mean()) for name, score in scores.items()},
        "n": len(problems),
        "unmeasured": len(unmeasured),
        **({"unmeasured_reason": unmeasured[0]} if unmeasured else {}),
        "correct": scores["accuracy"].tolist(),
        "intervals": dict(zip(scores, mean_intervals(columns).tolist(), strict=True)),
        "length": float(drawn.rollouts.action_mask.sum(1).double().mean()),
        "truncated": float(drawn.rollouts.truncated.double().mean()),
        "entropy": float(drawn.rollouts.signals["entropy"].values.double().nanmean()),
    }


@dataclass(frozen=True)
class _Answered:
    rollouts: Rollouts
    correct: Float[Tensor, "P n"]
    answers: Int[Tensor, "P n"]
    unmeasured: list[str]


def _answered(
    config: Config,
    sample: Callable[..., Rollouts],
    bar: Bar,
    problems: Sequence[Problem],
    count: int,
    temperature: float,
) -> _Answered:
    """`count` responses to each problem, their outcomes (0 where not measured) and their answers as numbers."""
    sampling = Sampling(max_new_tokens=config.max_new_tokens, temperature=temperature, stop=config.stop)
    with bar("held-out problems" if temperature else "held-out problems, greedy", len(problems) * count) as advance:
        rollouts = sample(
            [Request(p, count) for p in problems],
            sampling,
            generator=generator_for(config.seed, 0),
            statistics=("entropy",),
            on_rows=advance,
        )
    asked = [problems[g] for g in rollouts.group_ids.tolist()]
    rollouts = rewarded(rollouts, asked, _verifier_alone(config), may_miss=True)
    outcome = rollouts.signals["outcome"].values.double().cpu()
    return _Answered(
        rollouts,
        outcome.nan_to_num(0.0).view(len(problems), count),
        torch.tensor(_votes(config, asked, rollouts)).view(len(problems), count),
        ["; ".join(rollouts.meta["unmeasured"][row]) for row in outcome.isnan().nonzero()[:, 0].tolist()],
    )


def _verifier_alone(config: Config) -> Config:
    cut = None if config.truncated_reward is None else 0.0
    if config.task_weight == 0:
        return replace(config, truncated_reward=cut)
    return replace(config, truncated_reward=cut, rewards=(), task_weight=1.0)


def _votes(config: Config, problems: Sequence[Problem], rollouts: Rollouts) -> list[int]:
    """Which answer each response gives, equal answers by equal numbers; -1 = none, as for one that was cut."""
    read = getattr(config.task, "answer_of", None)
    numbers: dict[Hashable, int] = {}
    votes = []
    assert rollouts.truncated is not None
    for problem, text, cut in zip(problems, rollouts.meta["text"], rollouts.truncated.tolist(), strict=True):
        given = read(text) if read is not None else stated_answer(text, problem.answer)
        silent = given is None or (cut and config.truncated_reward is not None)
        votes.append(-1 if silent else numbers.setdefault(given, len(numbers)))
    return votes


def _draws(samples: int) -> list[int]:
    """2, 4, 8, ... and the number of samples itself."""
    return sorted({2**i for i in range(1, samples.bit_length()) if 2**i <= samples} | ({samples} - {1}))
