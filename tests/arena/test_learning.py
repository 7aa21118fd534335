"""The loop of the arena, its curves and what several of them come to; the student of table worlds."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from apportion.arena import Trees, exact_advantage, random_credit
from apportion.arena._learning import (
    DEFAULT_LEARNERS,
    LOSS,
    Collapse,
    Curve,
    area,
    difference,
    learn,
    mean_interval,
    price,
    summary,
    tokens_to,
)
from apportion.arena._methods import BARS, every_method, missing
from apportion.arena._table_student import TableStudent
from apportion.arena.worlds.hackable import Hackable
from apportion.arena.worlds.rooms import Rooms
from apportion.credit import Estimator, capo, chain, estimator, grpo, remax, transform
from apportion.losses import Outputs, totals_of
from apportion.types import Credit, Rollouts

WORLDS = [Trees(), Trees(prompts=3, decisions=2, where="late"), Rooms(), Rooms(observe=False, length=8), Hackable()]
SMALL = Trees(prompts=2, length=6, decisions=2)  # 16 x 4 x 6 = 384 tokens a batch
BATCH = 384


@transform()
def times(credit: Credit, rollouts: Rollouts, *, factor: float) -> Credit:
    return credit.scaled(factor, rollouts)


def run(credit: Estimator = exact_advantage(), world=SMALL, **settings) -> Curve:  # noqa: B008
    settings = {"tokens": 20 * BATCH, "seed": 0, "rate": 0.1, "evaluate_every": 2 * BATCH, "size": 4} | settings
    return learn(TableStudent(world), credit, **settings)


def curve(*accuracy: float, every: int = 100, **rest) -> Curve:
    other = (0.0,) * len(accuracy)
    return Curve(tuple(range(0, every * len(accuracy), every)), accuracy, accuracy, other, other, **rest)


# ---- curves -----------------------------------------------------------------------------------------------------------


def test_area_is_the_mean_of_the_lines_between_marks():
    assert area(curve(0.0, 0.4, 0.8)) == pytest.approx((0.2 + 0.6) / 2)
    assert area(curve(0.0, 0.4, 0.8), 150) == pytest.approx((0.2 * 100 + (0.4 + 0.6) / 2 * 50) / 150)
    assert area(curve(0.3, 0.3, 0.3), 70) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"up_to must lie between 1 and the curve's last mark 200; got 300\."):
        area(curve(0.0, 0.4, 0.8), 300)


def test_tokens_to_is_the_first_crossing_and_nan_is_never():
    assert tokens_to(curve(0.0, 0.4, 0.2, 0.8), 0.3) == pytest.approx(75)
    assert tokens_to(curve(0.0, 0.4, 0.2, 0.8), 0.6) == pytest.approx(200 + 100 * 0.4 / 0.6)
    assert tokens_to(curve(0.5, 0.4), 0.5) == 0
    assert math.isnan(tokens_to(curve(0.0, 0.4), 0.5))


def test_a_broken_policy_is_right_about_nothing():
    broken = curve(0.4, 0.4, math.nan, collapsed=Collapse(150, "the gradient is not finite"))
    assert area(broken) == pytest.approx((0.4 + 0.2) / 2)
    assert math.isnan(tokens_to(broken, 0.5))


def test_a_curve_survives_json():
    broken = curve(0.25, math.nan, price=4.0, collapsed=Collapse(100, "why"))
    text = json.dumps(broken.to_json(), allow_nan=False)
    back = Curve.from_json(json.loads(text))
    assert back.to_json() == broken.to_json()
    assert back.tokens == (0, 100)
    assert back.collapsed == Collapse(100, "why")
    assert math.isnan(back.accuracy[1])
    whole = curve(0.1, 0.2)
    assert Curve.from_json(json.loads(json.dumps(whole.to_json()))) == whole


# ---- several seeds ----------------------------------------------------------------------------------------------------


def test_intervals_are_of_student_t():
    # 1..5: mean 3, deviation sqrt(2.5), t(4) = 2.776: 3 +- 2.776 * 1.5811 / 2.2361
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 - 1.963, 3 + 1.963), abs=1e-3)
    assert math.isnan(mean_interval([1.0]).low)
    for n, t in ((17, 2.120), (31, 2.042), (61, 2.000), (121, 1.980)):  # from the table of the distribution
        values = [float((-1) ** i) for i in range(n)]
        deviation = math.sqrt(sum((v - sum(values) / n) ** 2 for v in values) / (n - 1))
        got = mean_interval(values)
        assert (got.high - got.value) * math.sqrt(n) / deviation == pytest.approx(t, abs=6e-3)


def test_the_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4000, 5, generator=generator, dtype=torch.float64).tolist()
    covered = [e.low <= 0 <= e.high for e in map(mean_interval, drawn)]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_a_summary_counts_who_never_got_there_with_the_whole_budget():
    curves = {0: curve(0.0, 0.5, 1.0), 1: curve(0.0, 0.0, 0.0, collapsed=Collapse(1, "why"))}
    found = summary(curves, level=0.75)
    assert (found.seeds, found.reached, found.collapsed) == (2, 0.5, 0.5)
    assert found.tokens_to.value == pytest.approx((150 + 200) / 2)
    assert found.area.value == pytest.approx(0.25)
    assert found.final.value == pytest.approx(0.5)
    assert summary(curves, level=0.75, up_to=100).area.value == pytest.approx(0.125)


def test_differences_are_taken_seed_by_seed():
    ours = {s: curve(0.1 * s, 0.1 * s + 0.2) for s in range(5)}
    theirs = {s: curve(0.1 * s, 0.1 * s + 0.1) for s in range(1, 7)}
    found = difference(ours, theirs, level=2.0)
    assert found["final"].value == pytest.approx(0.1)
    assert found["final"].low == pytest.approx(0.1)
    assert found["area"].value == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"no seed is in both: \[0, 1, 2, 3, 4\] and \[9\]"):
        difference(ours, {9: curve(0.0, 0.0)}, level=0.5)


# ---- the student of tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS, ids=repr)
def test_the_student_begins_as_the_world_and_finds_its_choices_again(world):
    student = TableStudent(world)
    r = student.sample(8, 4, seed=3)
    again = student.logprobs(r)
    torch.testing.assert_close(again.detach()[r.action_mask], r.logprobs[r.action_mask])
    torch.testing.assert_close(again, r.ref_logprobs, check_dtype=False)
    assert bool((again[~r.action_mask] == 0).all())
    assert r.tokens.equal(world.episodes(8, 4, seed=3).rollouts.tokens)
    rows = torch.tensor([5, 2])
    torch.testing.assert_close(student.logprobs(r.select(rows)), again[rows])


@pytest.mark.parametrize("world", WORLDS, ids=repr)
def test_the_loss_has_the_gradient_of_the_worlds_own_equation(world):
    student, weights = TableStudent(world), exact_advantage()
    r = student.sample(8, 4, seed=3)
    loss, _ = LOSS(Outputs(student.logprobs(r)), r, weights(r), totals_of(r, weights(r)))
    loss.backward()
    episodes = world.episodes(8, 4, seed=3)
    by_group = episodes.gradients(episodes.advantages)
    wanted = torch.zeros_like(student.logits).flatten(1).index_add(0, episodes.prompts, by_group) / 8
    torch.testing.assert_close(-student.logits.grad.flatten(1), wanted)


@pytest.mark.parametrize("world", WORLDS, ids=repr)
def test_exact_evaluation_is_what_sampling_comes_to(world):
    student = TableStudent(world)
    with torch.no_grad():
        student.logits += torch.randn(student.logits.shape, generator=torch.Generator().manual_seed(0)) / 2
    found, n = student.evaluate(seed=0), 256 * world.prompts
    r = student.sample(world.prompts, 256, seed=5)
    outcome, lengths = r.signals["outcome"].values, r.action_mask.sum(1).double()
    assert float(outcome.mean()) == pytest.approx(found["accuracy"], abs=4 * float(outcome.std()) / math.sqrt(n))
    assert float(lengths.mean()) == pytest.approx(found["length"], abs=4 * float(lengths.std()) / math.sqrt(n) + 1e-9)
    entropy = r.signals["entropy"].values[r.action_mask]
    assert float(entropy.mean()) == pytest.approx(found["entropy"], abs=0.02)
    right = outcome.view(world.prompts, 32, 8).amax(-1)
    assert float(right.mean()) == pytest.approx(found["pass@8"], abs=4 * math.sqrt(0.25 / (32 * world.prompts)))


def test_the_reference_stays_the_policy_that_learning_began_from():
    student = TableStudent(SMALL)
    begun = student.logprobs(student.sample(16, 4, seed=0)).detach()
    with torch.no_grad():
        student.logits += torch.randn(student.logits.shape, generator=torch.Generator().manual_seed(0))
    r = student.sample(16, 4, seed=0)
    assert not torch.allclose(r.ref_logprobs[r.action_mask], r.logprobs[r.action_mask])
    assert r.ref_logprobs.shape == begun.shape


def test_forbidden_choices_stay_forbidden():
    world = Forbidding()
    student = TableStudent(world)
    found = learn(student, grpo(), tokens=10 * BATCH, seed=0, rate=0.1, evaluate_every=BATCH, size=4)
    assert student.logits[:, :, 0].isneginf().all()
    assert student.logits[:, :, 1:].isfinite().all()
    assert found.collapsed is None
    assert not any(map(math.isnan, found.entropy))
    assert found.accuracy[-1] > found.accuracy[0]


class Forbidding:
    """SMALL without its first choice."""

    def __init__(self):
        logits = SMALL.table.logits.clone()
        logits[:, :, 0] = -torch.inf
        self.table = replace(SMALL.table, logits=logits)
        self.played = SMALL.played


def test_every_prompt_must_be_in_a_batch():
    with pytest.raises(
        ValueError, match=r"this world has 8 prompts, which take turns; got 4 groups\. Give one per prompt\."
    ):
        TableStudent(Trees()).sample(4, 2, seed=0)


# ---- the loop ---------------------------------------------------------------------------------------------------------


def test_the_exact_advantage_teaches_and_chance_does_not():
    exact, chance = run(), run(random_credit())
    assert exact.accuracy[0] == chance.accuracy[0] < 0.5
    assert exact.accuracy[-1] > 0.9
    assert chance.accuracy[-1] < 0.6
    assert exact.entropy[-1] < exact.entropy[0]
    assert exact.length == pytest.approx([6.0] * len(exact.length))


def test_same_seed_same_curve():
    assert run(grpo()) == run(grpo()) != run(grpo(), seed=1)


def test_no_policy_has_spent_more_than_its_mark():
    steps: list[tuple[int, float]] = []
    found = run(tokens=9 * BATCH, evaluate_every=BATCH, on_step=lambda *done: steps.append(done))
    assert steps == [(i, float(i * BATCH)) for i in range(1, 10)]
    assert found.tokens == tuple(range(0, 9 * BATCH + 1, BATCH))
    one = TableStudent(SMALL)
    learn(one, exact_advantage(), tokens=BATCH, seed=0, rate=0.1, evaluate_every=BATCH, size=4)
    assert found.accuracy[1] == pytest.approx(one.evaluate(0)["accuracy"], abs=0)
    odd = run(tokens=1000, evaluate_every=100)  # 384 and 768 are the only steps
    assert len(set(odd.accuracy)) == 3
    assert odd.accuracy[3] == odd.accuracy[0] != odd.accuracy[4] == odd.accuracy[7]


def test_what_a_method_needs_beyond_is_paid_from_the_same_budget():
    episodes = SMALL.episodes(16, 4, seed=0)
    assert price(grpo(), episodes) == 1.0
    assert price(capo(), episodes) == 4.0  # three critiques
    assert price(remax(), episodes) == pytest.approx(1 + 6 / 4 / 6)  # a greedy rollout for four sampled ones
    steps: list[int] = []
    dear = run(price=4.0, on_step=lambda step, spent: steps.append(step))
    assert len(steps) == 5
    assert dear.price == 4.0
    free = run()
    assert dear.accuracy[-1] == pytest.approx(learnt_after(5), abs=0)
    assert dear.accuracy[-1] < free.accuracy[-1]


def learnt_after(steps: int) -> float:
    return run(tokens=steps * BATCH, evaluate_every=BATCH).accuracy[-1]


def test_the_size_of_credit_does_not_change_the_step():
    plain, large = run(grpo()), run(chain(grpo(), times(factor=1000.0)))
    assert plain.accuracy == pytest.approx(large.accuracy, abs=1e-4)


def test_budgets_are_whole_marks():
    with pytest.raises(
        ValueError, match=r"tokens must be a positive multiple of evaluate_every; got 1000 and 300\. Change one\."
    ):
        run(tokens=1000, evaluate_every=300)


# ---- collapse -----------------------------------------------------------------------------------------------------------


class Breaking(TableStudent):
    """Its log-probabilities become NaN after some steps."""

    calls = 0

    def logprobs(self, rollouts):
        self.calls += 1
        return super().logprobs(rollouts) * (math.nan if self.calls > 3 else 1.0)


def test_a_gradient_that_is_not_finite_ends_the_training_not_the_curve():
    student = Breaking(SMALL)
    found = learn(student, grpo(), tokens=10 * BATCH, seed=0, rate=0.1, evaluate_every=BATCH, size=4)
    assert found.collapsed == Collapse(3 * BATCH, "the gradient is not finite")
    assert not any(map(math.isnan, found.accuracy[:4]))
    assert all(map(math.isnan, found.accuracy[4:]))
    assert len(found.tokens) == len(found.length) == 11
    assert student.evaluate(0)["accuracy"] == found.accuracy[3]  # the weights are those before


@estimator()
def nothing(rollouts: Rollouts) -> Credit:
    return Credit(torch.full(rollouts.action_mask.shape, math.nan, dtype=torch.float64), rollouts.action_mask)


def test_credit_that_is_not_finite_is_a_collapse_too():
    assert run(nothing()).collapsed == Collapse(0, "the gradient is not finite")


def test_an_accuracy_that_falls_to_nothing_is_noted_and_training_goes_on():
    found = run(chain(exact_advantage(), times(factor=-1.0)))
    assert found.collapsed is not None
    assert found.collapsed.why.startswith("accuracy fell from 0.")
    assert found.collapsed.tokens in found.tokens[1:]
    assert not any(map(math.isnan, found.accuracy))


# ---- going on after a kill ----------------------------------------------------------------------------------------------

SETTINGS = {"tokens": 30 * BATCH, "rate": 0.05, "evaluate_every": 3 * BATCH, "save_seconds": 0.0}


class Killed(Exception):
    pass


def test_a_run_that_is_broken_off_ends_with_the_same_curve(tmp_path):
    def stop(step: int, spent: float) -> None:
        if step in (4, 11):
            raise Killed

    whole, seen = run(grpo(), **SETTINGS), []
    for _ in range(2):
        with pytest.raises(Killed):
            run(grpo(), **SETTINGS, checkpoint=tmp_path, on_step=stop)
    assert run(grpo(), **SETTINGS, checkpoint=tmp_path, on_step=lambda *done: seen.append(done[0])) == whole
    assert seen[0] == 12
    assert seen[-1] == 30
    assert run(grpo(), **SETTINGS, checkpoint=tmp_path, on_step=lambda *done: seen.append(done[0])) == whole
    assert seen[-1] == 30
    assert len(seen) == 19


def test_a_collapse_is_remembered(tmp_path):
    settings = {
        "tokens": 10 * BATCH,
        "seed": 0,
        "rate": 0.1,
        "evaluate_every": BATCH,
        "size": 4,
        "checkpoint": tmp_path,
    }
    first = learn(Breaking(SMALL), grpo(), **settings)
    assert learn(Breaking(SMALL), grpo(), **settings).to_json() == first.to_json()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run(grpo(), checkpoint=tmp_path)
    with pytest.raises(
        ValueError, match=r"was made with rate=0.1, but the run goes on with 0.2\. Use the same settings, or"
    ):
        run(grpo(), checkpoint=tmp_path, rate=0.2)
    with pytest.raises(ValueError, match="was made with credit="):
        run(checkpoint=tmp_path)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from apportion.arena import Trees
from apportion.arena._learning import learn
from apportion.arena._methods import BARS, every_method, missing
from apportion.arena._table_student import TableStudent
from apportion.credit import grpo
world = Trees(prompts=2, length=6, decisions=2)
learn(TableStudent(world), grpo(), seed=0, size=4, checkpoint=Path(sys.argv[1]), **{settings},
      on_step=lambda step, spent: print(step, flush=True))
"""


def test_a_killed_process_goes_on_with_the_same_numbers(tmp_path):
    script = SCRIPT.replace("{settings}", repr(SETTINGS))
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 8:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    seen: list[int] = []
    after = run(grpo(), **SETTINGS, checkpoint=tmp_path, on_step=lambda step, spent: seen.append(step))
    assert 8 < seen[0] <= 12
    assert after == run(grpo(), **SETTINGS)


# ---- the default methods ------------------------------------------------------------------------------------------------


def test_at_most_eight_methods_learn_by_default_beside_the_bars():
    assert tuple(DEFAULT_LEARNERS)[:2] == BARS
    assert len(DEFAULT_LEARNERS) <= 10
    assert DEFAULT_LEARNERS.keys() <= every_method().keys()
    assert all(DEFAULT_LEARNERS.values())
    assert not any(missing(every_method()[name], Rooms().episodes(8, 2, seed=0).rollouts) for name in DEFAULT_LEARNERS)
