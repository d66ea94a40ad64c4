"""What the rehearsal found, data/rehearsal.json, as a table of all lessons for each GPU, and the findings below it."""

from pathlib import Path

from course.rehearsal.command import GPUS_OF
from course.rehearsal.report import REPORT, Rehearsed, read_report
from course.runner.refresh import lessons
from helpers.memory import GPUS

EMPTY = "No lesson has been rehearsed yet: `python -m course rehearse` does it, and `make site` then shows it here."
HEAD = "| lesson | peak, GiB | room left, GiB | fits | errors | seconds | share of steps | lines never reached |"
GIB = 2**30


def page(notebooks: list[Path], report: Path = REPORT) -> str:
    """Markdown with a table for each profile that was rehearsed, or a sentence where there is no report."""
    parts = []
    for profile, found in read_report(report).items():
        gpu, memory = GPUS_OF[profile], GPUS[GPUS_OF[profile]].memory
        parts.append(f"## {gpu} with {memory / GIB:.1f} GiB, profile {profile}")
        rows, wrong = [HEAD, "|---|---|---|---|---|---|---|---|"], []
        for path, (number, title, *_) in zip(notebooks, lessons(notebooks), strict=True):
            lesson = found.get(path.stem)
            cells = row(lesson, memory) if lesson else ["not rehearsed yet", *[""] * 6]
            rows.append(f"| [{number} · {title}](notebooks/{path.name}) | {' | '.join(cells)} |")
            if lesson and (told := findings(lesson)):
                wrong.append(f"### {number} · {title}, {gpu}\n\n{told}")
        parts += ["\n".join(rows), *wrong]
    return "\n\n".join(parts) or EMPTY


def row(lesson: Rehearsed, memory: int) -> list[str]:
    """The cells of a lesson on a device with so many bytes; less room than none is what it needs beyond that."""
    return [
        f"{lesson.peak_gib:.1f}",
        f"{memory / GIB - lesson.device_gib:.1f}".replace("-", "−"),
        "**no**" if not lesson.fits else "not known" if lesson.errors else "yes",
        str(len(lesson.errors)),
        f"{lesson.seconds:.0f}",
        f"{lesson.budget:.0%}".replace("%", " %"),
        f"{len(lesson.never_reached)} of {lesson.statements}",
    ]


def findings(lesson: Rehearsed) -> str:
    """Folded lists of the cells that do not fit or raised, of formats that the device lacks, and of unreached lines."""
    lists = {
        "Cells that do not fit": lesson.too_large,
        "Cells that raised": lesson.errors,
        "Formats that the device lacks": lesson.emulated,
        "Lines never reached": lesson.never_reached,
    }
    return "\n\n".join(
        f"<details><summary>{name}: {len(lines)}</summary>\n\n~~~~text\n" + "\n".join(lines) + "\n~~~~\n\n</details>"
        for name, lines in lists.items()
        if lines
    )
