import math

import pytest
import torch

from apportion import Rollouts, dr_grpo, hicra
from apportion.signals import StrategicGrams, hashed_characters, mine_strategic_grams

TEXT = "let's try a different approach 2 + 3 = 5 so we can use the fact that"
GRAMS = ["let's try a different approach", "use the fact that", "but the problem mentions"]


def rollouts(*rows: list[str], mask=None) -> Rollouts:
    return Rollouts.from_lists(
        [[1] * len(r) for r in rows], list(range(len(rows))), action_mask=mask, meta={"pieces": list(rows)}
    )


def marked(pieces: list[str], grams=GRAMS, mask=None) -> list[int]:
    signal = StrategicGrams.of(grams).measure(rollouts(pieces, mask=mask))["planning"]
    assert signal.unit == "token"
    return signal.values[0].nonzero()[:, 0].tolist()


def test_worked_example():
    words = TEXT.split(" ")
    assert len(words) == 17
    assert marked([words[0], *(" " + w for w in words[1:])]) == [0, 1, 2, 3, 4, 13, 14, 15, 16]


def test_any_cut_into_tokens():
    """Per character: all characters of the phrases, with the blanks inside them and none around."""
    first, second = "let's try a different approach", "use the fact that"
    at = TEXT.index(second)
    assert marked(list(TEXT)) == [*range(len(first)), *range(at, at + len(second))]
    assert marked([TEXT[:40], TEXT[40:]]) == [0, 1]
    assert marked(["we u", "", "se the fact th", "at's"]) == []
    assert marked(["we u", "", "se the fact th", "at ok"]) == [0, 2, 3]


def test_whole_words_any_case_any_blanks():
    assert marked(["Use The\n  FACT  that"]) == [0]
    assert marked(["reuse the fact that"]) == []
    assert marked(["use the fact thatch"]) == []
    assert marked(["use the fact. That"]) == []
    assert marked(["(use the fact that)"]) == [0]
    assert marked(["Let’s try a different approach"]) == [0]


def test_overlapping_and_repeated_phrases_mark_each_token_once():
    pieces = ["we", " can", " we", " can", " we", " stop"]
    assert marked(pieces, ["we can we", "can we can we"]) == [0, 1, 2, 3, 4]
    signal = StrategicGrams.of(["we can we"] * 2).measure(rollouts(pieces))["planning"].values
    assert signal.tolist() == [[1, 1, 1, 1, 1, 0]]


def test_a_phrase_does_not_run_across_tool_output_or_in_the_prompt():
    pieces = ["use the", " 7 ", "fact that", " use the fact that"]
    assert marked(pieces, mask=[[True, False, True, True]]) == [3]
    assert marked(["use the fact that", " x"], mask=[[False, True]]) == []


def test_semantic_entropy_counts_uses_of_clusters():
    """Three uses of the first cluster, one of the second."""
    grams = StrategicGrams((("we can use", "let us use"), ("try another way",)))
    r = rollouts(["we can use let us use"], ["so we can use", " and try another way"])
    assert grams.semantic_entropy(r) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert grams.semantic_entropy(rollouts(["nothing"])) == 0.0
    assert StrategicGrams(()).semantic_entropy(r) == 0.0


def test_empty_rows_and_missing_pieces():
    assert StrategicGrams.of(GRAMS).measure(rollouts([], ["x"]))["planning"].values.tolist() == [[0.0], [0.0]]
    with pytest.raises(ValueError, match=r'needs meta\["pieces"\], one string per token, which this batch lacks'):
        StrategicGrams.of(GRAMS).measure(Rollouts.from_lists([[1]], [0]))


def test_it_is_a_measure():
    grams = StrategicGrams.of(GRAMS)
    assert (grams.provides, grams.requires) == (("signals.planning",), ())
    assert grams == StrategicGrams.of(GRAMS)


def test_phrases_to_credit():
    """From the texts of the tokens; the placebo, phrases that nobody wrote, changes nothing."""
    pieces = [["Let's", " try", " a", " sum"], ["2+", "2", "=4"]]
    r = Rollouts.from_lists([[1, 2, 3, 4], [5, 6, 7]], [0, 0], outcome=[1, 0], meta={"pieces": pieces})
    marked = r.with_signals(**StrategicGrams.of(["let's try a"]).measure(r))
    assert hicra()(marked).advantages.tolist()[0] == pytest.approx([0.6, 0.6, 0.6, 0.5])
    placebo = r.with_signals(**StrategicGrams.of(["purple ideas sleep"]).measure(r))
    assert torch.equal(hicra()(placebo).advantages, dr_grpo()(r).advantages)


SOLUTIONS = [
    "Let us consider the triangle. 2 + 2 = 4",
    "First, let us consider the ratio of 3 and 5",
    "let us consider the case: the sum is odd",
    "7 apples and 9 pears make sixteen",
]


def test_mining_keeps_what_many_solutions_share():
    found = mine_strategic_grams(SOLUTIONS, min_solutions=2, top=1.0)
    phrases = {p for cluster in found.clusters for p in cluster}
    assert phrases == {"let us consider", "us consider the", "let us consider the"}
    assert mine_strategic_grams(SOLUTIONS, top=0.2).clusters[0][0] in phrases
    assert all("," not in p and ":" not in p for c in mine_strategic_grams(SOLUTIONS, top=1.0).clusters for p in c)


def test_mining_clusters_by_the_given_encoder():
    """Phrases of showing are five, but in two solutions; the rest is in three, counted once each, and comes first."""
    texts = ["we prove it now we prove it", "we show it now", "he runs far off", "he runs far away"]

    def embed(phrases):
        return torch.tensor([[1.0, 0.1] if ("prove" in p or "show" in p) else [0.1, 1.0] for p in phrases])

    showing = {"we prove it", "prove it now", "now we prove", "we show it", "show it now"}
    rest = {"it now we", "he runs far", "runs far off", "runs far away"}
    found = mine_strategic_grams(texts, embed=embed, sizes=(3,), top=1.0)
    assert [set(c) for c in found.clusters] == [rest, showing]
    assert [set(c) for c in mine_strategic_grams(texts, embed=embed, sizes=(3,), top=0.2).clusters] == [rest]
    apart = mine_strategic_grams(texts, embed=embed, sizes=(3,), top=1.0, similarity=0.1)
    assert [set(c) for c in apart.clusters] == [rest | showing]


def test_mining_nothing():
    assert mine_strategic_grams([]).clusters == ()
    assert mine_strategic_grams(["too short"]).clusters == ()


def test_hashed_characters_know_spelling():
    a, b, c = torch.nn.functional.normalize(
        hashed_characters(["we can use the", "we can use that", "purple ideas sleep"]), dim=1
    )
    assert a @ b > 0.7
    assert a @ c < 0.3
    assert hashed_characters([""]).shape == (1, 512)
