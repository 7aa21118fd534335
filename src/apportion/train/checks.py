"""What is said before a run begins, or instead of a traceback: options that contradict each other, options without effect,
prompts that are too long, and memory that ran out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from apportion.tasks import unverified
from apportion.train.collecting import requests_of, sampling_of
from apportion.train.config import Config, Options
from apportion.train.policy import CausalPolicy, check_lengths
from apportion.train.report import check_tracker
from apportion.train.rewards import check_rewards
from apportion.train.schedule import check_schedule, draw

LOWEST = {
    **dict.fromkeys(("group_size", "prompts_per_step", "max_new_tokens", "max_turns"), 1),
    **dict.fromkeys(("inner_epochs", "mini_batches", "eval_samples", "kl_horizon"), 1),
    **dict.fromkeys(("threads", "micro_tokens", "sample_rows", "warmup_batch"), 1),
    **dict.fromkeys(("steps", "refill", "min_new_tokens", "top_k", "lr_ramp", "critic_warmup", "warmup"), 0),
    **dict.fromkeys(("kl_coef", "value_coef"), 0),
    **dict.fromkeys(("lora_rank", "lora_alpha", "weight_decay", "eval_every", "eval_size", "eval_temperature"), 0),
    **dict.fromkeys(("patience", "save_every", "collapse_reward", "collapse_entropy", "collapse_length"), 0),
}
ABOVE_ZERO = (
    "temperature",
    "top_p",
    "tool_seconds",
    "reward_seconds",
    "lr",
    "grad_clip",
    "rate_of_critic",
    "warmup_lr",
)


class OutOfMemory(ValueError):
    """The machine's memory did not suffice; says which settings to lower."""


def check(config: Config) -> None:
    """Refuse options that do not fit together, before anything is loaded.

    Raises:
        ValueError: with the names of both options.
    """
    _check_ranges(config)
    check_schedule(config.task.train, config.prompts_per_step)
    _check_sampling(config)
    _check_updates(config)
    _check_critic(config)
    _check_watch(config)
    check_tracker(config)
    check_rewards(config)


def _check_ranges(config: Config) -> None:
    for name, hint in get_type_hints(Options).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}; got {getattr(config, name)!r}.")
    for name, low in LOWEST.items():
        if not getattr(config, name) >= low:  # NaN is not
            raise ValueError(f"{name} must be at least {low}; got {getattr(config, name)}.")
    for name in ABOVE_ZERO:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0; got {getattr(config, name):g}.")
    for name in ("collapse_reward", "collapse_entropy", "collapse_length"):
        if not getattr(config, name) < 1:
            raise ValueError(f"{name} is a share below 1; got {getattr(config, name):g}. Usual values are 0.1 to 0.5.")
    if config.top_p > 1:
        raise ValueError(f"top_p is a probability and at most 1; got {config.top_p:g}.")
    if not 0 <= config.lr_final <= 1:
        raise ValueError(f"lr_final is a share of lr, 0 to 1; got {config.lr_final:g}.")


def _check_sampling(config: Config) -> None:
    largest, needs = _largest_group(config), getattr(config.estimator, "needs_group_of", 1)
    if largest < needs:
        says = "group_size is" if config.group_sizes is None else "group_sizes gives at most"
        raise ValueError(
            f"{config.credit!r} compares responses of a group and needs at least {needs} per prompt, but {says} "
            f"{largest}. Raise {says.split()[0]}, or use a method without groups such as nsr."
        )
    if config.min_new_tokens > config.max_new_tokens:
        raise ValueError(
            f"min_new_tokens is {config.min_new_tokens}, but max_new_tokens allows {config.max_new_tokens}. "
            "Lower the one or raise the other."
        )
    if config.refill and largest == 1:
        raise ValueError(
            f"refill is {config.refill}, but with group_size 1 every group has equal rewards. Raise group_size, or leave refill out."
        )
    if config.task_weight == 0 and not any(reward.weight for reward in config.rewards):
        raise ValueError(
            "task_weight is 0 and no rewards are given, so nothing would be rewarded. Give rewards, or leave task_weight out."
        )
    silent = getattr(config.task, "verifier", None) is unverified and getattr(config.task, "environment", None) is None
    if config.task_weight and silent:
        raise ValueError(
            f"task_weight is {config.task_weight:g}, but the task verifies nothing (verify=None). Give rewards and "
            "task_weight=0, or a verifier."
        )
    sampling_of(config)  # refuses what it cannot do, such as an empty stop text


def _largest_group(config: Config) -> int:
    problems = config.task.train[:1] if config.group_sizes is None else config.task.train
    return max(request.count for request in requests_of(config, problems))


def _check_updates(config: Config) -> None:
    if config.mini_batches > config.prompts_per_step:
        raise ValueError(
            f"mini_batches is {config.mini_batches}, but a step has {config.prompts_per_step} groups (prompts_per_step), which "
            "are never split. Lower mini_batches, or raise prompts_per_step."
        )
    if config.kl_target is not None and not config.kl_coef:
        raise ValueError(
            f"kl_target is {config.kl_target:g}, but kl_coef is 0: there is nothing to steer. Give kl_coef a first value."
        )
    if config.kl_target is not None and not config.kl_target > 0:
        raise ValueError(f"kl_target must be above 0; got {config.kl_target:g}. Use None for a fixed kl_coef.")
    reads = config.estimator.requires
    steered, own = "signals.kl_coef" in reads, "ref_logprobs" in reads
    if steered != (config.kl_in == "credit"):
        does = "reads the weight of the KL penalty" if steered else "does not read the weight of the KL penalty"
        raise ValueError(
            f"kl_in is {config.kl_in!r}, but {config.credit!r} {does}. Use kl_in='credit' with a method such as "
            "gae(kl_coef='kl_coef'), and only with one."
        )
    if config.kl_coef and config.kl_in == "reward" and own:
        raise ValueError(
            f"kl_in is 'reward', but {config.credit!r} takes the KL penalty off the reward by itself: it would count twice. "
            "Set one of the two to 0, or use kl_in='credit' with kl_coef='kl_coef' in the method."
        )
    if config.kl_coef and config.kl_in == "reward" and not config.reads_outcome:
        raise ValueError(
            f"kl_in is 'reward', but {config.credit!r} does not read the outcome, so the KL penalty would do nothing. "
            "Use kl_in='loss'."
        )


def _check_critic(config: Config) -> None:
    if config.critic != "none" and "values" not in config.estimator.requires:
        raise ValueError(
            f"critic is {config.critic!r}, but {config.credit!r} reads no values. Use gae, or leave critic out."
        )
    if config.critic_model and config.critic != "model":
        raise ValueError(
            f"critic_model is {config.critic_model!r}, but critic is {config.critic!r}. Use critic='model', or leave critic_model out."
        )
    if config.critic_warmup and config.critic_warmup >= config.steps > 0:
        raise ValueError(
            f"critic_warmup is {config.critic_warmup} and steps is {config.steps}: the policy would never be trained. "
            "Lower critic_warmup, or raise steps."
        )


def _check_watch(config: Config) -> None:
    for name in ("patience", "keep_best"):
        if getattr(config, name) and not config.evaluates:
            raise ValueError(
                f"{name} needs evaluations, but eval_every is {config.eval_every}, eval_size {config.eval_size} and the task "
                f"has {len(config.task.test)} test problems. Evaluate, or leave {name} out."
            )
    if config.eval_samples > 1 and config.eval_temperature == 0:
        raise ValueError(
            f"eval_samples is {config.eval_samples}, but eval_temperature is 0, so all of them would be equal. Use "
            "eval_greedy=True beside sampled ones."
        )


def without_effect(config: Config) -> dict[str, str]:
    """Options that were changed from their default and do nothing in this run, with the reason."""
    one_update = config.inner_epochs * config.mini_batches == 1
    environment = getattr(config.task, "environment", None) is not None
    still = one_update and "one update per step keeps the ratio at 1"
    no_critic = config.critic == "none" and "there is no critic"
    no_penalty = (not config.kl_coef or config.kl_in != "loss") and "no KL penalty stands in the loss"
    no_warmup = not config.warmup and "warmup is 0"
    no_turns = not environment and "the task answers no turns"
    no_eval = not config.evaluates and "nothing is evaluated"
    unread = not config.reads_outcome and f"{config.credit!r} reads no outcome"
    idle = {
        "clip_low": still or (config.objective == "cispo" and "cispo has no lower bound"),
        "clip_high": still,
        "dual_clip": still,
        "objective": one_update
        and config.ratio == "token"
        and "one update per step keeps the ratio at 1, where both have the same gradient",
        "correction_cap": config.correction == "none" and "correction is none",
        "kl_in": not config.kl_coef and "kl_coef is 0",
        "kl_estimator": no_penalty,
        "kl_weighed": no_penalty,
        "kl_horizon": config.kl_target is None and "kl_target is None",
        "critic_lr": no_critic,
        "critic_warmup": no_critic,
        "value_coef": no_critic,
        "value_clip": no_critic or (one_update and "one update per step begins at the old values, where no bound acts"),
        "lora_alpha": not config.lora_rank and "lora_rank is 0",
        "warmup_lr": no_warmup,
        "warmup_batch": no_warmup,
        "lr_final": config.lr_schedule == "constant" and "lr_schedule is constant",
        "max_turns": no_turns,
        "tool_seconds": no_turns,
        "eval_size": not config.eval_every and "eval_every is 0",
        "eval_temperature": no_eval,
        "eval_samples": no_eval,
        "eval_greedy": no_eval or (config.eval_temperature == 0 and "eval_temperature is 0: every response is greedy"),
        "group_size": config.group_sizes is not None and "group_sizes decides",
        "truncated_reward": unread,
        "task_weight": bool(config.task_weight) and unread,
        "reward_seconds": not config.rewards and "no rewards are given; the task's verifier has its own limits",
    }
    changed = {f.name for f in fields(Options) if getattr(config, f.name) != f.default}
    return {name: reason for name, reason in idle.items() if reason and name in changed}


def notes_of(config: Config) -> list[str]:
    """What a user should know of this run at its start: options without effect, and what the task says of its data."""
    idle = [f"{name} has no effect in this run: {reason}." for name, reason in without_effect(config).items()]
    return [*idle, *getattr(config.task, "notes", ())]


def check_prompts(config: Config, policy: CausalPolicy) -> None:
    """Tokenise the prompts that the run will use, so that one that is too long is found now."""
    most = min(len(config.task.train), config.steps * config.prompts_per_step * (1 + config.refill))
    used = {p.id: p for p in draw(config.task.train, most, config.seed, 0)}
    used |= {p.id: p for p in config.task.test[: config.eval_size if config.evaluates else 0]}
    check_lengths([policy.prompt_ids(p) for p in used.values()], list(used), config.max_new_tokens, policy.context)


@contextmanager
def within_memory(config: Config, *settings: str) -> Iterator[None]:
    """Where memory runs out inside, say which settings to lower.

    Raises:
        OutOfMemory: instead of torch's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        present = ", ".join(f"{name} (now {getattr(config, name)})" for name in settings)
        cure = f"Lower {present}" if settings else "Take a smaller model"
        raise OutOfMemory(f"memory ran out: {str(error).splitlines()[0][:200]}. {cure}.") from error


def _is_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(w in str(error).lower() for w in words)
