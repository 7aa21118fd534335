"""What is read off logits and states, against the worked numbers and probabilities summed one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.signals import TOKEN_STATISTICS, entropy, goal_cosine, token_statistics

Z = [[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]]


def read(logits, ids, names=TOKEN_STATISTICS, temperature=1.0, dtype=torch.float64):
    return token_statistics(torch.tensor(logits, dtype=dtype), torch.tensor(ids), names=names, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_worked_self_certainties(dtype):
    found = read(Z, [0, 0], ("self_certainty",), dtype=dtype)["self_certainty"]
    torch.testing.assert_close(found, torch.tensor([1.967350, 1.386294], dtype=dtype), rtol=0, atol=1e-6)


def test_a_uniform_choice_of_four():
    found = read(Z[1:], [2])
    assert float(found["entropy"]) == pytest.approx(math.log(4))
    assert float(found["sum_pi_squared"]) == pytest.approx(1 / 4)
    assert float(found["sampled_logit"]) == 0


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6), st.data(), st.sampled_from([0.5, 1.0, 1.7]))
@settings(max_examples=50, deadline=None)
def test_every_statistic_is_its_sum_over_the_vocabulary(z, data, temperature):
    chosen = data.draw(st.integers(0, len(z) - 1))
    found = {name: float(value) for name, value in read([z], [chosen], temperature=temperature).items()}
    weights = [math.exp((x - max(z)) / temperature) for x in z]
    p = [w / sum(weights) for w in weights]
    uniform = 1 / len(z)
    assert found["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p if x > 0), abs=1e-9)
    divergence = sum(uniform * math.log(uniform / x) for x in p if x > 0)
    if all(p):
        assert found["self_certainty"] == pytest.approx(divergence + math.log(len(z)), abs=1e-9)
    assert found["sum_pi_squared"] == pytest.approx(sum(x * x for x in p), abs=1e-9)
    assert found["sampled_logit"] == z[chosen]  # whatever the temperature


def test_a_constant_moves_only_the_sampled_logit():
    plain, moved = read(Z, [1, 2]), read([[x + 7 for x in row] for row in Z], [1, 2])
    for name in TOKEN_STATISTICS:
        torch.testing.assert_close(moved[name], plain[name] + 7 * (name == "sampled_logit"))


def test_greedy_is_read_at_temperature_one_and_only_what_is_asked_for_in_its_order():
    names = ("sum_pi_squared", "entropy")
    greedy, plain = read(Z, [0, 0], names, temperature=0.0), read(Z, [0, 0], names)
    assert list(greedy) == list(names)
    assert all(torch.equal(greedy[n], plain[n]) for n in names)


def test_entropy_takes_any_leading_axes():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    want = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), want)


def test_the_worked_cosines_to_a_goal():
    states = torch.tensor([[1.0, 0.2], [0.8, 0.6], [-0.1, 1.0], [0.5, 0.5]], dtype=torch.float64)
    found = goal_cosine(states, torch.tensor([1.0, 0.5], dtype=torch.float64))
    want = torch.tensor([0.964764, 0.983870, 0.355995, 0.948683], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    assert float(goal_cosine(torch.zeros(2), torch.ones(2))) == 0
