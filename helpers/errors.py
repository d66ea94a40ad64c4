"""Errors that a reader can act on: one sentence that says what was wrong, what was expected and what to do."""

import sys
from collections.abc import Callable


class CourseError(Exception):
    """A mistake in the input or the surroundings, not in the code. Its message is one complete sentence.

    Notebooks show the sentence alone, without a stack trace; commands print it and end with exit status 2.
    """

    def _render_traceback_(self) -> list[str]:
        """IPython calls this in place of its stack trace."""
        return [f"{type(self).__name__}: {self}"]


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and leave the process with its exit status.

    A `CourseError` becomes its one sentence on standard error and exit status 2, an interrupt exit status 130.
    """
    try:
        status = main() or 0
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
