"""The sampler against the model's own forward pass, `generate`, and the distribution it should draw from."""

from types import SimpleNamespace

import pytest
import torch

from apportion.train import Request, Sampling
from apportion.train.sampler import _batches, _choose, _likeliest, sample, uniform_numbers


def at(temperature):
    return Sampling(max_new_tokens=1, temperature=temperature)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


def draw(policy, sizes=(3, 1, 4), end_ids=(7, 21, 30, 90, 91, 92, 93), *, prompts=PROMPTS, seed=3, **options):
    """Groups of continuations; what `Sampling` does not know goes to `sample`."""
    own = {k: options.pop(k) for k in ("batch_rows", "statistics", "limits", "decode") if k in options}
    sampling = Sampling(**{"max_new_tokens": 12, **options})
    uniform = uniform_numbers(sum(sizes), sampling, torch.Generator().manual_seed(seed))
    return list(sample(policy.model, prompts, list(sizes), sampling, uniform, end_ids=end_ids, pad_id=0, **own))


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
    chosen, logp = _choose(logits, torch.tensor([0.0, 0.49, 0.51, 0.74, 0.999]), at(1.0))
    assert chosen.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25]))
    # at temperature 0.5 the probabilities are squared and normalised: .6667, .1667, .1667
    chosen, logp = _choose(logits, torch.tensor([0.66, 0.67, 0.83, 0.84, 0.5]), at(0.5))
    assert chosen.tolist() == [0, 1, 1, 2, 0]
    torch.testing.assert_close(logp.exp()[:2], torch.tensor([2 / 3, 1 / 6]))


def test_a_token_of_probability_zero_is_never_chosen():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    assert _choose(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), at(1.0))[0].tolist() == [1, 1, 1]


# ---- top_k and top_p --------------------------------------------------------------------------------------------------

P = torch.tensor([[0.1, 0.4, 0.15, 0.3, 0.05]])
GRID = (torch.arange(1000) + 0.5) / 1000


def shares(**options) -> list[float]:
    """How often each of the five tokens comes when the uniform numbers are a grid: the distribution, exactly."""
    sampling = Sampling(max_new_tokens=1, **options)
    chosen, logp = _choose(P.log().repeat(1000, 1), GRID, sampling)
    torch.testing.assert_close(logp, torch.log_softmax(P.log() / sampling.temperature, 1)[0, chosen])  # always the full
    return (torch.bincount(chosen, minlength=5) / 1000).tolist()


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"top_p": 0.7}, [0, 4 / 7, 0, 3 / 7, 0]),  # 0.4 + 0.3 reaches it
        ({"top_p": 0.71}, [0, 40 / 85, 15 / 85, 30 / 85, 0]),  # and no longer
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),  # one is always kept
        ({"top_p": 0.99}, [0.1, 0.4, 0.15, 0.3, 0.05]),
        ({"top_k": 3}, [0, 40 / 85, 15 / 85, 30 / 85, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.15, 0.3, 0.05]),
        ({"top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),  # 0.7 of the 0.85 that top_k left is 0.82
        ({"top_p": 0.7, "temperature": 0.5}, [0, 16 / 25, 0, 9 / 25, 0]),  # squares: 0.565 and 0.318 of the whole
    ],
)
def test_what_is_cut_and_how_often_the_rest_comes(options, want):
    assert shares(**options) == pytest.approx(want, abs=0.0011)


def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_plain_sort():
    torch.manual_seed(0)
    p = torch.softmax(torch.randn(6, 5000) * torch.tensor([[0.1], [0.5], [1.0], [2.0], [4.0], [9.0]]), 1)
    for top_p in (0.3, 0.9, 0.999):
        kept, ids = _likeliest(p, 0, top_p)
        for row in range(6):
            largest, order = p[row].sort(descending=True)
            size = int((largest.cumsum(0) < top_p).sum()) + 1
            assert set(ids[row][kept[row] > 0].tolist()) == set(order[:size].tolist())


def test_one_likeliest_token_is_greedy(policy):
    assert [[r.tokens for r in g] for g in draw(policy, top_k=1)] == [
        [r.tokens for r in g] for g in draw(policy, temperature=0.0)
    ]


def test_a_run_draws_from_the_nucleus_and_records_the_full_distribution(policy):
    groups = draw(policy, top_p=0.3, temperature=0.7)
    assert [[r.tokens for r in g] for g in groups] != [[r.tokens for r in g] for g in draw(policy, temperature=0.7)]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for row in group:
            logits = policy.model(torch.tensor([prompt + row.tokens])).logits[0, len(prompt) - 1 : -1].float()
            p = torch.softmax(logits / 0.7, 1)
            own = p.gather(1, torch.tensor(row.tokens)[:, None])
            before = torch.where(p > own, p, 0.0).sum(1)  # what is likelier than the token
            assert (before < 0.3 + 1e-5).all()
            torch.testing.assert_close(torch.tensor(row.logprobs), own[:, 0].log(), rtol=1e-4, atol=1e-5)


# ---- where a response ends --------------------------------------------------------------------------------------------

WORDS = ["<end>", "a", "ab", "bc", "c", "abc", " ", "-"]
END, A, AB, BC, C, ABC, SPACE, DASH = range(8)


class Scripted:
    """A model that writes what the last token of a prompt names, in the shape that the sampler asks for."""

    device = torch.device("cpu")

    def __init__(self, *scripts: list[int]):
        self.scripts = scripts

    def __call__(self, input_ids, past_key_values=None, **_):
        cache = past_key_values or Places(input_ids[:, -1])
        cache.step += past_key_values is not None
        rows = [self.scripts[s] for s in cache.script.tolist()]
        following = torch.tensor([row[cache.step] if cache.step < len(row) else SPACE for row in rows])
        logits = torch.nn.functional.one_hot(following, len(WORDS)).float()[:, None] * 100
        return SimpleNamespace(logits=logits, past_key_values=cache)


class Places:
    """Stands for the cache."""

    def __init__(self, script: torch.Tensor):
        self.script, self.step = script, 0

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        self.script = self.script[rows]


def written(*scripts: list[int], limits=None, **options) -> list:
    model = Scripted(*scripts)
    sampling = Sampling(**{"max_new_tokens": 6, **options})
    uniform = uniform_numbers(len(scripts), sampling, torch.Generator().manual_seed(0))
    prompts, sizes = [[i] for i in range(len(scripts))], [1] * len(scripts)
    decode = lambda ids: "".join(WORDS[i] for i in ids)  # noqa: E731
    groups = sample(model, prompts, sizes, sampling, uniform, end_ids=[END], pad_id=0, decode=decode, limits=limits)
    return [(row.tokens, row.truncated) for (row,) in groups]


def test_a_stop_text_ends_the_row_with_the_token_that_completes_it():
    rows = written(
        [A, BC, C, END],  # over two tokens
        [SPACE, ABC, C],  # inside one token
        [A, AB, C, C, END],  # begins inside a token
        [A, SPACE, BC, END],  # not contiguous
        [BC, C, A, DASH, DASH, A],  # never
        stop=("abc",),
    )
    assert rows == [
        ([A, BC], False),
        ([SPACE, ABC], False),
        ([A, AB, C], False),
        ([A, SPACE, BC, END], False),
        ([BC, C, A, DASH, DASH, A], True),
    ]


def test_several_stop_texts_and_special_tokens():
    assert written([A, DASH, END], [C, SPACE, END], [A, END, A], stop=("a-", "c ", "a<end>")) == [
        ([A, DASH], False),
        ([C, SPACE], False),
        ([A, END], False),
    ]


def test_nothing_ends_before_the_least_length():
    (row,) = written([A, END, A], min_new_tokens=2, max_new_tokens=4)  # <end> is not drawn, something else is
    assert END not in row[0][:2]
    (row,) = written([A, C, END, A], min_new_tokens=2)
    assert row == ([A, C, END], False)
    # a text completed too early does not end the row later either; completed again, it does
    (row,) = written([A, BC, C, C, A, BC], min_new_tokens=2, stop=("abc",))
    assert row == ([A, BC, C, C, A, BC], False)
    (row,) = written([A, BC, C], min_new_tokens=1, stop=("abc",))
    assert row == ([A, BC], False)


def test_the_least_length_bars_end_tokens_and_leaves_the_logprobs(policy):
    ends = (7, 21, 30, 90, 91, 92, 93)
    free = [r for g in draw(policy, sizes=(40, 1, 40)) for r in g]
    held = [r for g in draw(policy, sizes=(40, 1, 40), min_new_tokens=8) for r in g]
    assert min(len(r.tokens) for r in free) < 8
    for row in held:
        assert not set(row.tokens[:8]) & set(ends)
    assert {r.truncated for r in held} == {True, False}
    want = plain_logprobs(policy.model, PROMPTS[0], held[0].tokens, 1.0)
    torch.testing.assert_close(torch.tensor(held[0].logprobs), want, rtol=1e-5, atol=1e-5)


def test_a_prompt_may_have_a_limit_of_its_own(policy):
    whole = draw(policy, end_ids=(7,))
    short = draw(policy, end_ids=(7,), limits=[12, 3, 5])
    for limit, a, b in zip((12, 3, 5), whole, short, strict=True):
        for x, y in zip(a, b, strict=True):
            assert y.tokens == x.tokens[:limit]
            assert y.truncated == (x.truncated or len(x.tokens) > limit)


def test_stop_texts_of_a_real_tokenizer(policy, task):
    requests = [Request(p, n) for p, n in zip(task.train, (20, 1, 12), strict=False)]
    generator = torch.Generator().manual_seed(0)
    texts = ("e", "7", "Q", "%", "é")
    rollouts = policy.sample(requests, Sampling(max_new_tokens=24, stop=texts), generator=generator)
    assert torch.bincount(rollouts.group_ids).tolist() == [20, 1, 12]  # groups of different sizes
    for b in range(rollouts.batch):
        pieces = [p for p, own in zip(rollouts.meta["pieces"][b], rollouts.action_mask[b], strict=False) if own]
        stopped = [i for i, piece in enumerate(pieces) if any(t in piece for t in texts)]
        assert stopped in ([], [len(pieces) - 1])
        if stopped:
            assert not rollouts.truncated[b]
    assert 5 < int(rollouts.truncated.sum()) < 28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, "top_p must lie above 0 and not above 1; got 0.0"),
        ({"top_k": -1}, "top_k must be at least 0; got -1"),
        ({"min_new_tokens": 13}, "min_new_tokens must lie in 0..max_new_tokens; got 13"),
        ({"stop": ("a", "")}, "stop must hold texts, none of them empty"),
        ({"stop": "ab"}, "stop must hold texts"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 12, **options})
