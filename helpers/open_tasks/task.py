"""A task of the competition."""

from dataclasses import dataclass, field
from typing import Any

KINDS = ("fact", "describe", "evidence", "sum", "mood", "compare", "unknown", "list", "extract", "story")


@dataclass(frozen=True)
class Task:
    """What is asked, and what an answer is graded by."""

    task_id: str
    kind: str
    input: str
    reference: str  # an answer of five points
    aspects: str  # what this task is graded by, for a person or a language model
    key: dict[str, Any] = field(hash=False, repr=False)  # the same for the program
