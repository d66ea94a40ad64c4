"""How long a lecturer needs for each section of a lesson."""

from nbformat import NotebookNode

from course.notebooks import tags
from course.slides.sections import NEVER_SHOWN, figures, sections

SPEAKING_RATE = 130  # words of a lesson's text that a lecturer covers in a minute
FIGURE_MINUTES, CODE_MINUTES = 2.0, 0.5  # for a figure, and for a code cell that is shown
LECTURE = 90  # minutes


def minutes(notebook: NotebookNode, total: int = LECTURE) -> dict[str, int]:
    """Minutes of a lecture of `total` for each section up to the exercises, by title, in whole numbers.

    A section's share is that of its words, figures and code cells. The opening also has the time that the lesson takes
    to run on a CPU, since the lecturer starts it there. Exercises and all after them are for the laboratory.
    """
    shares = {}
    for section in sections(notebook):
        if any("exercise" in tags(cell) for cell in section.cells):
            break
        words = sum(len(cell.source.split()) for cell in section.cells if cell.cell_type == "markdown")
        code = [c for c in section.cells if c.cell_type == "code" and not NEVER_SHOWN & set(tags(c))]
        images = sum(len(list(figures(cell))) for cell in code)
        shares[section.title] = words / SPEAKING_RATE + FIGURE_MINUTES * images + CODE_MINUTES * len(code)
    budget = notebook.metadata.get("workbook", {}).get("budget", {}).get("cpu", {})
    shares[next(iter(shares))] += budget.get("seconds", 0) / 60
    exact = {title: share * total / sum(shares.values()) for title, share in shares.items()}
    whole = {title: int(share) for title, share in exact.items()}
    by_rest = sorted(exact, key=lambda title: whole[title] - exact[title])
    for title in by_rest[: total - sum(whole.values())]:
        whole[title] += 1
    return whole
