"""`python -m course rehearse`: run the lessons on a GPU that is not there, and say what fits and what fails."""

import argparse
import hashlib
from pathlib import Path

from course.arguments import add_notebooks, natural
from course.notebooks import select_notebooks
from course.rehearsal import hub
from course.rehearsal.report import REPORT, Rehearsed, collect, read_report, write_report
from course.runner import run
from helpers.errors import CourseError
from helpers.memory.gpus import CONTEXT
from helpers.profiles import PROFILES, ROOT

GPUS_OF = {"t4": "T4", "large": "A100-40GB"}  # the smallest device that a profile is for
CELL_SECONDS = 3600  # some work that a GPU does at once takes a CPU long
SPARE = 0.05  # share of the device's memory that a lesson leaves free
STARTUP = (
    "import sys; sys.path.insert(0, {root!r}); from course.rehearsal import startup; startup.wait(**{settings!r});"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_notebooks(parser)
    parser.add_argument("--only", nargs="+", metavar="LESSON", help="lessons, such as 03 05")
    parser.add_argument("--profile", choices=sorted(GPUS_OF), default="t4")
    parser.add_argument("--budget", type=float, default=1.0, help="share of all steps and questions")
    parser.add_argument("--jobs", type=natural(1), default=1, help="lessons at a time")
    parser.add_argument("--fresh", action="store_true", help="rehearse also what has not changed")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "rehearsal", help="folder for models and notebooks"
    )
    parser.add_argument("--report", type=Path, default=REPORT, help="file for what was found")


def command(options: argparse.Namespace) -> int:
    """Exit status 1 if a lesson does not fit, or a cell raised."""
    notebooks, out = select_notebooks(options.notebooks.resolve(), options.only), options.out.resolve()
    profiles = read_report(options.report)
    lessons = profiles.setdefault(options.profile, {})
    model = hub.model_folder(PROFILES[options.profile], out / "models")
    settings = {"budget": options.budget, "jobs": options.jobs, "fresh": options.fresh}
    for batch in [notebooks] if options.jobs > 1 else [[path] for path in notebooks]:
        lessons |= rehearse(batch, options.profile, model, out, **settings)
        write_report(profiles, options.report)
    print(
        f"{'lesson':<28}{'tensors':>9}{'device':>9}{'fits':>6}{'main':>9}{'seconds':>9}{'errors':>8}{'unreached':>11}"
    )
    for path in notebooks:
        print(line(path.stem, lessons[path.stem]))
    found = [lessons[path.stem] for path in notebooks]
    print(f"{len(found)} lessons, {sum(lesson.seconds for lesson in found) / 60:.0f} min one after the other")
    return 0 if all(lesson.fits and not lesson.errors for lesson in found) else 1


def rehearse(
    notebooks: list[Path],
    profile: str,
    model: Path,
    out: Path,
    *,
    budget: float = 1.0,
    jobs: int = 1,
    fresh: bool = False,
) -> dict[str, Rehearsed]:
    """Execute the notebooks with this model on the profile's device; of what has not changed, read what it left."""
    stories, chats = hub.write_rows(out / "rows")
    settings = {"gpu": GPUS_OF[profile], "spare": SPARE, "stories": str(stories), "chats": str(chats)}
    own = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    try:
        rows = run(
            notebooks,
            out / profile,
            profile=profile,
            model_id=str(model),
            budget=budget,
            jobs=jobs,
            timeout=CELL_SECONDS,
            fresh=fresh,
            environment={"HF_HUB_OFFLINE": "1", "LLM_WORKBOOK_REHEARSAL": hashlib.sha256(own).hexdigest()},
            startup=STARTUP.format(root=str(ROOT), settings=settings),
            keep_going=True,
        )
    except OSError as error:
        raise CourseError(f"Cannot write to {out} ({error.strerror}): make room, or use --out.") from None
    found = {row.notebook: out / profile / f"{row.notebook}.ipynb" for row in rows}
    return {row.notebook: collect(found[row.notebook], row, profile, CONTEXT, budget) for row in rows}


def line(name: str, lesson: Rehearsed) -> str:
    """A lesson's line in the table, and below it what is wrong."""
    text = (
        f"{name:<28}{lesson.peak_gib:>5.1f} GiB{lesson.device_gib:>5.1f} GiB{'yes' if lesson.fits else 'NO':>6}"
        f"{lesson.main_gib:>5.1f} GiB{lesson.seconds:>9.0f}{len(lesson.errors):>8}"
        f"{len(lesson.never_reached):>7}/{lesson.statements}"
    )
    wrong = [f"does not fit: {cell}" for cell in lesson.too_large] + lesson.errors + lesson.emulated
    return "\n    ".join([text, *wrong])
