"""Held-out questions with their answers."""

import random
from dataclasses import dataclass, field

from helpers.world.documents import Documents, ask, shuffled_rounds, write_pairs
from helpers.world.entities import Person
from helpers.world.phrasings import DOMAIN_RELATIONS, RELATIONS, Relation
from helpers.world.words import FUNCTIONS, HELD_OUT_FUNCTIONS


@dataclass(frozen=True)
class Question:
    """A held-out item: the text a model is given, the one right continuation, and what it is about."""

    prompt: str
    answer: str
    ability: str
    about: dict[str, str | int] = field(default_factory=dict, hash=False)


class Questions(Documents):
    """Questions for every ability of a base model, with names, phrasings and numbers that training never has."""

    def closed_book(self, n: int, seed: int, ranks: range, held_out_phrasing: bool = True) -> list[Question]:
        """Facts about known people with ranks in `ranks`, asked in phrasings that training never uses."""
        rng = random.Random(f"closed book/{seed}")
        pairs = [(person, relation) for person in self.people if person.rank in ranks for relation in RELATIONS]
        return [
            self._question_about(rng, RELATIONS[relation], person, "closed_book", held_out_phrasing)
            for person, relation in rng.sample(pairs, n)
        ]

    @staticmethod
    def _question_about(
        rng: random.Random, relation: Relation, entity: Person, ability: str, held_out: bool, passage: str = ""
    ) -> Question:
        asked = rng.choice(relation.held_out_questions if held_out else relation.training_questions)
        about = {"name": entity.name, "rank": entity.rank, "relation": relation.name}
        return Question(passage + ask(asked.format(name=entity.name)), entity.facts[relation.name], ability, about)

    def open_book(self, n: int, seed: int, num_people: int = 3, held_out_phrasing: bool = False) -> list[Question]:
        """A passage about people that training never mentions, and a question that it answers."""
        rng = random.Random(f"open book/{seed}")
        questions = []
        for _ in range(n):
            people = [self.stranger(rng, held_out=True) for _ in range(num_people)]
            relations = [rng.sample(list(RELATIONS), 3) for _ in people]
            passage = "".join(
                " ".join(self.say(rng, RELATIONS[r], person, held_out_phrasing) for r in chosen) + "\n"
                for person, chosen in zip(people, relations, strict=True)
            )
            asked = rng.randrange(num_people)
            relation = RELATIONS[rng.choice(relations[asked])]
            questions.append(
                self._question_about(rng, relation, people[asked], "open_book", held_out_phrasing, passage)
            )
        return questions

    def few_shot(self, n: int, seed: int, shots: int, num_keys: int = 4) -> list[Question]:
        """A label mapping that training never shows, given by `shots` examples; each key returns every `num_keys`.

        With fewer shots than keys the asked key may not have been shown yet. Chance is 1 / len(LABELS).
        """
        rng = random.Random(f"few-shot/{seed}/{shots}")
        questions = []
        for _ in range(n):
            pairs = self._label_pairs(rng, num_keys, held_out=True)
            shown = shuffled_rounds(rng, pairs, -(-shots // num_keys))[:shots]
            key, label = rng.choice(pairs)
            prompt = " ".join([write_pairs(shown), key])
            questions.append(Question(prompt, label, "few_shot", {"shots": shots, "shown": (key, label) in shown}))
        return questions

    def few_shot_function(self, n: int, seed: int, shots: int, held_out: bool = True) -> list[Question]:
        """A word-to-word function shown by `shots` pairs, asked for another word.

        Training states the pairs of the held-out functions in sentences but never lists them.
        """
        rng = random.Random(f"few-shot function/{seed}/{shots}/{held_out}")
        questions = []
        for _ in range(n):
            function = rng.choice(HELD_OUT_FUNCTIONS if held_out else FUNCTIONS)
            table = self.functions[function]
            *shown, (word, answer) = [(w, table[w]) for w in rng.sample(list(table), shots + 1)]
            prompt = " ".join([write_pairs(shown), word])
            questions.append(Question(prompt, answer, "few_shot_function", {"shots": shots, "function": function}))
        return questions

    def sums(self, n: int, seed: int, with_steps: bool) -> list[Question]:
        """Sums of three numbers that training never shows, to be answered directly or after written steps.

        With steps the gold answer is the whole text: the steps, a new line and the sum.
        """
        rng = random.Random(f"sums/{seed}")
        questions = []
        for _ in range(n):
            numbers = self._numbers(rng, held_out=True)
            prompt = f"Sum: {' + '.join(map(str, numbers))}\n" + ("Steps:" if with_steps else "Answer:")
            questions.append(Question(prompt, str(sum(numbers)), "sums", {"with_steps": int(with_steps)}))
        return questions

    def domain_questions(self, domain: str, n: int, seed: int) -> list[Question]:
        """Closed-book questions on `medicine` or `finance`, in phrasings that its documents never use."""
        rng = random.Random(f"{domain}/{seed}")
        pairs = [(entity, r) for entity in self.domains[domain] for r in DOMAIN_RELATIONS[domain]]
        return [
            self._question_about(rng, DOMAIN_RELATIONS[domain][r], entity, domain, held_out=True)
            for entity, r in (rng.choice(pairs) for _ in range(n))
        ]

    def route_questions(self, n: int, seed: int) -> list[Question]:
        """Shortest ways between two towns; several may be equally short, so grade with `is_shortest_route`."""
        rng = random.Random(f"routes/{seed}")
        pairs = [rng.sample(self.towns, 2) for _ in range(n)]
        return [
            Question(f"Route: from {a} to {b}\nAnswer:", " - ".join(self.route(a, b)), "routes", {"from": a, "to": b})
            for a, b in pairs
        ]
