"""CAPO with a language-model judge inside the training loop, talking to a server on loopback."""

import json

import pytest
import torch

from apportion.credit import capo
from apportion.record import Run
from apportion.signals import LLMJudge, pattern
from apportion.train import run


def test_verdicts_become_credit_and_broken_replies_are_counted(config, digits, serve):
    """Critique 0 calls step 1 wrong, critique 1 is broken: of the usable ones all call it wrong, so it pays."""

    def act(request, number):
        if "random English words" in json.dumps(request["messages"]):
            return f"words {number}"
        return '{"wrong_steps": [1]}' if request["seed"] == 0 else "I cannot say."

    judge = LLMJudge(model="judge", base_url=serve(act).url, critiques=2, seed=0)
    folder = run(config(task=digits, credit=capo(), judge=judge, splitter=pattern(r"[a-m]"), steps=1, eval_every=0))
    rollouts, credit = Run(folder).rollouts(1), Run(folder).credit(1)
    verdicts, index = rollouts.signals["judge"].values, rollouts.spans["step"].index
    assert verdicts[:, 1].isnan().all()
    assert torch.equal(verdicts[:, 0], (index == 0).float())
    assert set(index.tolist()) > {0}  # some response has a second step, which is not wrong
    metrics = Run(folder).metrics("train")[0]
    assert metrics["judge/unusable"] == metrics["judge/calls"] / 2 > 0
    wrong = rollouts.at_tokens(credit.parts["judge"])[rollouts.action_mask]
    assert wrong.min() < 0
    assert torch.equal(capo()(rollouts).advantages, credit.advantages)


def test_a_judge_that_repeats_itself_is_refused_before_training(config, digits, serve):
    judge = LLMJudge(model="judge", base_url=serve(lambda request, number: "the same words").url, critiques=2)
    settings = config(task=digits, credit=capo(), judge=judge, splitter=pattern(r"[a-m]"))
    with pytest.raises(ValueError, match="do_sample"):
        run(settings)
    assert not settings.folder.exists()
