"""Runs lessons on several seeds and once where nothing learns, and enters what they claim in the ledger."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from course.claims.ledger import CONTROL, LEDGER, Lesson, read_ledger, write_ledger
from course.claims.null_run import STARTUP
from course.notebooks import read_notebook, source_hash
from course.runner import run
from course.runner.keys import lesson_key
from helpers.errors import CourseError
from helpers.lesson import RECORD

CONTROL_BUDGET = 0.3  # where nothing learns, more steps change nothing


def claims_of(notebook: Path) -> list[dict[str, Any]]:
    """The claims that the closing cell of an executed notebook recorded; none if it did not get there."""
    for cell in reversed(read_notebook(notebook).cells):
        for output in cell.get("outputs", []):
            if "workbook" in output.get("metadata", {}):
                return output.metadata.workbook.claims
    return []


def collect(
    notebooks: Sequence[Path],
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int = 2,
    fresh: bool = False,
    ledger: Path = LEDGER,
) -> tuple[dict[str, Lesson], list[str]]:
    """Fill the rows of the lessons, and return the whole ledger and a sentence for each run that failed.

    What the ledger holds under the lesson's present key is not run again, and what an interrupted collection ran is
    found in `out`. Seed 0 is read from the committed notebook where that is up to date. The file is written after each
    run of all lessons, so that nothing is lost.
    """
    lessons = read_ledger(ledger)
    failed = []
    keys = {path.stem: lesson_key(path, {}) for path in notebooks}
    for path in notebooks:
        if fresh or path.stem not in lessons or lessons[path.stem].key != keys[path.stem]:
            lessons[path.stem] = Lesson(keys[path.stem])
    for name in (*map(str, sorted(seeds)), CONTROL):
        waiting = [path for path in notebooks if not _is_known(lessons[path.stem], name)]
        if name == "0":
            for path in [path for path in waiting if not fresh and _is_current(path)]:
                lessons[path.stem].add(name, claims_of(path))
                waiting.remove(path)
        if waiting:
            print(f"{'control: ' if name == CONTROL else 'seed '}{name}", flush=True)
            for path, row in zip(waiting, _run(waiting, name, out, jobs, fresh), strict=True):
                claims = claims_of(out / name.replace(" ", "_") / path.name) if row.status == "ok" else []
                if claims:
                    lessons[path.stem].add(name, claims)
                    lessons[path.stem].controlled |= name == CONTROL
                else:
                    failed.append(f"{path.stem}, {name}: {row.error or 'its last cell calls no lesson.summary()'}")
        write_ledger({key: lesson for key, lesson in lessons.items() if lesson.claims}, ledger)
    return lessons, failed


def _is_known(lesson: Lesson, name: str) -> bool:
    return lesson.controlled if name == CONTROL else name in lesson.seeds()


def _is_current(path: Path) -> bool:
    """Whether the outputs of the committed notebook belong to its sources."""
    notebook = read_notebook(path)
    return notebook.metadata.get("workbook", {}).get("source_hash") == source_hash(notebook) and bool(claims_of(path))


def _run(notebooks: list[Path], name: str, out: Path, jobs: int, fresh: bool) -> list:
    """Run the notebooks on a seed, or as the control; the rows stand in the order of the notebooks."""
    nothing_learns = name == CONTROL
    try:
        rows = run(
            notebooks,
            out / name.replace(" ", "_"),
            seed=0 if nothing_learns else int(name),
            budget=CONTROL_BUDGET if nothing_learns else None,
            jobs=jobs,
            fresh=fresh,
            environment={RECORD: "record"},
            startup=STARTUP if nothing_learns else "",
            keep_going=nothing_learns,
        )
    except OSError as error:
        raise CourseError(f"Cannot write to {out} ({error.strerror}): make room, or use --out.") from None
    by_name = {row.notebook: row for row in rows}
    return [by_name[path.stem] for path in notebooks]
