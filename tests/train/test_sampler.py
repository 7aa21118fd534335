"""The sampler against the model's own forward pass, `generate`, and the distribution it should draw from."""

import pytest
import torch

from apportion.train.sampler import _batches, _choose, sample

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def draw(policy, sizes=(3, 1, 4), temperature=1.0, end_ids=(7, 21, 30, 90, 91, 92, 93), **options):
    return sample(
        policy.model,
        PROMPTS,
        list(sizes),
        max_new_tokens=12,
        end_ids=list(end_ids),
        pad_id=0,
        temperature=temperature,
        generator=torch.Generator().manual_seed(3),
        **options,
    )


def plain_logprobs(model, prompt, tokens, temperature):
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, 1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models_own_for_ragged_prompts_and_groups(policy, temperature):
    groups = draw(policy, temperature=temperature)
    assert [len(g) for g in groups] == [3, 1, 4]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for row in group:
            want = plain_logprobs(policy.model, prompt, row.tokens, temperature)
            torch.testing.assert_close(torch.tensor(row.logprobs), want, rtol=1e-5, atol=1e-5)


def test_rows_end_with_an_end_token_or_at_the_limit(policy):
    rows = [row for group in draw(policy, sizes=(40, 0, 40)) for row in group]
    assert {row.truncated for row in rows} == {True, False}
    for row in rows:
        ends = [t for t in row.tokens if t in (7, 21, 30, 90, 91, 92, 93)]
        assert ends == ([] if row.truncated else [row.tokens[-1]])
        assert len(row.tokens) == 12 or not row.truncated


def test_greedy_is_what_generate_writes(policy):
    for prompt, (row,) in zip(PROMPTS, draw(policy, sizes=(1, 1, 1), temperature=0.0), strict=True):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": [7, 21, 30, 90, 91, 92, 93]}
        want = policy.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        assert row.tokens == want[0, len(prompt) :].tolist()


def test_how_rows_are_batched_does_not_change_them(policy):
    together, apart = draw(policy, batch_rows=64), draw(policy, batch_rows=1)
    assert [[r.tokens for r in g] for g in together] == [[r.tokens for r in g] for g in apart]


def test_batches_keep_prompts_whole():
    assert _batches([3, 3, 3], 6) == [(0, 2), (2, 3)]
    assert _batches([9, 1], 6) == [(0, 1), (1, 2)]
    assert _batches([], 6) == []


def test_choice_is_the_inverse_of_the_distribution_function():
    # p = .5, .25, .25: the uniform numbers below .5 choose 0, below .75 choose 1, the others 2
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(5, 1)
    chosen, logp = _choose(logits, torch.tensor([0.0, 0.49, 0.51, 0.74, 0.999]), 1.0)
    assert chosen.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25]))
    # at temperature 0.5 the probabilities are squared and normalised: .6667, .1667, .1667
    chosen, logp = _choose(logits, torch.tensor([0.66, 0.67, 0.83, 0.84, 0.5]), 0.5)
    assert chosen.tolist() == [0, 1, 1, 2, 0]
    torch.testing.assert_close(logp.exp()[:2], torch.tensor([2 / 3, 1 / 6]))


def test_a_token_of_probability_zero_is_never_chosen():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    assert _choose(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), 1.0)[0].tolist() == [1, 1, 1]
