"""What a rehearsal found about a lesson, data/rehearsal.json, from the records that its cells left.

{"version": 1, "profiles": {"t4": {"05_supervised_fine_tuning": {"peak_gib": 11.2, ...}}}}
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from course.notebooks import code_cells, one_line, tags
from course.rehearsal.keys import code_key
from course.runner import Row
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.profiles import ROOT

RECORD = "application/vnd.llm-workbook.rehearsal+json"  # the kind of output that the record of a cell is
VERSION = 1
REPORT = ROOT / "data" / "rehearsal.json"
NOT_THE_LESSON = {"exercise", "check", "solution", "setup"}  # cells of which a reader runs other lines
GIB = 2**30


@dataclass
class Rehearsed:
    """One lesson on one GPU."""

    key: str  # of the lesson's code on this profile, as it was rehearsed
    fits: bool  # every cell ran within the memory of the device, a share of it kept spare
    peak_gib: float  # of tensors, as torch.cuda.max_memory_allocated would say
    peak_cell: str  # number and first line of the cell with the peak
    reserved_gib: float  # what PyTorch's allocator held, in whole pages
    device_gib: float  # with the context: what nvidia-smi would show
    main_gib: float  # of main memory, the numbers that the rehearsal made up included
    seconds: float  # of the rehearsal, on the CPU
    budget: float  # share of all steps and questions
    statements: int
    too_large: list[str] = field(default_factory=list)  # cells that do not fit, with what they need
    errors: list[str] = field(default_factory=list)  # cells that raised
    emulated: list[str] = field(default_factory=list)  # formats that the device lacks, by cell
    most_reads: str = ""  # the cell in which the CPU waits for the device most often
    never_reached: list[str] = field(default_factory=list)  # lines


def collect(executed: Path, row: Row, profile: str, context: int, budget: float = 1.0) -> Rehearsed:
    """What the records in an executed notebook say; `row` is the runner's, `context` what a process takes, in bytes."""
    cells = [(number, cell, _record(cell)) for number, cell in enumerate(code_cells(executed), start=1)]
    cells = [(f"cell {number} ({one_line(cell.source, 50)})", cell, record) for number, cell, record in cells if record]
    if not cells:
        raise CourseError(f"{executed.name} holds no record of a rehearsal ({row.error}): run it again with --fresh.")
    reached = {(cell, line) for *_, record in cells for cell, line in record["reached"]}
    name, _, peak = max(cells, key=lambda entry: entry[2]["peak"])
    reserved = max(record["reserved"] for *_, record in cells)
    reader, _, most = max(cells, key=lambda entry: entry[2]["reads"])
    lesson = [entry for entry in cells if not NOT_THE_LESSON & set(tags(entry[1]))]
    return Rehearsed(
        key=code_key(executed, profile),
        fits=row.status == "ok" and not any(record["refused"] for *_, record in cells),
        peak_gib=round(peak["peak"] / GIB, 2),
        peak_cell=name,
        reserved_gib=round(reserved / GIB, 2),
        device_gib=round((reserved + context) / GIB, 2),
        main_gib=round(row.gib, 1),
        seconds=round(row.seconds),
        budget=budget,
        statements=sum(len(record["lines"]) for *_, record in lesson),
        too_large=[
            f"{name}: {record['peak'] / GIB:.1f} GiB of tensors" for name, _, record in cells if record["refused"]
        ],
        errors=[f"{name}: {one_line(record['error'])}" for name, _, record in cells if record["error"]]
        + ([] if row.status == "ok" else [f"{row.status}: {row.error}"]),
        emulated=[f"{name}: {', '.join(record['emulated'])}" for name, _, record in cells if record["emulated"]],
        most_reads=f"{most['reads']} in {reader}",
        never_reached=[
            f"{name}, line {line}: {cell.source.splitlines()[line - 1].strip()}"
            for name, cell, record in lesson
            for line in record["lines"]
            if (record["cell"], line) not in reached
        ],
    )


def _record(cell) -> dict | None:
    return next((output.data[RECORD] for output in cell.outputs if RECORD in output.get("data", {})), None)


def read_report(path: Path = REPORT) -> dict[str, dict[str, Rehearsed]]:
    """Lessons by profile, none without a file. CourseError if it is damaged or of another version."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] == VERSION:
            return {
                profile: {name: Rehearsed(**lesson) for name, lesson in lessons.items()}
                for profile, lessons in content["profiles"].items()
            }
        reason = f"it is of version {content['version']} and this course reads version {VERSION}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CourseError(
        f"{path.name} cannot be read ({reason}): move it away, and python -m course rehearse writes it anew."
    )


def write_report(profiles: dict[str, dict[str, Rehearsed]], path: Path = REPORT) -> None:
    """Write all lessons in order."""
    content = {
        "version": VERSION,
        "profiles": {
            profile: {name: asdict(lessons[name]) for name in sorted(lessons)} for profile, lessons in profiles.items()
        },
    }
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
