"""Grading an answer from 1 to 5 in the manner of ELYZA-tasks-100, by program and with the reasons.

Points as in its guideline: 1 wrong, 2 wrong but in the right direction, 3 partly right, 4 right, 5 right and helpful.
A point less for unnatural language, for great length, and for a false statement; never less than 1. A polite opening
neither costs nor brings anything. What is false earns nothing: points are given for `sound`, the answer without its
false sentences, and taken away for what the `whole` answer says.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helpers.open_tasks.language import unnatural
from helpers.open_tasks.statements import (
    Fact,
    fact_in,
    facts_in,
    false_sentences,
    mentions,
    split_sentences,
    values_named,
    without,
)
from helpers.open_tasks.task import Task
from helpers.world import MOODS, POLITE

WRONG, DIRECTION, PARTLY, RIGHT, HELPFUL = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Grade:
    """Points from 1 to 5, and why."""

    points: int
    reasons: tuple[str, ...]


def grade(task: Task, answer: str) -> Grade:
    """Grade any text as an answer to the task."""
    whole = answer.strip().removeprefix(POLITE)
    false = list(false_sentences(task, whole))
    sound = without(whole, set(false))
    points, reason = GRADERS[task.kind](task.key, sound, whole)
    deductions = unnatural(task, whole)
    if len(whole) > 2 * len(task.reference) + 60:
        deductions.append("too long")
    if false:
        deductions.append(f"false: {false[0]}")
    return Grade(max(WRONG, points - len(deductions)), (reason, *(f"-1 {deduction}" for deduction in deductions)))


def grade_fact(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """The value in a sentence, and another true statement about the person."""
    if values_named(whole, key["relation"]) != [key["value"]] or not mentions(sound, key["value"]):
        direction = mentions(sound, key["name"]) and values_named(sound, key["relation"])
        return (DIRECTION if direction else WRONG), f"does not name the {key['relation']} and no other"
    stated = {fact for fact in facts_in(sound) if fact.name == key["name"]}  # all true, or they were not sound
    if Fact(key["name"], key["relation"], key["value"]) in stated and len(stated) > 1:
        return HELPFUL, "right, in a sentence, with something more"
    return RIGHT, "right, but not in a sentence with something more"


def grade_describe(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """So many true sentences about the person."""
    sentences = split_sentences(whole)
    number = len({fact for fact in facts_in(sound) if fact.name == key["name"]})
    if number < key["count"]:
        points = WRONG if not number else PARTLY if 2 * number >= key["count"] else DIRECTION
        return points, f"{number} of {key['count']} true facts"
    first = fact_in(sentences[0])
    if len(sentences) == key["count"] and first and first.relation == key["first"]:
        return HELPFUL, "as many true facts as asked, in the form asked for"
    return RIGHT, "as many true facts as asked, in another form"


def grade_sum(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """The sum and its steps."""
    numbers = re.findall(r"\bis (\d{1,6})\b", sound, re.ASCII) or re.findall(r"\b\d{1,6}\b", sound, re.ASCII)
    steps = sum(step in sound for step in key["steps"])
    if not numbers:
        return WRONG, "no sum"
    if int(numbers[-1]) == key["sum"]:
        return (HELPFUL, "right with all steps") if steps == len(key["steps"]) else (RIGHT, "right without all steps")
    if 2 * steps >= len(key["steps"]):
        return PARTLY, "half of the steps or more, and another sum"
    return (DIRECTION, "nearly the sum") if abs(int(numbers[-1]) - key["sum"]) <= 10 else (WRONG, "another sum")


def grade_mood(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """The mood and the word that tells."""
    if [mood for mood in MOODS if mentions(whole, mood)] != [key["mood"]] or not mentions(sound, key["mood"]):
        return WRONG, f"does not say {key['mood']} alone"
    words = [word for word in MOODS[key["mood"]][0] if mentions(whole, word)]
    if not words:
        return RIGHT, "right without a word that tells"
    return (HELPFUL, "right with its word") if set(words) <= set(key["words"]) else (PARTLY, "a word that is not there")


def grade_compare(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """Yes or no, and the two facts."""
    reasoned = {Fact(*fact) for fact in key["facts"]} <= set(facts_in(sound))
    said = [word for word in ("yes", "no") if mentions(whole, word)]
    if said != ["yes" if key["same"] else "no"] or not mentions(sound, said[0]):
        return (DIRECTION if reasoned else WRONG), "not the right one of yes and no"
    return (HELPFUL, "right with its reason") if reasoned else (PARTLY, "right without its reason")


def grade_list(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """All names and no others."""
    right = sum(mentions(sound, name) for name in key["names"])
    wrong = sum(mentions(whole, name) for name in key["others"])
    if right == len(key["names"]) and not wrong:
        return HELPFUL, "all names and no others"
    return (PARTLY if right > wrong else DIRECTION if right else WRONG), f"{right} right and {wrong} wrong names"


def grade_extract(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """A line for each fact."""
    lines = [line.strip() for line in sound.split("\n") if line.strip()]
    wanted = {f"{relation}: {value}" for relation, value in key["pairs"].items()}
    right = len(wanted & set(lines))
    if right == len(wanted):
        return (HELPFUL, "all lines") if len(whole.split("\n")) == right else (RIGHT, "all lines, and others")
    if 2 * right >= len(wanted):
        return PARTLY, f"{right} of {len(wanted)} lines"
    named = all(mentions(sound, value) for value in key["pairs"].values())
    return (DIRECTION if right or named else WRONG), f"{right} of {len(wanted)} lines"


def grade_quoted(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """The value and the sentence of the text that says it; that nothing says it, where nothing does."""
    refused = mentions(sound, "does not say")
    quoted = any(sentence in sound for sentence in key["told"])
    if key["value"] is None:
        rest = whole
        for sentence in key["told"]:
            rest = rest.replace(sentence, "")
        if not refused or values_named(rest, key["relation"]):
            return WRONG, "does not say that the text does not say it"
        return (HELPFUL, "right with what is said") if quoted else (RIGHT, "right without what is said")
    if mentions(whole, "does not say"):
        return DIRECTION if refused else WRONG, "refuses what the text does say"
    named = values_named(whole, key["relation"])
    if named != [key["value"]] or not mentions(sound, key["value"]):
        direction = len(named) == 1 and mentions(sound, named[0])
        return (DIRECTION if direction else WRONG), f"does not name the {key['relation']} and no other"
    return (HELPFUL, "right with its sentence") if quoted else (RIGHT, "right without its sentence")


def grade_story(key: dict[str, Any], sound: str, whole: str) -> tuple[int, str]:
    """Three sentences with three given words."""
    sentences = split_sentences(sound)
    met = [mentions(sound, word) for word in key["words"]]
    met.append(len(sentences) == 3)
    met.append(len(set(sentences)) == len(sentences) > 1 and all(len(part.split()) >= 4 for part in sentences))
    return max(WRONG, sum(met)), f"{sum(met)} of 5 wishes met"


GRADERS: dict[str, Callable[[dict[str, Any], str, str], tuple[int, str]]] = {
    "fact": grade_fact,
    "describe": grade_describe,
    "evidence": grade_quoted,
    "sum": grade_sum,
    "mood": grade_mood,
    "compare": grade_compare,
    "unknown": grade_quoted,
    "list": grade_list,
    "extract": grade_extract,
    "story": grade_story,
}
