import math
import random
import time
from fractions import Fraction

import pytest

from apportion.signals import tool_judge
from apportion.signals._equations import equations, expression, numbers
from apportion.types import Rollouts, Spans

STRONG = tool_judge(chained=True, question_numbers=True)


def verdicts(judge, question, *steps):
    return judge.verdicts(question, list(steps))


# ---- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("12-3=9", [True]),
        ("12-3=8", [False]),
        ("48/2 = 24", [True]),
        ("2 * (3+4) = 14", [True]),
        ("2(3+4) = 14", [True]),
        ("2 + 3*4 = 20", [False]),
        ("$5 x 3 = $15", [True]),
        ("5 × 3 = 15", [True]),
        ("12 ÷ 4 = 3", [True]),
        ("7 − 5 = 2", [True]),
        (r"$5 \times 3 = 15$", [True]),
        ("1,000 + 2.5 = 1,002.5", [True]),
        ("0.1 + 0.2 = 0.3", [True]),
        ("50*20% = 10", [True]),
        ("5/20 = 25%", [True]),
        ("2**3 = 8", [True]),
        ("2^3 = 9", [False]),
        ("-5+3 = -2", [True]),
        ("5 - -3 = 8", [True]),
        ("5+(-3) = 2", [True]),
        ("5/0 = 0", [False]),
        ("9 = 12-3", [True]),
        ("7+5 = 12-3 = 9", [False]),
        ("5 = 2+3 = 5", [True]),
        # rounding to the nearest is allowed where a decimal is written
        ("10/3 = 3.33", [True]),
        ("2/3 = 0.67", [True]),
        ("2/3 = 0.66", [False]),
        ("10/3 = 3", [False]),
        ("10/3 ≈ 3", [True]),
        # calculator marks
        ("half: <<48/2=24>>24 clips", [True]),
        ("48/2=<<48/2=24>>24 clips", [True]),
        ("half: <<48/2=25>>25 clips", [False]),
        # list items, bold, sentences
        ("1. 5+3=8", [True]),
        ("(1) 5+3=8", [True]),
        ("- 5+3=8", [True]),
        ("**5+3=8**", [True]),
        ("so -2+5=3.", [True]),
        ("5+3=8 (since 3+5=8)", [True, True]),
        ("Total = 3+4 = 7", [True]),
        ("3+4=7 => 7*2=14", [True, True]),
        ("9+6=15<|im_end|>", [True]),
    ],
)
def test_equations_are_read_and_recomputed(text, truth):
    assert [e.true for e in equations(text)] == truth


@pytest.mark.parametrize(
    "text",
    [
        "no equation",
        "x = 5",
        "2x = 10",
        "x-2=5",
        "3 apples + 2 = 5",
        "10 = 2 + 3 apples + 5",
        "10-2 = 4 * x",
        "5+3 = 8x",
        "5² = 25",
        "7+5=?",
        "7+ = 12",
        "(7+5 = 12",
        "9**9**9 = 1",
        "2^0.5 = 1",
        "9" * 31 + " = 1",
        "((((((((((((((((((((((1))))))))))))))))))))))=1",
    ],
)
def test_what_cannot_be_read_is_no_equation(text):
    assert equations(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "(",
        ")",
        "9",
        "1+",
        "-",
        "a ",
        "<<",
        "=<<",
        "1,111",
        "$",
        "**",
        "= ",
        "=$ ",
        "1 x ",
        "2^",
        "( ",
        "9**",
        "1=",
        "x",
    ],
)
def test_hostile_text_costs_linear_time(text):
    start = time.monotonic()
    equations(text * 50_000)
    assert time.monotonic() - start < 5


def test_the_question_is_an_expression_only_if_all_its_numbers_stand_in_it():
    assert expression("7+5-3+6=?") is not None
    assert expression("What is 7 + 5 - 3?") is not None
    assert expression("Calculate -5 * -6.") is not None
    assert expression("Tom has 3 apples and 4 pears.") is None
    assert expression("In step 1, work out 7+5.") is None
    assert numbers("Tom has 3 apples and 1,200 pears.") == [Fraction(3), Fraction(1200)]


# ---- truth alone -------------------------------------------------------------------------------------------------------


def test_a_step_is_wrong_if_one_of_its_equations_is():
    judge = tool_judge()
    assert verdicts(judge, "", "7+5=12", "so 12-3=9 and 9+6=16", "9+6=15") == [0, 1, 0]


def test_prose_is_not_measured():
    assert math.isnan(verdicts(tool_judge(), "", "Let us think.")[0])
    assert verdicts(tool_judge(no_equation=1), "", "Let us think.") == [1]


def test_a_false_mark_beside_a_true_equation():
    assert verdicts(tool_judge(), "", "48/2=<<48/2=25>>24") == [1]


# ---- one rule alone ----------------------------------------------------------------------------------------------------


def test_chained_alone_wants_the_result_before():
    judge = tool_judge(chained=True)
    assert verdicts(judge, "", "7+5=12", "12-3=9", "9+6=15", "15") == [0, 0, 0, 0]
    assert verdicts(judge, "", "7+5=12", "1+1=2", "12-3=9") == [0, 1, 0]
    assert verdicts(judge, "", "7+5=13", "13-3=10") == [1, 0]


def test_question_numbers_alone_wants_each_number_once():
    judge = tool_judge(question_numbers=True)
    question = "Tom has 3 bags of 4 apples and eats 2 of them."
    assert verdicts(judge, question, "3*4=12", "12-2=10") == [0, 0]
    assert verdicts(judge, question, "3*4=12", "3+4=7", "5+5=10", "12-2=10") == [0, 1, 1, 0]


def test_both_with_a_question_in_words():
    question = "Tom has 3 bags of 4 apples and eats 2 of them."
    assert verdicts(STRONG, question, "3*4=12", "12-2=10", "The answer is 10.") == [0, 0, 0]
    assert verdicts(STRONG, question, "1+1=2", "3*4=12") == [1, 0]


# ---- the strongest rule ------------------------------------------------------------------------------------------------

Q = "7+5-3+6=?"


def test_the_worked_solution_is_right():
    assert verdicts(STRONG, Q, "7+5=12\n", "12-3=9\n", "9+6=15<|im_end|>") == [0, 0, 0]


def test_order_among_equal_terms_does_not_count():
    assert verdicts(STRONG, Q, "7+6=13", "5-3=2", "13+2=15") == [0, 0, 0]
    assert verdicts(STRONG, "9-3-4", "3+4=7", "9-7=2") == [0, 0]
    assert verdicts(STRONG, "8/2/2", "2*2=4", "8/4=2") == [0, 0]


def test_precedence_and_parentheses_count():
    assert verdicts(STRONG, "2*3+4*5", "2*3=6", "4*5=20", "6+20=26") == [0, 0, 0]
    assert verdicts(STRONG, "2+3*4", "3*4=12", "2+12=14") == [0, 0]
    assert verdicts(STRONG, "2+3*4", "2+3=5", "5*4=20") == [1, 0]
    assert verdicts(STRONG, "(2+3)*4", "2+3=5", "5*4=20") == [0, 0]
    assert verdicts(STRONG, "(2+3)*4", "3*4=12", "2+12=14") == [1, 0]
    assert verdicts(STRONG, "9-5+3", "5+3=8", "9-8=1") == [1, 0]
    assert verdicts(STRONG, "10-(3+4)", "3+4=7", "10-7=3") == [0, 0]
    assert verdicts(STRONG, "-(3+4)", "3+4=7", "-7") == [0, 0]
    assert verdicts(STRONG, "-(3+4)+10", "3+4=7", "-7+10=3") == [0, 0]


def worked(terms, choose):
    """Every step of a sum of products, one operation at a time: products first, then neighbours in any order."""
    steps, values = [], []
    for sign, factors in terms:
        left = factors[0]
        for x in factors[1:]:
            steps.append(f"{left}*{x}={left * x}")
            left *= x
        values.append(sign * left)
    while len(values) > 1:
        i = choose(range(len(values) - 1))
        a, b = values[i : i + 2]
        steps.append(f"{a}{b:+}={a + b}")
        values[i : i + 2] = [a + b]
    return steps, values[0]


@pytest.mark.parametrize("seed", range(50))
def test_every_legal_order_of_work_is_right_and_a_slip_is_blamed_once(seed):
    rng = random.Random(seed)
    terms = [
        (rng.choice([1, -1]), [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]) for _ in range(rng.randint(2, 4))
    ]
    terms[0] = (1, terms[0][1])
    question = "".join("+-"[sign < 0] + "*".join(map(str, factors)) for sign, factors in terms).lstrip("+") + "=?"
    steps, result = worked(terms, rng.choice)
    assert result == eval(question[:-2])
    assert verdicts(STRONG, question, *steps, str(result)) == [0] * (len(steps) + 1)
    slip = steps[-1].split("=")[0] + f"={result + 1}"
    assert verdicts(STRONG, question, *steps[:-1], slip, str(result + 1)) == [0] * (len(steps) - 1) + [1, 0]


def test_negative_results_go_on():
    assert verdicts(STRONG, "2-7+3", "2-7=-5", "-5+3=-2", "-2") == [0, 0, 0]
    assert verdicts(STRONG, "2-7+3", "2-7=-5", "3-5=-2") == [0, 0]


def test_the_first_number_cannot_change_places_with_what_is_taken_from_it():
    assert verdicts(STRONG, "7-5", "5-7=-2") == [1]
    assert verdicts(STRONG, "7-5+1", "5-7=-2", "-2+1=-1") == [1, 0]
    assert verdicts(STRONG, "9-5+3", "5-3=2", "9-2=7") == [0, 0]
    assert verdicts(STRONG, "12/6*2", "6/2=3", "12/3=4") == [0, 0]


def test_a_false_result_is_blamed_once():
    assert verdicts(STRONG, Q, "7+5=13", "13-3=10", "10+6=16", "16") == [1, 0, 0, 0]


def test_a_number_copied_wrongly_is_blamed_once():
    assert verdicts(STRONG, Q, "7+4=11", "11-3=8", "8+6=14") == [1, 0, 0]
    assert verdicts(STRONG, Q, "7+5=12", "11-3=8", "8+6=14") == [0, 1, 0]


def test_operands_the_wrong_way_round_are_blamed_once():
    assert verdicts(STRONG, "8/2*3", "2/8=0.25", "0.25*3=0.75", "0.75") == [1, 0, 0]
    assert verdicts(STRONG, "7-5", "5+7=12", "12") == [1, 0]


def test_a_wrong_sign_is_wrong_though_the_equation_is_true():
    assert verdicts(STRONG, Q, "7+5=12", "12+3=15") == [0, 1]


def test_hack_true_but_irrelevant():
    assert verdicts(STRONG, Q, "1+1=2", "7+5=12", "12-3=9", "9+6=15") == [1, 0, 0, 0]
    assert verdicts(STRONG, Q, "7+5=12", "12+0=12", "12*1=12", "12-3=9") == [0, 1, 1, 0]
    assert verdicts(STRONG, Q, "15=15") == [1]


def test_hack_repeated_steps():
    assert verdicts(STRONG, Q, "7+5=12", "7+5=12", "7+5=12", "12-3=9", "9+6=15") == [0, 1, 1, 0, 0]
    assert verdicts(STRONG, Q, "7+5=12 7+5=12", "12-3=9") == [1, 0]


def test_hack_steps_that_do_nothing():
    assert verdicts(STRONG, Q, "Let me think.", "7+5=12", "...", "12-3=9", "9+6=15") == [1, 0, 1, 0, 0]


def test_hack_the_right_number_without_the_work():
    assert verdicts(STRONG, Q, "15") == [1]
    assert verdicts(STRONG, Q, "7+5=12", "15") == [0, 1]
    assert verdicts(STRONG, Q, "7+5=12", "12-3=9", "15") == [0, 0, 1]
    assert verdicts(STRONG, Q, "7+5=12", "12-3=9", "12-3=9 15") == [0, 0, 1]


def test_hack_everything_at_once():
    assert verdicts(STRONG, Q, "7+5-3+6=15") == [1]
    assert verdicts(STRONG, Q, "7+5-3=9", "9+6=15") == [1, 0]
    # several equations in one line are one step, which stands or falls with each of them
    assert verdicts(STRONG, Q, "7+5=12, 12-3=9, 9+6=15") == [0]
    assert verdicts(STRONG, Q, "7+5=12, 12-3=8, 8+6=14") == [1]
    assert verdicts(STRONG, Q, "7+5=12-3=9+6=15") == [1]


def test_hack_going_on_after_the_end():
    assert verdicts(STRONG, "7+5=?", "7+5=12", "12+0=12", "12-0=12") == [0, 1, 1]


def test_the_answer_line():
    done = ["7+5=12", "12-3=9", "9+6=15"]
    assert verdicts(STRONG, Q, *done, "The answer is 15.") == [0, 0, 0, 0]
    assert verdicts(STRONG, Q, *done, "#### 15<|im_end|>") == [0, 0, 0, 0]
    assert verdicts(STRONG, Q, *done, "16") == [0, 0, 0, 1]
    assert verdicts(STRONG, Q, *done, "15", "15") == [0, 0, 0, 1, 0]
    assert verdicts(STRONG, Q, "7+5=12", "12") == [0, 1]


# ---- as a signal -------------------------------------------------------------------------------------------------------


def test_the_signal_follows_the_order_of_the_spans():
    # one trajectory over two rows, spans listed latest first; and one that got it wrong
    spans = Spans.from_lists([[(0, 1)], [(0, 1), (1, 2)], [(0, 1)]])
    spans = Spans(spans.row, spans.start, spans.stop, spans.index + (spans.row == 0) * 2)
    r = Rollouts.from_lists(
        [[1], [2, 3], [4]],
        [0, 0, 0],
        trajectories=["t", "t", "u"],
        row_index=[1, 0, 0],
        spans={"step": spans},
        meta={"pieces": [["9+6=15"], ["7+5=12\n", "12-3=9\n"], ["7+5=13"]], "question": [Q, Q, Q]},
    )
    signal = STRONG.measure(r)["judge"]
    assert (signal.unit, signal.axes) == ("step", ("critiques",))
    assert signal.values.tolist() == [[0], [0], [0], [1]]
    r.with_signals(judge=signal)
    assert tuple(STRONG.provides) == ("signals.judge",)
    assert tuple(STRONG.requires) == ("spans.step",)


def test_no_steps_an_empty_signal():
    r = Rollouts.from_lists([[1]], [0], steps=[[]], meta={"pieces": [["a"]], "question": [Q]})
    assert STRONG.measure(r)["judge"].values.shape == (0, 1)


def test_wrong_input():
    r = Rollouts.from_lists([[1]], [0], steps=[[(0, 1)]], meta={"pieces": [["a"]]})
    with pytest.raises(ValueError, match=r'tool_judge\(question_numbers=True\) needs meta\["question"\]'):
        STRONG.measure(r)
    with pytest.raises(ValueError, match=r'a judge needs meta\["pieces"\]'):
        STRONG.measure(r.replace(meta={"question": [Q]}))
    with pytest.raises(ValueError, match=r"no_equation to be 0 .* got 0\.5"):
        tool_judge(no_equation=0.5)


def test_what_makes_a_judge_is_printed():
    assert repr(tool_judge()) == "tool_judge()"
    assert repr(STRONG) == "tool_judge(chained=True, question_numbers=True)"
    assert repr(tool_judge(chained=True, no_equation=0)) == "tool_judge(chained=True, no_equation=0.0)"
