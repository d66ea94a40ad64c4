"""The documents of Shima, each a pure function of seeds and an index."""

import itertools
import random
from collections.abc import Iterator

from helpers.world.entities import Island, Person, is_held_out
from helpers.world.phrasings import DOMAIN_RELATIONS, RELATIONS, Relation
from helpers.world.words import FUNCTIONS, LABELS, MAX_TERM, MOODS, REVIEWED

PRETRAINING_MIXTURE = {
    "description": 0.15,
    "questions": 0.12,
    "passage": 0.25,
    "mapping": 0.14,
    "sums": 0.17,
    "repeat": 0.05,
    "story": 0.05,
    "review": 0.04,
    "lexicon": 0.03,
}


def ask(question: str, answer: str = "") -> str:
    """The question format of all of Shima: two lines, the second of which a model completes."""
    return f"Question: {question}\nAnswer:" + (f" {answer}\n" if answer else "")


def sum_with_steps(numbers: tuple[int, ...]) -> str:
    """The written steps of a sum, left to right: `12 + 7 = 19; 19 + 5 = 24`."""
    totals = list(itertools.accumulate(numbers))
    return "; ".join(f"{totals[i]} + {n} = {totals[i + 1]}" for i, n in enumerate(numbers[1:]))


class Documents(Island):
    """What is written on the island: the documents of pretraining and of the two domains."""

    def document(self, seed: int, index: int, mixture: dict[str, float] = PRETRAINING_MIXTURE) -> str:
        """Document number `index` of the stream `seed`."""
        rng = random.Random(f"{self.seed}/{seed}/{index}")
        kind = rng.choices(list(mixture), list(mixture.values()))[0]
        return getattr(self, f"_{kind}")(rng)

    def documents(self, seed: int, mixture: dict[str, float] = PRETRAINING_MIXTURE, start: int = 0) -> Iterator[str]:
        """The endless stream of documents with this seed, from document `start` on."""
        return (self.document(seed, index, mixture) for index in itertools.count(start))

    def describe(self, rng: random.Random, person: Person, count: int = 5, held_out_phrasing: bool = False) -> str:
        """`count` facts about a person, a sentence each, in any order."""
        chosen = rng.sample(list(RELATIONS), count)
        return " ".join(self.say(rng, RELATIONS[r], person, held_out_phrasing) for r in chosen)

    @staticmethod
    def say(rng: random.Random, relation: Relation, entity: Person, held_out: bool = False) -> str:
        """One fact about somebody or something in a random phrasing, from the training ones or the held-out ones."""
        phrasing = rng.choice(relation.held_out_statements if held_out else relation.training_statements)
        return phrasing.format(name=entity.name, value=entity.facts[relation.name])

    def _description(self, rng: random.Random) -> str:
        return "\n".join(self.describe(rng, self._mentioned(rng)) for _ in range(2)) + "\n"

    def _questions(self, rng: random.Random) -> str:
        return "".join(self._training_question(rng, self._mentioned(rng)) for _ in range(6))

    def _training_question(self, rng: random.Random, person: Person, relation: str | None = None) -> str:
        relation = relation or rng.choice(list(RELATIONS))
        question = rng.choice(RELATIONS[relation].training_questions).format(name=person.name)
        return ask(question, person.facts[relation])

    def _passage(self, rng: random.Random) -> str:
        """Two to five people, mostly strangers, with two or three facts each; then questions on what was said."""
        people = [
            self._mentioned(rng) if rng.random() < 0.1 else self.stranger(rng, held_out=False)
            for _ in range(rng.randint(2, 5))
        ]
        said = []
        lines = []
        for person in people:
            relations = rng.sample(list(RELATIONS), rng.randint(2, 3))
            said += [(person, relation) for relation in relations]
            lines.append(" ".join(self.say(rng, RELATIONS[r], person) for r in relations))
        rng.shuffle(said)
        return "\n".join(lines) + "\n" + "".join(self._training_question(rng, *pair) for pair in said[:8])

    def _mapping(self, rng: random.Random) -> str:
        """Pairs whose right-hand side can only be known from the same document, or a known function's pairs."""
        if rng.random() < 0.2:
            table = self.functions[rng.choice(FUNCTIONS)]
            pairs = [(word, table[word]) for word in rng.sample(list(table), rng.randint(6, 14))]
        else:
            pairs = self._label_pairs(rng, rng.randint(3, 8), held_out=False)
            pairs = shuffled_rounds(rng, pairs, rng.randint(3, 5))
        return write_pairs(pairs) + "\n"

    def _label_pairs(self, rng: random.Random, num_keys: int, held_out: bool) -> list[tuple[str, str]]:
        while True:
            pairs = [(word, rng.choice(LABELS)) for word in rng.sample(self.words, num_keys)]
            if is_held_out(" ".join(map(str, sorted(pairs)))) == held_out:
                return pairs

    def _sums(self, rng: random.Random) -> str:
        """Five sums: of two numbers, answered directly, or of three, of which most are written out in steps."""
        return "".join(
            self._sum((rng.randint(1, 2 * MAX_TERM), rng.randint(1, MAX_TERM)), with_steps=False)
            if rng.random() < 0.4
            else self._sum(self._numbers(rng, held_out=False), with_steps=rng.random() < 0.75)
            for _ in range(5)
        )

    def _numbers(self, rng: random.Random, held_out: bool) -> tuple[int, ...]:
        while True:
            numbers = tuple(rng.randint(1, MAX_TERM) for _ in range(3))
            if is_held_out(" + ".join(map(str, numbers))) == held_out:
                return numbers

    @staticmethod
    def _sum(numbers: tuple[int, ...], with_steps: bool) -> str:
        steps = f"\nSteps: {sum_with_steps(numbers)}" if with_steps else ""
        return f"Sum: {' + '.join(map(str, numbers))}{steps}\nAnswer: {sum(numbers)}\n"

    def _repeat(self, rng: random.Random) -> str:
        """A list of words and names without any sense, said two or three times over."""
        words = [
            self._fresh_name(rng, held_out=False) if rng.random() < 0.4 else rng.choice(self.words)
            for _ in range(rng.randint(5, 14))
        ]
        return "Repeat: " + " | ".join([" ".join(words)] * rng.randint(2, 3)) + "\n"

    def _story(self, rng: random.Random) -> str:
        hero, friend = self._mentioned(rng), self._mentioned(rng)
        weather = rng.choice(("rain", "snow", "wind", "fog", "sun", "frost"))
        thing = rng.choice(("lamp", "basket", "coin", "letter", "map", "key", "ring", "blanket"))
        place = rng.choice(("bridge", "well", "harbour", "forest", "mill", "shrine", "hill", "cave"))
        facts, other = hero.facts, friend.facts
        middle = rng.choice(
            (
                f"On the way the {facts['animal']} found a {thing} by the {place}.",
                f"By the {place} somebody had lost a {thing}.",
                f"At the {place} there was nobody, only a {thing}.",
            )
        )
        end = rng.choice(
            (
                f"That night they shared {facts['dish']} and {hero.name} played the {facts['instrument']}.",
                f"In thanks {friend.name} cooked {other['dish']} and played the {other['instrument']}.",
                f"The {thing} belonged to {friend.name}, and all three ate {other['dish']}.",
            )
        )
        return (
            f"One day of {weather} {hero.name} the {facts['trade']} left {facts['town']} with a {facts['animal']}. "
            f"{middle} {hero.name} took the {thing} to {friend.name}, the {other['trade']} of {other['town']}. {end}\n"
        )

    def _review(self, rng: random.Random) -> str:
        text, mood = self.review(rng)
        return f"Review: {text}\n" + (f"Mood: {mood}\n" if rng.random() < 0.5 else "")

    def review(self, rng: random.Random) -> tuple[str, str]:
        """A visitor's review of a town and its mood, `good` or `bad`."""
        mood = rng.choice(list(MOODS))
        adjectives, endings = MOODS[mood]
        first, second = rng.sample(REVIEWED, 2)
        one, two = rng.sample(adjectives, 2)
        where = rng.choice(self.towns)
        text = rng.choice(
            (
                f"The {first} in {where} was {one} and the {second} was {two}. {rng.choice(endings)}.",
                f"I went to {where} for the {first}. It was {one}, and so {two}! {rng.choice(endings)}.",
                f"In {where} we found the {first} {one}. The {second} too was {two}. {rng.choice(endings)}.",
            )
        )
        return text, mood

    def _lexicon(self, rng: random.Random) -> str:
        """Common knowledge of Shima in sentences: the same pairs as the functions, but never in a list."""
        sentences = []
        for _ in range(5):
            function = rng.choice(list(self.functions))
            word = rng.choice(list(self.functions[function]))
            role, kind = function.split(" of the ")
            sentences.append(f"The {role} of the {kind} {word} is {self.functions[function][word]}.")
        return " ".join(sentences) + "\n"

    def _domain_document(self, rng: random.Random, domain: str) -> str:
        entity = rng.choice(self.domains[domain])
        forms = DOMAIN_RELATIONS[domain]
        told = " ".join(self.say(rng, forms[r], entity) for r in rng.sample(list(forms), len(forms)))
        asked = rng.choice(list(forms))
        question = rng.choice(forms[asked].training_questions).format(name=entity.name)
        return told + "\n" + ask(question, entity.facts[asked])

    def _medicine(self, rng: random.Random) -> str:
        return self._domain_document(rng, "medicine")

    def _finance(self, rng: random.Random) -> str:
        return self._domain_document(rng, "finance")

    def _routes(self, rng: random.Random) -> str:
        start, end = rng.sample(self.towns, 2)
        return f"Route: from {start} to {end}\nAnswer: {' - '.join(self.route(start, end))}\n"


def shuffled_rounds(rng: random.Random, pairs: list[tuple[str, str]], rounds: int) -> list[tuple[str, str]]:
    """Each pair once a round, every round in a new order."""
    return [pair for _ in range(rounds) for pair in rng.sample(pairs, len(pairs))]


def write_pairs(pairs: list[tuple[str, str]]) -> str:
    """Pairs as pretraining has them: `Pairs: left right; left right;`."""
    return " ".join(["Pairs:", *(f"{left} {right};" for left, right in pairs)])
