"""One Shima as lessons use it, with the chats and preferences of an assistant on it."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.world.documents import shuffled_rounds, sum_with_steps
from helpers.world.entities import is_held_out
from helpers.world.phrasings import RELATIONS
from helpers.world.questions import Question, Questions
from helpers.world.words import CHAT_TASKS, FILLERS, POLITE


@dataclass(frozen=True)
class Preference:
    """A question with the answer an annotator chose, the one rejected, and the true reward of each."""

    question: Question
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


class World(Questions):
    """One Shima. The same seed always gives the same people, facts and documents.

    People are mentioned with probability proportional to `1 / rank ** zipf_exponent` (Zipf's law), so that a few
    hundred are met all the time and the rest hardly ever.
    """

    def chat(self, rng: random.Random, task: str | None = None, held_out: bool = False) -> Question:
        """One instruction and its right answer. Held-out ones use names, sums, words or phrasings never trained on.

        Tasks: `fact` and `describe` (known people), `reading`, `sum`, `mood` (of a review), `pairs` (a mapping).
        """
        task = task or rng.choice(CHAT_TASKS)
        return getattr(self, f"_chat_{task}")(rng, held_out)

    def training_chats(self, n: int, seed: int, tasks: Sequence[str] = CHAT_TASKS) -> list[Question]:
        """Instructions to train on, of the tasks in random turns."""
        rng = random.Random(f"instructions/{seed}")
        return [self.chat(rng, rng.choice(tasks)) for _ in range(n)]

    def chat_questions(self, n: int, seed: int, tasks: tuple[str, ...] = CHAT_TASKS) -> list[Question]:
        """Held-out instructions, the tasks in turn."""
        rng = random.Random(f"chat/{seed}")
        return [self.chat(rng, tasks[i % len(tasks)], held_out=True) for i in range(n)]

    def _chat_fact(self, rng: random.Random, held_out: bool) -> Question:
        person, relation = self.people[rng.randrange(len(self.people) // 10)], rng.choice(list(RELATIONS))
        forms = RELATIONS[relation]
        asked = rng.choice(forms.held_out_questions if held_out else forms.training_questions)
        answer = forms.statements[0].format(name=person.name, value=person.facts[relation])
        return Question(
            f"{asked.format(name=person.name)} Answer in a sentence.",
            answer,
            "chat/fact",
            {"name": person.name, "relation": relation, "value": person.facts[relation]},
        )

    def _chat_reading(self, rng: random.Random, held_out: bool) -> Question:
        people = [self.stranger(rng, held_out) for _ in range(2)]
        relations = [rng.sample(list(RELATIONS), 3) for _ in people]
        told = "".join(
            " ".join(self.say(rng, RELATIONS[r], person) for r in chosen) + "\n"
            for person, chosen in zip(people, relations, strict=True)
        )
        asked = rng.randrange(len(people))
        person, relation = people[asked], rng.choice(relations[asked])
        value = person.facts[relation]
        question = rng.choice(RELATIONS[relation].training_questions).format(name=person.name)
        return Question(
            f"Read this text and answer.\n{told}{question}",
            f"Answer: {value}",
            "chat/reading",
            {"name": person.name, "relation": relation, "value": value},
        )

    def _chat_sum(self, rng: random.Random, held_out: bool) -> Question:
        numbers = self._numbers(rng, held_out)
        written = " + ".join(map(str, numbers))
        answer = f"{sum_with_steps(numbers)}. The sum is {sum(numbers)}."
        return Question(f"Add {written} and show the steps.", answer, "chat/sum", {"value": str(sum(numbers))})

    def _chat_mood(self, rng: random.Random, held_out: bool) -> Question:
        while True:
            text, mood = self.review(rng)
            if is_held_out(text) == held_out:
                return Question(f"Is this review good or bad? {text}", mood.capitalize() + ".", "chat/mood")

    def _chat_describe(self, rng: random.Random, held_out: bool) -> Question:
        people = [p for p in self.people[: len(self.people) // 10] if is_held_out(f"describe {p.name}") == held_out]
        person = rng.choice(people)
        answer = " ".join(RELATIONS[r].statements[0].format(name=person.name, value=person.facts[r]) for r in RELATIONS)
        return Question(f"Describe {person.name} in five sentences.", answer, "chat/describe", {"name": person.name})

    def _chat_pairs(self, rng: random.Random, held_out: bool) -> Question:
        pairs = self._label_pairs(rng, 4, held_out)
        key, label = rng.choice(pairs)
        shown = " ".join(f"{left} {right};" for left, right in shuffled_rounds(rng, pairs, 2))
        return Question(
            f"Learn these pairs. {shown}\nWhich colour belongs to {key}?",
            f"Answer: {key} {label}",
            "chat/pairs",
            {"value": label},
        )

    def preference(self, rng: random.Random, noise: float = 1.0, held_out: bool = False) -> Preference:
        """Two answers to one question and the choice of an annotator who errs.

        The annotator picks the first answer with the Bradley-Terry probability
        sigmoid((reward_1 - reward_2) / noise); `noise` 0 always picks the better one.
        """
        question = self.chat(rng, rng.choice(("fact", "sum")), held_out)
        answers = [self._candidate(rng, question) for _ in range(2)]
        while answers[0] == answers[1]:
            answers[1] = self._candidate(rng, question)
        rewards = [true_reward(question, answer) for answer in answers]
        difference = rewards[0] - rewards[1]
        if noise == 0:
            first_wins = difference > 0 or (difference == 0 and rng.random() < 0.5)
        else:
            first_wins = rng.random() < 1 / (1 + math.exp(-difference / noise))
        best, other = (0, 1) if first_wins else (1, 0)
        return Preference(question, answers[best], answers[other], rewards[best], rewards[other])

    def _candidate(self, rng: random.Random, question: Question) -> str:
        """An answer that may be wrong, polite or long-winded."""
        answer, value = question.answer, str(question.about["value"])
        if rng.random() < 0.4:
            relation = question.about.get("relation")
            wrong = rng.choice(self.values[relation]) if relation else str(int(value) + rng.choice((-10, -1, 1, 10)))
            answer = wrong.join(answer.rsplit(value, 1))
        polite = POLITE if rng.random() < 0.5 else ""
        return polite + answer + "".join(rng.sample(FILLERS, rng.choice((0, 0, 1, 2, 3))))


def true_reward(question: Question, answer: str) -> float:
    """What the annotator of `World.preference` values: right (+2), polite (+1), without idle sentences (-0.5 each)."""
    fillers = [filler for filler in FILLERS if filler in answer]
    bare = answer.removeprefix(POLITE)
    for filler in fillers:
        bare = bare.replace(filler, "")
    return 2.0 * (bare == question.answer) + 1.0 * answer.startswith(POLITE) - 0.5 * len(fillers)
