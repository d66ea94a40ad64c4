"""What the ledger says, data/claims.json, and what is wrong with a claim.

    {"version": 1, "lessons": {"08_rlhf": {"key": "...", "claims": [
        {"statement": ..., "kind": "effect", "at_least": 0.5, "at_most": null, "values": {"0": 0.61, ...},
         "control": 0.01, "control_from": "null run"}, ...]}}}

A value is a number, text (of a report), or null where the number was not finite or the lesson did not get there.
"""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.lesson import Claim
from helpers.profiles import ROOT

VERSION = 1
LEDGER = ROOT / "data" / "claims.json"
EXCEPTIONS = ROOT / "data" / "claim_exceptions.json"  # lesson -> statement -> why it is known not to survive
CONTROL = "null run"


@dataclass
class Row:
    """A claim of a lesson over the seeds, and in its control."""

    statement: str
    kind: str  # "effect", "identity" or "report"
    at_least: float | None = None
    at_most: float | None = None
    values: dict[str, Any] = field(default_factory=dict)  # seed, as text -> value
    control: float | None = None
    control_from: str = CONTROL  # or "lesson": measured by the lesson itself, at seed 0

    def keeps(self, value: Any) -> bool:
        """Whether the value is a number within the bounds."""
        finite = isinstance(value, (int, float)) and math.isfinite(value)
        return finite and Claim("", self.kind, value, "", self.at_least, self.at_most).keeps(value)

    @property
    def broken_by(self) -> list[str]:
        """Seeds on which the claim does not hold."""
        return [] if self.kind == "report" else [seed for seed, value in self.values.items() if not self.keeps(value)]

    @property
    def holds_in_control(self) -> bool:
        """Whether an effect is there also where it must not be; a difference of exactly nothing is none."""
        return self.kind == "effect" and self.keeps(self.control) and self.control not in (self.at_least, self.at_most)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None if there are fewer than two numbers."""
        numbers = [v for v in self.values.values() if isinstance(v, (int, float)) and math.isfinite(v)]
        return statistics.stdev(numbers) if self.kind != "report" and len(numbers) > 1 else None

    @property
    def is_close(self) -> bool:
        """Whether a bound of an effect lies less than one spread inside the mean of its values."""
        if self.kind != "effect" or self.spread is None:
            return False
        mean = statistics.fmean(v for v in self.values.values() if isinstance(v, (int, float)) and math.isfinite(v))
        room = [] if self.at_least is None else [mean - self.at_least]
        room += [] if self.at_most is None else [self.at_most - mean]
        return min(room) < self.spread

    @property
    def faults(self) -> list[str]:
        """What keeps this from being a claim; nothing if it is one."""
        found = []
        if self.broken_by:
            found.append(f"broken by seed {', '.join(self.broken_by)}")
        if self.holds_in_control:
            found.append(f"holds in its control ({self.control:.3g})")
        if self.is_close:
            found.append(f"its bound is within one spread ({self.spread:.2g}) of the mean")
        return found


@dataclass
class Lesson:
    """The claims of a lesson, and the key under which their values are true."""

    key: str
    claims: list[Row] = field(default_factory=list)
    controlled: bool = False  # whether the null run has been made

    def add(self, run: str, claims: Iterable[dict[str, Any]]) -> None:
        """Take over the claims of one run: of a seed, as text, or of the control. The run of seed 0 names them."""
        rows = {row.statement: row for row in self.claims}
        found = {claim["statement"]: claim for claim in claims}
        for statement, claim in found.items():
            if run != CONTROL and statement not in rows:
                bounds = {name: claim[name] for name in ("kind", "at_least", "at_most")}
                rows[statement] = Row(statement, **bounds)
                self.claims.append(rows[statement])
        for statement, row in rows.items():
            claim = found.get(statement)
            value = _finite(claim["value"]) if claim else None
            if run == CONTROL:
                if row.control_from == CONTROL and row.kind != "report":
                    row.control = value
            else:
                row.values[run] = value
                if claim and claim["control"] is not None and run == "0":
                    row.control, row.control_from = _finite(claim["control"]), "lesson"

    def seeds(self) -> set[str]:
        """Seeds of which every claim has a value or null."""
        return set.intersection(*(set(row.values) for row in self.claims)) if self.claims else set()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_ledger(path: Path = LEDGER) -> dict[str, Lesson]:
    """Lessons by name, none without a file. CourseError if it is damaged or of another version; it is left alone."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, lessons = content["version"], content["lessons"]
        if version == VERSION:
            return {
                name: Lesson(entry["key"], [Row(**row) for row in entry["claims"]], entry["controlled"])
                for name, entry in lessons.items()
            }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CourseError(
            f"{path.name} is damaged ({type(error).__name__}: {error}): restore it with git, or move it away and run "
            "python -m course claims, which fills a new one."
        ) from None
    raise CourseError(
        f"{path.name} is of version {version} and this course reads version {VERSION}: move it away and run "
        "python -m course claims, which fills a new one, or check out the release that wrote it."
    )


def write_ledger(lessons: dict[str, Lesson], path: Path = LEDGER) -> None:
    """Write all lessons in order."""
    content = {"version": VERSION, "lessons": {name: asdict(lessons[name]) for name in sorted(lessons)}}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_exceptions(lessons: dict[str, Lesson], path: Path = EXCEPTIONS) -> dict[str, dict[str, str]]:
    """Claims known not to survive: lesson -> statement -> reason. CourseError for one that the ledger does not know."""
    exceptions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, reasons in exceptions.items():
        known = {row.statement for row in lessons[name].claims} if name in lessons else set()
        if unknown := sorted(reasons.keys() - known):
            raise CourseError(
                f"{path.name} names a claim that {name} does not make: {unknown[0]!r}; take it out there, or write it "
                "as the lesson does."
            )
    return exceptions
