import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion import Rollouts, Signal, ma_rlhf
from apportion.signals import constituents, fixed_ngrams, perplexity_runs, random_ngrams
from reference.batches import random_batch

PPL = torch.tensor([5, 4, 3, 6, 2, 2.5, 1], dtype=torch.float64)


def one(mask=(True,) * 7, **more) -> Rollouts:
    return Rollouts.from_lists([[5] * len(mask)], [0], action_mask=[list(mask)], **more)


def starts(splitter, r: Rollouts, row: int = 0) -> list[int]:
    return [start for start, _ in splitter(r).to_lists(r.batch)[row]]


def test_fixed_ngrams():
    assert starts(fixed_ngrams(3), one()) == [0, 3, 6]
    assert starts(fixed_ngrams(1), one()) == list(range(7))
    assert fixed_ngrams(99)(one()).to_lists(1) == [[(0, 7)]]


def test_the_last_action_alone():
    """As the released code splits: 3, 3 and the last; or 5, 1 and the last. Padding and a last macro of one change nothing."""
    assert fixed_ngrams(3, end_alone=True)(one()).to_lists(1) == [[(0, 3), (3, 6), (6, 7)]]
    assert fixed_ngrams(5, end_alone=True)(one()).to_lists(1) == [[(0, 5), (5, 6), (6, 7)]]
    trailing = one((False, True, True, True, False))
    assert fixed_ngrams(9, end_alone=True)(trailing).to_lists(1) == [[(1, 3), (3, 4)]]


def test_falling_perplexity():
    """The fourth token (6 after 3) and the sixth (2.5 after 2) are less likely than the one before."""
    r = one(logprobs=[(-PPL.log()).tolist()])
    assert starts(perplexity_runs(), r) == [0, 3, 5]
    assert starts(perplexity_runs("code", end_alone=True), r) == [0, 2, 4, 6]
    scored = one(logprobs=[[0.0] * 7], ref_logprobs=[(-PPL.log()).tolist()])
    assert starts(perplexity_runs(), scored) == [0]
    assert starts(perplexity_runs(source="ref_logprobs"), scored) == [0, 3, 5]


def test_no_macro_action_reaches_over_an_observation():
    r = one((False, True, True, True, False, True, True), logprobs=[[0, -1, -1, -1, 0, -9, -9]])
    assert fixed_ngrams(2)(r).to_lists(1) == [[(1, 3), (3, 4), (5, 7)]]
    assert perplexity_runs()(r).to_lists(1) == [[(1, 4), (5, 7)]]
    assert perplexity_runs("code")(r).to_lists(1) == [[(1, 4), (5, 7)]]


def test_ordinals_run_through_the_rows_of_a_trajectory():
    r = Rollouts.from_lists([[1, 2, 3], [4], [5, 6]], [0, 0, 0], trajectories=["a", "b", "a"], row_index=[1, 0, 0])
    assert fixed_ngrams(1)(r).index.tolist() == [2, 3, 4, 0, 0, 1]


def test_random_ngrams_use_each_length_as_often_as_the_list_holds_it():
    """1 + 2 + 4 tokens, twice, in a shuffled order; the rest is one macro action."""
    r = one((True,) * 40)
    (row,) = random_ngrams(3, lengths=(1, 2, 4), repeats=2)(r).to_lists(1)
    sizes = [stop - start for start, stop in row]
    assert sorted(sizes[:6]) == [1, 1, 2, 2, 4, 4]
    assert sizes[6:] == [40 - 14]
    assert repr(random_ngrams(3)) == "random_ngrams(3, lengths=(1, 2, 3, 5, 10), repeats=3)"


def test_random_ngrams_depend_on_the_seed_and_the_row_alone():
    r = Rollouts.from_lists([list(range(k, k + 30)) for k in range(4)], [0] * 4)
    cut = random_ngrams(1)(r).to_lists(4)
    assert random_ngrams(1)(r).to_lists(4) == cut
    assert random_ngrams(2)(r).to_lists(4) != cut
    assert cut[0] != cut[1]
    turned = r.select(torch.tensor([2, 0, 3, 1]))
    assert random_ngrams(1)(turned).to_lists(4) == [cut[2], cut[0], cut[3], cut[1]]


def test_constituents():
    """(S (NP the old man) (VP (V saw) (NP (NP a cat) (PP (P on) (NP the mat))))) of 9 tokens, cutoff 5.

    The object, 5 tokens, is taken apart: "a cat" and "on the mat"; the lone verb joins the subject. Below cutoff 4 the
    subject of 3 is still whole; below 3 its tokens join the macro action that the sentence opened.
    """
    tree = [(0, 9), (0, 3), (3, 9), (4, 9), (4, 6), (6, 9), (7, 9)]
    r = one((True,) * 9, meta={"constituents": [tree]})
    assert constituents()(r).to_lists(1) == [[(0, 4), (4, 6), (6, 9)]]
    assert starts(constituents(6), r) == [0, 4]
    assert starts(constituents(3), r) == [0, 4, 7]
    assert starts(constituents(10), r) == [0]
    words = [(k, k + 1) for k in range(9)]
    assert starts(constituents(), one((True,) * 9, meta={"constituents": [words[::-1] + tree]})) == [0, 4, 6]


def test_every_sentence_opens_a_macro_action():
    """The second sentence begins with a word of its own: it does not join the first."""
    r = one((True,) * 8, meta={"constituents": [[(0, 2), (3, 8), (4, 8)]]})
    assert constituents()(r).to_lists(1) == [[(0, 3), (3, 4), (4, 8)]]


@pytest.mark.parametrize(
    "splitter",
    [
        fixed_ngrams(2),
        fixed_ngrams(3, end_alone=True),
        random_ngrams(5, lengths=(1, 2, 3)),
        perplexity_runs(),
        perplexity_runs("code", source="ref_logprobs", end_alone=True),
        constituents(4, end_alone=True),
    ],
    ids=repr,
)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_macro_actions_tile_the_actions(splitter, seed):
    r = random_batch(seed)
    r = r.replace(meta={"constituents": [[(0, int(n)), (0, int(n) // 2)] if n > 1 else [] for n in r.lengths]})
    spans = splitter(r)
    ids = r.with_spans(made=spans).span_ids("made")
    assert ((ids >= 0) == r.action_mask).all()
    assert (spans.stop > spans.start).all()
    for n in range(r.num_trajectories):
        mine = (r.trajectory_ids[spans.row] == n).nonzero()[:, 0].tolist()
        mine.sort(key=lambda k: (int(r.row_index[spans.row[k]]), int(spans.start[k])))
        assert spans.index[mine].tolist() == list(range(len(mine)))


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_reward_reaches_its_own_macro_action_and_those_before_it(place, size):
    r = one((False, *[True] * 7, False), values=[[0.0] * 9])
    r = r.with_spans(macro=fixed_ngrams(size)(r))
    hot = torch.zeros(1, 9)
    hot[0, 1 + place] = 1
    credit = ma_rlhf(lam=1.0, kl_coef=0.0, reward="hot")(r.with_signals(hot=Signal(hot, "token")))
    end = min((place // size + 1) * size, 7)
    assert credit.advantages.tolist() == [[0.0] + [1.0] * end + [0.0] * (8 - end)]
    assert credit.parts["hot"].unit == "macro"


def test_empty():
    r = Rollouts.from_lists([[]], [0])
    for splitter in (fixed_ngrams(), random_ngrams(), fixed_ngrams(end_alone=True)):
        assert len(splitter(r)) == 0


def test_messages():
    with pytest.raises(ValueError, match="fixed_ngrams needs n of at least 1; got 0"):
        fixed_ngrams(0)
    with pytest.raises(ValueError, match=r"random_ngrams needs lengths and repeats of at least 1; got \(\) and 3"):
        random_ngrams(lengths=())
    with pytest.raises(ValueError, match="reading 'paper' or 'code' and source 'logprobs' or 'ref_logprobs'; got 'x'"):
        perplexity_runs("x")
    with pytest.raises(ValueError, match=r"needs rollouts\.logprobs, which this batch lacks"):
        perplexity_runs()(one())
    with pytest.raises(ValueError, match=r"random_ngrams needs rollouts\.tokens, which this batch lacks"):
        random_ngrams()(one().replace(tokens=None))
    with pytest.raises(ValueError, match=r'needs meta\["constituents"\], \(start, stop\) pairs for each row'):
        constituents()(one())
    with pytest.raises(ValueError, match="constituents needs a cutoff of at least 2; got 1"):
        constituents(1)
    with pytest.raises(ValueError, match=r"row 0 has \(2, 5\), which crosses \(0, 3\); the row has 7 positions"):
        constituents()(one(meta={"constituents": [[(0, 3), (2, 5)]]}))
    with pytest.raises(ValueError, match=r"row 0 has \(5, 8\); the row has 7 positions"):
        constituents()(one(meta={"constituents": [[(5, 8)]]}))
