"""The minutes of a lesson follow from its words, lines, figures and exercises; core is without further sections."""

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.study_time import study_time


def cell(source: str, tag: str = "", code: bool = False):
    return (new_code_cell if code else new_markdown_cell)(source, metadata={"tags": [tag] if tag else []})


def test_text_code_figures_and_exercises_count_and_further_sections_only_in_all():
    picture = new_output("display_data", data={"image/png": "aGVsbG8="})
    cells = [
        cell("## 1 · Core " + 1494 * "word ", "core"),  # 10 minutes with the heading
        cell("\n".join(60 * ["x = 1"]), code=True),  # 4
        new_code_cell("draw()", outputs=[picture]),  # 1
        cell("## 2 · Further " + 1500 * "word ", "further"),  # 10
        cell("## 3 · Exercises"),
        cell("# Exercise 3.1, easy: a\n" + 900 * "x = 1\n", "exercise", code=True),
        cell("# Exercise 3.2, open: b", "exercise", code=True),
        cell(3000 * "word ", "solution"),
    ]
    assert study_time(new_notebook(cells=cells)) == "core 15 min, all 25 min | exercises 35 min"
    assert study_time(new_notebook(cells=cells[:2])) == "core 15 min, all 15 min | exercises 0 min"
