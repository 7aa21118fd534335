import time

import pytest
import torch

from apportion.signals import blank_lines, lines, pattern, sentences
from apportion.types import Rollouts


def rollouts(*rows, mask=None, **more):
    meta = {"pieces": [list(row) for row in rows]}
    return Rollouts.from_lists(
        [list(range(len(r))) for r in rows], [0] * len(rows), action_mask=mask, meta=meta, **more
    )


def steps(splitter, *pieces, mask=None):
    """The steps as text, joined by | so that the boundaries can be seen."""
    spans = splitter(rollouts(pieces, mask=mask and [mask]))
    return "|".join("".join(pieces[s:e]) for s, e in spans.to_lists(1)[0])


def test_a_separator_belongs_to_the_step_before_it():
    assert steps(lines(), "7+5", "=12", "\n", "12-3", "=9") == "7+5=12\n|12-3=9"


def test_the_spans_are_exact_in_tokens():
    spans = lines()(rollouts(["a", "\n", "b"], ["c"]))
    assert spans.to_lists(2) == [[(0, 2), (2, 3)], [(0, 1)]]
    assert spans.index.tolist() == [0, 1, 0]


def test_a_token_across_a_boundary_belongs_to_the_step_in_which_it_starts():
    assert steps(lines(), "a", "b\nc", "d\n", "e") == "ab\nc|d\n|e"


def test_a_step_in_which_no_token_starts_vanishes():
    assert steps(lines(), "a\nb\nc", "\n", "d") == "a\nb\nc\n|d"


def test_white_space_joins_the_step_before_it():
    assert steps(lines(), "a\n", "\n", " \n", "b", "\n") == "a\n\n \n|b\n"
    assert steps(lines(), "\n", " \n", "a\n", "b") == "\n \na\n|b"


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[SEP]"])
def test_the_end_of_text_token_belongs_to_the_last_step(end):
    assert steps(lines(), "a\n", "b\n", end) == f"a\n|b\n{end}"
    assert steps(lines(), "a\n", "b", end, "\n") == f"a\n|b{end}\n"


def test_an_empty_response_has_no_steps():
    assert len(lines()(rollouts([]))) == 0
    assert len(lines()(rollouts(["<|im_end|>"]))) == 0
    assert len(lines()(rollouts(["\n", " ", "<|im_end|>"]))) == 0
    assert len(lines()(rollouts(["a\n", "b"], mask=[[False, False]]))) == 0


def test_only_actions_are_split_and_no_step_crosses_a_gap():
    mask = [False, False, True, True, False, True, True]
    pieces = ["Q\n", "q", "a\n", "b", "tool\n", "c\n", "d"]
    spans = lines()(rollouts(pieces, mask=[mask]))
    assert spans.to_lists(1) == [[(2, 3), (3, 4), (5, 6), (6, 7)]]
    assert spans.index.tolist() == [0, 1, 2, 3]


def test_ordinals_go_on_through_the_rows_of_a_trajectory():
    r = rollouts(["c\n", "d"], ["x"], ["a\n", "b"], trajectories=["t", "u", "t"], row_index=[1, 0, 0])
    spans = lines()(r)
    assert spans.row.tolist() == [0, 0, 1, 2, 2]
    assert spans.index.tolist() == [2, 3, 0, 0, 1]
    r.with_spans(step=spans)


def test_padding_is_in_no_step():
    spans = lines()(rollouts(["a", "\n", "b"], ["c", "\n"]))
    assert spans.stop.tolist() == [2, 3, 2]


def test_blank_lines():
    assert steps(blank_lines(), "a\n", "b\n", "\n", "c", "\n \n", "d\n\n\n", "e") == "a\nb\n\n|c\n \n|d\n\n\n|e"


def test_sentences():
    assert steps(sentences(), *"It costs 3.5 now. So? Yes!\nEnd") == "It costs 3.5 now. |So? |Yes!\n|End"
    assert steps(sentences(), *'He said "no." Then left.') == 'He said "no." |Then left.'
    assert steps(sentences(), *"1. Add. \n2. Done.") == "1. Add. \n|2. Done."
    assert steps(sentences(), *"The total is 12. Then") == "The total is 12. |Then"
    assert steps(sentences(), *"加三。再減一。") == "加三。|再減一。"


def test_pattern():
    assert steps(pattern(r"(?=Step \d)"), "Intro ", "Step ", "1 a ", "Step ", "2 b") == "Intro |Step 1 a |Step 2 b"
    assert steps(pattern(";"), "a", ";", "b") == "a;|b"


def test_what_makes_a_splitter_is_printed():
    assert [repr(s) for s in (lines(), sentences(), blank_lines(), pattern(r"\d;"))] == [
        "lines()",
        "sentences()",
        "blank_lines()",
        r"pattern('\\d;')",
    ]


def test_wrong_input():
    with pytest.raises(ValueError, match=r"pattern needs a regular expression; '\(' is none"):
        pattern("(")
    with pytest.raises(
        ValueError, match=r'lines\(\) needs meta\["pieces"\], one string per token, which this batch lacks'
    ):
        lines()(Rollouts.from_lists([[1]], [0]))
    with pytest.raises(ValueError, match=r'meta\["pieces"\] of row 0 has 2 strings but the row has 1 tokens'):
        lines()(Rollouts.from_lists([[1]], [0], meta={"pieces": [["a", "b"]]}))


@pytest.mark.parametrize("text", [".", "\n", " ", ".)", "\n ", '."', "1. ", "<", "a."])
@pytest.mark.parametrize("splitter", [lines(), sentences(), blank_lines()], ids=repr)
def test_hostile_text_costs_linear_time(splitter, text):
    r = rollouts([text] * 20_000)
    start = time.monotonic()
    spans = splitter(r)
    assert time.monotonic() - start < 2
    assert not len(spans) or int((spans.stop - spans.start).sum()) == 20_000


def test_the_input_is_left_alone():
    r = rollouts(["a\n", "b"])
    before = r.action_mask.clone(), [list(p) for p in r.meta["pieces"]]
    lines()(r)
    assert torch.equal(r.action_mask, before[0])
    assert r.meta["pieces"] == before[1]
