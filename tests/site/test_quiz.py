"""A question of a quiz is found in its cell, in every language of the book, and the letter of its answer with it."""

import pytest

from course.site.quiz import mark

QUESTION = (
    "**1. Which line rises, of $a$ and `b`?**\n\n- A. This one.\n- B. None.\n- C. Both.\n- D. The other.\n\n"
    "<details><summary>Answer</summary>\n\nC. It goes from 0 to 1.\n\n</details>"
)


@pytest.mark.parametrize("source", [QUESTION, QUESTION.replace("?**", "。**").replace("Answer", "答え")])
def test_the_fold_of_a_question_gets_its_name_and_the_letter_of_the_answer(source: str) -> None:
    marked = mark(source, "03_lines.1f")
    assert '\n\n<details data-question="03_lines.1f" data-right="C"><summary>' in marked
    assert marked.replace(' data-question="03_lines.1f" data-right="C"', "") == source


@pytest.mark.parametrize("missing", ["- D. The other.\n", "C. It", "<summary>Answer</summary>", "**"])
def test_what_is_no_question_stays_as_it_is(missing: str) -> None:
    broken = QUESTION.replace(missing, "")
    assert mark(broken, "03_lines.1f") == broken
