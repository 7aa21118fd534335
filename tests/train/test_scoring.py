"""What a second model says of every token, against its plain forward pass; and the cosine to a goal."""

import pytest
import torch

from apportion.credit import chain, grpo, oprl, potential, r_to_q, t_reg
from apportion.record import Run
from apportion.train import CausalPolicy, GoalCosine, ModelLogRatio, PromptContrast, Request, Sampling, goal_state, run
from conftest import build_tiny_model


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> str:
    """A second model with the same tokenizer, a longer context and other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    return str(build_tiny_model(folder, seed=1, context=1024))


def sampled(policy, task, sizes=(3, 1, 2)):
    return policy.sample(
        [Request(p, n) for p, n in zip(task.train, sizes, strict=False)],
        Sampling(max_new_tokens=10, temperature=policy.temperature),
        generator=torch.Generator().manual_seed(0),
    )


def plain_logprobs(model, ids: list[int], first: int, temperature=1.0) -> torch.Tensor:
    """ln p of ids[first:], one forward pass, no packing."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, first - 1 : -1] / temperature
    return logits.log_softmax(1).gather(1, torch.tensor(ids[first:])[:, None])[:, 0]


def rows_of(rollouts):
    """(row, its tokens, its first action)."""
    for b in range(rollouts.batch):
        ids = rollouts.tokens[b, : int(rollouts.lengths[b])].tolist()
        yield b, ids, int(rollouts.action_mask[b].nonzero()[0])


# ---- the log-ratio of two models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("given", ["name", "module"])
def test_the_log_ratio_is_the_scorers_logprob_less_the_policys(tiny_model, other_model, task, temperature, given):
    policy = CausalPolicy.load(tiny_model, precision="float32", temperature=temperature)
    scorer = CausalPolicy.load(other_model, precision="float32").model
    rollouts = sampled(policy, task)
    measure = ModelLogRatio(other_model if given == "name" else scorer, micro_tokens=60)
    measure.attach(policy)
    (found,) = measure.measure(rollouts).values()
    assert found.unit == "token"
    assert torch.equal(found.values.isnan(), ~rollouts.action_mask)
    for b, ids, first in rows_of(rollouts):
        want = plain_logprobs(scorer, ids, first, temperature) - plain_logprobs(policy.model, ids, first, temperature)
        torch.testing.assert_close(found.values[b, first : len(ids)], want, rtol=1e-4, atol=1e-4)


def test_the_acting_policy_as_its_own_scorer_gives_nothing(tiny_model, policy, task):
    measure = ModelLogRatio(tiny_model)
    measure.attach(policy)
    values = measure.measure(rollouts := sampled(policy, task))["log_ratio"].values[rollouts.action_mask]
    assert values.abs().max() < 1e-4


def test_the_reference_may_be_compared_with_instead(tiny_model, policy, task):
    rollouts = sampled(policy, task)
    rollouts = rollouts.replace(ref_logprobs=rollouts.logprobs - 1)
    measure = ModelLogRatio(tiny_model, against="ref_logprobs")
    assert measure.requires == ("tokens", "ref_logprobs")
    measure.attach(policy)
    values = measure.measure(rollouts)["log_ratio"].values[rollouts.action_mask]
    torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("against", ["logprobs", "ref_logprobs"])
def test_a_run_whose_credit_is_a_log_ratio(config, digits, other_model, against):
    measures = (ModelLogRatio(other_model, against=against),)
    folder = run(config(task=digits, credit=r_to_q(), measures=measures, eval_every=0, save_every=0))
    for step in (1, 2):
        credit = Run(folder).credit(step)
        assert credit.advantages.abs().max() > 0
        assert torch.equal(r_to_q()(Run(folder).rollouts(step)).advantages, credit.advantages)
    assert Run(folder).info["config"]["measures"] == f"(ModelLogRatio({other_model!r}, against={against!r}),)"


# ---- two prompts -------------------------------------------------------------------------------------------------------

BETTER, WORSE = "Do {question} well, not as {response}", "Spoil {question}, more than {response}"


def test_the_contrast_is_the_difference_of_two_plain_passes(policy, other_model, task):
    rollouts = sampled(policy, task)
    mask = rollouts.action_mask.clone()
    mask[0, int(mask[0].nonzero()[0]) + 1] = False  # a gap: context, not scored
    rollouts = rollouts.replace(action_mask=mask)
    measure = PromptContrast(other_model, BETTER, WORSE, micro_tokens=100)
    measure.attach(policy)
    values = measure.measure(rollouts)["contrast"].values
    assert torch.equal(values.isnan(), ~mask)
    model, tokenizer = measure.scorer.model, policy.tokenizer
    for b, ids, first in rows_of(rollouts):
        own = ids[first:]
        side = []
        for template in (BETTER, WORSE):
            response = tokenizer.decode(own, skip_special_tokens=True)
            text = template.format(question=rollouts.meta["question"][b], response=response)
            text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            side.append(plain_logprobs(model, prompt + own, len(prompt)))
        scored = mask[b, first : len(ids)]
        torch.testing.assert_close(
            values[b, first : len(ids)][scored], (side[0] - side[1])[scored], rtol=1e-4, atol=1e-4
        )


def test_equal_prompts_have_no_contrast_and_what_does_not_fit_is_not_measured(policy, other_model, task):
    rollouts = sampled(policy, task)
    same = PromptContrast(other_model, BETTER, BETTER)
    same.attach(policy)
    assert (same.measure(rollouts)["contrast"].values[rollouts.action_mask] == 0).all()
    long = PromptContrast(other_model, BETTER, WORSE + " very" * 300)
    long.attach(policy)
    assert long.measure(rollouts)["contrast"].values.isnan().all()


def test_the_librarys_own_prompts_through_the_loop(config, digits, other_model):
    credit = chain(grpo(), t_reg())
    measures = (PromptContrast(other_model),)
    folder = run(config(task=digits, credit=credit, measures=measures, steps=1, eval_every=0, save_every=0))
    rollouts = Run(folder).rollouts(1)
    assert torch.equal(rollouts.signals["contrast"].values.isnan(), ~rollouts.action_mask)
    assert torch.equal(credit(rollouts).advantages, Run(folder).credit(1).advantages)


# ---- a goal ------------------------------------------------------------------------------------------------------------


def test_the_cosine_of_each_state_to_the_goal_state(policy, task):
    rollouts = sampled(policy, task)
    states = []
    for _, ids, _ in rows_of(rollouts):
        with torch.no_grad():
            states.append(policy.model.model(torch.tensor([ids])).last_hidden_state[0])
    goal = torch.stack([h[-1] for h in states]).mean(0)
    torch.testing.assert_close(goal_state(policy, rollouts, micro_tokens=60), goal, rtol=1e-4, atol=1e-4)
    measure = GoalCosine(goal, micro_tokens=60)
    measure.attach(policy)
    values = measure.measure(rollouts)["goal_cosine"].values
    for b, h in enumerate(states):
        want = [float(x @ goal / x.norm() / goal.norm()) for x in h]
        torch.testing.assert_close(values[b, : len(h)], torch.tensor(want), rtol=1e-4, atol=1e-4)
        assert values[b, len(h) :].isnan().all()
    assert potential()(rollouts.with_signals(goal_cosine=measure.measure(rollouts)["goal_cosine"])).notes == {
        "unmeasured_tokens": 0.0
    }


# ---- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes(policy, other_model, tiny_model, task):
    rollouts = sampled(policy, task)
    with pytest.raises(ValueError, match=r"ModelLogRatio\('x', against='logprobs'\) is not attached to a policy"):
        ModelLogRatio("x").measure(rollouts)
    with pytest.raises(ValueError, match="against must be 'logprobs' or 'ref_logprobs'; got 'old'"):
        ModelLogRatio("x", against="old")
    with pytest.raises(ValueError, match=r"worsen needs \{response\} in its text; got 'Worse!'"):
        PromptContrast("x", worsen="Worse!")
    warm = CausalPolicy.load(tiny_model, precision="float32", temperature=0.7)
    with pytest.raises(
        ValueError, match=r"scores at temperature 0\.7, but the policy samples at 1\. Give both the same"
    ):
        ModelLogRatio(warm).attach(policy)
    measure = GoalCosine(torch.ones(5))
    measure.attach(policy)
    with pytest.raises(ValueError, match=r"the goal must have shape \[32\], as the states of the model; got \[5\]"):
        measure.measure(rollouts)
    contrast = PromptContrast(other_model)
    contrast.attach(policy)
    with pytest.raises(ValueError, match=r'PromptContrast needs tokens and meta\["question"\]'):
        contrast.measure(rollouts.replace(meta={}))


def test_a_model_that_knows_too_few_tokens_is_refused(policy):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    with pytest.raises(ValueError, match=r"knows 64 tokens, but the policy has 258"):
        ModelLogRatio(small).attach(policy)


def test_oprl_reads_what_is_measured(policy, other_model, task):
    assert "signals.log_ratio" in oprl().requires
    assert set(ModelLogRatio(other_model).provides) <= set(oprl().requires)
