"""Which answers count as equal when responses vote."""

import pytest

from apportion.signals import stated_answer


@pytest.mark.parametrize(
    ("gold", "same"),
    [
        ("12", ["12", "so 3*4 = 12.", "#### 12.0", r"\boxed{12}", "$12"]),
        ("1/2", ["0.5", r"\frac{1}{2}", "1/2", "50/100"]),
        ("-1,000", ["-1000", "it is -1,000.00"]),
        ("45%", ["45", "45 %"]),
        ("B", [r"\boxed{B}", "I think\n#### b", "b", "<answer> B </answer>"]),
        (
            r"\frac{\sqrt{3}}{2}",
            [r"so \boxed{\frac{\sqrt{3}}{2}}", r"\boxed{\frac {\sqrt 3}{2}}".replace(r"\sqrt 3", r"\sqrt{3}")],
        ),
    ],
)
def test_spellings_of_one_answer_agree(gold, same):
    assert len({stated_answer(text, gold) for text in [gold, *same]}) == 1


@pytest.mark.parametrize(
    ("gold", "one", "other"),
    [
        ("12", "12", "21"),
        ("12", "12", "-12"),
        ("B", r"\boxed{B}", r"\boxed{C}"),
        (r"\sqrt{2}", r"\boxed{\sqrt{2}}", r"\boxed{2}"),
    ],
)
def test_different_answers_do_not(gold, one, other):
    assert stated_answer(one, gold) != stated_answer(other, gold)


@pytest.mark.parametrize(
    ("gold", "text"), [("12", ""), ("12", "no number"), ("12", "#### none"), ("B", " \n"), ("B", "so ####")]
)
def test_no_answer(gold, text):
    assert stated_answer(text, gold) is None
