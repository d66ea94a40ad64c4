"""The ledger of claims as tables: what each lesson claims, on every seed and where it must not hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from course.claims.ledger import EXCEPTIONS, LEDGER, Lesson, Row, read_exceptions, read_ledger
from course.runner.refresh import lessons

EMPTY = "The ledger has not been filled yet: `python -m course claims` runs the lessons on several seeds and fills it."


def page(notebooks: list[Path], ledger: Path = LEDGER, exceptions: Path = EXCEPTIONS) -> str:
    """Markdown with a table for each lesson that is in the ledger, or a sentence where there is no ledger."""
    known = read_ledger(ledger)
    reasons = read_exceptions(known, exceptions)
    parts = []
    for path, (number, title, *_) in zip(notebooks, lessons(notebooks), strict=True):
        if path.stem in known:
            rows = table(known[path.stem], reasons.get(path.stem, {}))
            parts.append(f"## {number} · {title}\n\n[The lesson](notebooks/{path.name})\n\n{rows}")
    return "\n\n".join(parts) or EMPTY


def table(lesson: Lesson, reasons: Mapping[str, str]) -> str:
    """The claims of a lesson; `reasons` says of its exceptions why they do not survive."""
    seeds = sorted({seed for row in lesson.claims for seed in row.values}, key=int)
    head = ["claim", "kind", "bound", *(f"seed {seed}" for seed in seeds), "spread", "control", "what is wrong"]
    lines = [head, ["---"] * len(head)]
    for row in lesson.claims:
        values = [shown(row.values.get(seed)) for seed in seeds]
        spread = "" if row.spread is None else shown(row.spread)
        known = [f"Known: {reasons[row.statement]}"] if row.statement in reasons else []
        wrong = ". ".join(["; ".join(row.faults), *known])
        lines.append([row.statement, row.kind, bound(row), *values, spread, control(row), wrong])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shown(value: Any) -> str:
    """A value as it is read; a dash where the run had none."""
    return "–" if value is None else value if isinstance(value, str) else f"{value:.3g}"


def bound(row: Row) -> str:
    """What the values must keep; nothing for a report."""
    bounds = {"at least": row.at_least, "at most": row.at_most}
    return " and ".join(f"{word} {value:.3g}" for word, value in bounds.items() if value is not None)


def control(row: Row) -> str:
    """The value where the claim must not hold, and where that is not the null run."""
    if row.kind != "effect":
        return ""
    return shown(row.control) + (" (measured by the lesson)" if row.control_from == "lesson" else "")
