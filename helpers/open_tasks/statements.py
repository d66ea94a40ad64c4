"""Reading a text: its sentences, the facts that they state, and which of them are false."""

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from helpers.open_tasks.making import shima
from helpers.open_tasks.task import Task
from helpers.world import RELATIONS


class Fact(NamedTuple):
    """What a sentence states."""

    name: str
    relation: str
    value: str


def split_sentences(text: str) -> list[str]:
    """Sentences, and lines, without the white space around them."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Each phrasing of each relation as a pattern of whole sentences."""
    groups = {r"\{name\}": r"(?P<name>[A-Z]\w+)", r"\{value\}": r"(?P<value>[\w ]+)"}
    found = []
    for relation in RELATIONS.values():
        for statement in relation.statements:
            pattern = re.escape(statement.rstrip("."))
            for place, group in groups.items():
                pattern = pattern.replace(place, group)
            found.append((relation.name, re.compile(pattern)))
    return found


def fact_in(sentence: str) -> Fact | None:
    """The fact that a sentence states in one of Shima's phrasings, true or not."""
    for relation, pattern in _patterns():
        match = pattern.fullmatch(sentence.rstrip(".!"))
        if match and match["value"] in shima().values[relation]:
            return Fact(match["name"], relation, match["value"])
    return None


def facts_in(text: str) -> list[Fact]:
    """The facts that the sentences of a text state."""
    return [fact for sentence in split_sentences(text) if (fact := fact_in(sentence))]


def false_sentences(task: Task, text: str) -> Iterator[str]:
    """Sentences that contradict what is known of a person, or say of somebody in the task what it does not tell."""
    told = set(facts_in(task.input))
    strangers = {fact.name for fact in told}
    for sentence in split_sentences(text):
        if fact := fact_in(sentence):
            person = shima().person.get(fact.name)
            if (person and person.facts[fact.relation] != fact.value) or (fact.name in strangers and fact not in told):
                yield sentence


def without(text: str, sentences: set[str]) -> str:
    """The text without some of its sentences, the others on the lines where they were."""
    lines = [" ".join(part for part in split_sentences(line) if part not in sentences) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)


def values_named(text: str, relation: str) -> list[str]:
    """Values of a relation that stand in a text as whole words, in the order of the world's list."""
    return [value for value in shima().values[relation] if mentions(text, value)]


def mentions(text: str, word: str) -> bool:
    """Whether the word stands in the text, whatever its case, and not as a part of another word."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None
