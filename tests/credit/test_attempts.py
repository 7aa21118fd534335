import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, Spans, rloo, score, self_correction
from reference.batches import random_batch
from reference.loops import blank, episodes, mean, put, table_of

NAN = float("nan")
DTYPES = {torch.float64: {"rtol": 0, "atol": 5.1e-7}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}
R1, R2 = [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]
KL1, KL2 = [0.2, 0.1, 0.3, 0.1], [0.4, 0.2, 0.1, 0.3]


def dialogues(r1=R1, r2=R2, kl1=KL1, kl2=KL2, dtype=torch.float64) -> Rollouts:
    """Four rows of an instruction between two attempts of one and two tokens; the second token holds no divergence."""
    kl = [[a, 9.0, b, 0.0] for a, b in zip(kl1, kl2, strict=True)]
    reward = torch.tensor([x for pair in zip(r1, r2, strict=True) for x in pair], dtype=dtype)
    return Rollouts.from_lists(
        [[1, 0, 2, 3]] * len(r1),
        [0] * len(r1),
        action_mask=[[True, False, True, True]] * len(r1),
        logprobs=kl,
        ref_logprobs=[[0.0] * 4] * len(r1),
        spans={"attempt": Spans.from_lists([[(0, 1), (2, 4)]] * len(r1))},
        signals={"attempt_reward": Signal(reward, "attempt")},
        dtype=dtype,
    )


def columns(credit) -> tuple[torch.Tensor, torch.Tensor]:
    """The advantages of the first and of the second attempts; both tokens of the second are alike."""
    assert torch.equal(credit.advantages[:, 2], credit.advantages[:, 3])
    assert not credit.mask[:, 1].any()
    return credit.advantages[:, 0], credit.advantages[:, 2]


def above_others(rewards: list[float]) -> list[float]:
    return [x - mean([y for j, y in enumerate(rewards) if j != i]) for i, x in enumerate(rewards)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_second_stage(dtype):
    first, second = columns(score(dialogues(dtype=dtype)))
    want = [-0.667, 0.667667, 0.665, -0.665667], [13.998, 0.667333, -13.998, -0.667333]
    torch.testing.assert_close(first, torch.tensor(want[0], dtype=dtype), **DTYPES[dtype])
    torch.testing.assert_close(second, torch.tensor(want[1], dtype=dtype), **DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_worked_first_stage(dtype):
    """The printed rewards, above the mean of the others'."""
    first, second = columns(score(dialogues(dtype=dtype), stage=1))
    want = above_others([-0.02, -0.01, -0.03, -0.01]), above_others([0.996, 0.998, -0.001, -0.003])
    torch.testing.assert_close(first, torch.tensor(want[0], dtype=dtype), **DTYPES[dtype])
    torch.testing.assert_close(second, torch.tensor(want[1], dtype=dtype), **DTYPES[dtype])


def test_worked_parts():
    """Each part is a reward of its own above the others': [1, 1, 0, 0], the bonus [10, 0, -10, 0], the penalty."""
    parts = score(dialogues()).parts
    want = {
        "attempt_reward": (above_others(R1), above_others(R2)),
        "bonus": ([0.0] * 4, above_others([10.0, 0.0, -10.0, 0.0])),
        "kl": (above_others([-0.01 * x for x in KL1]), above_others([-0.01 * x for x in KL2])),
    }
    assert set(parts) == set(want)
    for name, (first, second) in want.items():
        assert parts[name].unit == "attempt"
        torch.testing.assert_close(parts[name].values[::2], torch.tensor(first, dtype=torch.float64))
        torch.testing.assert_close(parts[name].values[1::2], torch.tensor(second, dtype=torch.float64))


def test_worked_metrics():
    notes = score(dialogues()).notes
    want = {"acc_t1": 0.5, "acc_t2": 0.5, "delta": 0.0, "i_to_c": 0.25, "c_to_i": 0.25, "unmeasured_attempts": 0.0}
    assert notes == want
    notes = score(dialogues(r1=[0, 0, 1, 0], r2=[1, NAN, 1, 1])).notes
    assert (notes["acc_t1"], notes["acc_t2"], notes["delta"]) == (1 / 3, 1.0, 2 / 3)


def test_shaped_rewards_of_right_and_wrong():
    """0 -> 1 pays 1 + alpha, 1 -> 1 pays 1, 1 -> 0 pays -alpha, 0 -> 0 nothing."""
    _, second = columns(self_correction(dialogues(r1=[0, 1, 1, 0], r2=[1, 1, 0, 0]), beta1=0.0, alpha=3.0))
    torch.testing.assert_close(second, torch.tensor(above_others([4.0, 1.0, -3.0, 0.0]), dtype=torch.float64))


def test_without_bonus_and_penalty_it_is_leave_one_out_at_each_attempt():
    first, second = columns(self_correction(dialogues(), alpha=0.0, beta1=0.0))
    for got, rewards in ((first, R1), (second, R2)):
        plain = rloo(Rollouts.from_lists([[1]] * 4, [0] * 4, outcome=rewards, dtype=torch.float64))
        torch.testing.assert_close(got, plain.advantages[:, 0])
    even = columns(score(dialogues(kl1=[0.3] * 4, kl2=[0.3] * 4), alpha=0.0))
    torch.testing.assert_close(even[0], first)
    torch.testing.assert_close(even[1], second)


def test_the_first_attempt_never_sees_the_second():
    before, _ = columns(score(dialogues()))
    after, _ = columns(score(dialogues(r2=[0, 1, 1, 1])))
    assert torch.equal(before, after)
    stage1, _ = columns(score(dialogues(), stage=1))
    other, _ = columns(score(dialogues(r1=[1, 1, 0, 1], r2=[0, 1, 1, 1]), stage=1))
    assert torch.equal(stage1, other), "stage 1 pays the first attempt nothing"


def test_which_fields_are_needed():
    pairs = ("logprobs", "ref_logprobs")
    assert self_correction(beta1=0.0).requires == ("spans.attempt", "signals.attempt_reward")
    assert self_correction(stage=1, beta1=0.0).requires[2:] == pairs
    assert self_correction(stage=1, beta1=0.0, beta2=0.0).requires[2:] == ()
    assert score().requires[2:] == pairs
    r = dialogues()
    free = r.replace(logprobs=None, ref_logprobs=None)
    assert torch.equal(self_correction(free, beta1=0.0).advantages, self_correction(r, beta1=0.0).advantages)
    with pytest.raises(ValueError, match=r"self_correction needs rollouts\.logprobs"):
        score(free)


def test_the_learners_own_log_probabilities_come_first():
    r = dialogues()
    r = r.replace(old_logprobs=r.logprobs, logprobs=torch.full_like(r.logprobs, 5.0))
    assert torch.equal(score(r).advantages, score(dialogues()).advantages)


def test_more_attempts_have_the_bonus_over_the_one_before():
    """Rewards 0, 1, 0 and 1, 1, 1: the second attempts pay 1 + 10 and 1, the third 0 - 10 and 1."""
    spans = {"attempt": Spans.from_lists([[(0, 1), (1, 2), (2, 3)]] * 2)}
    reward = Signal(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0]), "attempt")
    r = Rollouts.from_lists([[1] * 3] * 2, [0, 0], spans=spans, signals={"attempt_reward": reward})
    want = torch.tensor([[-1.0, 10.0, -11.0], [1.0, -10.0, 11.0]])
    torch.testing.assert_close(self_correction(r, beta1=0.0).advantages, want)


def test_attempts_in_rows_of_their_own():
    """The second attempt's row may come first in the batch."""
    spans = Spans(*torch.tensor([(0, 0, 2, 1), (1, 0, 1, 0), (2, 0, 1, 0), (3, 0, 1, 1)]).unbind(1))
    reward = Signal(torch.tensor([1.0, 0.0, 1.0, 1.0]), "attempt")
    r = Rollouts.from_lists(
        [[1, 1], [1], [1], [1]],
        [0] * 4,
        trajectories=["a", "a", "b", "b"],
        row_index=[1, 0, 0, 1],
        spans={"attempt": spans},
        signals={"attempt_reward": reward},
    )
    want = torch.tensor([[10.0, 10.0], [-1.0, 0], [1.0, 0], [-10.0, 0]])
    torch.testing.assert_close(self_correction(r, beta1=0.0).advantages, want)


def test_unmeasured_attempts_and_groups_of_one():
    credit = self_correction(dialogues(r1=[NAN, 1, 0, 0], r2=[1, NAN, 1, 0]), beta1=0.0)
    assert credit.mask[:, 0].tolist() == [False, True, True, True]
    assert credit.mask[:, 2].tolist() == [False, False, True, True], "no bonus without the first reward"
    assert credit.advantages[:, 2].tolist() == [0.0, 0.0, 11.0, -11.0]
    assert credit.notes["unmeasured_attempts"] == 3
    known = self_correction(dialogues(r1=[NAN, 1, 0, 0], r2=[1, NAN, 1, 0]), beta1=0.0, alpha=0.0)
    assert known.mask[:, 2].tolist() == [True, False, True, True], "without a bonus its own reward is enough"
    stage1 = score(dialogues(r1=[NAN] * 4, r2=[1, NAN, 1, 0]), stage=1)
    assert stage1.mask[:, 0].all(), "stage 1 needs no first reward"
    alone = score(dialogues(r1=[0.0], r2=[1.0], kl1=[0.1], kl2=[0.1]))
    assert (alone.advantages == 0).all()
    assert alone.mask.sum() == 3
    equal = self_correction(dialogues(r1=[0.99] * 4, r2=[0.1] * 4), beta1=0.0)
    assert (equal.advantages == 0).all()


def test_messages():
    r = dialogues()
    twice = r.spans["attempt"]
    twice = Spans(twice.row, twice.start, twice.stop, torch.zeros_like(twice.index))
    with pytest.raises(
        ValueError, match=r"needs one span per attempt; spans\['attempt'\] has two with index 0 in traj"
    ):
        score(r.with_spans(attempt=twice))
    with pytest.raises(ValueError, match="self_correction needs stage to be 1 or 2; got 3"):
        self_correction(stage=3)


def reference(r: Rollouts, stage=2, alpha=10.0, beta1=0.01, beta2=0.1) -> torch.Tensor:
    every = episodes(r, "attempt")
    rewards = r.signals["attempt_reward"].values
    shaped: dict[int, tuple[int, int, float]] = {}
    for e in every:
        for k, step in enumerate(sorted(e.steps, key=lambda x: x.index)):
            now = float(rewards[step.number])
            before = float(rewards[next(x.number for x in e.steps if x.index == k - 1)]) if k else 0.0
            kl = math.fsum(float(r.old_logprobs[a]) - float(r.ref_logprobs[a]) for a in step.actions)
            if k == 0:
                value = -beta2 * kl if stage == 1 else now - beta1 * kl
            else:
                value = now + (alpha * (now - before) if stage == 2 else 0.0) - beta1 * kl
            shaped[step.number] = (e.group, k, value)
    table = blank(r)
    for e in every:
        for step in e.steps:
            group, k, value = shaped[step.number]
            others = [
                v for n, (g, i, v) in shaped.items() if (g, i) == (group, k) and n != step.number and not math.isnan(v)
            ]
            if not math.isnan(value) and others:
                put(table, step.actions, [value - mean(others)] * len(step.actions))
    return table_of(table, r)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_agrees_with_the_slow_reference(seed):
    r = random_batch(seed)
    for stage in (1, 2):
        torch.testing.assert_close(score(r, stage=stage).advantages, reference(r, stage=stage), rtol=1e-9, atol=1e-9)
