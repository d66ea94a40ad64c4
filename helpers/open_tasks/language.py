"""Whether an answer is natural language of Shima."""

import re
from functools import cache
from itertools import islice

from helpers.open_tasks.making import make_tasks, shima
from helpers.open_tasks.statements import split_sentences
from helpers.open_tasks.task import Task

WORD = re.compile("[A-Za-z]+")


@cache
def known_words() -> frozenset[str]:
    """Words, in small letters, of many documents of Shima and of many tasks with their references."""
    texts = list(islice(shima().documents(7), 3000)) + list(shima().person)
    for held_out in (True, False):
        texts += [f"{task.input} {task.reference}" for task in make_tasks("words", 60, held_out=held_out)]
    return frozenset(word.lower() for text in texts for word in WORD.findall(text))


def unnatural(task: Task, text: str) -> list[str]:
    """What is unnatural about an answer, at most one thing: it costs a point however much there is."""
    sentences = split_sentences(text)
    own = {word.lower() for word in WORD.findall(task.input)}
    foreign = sorted({word.lower() for word in WORD.findall(text)} - own - known_words())
    if not text.isascii():
        return ["unnatural: a character that Shima does not write"]
    if task.input in text:
        return ["unnatural: it repeats the task"]
    if foreign:
        return [f"unnatural: {foreign[0]} is no word of Shima"]
    if len(set(sentences)) < len(sentences):
        return ["unnatural: a sentence stands there twice"]
    if task.kind != "extract" and not all(sentence.endswith((".", "!", "?")) for sentence in sentences):
        return ["unnatural: a sentence without an end"]
    return []
