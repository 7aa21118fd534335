"""Statistics of the policy reach credit: from the sampler, or from the learner for rollouts that came without."""

from dataclasses import replace

import pytest
import torch

from apportion.credit import attention_rhythm, estimator, grpo, ucas
from apportion.credit._base import assemble
from apportion.record import Run
from apportion.signals import TOKEN_STATISTICS, AttentionRhythm, fixed_ngrams
from apportion.train import CausalPolicy, Request, Sampling, SpansFrom, run
from apportion.train.learner import in_parts
from apportion.train.measuring import measured, measures_of, required, statistics_of, with_statistics
from apportion.types import Credit, Rollouts, Signal


@estimator(requires=("signals.{signal}", "signals.outcome"))
def times_outcome(rollouts: Rollouts, *, signal: str = "entropy") -> Credit:
    """The outcome at each token, weighed by a token signal."""
    outcome = rollouts.at_tokens(rollouts.signals["outcome"]).double() + 1
    values = torch.where(rollouts.action_mask, rollouts.signals[signal].values.double(), 0.0)
    return assemble(rollouts, rollouts.action_mask, {"weighed": Signal(values * outcome, "token")})


def sampled(policy: CausalPolicy, task, statistics=(), temperature=1.0, sizes=(4, 1, 3)) -> Rollouts:
    return policy.sample(
        [Request(p, n) for p, n in zip(task.train, sizes, strict=False)],
        Sampling(max_new_tokens=10, temperature=temperature),
        generator=torch.Generator().manual_seed(0),
        statistics=statistics,
    )


# ---- sampler and learner ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_takes_what_the_learner_takes(tiny_model, task, temperature):
    policy = CausalPolicy.load(tiny_model, precision="float32", temperature=temperature)
    rollouts = sampled(policy, task, TOKEN_STATISTICS, temperature)
    assert rollouts.lengths.unique().numel() > 1  # rows end at different places, so that some were dropped on the way
    again = policy.statistics(rollouts, rollouts.action_mask, TOKEN_STATISTICS)
    for name, column in zip(TOKEN_STATISTICS, again.unbind(2), strict=True):
        values = rollouts.signals[name].values
        assert torch.equal(values.isnan(), ~rollouts.action_mask)  # prompt and padding are not measured
        torch.testing.assert_close(values, column, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_they_are_those_of_the_models_own_logits(policy, task):
    rollouts = sampled(policy, task, TOKEN_STATISTICS)
    row = int(rollouts.action_mask.sum(1).argmax())
    t = int(rollouts.action_mask[row].nonzero()[2])
    logits = policy.model(rollouts.tokens[row : row + 1, :t]).logits[0, -1].detach().double()
    p = logits.softmax(0)
    want = {
        "entropy": -(p * p.log()).sum(),
        "self_certainty": logits.logsumexp(0) - logits.mean(),
        "sampled_logit": logits[rollouts.tokens[row, t]],
        "sum_pi_squared": (p * p).sum(),
    }
    for name, value in want.items():
        assert float(rollouts.signals[name].values[row, t]) == pytest.approx(float(value), rel=1e-4, abs=1e-5)


def test_asking_changes_neither_tokens_nor_logprobs_and_nothing_is_taken_unasked(policy, task):
    plain, asked = sampled(policy, task), sampled(policy, task, ("entropy",))
    assert torch.equal(plain.tokens, asked.tokens)
    assert torch.equal(plain.logprobs, asked.logprobs)
    assert (set(plain.signals), set(asked.signals)) == (set(), {"entropy"})


def test_what_the_sampler_took_stays_and_the_learner_adds_what_is_absent(policy, task):
    marked = Signal(torch.full((8, 1), 7.0), "token")
    rollouts = sampled(policy, task)
    rollouts = rollouts.with_signals(entropy=replace(marked, values=marked.values.expand(rollouts.action_mask.shape)))
    found = with_statistics(rollouts, policy, ["entropy", "sum_pi_squared"], 10_000)
    assert (found.signals["entropy"].values == 7).all()
    small = with_statistics(rollouts, policy, ["sum_pi_squared"], 40).signals["sum_pi_squared"].values
    torch.testing.assert_close(found.signals["sum_pi_squared"].values, small, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert with_statistics(rollouts, policy, ["entropy"], 40) is rollouts


def test_in_bfloat16_they_describe_the_copy_that_sampled(tiny_model, task):
    policy = CausalPolicy.load(tiny_model, precision="bfloat16")
    rollouts = sampled(policy, task, ("sum_pi_squared",))
    row, t = rollouts.action_mask.nonzero()[1].tolist()
    logits = policy.acting_model(rollouts.tokens[row : row + 1, :t]).logits[0, -1].float()
    want = float(logits.softmax(0).square().sum())
    assert float(rollouts.signals["sum_pi_squared"].values[row, t]) == pytest.approx(want, rel=0.05)
    gap = (
        policy.statistics(rollouts, rollouts.action_mask, ("sum_pi_squared",))[..., 0][rollouts.action_mask]
        - rollouts.signals["sum_pi_squared"].values[rollouts.action_mask]
    )
    assert 0 < gap.abs().max() < 0.1


def test_parts_come_back_in_the_order_of_the_rows(policy, task):
    rollouts = sampled(policy, task).select(torch.tensor([5, 0, 7, 2, 4, 1, 6, 3]))
    ids = in_parts(rollouts, 40, lambda part: part.tokens.double())
    assert torch.equal(ids, rollouts.tokens.double())


# ---- who asks, and who supplies ----------------------------------------------------------------------------------------


def test_only_requires_asks(config):
    assert statistics_of(config(credit=grpo())) == ["entropy"]
    assert measures_of(config(credit=grpo())) == []
    assert statistics_of(config(credit=ucas())) == ["entropy", "self_certainty", "sampled_logit"]
    assert statistics_of(config(credit=times_outcome(signal="sum_pi_squared"))) == ["entropy", "sum_pi_squared"]
    (measure,) = measures_of(config(credit=attention_rhythm()))
    assert isinstance(measure, AttentionRhythm)
    assert statistics_of(config(credit=attention_rhythm())) == ["entropy"]


class Entropies:
    """A measure of the user's own that provides the entropy, from ref_logprobs."""

    provides, requires = ("signals.entropy",), ("ref_logprobs",)

    def measure(self, rollouts):
        return {"entropy": Signal(-rollouts.ref_logprobs, "token")}


def test_a_measure_of_the_users_own_wins_and_what_it_requires_is_supplied(config):
    own = Entropies()
    settings = config(credit=times_outcome(), measures=(own, AttentionRhythm(window=3)))
    assert measures_of(settings) == [own]
    assert statistics_of(settings) == []
    assert "ref_logprobs" in required(settings)
    mine = AttentionRhythm(window=3)
    assert measures_of(config(credit=attention_rhythm(), measures=(mine,))) == [mine]


def test_what_only_a_second_model_knows_is_refused_with_the_cure(config):
    for signal, cure in {
        "log_ratio": "ModelLogRatio",
        "contrast": "PromptContrast",
        "goal_cosine": "GoalCosine",
    }.items():
        with pytest.raises(ValueError, match=rf"signals.{signal}, which nothing in this run supplies. Give .*{cure}"):
            measures_of(config(credit=times_outcome(signal=signal)))


def test_a_measure_may_cut_spans(config, policy, task):
    @estimator(requires=("spans.macro", "signals.outcome"))
    def by_macro(rollouts: Rollouts) -> Credit:
        """Nothing."""
        return assemble(rollouts, rollouts.action_mask, {})

    settings = config(credit=by_macro(), measures=(SpansFrom("macro", fixed_ngrams(3)),))
    rollouts = measured(sampled(policy, task), policy, settings, measures_of(settings), 0.0)
    assert {int(n) for n in rollouts.spans["macro"].stop - rollouts.spans["macro"].start} <= {1, 2, 3}
    with pytest.raises(ValueError, match=r"needs spans\.macro, which nothing in this run supplies"):
        measures_of(config(credit=by_macro()))


# ---- through the loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["entropy", "self_certainty", "sampled_logit", "sum_pi_squared"])
def test_a_run_whose_credit_reads_a_statistic(config, digits, signal):
    folder = run(config(task=digits, credit=times_outcome(signal=signal), eval_every=0, save_every=0))
    for step in (1, 2):
        rollouts, credit = Run(folder).rollouts(step), Run(folder).credit(step)
        assert torch.equal(rollouts.signals[signal].values.isnan(), ~rollouts.action_mask)
        assert torch.equal(times_outcome(signal=signal)(rollouts).advantages, credit.advantages)
        assert credit.advantages.abs().max() > 0


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2}, {"precision": "bfloat16"}], ids=["plain", "lora", "bfloat16"]
)
def test_a_run_whose_credit_reads_attention_leaves_the_model_as_it_was(config, digits, options):
    credit = attention_rhythm(min_length=2)
    folder = run(config(task=digits, credit=credit, eval_every=0, save_every=0, **options))
    for step in (1, 2):
        rollouts = Run(folder).rollouts(step)
        for name in ("waad", "fai"):
            assert torch.equal(rollouts.signals[name].values.isnan(), ~rollouts.action_mask)
        assert rollouts.signals["waad"].values.nanmean() > 0
        assert torch.equal(credit(rollouts).advantages, Run(folder).credit(step).advantages)


def test_the_loop_measures_the_acting_policys_attention(config, digits, policy, task):
    rollouts = sampled(policy, task)
    settings = config(credit=attention_rhythm())
    (measure,) = measures_of(settings)
    measure.attach(policy)
    found = measured(rollouts, policy, settings, [measure], 0.0)
    want = AttentionRhythm(policy.model).measure(rollouts)
    for name in ("waad", "fai"):
        torch.testing.assert_close(found.signals[name].values, want[name].values, equal_nan=True)
    assert policy.model.config._attn_implementation == "sdpa"


def test_a_run_with_a_reference_only_a_measure_asks_for_resumes(config, digits, tmp_path):
    options = {"task": digits, "credit": times_outcome(), "measures": (Entropies(),), "eval_every": 0}
    whole = run(config(out=str(tmp_path / "whole"), steps=2, **options))
    run(config(out=str(tmp_path / "parts"), steps=1, **options))
    parts = run(config(out=str(tmp_path / "parts"), steps=2, **options), resume=True)
    assert torch.equal(Run(whole).credit(2).advantages, Run(parts).credit(2).advantages)


@pytest.mark.parametrize("method", ["ucas", "attention_rhythm(min_length=2)"])
def test_the_command_line_needs_no_further_flag(tiny_model, tmp_path, method):
    from apportion.cli.main import main

    small = "--steps 2 --prompts-per-step 2 --group-size 2 --max-new-tokens 8 --eval-every 0 --save-every 0"
    quiet = "--no-progress --no-save-model --precision float32"
    task = "arithmetic(terms=2, train=32, test=8)"
    options = ["--model", tiny_model, "--task", task, "--credit", method, "--out", str(tmp_path / "run")]
    assert main(["train", *options, *small.split(), *quiet.split()]) == 0
    assert Run(tmp_path / "run").steps() == [1, 2]


def test_the_default_path_measures_the_entropy_while_it_samples_and_nothing_else(config, digits, monkeypatch):
    monkeypatch.setattr(CausalPolicy, "statistics", None)
    folder = run(config(task=digits, credit=grpo(), eval_every=0, save_every=0))
    assert set(Run(folder).rollouts(1).signals) == {"outcome", "entropy"}
