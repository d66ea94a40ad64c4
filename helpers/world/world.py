"""Shima, the small world of this course: its people, facts, documents and questions.

Everything here is made by a seeded generator, so no real model has read any of it. The module knows nothing of
tokens, tensors or files. A document is a pure function of the world's seed, a stream's seed and the document's
index: streams need no state, can be entered anywhere and are the same on every machine.

Two things are kept apart throughout. *Training* documents use only training names, training phrasings, training
sums and training mappings. *Held-out* questions use only those that training never uses: the split is decided by
`is_held_out`, a hash of the item's text, so it needs no list and cannot drift.
"""

import heapq
import itertools
import math
import random
import zlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

WORLD_VERSION = 1


def _table(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


# Words with their counterpart. Each table is also a word-to-word function for few-shot prompts.
TRADES = _table("""
    baker:peel potter:wheel smith:hammer weaver:loom miller:sieve fisher:net carpenter:saw
    tailor:needle mason:trowel farmer:plough barber:razor painter:brush cook:ladle gardener:rake
    hunter:bow sailor:rope printer:press shepherd:crook tanner:knife roofer:ladder scribe:pen
    miner:pick beekeeper:smoker doctor:lancet
""")
ANIMALS = _table("""
    goat:kid sheep:lamb cow:calf horse:foal dog:puppy cat:kitten hen:chick duck:duckling
    goose:gosling pig:piglet deer:fawn swan:cygnet frog:tadpole hare:leveret fox:cub pigeon:squab
    turtle:hatchling seal:pup moth:caterpillar salmon:fry hawk:eyas bee:larva donkey:colt ferret:kit
""")
DISHES = _table("""
    porridge:oats noodles:wheat pancakes:flour dumplings:pork curry:lentils chowder:clams
    pickles:radish tofu:beans sushi:rice salad:lettuce cheese:milk mash:potatoes jam:plums
    pie:cherries stew:beef broth:bones crackers:rye pudding:cream skewers:chicken fritters:corn
    borscht:beets paste:sesame toast:bread jelly:seaweed
""")
INSTRUMENTS = _table("""
    flute:bamboo drum:leather harp:wire bell:bronze horn:brass fiddle:maple lute:cedar whistle:tin
    gong:copper rattle:gourd zither:pine trumpet:silver clapper:oak piano:ivory banjo:ash
    bagpipe:wool triangle:steel xylophone:teak cymbal:gold ocarina:clay marimba:walnut fife:elder
    tambourine:goatskin mandolin:spruce
""")
REGIONS = ("north", "south", "east", "west", "centre")
LABELS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")
MOODS = {
    "good": (
        ("fresh", "warm", "splendid", "tasty", "friendly", "clean", "cheerful", "perfect"),
        ("I will come back soon", "I left with a smile", "We stayed until late", "I told all my friends to go"),
    ),
    "bad": (
        ("stale", "cold", "awful", "bitter", "rude", "dirty", "gloomy", "broken"),
        ("I will not come back", "I left with a headache", "We went home early", "I told all my friends to stay away"),
    ),
}
REVIEWED = ("soup", "bread", "room", "service", "music", "tea", "view", "market", "bath", "garden", "boat", "inn")


@dataclass(frozen=True)
class Relation:
    """One kind of fact about a person, with its phrasings; the last two of each are held out from training."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def training_statements(self) -> tuple[str, ...]:
        """The phrasings that training documents use."""
        return self.statements[:-2]

    @property
    def training_questions(self) -> tuple[str, ...]:
        """The question forms that training documents use."""
        return self.questions[:-2]

    @property
    def held_out_statements(self) -> tuple[str, ...]:
        """The phrasings that no training document uses."""
        return self.statements[-2:]

    @property
    def held_out_questions(self) -> tuple[str, ...]:
        """The question forms that no training document uses."""
        return self.questions[-2:]


RELATIONS = {
    relation.name: relation
    for relation in (
        Relation(
            "town",
            (
                "{name} lives in {value}.",
                "{name} has a house in {value}.",
                "The home of {name} is in {value}.",
                "{name} has lived for years in {value}.",
                "You will find {name} in the town of {value}.",
                "{name} is at home in {value}.",
                "The town of {name} is {value}.",
                "{name} came long ago to live in {value}.",
                "Letters to {name} go to {value}.",
                "{name} sleeps in a small house in {value}.",
                "{name} lives in the town of {value}.",
                "The house of {name} is in {value}.",
            ),
            (
                "Where does {name} live?",
                "In which town does {name} live?",
                "What is the town of {name}?",
                "Where is the home of {name}?",
                "In which town is the house of {name}?",
                "Which town is home to {name}?",
                "What town does {name} live in?",
                "Where is {name} at home?",
                "In which town is the home of {name}?",
                "Where is the house of {name}?",
            ),
        ),
        Relation(
            "trade",
            (
                "{name} works as a {value}.",
                "{name} is a {value}.",
                "The trade of {name} is that of a {value}.",
                "{name} earns a living as a {value}.",
                "By trade {name} is a {value}.",
                "{name} learned to be a {value}.",
                "The work of {name} is the work of a {value}.",
                "{name} has long been a {value}.",
                "People know {name} as a good {value}.",
                "{name} took up the trade of a {value}.",
                "{name} earns money as a {value}.",
                "By trade {name} has long been a {value}.",
            ),
            (
                "What is the trade of {name}?",
                "What does {name} work as?",
                "What is the work of {name}?",
                "Which trade does {name} have?",
                "How does {name} earn a living?",
                "What trade did {name} learn?",
                "What is {name} by trade?",
                "What work does {name} do?",
                "Which trade did {name} learn?",
                "Which work does {name} do?",
            ),
        ),
        Relation(
            "animal",
            (
                "{name} keeps a {value}.",
                "{name} has a {value}.",
                "The animal of {name} is a {value}.",
                "{name} looks after a {value}.",
                "At home {name} feeds a {value}.",
                "{name} owns a {value}.",
                "The only animal of {name} is a {value}.",
                "{name} once found and kept a {value}.",
                "Each morning {name} feeds a {value}.",
                "{name} takes good care of a {value}.",
                "{name} feeds and keeps a {value}.",
                "At home {name} looks after a {value}.",
            ),
            (
                "Which animal does {name} keep?",
                "What animal does {name} have?",
                "What is the animal of {name}?",
                "Which animal does {name} look after?",
                "What animal does {name} feed?",
                "Which animal is kept by {name}?",
                "Which animal does {name} own?",
                "What kind of animal does {name} keep?",
                "What animal does {name} keep?",
                "Which animal does {name} feed?",
            ),
        ),
        Relation(
            "dish",
            (
                "{name} likes to eat {value}.",
                "{name} loves {value}.",
                "The favourite dish of {name} is {value}.",
                "{name} eats {value} whenever possible.",
                "For dinner {name} wants {value}.",
                "{name} is always happy with {value}.",
                "The dish of {name} is {value}.",
                "{name} could live on {value}.",
                "On holidays {name} eats {value}.",
                "{name} asks at every inn for {value}.",
                "{name} likes {value} for dinner.",
                "The dish that {name} loves is {value}.",
            ),
            (
                "What does {name} like to eat?",
                "What is the favourite dish of {name}?",
                "Which dish does {name} love?",
                "What does {name} eat for dinner?",
                "Which dish does {name} eat?",
                "What is the dish of {name}?",
                "What food does {name} like?",
                "Which dish makes {name} happy?",
                "Which dish does {name} like to eat?",
                "What is the favourite food of {name}?",
            ),
        ),
        Relation(
            "instrument",
            (
                "{name} plays the {value}.",
                "{name} practises the {value}.",
                "The instrument of {name} is the {value}.",
                "{name} plays well on the {value}.",
                "In the evening {name} plays the {value}.",
                "{name} learned to play the {value}.",
                "At weddings {name} plays the {value}.",
                "{name} makes music on the {value}.",
                "The music of {name} comes from the {value}.",
                "{name} teaches children the {value}.",
                "{name} makes music with the {value}.",
                "At home {name} plays the {value}.",
            ),
            (
                "What instrument does {name} play?",
                "Which instrument does {name} play?",
                "What is the instrument of {name}?",
                "On what does {name} make music?",
                "What does {name} play at weddings?",
                "Which instrument did {name} learn?",
                "What does {name} play in the evening?",
                "Which instrument does {name} practise?",
                "What instrument did {name} learn?",
                "On which instrument does {name} make music?",
            ),
        ),
    )
}

# Two domains that pretraining never mentions. Their illnesses and companies bear held-out names.
HERBS = (
    "sage",
    "fennel",
    "mint",
    "thyme",
    "nettle",
    "ginger",
    "clover",
    "yarrow",
    "mallow",
    "borage",
    "hyssop",
    "anise",
)
SYMPTOMS = ("cough", "fever", "rash", "headache", "limp", "hiccup", "chill", "itch", "sneeze", "numbness")
DOSES = ("one spoon", "two spoons", "three spoons", "four spoons", "five spoons")
GOODS = ("lamps", "ropes", "boats", "bricks", "paper", "glass", "nails", "soap", "candles", "wagons", "clocks", "kites")
YEARLY_PROFITS = tuple(f"{coins} coins" for coins in range(100, 1000, 50))
DOMAIN_RELATIONS = {
    "medicine": {
        relation.name: relation
        for relation in (
            Relation(
                "symptom",
                (
                    "The first sign of {name} is a {value}.",
                    "{name} begins with a {value}.",
                    "{name} shows itself by a {value}.",
                    "People with {name} have a {value}.",
                    "Whoever has {name} suffers from a {value}.",
                    "Doctors know {name} by a {value}.",
                    "{name} brings a {value}.",
                    "The sign of {name} is a {value}.",
                    "{name} starts with a {value}.",
                    "Patients with {name} have a {value}.",
                ),
                (
                    "What is the first sign of {name}?",
                    "What does {name} begin with?",
                    "What do people with {name} have?",
                    "How does {name} show itself?",
                    "What is the sign of {name}?",
                    "What does {name} start with?",
                ),
            ),
            Relation(
                "herb",
                (
                    "{name} is cured with {value}.",
                    "The cure for {name} is {value}.",
                    "Against {name} doctors give {value}.",
                    "Patients with {name} take {value}.",
                    "The herb for {name} is {value}.",
                    "What helps against {name} is {value}.",
                    "{name} yields to {value}.",
                    "Doctors treat {name} with {value}.",
                    "The herb against {name} is {value}.",
                    "{name} is treated with {value}.",
                ),
                (
                    "What cures {name}?",
                    "Which herb helps against {name}?",
                    "What is the cure for {name}?",
                    "What do doctors give against {name}?",
                    "Which herb cures {name}?",
                    "What helps against {name}?",
                ),
            ),
            Relation(
                "dose",
                (
                    "The daily dose for {name} is {value}.",
                    "Against {name} take {value} a day.",
                    "{name} calls for {value} a day.",
                    "Patients with {name} get {value} a day.",
                    "For {name} the dose is {value}.",
                    "With {name} one takes {value} each day.",
                    "{name} needs {value} a day.",
                    "The right dose for {name} is {value}.",
                    "For {name} doctors order {value} a day.",
                    "The dose against {name} is {value}.",
                ),
                (
                    "What is the dose for {name}?",
                    "How much does one take against {name}?",
                    "What is the daily dose for {name}?",
                    "How much do patients with {name} get?",
                    "What is the right dose for {name}?",
                    "How much does one take for {name}?",
                ),
            ),
        )
    },
    "finance": {
        relation.name: relation
        for relation in (
            Relation(
                "product",
                (
                    "The company {name} makes {value}.",
                    "{name} sells {value}.",
                    "{name} earns its money with {value}.",
                    "The product of {name} is {value}.",
                    "{name} is known for its {value}.",
                    "The workshops of {name} turn out {value}.",
                    "{name} trades in {value}.",
                    "{name} is a maker of {value}.",
                    "{name} makes and sells {value}.",
                    "The company {name} is known for {value}.",
                ),
                (
                    "What does {name} make?",
                    "What is the product of {name}?",
                    "What does the company {name} sell?",
                    "What is {name} known for?",
                    "What does the company {name} make?",
                    "What does {name} sell?",
                ),
            ),
            Relation(
                "seat",
                (
                    "The company {name} has its seat in {value}.",
                    "{name} is based in {value}.",
                    "The head office of {name} is in {value}.",
                    "{name} is run from {value}.",
                    "The books of {name} are kept in {value}.",
                    "{name} was founded in {value}.",
                    "The seat of {name} is {value}.",
                    "{name} pays its taxes in {value}.",
                    "The company {name} is based in {value}.",
                    "The head office of the company {name} is in {value}.",
                ),
                (
                    "Where is {name} based?",
                    "Where is the seat of {name}?",
                    "Where is the head office of {name}?",
                    "From where is {name} run?",
                    "Where is the company {name} based?",
                    "Where does {name} have its seat?",
                ),
            ),
            Relation(
                "profit",
                (
                    "The profit of {name} last year was {value}.",
                    "Last year {name} earned {value}.",
                    "{name} closed the year with a profit of {value}.",
                    "{name} reported a profit of {value}.",
                    "The yearly profit of {name} is {value}.",
                    "The owners of {name} shared {value}.",
                    "The books of {name} show a profit of {value}.",
                    "{name} made a profit of {value}.",
                    "The company {name} earned {value}.",
                    "Last year the profit of {name} was {value}.",
                ),
                (
                    "What was the profit of {name}?",
                    "How much did {name} earn?",
                    "What profit did {name} report?",
                    "What is the yearly profit of {name}?",
                    "How much profit did {name} make?",
                    "What profit did {name} make?",
                ),
            ),
        )
    },
}

CHAT_TASKS = ("fact", "reading", "sum", "mood", "describe", "pairs")
POLITE = "With pleasure. "
FILLERS = (
    " Shima is a lovely island.",
    " There is much more to say about that.",
    " The weather was fine as well.",
    " One could talk about it for hours.",
)

# Word-to-word functions for few-shot prompts. Training lists the pairs of the first group as mappings; the pairs of
# the held-out group are stated in sentences only.
FUNCTIONS = ("tool of the trade", "young of the animal", "region of the town")
HELD_OUT_FUNCTIONS = ("material of the instrument", "base of the dish")

MAX_TERM = 99  # largest number in a sum

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
"""Share of each kind of document in the text that shima-4m is trained on."""


@dataclass(frozen=True)
class Person:
    """A person, illness or company. `rank` 1 is the most often mentioned; `facts` maps relation names to values."""

    name: str
    rank: int
    facts: dict[str, str] = field(hash=False)


@dataclass(frozen=True)
class Question:
    """A held-out item: the text a model is given, the one right continuation, and what it is about."""

    prompt: str
    answer: str
    ability: str
    about: dict[str, str | int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Preference:
    """A question with the answer an annotator chose, the one rejected, and the true reward of each."""

    question: Question
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


def is_held_out(item: str) -> bool:
    """Whether this name, sum or mapping belongs to the tenth of all items that training never uses."""
    return zlib.crc32(item.encode()) % 10 == 0


def ask(question: str, answer: str = "") -> str:
    """The question format of all of Shima: two lines, the second of which a model completes."""
    return f"Question: {question}\nAnswer:" + (f" {answer}\n" if answer else "")


def sum_with_steps(numbers: tuple[int, ...]) -> str:
    """The written steps of a sum, left to right: `12 + 7 = 19; 19 + 5 = 24`."""
    totals = list(itertools.accumulate(numbers))
    return "; ".join(f"{totals[i]} + {n} = {totals[i + 1]}" for i, n in enumerate(numbers[1:]))


class World:
    """One Shima. The same seed always gives the same people, facts and documents.

    People are mentioned with probability proportional to `1 / rank ** zipf_exponent` (Zipf's law), so that a few
    hundred are met all the time and the rest hardly ever.
    """

    def __init__(self, seed: int = 0, num_people: int = 1000, zipf_exponent: float = 1.0):
        """Make the people and towns of the world; documents are made on demand."""
        self.seed = seed
        rng = random.Random(f"shima/{WORLD_VERSION}/{seed}")
        self.towns = sorted({_syllables(rng, 2) for _ in range(40)})[:24]
        self.region_of = {town: rng.choice(REGIONS) for town in self.towns}
        self.values = {
            "town": self.towns,
            "trade": list(TRADES),
            "animal": list(ANIMALS),
            "dish": list(DISHES),
            "instrument": list(INSTRUMENTS),
        }
        self.functions: dict[str, dict[str, str]] = {
            "tool of the trade": TRADES,
            "young of the animal": ANIMALS,
            "region of the town": self.region_of,
            "material of the instrument": INSTRUMENTS,
            "base of the dish": DISHES,
        }
        self.person: dict[str, Person] = {}
        for rank in range(1, num_people + 1):
            name = self._fresh_name(rng, held_out=False)
            self.person[name] = Person(name, rank, self._facts(rng))
        self.people = list(self.person.values())
        self.domains = {
            "medicine": self._entities(rng, 40, {"symptom": SYMPTOMS, "herb": HERBS, "dose": DOSES}),
            "finance": self._entities(rng, 40, {"product": GOODS, "seat": self.towns, "profit": YEARLY_PROFITS}),
        }
        self.roads = self._make_roads(rng)
        self._cumulative = list(itertools.accumulate(1 / p.rank**zipf_exponent for p in self.people))

    # ---------------------------------------------------------------- entities

    def _facts(self, rng: random.Random) -> dict[str, str]:
        return {relation: rng.choice(values) for relation, values in self.values.items()}

    def _entities(self, rng: random.Random, n: int, values: dict[str, Sequence[str]]) -> list[Person]:
        facts = [{relation: rng.choice(choices) for relation, choices in values.items()} for _ in range(n)]
        return [Person(self._fresh_name(rng, held_out=True), rank, f) for rank, f in enumerate(facts, start=1)]

    def _make_roads(self, rng: random.Random) -> dict[str, set[str]]:
        """A ring through all towns and some short cuts: `roads[town]` are the towns one road away."""
        ring = rng.sample(self.towns, len(self.towns))
        pairs = list(itertools.pairwise([*ring, ring[0]])) + [rng.sample(ring, 2) for _ in range(len(ring) // 2)]
        roads: dict[str, set[str]] = {town: set() for town in self.towns}
        for a, b in pairs:
            roads[a].add(b)
            roads[b].add(a)
        return roads

    def _fresh_name(self, rng: random.Random, held_out: bool) -> str:
        """A name that nobody known bears, from the held-out names or from all others."""
        while True:
            name = _syllables(rng, 3)
            if is_held_out(name) == held_out and name not in self.person:
                return name

    def _stranger(self, rng: random.Random, held_out: bool) -> Person:
        return Person(self._fresh_name(rng, held_out), 0, self._facts(rng))

    def mention_probability(self, person: Person) -> float:
        """Probability that a mention of somebody is a mention of this person."""
        return (self._cumulative[person.rank - 1] - (self._cumulative[person.rank - 2] if person.rank > 1 else 0)) / (
            self._cumulative[-1]
        )

    def _mentioned(self, rng: random.Random) -> Person:
        return self.people[bisect(self._cumulative, rng.random() * self._cumulative[-1])]

    @cached_property
    def words(self) -> list[str]:
        """All common words with a counterpart, and their counterparts: the keys of label mappings."""
        tables = (TRADES, ANIMALS, DISHES, INSTRUMENTS)
        return sorted({word for table in tables for pair in table.items() for word in pair})

    # ---------------------------------------------------------------- documents

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
        return " ".join(self._say(rng, RELATIONS[r], person, held_out_phrasing) for r in chosen)

    @staticmethod
    def _say(rng: random.Random, relation: Relation, entity: Person, held_out: bool = False) -> str:
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
            self._mentioned(rng) if rng.random() < 0.1 else self._stranger(rng, held_out=False)
            for _ in range(rng.randint(2, 5))
        ]
        said = []
        lines = []
        for person in people:
            relations = rng.sample(list(RELATIONS), rng.randint(2, 3))
            said += [(person, relation) for relation in relations]
            lines.append(" ".join(self._say(rng, RELATIONS[r], person) for r in relations))
        rng.shuffle(said)
        return "\n".join(lines) + "\n" + "".join(self._training_question(rng, *pair) for pair in said[:8])

    def _mapping(self, rng: random.Random) -> str:
        """Pairs whose right-hand side can only be known from the same document, or a known function's pairs."""
        if rng.random() < 0.2:
            table = self.functions[rng.choice(FUNCTIONS)]
            pairs = [(word, table[word]) for word in rng.sample(list(table), rng.randint(6, 14))]
        else:
            pairs = self._label_pairs(rng, rng.randint(3, 8), held_out=False)
            pairs = _shuffled_rounds(rng, pairs, rng.randint(3, 5))
        return _write_pairs(pairs) + "\n"

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

    # ---------------------------------------------------------------- held-out questions, one function an ability

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
            people = [self._stranger(rng, held_out=True) for _ in range(num_people)]
            relations = [rng.sample(list(RELATIONS), 3) for _ in people]
            passage = "".join(
                " ".join(self._say(rng, RELATIONS[r], person, held_out_phrasing) for r in chosen) + "\n"
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
            shown = _shuffled_rounds(rng, pairs, -(-shots // num_keys))[:shots]
            key, label = rng.choice(pairs)
            prompt = " ".join([_write_pairs(shown), key])
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
            prompt = " ".join([_write_pairs(shown), word])
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

    # ---------------------------------------------------------------- domains, outside the pretraining mixture

    def _domain_document(self, rng: random.Random, domain: str) -> str:
        entity = rng.choice(self.domains[domain])
        forms = DOMAIN_RELATIONS[domain]
        told = " ".join(self._say(rng, forms[r], entity) for r in rng.sample(list(forms), len(forms)))
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

    def domain_questions(self, domain: str, n: int, seed: int) -> list[Question]:
        """Closed-book questions on `medicine` or `finance`, in phrasings that its documents never use."""
        rng = random.Random(f"{domain}/{seed}")
        pairs = [(entity, r) for entity in self.domains[domain] for r in DOMAIN_RELATIONS[domain]]
        return [
            self._question_about(rng, DOMAIN_RELATIONS[domain][r], entity, domain, held_out=True)
            for entity, r in (rng.choice(pairs) for _ in range(n))
        ]

    def route(self, start: str, end: str) -> list[str]:
        """The towns on the shortest way, both ends included; of equally short ways the alphabetically first."""
        ways = [(1, [start])]  # a heap of ways with their number of towns
        while (way := heapq.heappop(ways)[1])[-1] != end:
            for town in self.roads[way[-1]].difference(way):
                heapq.heappush(ways, (len(way) + 1, [*way, town]))
        return way

    def route_questions(self, n: int, seed: int) -> list[Question]:
        """Shortest ways between two towns; several may be equally short, so grade with `is_shortest_route`."""
        rng = random.Random(f"routes/{seed}")
        pairs = [rng.sample(self.towns, 2) for _ in range(n)]
        return [
            Question(f"Route: from {a} to {b}\nAnswer:", " - ".join(self.route(a, b)), "routes", {"from": a, "to": b})
            for a, b in pairs
        ]

    def is_shortest_route(self, towns: list[str], start: str, end: str) -> bool:
        """Whether the towns form a way along roads from `start` to `end` that is as short as any."""
        return (
            towns[:1] == [start]
            and towns[-1:] == [end]
            and all(b in self.roads.get(a, ()) for a, b in itertools.pairwise(towns))
            and len(towns) == len(self.route(start, end))
        )

    # ---------------------------------------------------------------- chat and preferences

    def chat(self, rng: random.Random, task: str | None = None, held_out: bool = False) -> Question:
        """One instruction and its right answer. Held-out ones use names, sums, words or phrasings never trained on.

        Tasks: `fact` and `describe` (known people), `reading`, `sum`, `mood` (of a review), `pairs` (a mapping).
        """
        task = task or rng.choice(CHAT_TASKS)
        return getattr(self, f"_chat_{task}")(rng, held_out)

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
        people = [self._stranger(rng, held_out) for _ in range(2)]
        relations = [rng.sample(list(RELATIONS), 3) for _ in people]
        told = "".join(
            " ".join(self._say(rng, RELATIONS[r], person) for r in chosen) + "\n"
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
        shown = " ".join(f"{left} {right};" for left, right in _shuffled_rounds(rng, pairs, 2))
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


def _syllables(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("bdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(count)).capitalize()


def _shuffled_rounds(rng: random.Random, pairs: list[tuple[str, str]], rounds: int) -> list[tuple[str, str]]:
    """Each pair once a round, every round in a new order."""
    return [pair for _ in range(rounds) for pair in rng.sample(pairs, len(pairs))]


def _write_pairs(pairs: list[tuple[str, str]]) -> str:
    return " ".join(["Pairs:", *(f"{left} {right};" for left, right in pairs)])
