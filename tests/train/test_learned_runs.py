"""Whole runs in which something learns beside the policy: a critic, OPRL's reward model, LaRe's decoders."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion import Signal, chain, gae, lare, oprl, whiten
from apportion.record import Run
from apportion.signals import FactorFunction, LinearDecoder, MLPDecoder, fixed_ngrams
from apportion.tasks import arithmetic
from apportion.train import run
from apportion.train.critic import explained
from apportion.train.online_prm import OnlinePRM
from conftest import build_tiny_model


def numbers(folder: Path) -> list[dict]:
    """Every recorded number but the times."""
    return [{k: v for k, v in m.items() if not k.startswith("seconds")} for m in Run(folder).metrics()]


def column(folder: Path, name: str) -> list[float]:
    return [m[name] for m in Run(folder).metrics("train")]


def checkpoint(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "checkpoints").glob("*.pt")
    return torch.load(file, weights_only=True)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def equal(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors inside included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def resumed_runs(config, tmp_path, steps: int, measures=tuple, **options) -> Path:
    """A run in one piece and one that stops in the middle and is resumed must agree; returns the former."""
    common = {"eval_every": 0, "save_every": 1, **options}
    whole = run(config(out=str(tmp_path / "whole"), steps=steps, measures=measures(), **common))
    parts = str(tmp_path / "parts")
    run(config(out=parts, steps=steps // 2, measures=measures(), **common))
    assert checkpoint(Path(parts))["step"] == steps // 2
    run(config(out=parts, steps=steps, measures=measures(), **common), resume=True)
    assert numbers(Path(parts)) == numbers(whole)
    assert equal(checkpoint(Path(parts)), checkpoint(whole))
    return whole


# ---- PPO -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["head", "model"])
def test_ppo_with_a_critic_learns_the_tiny_arithmetic_task(config, tmp_path, critic):
    """Sums of two digits after a short warm-up. 320 responses make a mean, whose standard error is below 0.03."""
    model = build_tiny_model(tmp_path / "model", hidden=64)
    folder = run(
        config(
            model=str(model),
            task=arithmetic(terms=2, operators="+", train=48, test=8),
            credit=chain(gae(lam=1.0), whiten()),
            critic=critic,
            critic_lr={"head": 1e-2, "model": 2e-3}[critic],
            value_coef=1.0,
            value_clip=None,
            inner_epochs=2,
            mini_batches=2,
            warmup=50,
            warmup_lr=3e-3,
            warmup_batch=32,
            steps=30,
            prompts_per_step=16,
            group_size=4,
            max_new_tokens=9,
            lr=5e-4,
            eval_every=0,
            save_every=0,
        )
    )
    rewards = column(folder, "reward")
    assert mean(rewards[:5]) < 0.2
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.2


class EasyAndHard:
    """Problems whose second number is above 5 are always right, all others always wrong: what a critic should foresee."""

    name = "easy"
    splitter = judge = None

    def __init__(self, task):
        self.train, self.test = task.train, task.test

    def __repr__(self) -> str:
        return self.name

    def verify(self, problem, text) -> float:
        return float(problem.question[2] in "6789")


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"critic": "head", "critic_lr": 1e-2, "lr": 3e-3}, 0.1),  # the loss of the values reaches the body
        ({"critic": "model", "critic_lr": 3e-3, "lr": 1e-9, "inner_epochs": 2}, 0.5),
    ],
    ids=["head", "model"],
)
def test_a_critic_comes_to_foretell_the_returns(config, task, options, least):
    folder = run(
        config(
            task=EasyAndHard(task),
            credit=gae(lam=1.0),
            value_coef=1.0,
            value_clip=None,
            steps=30,
            prompts_per_step=8,
            group_size=8,
            max_new_tokens=6,
            eval_every=0,
            save_every=0,
            **options,
        )
    )
    known = [explained(Run(folder).rollouts(s), Run(folder).credit(s))["value/explained"] for s in range(1, 31)]
    assert known[0] == pytest.approx(0, abs=1e-6)  # V = 0 everywhere
    assert mean(known[:5]) < 0.1
    assert mean(known[-10:]) > least
    assert column(folder, "value/explained") == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"critic_warmup": 1, "inner_epochs": 2, "mini_batches": 2},
        {"lora_rank": 2, "precision": "bfloat16", "warmup": 1},
    ],
    ids=["mini-batches", "adapter-bfloat16"],
)
def test_a_critic_with_a_model_of_its_own_resumes_to_the_same_numbers(config, task, tmp_path, options):
    settings = {"task": CountTask(task), "credit": gae(), "critic": "model", "critic_lr": 1e-3}
    whole = resumed_runs(config, tmp_path, 4, **settings, **options)
    (saved,) = checkpoint(whole)["learned"]
    assert saved["updates"] == 4
    assert saved["weights"]["value_head.bias"] != 0
    assert len({m["value/error"] for m in Run(whole).metrics("train")}) == 4


# ---- OPRL ------------------------------------------------------------------------------------------------------------------


class EvenTask(EasyAndHard):
    """The last letter should be an even digit."""

    name = "even"

    def verify(self, problem, text) -> float:
        return float(text[-1:] in tuple("02468"))


def test_oprl_learns_which_responses_are_better(config, tmp_path):
    """The policy stands still after its warm-up, so new responses of equal kind are ranked at every step."""
    model = build_tiny_model(tmp_path / "model", hidden=64)
    folder = run(
        config(
            measures=(OnlinePRM(lr=3e-3),),
            model=str(model),
            task=EvenTask(arithmetic(terms=2, operators="+", train=48, test=8)),
            credit=oprl(spans="step"),
            splitter=fixed_ngrams(4),
            warmup=60,
            warmup_lr=3e-3,
            warmup_batch=32,
            steps=24,
            prompts_per_step=12,
            group_size=8,
            max_new_tokens=9,
            lr=1e-9,
            eval_every=0,
            save_every=0,
        )
    )
    loss, ranked = column(folder, "prm/loss"), column(folder, "prm/ranked")
    assert loss[0] == pytest.approx(math.log(2), abs=1e-3)  # phi is the policy after the warm-up
    assert mean(loss[1:5]) > 0.6
    assert mean(loss[-5:]) < 0.5
    assert mean(ranked[1:5]) < 0.7
    assert mean(ranked[-5:]) > 0.8
    first, last = (Run(folder).rollouts(s).signals["log_ratio"].values.nan_to_num() for s in (1, 24))
    assert first.abs().max() < 1e-3
    assert last.abs().max() > 0.5
    parts = [Run(folder).rollouts(24).at_tokens(x) for x in Run(folder).credit(24).parts.values()]
    assert all(part.abs().max() > 0.1 for part in parts)  # the outcome's and the learnt one


@pytest.mark.parametrize(
    "options",
    [{"warmup": 1}, {"lora_rank": 2, "precision": "bfloat16"}],
    ids=["copy-of-the-warmed-up-model", "copy-of-the-adapter"],
)
def test_oprl_resumes_to_the_same_numbers(config, task, tmp_path, options):
    whole = resumed_runs(
        config,
        tmp_path,
        4,
        measures=lambda: (OnlinePRM(lr=1e-3),),
        task=CountTask(task),
        credit=oprl(spans="step"),
        splitter=fixed_ngrams(4),
        lr=1e-4,
        **options,
    )
    assert len({m["prm/loss"] for m in Run(whole).metrics("train")}) == 4
    (saved,) = checkpoint(whole)["learned"]
    assert saved["updates"] == 4
    assert any(not torch.equal(p, checkpoint(whole)["weights"][k]) for k, p in saved["weights"].items())


# ---- LaRe ------------------------------------------------------------------------------------------------------------------

COUNTS = """
def factors(states, actions):
    digit = (states >= 48) & (states < 58)
    return [digit.sum(1, keepdims=True), actions]
"""


@dataclass
class StepFactors:
    """Two factors of a step, by code such as a language model would write: how many of its letters are digits, how long it is."""

    code: FactorFunction

    provides = ("signals.factors",)
    requires = ("spans.step", "tokens")

    def measure(self, rollouts):
        spans, pieces = rollouts.spans["step"], rollouts.meta["pieces"]
        where = zip(spans.row.tolist(), spans.start.tolist(), spans.stop.tolist(), strict=True)
        texts = ["".join(pieces[row][start:stop]) for row, start, stop in where]
        letters = [[float(ord(c)) for c in text] + [0.0] * (max(map(len, texts)) - len(text)) for text in texts]
        found = self.code(letters, (spans.stop - spans.start)[:, None])
        return {"factors": Signal(found.float(), "step", ("factors",))}


class CountTask(EasyAndHard):
    """The more digits the better."""

    name = "count"

    def verify(self, problem, text) -> float:
        return 0.5 * sum(c in "0123456789" for c in text)


@pytest.mark.parametrize(
    ("decoder", "credit", "error"),
    [
        (lambda: LinearDecoder(), lare(form="centred"), 1e-5),
        (lambda: MLPDecoder(layers=2, width=16, rate=1e-2, steps=10, samples=None), chain(lare(), whiten()), 0.1),
    ],
    ids=["linear", "network"],
)
def test_lare_learns_what_the_factors_are_worth_and_resumes_to_the_same_numbers(
    config, task, tmp_path, decoder, credit, error
):
    code = FactorFunction(COUNTS)
    whole = resumed_runs(
        config,
        tmp_path,
        12,
        measures=lambda: (StepFactors(code), decoder()),
        task=CountTask(task),
        credit=credit,
        splitter=fixed_ngrams(4),
        prompts_per_step=6,
        group_size=6,
        max_new_tokens=12,
    )
    code.close()
    first, last = Run(whole).rollouts(1), Run(whole).rollouts(12)
    assert first.signals["decoded"].values.isnan().all()  # no episode has taught yet
    assert Run(whole).credit(1).advantages.abs().max() == 0
    off = last.signals["decoded"].values - 0.5 * last.signals["factors"].values[:, 0]
    assert last.signals["factors"].values[:, 0].max() >= 1
    assert off.abs().mean() < error
    assert Run(whole).credit(12).advantages.abs().max() > 0
    loss = column(whole, "decoder/loss")
    assert loss[-1] < max(0.5 * loss[0], 1e-9)
    (saved,) = checkpoint(whole)["learned"]
    assert saved.keys() == decoder().state_dict().keys()
