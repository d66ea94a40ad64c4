"""A kernel's first line in a rehearsal: it is quick, and prepares the process only when the first cell is run.

A kernel must answer soon after its start, and importing PyTorch and transformers takes long on a busy machine.
"""

from IPython import get_ipython


def wait(**settings) -> None:
    """Begin the rehearsal (`kernel.begin`) with the first cell."""
    events = get_ipython().events

    def begin(info) -> None:
        events.unregister("pre_run_cell", begin)
        from course.rehearsal import kernel

        kernel.begin(**settings).before(info)

    events.register("pre_run_cell", begin)
