"""A question of a lesson's quiz: how it stands in its cell, with the answer folded, and what the book does with it."""

import re

QUESTION = re.compile(
    r"\*\*(?P<question>.+)\*\*\n\n- A\. .+\n- B\. .+\n- C\. .+\n- D\. .+\n\n"
    r"(?P<fold><details)><summary>.+</summary>\n\n(?P<right>[A-D])\. (?P<reason>.+)\n\n</details>"
)


def mark(source: str, name: str) -> str:
    """The cell with the right choice's letter at its fold, for quiz.js; as it is where it is no question.

    `name` is that of the question, under which the browser remembers what was chosen.
    """
    found = QUESTION.fullmatch(source)
    if found is None:
        return source
    end = found.end("fold")
    return f'{source[:end]} data-question="{name}" data-right="{found["right"]}"{source[end:]}'
