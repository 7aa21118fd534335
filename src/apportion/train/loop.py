"""The training loop, to be read top to bottom: sample, reward, measure, credit, record, learn."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from apportion.losses import add_losses
from apportion.record import Run, RunWriter, write_jsonl
from apportion.train.card import write_card
from apportion.train.checks import check, check_prompts, notes_of, within_memory
from apportion.train.collecting import Collected, collect, flat_groups, sampler_of
from apportion.train.config import Config, Measure
from apportion.train.critic import explained
from apportion.train.evaluating import evaluate
from apportion.train.kl import reference_kl, steered
from apportion.train.learner import NotFinite, learn
from apportion.train.measuring import measured, measures_of, required
from apportion.train.policy import CausalPolicy
from apportion.train.report import Report
from apportion.train.rewards import signal_names, unmeasured_counts
from apportion.train.schedule import LEARNING, draw, generator_for
from apportion.train.state import State
from apportion.train.warmup import demonstrations, warmup_rate, warmup_step
from apportion.types import Credit, Rollouts

FREE = {
    *("out", "progress", "track", "save_every", "save_model"),
    *("patience", "collapse_reward", "collapse_entropy", "collapse_length"),
    *("tool_seconds", "reward_seconds"),
    *("micro_tokens", "sample_rows", "activation_checkpointing", "threads"),
}
"""What a resumed run may change: what is kept and shown, when it stops, how long is waited, and what memory and time it
takes, which moves its numbers by rounding."""


def run(config: Config, *, resume: bool = False, command: str = "") -> Path:
    """Train, recording everything in `config.out`, and return that folder.

    The work of a step depends only on the state that a checkpoint holds, the seed and the number of the step, so a run that
    was killed and is resumed (`resume=True`, same options; `steps` may grow) gives the numbers of an uninterrupted one.
    Beside them only the options in `FREE` may change.

    Raises:
        ValueError: what the options ask for does not fit together; said before the model is loaded where possible.
        OutOfMemory: with the settings to lower.
        NotFinite: a reward, loss or gradient is NaN or infinite; the rollouts are saved and named.
    """
    check(config)
    measures = measures_of(config)
    for measure in measures:
        getattr(measure, "check", lambda: None)()  # a judge that cannot be reached is found now
    torch.set_num_threads(config.threads)
    policy = load_policy(config)
    for measure in measures:
        getattr(measure, "attach", lambda policy: None)(policy)
    check_prompts(config, policy)
    writer = _open(config, resume, command)
    report = Report(writer, config)
    try:
        _train(config, policy, report, measures, resume)
    finally:
        report.close()
    return config.folder


def _train(config: Config, policy: CausalPolicy, report: Report, measures: Sequence[Measure], resume: bool) -> None:
    state = State(config, policy, measures)
    if resume:
        state.load()
    for note in notes_of(config):
        report.say(note)
    while state.warmed < config.warmup:
        _warm_up(config, policy, report, state)
    policy.refresh_sampler()
    if state.step == 0:
        _evaluate(config, policy, report, state)
        if "ref_logprobs" in required(config):
            policy.keep_reference()
    while not state.done:
        try:
            _step(config, policy, report, measures, state)
        except NotFinite as error:
            raise _explained(error, config, state) from error
        if config.eval_every and (state.step % config.eval_every == 0 or state.done):
            _evaluate(config, policy, report, state)
        if config.save_every and (state.step % config.save_every == 0 or state.done):
            state.save()
    if state.watch.reason is not None and state.step < config.steps:
        report.log(state.step, "stop", reason=state.watch.reason)
    _save(config, policy)


def _step(config: Config, policy: CausalPolicy, report: Report, measures: Sequence[Measure], state: State) -> None:
    step, clock = state.step + 1, Clock()
    with within_memory(config, "sample_rows", "max_new_tokens"):
        collected = collect(config, sampler_of(config, policy), step, state.drawn, report.bar)
    state.rollouts = collected.rollouts
    clock.lap("sample")
    with within_memory(config, "micro_tokens"):
        rollouts = measured(collected.rollouts, policy, config, measures, state.kl_coef)
        credit = config.estimator(rollouts)
    state.rollouts = rollouts
    report.writer.append(step, rollouts, credit)
    clock.lap("measure")
    with within_memory(config, "micro_tokens"):
        metrics = _learn(config, policy, rollouts, credit, state)
    policy.refresh_sampler()
    clock.lap("update")
    state.step, state.drawn, state.tokens = step, state.drawn + collected.drawn, state.tokens + collected.tokens
    numbers = {**_summary(collected, rollouts, config), **clock.laps, **_notes(credit, measures), **metrics}
    numbers |= explained(rollouts, credit)
    report.log(step, "train", tokens=state.tokens, **numbers)
    state.watch.sees(numbers)


def _learn(config: Config, policy: CausalPolicy, rollouts: Rollouts, credit: Credit, state: State) -> dict[str, float]:
    """What learns beside the policy, then the policy (or its value head alone), then the weight of the KL penalty."""
    metrics = {name: x for measure in state.learned for name, x in measure.update(rollouts, credit).items()}
    metrics["lr"], alone = state.set_rate(), state.critic_alone
    if not alone or config.critic == "head":
        with state.parameters() as parameters:
            metrics |= learn(
                policy,
                parameters,
                state.optimizer,
                rollouts,
                credit,
                add_losses(config.value_loss()) if alone else config.loss(state.kl_coef),
                epochs=config.inner_epochs,
                parts=config.mini_batches,
                generator=generator_for(config.seed, state.step + 1, LEARNING),
                micro_tokens=config.micro_tokens,
                grad_clip=config.grad_clip,
                skip_flat=config.skip_flat,
            )
    if rollouts.ref_logprobs is not None:
        metrics |= {"kl/measured": reference_kl(rollouts), "kl/coef": state.kl_coef}
    if config.kl_target is not None and not alone:
        kl, count = metrics["kl/measured"], rollouts.num_trajectories
        state.kl_coef = steered(state.kl_coef, kl, target=config.kl_target, horizon=config.kl_horizon, count=count)
    return metrics


def _evaluate(config: Config, policy: CausalPolicy, report: Report, state: State) -> None:
    """The first `eval_size` test problems, with the same random numbers every time."""
    if not config.evaluates:
        return
    with within_memory(config, "sample_rows", "max_new_tokens"):
        numbers = evaluate(config, sampler_of(config, policy), report.bar)
    report.log(state.step, "eval", tokens=state.tokens, **numbers)
    if state.watch.saw(state.step, numbers) == "best" and config.keep_best:
        policy.save(str(config.folder / "best"))


def _warm_up(config: Config, policy: CausalPolicy, report: Report, state: State) -> None:
    """One supervised step on worked solutions."""
    clock = Clock()
    start = state.warmed * config.warmup_batch
    problems = draw(config.task.train, config.warmup_batch, config.seed, start, stream=1)
    rows = demonstrations(config, policy, problems)
    for group in state.optimizer.param_groups:
        group["lr"] = warmup_rate(state.warmed, config.warmup, config.warmup_lr)
    with within_memory(config, "warmup_batch"):
        loss = warmup_step(policy, list(policy.trainable().values()), state.optimizer, rows, grad_clip=config.grad_clip)
    if loss != loss:
        raise ValueError(f"the loss of warm-up step {state.warmed + 1} is NaN. Lower warmup_lr ({config.warmup_lr}).")
    state.warmed += 1
    clock.lap("warmup")
    report.log(state.warmed, "warmup", loss=loss, seconds=clock.laps["seconds_warmup"])
    if state.warmed == config.warmup:
        state.optimizer = state.new_optimizer()
    if config.save_every and (state.warmed % config.save_every == 0 or state.warmed == config.warmup):
        state.save()


def load_policy(config: Config) -> CausalPolicy:
    """The model that the options name, as they want it trained."""
    with within_memory(config):
        return CausalPolicy.load(
            config.model,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            activation_checkpointing=config.activation_checkpointing,
            seed=config.seed,
            precision=config.precision,
            temperature=config.temperature,
            critic=config.critic == "head",
            share_prompt=config.share_prompt,
            sample_rows=config.sample_rows,
        )


def _save(config: Config, policy: CausalPolicy) -> None:
    """RUN/model, and RUN/adapter where an adapter was trained; and the cards of these and of RUN/best."""
    if config.save_model:
        policy.save(str(config.folder / "model"))
    if config.save_model and policy.adapted:
        policy.save_adapter(str(config.folder / "adapter"))
    for name in ("model", "adapter", "best"):
        if (config.folder / name).is_dir():
            write_card(config.folder, config.folder / name)


class Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Time since the last lap."""
        now = time.perf_counter()
        self.laps[f"seconds_{name}"], self._last = now - self._last, now


def _open(config: Config, resume: bool, command: str) -> RunWriter:
    if not resume:
        return RunWriter.create(
            config.folder,
            {
                "credit": repr(config.estimator),
                "seed": config.seed,
                "command": command,
                "config": config.printable(),
                "notes": notes_of(config),
            },
        )
    writer = RunWriter.resume(config.folder)
    free = FREE | ({"steps"} if config.lr_schedule == "constant" else set())
    recorded = Run(config.folder).info["config"]
    changed = [k for k, v in config.printable().items() if k not in free and recorded.get(k) != v]
    if changed:
        name = changed[0]
        raise ValueError(
            f"the run in {config.out} was started with {name}={recorded.get(name)!r}, but is resumed with "
            f"{config.printable()[name]!r}. Resume with the same options, or start a new run."
        )
    return writer


def _summary(collected: Collected, rollouts: Rollouts, config: Config) -> dict[str, float]:
    before = collected.rollouts
    outcome = before.signals["outcome"].values.double()
    assert rollouts.truncated is not None
    rewards = {name: before.signals[name].values for name in signal_names(config)}
    return {
        "reward": float(outcome.nanmean()),
        "length": float(rollouts.action_mask.sum(1).double().mean()),
        "truncated": float(rollouts.truncated.double().mean()),
        "dead_groups": float(flat_groups(before).double().mean()),
        "refilled": collected.refilled,
        "entropy": float(rollouts.signals["entropy"].values.nanmean()),
        "unmeasured": int(outcome.isnan().sum()),
        **unmeasured_counts(before),
        **{f"reward/{name}": float(values.nanmean()) for name, values in rewards.items()},
    }


def _notes(credit: Credit, measures: Sequence[Measure]) -> dict[str, float]:
    """What the credit and the measures say about themselves."""
    notes = {f"credit/{k}": float(v) for k, v in credit.notes.items()}
    for measure in measures:
        notes |= {f"judge/{k}": v for k, v in getattr(measure, "report", dict)().items()}
    return notes


def _explained(error: NotFinite, config: Config, state: State) -> NotFinite:
    """Save the rollouts that caused it and say where they are."""
    rollouts = error.rollouts if error.rollouts is not None else state.rollouts
    assert rollouts is not None
    rows = torch.tensor(error.rows, device=rollouts.device)
    path = config.folder / f"not-finite-step-{state.step + 1:06d}.jsonl"
    write_jsonl(path, rollouts.select(rows))
    ids = ", ".join(dict.fromkeys(rollouts.meta["prompt_id"][i] for i in error.rows[:3]))
    last = f"update {error.updates} of this step" if error.updates else f"step {state.step}"
    return NotFinite(
        f"step {state.step + 1} stopped: {error}, caused by {len(error.rows)} of {rollouts.batch} rollouts "
        f"(rows {error.rows[:5]}, problem {ids}). They are saved in {path}; the weights are those of {last}.",
        error.rows,
        rollouts,
        error.updates,
    )
