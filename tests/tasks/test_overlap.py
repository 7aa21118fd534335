import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from apportion.tasks import Problem, near_duplicates
from apportion.tasks._overlap import _band, _minima

DATA = Path(__file__).parent.parent / "data"


def asked(*questions):
    return [Problem(id=q, question=q, prompt=q, answer="1") for q in questions]


def gsm8k():
    return [json.loads(line)["question"] for line in (DATA / "gsm8k_train.jsonl").read_text().splitlines()]


def resemblance(a, b):
    """From the definition, for texts without upper case and double spaces."""
    x, y = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (a, b))
    return len(x & y) / len(x | y)


def changed(random, text, share):
    words = text.split()
    for n in random.sample(range(len(words)), round(share * len(words))):
        words[n] = str(random.randrange(10**6))
    return " ".join(words)


def test_a_case_by_hand():
    # abcdefgh has the pieces abcde bcdef cdefg defgh; abcdefgx has abcde bcdef cdefg defgx: 3 shared of 5
    [pair] = near_duplicates(asked("abcdefgh"), asked("unlike", "abcdefgx"), similarity=0.5)
    assert pair.similarity == 3 / 5
    assert (pair.train.question, pair.test.question) == ("abcdefgh", "abcdefgx")
    assert near_duplicates(asked("abcdefgh"), asked("abcdefgx"), similarity=0.61) == []


def test_case_and_white_space_do_not_count_and_the_same_question_has_1():
    [pair] = near_duplicates(asked("How MANY\n apples ?"), asked("how many  apples?"))
    assert pair.similarity == 1


def test_every_pair_that_the_definition_names_is_found():
    rng = random.Random(0)
    originals = [" ".join(q.casefold().split()) for q in gsm8k()]
    train = [changed(rng, q, share) for q in originals for share in (0.02, 0.05, 0.1, 0.2, 0.4)]
    for similarity in (0.7, 0.9):
        expected = {q for q in train if max(resemblance(q, o) for o in originals) >= similarity}
        found = near_duplicates(asked(*train), asked(*originals), similarity=similarity)
        assert {pair.train.question for pair in found} == expected
        assert 0 < len(expected) < len(train)
        assert all(pair.similarity == resemblance(pair.train.question, pair.test.question) for pair in found)
        assert [p.similarity for p in found] == sorted((p.similarity for p in found), reverse=True)


def test_the_minima_agree_as_often_as_the_texts_do():
    # P(two minima are equal) = |A & B| / |A | B|; 128 hashes have a standard deviation of at most 0.044
    rng = random.Random(1)
    texts = [" ".join(q.casefold().split()) for q in gsm8k()]
    pairs = [(t, changed(rng, t, 0.15)) for t in texts]
    minima = _minima([t for pair in pairs for t in pair])
    shares = (minima[0::2] == minima[1::2]).mean(1)
    errors = shares - np.array([resemblance(a, b) for a, b in pairs])
    assert abs(errors).max() < 4 * 0.044
    assert abs(errors.mean()) < 3 * 0.044 / len(pairs) ** 0.5


def test_blocks_change_nothing(monkeypatch):
    texts = gsm8k()
    whole = _minima(texts)
    monkeypatch.setattr("apportion.tasks._overlap._BLOCK", 300)
    assert (_minima(texts) == whole).all()
    assert len(set(_band(whole[:, :4]).tolist())) == len(texts)


def test_an_instruction_in_every_prompt_makes_none_alike():
    rng = random.Random(2)
    text = "solve the following problem step by step and end with the answer on a line of its own. "
    questions = [f"{text}{rng.randrange(10**9)} and {rng.randrange(10**9)}? take your time." for _ in range(120)]
    assert near_duplicates(asked(*questions[:100]), asked(*questions[100:])) == []
    # ten are too few to know a template: 123 letters make 119 pieces, of which about 27 are of the numbers
    assert len(near_duplicates(asked(*questions[:10]), asked(*questions[10:20]), similarity=0.55)) == 10


def test_short_empty_and_strange_texts():
    assert near_duplicates([], asked("a")) == near_duplicates(asked("a"), []) == []
    assert len(near_duplicates(asked("2+2", ""), asked("2+2", " "))) == 2
    assert near_duplicates(asked("2+2=?"), asked("2+3=?")) == []
    assert (
        len(
            near_duplicates(
                asked("这是一个关于苹果的问题\ud800", "🙂" * 9), asked("这是一个关于苹果的问题\ud800", "🙂" * 9)
            )
        )
        == 2
    )
    with pytest.raises(ValueError, match=r"similarity must be from 0\.5 to 1; got 0\.4"):
        near_duplicates(asked("a"), asked("b"), similarity=0.4)


def test_the_time_does_not_grow_with_the_square_when_all_are_alike():
    rng = random.Random(3)
    start = gsm8k()[0]
    words = [f"{rng.choice('abcdefgh')} {start} {rng.randrange(10**6)} {rng.choice('abcdefgh')}" for _ in range(2000)]
    seconds = []
    for size in (500, 2000):  # four times as many: a square would take sixteen times as long
        begun = time.process_time()
        assert len(near_duplicates(asked(*words[: size // 2]), asked(*words[size // 2 : size]))) == size // 2
        seconds.append(time.process_time() - begun)
    assert seconds[1] < 10 * seconds[0]
