"""Tasks that stand in the training rows: every run of eight words of the task is in one row."""

import re
from collections.abc import Iterable, Sequence

from helpers.open_tasks import Task

LENGTH = 8


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `LENGTH` words, in small letters; the whole text where it is shorter."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + LENGTH]) for i in range(max(1, len(words) - LENGTH + 1))}


def tasks_in(rows: Iterable[str], tasks: Sequence[Task]) -> list[Task]:
    """Tasks that a row holds whole, word for word; signs and line breaks do not count."""
    wanted = {task: word_runs(task.input) for task in tasks}
    found = set()
    for row in rows:
        runs = word_runs(row)
        found |= {task for task, needed in wanted.items() if needed <= runs}
    return [task for task in tasks if task in found]
