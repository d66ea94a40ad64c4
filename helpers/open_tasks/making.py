"""Making open tasks about Shima, a pure function of a seed.

Ten kinds in turn. Held-out tasks use names, sums, reviews, phrasings and combinations that training tasks never use.
"""

import random
from collections.abc import Callable, Collection
from functools import cache
from typing import Any, NamedTuple

from helpers.open_tasks.task import KINDS, Task
from helpers.world import MOODS, RELATIONS, Person, World, is_held_out, sum_with_steps

SAYS_NOT = "The text does not say."
THINGS = ("lamp", "basket", "coin", "letter", "map", "key")
PLACES = ("bridge", "well", "harbour", "forest", "mill", "shrine")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
WHO = {
    "town": "Who lives in {value}?",
    "trade": "Who works as a {value}?",
    "animal": "Who keeps a {value}?",
    "dish": "Who likes to eat {value}?",
    "instrument": "Who plays the {value}?",
}
NUM_KNOWN = 100  # people whom the base model knows well


@cache
def shima() -> World:
    """The island that all tasks are about."""
    return World()


class Draft(NamedTuple):
    """A task without its number and kind."""

    input: str
    reference: str
    aspects: str
    key: dict[str, Any]


def public_tasks() -> list[Task]:
    """The 100 tasks that everybody has."""
    return make_tasks("public")


def hidden_tasks(secret: str, per_kind: int = 30) -> list[Task]:
    """Tasks that nobody knows without the secret; none of them is a public one."""
    return make_tasks(f"hidden/{secret}", per_kind, without={task.input for task in public_tasks()})


def make_tasks(seed: str, per_kind: int = 10, *, held_out: bool = True, without: Collection[str] = ()) -> list[Task]:
    """`per_kind` tasks of each kind, the kinds in turn, all different and none with an input in `without`."""
    rng, tasks, used = random.Random(f"open tasks/{seed}"), [], set(without)
    for number in range(per_kind * len(KINDS)):
        kind = KINDS[number % len(KINDS)]
        draft = MAKERS[kind](rng, held_out)
        while draft.input in used:
            draft = MAKERS[kind](rng, held_out)
        used.add(draft.input)
        tasks.append(Task(f"{number:03}", kind, *draft))
    return tasks


def state(person: Person, relation: str) -> str:
    """A fact about a person in the first of its phrasings."""
    return RELATIONS[relation].statements[0].format(name=person.name, value=person.facts[relation])


def told_of(rng: random.Random, people: list[Person], relations: list[list[str]]) -> list[list[str]]:
    """Sentences of a text: for each person one about each of the relations."""
    return [
        [shima().say(rng, RELATIONS[relation], person) for relation in chosen]
        for person, chosen in zip(people, relations, strict=True)
    ]


def text_of(told: list[list[str]]) -> str:
    """The sentences as a text, a line for each person."""
    return "\n".join(" ".join(sentences) for sentences in told)


def with_fact(person: Person, relation: str, value: str) -> Person:
    """The same person with another fact."""
    return Person(person.name, person.rank, {**person.facts, relation: value})


def other_value(rng: random.Random, relation: str, value: str) -> str:
    """Any value of the relation but this one."""
    return rng.choice([other for other in shima().values[relation] if other != value])


def question(rng: random.Random, relation: str, person: Person, held_out: bool = False) -> str:
    """A question for a fact."""
    forms = RELATIONS[relation]
    return rng.choice(forms.held_out_questions if held_out else forms.training_questions).format(name=person.name)


def make_fact(rng: random.Random, held_out: bool) -> Draft:
    """A fact about a known person, and one thing more."""
    person = rng.choice(shima().people[:NUM_KNOWN])
    relation, other = rng.sample(list(RELATIONS), 2)
    return Draft(
        f"{question(rng, relation, person, held_out)} Answer in a sentence, and add one thing that is true.",
        f"{state(person, relation)} {state(person, other)}",
        f"It says in a sentence that the {relation} is {person.facts[relation]} (a bare word: at most 4; another "
        f"{relation}: at most 2). It adds a second true statement about {person.name} (without: at most 4).",
        {"name": person.name, "relation": relation, "value": person.facts[relation]},
    )


def make_describe(rng: random.Random, held_out: bool) -> Draft:
    """A known person in two to four sentences, the first of them about a given relation."""
    while True:
        person, count = rng.choice(shima().people[:NUM_KNOWN]), rng.randint(2, 4)
        relations = rng.sample(list(RELATIONS), count)
        if is_held_out(f"describe {person.name} {count} {relations[0]}") == held_out:
            break
    return Draft(
        f"Describe {person.name} in {NUMBER_WORDS[count]} sentences. Begin with the {relations[0]}.",
        " ".join(state(person, relation) for relation in relations),
        f"It states {NUMBER_WORDS[count]} true facts about {person.name} (half of them: 3; fewer: 2; none: 1), in "
        f"exactly {NUMBER_WORDS[count]} sentences, the first about the {relations[0]} (else at most 4).",
        {"name": person.name, "count": count, "first": relations[0]},
    )


def make_sum(rng: random.Random, held_out: bool) -> Draft:
    """A sum of three or four numbers with its steps."""
    while True:
        count = rng.choice((3, 3, 4))
        numbers = tuple(rng.randint(1, 99 if count == 3 else 49) for _ in range(count))
        written = " + ".join(map(str, numbers))
        if is_held_out(written) == held_out:
            break
    steps = sum_with_steps(numbers)
    return Draft(
        f"Add {written} and show the steps.",
        f"{steps}. The sum is {sum(numbers)}.",
        f"The sum is {sum(numbers)}, and all steps are shown: {steps} (steps missing: at most 4). A wrong sum gets 3 "
        "if at least half of the steps are right, 2 if it is off by at most 10, else 1.",
        {"steps": steps.split("; "), "sum": sum(numbers)},
    )


def make_mood(rng: random.Random, held_out: bool) -> Draft:
    """The mood of a review and the word that tells it."""
    while True:
        text, mood = shima().review(rng)
        if is_held_out(text) == held_out:
            break
    words = [word for word in MOODS[mood][0] if word in text]
    return Draft(
        f"Is this review good or bad, and which word tells? {text}",
        f"{mood.capitalize()}, since it says {words[0]}.",
        f"It says {mood} and not the opposite (else 1), and names a word that tells: {' or '.join(words)} (no word: at "
        "most 4; a word that the review does not use: at most 3).",
        {"mood": mood, "words": words},
    )


def make_compare(rng: random.Random, held_out: bool) -> Draft:
    """Whether two strangers share a fact, with the reason."""
    relation = rng.choice(list(RELATIONS))
    first, second = shima().stranger(rng, held_out), shima().stranger(rng, held_out)
    value, same = first.facts[relation], rng.random() < 0.5
    people = [first, with_fact(second, relation, value if same else other_value(rng, relation, value))]
    others = [other for other in RELATIONS if other != relation]
    told = told_of(rng, people, [rng.sample([relation, rng.choice(others)], 2) for _ in people])
    reason = " ".join(state(person, relation) for person in people)
    return Draft(
        f"Read this text and answer.\n{text_of(told)}\n"
        f"Do {first.name} and {second.name} have the same {relation}? Say why.",
        f"{'Yes' if same else 'No'}. {reason}",
        f"It says {'yes' if same else 'no'} (the opposite: at most 2), and gives the reason: {reason} (without: at "
        "most 3).",
        {"same": same, "facts": [(person.name, relation, person.facts[relation]) for person in people]},
    )


def make_list(rng: random.Random, held_out: bool) -> Draft:
    """All of four strangers of whom something holds."""
    relation = rng.choice(list(RELATIONS))
    value, hits = rng.choice(shima().values[relation]), rng.sample(range(4), rng.randint(1, 2))
    people = [
        with_fact(shima().stranger(rng, held_out), relation, value if i in hits else other_value(rng, relation, value))
        for i in range(4)
    ]
    names = [person.name for person in people if person.facts[relation] == value]
    return Draft(
        f"Read this text and answer.\n{text_of(told_of(rng, people, [[relation]] * 4))}\n"
        f"{WHO[relation].format(value=value)} Name all.",
        f"{' and '.join(names)}.",
        f"It names {' and '.join(names)} and nobody else (more right than wrong names: 3; some right ones: 2; else 1).",
        {"names": names, "others": [person.name for person in people if person.name not in names]},
    )


def make_extract(rng: random.Random, held_out: bool) -> Draft:
    """The facts of a text as lines."""
    person, relations = shima().stranger(rng, held_out), rng.sample(list(RELATIONS), 3)
    lines = "\n".join(f"{relation}: {person.facts[relation]}" for relation in relations)
    return Draft(
        f"Write each fact as a line with its kind.\n{text_of(told_of(rng, [person], [relations]))}",
        lines,
        f"It has these three lines (two: 3; fewer, or the values in another form: 2; else 1) and no others (else at "
        f"most 4): {lines.replace(chr(10), '; ')}",
        {"pairs": {relation: person.facts[relation] for relation in relations}},
    )


def make_evidence(rng: random.Random, held_out: bool) -> Draft:
    """A question on a text about strangers, to be answered with the sentence that says so."""
    text, person, told = _passage(rng, 3, held_out)
    relation = rng.choice(list(told))
    return _answerable(
        rng, f"Read this text and answer with the sentence that says so.\n{text}", person, relation, told
    )


def make_unknown(rng: random.Random, held_out: bool) -> Draft:
    """A question on a text about strangers, which the text answers in half of the tasks."""
    text, person, told = _passage(rng, 2, held_out)
    instruction = f"Read this text and answer only if it says so.\n{text}"
    if rng.random() < 0.5:
        return _answerable(rng, instruction, person, rng.choice(list(told)), told)
    relation = rng.choice([relation for relation in RELATIONS if relation not in told])
    sentences = list(told.values())
    return Draft(
        f"{instruction}\n{question(rng, relation, person)}",
        f"{SAYS_NOT} It only says: {sentences[0]}",
        f"It says that the text does not say it, names no {relation} (else 1), and quotes what the text does say of "
        f"{person.name} (else at most 4).",
        {"value": None, "relation": relation, "told": sentences},
    )


def _passage(rng: random.Random, count: int, held_out: bool) -> tuple[str, Person, dict[str, str]]:
    """A text with two facts about each of `count` strangers; one of them, with the relations told and how."""
    people = [shima().stranger(rng, held_out) for _ in range(count)]
    relations = [rng.sample(list(RELATIONS), 2) for _ in people]
    told, asked = told_of(rng, people, relations), rng.randrange(count)
    return text_of(told), people[asked], dict(zip(relations[asked], told[asked], strict=True))


def _answerable(rng: random.Random, instruction: str, person: Person, relation: str, told: dict[str, str]) -> Draft:
    value, quote = person.facts[relation], told[relation]
    return Draft(
        f"{instruction}\n{question(rng, relation, person)}",
        f"Answer: {value}. The text says: {quote}",
        f"The answer is {value} (another {relation} of the text, or a refusal: 2; else 1), with the sentence: {quote} "
        "(without: at most 4).",
        {"value": value, "relation": relation, "told": [quote]},
    )


def make_story(rng: random.Random, held_out: bool) -> Draft:
    """Three sentences about a person, a thing and a place."""
    while True:
        name, thing, place = rng.choice(shima().people[:NUM_KNOWN]).name, rng.choice(THINGS), rng.choice(PLACES)
        if is_held_out(f"story {name} {thing} {place}") == held_out:
            break
    return Draft(
        f"Write three sentences about {name}, a {thing} and a {place}.",
        f"{name} went to the {place}. By the {place} somebody had lost a {thing}. {name} took the {thing} home.",
        f"A point for each: exactly three sentences; {name}; the {thing}; the {place}; whole sentences of at least "
        "four words that differ.",
        {"words": [name, thing, place]},
    )


MAKERS: dict[str, Callable[[random.Random, bool], Draft]] = {
    "fact": make_fact,
    "describe": make_describe,
    "evidence": make_evidence,
    "sum": make_sum,
    "mood": make_mood,
    "compare": make_compare,
    "unknown": make_unknown,
    "list": make_list,
    "extract": make_extract,
    "story": make_story,
}
