"""The training loop, to be read top to bottom: sample, verify, measure, credit, record, update."""

import time
from pathlib import Path
from typing import Any

import torch

from apportion.record import Run, RunWriter, write_jsonl
from apportion.train.checkpoint import load_checkpoint, save_checkpoint
from apportion.train.config import Config
from apportion.train.learner import NotFinite, update
from apportion.train.measuring import measured, measures_of, required, statistics_of, verified
from apportion.train.policy import CausalPolicy, Request, check_lengths
from apportion.train.report import Report
from apportion.train.schedule import check_schedule, draw, generator_for
from apportion.train.warmup import demonstrations, warmup_rate, warmup_step
from apportion.types import Rollouts


def run(config: Config, *, resume: bool = False, command: str = "") -> Path:
    """Train, recording everything in `config.out`, and return that folder.

    The work of a step depends only on the weights, the seed and the number of the step, so a run that was killed and is
    resumed (`resume=True`, same options; `steps` may grow) gives the numbers of an uninterrupted one.

    Raises:
        ValueError: what the options ask for does not fit together; said before the model is loaded where possible.
        NotFinite: a reward, loss or gradient is NaN or infinite; the rollouts are saved and named.
    """
    check(config)
    measures = measures_of(config)
    for measure in measures:
        getattr(measure, "check", lambda: None)()  # a judge that cannot be reached is found now
    torch.set_num_threads(config.threads)
    policy = CausalPolicy.load(
        config.model,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        seed=config.seed,
        precision=config.precision,
        temperature=config.temperature,
        critic=config.critic,
        share_prompt=config.share_prompt,
        sample_rows=config.sample_rows,
    )
    for measure in measures:
        getattr(measure, "attach", lambda policy: None)(policy)
    check_prompts(config, policy)
    writer = _open(config, resume, command)
    report = Report(writer, config)
    try:
        _train(config, policy, report, measures, load_checkpoint(config.folder / "checkpoints") if resume else None)
    finally:
        report.close()
    return config.folder


def _train(config: Config, policy: CausalPolicy, report: Report, measures: Any, saved: dict[str, Any] | None) -> None:
    state = State(config, policy, saved)
    while state.warmed < config.warmup:
        _warm_up(config, policy, report, state)
    policy.refresh_sampler()
    if state.step == 0:
        evaluate(config, policy, report, state)
        if "ref_logprobs" in required(config):
            policy.keep_reference()
    while state.step < config.steps:
        try:
            _step(config, policy, report, measures, state)
        except NotFinite as error:
            raise _explained(error, config, state) from error
        if config.eval_every and (state.step % config.eval_every == 0 or state.step == config.steps):
            evaluate(config, policy, report, state)
        if config.save_every and (state.step % config.save_every == 0 or state.step == config.steps):
            state.save()
    if config.save_model:
        policy.save(str(config.folder / "model"))


def _step(config: Config, policy: CausalPolicy, report: Report, measures: Any, state: "State") -> None:
    step, clock = state.step + 1, Clock()
    problems = draw(config.task.train, config.prompts_per_step, config.seed, step)
    requests = [Request(p, config.group_size) for p in problems]
    with report.bar(f"step {step}: sampling", len(requests) * config.group_size) as advance:
        rollouts = policy.sample(
            requests,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            generator=generator_for(config.seed, step),
            statistics=statistics_of(config),
            on_rows=advance,
        )
    clock.lap("sample")
    state.rollouts = rollouts
    asked = [problems[g] for g in rollouts.group_ids.tolist()]
    rollouts = verified(rollouts, asked, config, may_miss=config.unmeasured == "skip")
    rollouts = measured(rollouts, policy, config, measures)
    credit = config.credit(rollouts)
    state.rollouts = rollouts
    report.writer.append(step, rollouts, credit)
    clock.lap("measure")
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * min(1.0, step / max(1, config.lr_ramp))
    metrics = update(
        policy,
        list(policy.trainable().values()),
        state.optimizer,
        rollouts,
        credit,
        config.loss(),
        micro_tokens=config.micro_tokens,
        grad_clip=config.grad_clip,
        skip_flat=config.skip_flat,
    )
    policy.refresh_sampler()
    clock.lap("update")
    state.step, state.tokens = step, state.tokens + int(rollouts.action_mask.sum())
    notes = {f"credit/{k}": float(v) for k, v in credit.notes.items()}
    for measure in measures:
        notes |= {f"judge/{k}": v for k, v in getattr(measure, "report", dict)().items()}
    report.log(step, "train", tokens=state.tokens, **_summary(rollouts), **clock.laps, **notes, **metrics)


def evaluate(config: Config, policy: CausalPolicy, report: Report, state: "State") -> None:
    """One response to each of the first `eval_size` test problems, with the same random numbers every time."""
    problems = list(config.task.test[: config.eval_size])
    if not config.eval_every or not problems:
        return
    with report.bar("held-out problems", len(problems)) as advance:
        rollouts = policy.sample(
            [Request(p, 1) for p in problems],
            max_new_tokens=config.max_new_tokens,
            temperature=config.eval_temperature,
            generator=generator_for(config.seed, 0),
            on_rows=advance,
        )
    outcome = verified(rollouts, problems, config, may_miss=True).signals["outcome"].values
    correct = torch.where(outcome.isnan(), 0.0, outcome)
    report.log(
        state.step,
        "eval",
        tokens=state.tokens,
        accuracy=float(correct.double().mean()),
        n=len(problems),
        unmeasured=int(outcome.isnan().sum()),
        correct=correct.tolist(),
    )


def _warm_up(config: Config, policy: CausalPolicy, report: Report, state: "State") -> None:
    """One supervised step on worked solutions."""
    clock = Clock()
    problems = draw(config.task.train, config.warmup_batch, config.seed, -1 - state.warmed)
    rows = demonstrations(policy, problems, config.max_new_tokens)
    for group in state.optimizer.param_groups:
        group["lr"] = warmup_rate(state.warmed, config.warmup, config.warmup_lr)
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


class State:
    """What changes from step to step, and what a checkpoint holds of it."""

    def __init__(self, config: Config, policy: CausalPolicy, saved: dict[str, Any] | None):
        self.config, self.policy = config, policy
        self.step = self.warmed = self.tokens = 0
        self.rollouts: Rollouts | None = None
        self.optimizer = self.new_optimizer()
        if saved is not None:
            self._load(saved)

    def new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; the value head has its own learning rate."""
        named = self.policy.trainable()
        head = [p for name, p in named.items() if name.startswith("value_head.")]
        body = [p for name, p in named.items() if not name.startswith("value_head.")]
        groups = [{"params": body, "peak": self.config.lr}, {"params": head, "peak": self.config.critic_lr}]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=self.config.lr,
            betas=(0.9, 0.99),
            weight_decay=self.config.weight_decay,
            fused=True,
        )

    def save(self) -> None:
        """Write a checkpoint; killed during it, the one before is still there."""
        state = {
            "step": self.step,
            "warmed": self.warmed,
            "tokens": self.tokens,
            "weights": {name: p.detach() for name, p in self.policy.trainable().items()},
            "optimizer": self.optimizer.state_dict(),
            "reference": self.policy.reference_state(),
        }
        save_checkpoint(self.config.folder / "checkpoints", self.warmed + self.step, state)

    def _load(self, saved: dict[str, Any]) -> None:
        self.step, self.warmed, self.tokens = saved["step"], saved["warmed"], saved["tokens"]
        with torch.no_grad():
            for name, p in self.policy.trainable().items():
                p.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        if "ref_logprobs" in required(self.config) and self.step:
            self.policy.load_reference(saved["reference"])


class Clock:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Time since the last lap."""
        now = time.perf_counter()
        self.laps[f"seconds_{name}"], self._last = now - self._last, now


def check(config: Config) -> None:
    """Refuse options that do not fit together, before anything is loaded."""
    needs = getattr(config.credit, "needs_group_of", 1)
    if config.group_size < needs:
        raise ValueError(
            f"{config.credit!r} compares responses of a group and needs at least {needs} per prompt, but group_size is "
            f"{config.group_size}. Raise group_size, or use a method without groups such as nsr."
        )
    if config.critic and not any(r == "values" for r in config.credit.requires):
        raise ValueError(f"critic is on, but {config.credit!r} reads no values. Use gae, or leave critic out.")
    for name in ("group_size", "prompts_per_step", "max_new_tokens", "threads", "micro_tokens", "sample_rows"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(config, name)}.")
    check_schedule(config.task.train, config.prompts_per_step)


def check_prompts(config: Config, policy: CausalPolicy) -> None:
    """Tokenise every prompt that the run will use, so that one that is too long is found now."""
    used = {
        p.id: p
        for s in range(1, config.steps + 1)
        for p in draw(config.task.train, config.prompts_per_step, config.seed, s)
    }
    used |= {p.id: p for p in config.task.test[: config.eval_size if config.eval_every else 0]}
    check_lengths([policy.prompt_ids(p) for p in used.values()], list(used), config.max_new_tokens, policy.context)


def _open(config: Config, resume: bool, command: str) -> RunWriter:
    if not resume:
        return RunWriter.create(
            config.folder,
            {"credit": repr(config.credit), "seed": config.seed, "command": command, "config": config.printable()},
        )
    writer = RunWriter.resume(config.folder)
    free = {"steps", "out", "progress", "track", "save_every"}
    recorded = Run(config.folder).info["config"]
    changed = [k for k, v in config.printable().items() if k not in free and recorded.get(k) != v]
    if changed:
        name = changed[0]
        raise ValueError(
            f"the run in {config.out} was started with {name}={recorded.get(name)!r}, but is resumed with "
            f"{config.printable()[name]!r}. Resume with the same options, or start a new run."
        )
    return writer


def _summary(rollouts: Rollouts) -> dict[str, float]:
    outcome = rollouts.signals["outcome"].values.double()
    groups = rollouts.trajectory_groups
    top = torch.full((rollouts.num_groups,), -torch.inf, dtype=torch.float64, device=outcome.device)
    top = top.scatter_reduce(0, groups, outcome.nan_to_num(-torch.inf), "amax")
    low = torch.full_like(top, torch.inf).scatter_reduce(0, groups, outcome.nan_to_num(torch.inf), "amin")
    assert rollouts.truncated is not None
    return {
        "reward": float(outcome.nanmean()),
        "length": float(rollouts.action_mask.sum(1).double().mean()),
        "truncated": float(rollouts.truncated.double().mean()),
        "dead_groups": float((top <= low).double().mean()),
        "unmeasured": int(outcome.isnan().sum()),
    }


def _explained(error: NotFinite, config: Config, state: State) -> NotFinite:
    """Save the rollouts that caused it and say where they are."""
    assert state.rollouts is not None
    rollouts = state.rollouts
    rows = torch.tensor(error.rows, device=rollouts.device)
    path = config.folder / f"not-finite-step-{state.step + 1:06d}.jsonl"
    write_jsonl(path, rollouts.select(rows))
    ids = ", ".join(dict.fromkeys(rollouts.meta["prompt_id"][i] for i in error.rows[:3]))
    return NotFinite(
        f"step {state.step + 1} stopped: {error}, caused by {len(error.rows)} of {rollouts.batch} rollouts "
        f"(rows {error.rows[:5]}, problem {ids}). They are saved in {path}; the weights are those of step {state.step}.",
        error.rows,
    )
