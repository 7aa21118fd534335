"""Written arithmetic: what the program reads, how well V is known, and that a student can be trained."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from apportion.arena import Episodes, Yardstick, exact_advantage, random_credit
from apportion.arena import _writer as w
from apportion.arena._continuations import Trie, Values, node_values
from apportion.arena.worlds import arithmetic
from apportion.arena.worlds.arithmetic import Arithmetic

WORLD = Arithmetic(terms=2, prompts=4, hidden=64, layers=1, updates=400, continuations=64, critic_error=0.0)
P = 4  # tokens of a prompt of this world


@pytest.fixture(scope="module", autouse=True)
def _small_writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Writers of these tests are cached in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        w.writer.cache_clear()
        arithmetic._truth.cache_clear()
        yield
    w.writer.cache_clear()
    arithmetic._truth.cache_clear()


@pytest.fixture(scope="module")
def episodes(_small_writer: None) -> Episodes:
    return WORLD.episodes(groups=48, size=8, seed=0)


def _tokens(text: str) -> torch.Tensor:
    return torch.tensor([[w.ALPHABET.index(c) for c in text]])


def _read(response: str, question: str = "3a5b2=") -> w.Reading:
    tokens = _tokens(response)
    return w.read(_tokens(question), tokens, torch.tensor([tokens.shape[1]]))


# ---- problems and demonstrations ----------------------------------------------------------------------------------------


def test_training_and_test_problems_are_disjoint() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (w.draw_problems(4000, 4, generator, test=x) for x in (False, True))
    assert len(train) == len(test) == 4000
    assert not set(train.tolist()) & set(test.tolist())
    numbers = torch.arange(10_000)
    assert len(set(w.text(w.questions(numbers, 4)))) == 10_000  # a number is a problem, and no other is the same
    assert 0.2 < w.held_out(numbers).double().mean() < 0.3
    assert w.held_out(w.draw_problems(64, 3, generator, test=True)).all()


def test_the_program_reads_what_was_demonstrated() -> None:
    """In demonstrations of every kind exactly the digits that were drawn wrong make wrong steps."""
    lessons, generator = replace(WORLD.lessons, terms=4), torch.Generator().manual_seed(0)
    tokens, lengths, wrong = w.demonstrations(w.draw_problems(2000, 4, generator, test=False), lessons, generator)
    found = w.read(tokens[:, :8], tokens[:, 8:], lengths - 8)
    assert found.ended.all()
    last = found.steps.stop - 1 + 8
    slips = wrong[found.steps.row, torch.where(found.steps.stop - found.steps.start == 4, last, 0)]
    assert torch.equal(found.wrong, slips)
    marks = tokens[found.steps.row, found.steps.start + 8]
    sums = (marks >= w.LETTER).sum() / (3 * len(tokens))
    # each number is added once, and again with the chance error_rate x correction
    assert abs(float(sums) - (1 + lessons.error_rate * lessons.correction)) < 0.02
    assert abs(float(slips[marks >= w.LETTER].sum()) / (3 * len(tokens)) - lessons.error_rate) < 0.02
    assert abs(float((marks == w.NOTE).sum()) / (3 * len(tokens)) - lessons.harmless) < 0.02
    assert abs(float((marks == w.EMPTY).sum()) / (3 * len(tokens)) - lessons.padding) < 0.02


def test_demonstrations_without_mistakes_are_right() -> None:
    lessons = replace(WORLD.lessons, terms=3, error_rate=0.0, harmless=0.0)
    generator = torch.Generator().manual_seed(0)
    tokens, lengths, wrong = w.demonstrations(w.draw_problems(500, 3, generator, test=False), lessons, generator)
    found = w.read(tokens[:, :6], tokens[:, 6:], lengths - 6)
    assert found.outcome.all()
    assert not found.wrong.any()
    assert not wrong.any()


@pytest.mark.parametrize(
    ("response", "outcome", "wrong", "first"),
    [
        ("a358b820>0$", 1, [0, 0, 0], None),
        ("a357b729>9$", 0, [1, 0, 0], 0),  # goes on from a wrong value
        ("a357a358b820>0$", 1, [1, 0, 0, 0], 0),  # put right
        ("a358b820b821>1$", 0, [0, 0, 1, 0], 2),  # put wrong
        ("a358~8~1....b820>0$", 1, [0, 1, 0, 0, 0], None),  # a wrong note is no mistake that matters
        ("a358>0$", 1, [0, 1], 1),  # left out a number
        ("a358b820b820>0$", 1, [0, 0, 0, 0], None),
        ("a348b820>0$", 1, [1, 0, 0], 0),  # wrong copy of the number
        ("a358b820>0", 0, [0, 0, 1], 2),  # no end
        ("a358b820>0>$", 0, [0, 0, 1], 2),
        ("$", 0, [1], 0),
    ],
)
def test_reading(response: str, outcome: int, wrong: list[int], first: int | None) -> None:
    found = _read(response)
    assert found.outcome.tolist() == [outcome]
    assert found.wrong.int().tolist() == wrong
    assert found.first.nonzero()[:, 0].tolist() == ([] if first is None else [first])


def test_steps_and_decisive_tokens() -> None:
    found = _read("a357~7~4a358b820>0$")
    assert found.steps.to_lists(1) == [[(0, 4), (4, 8), (8, 12), (12, 16), (16, 19)]]
    assert "".join("x" if d else "." for d in found.decisive[0].tolist()) == ".xxx....xxxx.xxx.x."
    assert found.used.tolist() == [True, False, True, True, True]


# ---- values by continuations ------------------------------------------------------------------------------------------


def _played(depth: int, rows: int, continuations: int, seed: int) -> tuple[Trie, Values, dict[tuple[int, ...], float]]:
    """A policy over 3 choices that depends on everything before, the outcome too: V is known by summing."""
    generator = torch.Generator().manual_seed(seed)
    policy: dict[tuple[int, ...], torch.Tensor] = {}
    exact: dict[tuple[int, ...], float] = {}
    levels: list[list[tuple[int, ...]]] = [[()]]
    for _ in range(depth):
        levels.append([(*s, a) for s in levels[-1] for a in range(3)])
    fixed = torch.Generator().manual_seed(7)
    for s in (s for level in levels[:-1] for s in level):
        policy[s] = torch.randn(3, generator=fixed, dtype=torch.float64).softmax(0)
    exact.update({s: float(torch.rand(1, generator=fixed) < 0.5) for s in levels[-1]})
    for level in levels[-2::-1]:
        exact.update({s: sum(float(p) * exact[(*s, a)] for a, p in enumerate(policy[s])) for s in level})

    def go_on(s: tuple[int, ...]) -> tuple[int, ...]:
        while len(s) < depth:
            s = (*s, int(torch.multinomial(policy[s], 1, generator=generator)))
        return s

    tokens = torch.tensor([go_on(()) for _ in range(rows)])
    trie = Trie.of(torch.zeros(rows, dtype=torch.int64), tokens, torch.full((rows,), depth))
    names = [tuple(tokens[r, :d].tolist()) for r, d in zip(trie.row.tolist(), trie.depth.tolist(), strict=True)]

    def proceed(node: torch.Tensor, token: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
        triples = zip(node.tolist(), token.tolist(), copies.tolist(), strict=True)
        means = [sum(exact[go_on((*names[n], a))] for _ in range(c)) / c for n, a, c in triples]
        return torch.tensor(means, dtype=torch.float64)

    over = trie.depth == depth
    pi = torch.stack([policy.get(s, torch.full((3,), torch.nan, dtype=torch.float64)) for s in names])
    outcome = torch.tensor([exact[s] for s in names], dtype=torch.float64)
    found = node_values(trie, pi, over, outcome, proceed, continuations, generator)
    return trie, found, {names.index(s): v for s, v in exact.items() if s in names}  # type: ignore[misc]


def test_values_are_right_within_their_errors() -> None:
    scores = []
    for seed in range(40):
        _, found, exact = _played(depth=4, rows=12, continuations=40, seed=seed)
        at, true = torch.tensor(list(exact)), torch.tensor(list(exact.values()), dtype=torch.float64)
        off, error = found.value[at] - true, found.variance[at].sqrt()
        assert off[error == 0].abs().max() < 1e-12
        scores.append((off / error)[error > 0])
    z = torch.cat(scores)
    assert 0.4 < z.square().mean() < 1.2
    assert (z.abs() < 4).double().mean() > 0.99
    assert abs(z.mean()) < 0.1


def test_values_are_exact_where_rows_went_everywhere() -> None:
    _, found, exact = _played(depth=2, rows=400, continuations=1, seed=0)
    assert len(exact) == 13
    assert torch.allclose(found.value[list(exact)], torch.tensor(list(exact.values()), dtype=torch.float64))
    assert not found.variance.any()


def test_the_expected_advantage_is_zero_in_every_node() -> None:
    trie, found, _ = _played(depth=4, rows=12, continuations=10, seed=0)
    inner = trie.depth < 4
    assert torch.allclose(found.weights[inner].sum(1), torch.ones(int(inner.sum()), dtype=torch.float64))
    assert found.pull.sum(1).abs().max() < 1e-12
    advantage, error = found.advantage(trie, trie.nodes[:, 1:])
    assert advantage.shape == error.shape == (12, 4)
    assert torch.equal(advantage, found.value[trie.nodes[:, 1:]] - found.value[trie.nodes[:, :-1]])


# ---- episodes ---------------------------------------------------------------------------------------------------------


def test_sampling_reproduces_the_values(episodes: Episodes) -> None:
    """V at the prompt and behind some responses' beginnings, against fresh continuations of the model."""
    r, model, prompt = episodes.rollouts, w.writer(WORLD.lessons), P
    assert r.tokens is not None
    assert r.values is not None
    assert episodes.errors is not None
    value = r.values[:, prompt]
    outcome = r.signals["outcome"].values
    assert 0.05 < outcome.mean() < 0.95
    for row, t in ((0, 0), (8, 0), (1, 3), (9, 4), (17, 4)):
        begun = r.tokens[row : row + 1, : prompt + t]
        limit = WORLD.lessons.limit - t
        more = w.write(model, begun, [1500], limit, torch.Generator().manual_seed(5))
        whole = torch.cat([begun[:, prompt:].expand(1500, -1), more.tokens], 1)
        hits = w.read(begun[:, :prompt].expand(1500, -1), whole, more.lengths + t).outcome
        error = (hits.var() / 1500 + 0.01**2).sqrt()  # V's own error is about 0.01
        assert abs(float(r.values[row, prompt + t] - hits.mean())) < 4 * float(error)
    assert value.unique().numel() == WORLD.prompts


def test_advantages_tell_how_values_change(episodes: Episodes) -> None:
    r, acted = episodes.rollouts, episodes.rollouts.action_mask
    assert r.values is not None
    assert episodes.errors is not None
    truth = w.read(r.tokens[:, :P], r.tokens[:, P:], r.lengths - P).outcome  # type: ignore[index]
    assert torch.allclose(r.values[:, P] + episodes.advantages.sum(1), truth.double())
    assert not episodes.advantages[~acted].any()
    assert not episodes.errors[~acted].any()
    assert episodes.errors[acted].mean() < 0.03
    mean = torch.stack([episodes.advantages[r.group_ids % 4 == k][:, P].mean() for k in range(4)])
    assert mean.abs().max() < 0.1  # 96 rollouts each


def test_pairs_are_equal_where_everything_before_is(episodes: Episodes) -> None:
    r, pairs = episodes.rollouts, episodes.pairs
    assert torch.equal(pairs >= 0, r.action_mask)
    assert r.tokens is not None
    seen: dict[int, tuple[int, ...]] = {}
    for row, line in enumerate(pairs.tolist()):
        for t, pair in enumerate(line):
            if pair >= 0:
                before = tuple(r.tokens[row, : t + 1].tolist())
                assert seen.setdefault(pair, before) == before
    assert len(set(seen.values())) == len(seen)


def test_gradients_are_those_of_the_output_layer(episodes: Episodes) -> None:
    r, model = episodes.rollouts, w.copied(w.writer(WORLD.lessons))
    assert r.tokens is not None
    weights = torch.randn(r.action_mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = episodes.gradients(weights)
    rows = slice(8, 16)
    logp = model(input_ids=r.tokens[rows, :-1]).logits.log_softmax(-1).gather(-1, r.tokens[rows, 1:, None])[..., 0]
    kept = torch.where(r.action_mask[rows, 1:], weights[rows, 1:].float() * logp, 0.0)
    model.zero_grad()
    (kept.sum() / 8).backward()
    want = model.lm_head.weight.grad.T.flatten().double()
    assert torch.allclose(got[1], want, atol=1e-4 * float(want.abs().max()))


def test_gradients_of_the_advantage_meet_the_gradient(episodes: Episodes) -> None:
    """Two independent batches, all prompts together; the ratios have a deviation of about 0.1."""
    other = WORLD.episodes(groups=48, size=8, seed=1)
    got = [
        torch.stack([_by_prompt(e, e.gradients(e.advantages)), _by_prompt(e, e.gradient)]) for e in (episodes, other)
    ]
    dots = (got[0][:, None] * got[1][None]).flatten(2).sum(2)
    length = dots[1, 1]
    assert length > 0
    assert abs(float(dots[0, 1] / length) - 1) < 0.3
    assert abs(float(dots[1, 0] / length) - 1) < 0.3


def _by_prompt(episodes: Episodes, gradients: torch.Tensor) -> torch.Tensor:
    return torch.stack([gradients[episodes.prompts == k].mean(0) for k in range(WORLD.prompts)])


def test_the_bars_are_where_they_belong(episodes: Episodes) -> None:
    yardstick = Yardstick(episodes, resamples=200)
    best, chance = (yardstick.measure(bar()(episodes.rollouts)) for bar in (exact_advantage, random_credit))
    assert best["rank"].value == pytest.approx(1.0)
    assert best["sign"].value == 1.0
    assert best["bias"].value < 0.1
    assert best["cosine"].low > 0.3
    assert best["aim"].value > 0.9
    assert chance["rank"].low < 0 < chance["rank"].high or abs(chance["rank"].value) < 0.05
    assert abs(chance["cosine"].value) < 0.1


def test_the_same_seed_gives_the_same_episodes(episodes: Episodes) -> None:
    arithmetic._truth.cache_clear()
    again = WORLD.episodes(groups=48, size=8, seed=0)
    assert torch.equal(episodes.rollouts.tokens, again.rollouts.tokens)  # type: ignore[arg-type]
    assert torch.equal(episodes.advantages, again.advantages)
    for name, signal in episodes.rollouts.signals.items():
        assert torch.equal(signal.values.nan_to_num(), again.rollouts.signals[name].values.nan_to_num()), name


def test_knobs_of_judges_and_critics(episodes: Episodes) -> None:
    plain, r = replace(WORLD, verdict_error=0.0), episodes.rollouts
    right = plain.episodes(48, 8, 0).rollouts
    read = w.read(r.tokens[:, :P], r.tokens[:, P:], r.lengths - P)  # type: ignore[index]
    assert torch.equal(right.signals["judge"].values, read.wrong[:, None].expand(-1, 3).double())
    assert torch.equal(right.signals["process"].values, 1 - read.wrong.double())
    off = (r.signals["judge"].values != read.wrong[:, None]).double().mean()
    assert abs(float(off) - 0.1) < 0.03
    lying = replace(WORLD, verifier_error=1.0).episodes(48, 8, 0)
    assert torch.equal(lying.rollouts.signals["outcome"].values, 1 - r.signals["outcome"].values)
    assert torch.equal(lying.advantages, episodes.advantages)
    critic = replace(WORLD, critic_error=0.2).episodes(48, 8, 0)
    noise = (critic.rollouts.values - r.values)[r.action_mask]  # type: ignore[operator]
    assert noise[episodes.pairs[r.action_mask].unique(return_inverse=True)[1].argsort()].std() == pytest.approx(
        0.2, abs=0.05
    )
    first = (critic.rollouts.values - r.values)[:, P]  # type: ignore[operator]
    assert first.unique().numel() == WORLD.prompts  # it belongs to the state


def test_bad_knobs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 to 8 terms; got 1"):
        Arithmetic(terms=1)
    with pytest.raises(ValueError, match="prompts to be at least 1; got 0"):
        Arithmetic(prompts=0)
    with pytest.raises(ValueError, match="correction between 0 and 1, a chance; got 2"):
        Arithmetic(correction=2.0)


# ---- the writer and its students --------------------------------------------------------------------------------------


def test_the_writer_is_cached_whole() -> None:
    lessons = replace(WORLD.lessons, updates=2)
    first = w.writer(lessons)
    w.writer.cache_clear()
    again = w.writer(lessons)
    assert first is not again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other = w.writer(replace(lessons, seed=1))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    files = list(w.user_cache("arena").iterdir())
    assert files
    assert all(f.suffix == ".pt" for f in files)


def test_a_student_learns_apart_from_its_reference() -> None:
    student = WORLD.student(attention=True)
    rollouts = student.sample(groups=4, size=4, seed=3)
    assert rollouts.tokens is not None
    assert rollouts.logprobs is not None
    assert rollouts.ref_logprobs is not None
    test = {tuple(q) for q in w.questions(w.held_out(torch.arange(100)).nonzero()[:, 0], 2).tolist()}
    assert not test & {tuple(q) for q in rollouts.tokens[:, :P].tolist()}
    missing = set(WORLD.episodes(2, 2, 0).rollouts.signals) - set(rollouts.signals)
    assert missing == {"exact"}
    logp = student.logprobs(rollouts)
    assert torch.allclose(logp, rollouts.logprobs, atol=1e-4)
    assert torch.allclose(rollouts.ref_logprobs, rollouts.logprobs, atol=1e-4)
    found = student.evaluate(seed=0)
    assert set(found) == {"accuracy", "pass@8", "entropy", "length"}
    assert found["accuracy"] < found["pass@8"] <= 1
    assert found["entropy"] > 0

    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    (-(rollouts.signals["outcome"].values.float()[:, None] - 0.5) * logp).sum().backward()
    optimizer.step()
    after = student.sample(groups=4, size=4, seed=3)
    assert not torch.allclose(after.ref_logprobs, after.logprobs, atol=1e-4)  # type: ignore[arg-type]
    assert student.evaluate(seed=0) != found
    fresh = WORLD.student().sample(groups=4, size=4, seed=3)
    assert torch.equal(fresh.tokens, rollouts.tokens)  # type: ignore[arg-type]
