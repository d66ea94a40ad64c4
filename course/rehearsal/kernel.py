"""What happens in the kernel of a rehearsal, beside the lesson's own cells, which run unchanged.

`begin` puts the device that is not there under the lesson, and the stand-ins of the hub. Then each cell has one more
output: its peak of memory, its seconds, what it read back from the device, which of its lines ran, and its error.
Numbers that the device makes up mean nothing, so an `assert` in a cell is computed and does not stop the lesson.
"""

import ast
import time

from IPython import get_ipython
from IPython.display import display

from course.rehearsal import cuda, shortcuts
from course.rehearsal.device import Device
from course.rehearsal.report import RECORD
from helpers import data
from helpers.memory import GPUS

REACHED, INSISTED = "_rehearsal_reached", "_rehearsal_insisted"


def begin(gpu: str, spare: float, stories: str, chats: str) -> "Recorder":
    """Prepare this process, once and for good; return what follows its cells from the next one on."""
    device = cuda.install(GPUS[gpu], spare)
    shortcuts.install()
    data.HUB_TEXT, data.HUB_CHATS = stories, chats
    recorder = Recorder(device)
    recorder.attach(get_ipython())
    return recorder


class Recorder:
    """Tells about each cell, in an output of the cell."""

    def __init__(self, device: Device) -> None:
        """Nothing has run yet."""
        self.device = device
        self.number = -1  # of the running cell, counted from 0
        self.reached: set[tuple[int, int]] = set()  # cell and line
        self.began = False  # whether the running cell was seen to begin

    def attach(self, shell) -> None:
        """Follow the cells of this shell."""
        shell.user_ns[REACHED] = lambda cell, line: self.reached.add((cell, line))
        shell.user_ns[INSISTED] = lambda *_: None
        shell.ast_transformers.append(self)
        shell.events.register("pre_run_cell", self.before)
        shell.events.register("post_run_cell", self.after)

    def before(self, info) -> None:
        """A cell begins."""
        self.number, self.began = self.number + 1, True
        self.clock = time.perf_counter(), time.process_time()
        self.lines: list[int] = []
        self.device.allocator.reset_peaks()
        self.device.reads = 0
        self.device.emulated.clear()

    def visit(self, tree: ast.Module) -> ast.Module:
        """Called with each cell before it runs: note each statement, and let none of its asserts stop it."""
        if self.began:
            tree = ast.fix_missing_locations(Marker(self.number, self.lines).visit(tree))
        return tree

    def after(self, result) -> None:
        """A cell has ended."""
        if not self.began:
            return
        allocator, error = self.device.allocator, result.error_before_exec or result.error_in_exec
        record = {
            "cell": self.number,
            "seconds": round(time.perf_counter() - self.clock[0], 2),
            "cpu_seconds": round(time.process_time() - self.clock[1], 2),
            "peak": allocator.peak_allocated,
            "reserved": allocator.peak_reserved,
            "kept": allocator.allocated,
            "refused": allocator.refused,
            "reads": self.device.reads,
            "emulated": sorted(self.device.emulated),
            "lines": self.lines,
            "reached": sorted(self.reached),
            "error": f"{type(error).__name__}: {error}" if error else "",
        }
        self.reached = set()
        self.began = False
        display({RECORD: record}, raw=True)


class Marker(ast.NodeTransformer):
    """Puts a mark before each statement, which notes that it was reached, and softens `assert`."""

    def __init__(self, cell: int, lines: list[int]) -> None:
        """Marks carry the number of the cell; the lines of all statements are added to `lines`."""
        self.cell, self.lines = cell, lines

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Mark the statements of every block."""
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(block := getattr(node, name, None), list):
                setattr(node, name, [part for place, step in enumerate(block) for part in self._marked(step, place)])
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        """Compute what is asserted."""
        self.generic_visit(node)
        return ast.copy_location(ast.Expr(ast.Call(ast.Name(INSISTED, ast.Load()), [node.test], [])), node)

    def _marked(self, step: ast.stmt, place: int) -> list[ast.stmt]:
        is_text = isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)
        if (place == 0 and is_text) or not isinstance(step, ast.stmt):
            return [step]
        self.lines.append(step.lineno)
        arguments = [ast.Constant(self.cell), ast.Constant(step.lineno)]
        mark = ast.Expr(ast.Call(ast.Name(REACHED, ast.Load()), arguments, []))
        return [ast.copy_location(mark, step), step]
