"""Makes lecture slides from the notebooks: `python -m course slides export`, and the time plan of a lecture.

The slides follow from the anatomy that all lessons share, so that a lesson needs no second text for them. They show the
core path: sections tagged `further` are left out. Each section becomes a column: its question; from its text the first
sentence or two of each paragraph, with all formulas, lists and tables; under a formula the first short function that
computes it; every figure, with the claims printed below it; where no figure shows them, the printed results; what was
seen. The speaker notes (key S) have the rest of the text, and from the teacher's page the minutes and what to say at
each plot. Other code is left out, and solutions and hints never appear. A cell can say otherwise: the tag `skip` leaves
it out, `slide` shows it whole.

nbconvert writes the pages; reveal.js and MathJax are copied beside them from installed packages, so that nothing is
fetched while a lecture is held. The package knows nothing about what a notebook teaches.
"""

from course.slides.command import add_arguments, command

__all__ = ["add_arguments", "command"]
