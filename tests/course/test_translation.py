"""What is a message and what stays as it is; that each fault of a catalogue is found and named."""

import re
import shutil
from pathlib import Path

import pytest

from course.notebooks import read_notebook, select_notebooks, tags
from course.translation import catalogue, edition, translated
from course.translation.markdown import differences, messages

PAGE = """# 01 · A *title*: of a lesson

A paragraph with `code`, $x^2$
and a [link](there.md).

- An item that
  goes on
1. [The text of a link](somewhere.md)

| word | `code` | 12 |
|---|---|---|
| two words | $a$ | 2.5 min |

```python
code = "is no message"
```

```sh
make test    # what it does
```

```
notebooks/   what is in it
```

$$
x = \\text{no message}
$$

<details><summary>Answer</summary>

![a figure](figures/a.png)

</details>
"""
MESSAGES = [
    "A *title*: of a lesson",
    "A paragraph with `code`, $x^2$ and a [link](there.md).",
    "An item that goes on",
    "The text of a link",
    "word",
    "two words",
    "{} min",
    "what it does",
    "what is in it",
    "Answer",
]


def test_a_message_is_a_block_with_words_and_the_rest_stays() -> None:
    assert messages(PAGE) == MESSAGES
    said = translated(PAGE, str.upper)
    for line in (
        "# 01 · A *TITLE*: OF A LESSON",
        "1. [THE TEXT OF A LINK](somewhere.md)",
        "| TWO WORDS | $a$ | 2.5 MIN |",
        'code = "is no message"',
        "make test    # WHAT IT DOES",
        "x = \\text{no message}",
        "<details><summary>ANSWER</summary>",
        "![a figure](figures/a.png)",
    ):
        assert line in said.split("\n")


def test_a_page_that_is_said_as_it_is_changes_only_in_its_line_breaks() -> None:
    assert translated(PAGE, str).split() == PAGE.split()


@pytest.mark.parametrize(
    ("japanese", "said"),
    [
        ("`b` は $x$ と {} で [これ](a.md)、3.5 個", "code: `a` is missing"),
        ("`a` は $y$ と {} で [これ](a.md)、3.5 個", "formulas: $x$ is missing"),
        ("`a` は $x$ と {} で [これ](b.md)、3.5 個", "links: ](a.md) is missing"),
        ("`a` は $x$ と {x} で [これ](a.md)、3.5 個", "placeholders: {} is missing"),
        ("`a` は $x$ と {} で [これ](a.md)、3,5 個", "numbers: 3.5 is missing"),
        ("`a` は $x$ と {} で [これ](a.md)、3.5 個と 3.5 個", "numbers: 3.5 is not in the English"),
    ],
)
def test_what_a_translation_changed_is_named(japanese: str, said: str) -> None:
    english = "`a` is $x$ and {} in [this](a.md), 3.5 of them"
    assert differences(english, "`a` は $x$ と {} で [これ](a.md)、3.5 個") == []
    assert said in differences(english, japanese)


def test_a_choice_of_a_quiz_keeps_its_letter() -> None:
    assert differences("A. It rises, and B falls.", "A. 上がり、B は下がる。") == []
    assert "letters: A is missing" in differences("A. It rises.", "上がる。")
    assert "letters: B is not in the English" in differences("A. It rises.", "B. 上がる。")


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[str]]:
    """The messages of the course, read once."""
    return catalogue.documents()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, list[str]]) -> Path:
    """A copy of the catalogues that the module works on, without README.ja.md's comparison."""
    folder = tmp_path / "catalogues"
    shutil.copytree(catalogue.CATALOGUES, folder)
    monkeypatch.setattr(catalogue, "CATALOGUES", folder)
    monkeypatch.setattr(catalogue, "documents", lambda: wanted)
    return folder


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'msgid "Lesson map"\nmsgstr "レッスンの地図"',
            'msgid "Lesson map"\nmsgstr ""',
            "has no Japanese for: Lesson map",
        ),
        ('msgid "Lesson map"', '#, fuzzy\nmsgid "Lesson map"', "has a fuzzy one, .*: Lesson map"),
        ('msgid "Lesson map"\nmsgstr "レッスンの地図"\n', "", "has no Japanese for: Lesson map"),
        ('"レッスンの地図"\n', '"17 のレッスンの地図"\n', "numbers: 17 is not in the English: Lesson map"),
        ('msgid "Lesson map"', 'msgid "Gone"\nmsgstr "ない"\n\nmsgid "Lesson map"', "no longer there: Gone"),
    ],
    ids=["empty", "fuzzy", "missing", "number", "obsolete"],
)
def test_a_planted_fault_of_a_catalogue_is_found_and_named(copy: Path, old: str, new: str, said: str) -> None:
    replace(copy / "lesson_map.po", old, new)
    found = [problem for problem in catalogue.problems() if problem.startswith("lesson_map.po")]
    assert len(found) == 1
    assert re.search(said, found[0])


def test_an_update_makes_a_changed_message_fuzzy_adds_a_new_one_and_drops_what_is_gone(
    copy, monkeypatch, wanted
) -> None:
    first, second = wanted["lesson_map"]
    changed = wanted | {"lesson_map": ["A new one", f"{second} And more."], "18_new": ["A word"]}
    monkeypatch.setattr(catalogue, "documents", lambda: changed)
    assert {path.name for path in catalogue.update()} == {"lesson_map.po", "18_new.po"}
    text = (copy / "lesson_map.po").read_text(encoding="utf-8")
    assert f'#| msgid "{second[:40]}' in text and "fuzzy" in text and f'msgid "{first}"' not in text
    found = "\n".join(catalogue.problems())
    assert "lesson_map.po has no Japanese for: A new one" in found and "18_new.po has no Japanese for: A word" in found
    assert "lesson_map.po has a fuzzy one" in found
    replace(copy / "lesson_map.po", "#, fuzzy\n", "")
    catalogue.update()
    assert "# |" not in (text := (copy / "lesson_map.po").read_text(encoding="utf-8")) and "#|" not in text
    monkeypatch.setattr(catalogue, "documents", lambda: wanted)
    catalogue.update()
    assert not (copy / "18_new.po").exists()


def test_readme_in_japanese_that_is_not_what_its_catalogue_says_is_named(copy) -> None:
    replace(copy / "README.po", 'msgstr "はじめ方"', 'msgstr "始め方"')
    assert list(catalogue.problems()) == [
        "README.ja.md is not what README.md and the catalogues say: run python -m course translate"
    ]


def test_of_a_lesson_the_summary_and_the_quiz_are_translated_and_of_a_chosen_one_everything(monkeypatch) -> None:
    path = next(path for path in select_notebooks() if path.stem.startswith("01"))
    cells = read_notebook(path).cells
    first, heading, *quiz = edition(path).cells
    assert first.source.startswith("# 01") and "**You will**\n\n1. " in first.source and "| symbol |" in first.source
    assert "Prerequisites" in cells[0].source and "Prerequisites" not in first.source
    assert heading.source.startswith("## Quiz\n") and quiz == [cell for cell in cells if "quiz" in tags(cell)]
    monkeypatch.setattr(catalogue, "WHOLE", (path.stem,))
    assert edition(path).cells == cells
    assert len(catalogue.documents()[path.stem]) > 150


def test_an_update_of_what_is_in_line_changes_nothing(copy) -> None:
    assert catalogue.update() == []
