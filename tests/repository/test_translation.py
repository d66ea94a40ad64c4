"""Each English message has a Japanese one that says as much, and README.ja.md is what README.md and these say."""

from markdown_it import MarkdownIt

from course.translation.catalogue import documents, load, problems

MARKDOWN = MarkdownIt("commonmark")


def test_no_message_is_without_a_certain_translation_and_none_is_out_of_date() -> None:
    found = list(problems())
    assert not found, "\n".join(["python -m course translate, then edit the catalogues:", *found])


def test_the_marks_of_stress_and_code_around_japanese_words_are_marks() -> None:
    """Beside Japanese punctuation `**` can stay two asterisks, unlike in English."""

    def left_over(text: str) -> int:
        return sum(
            part.content.count("**") + part.content.count("`")
            for token in MARKDOWN.parseInline(text)
            for part in token.children or []
            if part.type == "text"
        )

    pairs = [(message, load(name).get(message)) for name, ids in documents().items() for message in ids]
    wrong = [entry.string for message, entry in pairs if entry and left_over(entry.string) > left_over(message)]
    assert wrong == []
