"""Executes one notebook, in a process of its own that `course.runner.jobs` starts."""

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from course.notebooks import code_cells, one_line, read_notebook, tags
from helpers.errors import CourseError

START_TIMEOUT = 120  # seconds that a kernel may take to start

# tqdm.auto draws widgets in every kernel, which nobody sees in a headless run; plain bars also reach the log.
PLAIN_BARS = "__import__('sys').modules['tqdm.auto'] = __import__('tqdm.std').std;"


def execute(
    source: str,
    output: str,
    parameters: dict[str, object],
    timeout: int,
    startup: str = "",
    keep_going: bool = False,
) -> None:
    """Execute the notebook `source` with papermill and write it to `output`; the worker process runs this.

    `timeout` is the number of seconds that one cell may take, 0 for no limit; `startup` is Python for the
    kernel before the first cell; with `keep_going` a cell that raises ends nothing. CourseError says which cell failed.
    """
    threading.Thread(target=end_with_the_runner, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets import default

    class OwnInterpreter(AsyncKernelManager):
        """Starts the interpreter that runs this process, whatever kernels are installed on the machine."""

        @default("kernel_spec_manager")
        def _no_installed_kernels(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])

    notebook = read_notebook(Path(source))
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    if not any("parameters" in tags(cell) for cell in notebook.cells):
        raise CourseError("no cell is tagged parameters: tag the one that assigns profile, seed and model_id")
    try:
        known = papermill.inspect_notebook(notebook)
        if unknown := sorted(parameters.keys() - known.keys()):
            raise CourseError(f"unknown parameter {', '.join(unknown)}: the cell tagged parameters must assign it")
        papermill.execute_notebook(
            notebook,
            output,
            parameters,
            cwd=str(Path(source).parent),
            progress_bar=False,
            log_output=True,
            start_timeout=START_TIMEOUT,
            execution_timeout=timeout or None,
            kernel_manager_class=OwnInterpreter,
            extra_arguments=[f"--IPKernelApp.exec_lines={line}" for line in (PLAIN_BARS, startup) if line],
            allow_errors=keep_going,
        )
    except CourseError:
        raise
    except PapermillExecutionError as error:
        if keep_going:
            return
        reason = f"{error.ename}: {error.evalue}"
    except CellTimeoutError:
        reason = f"it did not end within {timeout} s (--timeout)"
    except DeadKernelError:
        reason = "the kernel was killed, most likely out of memory"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        # papermill takes sys.exit() for a success
        if not any(output.output_type == "error" for cell in code_cells(Path(output)) for output in cell.outputs):
            return
        reason = "it ended the notebook (sys.exit?) and the cells below did not run"
    raise CourseError(f"{last_cell_begun(Path(output))}{one_line(reason)}")


def end_with_the_runner() -> None:
    """Wait for the runner to be gone, which holds the other end of standard input; then end the kernel and this."""
    os.read(0, 1)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def last_cell_begun(path: Path) -> str:
    """Where an executed notebook stopped, as the beginning of a sentence."""
    begun = [cell for cell in code_cells(path) if cell.metadata.get("papermill", {}).get("start_time")]
    return f"code cell {len(begun)} ({one_line(begun[-1].source, 40)}): " if begun else ""
