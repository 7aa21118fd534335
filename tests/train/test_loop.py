"""Whole runs of a tiny model: they learn, record, replay, resume after kill -9, and stop on what is not finite."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from apportion.credit import capo, gae, grpo, nsr, rloo, tempo
from apportion.record import Run, read_jsonl
from apportion.signals import lines, tool_judge
from apportion.tasks import arithmetic
from apportion.train import Config, NotFinite, run


def numbers(folder: Path) -> list[dict]:
    """Every recorded number but the times."""
    return [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in Run(folder).metrics()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = (folder / "checkpoints").glob("*.pt")
    return torch.load(checkpoint, weights_only=True)["weights"]


def test_a_run_records_what_it_did_and_the_credit_replays_bit_for_bit(config, digits):
    settings = config(task=digits, credit=capo(), judge=tool_judge(), splitter=lines(), steps=2)
    run_folder = run(settings)
    recorded = Run(run_folder)
    assert recorded.steps() == [1, 2]
    assert [m["kind"] for m in recorded.metrics()] == ["eval", "eval", "train", "eval", "train"]
    for step in recorded.steps():
        rollouts, credit = recorded.rollouts(step), recorded.credit(step)
        assert torch.equal(capo()(rollouts).advantages, credit.advantages)
        assert credit.advantages.abs().max() > 0
        assert {"outcome", "judge"} <= set(rollouts.signals)
    assert recorded.info["config"]["judge"] == "tool_judge()"


def test_equal_seeds_give_equal_numbers_and_other_seeds_others(config, digits, tmp_path):
    folders = [run(config(task=digits, out=str(tmp_path / f"{i}"), seed=seed)) for i, seed in enumerate((5, 5, 6))]
    assert numbers(folders[0]) == numbers(folders[1]) != numbers(folders[2])


def test_it_learns(config, digits):
    folder = run(
        config(
            task=digits,
            steps=20,
            prompts_per_step=8,
            group_size=8,
            lr=1e-2,
            max_new_tokens=4,
            eval_every=0,
            save_every=0,
        )
    )
    rewards = [m["reward"] for m in Run(folder).metrics("train")]
    assert sum(rewards[:5]) / 5 < 0.6
    assert sum(rewards[-5:]) / 5 > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"credit": gae(), "critic": "head"},
        {"credit": grpo(), "lora_rank": 2},
        {"credit": grpo(), "kl_coef": 0.1},
        {"credit": grpo(), "kl_coef": 0.1, "kl_estimator": "k1", "lora_rank": 2, "warmup": 2},
        {"credit": rloo(), "ratio": "sequence", "entropy_coef": 0.01, "aggregation": "token_sum_norm"},
        {"credit": tempo(), "precision": "bfloat16"},
        {"credit": nsr(), "group_size": 1},
    ],
    ids=["critic", "lora", "kl", "lora-kl-warmup", "rloo-sequence-entropy", "tempo-bfloat16", "nsr-group-of-one"],
)
def test_every_option_trains_and_resumes_to_the_same_numbers(config, digits, task, options, tmp_path):
    if options.get("warmup"):
        digits = task
    whole = run(config(task=digits, out=str(tmp_path / "whole"), steps=3, **options))
    parts = config(task=digits, out=str(tmp_path / "parts"), steps=2, **options)
    run(parts)
    run(config(task=digits, out=str(tmp_path / "parts"), steps=3, **options), resume=True)
    assert numbers(tmp_path / "parts") == numbers(whole)
    a, b = weights(whole), weights(tmp_path / "parts")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert sum(m["grad_norm"] for m in Run(whole).metrics("train")) > 0


CHILD = """
from apportion.credit import grpo
from apportion.tasks import arithmetic
from apportion.train import Config, run
task = arithmetic(terms=2, train=64, test=16)
class Any:
    name, splitter, judge, train, test = "any", None, None, task.train, task.test
    def __repr__(self): return "any"
    def verify(self, problem, text): return float(any(c.isdigit() for c in text))
run(Config(model=model, task=Any(), credit=grpo(), out=out, steps=4, prompts_per_step=4, group_size=4, warmup=2,
           max_new_tokens=10, eval_every=2, eval_size=8, save_every=1, save_model=False, precision="float32",
           kl_coef=0.01, lr=1e-3, progress=False), resume=resume)
"""


EVERYTHING = """
from apportion.credit import add, chain, gae, oprl, whiten
from apportion.tasks import Environment, Reply, arithmetic
from apportion.train import Config, OnlinePRM, Reward, run
task = arithmetic(terms=2, train=64, test=16)
class Echo(Environment):
    turns = 0
    def reply(self, text):
        self.turns, self.state = self.turns + 1, len(text) % 2
        return Reply("?\\n" if self.turns < 2 else None, reward=float(len(text) % 3))
class Talk:
    name, splitter, judge, train, test = "talk", None, None, task.train, task.test
    def __repr__(self): return "talk"
    def environment(self, problem): return Echo()
    def verify(self, problem, text): return float(any(c.isdigit() for c in text))
def short(problem, text): return -0.01 * len(text)
run(Config(
    model=model, task=Talk(), out=out, steps=4, prompts_per_step=4, group_size=4, refill=1,
    credit=add((1.0, chain(gae(kl_coef="kl_coef"), whiten())), (0.5, oprl())), measures=(OnlinePRM(lr=1e-3),),
    rewards=(Reward(short, weight=0.5),), task_weight=2.0, truncated_reward=None, mask_truncated=True,
    max_new_tokens=10, min_new_tokens=2, temperature=0.9, top_p=0.95, top_k=60, stop=("z",), max_turns=2,
    lr=1e-3, lr_ramp=2, lr_schedule="cosine", weight_decay=0.01, inner_epochs=2, mini_batches=2, ratio="turn", dual_clip=3.0,
    correction="token_truncate", entropy_coef=0.01, kl_coef=0.05, kl_in="credit", kl_target=0.01, kl_horizon=50,
    critic="model", critic_lr=1e-3, critic_warmup=1, lora_rank=2, activation_checkpointing=True,
    eval_every=2, eval_size=8, eval_samples=2, eval_greedy=True, keep_best=True, patience=9, collapse_reward=0.01,
    collapse_entropy=0.01, collapse_length=0.01, save_every=1, save_model=True, precision="float32", progress=False,
), resume=resume)
"""


NURSERY = """
import json, os, sys, traceback
import apportion.record._table, apportion.train, pandas, peft, transformers.models.llama.modeling_llama
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            exec(json.loads(line)["script"], {"__name__": "script", **json.loads(line)})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(pid, file=answers, flush=True)
    print(os.waitpid(pid, 0)[1], file=answers, flush=True)
os._exit(0)
"""


class Nursery:
    """Begins processes that have imported what takes seconds, and done nothing else; one at a time."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-W", "ignore", "-c", NURSERY]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def begin(self, model: str, out: Path, script: str) -> None:
        """Begin the run, or go on with it."""
        given = {"script": script, "model": model, "out": str(out), "resume": (out / "run.json").exists()}
        self.process.stdin.write(json.dumps(given).encode() + b"\n")
        self.pid = int(self.process.stdout.readline())

    def running(self) -> bool:
        return not select.select([self.process.stdout], [], [], 0)[0]

    def kill(self) -> int:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """The status with which it ended; 0 = well."""
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.process.stdin.close()
    assert made.process.wait() == 0
    made.process.stdout.close()


@pytest.mark.parametrize("script", [CHILD, EVERYTHING], ids=["plain", "everything-on"])
def test_killed_at_random_points_a_run_resumes_to_the_numbers_of_an_uninterrupted_one(
    nursery, tiny_model, tmp_path, script
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    nursery.begin(tiny_model, whole, script)
    assert nursery.wait() == 0
    rng, kills = random.Random(0), 0
    nursery.begin(tiny_model, killed, script)
    for number in range(6):
        wait_for_a_moment(killed, rng, during_checkpoint=number % 2 == 1, running=nursery.running)
        if not nursery.running():
            break
        kills += nursery.kill() == signal.SIGKILL
        nursery.begin(tiny_model, killed, script)
    assert nursery.wait() == 0
    assert kills >= 3
    assert numbers(killed) == numbers(whole)
    a, b = weights(whole), weights(killed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert Run(killed).steps() == [1, 2, 3, 4]
    for step in Run(killed).steps():
        assert torch.equal(Run(killed).credit(step).advantages, Run(whole).credit(step).advantages)
    for file in whole.glob("*/model.safetensors"):  # RUN/best and RUN/model
        assert file.read_bytes() == (killed / file.relative_to(whole)).read_bytes()


def wait_for_a_moment(
    folder: Path, rng: random.Random, *, during_checkpoint: bool, running: Callable[[], bool]
) -> None:
    """Until the run writes a checkpoint, or some time after it has recorded something new."""
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    while running():
        if during_checkpoint and any((folder / "checkpoints").glob("*.tmp")):
            return
        if not during_checkpoint and metrics.exists() and metrics.stat().st_size > before:
            time.sleep(rng.uniform(0, 0.05))
            return
        time.sleep(0.0005)


def test_a_nan_reward_stops_the_run_names_the_rollout_and_saves_it(config, digits, monkeypatch):
    monkeypatch.setattr(digits, "verify", lambda problem, text: float("nan"), raising=False)
    settings = config(task=digits, eval_every=0)
    with pytest.raises(
        NotFinite,
        match=r"step 1 stopped: the reward verifier is nan, not measured, on row 0 \(and 15 more\), .* caused by 16 of 16 rollouts \(rows \[0, 1",
    ) as e:
        run(settings)
    saved = read_jsonl(settings.folder / "not-finite-step-000001.jsonl")
    assert saved.batch == 16
    assert str(settings.folder) in str(e.value)


def test_a_nan_reward_can_be_left_out(config, digits, monkeypatch):
    rewards = iter([float("nan"), 1.0, 0.0, 1.0] * 100)
    monkeypatch.setattr(digits, "verify", lambda problem, text: next(rewards), raising=False)
    folder = run(config(task=digits, eval_every=0, unmeasured="skip", steps=1))
    assert Run(folder).metrics("train")[0]["unmeasured"] == 4
    credit = Run(folder).credit(1)
    assert not credit.mask[0].any()
    assert credit.mask[1].any()


def test_an_infinite_credit_stops_before_the_weights_change(config, digits, tmp_path):
    from apportion import Credit

    class Broken:
        requires = ("signals.outcome",)

        def __call__(self, rollouts):
            return Credit(torch.where(rollouts.action_mask, torch.inf, 0.0), rollouts.action_mask)

    with pytest.raises(NotFinite, match=r"step 1 stopped: the loss is .*; the weights are those of step 0\."):
        run(config(task=digits, credit=Broken(), eval_every=0))

    class BrokenAtLast(Broken):
        def __call__(self, rollouts):
            last = rollouts.group_ids == rollouts.num_groups - 1
            broken = rollouts.action_mask & last[:, None]
            return Credit(torch.where(broken, torch.inf, rollouts.action_mask.float()), rollouts.action_mask)

    settings = config(task=digits, credit=BrokenAtLast(), eval_every=0, mini_batches=4, out=str(tmp_path / "parts"))
    with pytest.raises(
        NotFinite, match=r"4 of 16 rollouts \(rows \[12, .*; the weights are those of update 1 of this step"
    ):
        run(settings)


# ---- mistakes, each said before anything is lost --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, r"compares responses of a group and needs at least 2 per prompt, but group_size is 1"),
        ({"critic": "head"}, r"critic is 'head', but .* reads no values. Use gae"),
        ({"credit": gae()}, r"needs values, which nothing in this run supplies. Train with a critic \(--critic head"),
        ({"credit": capo()}, r"needs signals.judge, spans.step, which nothing in this run supplies. Give a judge"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": 500}, r"needs \d+ prompt tokens \+ 500 new ones, but the model's context has 128"),
        ({"prompts_per_step": 65}, r"a step needs 65 different problems, but the task has 64"),
        (
            {"warmup": 1, "max_new_tokens": 3},
            r"the worked solution of problem arithmetic-\w+ has \d+ tokens, but a response",
        ),
        ({"model": "smollm2-135m-instrukt"}, r"Did you mean 'smollm2-135m-instruct'"),
    ],
)
def test_options_that_do_not_fit_are_refused_and_leave_no_folder(config, digits, options, message):
    settings = config(task=digits, **options)
    with pytest.raises(ValueError, match=message):
        run(settings)
    assert not settings.folder.exists() or options.get("warmup")


def test_a_run_is_resumed_with_the_same_options_or_not_at_all(config, digits):
    run(config(task=digits, steps=1))
    with pytest.raises(ValueError, match=r"was started with lr=1e-05, but is resumed with 0.001"):
        run(config(task=digits, steps=2, lr=1e-3), resume=True)
    with pytest.raises(OSError, match="not empty"):
        run(config(task=digits, steps=1))
    run(config(task=digits, steps=2, micro_tokens=64, sample_rows=4), resume=True)  # as memory may demand


def test_a_run_is_not_resumed_on_other_problems(config, task):
    run(config(steps=1))
    other = arithmetic(terms=3, train=64, test=16, seed=1)  # as many problems, but not the same
    with pytest.raises(
        ValueError, match=r"was started with task='<task arithmetic: 64 train, 16 test, \w{8}>', but is resumed"
    ):
        run(config(steps=2, task=other), resume=True)


def test_a_judge_that_cannot_be_reached_is_found_before_the_model_is_loaded(config, digits):
    from apportion.signals import LLMJudge

    judge = LLMJudge(model="m", base_url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(ValueError, match=r"LLMJudge needs a chat model 'm' at http://127.0.0.1:9/v1"):
        run(config(task=digits, credit=capo(), judge=judge, splitter=lines(), model="/nowhere/at/all"))


def test_tensorboard_gets_the_metrics(config, digits):
    folder = run(config(task=digits, track="tensorboard", steps=1))
    assert list((folder / "tensorboard").glob("events.*"))


def test_run_json_can_be_read_by_a_script(config, digits):
    info = json.loads((run(config(task=digits, steps=1)) / "run.json").read_text())
    assert info["seed"] == 0
    assert info["config"]["lr"] == 1e-5
    assert info["versions"]["torch"]


def test_config_has_a_loss_term_for_each_option(config):
    settings: Config = config(kl_coef=0.1, entropy_coef=0.1, critic="head")
    assert [type(t).__name__ for t in settings.loss().terms] == [
        "PolicyGradient",
        "KLToReference",
        "EntropyBonus",
        "ValueLoss",
    ]
