"""Each word of the glossary stands in the lesson that it names, and the words are in order."""

import re

from course.notebooks import read_notebook, select_notebooks
from course.site.glossary import linked
from helpers.profiles import ROOT

WORDS = re.findall(r"^\| ([^|]+) \| [^|]+ \| (\d\d) \|$", (ROOT / "site" / "glossary.md").read_text(), re.MULTILINE)


def plain(text: str) -> str:
    return text.lower().replace("-", " ")


def test_each_word_stands_in_its_lesson():
    lessons = {
        path.stem[:2]: plain("\n".join(cell.source for cell in read_notebook(path).cells))
        for path in select_notebooks()
    }
    assert [(word, number) for word, number in WORDS if plain(word) not in lessons[number]] == []


def test_the_words_are_in_order_and_each_is_there_once():
    words = [word.lower() for word, _ in WORDS]
    assert len(words) > 50 and words == sorted(set(words))


def test_the_book_leads_from_each_word_to_its_lesson():
    lessons = select_notebooks()
    text = linked((ROOT / "site" / "glossary.md").read_text(encoding="utf-8"), lessons)
    found = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[(\d\d)\]\(notebooks/(.+)\) \|$", text, re.MULTILINE)
    assert [(word, number) for word, number, _ in found] == WORDS
    assert {name for _, _, name in found} <= {path.name for path in lessons}
