"""The board: all submissions of a folder, decoded on tasks that nobody knew, ranked with their uncertainty.

One bad folder costs one line with its reason and never stops the others.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from course.competition.answering import answers_of, reproduced
from course.competition.ladder import Shown, climb
from course.competition.log import append, read_log
from course.competition.page import page
from course.competition.ranking import Standing, standings
from course.competition.submission import IGNORED, Submission, read_submission
from course.competition.twins import twins
from course.grading.report import write_table
from course.grading.submissions import readable
from course.notebooks import one_line
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.open_tasks import KINDS, Task, grade, hidden_tasks

Found = TypeVar("Found")
COLUMNS = ("place", "name", "mean", "low", "high", "best_rank", "worst_rank", "group", *KINDS, "reproduced", "note")


@dataclass
class Entry:
    """A submission on the board."""

    name: str
    submission: Submission
    reproduced: int  # of the handed-in answers
    answers: list[str]
    grades: list[int]
    standing: Standing | None = None
    notes: list[str] = field(default_factory=list)

    def row(self, tasks: Sequence[Task]) -> dict[str, object]:
        """Its line in the table."""
        place = self.standing
        by_kind = {
            kind: f"{np.mean([g for task, g in zip(tasks, self.grades, strict=True) if task.kind == kind]):.2f}"
            for kind in KINDS
        }
        return {
            "place": place.place,
            "name": self.name,
            "mean": f"{place.mean:.3f}",
            "low": f"{place.low:.2f}",
            "high": f"{place.high:.2f}",
            "best_rank": place.best_rank,
            "worst_rank": place.worst_rank,
            "group": place.group,
            **by_kind,
            "reproduced": self.reproduced,
            "note": "; ".join(self.notes),
        }


def examine(folder: Path, work: Callable[[Path], Found]) -> Iterator[tuple[str, Found | None, str]]:
    """(name, what `work` made of it, reason if nothing) of each folder in `folder`, whatever lies there."""
    if not folder.is_dir():
        raise CourseError(f"{folder} is no folder: give the one that holds a folder for each submission.")
    for path in sorted(folder.iterdir()):
        if path.name not in IGNORED:
            yield attempt(path, work)


def attempt(path: Path, work: Callable[[Path], Found]) -> tuple[str, Found | None, str]:
    """(name, what `work` made of the folder, reason if nothing): no error of a submission gets out of here."""
    name = name_of(path)
    try:
        return name, work(path), ""
    except CourseError as error:
        return name, None, one_line(error)
    except Exception as error:  # of torch, of the file system: one submission is not to end the board of all
        return name, None, f"{type(error).__name__}: {one_line(error)}"


def name_of(path: Path) -> str:
    """The name of a submission, as the board shows it."""
    return one_line(readable(path), 60)


def grades_of(tasks: Sequence[Task], answers: Sequence[str]) -> list[int]:
    """Points of each answer."""
    return [grade(task, answer).points for task, answer in zip(tasks, answers, strict=True)]


def final_board(folder: Path, secret: str, per_kind: int, out: Path, kept: Path, date: str) -> list[Entry]:
    """Rank all submissions by their answers to the hidden tasks; write board.csv, .json, .html and the log to `out`."""
    tasks = hidden_tasks(secret, per_kind)

    def enter(path: Path) -> Entry:
        submission = read_submission(path)
        same = reproduced(submission, kept)
        answers = answers_of(submission, tasks, kept)
        return Entry(name_of(path), submission, same, answers, grades_of(tasks, answers))

    entries, refused = _collect(folder, enter)
    if entries:
        grades, kinds = np.array([entry.grades for entry in entries]), [task.kind for task in tasks]
        for entry, standing in zip(entries, standings(grades, kinds), strict=True):
            entry.standing = standing
        for i, j, reason in twins([entry.submission for entry in entries], [e.answers for e in entries], grades):
            entries[i].notes.append(f"like {entries[j].name}: {reason}")
            entries[j].notes.append(f"like {entries[i].name}: {reason}")
        entries.sort(key=lambda entry: (entry.standing.place, entry.name))
    rows = [entry.row(tasks) for entry in entries]
    head = append(
        out / "log.jsonl",
        [
            {"event": "final", "date": date, "name": e.name, "key": e.submission.key, "mean": r["mean"]}
            for e, r in zip(entries, rows, strict=True)
        ]
        + [{"event": "refused", "date": date, "name": name, "reason": reason} for name, reason in refused],
    )
    write_table(out / "board.csv", COLUMNS, [[row[column] for column in COLUMNS] for row in rows])
    answered = [{"name": entry.name, "answers": entry.answers, "grades": entry.grades} for entry in entries]
    content = {"secret": secret, "per_kind": per_kind, "entries": answered}
    write_atomically(out / "board.json", json.dumps(content, ensure_ascii=False) + "\n")
    write_atomically(out / "board.html", page("Final board", COLUMNS, rows, refused, head))
    return entries


def live_board(folder: Path, secret: str, out: Path, kept: Path, date: str, per_day: int) -> dict[str, float]:
    """Show on live tasks, which are others than the final ones, who climbs (see `ladder`); name -> score."""
    tasks, log = hidden_tasks(f"live/{secret}", 10), out / "live.jsonl"
    history = [entry for entry in read_log(log) if entry["event"] == "live"]
    known = {(entry["name"], entry["key"]) for entry in history}

    def enter(path: Path) -> Entry | None:
        name, submission = name_of(path), read_submission(path)
        if (name, submission.key) in known:
            return None
        if sum(entry["name"] == name and entry["date"] == date for entry in history) >= per_day:
            raise CourseError(f"has had its {per_day} submissions of today")
        same = reproduced(submission, kept)
        answers = answers_of(submission, tasks, kept)
        return Entry(name, submission, same, answers, grades_of(tasks, answers))

    entries, refused = _collect(folder, enter)
    new = [
        {"event": "live", "date": date, "name": e.name, "key": e.submission.key, "grades": "".join(map(str, e.grades))}
        for e in entries
    ]
    head = append(log, new)
    shown: dict[str, Shown] = {}
    for entry in history + new:
        shown[entry["name"]] = climb(shown.get(entry["name"]), tuple(map(int, entry["grades"])))
    scores = {name: shown[name].score for name in sorted(shown, key=lambda name: (-shown[name].score, name))}
    rows = [{"name": name, "score": f"{score:.2f}"} for name, score in scores.items()]
    write_atomically(out / "live.html", page("Live board", ("name", "score"), rows, refused, head))
    return scores


def _collect(folder: Path, enter: Callable[[Path], Entry | None]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """What could be entered, and (name, reason) of what could not; a line of print for each."""
    entries, refused = [], []
    for name, entry, reason in examine(folder, enter):
        if reason:
            refused.append((name, reason))
            print(f"{name:<28} refused: {reason}", flush=True)
        elif entry:
            entries.append(entry)
            print(f"{name:<28} {np.mean(entry.grades):.2f}, {entry.reproduced} answers reproduced", flush=True)
        else:
            print(f"{name:<28} unchanged", flush=True)
    return entries, refused
